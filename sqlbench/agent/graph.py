"""The agent as one LangGraph state machine, the same for evaluation, training, the environment and the chat.

``write_query -> execute_query -> check_query -> (rewrite_query -> execute_query ...) -> END``. It ends when the check
calls the query correct, when `max_turns` queries were executed (the last one is not checked: its verdict could change
nothing), or when the model or the database breaks. The latter is written to the state's `error`, so that everything
done before is kept. The graph is compiled once; model, database, prompts and settings come in as LangGraph context.
No checkpointer, no tracing: a rollout talks to nothing but its model and its database.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import Runtime
from langsmith import tracing_context

from sqlbench.agent.prompts import Prompts, extract_sql, parse_verdict, render_execution
from sqlbench.agent.trajectory import Execution, Message, Transition
from sqlbench.config import RolloutConfig
from sqlbench.database.engine import Database, QueryResult
from sqlbench.database.schema import Schema
from sqlbench.models.base import ChatModel

SHOWN_ROWS = 20


class AgentState(TypedDict, total=False):
    """Everything one rollout knows."""

    question: str
    schema_text: str
    turn: int
    sql: str
    execution_text: str
    feedback: str
    correct: bool
    error: str
    transitions: Annotated[list[Transition], operator.add]
    executions: Annotated[list[Execution], operator.add]


@dataclass(frozen=True)
class AgentContext:
    """What one rollout works with."""

    model: ChatModel
    database: Database
    schema: Schema
    prompts: Prompts
    config: RolloutConfig


def failure(where: str, error: Exception) -> str:
    """How a failed rollout is explained on its trajectory."""
    return f"{where}: {type(error).__name__}: {error}"


async def run_agent(question: str, schema_text: str, context: AgentContext) -> AgentState:
    """Answer one question; the returned state holds every model call and execution, and `error` if something broke."""
    start: AgentState = {"question": question, "schema_text": schema_text}
    with tracing_context(enabled=False):
        state: Any = await compiled().ainvoke(
            start, context=context, config={"recursion_limit": 3 * context.config.max_turns + 2}
        )
    return state


def draw() -> str:
    """The graph as mermaid text."""
    return compiled().get_graph().draw_mermaid()


@cache
def compiled() -> CompiledStateGraph:
    """The compiled graph, built at the first call of a process."""
    graph = StateGraph(AgentState, context_schema=AgentContext)
    graph.add_node("write_query", _write)
    graph.add_node("execute_query", _execute)
    graph.add_node("check_query", _check)
    graph.add_node("rewrite_query", _rewrite)
    graph.add_edge(START, "write_query")
    graph.add_edge("write_query", "execute_query")
    graph.add_conditional_edges("execute_query", _after_execution, ["check_query", END])
    graph.add_conditional_edges("check_query", _after_check, ["rewrite_query", END])
    graph.add_edge("rewrite_query", "execute_query")
    return graph.compile()


async def _write(state: AgentState, runtime: Runtime[AgentContext]) -> AgentState:
    prompt = runtime.context.prompts.write(state["question"], state["schema_text"], runtime.context.database.dialect)
    return _query(await _ask("write", 1, prompt, runtime.context.model))


async def _rewrite(state: AgentState, runtime: Runtime[AgentContext]) -> AgentState:
    prompt = runtime.context.prompts.rewrite(
        state["question"],
        state["schema_text"],
        runtime.context.database.dialect,
        state["sql"],
        state["execution_text"],
        state["feedback"],
    )
    return _query(await _ask("rewrite", state["turn"] + 1, prompt, runtime.context.model))


async def _check(state: AgentState, runtime: Runtime[AgentContext]) -> AgentState:
    prompt = runtime.context.prompts.check(
        state["question"],
        state["schema_text"],
        runtime.context.database.dialect,
        state["sql"],
        state["execution_text"],
    )
    answer = await _ask("check", state["turn"], prompt, runtime.context.model)
    if isinstance(answer, str):
        return {"error": answer}
    text = answer.completion.text
    return {"transitions": [answer], "feedback": text, "correct": parse_verdict(text)}


async def _execute(state: AgentState, runtime: Runtime[AgentContext]) -> AgentState:
    if "error" in state:  # the model gave no query
        return {}
    context = runtime.context
    try:
        result = await context.database.aexecute(state["sql"])
    except Exception as error:
        return {"error": failure("database", error)}
    record = record_execution(state["turn"], state["sql"], result, context.config.execution_truncate)
    text = render_execution(record, context.prompts.family, context.config.execution_truncate, context.schema)
    return {"executions": [record], "execution_text": text}


async def _ask(agent: str, turn: int, messages: list[Message], model: ChatModel) -> Transition | str:
    try:
        completion = await model.complete(messages)
    except Exception as error:
        return failure("model", error)
    return Transition(agent=agent, turn=turn, messages=messages, completion=completion)


def _query(answer: Transition | str) -> AgentState:
    if isinstance(answer, str):
        return {"error": answer}
    return {"transitions": [answer], "sql": extract_sql(answer.completion.text), "turn": answer.turn}


# The routers are coroutines only because LangGraph runs a plain function in a thread, which costs more than it does.


async def _after_execution(state: AgentState, runtime: Runtime[AgentContext]) -> str:
    return END if "error" in state or state["turn"] >= runtime.context.config.max_turns else "check_query"


async def _after_check(state: AgentState) -> str:
    return END if "error" in state or state["correct"] else "rewrite_query"


def record_execution(turn: int, sql: str, result: QueryResult, max_chars: int) -> Execution:
    """What is kept of a query's result: the first rows, cells as JSON values of at most `max_chars` characters."""
    return Execution(
        turn=turn,
        sql=sql,
        status=result.status,
        error=result.error,
        columns=list(result.columns),
        rows=[[_cell(value, max_chars) for value in row] for row in result.rows[:SHOWN_ROWS]],
        n_rows=len(result.rows),
        seconds=result.seconds,
    )


def _cell(value: Any, max_chars: int) -> str | int | float | None:
    if value is None or type(value) is int or (type(value) is float and math.isfinite(value)):
        return value
    if isinstance(value, (bytes, memoryview)):
        return bytes(value[: max_chars // 2 + 1]).hex()[:max_chars]
    return str(value)[:max_chars]
