"""Scores beside execution match, by their published definitions; each is a number per query, reported as a mean.

- ``test-suite``: execution match on every database of the task's folder (Zhong, Yu and Klein, EMNLP 2020).
- ``exact-match``: the clauses are equal as sets, without values (`sqlbench.clauses.exact_match`), after Spider's *exact
  set match* (Yu et al., EMNLP 2018).
- ``bird-ex``: the sets of rows are equal, columns in the same order (BIRD's EX: Li et al., NeurIPS 2023).
- ``soft-f1``: shared cells of the rows at the same place (``evaluation_f1.py`` of BIRD mini-dev).
- ``ves``: square root of the time of gold over that of the prediction, where `bird-ex` is 1 (BIRD's valid efficiency
  score).
- ``r-ves``: square root of a step reward of the same ratio (``evaluation_ves.py`` of BIRD mini-dev).

All but the first two compare results on the task's own database. Both times are measured on this machine, `RUNS` times
as BIRD does. Where all ratios are equal none is dropped, whereas BIRD's script then fails.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, pstdev

import pandas as pd
from tqdm.auto import tqdm

from sqlbench.clauses import exact_match
from sqlbench.config import RolloutConfig
from sqlbench.database.engine import cached_database
from sqlbench.database.types import Limits
from sqlbench.interfaces import Database, Dataset
from sqlbench.results import mean
from sqlbench.reward import GOLD_ROWS, score

RUNS = 100
"""Measurements per query for the two efficiency scores."""
Rows = Sequence[tuple]


def soft_f1(gold: Rows, pred: Rows) -> float:
    """Compute BIRD's soft F1 of two results: repeated rows are dropped, the others compared place by place.

    In a pair of rows, a cell counts as found if the other row has its value anywhere; all three counts are divided by
    the number of gold columns.
    """
    if not gold and not pred:
        return 1.0
    left, right = list(dict.fromkeys(gold)), list(dict.fromkeys(pred))
    both = fewer = more = 0.0
    for gold_row, pred_row in zip(left, right, strict=False):
        both += sum(cell in gold_row for cell in pred_row) / len(gold_row)
        more += sum(cell not in gold_row for cell in pred_row) / len(gold_row)
        fewer += sum(cell not in pred_row for cell in gold_row) / len(gold_row)
    more += max(0, len(right) - len(left))
    fewer += max(0, len(left) - len(right))
    return 2 * both / (2 * both + more + fewer) if both else 0.0


def time_ratio(gold: Sequence[float], pred: Sequence[float]) -> float:
    """Return the mean ratio of paired times, without ratios three or more standard deviations from the mean."""
    ratios = [g / p for g, p in zip(gold, pred, strict=True)]
    mean, deviation = fmean(ratios), pstdev(ratios)
    return fmean([ratio for ratio in ratios if abs(ratio - mean) < 3 * deviation] or ratios)


def ves(ratio: float) -> float:
    """Compute BIRD's valid efficiency score of a right query."""
    return math.sqrt(ratio)


def r_ves(ratio: float) -> float:
    """Compute BIRD's reward-based efficiency score of a right query, which is at most the square root of 1.25."""
    steps = ((2.0, 1.25), (1.0, 1.0), (0.5, 0.75), (0.25, 0.5))
    return math.sqrt(next((reward for least, reward in steps if ratio >= least), 0.25))


def measure(
    names: Iterable[str],
    gold: str,
    pred: str,
    databases: Sequence[Database],
    *,
    strict: bool = True,
    keep_distinct: bool = False,
    limits: Limits | None = None,
) -> dict[str, float | None]:
    """Compute the named scores of one prediction; None where the gold query itself cannot be scored.

    Args:
        names: names of the scores.
        gold: the gold query.
        pred: the prediction.
        databases: the task's own database, then the further ones of a test suite.
        strict: mode of execution match on a test suite, as in `sqlbench.reward.score`.
        keep_distinct: whether DISTINCT counts on a test suite, as in `sqlbench.reward.score`.
        limits: limits of a statement; the first database's by default.
    """
    values: dict[str, float | None] = {}
    by_result, names = {"bird-ex", "soft-f1", "ves", "r-ves"}, list(names)
    limits = limits or databases[0].limits
    result_limits = Limits(limits.seconds, GOLD_ROWS, limits.result_bytes)
    if by_result & set(names):
        wanted = databases[0].execute(gold, result_limits)
        answer = databases[0].execute(pred, result_limits)
        right = wanted.ok and answer.ok and set(wanted.rows) == set(answer.rows)
        ratio = None
        if right and {"ves", "r-ves"} & set(names):
            ratio = _ratio(gold, pred, databases[0], result_limits)
    for name in names:
        if name == "test-suite":
            how = {"strict": strict, "keep_distinct": keep_distinct, "limits": limits}
            values[name] = score(gold, pred, databases, **how).match  # type: ignore[arg-type]
        elif name == "exact-match":
            values[name] = float(exact_match(gold, pred, databases[0].dialect))
        elif not wanted.ok:
            values[name] = None
        elif name == "bird-ex":
            values[name] = float(right)
        elif name == "soft-f1":
            values[name] = soft_f1(wanted.rows, answer.rows) if answer.ok else 0.0
        else:
            values[name] = 0.0 if ratio is None else ves(ratio) if name == "ves" else r_ves(ratio)
    return values


def _ratio(gold: str, pred: str, database: Database, limits: Limits) -> float | None:
    """Measure both queries in turn and return their `time_ratio`; None if one fails."""
    pairs = [[database.execute(sql, limits) for sql in (pred, gold)] for _ in range(RUNS)]
    if not all(result.ok for pair in pairs for result in pair):
        return None
    return time_ratio([g.seconds for _, g in pairs], [p.seconds for p, _ in pairs])


def measure_rollouts(
    names: Sequence[str], scored: pd.DataFrame, dataset: Dataset, config: RolloutConfig
) -> dict[str, dict[str, float]]:
    """Compute the mean of each named score over the final queries of rollouts, by hardness and under ``all``."""

    @cache
    def one(db_id: str, gold: str, pred: str) -> dict[str, float | None]:
        databases = [cached_database(target, config.limits) for target in _databases(dataset, db_id)]
        return measure(names, gold, pred, databases, strict=config.strict, limits=config.limits)

    keys = zip(scored["db_id"], scored["gold"], scored["pred"].fillna(""), strict=True)
    rows = [one(*key) for key in tqdm(keys, desc="metrics", total=len(scored), unit="query", mininterval=0.5)]
    table, means = pd.DataFrame(rows, scored.index, list(names), dtype=float), {}
    for name, values in table.items():
        groups = {"all": values} | {level: group for level, group in values.groupby(scored["hardness"]) if level}
        means[str(name)] = {level: value for level, group in groups.items() if (value := mean(group)) is not None}
    return means


def _databases(dataset: Dataset, db_id: str) -> list[Path | str | Database]:
    """Return the database of a task, then the further files of its folder."""
    database = dataset.database(db_id)
    if not isinstance(database, Path) or database.parent.name != db_id:
        return [database]
    return [database, *sorted(path for path in database.parent.glob(f"*{database.suffix}") if path != database)]
