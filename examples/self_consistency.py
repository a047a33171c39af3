"""An agent of your own: ask three times and keep the query whose result occurs most often (self-consistency).

sqlbench eval --run vote --agent examples.self_consistency:SelfConsistency --temperature 1
"""

from collections import Counter

from sqlbench.agent.prompts import extract_sql
from sqlbench.rollout import RolloutContext


class SelfConsistency:
    """Answers with the majority of `samples` queries; a query that fails has no vote."""

    samples = 3

    async def run(self, context: RolloutContext) -> str:
        """Return a query with the most frequent result, or the last query if all fail."""
        prompt = context.prompts.write(context.task.question, context.schema_text, context.database.dialect)
        votes, query, sql = Counter[str](), {}, ""
        for _ in range(self.samples):
            sql = extract_sql(await context.ask("write", prompt))
            done = await context.execute(sql)
            if done.status == "ok":
                result = repr(sorted(map(repr, done.rows)))
                votes[result] += 1
                query[result] = sql
        return query[votes.most_common(1)[0][0]] if votes else sql
