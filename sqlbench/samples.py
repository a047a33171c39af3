"""What several rollouts of each task give: avg@n, pass@k, a majority vote, and the first query that ran.

All of them spend the same model calls, so they are what training has to beat. Every number is a mean over tasks with an
interval that resamples tasks: rollouts of one task are not independent. Failed rollouts are left out.

- ``avg@n``: the share of a task's rollouts that are right.
- ``pass@k``: the unbiased estimate that one of k rollouts is right (Chen et al., arXiv 2107.03374). Tasks with fewer
  than k scored rollouts are left out.
- ``majority@n``: the query whose result most rollouts have; of equally frequent ones that of the earliest rollout. A
  query that did not run has no vote.
- ``best@n``: the first query that ran.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from math import comb, fsum
from typing import NamedTuple

from sqlbench.agent.trajectory import OVERLONG, Execution, Record, Trajectory
from sqlbench.statistics import bootstrap


class Estimate(Record):
    """A mean over tasks."""

    value: float
    low: float
    """Lower end of the 95% bootstrap interval over tasks."""
    high: float
    tasks: int


class Samples(Record):
    """What the rollouts of an evaluation give together."""

    n: int
    """Rollouts a task."""
    by_turn: list[dict[str, Estimate]]
    """Estimates by name for the queries that stand after turn 1, 2 and so on; the last are the rollouts' answers."""

    def text(self) -> str:
        """A line a turn, for the command line."""
        lines = [f"\n{self.n} rollouts a task, 95% intervals over tasks:"]
        for turn, estimates in enumerate(self.by_turn, 1):
            shown = (f"{name} {e.value:.1%} ({e.low:.1%} to {e.high:.1%})" for name, e in estimates.items())
            lines.append(f"after turn {turn}: {', '.join(shown)}")
        return "\n".join(lines)


class Query(NamedTuple):
    """What is known of one query."""

    right: bool
    result: bytes | None
    """See `result_of`."""


Verdict = Callable[[Trajectory, str], bool | None]
"""Whether a query answers the task of a rollout; None where that cannot be said."""


def standing(record: Trajectory) -> list[Execution]:
    """Return the query that stands after each turn; the last one is the rollout's answer."""
    if not record.executions:
        return []
    answer = next((e for e in reversed(record.executions) if e.sql == record.pred), record.executions[-1])
    return [*record.executions[:-1], answer]


def result_of(execution: Execution) -> bytes | None:
    """Return a digest that is equal for equal results, whatever the names of the columns and the order of the rows.

    Only the rows on record are compared, the first 20, and how many there are. None: it did not run.
    """
    if not execution.answered:
        return None
    rows = sorted([_text(value) for value in row] for row in execution.rows)
    return sha256(repr((execution.n_rows, len(execution.columns), rows)).encode()).digest()


def _text(value: str | int | float | None) -> str:
    """A cell as a text that is equal for equal numbers, also where a sum differs in its last bits."""
    if isinstance(value, float):
        near = value if value.is_integer() else float(f"{value:.9g}")
        value = int(near) if near.is_integer() else near
    return repr(value)


def pass_at(k: int, n: int, right: int) -> float:
    """Return the chance that at least one of k rollouts is right, drawn without replacement from n."""
    return 1 - comb(n - right, k) / comb(n, k)


def majority(queries: Sequence[Query]) -> Query:
    """Return the first query with the most frequent result."""
    votes = Counter(query.result for query in queries if query.result is not None)
    if not votes:
        return queries[0]
    winner = max(votes, key=votes.__getitem__)  # of several the one that came first
    return next(query for query in queries if query.result == winner)


def first_ran(queries: Sequence[Query]) -> Query:
    """Return the first query that ran, or the first one where none did."""
    return next((query for query in queries if query.result is not None), queries[0])


def estimate_samples(trajectories: Iterable[Trajectory], n: int, verdict: Verdict) -> Samples:
    """Estimate everything from the rollouts of an evaluation.

    Args:
        trajectories: n rollouts of each task.
        n: rollouts a task.
        verdict: judges the queries that a rollout replaced; its answer was judged already.
    """
    tasks: dict[tuple[str, int], list[tuple[int, list[Query]]]] = defaultdict(list)
    seen: Counter[tuple[str, int]] = Counter()  # a split may hold a task twice
    for t in trajectories:
        if t.correct is not None and (queries := _queries(t, verdict)):
            tasks[t.task_key, seen[t.task_key, t.sample]].append((t.sample, queries))
            seen[t.task_key, t.sample] += 1
    groups = [[queries for _, queries in sorted(some, key=lambda pair: pair[0])] for some in tasks.values()]
    turns = max((len(queries) for group in groups for queries in group), default=0)
    return Samples(
        n=n,
        by_turn=[
            _estimates([[queries[min(turn, len(queries) - 1)] for queries in group] for group in groups], n)
            for turn in range(turns)
        ],
    )


def _queries(record: Trajectory, verdict: Verdict) -> list[Query]:
    """The queries that stand after each turn; nothing where one of them cannot be judged."""
    stands = standing(record)
    if not stands:
        return [Query(record.correct is True, None)]
    found = []
    for execution in stands[:-1]:
        right = record.correct if execution.sql == record.pred else verdict(record, execution.sql)
        if right is None:
            return []
        found.append(Query(right, result_of(execution)))
    answer = None if record.reason == OVERLONG else result_of(stands[-1])
    return [*found, Query(record.correct is True, answer)]


def _estimates(groups: Sequence[Sequence[Query]], n: int) -> dict[str, Estimate]:
    """Every estimate by name, from the queries of each task in the order of its rollouts."""
    counts = [(len(group), sum(query.right for query in group)) for group in groups]
    values = {f"avg@{n}": [right / size for size, right in counts]}
    for k in (2**power for power in range(n.bit_length())):
        values[f"pass@{k}"] = [pass_at(k, size, right) for size, right in counts if size >= k]
    values[f"majority@{n}"] = [float(majority(group).right) for group in groups]
    values[f"best@{n}"] = [float(first_ran(group).right) for group in groups]
    return {name: _mean(some) for name, some in values.items() if some}


def _mean(values: Sequence[float]) -> Estimate:
    low, high = bootstrap(sorted(values))  # in whatever order the tasks came
    return Estimate(value=fsum(values) / len(values), low=low, high=high, tasks=len(values))
