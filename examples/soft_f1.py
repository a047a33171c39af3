"""A reward of your own: F1 between the cells of both results, instead of 0 or 1 (in the manner of BIRD's soft F1).

sqlbench eval --run soft --reward examples.soft_f1:soft_f1
sqlbench train --run soft-training sqlbench.reward=examples.soft_f1:soft_f1
"""

import asyncio
from collections import Counter

from sqlbench.data.tasks import Task
from sqlbench.rollout import RolloutContext


async def soft_f1(task: Task, context: RolloutContext) -> float | None:
    """Return twice the shared cells over all cells; 0 where the prediction fails, None where gold does."""
    run = context.database.execute
    gold, pred = await asyncio.gather(*(asyncio.to_thread(run, sql) for sql in (task.gold, context.sql or "")))
    if not gold.ok:
        return None
    if not pred.ok:
        return 0.0
    wanted, predicted = (Counter(cell for row in result.rows for cell in row) for result in (gold, pred))
    if not wanted and not predicted:
        return 1.0
    return 2 * (wanted & predicted).total() / (wanted.total() + predicted.total())
