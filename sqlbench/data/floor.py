"""The constant-query floor of a split: what a policy earns that looks at the schema but never at the question.

The reward is only worth training on if this is near zero. Tried are queries without rows (which earn 9% on Spider dev
under the reference evaluator) and the commonest answers a schema suggests; the floor is the best of them over a split.
"""

from __future__ import annotations

from collections.abc import Sequence

from tqdm.auto import tqdm

from sqlbench.data.tasks import DataSet, Task
from sqlbench.database.engine import cached_database
from sqlbench.database.schema import Schema, introspect, quote
from sqlbench.reward import score


def constant_queries(schema: Schema) -> dict[str, str]:
    """Named queries that can be written without a question."""
    queries = {"no rows": "SELECT 1 WHERE 0", "comment": "-- nothing", "one": "SELECT 1", "zero": "SELECT 0"}
    for i, table in enumerate(schema.tables[:2]):
        if table.columns:
            place, name, column = ("first", "second")[i], quote(table.name), quote(table.columns[0].name)
            queries |= {
                f"count {place} table": f"SELECT count(*) FROM {name}",
                f"all of {place} table": f"SELECT * FROM {name}",
                f"first column of {place} table": f"SELECT {column} FROM {name}",
                f"no rows of {place} table": f"SELECT {column} FROM {name} WHERE {column} IS NULL AND 1 = 0",
            }
    return queries


def constant_floor(tasks: Sequence[Task], dataset: DataSet) -> dict[str, dict[str, float]]:
    """Per reward mode (``reference``, ``strict``) the share of tasks each constant query earns, best first.

    Tasks that cannot be scored are left out.
    """
    floors: dict[str, dict[str, float]] = {}
    for mode, strict in (("reference", False), ("strict", True)):
        earned: dict[str, int] = {}
        scored = 0
        for task in tqdm(tasks, desc=f"constant queries, {mode}", unit="task", mininterval=0.5, leave=False):
            if not task.scorable:
                continue
            database = cached_database(dataset.database(task.db_id))
            verdicts = {
                name: score(task.gold, query, database, strict=strict).match
                for name, query in constant_queries(introspect(database)).items()
            }
            scored += None not in verdicts.values()
            for name, match in verdicts.items():
                earned[name] = earned.get(name, 0) + (match or 0)
        ranked = sorted(earned.items(), key=lambda item: (-item[1], item[0]))
        floors[mode] = {name: n / max(1, scored) for name, n in ranked}
    return floors
