"""The built-in agent ``published``: the agent of the published run, for comparisons with it (`--recipe seed`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlbench.agent.prompts import extract_sql, parse_verdict

if TYPE_CHECKING:
    from sqlbench.rollout import RolloutContext


class PublishedAgent:
    """Checks every query, including failed ones and the last one, and accepts a repetition like any query.

    The verdict on the last query changes nothing, but it is a transition: trained where checks are, and counted.
    """

    async def run(self, context: RolloutContext) -> str:
        """Return the last query (`sqlbench.interfaces.Agent`)."""
        about = (context.task.question, context.schema_text, context.database.dialect)
        sql = extract_sql(await context.ask("write", context.prompts.write(*about)))
        while True:
            await context.execute(sql)
            verdict = await context.ask("check", context.prompts.check(*about, *context.history[-1]))
            if parse_verdict(verdict) or len(context.executions) >= context.config.max_turns:
                return sql
            sql = extract_sql(
                await context.ask("rewrite", context.prompts.rewrite(*about, *context.history[-1], verdict))
            )
