"""Measures the repair loop of recorded rollouts: the quality of checks, the effect of rewrites, and the gain.

The first query of a rollout equals the same policy's answer with one turn (greedy decoding, same prompt), so the gain
of more turns over one is measured within the same rollouts. Queries before the last one get their verdicts here, by
running them again.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pandas as pd

from sqlbench.agent.trajectory import Trajectory
from sqlbench.config import RolloutConfig, Settings
from sqlbench.data.tasks import open_dataset
from sqlbench.results import Rollouts, balanced_accuracy, mean
from sqlbench.runs import RunFolder
from sqlbench.samples import by_turn, judge
from sqlbench.stats import mcnemar, paired_bootstrap
from sqlbench_lab.tables import load_results


class Correction(Settings):
    """Measures of self-correction over the scored rollouts of an evaluation; shares are in [0, 1]."""

    tasks: int
    first: float
    """Execution accuracy of the first queries, a mean over tasks."""
    last: float
    """Execution accuracy of the last queries."""
    gain_low: float
    gain_high: float
    """95% interval of ``last - first``, by bootstrap over tasks."""
    p: float
    """p-value of McNemar's test of first against last, over tasks."""
    rejected: int
    """Number of checks that called a query wrong."""
    precision: float
    """Share of the queries called wrong that were wrong."""
    recall: float | None
    """Share of the checked wrong queries that were called wrong; None if there were none."""
    recall_ran: float | None
    """Recall among queries that ran, whose result the check had to judge."""
    balanced_accuracy: float | None
    """Mean of the share of wrong queries called wrong and of right ones called right: 0.5 for any constant answer.

    None unless both kinds were checked.
    """
    fixed: int
    """Number of rewrites from a wrong query to a right one."""
    broken: int
    """Number of rewrites from a right query to a wrong one."""
    repeated: int
    """Number of rewrites that repeated an earlier query, including those that were then replaced."""
    rewrites: int
    by_turn: list[float]
    """Execution accuracy of the current query after each turn, from turn 1."""
    transitions: float
    """Model calls per rollout."""


def correction(trajectories: Iterable[Trajectory], data: Path | str) -> Correction:
    """Measure the repair loop of rollouts over a data set.

    Raises:
        DataError: a database of the data set is missing.
    """
    rollouts, calls, queries = Rollouts.of(trajectories)
    right = judge(open_dataset(data), RolloutConfig())
    scored = rollouts.loc[rollouts["reward"].notna(), ["db_id", "gold"]]
    queries = queries.join(scored, on="rollout", how="inner")
    keys = zip(queries["db_id"], queries["gold"], queries["sql"], strict=True)
    queries["right"] = pd.Series([right(*key) for key in keys], queries.index, dtype=float)
    unknown = queries.loc[queries["right"].isna(), "rollout"]  # gold did not run this time, so no verdict
    queries = queries[~queries["rollout"].isin(unknown)]
    turns = by_turn(queries["right"].reindex(queries["stands"]).set_axis(queries["rollout"]))
    tasks = turns.groupby(rollouts["task"], sort=False).mean()  # rollouts of one task are not independent
    first, last = (tasks[tasks.columns[[0, -1]]] if len(tasks) else pd.DataFrame({0: [0.0], 1: [0.0]})).to_numpy().T
    low, high = paired_bootstrap(first, last)
    calls = calls[calls["rollout"].isin(queries["rollout"])]
    checks = calls[calls["agent"] == "check"].merge(queries, on=["rollout", "turn"])
    says, correct = checks["says"].astype(bool), checks["right"] == 1
    change = queries["right"] - queries.groupby("rollout")["right"].shift()
    rewrites = calls.loc[calls["agent"] == "rewrite", "repeats"]
    return Correction(
        tasks=len(tasks),
        first=first.mean(),
        last=last.mean(),
        gain_low=low,
        gain_high=high,
        p=mcnemar(first, last),
        rejected=(~says).sum(),
        precision=mean(~correct[~says]) or 0.0,
        recall=mean(~says[~correct]),
        recall_ran=mean(~says[~correct & checks["ran"]]),
        balanced_accuracy=balanced_accuracy(says, correct),
        fixed=(change == 1).sum(),
        broken=(change == -1).sum(),
        repeated=rewrites.sum(),
        rewrites=len(rewrites),
        by_turn=tasks.mean().tolist(),
        transitions=len(calls) / max(1, len(turns)),
    )


def correction_table(folder: Path | str, data: Path | str) -> pd.DataFrame:
    """Tabulate a run's finished cells with more than one turn, one row each, from the evaluation after training."""
    rows = []
    for result in load_results(folder):
        place = Path(folder) / "cells" / result.cell.name / "after"
        if result.cell.turns > 1 and place.is_dir():
            name = f"{result.cell.title}, seed {result.cell.seed}"
            rows.append({"Training": name} | row(correction(RunFolder(place).trajectories(), data)))
    return pd.DataFrame(rows, columns=["Training", *row(correction([], data))])


def row(found: Correction) -> dict[str, object]:
    """Format a `Correction` as a row of a table, in percent and points."""
    return {
        "First query (%)": round(100 * found.first, 1),
        "Last query (%)": round(100 * found.last, 1),
        "Gain": round(100 * (found.last - found.first), 1),
        "By turn": " / ".join(f"{100 * (b - a):+.1f}" for a, b in pairwise(found.by_turn)),
        "95% CI (Gain)": f"{100 * found.gain_low:+.1f} to {100 * found.gain_high:+.1f}",
        "Check: precision (%)": _percent(found.precision if found.rejected else None),
        "Check: recall (%)": _percent(found.recall),
        "Check: recall, ran (%)": _percent(found.recall_ran),
        "Check: balanced (%)": _percent(found.balanced_accuracy),
        "Fixed / broken": f"{found.fixed} / {found.broken}",
        "Repeated": f"{found.repeated} of {found.rewrites}",
        "Calls per rollout": round(found.transitions, 2),
    }


def _percent(share: float | None) -> float | str:
    return "" if share is None else round(100 * share, 1)
