"""The built-in agent ``resampling``: the baseline for self-correction at the same number of model calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlbench.agent.prompts import extract_sql

if TYPE_CHECKING:
    from sqlbench.rollout import RolloutContext

TEMPERATURE = 1.0
"""Temperature of every query but the first."""


class ResamplingAgent:
    """Forgets a query that did not run to its end and writes another one, from the same prompt.

    It does not check or rewrite. It ends with the first query that ran, or with the last of `max_turns`.
    """

    async def run(self, context: RolloutContext) -> str:
        """Return the last query (`sqlbench.interfaces.Agent`); with a history even the first one is sampled."""
        prompt = context.prompts.write(context.task.question, context.schema_text, context.database.dialect)
        sql = ""
        for _ in range(context.config.max_turns):
            temperature = TEMPERATURE if context.history else None
            sql = extract_sql(await context.ask("write", prompt, temperature=temperature))
            if (await context.execute(sql)).answered:
                break
        return sql
