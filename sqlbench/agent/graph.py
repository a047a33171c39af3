"""The built-in agent: write, execute, check, rewrite, as one LangGraph state machine.

``write -> execute -> check -> (rewrite -> execute ...) -> END``. It ends when the check calls the query correct or
when `max_turns` queries were executed; the last one is not checked, because its verdict would change nothing. Without
the setting `check` a query that ran is final. A query that did not run to its end is rewritten without a check. A
rewrite that repeats a query which ran in this rollout ends the rollout with that query: the policy insists on it. One
that repeats any other query is replaced by samples of the first prompt, which does not show that query; the rollout
ends when `AFRESH` of them bring nothing new. With a repair policy a rewrite follows the strategy it chooses; `RESAMPLE`
samples the first prompt at once. The graph has no checkpointer and no tracing.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import Runtime
from langgraph.types import Command
from langsmith import tracing_context

from sqlbench.agent.prompts import RESAMPLE, extract_sql, parse_verdict
from sqlbench.agent.repair import BanditContext, normal, situation
from sqlbench.agent.resampling import TEMPERATURE
from sqlbench.agent.trajectory import Message
from sqlbench.database.error_classes import error_class

if TYPE_CHECKING:
    from sqlbench.rollout import RolloutContext

AFRESH = 2
"""Samples of the first prompt after a rewrite that repeats a failed query; see `results/laptop/repair_step`.

A query that failed keeps a policy from writing another one: its repeated rewrites, sampled too, mostly repeat it again.
"""
REFUSED = "The query did not run to its end."
REJECTED = "The query does not answer the question; answer it in another way."


class State(TypedDict, total=False):
    """State passed from node to node; everything else is in the context."""

    sql: str
    feedback: str


class SelfCorrectingAgent:
    """Writes a query and corrects it until the check is satisfied."""

    async def run(self, context: RolloutContext) -> str:
        """Return the last query (`sqlbench.interfaces.Agent`); with a history, begin with a rewrite of its last one."""
        first: State = {"feedback": REJECTED if context.history else ""}
        with tracing_context(enabled=False):
            state: Any = await compiled().ainvoke(
                first, context=context, config={"recursion_limit": 3 * context.config.max_turns + 2}
            )
        return state["sql"]


def draw() -> str:
    """Draw the graph as mermaid text."""
    return compiled().get_graph().draw_mermaid()


@cache
def compiled() -> CompiledStateGraph:
    """Compile the graph once per process.

    Nodes choose the next node themselves with a `Command`: a conditional edge costs LangGraph as much as its node.
    """
    graph = StateGraph(State, context_schema=dict)  # a `RolloutContext`, which LangGraph only hands over
    graph.add_node("write_query", _write)
    graph.add_node("execute_query", _execute)
    graph.add_node("check_query", _check)
    graph.add_node("rewrite_query", _rewrite)
    graph.add_conditional_edges(START, _first, ["write_query", "rewrite_query"])
    graph.add_edge("write_query", "execute_query")
    return graph.compile()


async def _first(state: State, runtime: Runtime) -> str:  # a coroutine: LangGraph runs a plain function in a thread
    return "rewrite_query" if runtime.context.history else "write_query"


async def _write(state: State, runtime: Runtime) -> State:
    ctx: RolloutContext = runtime.context
    prompt = ctx.prompts.write(ctx.task.question, ctx.schema_text, ctx.database.dialect)
    return {"sql": extract_sql(await ctx.ask("write", prompt))}


async def _rewrite(state: State, runtime: Runtime) -> Command[Literal["execute_query", "__end__"]]:
    ctx: RolloutContext = runtime.context
    *earlier, (last, result) = ctx.history
    about = ctx.task.question, ctx.schema_text, ctx.database.dialect
    strategy = ctx.repair.choose(_situation(ctx)) if ctx.repair is not None else None
    afresh: tuple[str, list[Message], float | None] = "write", ctx.prompts.write(*about), TEMPERATURE
    if strategy == RESAMPLE:
        tries = [afresh] * (1 + AFRESH)
    else:
        # Without repair a rewrite is shown the last query only, unless there were queries before this rollout.
        shown = earlier if ctx.repair is not None or len(ctx.history) > len(ctx.executions) else ()
        prompt = ctx.prompts.rewrite(*about, last, result, state["feedback"], shown, strategy)
        # What a user rejected is not forgotten: then the rewrite itself is sampled.
        again = afresh if len(ctx.history) == len(ctx.executions) else ("rewrite", prompt, TEMPERATURE)
        tries = [("rewrite", prompt, None), *[again] * AFRESH]
    before = {normal(earlier) for earlier, _ in ctx.history}
    ran = {normal(execution.sql): execution.sql for execution in ctx.executions if execution.answered}
    for agent, messages, temperature in tries if ctx.takes_temperature else tries[:1]:
        sql = extract_sql(await ctx.ask(agent, messages, strategy, temperature=temperature))
        if normal(sql) in ran:
            return Command(update={"sql": ran[normal(sql)]}, goto=END)
        if normal(sql) not in before:
            return Command(update={"sql": sql}, goto="execute_query")
    # A query from before this rollout is not the policy's own, so repeating it is an answer.
    return Command(update={"sql": ctx.executions[-1].sql if ctx.executions else sql}, goto=END)


async def _check(state: State, runtime: Runtime) -> Command[Literal["rewrite_query", "__end__"]]:
    ctx: RolloutContext = runtime.context
    prompt = ctx.prompts.check(ctx.task.question, ctx.schema_text, ctx.database.dialect, *ctx.history[-1])
    text = await ctx.ask("check", prompt)
    return Command(update={"feedback": text}, goto=END if parse_verdict(text) else "rewrite_query")


async def _execute(state: State, runtime: Runtime) -> Command[Literal["check_query", "rewrite_query", "__end__"]]:
    ctx: RolloutContext = runtime.context
    record = await ctx.execute(state["sql"])
    if record.turn >= ctx.config.max_turns or (record.answered and not ctx.config.check):
        goto = END
    elif not record.answered:  # wrong without asking
        goto = "rewrite_query"
    else:
        goto = "check_query"
    return Command(update={"feedback": "" if record.answered else REFUSED}, goto=goto)


def _situation(ctx: RolloutContext) -> BanditContext:
    if ctx.executions:
        return situation(ctx.transitions, ctx.executions)
    text = ctx.history[-1][1]  # only the prompts' text is known of a query before this rollout
    shown = error_class(text) if text.startswith("error: ") else "empty" if text == "empty result" else "none"
    return BanditContext(error_class=shown, attempt=len(ctx.history))
