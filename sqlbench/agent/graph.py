"""The agent as one LangGraph state machine, the same for evaluation, training, the environment and the chat.

``write_query -> execute_query -> check_query -> (rewrite_query -> execute_query ...) -> END``. It ends when the check
calls the query correct, when `max_turns` queries were executed (the last one is not checked: its verdict could change
nothing), or when the model or the database breaks. The latter is written to the state's `error`, so that everything
done before is kept. The graph is compiled once; model, database, prompts and settings come in as LangGraph context.
No checkpointer, no tracing: a rollout talks to nothing but its model and its database.

With a repair policy a rewrite follows the strategy it chooses and is shown all queries so far, and the rollout also
ends when the same query has come for the third time. An observer is told of everything as it happens.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, Any, Literal, Protocol, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import Runtime
from langgraph.types import Command
from langsmith import tracing_context

from sqlbench.agent.prompts import Prompts, extract_sql, parse_verdict, render_execution
from sqlbench.agent.repair import RepairPolicy, Situation, situation
from sqlbench.agent.trajectory import Execution, Message, Transition
from sqlbench.config import RolloutConfig
from sqlbench.database.engine import Database
from sqlbench.database.types import QueryResult, Schema
from sqlbench.models.base import ChatModel
from sqlbench.sqltree import error_class

SHOWN_ROWS = 20
SAME_QUERY = 3
"""With a repair policy, a rollout ends when the same query has come so many times."""
REFUSED = "The query did not run to its end."
REJECTED = "The query does not answer the question; answer it in another way."


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
    history: Annotated[list[tuple[str, str]], operator.add]
    """Every query so far with the text of its result, those of earlier answers first."""
    transitions: Annotated[list[Transition], operator.add]
    executions: Annotated[list[Execution], operator.add]


class Observer(Protocol):
    """Is told of a rollout's events, in their order and on its event loop; it must return soon and not raise."""

    def text(self, agent: str, turn: int, piece: str) -> None:
        """A piece of a model's answer was generated."""

    def transition(self, transition: Transition) -> None:
        """A model call is over."""

    def execution(self, execution: Execution, execution_text: str) -> None:
        """A query was executed; the text is what the prompts show of it."""


@dataclass(frozen=True)
class AgentContext:
    """What one rollout works with."""

    model: ChatModel
    database: Database
    schema: Schema
    prompts: Prompts
    config: RolloutConfig
    repair: RepairPolicy | None = None
    observer: Observer | None = None


def failure(where: str, error: Exception) -> str:
    """How a failed rollout is explained on its trajectory."""
    return f"{where}: {type(error).__name__}: {error}"


async def run_agent(
    question: str, schema_text: str, context: AgentContext, start: Sequence[tuple[str, str]] = ()
) -> AgentState:
    """Answer one question; the returned state holds every model call and execution, and `error` if something broke.

    Args:
        start: queries that did not answer it, oldest first, each with the text of its result: the first call is then a
            rewrite of the last one.
    """
    first: AgentState = {"question": question, "schema_text": schema_text}
    if start:
        first |= {"history": list(start), "feedback": REJECTED}
    with tracing_context(enabled=False):
        state: Any = await compiled().ainvoke(
            first, context=context, config={"recursion_limit": 3 * context.config.max_turns + 2}
        )
    return state


def draw() -> str:
    """The graph as mermaid text."""
    return compiled().get_graph().draw_mermaid()


@cache
def compiled() -> CompiledStateGraph:
    """The compiled graph, built at the first call of a process.

    Where it goes after a query and after a check is said by the nodes themselves, with a `Command`: a conditional edge
    costs LangGraph as much again as its node.
    """
    graph = StateGraph(AgentState, context_schema=AgentContext)
    graph.add_node("write_query", _write)
    graph.add_node("execute_query", _execute)
    graph.add_node("check_query", _check)
    graph.add_node("rewrite_query", _rewrite)
    graph.add_conditional_edges(START, _first, ["write_query", "rewrite_query"])
    graph.add_edge("write_query", "execute_query")
    graph.add_edge("rewrite_query", "execute_query")
    return graph.compile()


async def _write(state: AgentState, runtime: Runtime[AgentContext]) -> AgentState:
    prompt = runtime.context.prompts.write(state["question"], state["schema_text"], runtime.context.database.dialect)
    return _query(await _ask("write", 1, prompt, runtime.context))


