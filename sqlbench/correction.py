"""What the repair loop of recorded rollouts did: how well checks judged, what rewrites mended or spoilt, and the gain.

The first query of a rollout is what the same policy answers with one turn (greedy decoding, same prompt), so the gain
of more turns over one is measured within the same rollouts. Verdicts of queries before the last one are made here, by
running them again.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pandas as pd

from sqlbench.agent.prompts import parse_verdict
from sqlbench.agent.repair import repeated
from sqlbench.agent.trajectory import Trajectory
from sqlbench.config import Settings
from sqlbench.data.tasks import open_dataset
from sqlbench.database.engine import cached_database
from sqlbench.reward import score
from sqlbench.runs import RunFolder
from sqlbench.samples import standing
from sqlbench.statistics import mcnemar, paired_bootstrap
from sqlbench.tables import load_results


class Correction(Settings):
    """Self-correction over the scored rollouts of an evaluation; shares are in [0, 1]."""

    tasks: int
    first: float
    """Execution match of the first queries."""
    last: float
    """Execution match of the last ones."""
    gain_low: float
    gain_high: float
    """95% interval of ``last - first``, by bootstrap over tasks."""
    p: float
    """McNemar's test of first against last."""
    flagged: int
    """Checks that called a query wrong."""
    precision: float
    """Of the queries called wrong, how many were."""
    recall: float | None
    """Of the checked queries that were wrong, how many were called so; None where none was."""
    recall_ran: float | None
    """The same among queries that ran: those whose result the check had to judge."""
    balanced_accuracy: float | None
    """Mean of the share of wrong queries called wrong and of right ones called right: 0.5 for any constant answer.

    None where not both kinds were checked.
    """
    mended: int
    """Rewrites from a wrong query to a right one."""
    spoilt: int
    """Rewrites from a right query to a wrong one."""
    repeated: int
    """Rewrites that gave an earlier query again, those included that were then sampled again."""
    rewrites: int
    by_turn: list[float]
    """Execution match of the query that stands after each turn: 1, 2 and so on."""
    transitions: float
    """Model calls a rollout."""


def correction(trajectories: Iterable[Trajectory], data: Path | str) -> Correction:
    """Judge the repair loop of rollouts over a data set.

    Raises:
        DataError: a database of the data set is missing.
    """
    dataset = open_dataset(data)
    first: list[int] = []
    last: list[int] = []
    checks: list[tuple[bool, bool, bool]] = []
    steps: list[tuple[bool, bool]] = []
    stands: list[list[bool]] = []
    again: list[bool] = []
    calls = 0
    for record in trajectories:
        if record.reward is None or not record.executions:
            continue
        database = cached_database(dataset.database(record.db_id))
        verdicts = {e.turn: score(record.gold, e.sql, database).match for e in record.executions}
        if None in verdicts.values():  # gold did not run this time, which says nothing of the queries
            continue
        right = {turn: match == 1 for turn, match in verdicts.items()}
        ran = {e.turn: e.status == "ok" for e in record.executions}
        first.append(right[record.executions[0].turn])
        stood = [right[e.turn] for e in standing(record)]
        last.append(stood[-1])
        checks += [
            (not parse_verdict(t.completion.text), right[t.turn], ran[t.turn])
            for t in record.transitions
            if t.agent == "check"
        ]
        steps += [(right[a.turn], right[b.turn]) for a, b in pairwise(record.executions)]
        stands.append(stood)
        same = repeated(record.transitions, record.executions)
        again += [x for t, x in zip(record.transitions, same, strict=True) if t.agent == "rewrite"]
        calls += len(record.transitions)
    low, high = paired_bootstrap(first, last) if first else (0.0, 0.0)
    flagged = [right for flag, right, _ in checks if flag]
    wrong = [flag for flag, right, _ in checks if not right]
    passed = [not flag for flag, right, _ in checks if right]
    turns = max(map(len, stands), default=0)
    wrong_ran = [flag for flag, right, ran in checks if not right and ran]
    return Correction(
        tasks=len(first),
        first=_mean(first),
        last=_mean(last),
        gain_low=low,
        gain_high=high,
        p=mcnemar(first, last) if first else 1.0,
        flagged=len(flagged),
        precision=_mean([not right for right in flagged]),
        recall=_mean(wrong) if wrong else None,
        recall_ran=_mean(wrong_ran) if wrong_ran else None,
        balanced_accuracy=(_mean(wrong) + _mean(passed)) / 2 if wrong and passed else None,
        mended=sum(not a and b for a, b in steps),
        spoilt=sum(a and not b for a, b in steps),
        repeated=sum(again),
        rewrites=len(again),
        by_turn=[_mean([one[min(turn, len(one) - 1)] for one in stands]) for turn in range(turns)],
        transitions=calls / max(1, len(first)),
    )


def correction_table(folder: Path | str, data: Path | str) -> pd.DataFrame:
    """One row for each finished cell of a run folder with more than one turn, from its evaluation after training."""
    rows = []
    for result in load_results(folder):
        place = Path(folder) / "cells" / result.cell.name / "after"
        if result.cell.turns > 1 and place.is_dir():
            name = f"{result.cell.title}, seed {result.cell.seed}"
            rows.append({"Training": name} | row(correction(RunFolder(place).trajectories(), data)))
    return pd.DataFrame(rows, columns=["Training", *row(correction([], data))])


def row(found: Correction) -> dict[str, object]:
    """A `Correction` as a table shows it: percent and points."""
    return {
        "First query (%)": round(100 * found.first, 1),
        "Last query (%)": round(100 * found.last, 1),
        "Gain": round(100 * (found.last - found.first), 1),
        "By turn": " / ".join(f"{100 * (b - a):+.1f}" for a, b in pairwise(found.by_turn)),
        "95% CI (Gain)": f"{100 * found.gain_low:+.1f} to {100 * found.gain_high:+.1f}",
        "Check: precision (%)": _percent(found.precision if found.flagged else None),
        "Check: recall (%)": _percent(found.recall),
        "Check: recall, ran (%)": _percent(found.recall_ran),
        "Check: balanced (%)": _percent(found.balanced_accuracy),
        "Mended / spoilt": f"{found.mended} / {found.spoilt}",
        "Repeated": f"{found.repeated} of {found.rewrites}",
        "Calls a rollout": round(found.transitions, 2),
    }


def _percent(share: float | None) -> float | str:
    return "" if share is None else round(100 * share, 1)


def _mean(values: list[int] | list[bool]) -> float:
    return sum(values) / len(values) if values else 0.0
