"""The built-in agent ``conversation``: a conversation with the database, without a check.

The model decides when it is done. The agent follows MTIR-SQL (arXiv 2510.25510) and SQL-Trail (arXiv 2601.17699) with
the transitions of the graph: the first query is a ``write``, every later answer a ``rewrite``, so both are trained and
credited alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlbench.agent.prompts import extract_sql, is_query
from sqlbench.agent.repair import normal
from sqlbench.agent.trajectory import Message

if TYPE_CHECKING:
    from sqlbench.rollout import RolloutContext


class ConversationAgent:
    """Runs each query that the model gives and answers with its result, until the model repeats one or gives none.

    Every result is shown, right or wrong, so the model, not a verdict, decides whether to continue. A prompt family
    without the component ``conversation.user`` is asked for rewrites with all earlier queries instead.
    """

    async def run(self, context: RolloutContext) -> str:
        """Return the query that the model stands by (`sqlbench.interfaces.Agent`)."""
        while True:
            text = await context.ask("rewrite" if context.history else "write", _prompt(context))
            sql, tried = extract_sql(text), {normal(e.sql): e.sql for e in context.executions}
            if tried and (normal(sql) in tried or not is_query(sql)):
                return tried.get(normal(sql), context.executions[-1].sql)
            if (await context.execute(sql)).turn >= context.config.max_turns:
                return sql


def _prompt(context: RolloutContext) -> list[Message]:
    """Return the question, and every query so far as the model's own answer followed by the database's reply."""
    about = (context.task.question, context.schema_text, context.database.dialect)
    if context.history and "conversation.user" not in context.prompts.components:
        *earlier, (sql, result) = context.history
        return context.prompts.rewrite(*about, sql, result, "", earlier)
    prompt = context.prompts.write(*about)
    for sql, result in context.history:
        prompt += [Message(role="assistant", content=f"```sql\n{sql}\n```"), context.prompts.result(result)]
    return prompt