async def _rewrite(state: AgentState, runtime: Runtime[AgentContext]) -> AgentState:
    context = runtime.context
    *earlier, (sql, result) = state["history"]
    own = state.get("turn", 0)
    strategy = context.repair.choose(_situation(state)) if context.repair is not None else None
    prompt = context.prompts.rewrite(
        state["question"],
        state["schema_text"],
        context.database.dialect,
        sql,
        result,
        state["feedback"],
        # Without repair a rewrite is shown the last query only, unless there were queries before this rollout.
        earlier=earlier if context.repair is not None or len(state["history"]) > own else (),
        strategy=strategy,
    )
    return _query(await _ask("rewrite", own + 1, prompt, context, strategy))


def _situation(state: AgentState) -> Situation:
    if state["executions"]:
        return situation(state["transitions"], state["executions"])
    text = state["history"][-1][1]  # of a query before this rollout: only what the prompts show of it is known
    shown = error_class(text) if text.startswith("error: ") else "empty" if text == "empty result" else "none"
    return Situation(error_class=shown, attempt=len(state["history"]))


async def _check(state: AgentState, runtime: Runtime[AgentContext]) -> Command[Literal["rewrite_query", "__end__"]]:
    prompt = runtime.context.prompts.check(
        state["question"],
        state["schema_text"],
        runtime.context.database.dialect,
        state["sql"],
        state["execution_text"],
    )
    answer = await _ask("check", state["turn"], prompt, runtime.context)
    if isinstance(answer, str):
        return Command(update={"error": answer}, goto=END)
    text = answer.completion.text
    correct = parse_verdict(text)
    update = {"transitions": [answer], "feedback": text, "correct": correct}
    return Command(update=update, goto=END if correct else "rewrite_query")


async def _execute(
    state: AgentState, runtime: Runtime[AgentContext]
) -> Command[Literal["check_query", "rewrite_query", "__end__"]]:
    if "error" in state:  # the model gave no query
        return Command(goto=END)
    context = runtime.context
    try:
        result = await context.database.aexecute(state["sql"])
    except Exception as error:
        return Command(update={"error": failure("database", error)}, goto=END)
    record = record_execution(state["turn"], state["sql"], result, context.config.execution_truncate)
    text = render_execution(record, context.prompts.family, context.config.execution_truncate, context.schema)
    if context.observer is not None:
        context.observer.execution(record, text)
    update = {
        "executions": [record],
        "execution_text": text,
        "history": [(record.sql, text)],
        "feedback": "" if record.answered else REFUSED,  # until the check says more, where it is asked
    }
    return Command(update=update, goto=_after_execution(state, record, context))


async def _ask(
    agent: str, turn: int, messages: list[Message], context: AgentContext, strategy: str | None = None
) -> Transition | str:
    model, observer = context.model, context.observer
    try:
        if observer is None:
            completion = await model.complete(messages)
        else:
            completion = await model.complete(messages, on_text=partial(observer.text, agent, turn))
    except Exception as error:
        return failure("model", error)
    transition = Transition(agent=agent, turn=turn, messages=messages, completion=completion, strategy=strategy)
    if observer is not None:
        observer.transition(transition)
    return transition


def _query(answer: Transition | str) -> AgentState:
    if isinstance(answer, str):
        return {"error": answer}
    return {"transitions": [answer], "sql": extract_sql(answer.completion.text), "turn": answer.turn}


async def _first(state: AgentState) -> str:  # a coroutine, since LangGraph runs a plain function in a thread
    return "rewrite_query" if state.get("history") else "write_query"


def _after_execution(state: AgentState, record: Execution, context: AgentContext) -> str:
    """Where to go after a query, from the state before it."""
    if record.turn >= context.config.max_turns:
        return END
    if context.repair is not None:
        queries = [_normal(sql) for sql, _ in state.get("history", ())]
        if queries.count(_normal(record.sql)) + 1 >= SAME_QUERY:
            return END
        # A query that did not run is wrong without asking; the call saved pays for another attempt. Without repair the
        # check stays, since policies are trained and measured on rollouts that have it.
        if not record.answered:
            return "rewrite_query"
    return "check_query"


def _normal(sql: str) -> str:
    return " ".join(sql.split()).rstrip("; ")


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
