"""The agent as in the published run: every query is checked, one that failed and the last one too.

The verdict on the last query changes nothing, but its transition counts where checks are trained, and in the published
numbers of transitions.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Literal

from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import Runtime
from langgraph.types import Command

from sqlbench.agent.graph import SelfCorrectingAgent, State, _first, _rewrite, _write
from sqlbench.agent.prompts import parse_verdict

if TYPE_CHECKING:
    from sqlbench.rollout import RolloutContext


class PublishedAgent(SelfCorrectingAgent):
    """Writes a query and corrects it until a check is satisfied or was asked `max_turns` times."""

    def graph(self) -> CompiledStateGraph:
        """Return the compiled graph."""
        return compiled()


@cache
def compiled() -> CompiledStateGraph:
    """Compile the graph, at the first call of a process."""
    graph = StateGraph(State, context_schema=dict)
    graph.add_node("write_query", _write)
    graph.add_node("execute_query", _execute)
    graph.add_node("check_query", _check)
    graph.add_node("rewrite_query", _rewrite)
    graph.add_conditional_edges(START, _first, ["write_query", "rewrite_query"])
    graph.add_edge("write_query", "execute_query")
    graph.add_edge("rewrite_query", "execute_query")
    graph.add_edge("execute_query", "check_query")
    return graph.compile()


async def _execute(state: State, runtime: Runtime) -> None:
    await runtime.context.execute(state["sql"])


async def _check(state: State, runtime: Runtime) -> Command[Literal["rewrite_query", "__end__"]]:
    ctx: RolloutContext = runtime.context
    prompt = ctx.prompts.check(ctx.task.question, ctx.schema_text, ctx.database.dialect, *ctx.history[-1])
    text = await ctx.ask("check", prompt)
    ends = parse_verdict(text) or len(ctx.executions) >= ctx.config.max_turns
    return Command(update={"feedback": text}, goto=END if ends else "rewrite_query")
