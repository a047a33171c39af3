"""Estimates from several rollouts of each task: avg@n, pass@k, a majority vote, and the first query that ran.

All of them spend the same model calls, so training has to beat them. Every number is a mean over tasks with an
interval that resamples tasks: rollouts of one task are not independent. Failed rollouts are left out.

- ``avg@n``: the share of a task's rollouts that are right.
- ``pass@k``: the unbiased estimate that one of k rollouts is right (Chen et al., arXiv 2107.03374). Tasks with fewer
  than k scored rollouts are left out.
- ``majority@n``: the query whose result most rollouts have, in a tie that of the earliest rollout. A query that did not
  run has no vote.
- ``best@n``: the first query that ran.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from hashlib import sha256
from math import comb, fsum
from typing import TYPE_CHECKING

import pandas as pd

from sqlbench.agent.trajectory import OVERLONG, Execution, Record
from sqlbench.config import RolloutConfig
from sqlbench.database.engine import cached_database
from sqlbench.interfaces import Dataset
from sqlbench.reward import score
from sqlbench.stats import bootstrap

if TYPE_CHECKING:
    from sqlbench.results import Rollouts

NOT_RUN = b""
"""Result of a query that did not run."""


class Estimate(Record):
    """A mean over tasks."""

    value: float
    low: float
    """Lower end of the 95% bootstrap interval over tasks."""
    high: float
    tasks: int


class Samples(Record):
    """Estimates from all rollouts of an evaluation."""

    n: int
    """Rollouts per task."""
    by_turn: list[dict[str, Estimate]]
    """Estimates by name for the current queries after turn 1, 2 and so on; the last are the rollouts' answers."""

    def text(self) -> str:
        """Write one line per turn, for the command line."""
        lines = [f"\n{self.n} rollouts per task, 95% intervals over tasks:"]
        for turn, estimates in enumerate(self.by_turn, 1):
            shown = (f"{name} {e.value:.1%} ({e.low:.1%} to {e.high:.1%})" for name, e in estimates.items())
            lines.append(f"after turn {turn}: {', '.join(shown)}")
        return "\n".join(lines)


Judge = Callable[[str, str, str], bool | None]
"""Function of database, gold query and query: True if the query is right, None where that cannot be decided."""


def judge(dataset: Dataset, config: RolloutConfig) -> Judge:
    """Return a judge that scores queries as the answers of rollouts were scored, running each query once."""

    @cache
    def right(db_id: str, gold: str, sql: str) -> bool | None:
        match = score(gold, sql, cached_database(dataset.database(db_id), config.limits), strict=config.strict).match
        return None if match is None else match == 1

    return right


def by_turn(values: pd.Series) -> pd.DataFrame:
    """Spread values of queries, indexed by rollout, over one column per turn; the last value stands until the end."""
    turns = values.groupby(level=0).cumcount()
    return values.set_axis(pd.MultiIndex.from_arrays([values.index, turns])).unstack().ffill(axis=1)


def result_of(execution: Execution) -> bytes:
    """Return a digest that is equal for equal results, regardless of column names and row order.

    It covers the recorded rows (the first 20) and the numbers of rows and columns. A failed query has `NOT_RUN`.
    """
    if not execution.answered:
        return NOT_RUN
    rows = sorted([_text(value) for value in row] for row in execution.rows)
    return sha256(repr((execution.n_rows, len(execution.columns), rows)).encode()).digest()


def _text(value: str | int | float | None) -> str:
    """Write a cell as a text that is equal for equal numbers, even if a sum differs in its last bits."""
    if isinstance(value, float):
        near = value if value.is_integer() else float(f"{value:.9g}")
        value = int(near) if near.is_integer() else near
    return repr(value)


def pass_at(k: int, n: int, right: int) -> float:
    """Return the chance that at least one of k rollouts is right, drawn without replacement from n."""
    return 1 - comb(n - right, k) / comb(n, k)


def estimate_samples(found: Rollouts, n: int, judge: Judge) -> Samples:
    """Compute all estimates from the rollouts of an evaluation.

    Args:
        found: n rollouts of each task.
        n: rollouts per task.
        judge: judges the queries that a rollout replaced; its answer is judged already.
    """
    scored = found.rollouts[found.rollouts["correct"].notna()].sort_values("sample", kind="stable")
    rows = scored.join(found.queries.set_index("rollout")[["sql", "stands"]])  # also a rollout without any query
    answer = ~rows.index.duplicated(keep="last")
    rows["result"] = found.queries["result"].reindex(rows["stands"]).fillna(NOT_RUN).to_numpy()
    rows.loc[answer & (rows["reason"] == OVERLONG), "result"] = NOT_RUN
    judged = answer | (rows["sql"] == rows["pred"])
    keys = zip(rows["db_id"], rows["gold"], rows["sql"], strict=True)
    rows["right"] = pd.Series(
        [c if k else judge(*key) for c, k, key in zip(rows["correct"], judged, keys, strict=True)], rows.index, float
    )
    unknown = rows.index[rows["right"].isna()].unique()
    stands = [by_turn(rows[column].drop(unknown)) for column in ("right", "result")]
    tasks = scored["task"].drop(unknown)
    turns = [pd.DataFrame({"task": tasks, "right": stands[0][turn], "result": stands[1][turn]}) for turn in stands[0]]
    return Samples(n=n, by_turn=[_estimates(frame.loc[tasks.index], n) for frame in turns])


def _estimates(queries: pd.DataFrame, n: int) -> dict[str, Estimate]:
    """Compute all estimates from one query per rollout, in the order of each task's rollouts."""
    sizes, counts = (queries.groupby("task")["right"].agg(what) for what in ("size", "sum"))
    pairs = [(int(size), int(right)) for size, right in zip(sizes, counts, strict=True)]
    values = {f"avg@{n}": [right / size for size, right in pairs]}
    for k in (2**power for power in range(n.bit_length())):
        values[f"pass@{k}"] = [pass_at(k, size, right) for size, right in pairs if size >= k]
    ran = (queries["result"] != NOT_RUN).astype(int)
    votes = queries.groupby(["task", "result"])["right"].transform("size") * ran
    for name, ranks in ((f"majority@{n}", votes), (f"best@{n}", ran)):  # in a tie the earliest
        best = queries.loc[ranks.sort_values(ascending=False, kind="stable").index].groupby("task")["right"]
        values[name] = best.first().tolist()
    return {name: _mean(numbers) for name, numbers in values.items() if numbers}


def _mean(values: Sequence[float]) -> Estimate:
    low, high = bootstrap(sorted(values))  # independent of the order of the tasks
    return Estimate(value=fsum(values) / len(values), low=low, high=high, tasks=len(values))
