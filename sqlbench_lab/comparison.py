"""Comparison of two or more runs over the same tasks: gains, losses, and their statistical significance.

Every run is compared with the first one, task by task. Tasks that failed in either run are left out of that pair. Tasks
that only some of the runs have are left out and counted. Several rollouts of a task count as one, by their mean. A
training run is compared by its last validation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ipywidgets as w
import pandas as pd
from markupsafe import Markup

from sqlbench.data.tasks import open_dataset
from sqlbench.errors import DataError, SqlbenchError
from sqlbench.results import Difference, Score, difference, in_order
from sqlbench_lab import view
from sqlbench_lab.inspector import LISTED, Inspector
from sqlbench_lab.rollouts import RunFacts, rollout_table

BY = ("hardness", "database", "construct")


class Comparison(w.VBox):
    """View of runs against the first of them; a task that flipped opens in the inspector below the list.

    Args:
        runs: run folders by label; the first run is the reference.
        data: data set folder, if not the one that the runs' configs name; constructs come from it.

    Raises:
        DataError: fewer than two runs, a run without rollouts, or no task in common.
    """

    def __init__(self, runs: Mapping[str, Path | str], data: Path | str | None = None) -> None:
        if len(runs) < 2:
            raise DataError(f"Too few runs to compare: {len(runs)}. Give at least two.")
        self.first, *self.others = runs
        frame = _last_validations(rollout_table(runs))
        frame["nth"] = frame.groupby(["run", "key", "sample"]).cumcount()  # a split may hold a task twice
        numbers = frame.reset_index().groupby(["key", "nth", "run"])["index"].first().unstack()
        shared = numbers.dropna().astype(int).sort_values(self.first)
        if shared.empty:
            raise DataError(f"No task in common: {', '.join(runs)}. Compare runs over the same split.")
        self.left_out = len(numbers) - len(shared)
        self._frame = frame = frame.join(shared[self.first].rename("first"), on=["key", "nth"], how="inner")
        self.tasks = frame.loc[shared[self.first], ["hardness", "database", "key", "split", "question"]]
        """The shared tasks, numbered like the first run's rollouts."""
        self._numbers = shared.set_axis(self.tasks.index)
        self._right = frame.groupby(["first", "run"])["correct"].mean().unstack()
        self.tasks["construct"] = (
            self.tasks["key"].map(_constructs(data or RunFacts.of(Path(runs[self.first])).data, self.tasks)).fillna("")
        )
        self.inspector = Inspector(frame, data)
        self._run = w.Dropdown(options=self.others, description="run", layout=w.Layout(width="260px"))
        self._change = w.Dropdown(options=["gained and lost", "gained", "lost"], description="show")
        self._count = w.HTML()
        self._list = w.Select(layout=w.Layout(width="100%", max_width="1250px"))
        self._list.add_class("sqlbench-list")
        for control in (self._run, self._change):
            control.observe(self._filtered, "value")
        self._list.observe(self._opened, "value")
        head = w.HTML(view.page(self._tables_html()))
        super().__init__([head, w.HBox([self._run, self._change, self._count]), self._list, self.inspector])
        self.add_class("sqlbench-comparison")
        self._filtered()

    # -- for Python

    @property
    def summary(self) -> pd.DataFrame:
        """One row per run: accuracy with its interval, and the paired difference from the first run."""
        rows = []
        for label in (self.first, *self.others):
            right, score, d = self._right[label], self._score(label, self.tasks.index), self.difference(label)
            row = {"run": label, "tasks": right.count(), "EX (%)": round(score.percent, 1)}
            row["95% CI"] = score.interval_text
            change = {
                "gained": d.gained,
                "lost": d.lost,
                "difference (points)": f"{d.points:+.1f}",
                "95% CI (difference)": d.interval_text,
                "McNemar p": d.p_text,
            }
            rows.append(row | (dict.fromkeys(change, "") if label == self.first else change))
        return pd.DataFrame(rows)

    def difference(self, run: str) -> Difference:
        """Compute the paired difference of a run from the first one."""
        return difference(self._right[self.first], self._right[run])

    def by(self, what: str) -> pd.DataFrame:
        """Tabulate accuracy, gained and lost by ``hardness``, ``database`` or ``construct``; empty if unknown.

        Raises:
            DataError: the breakdown does not exist.
        """
        if what not in BY:
            raise DataError(f"Unknown breakdown: {what}. Choose one of {', '.join(BY)}.")
        groups = {name: part.index for name, part in self.tasks.groupby(what) if name}
        rows = []
        for name in in_order(groups):
            right = self._right.loc[groups[name]]
            row: dict[str, Any] = {what: name, "tasks": len(right)}
            for label in (self.first, *self.others):
                row[f"{label}: EX (%)"] = round(self._score(label, groups[name]).percent, 1)
                if label != self.first:
                    d = difference(right[self.first], right[label])
                    row |= {f"{label}: gained": d.gained, f"{label}: lost": d.lost}
            rows.append(row)
        return pd.DataFrame(rows)

    @property
    def flips(self) -> pd.DataFrame:
        """Tasks that the chosen run gained or lost; ``number`` is that of its rollout in the inspector."""
        gain = self._right[self._run.value] - self._right[self.first]
        change = gain[gain != 0].dropna().gt(0).map({True: "gained", False: "lost"})
        flips = self.tasks.assign(change=change, number=self._numbers[self._run.value])
        flips = flips[flips["change"].isin(self._change.value.split(" and "))]
        columns = ["change", "hardness", "database", "construct", "question", "number"]
        return flips[columns].sort_values("change", kind="stable", ignore_index=True)

    # -- inside

    def _score(self, label: str, tasks: pd.Index) -> Score:
        rows = self._frame[(self._frame["run"] == label) & self._frame["first"].isin(tasks)]
        return Score.of(rows["correct"], rows["first"])

    def _filtered(self, _: Any = None) -> None:
        rows = self.flips.to_dict("records")
        self._list.options = [
            (
                f"{r['change']:<8}{r['hardness']:<8}{r['database']:<16}{r['question']}".replace(" ", "\u00a0"),
                r["number"],
            )
            for r in rows
        ]
        self._list.rows = min(8, max(3, len(rows)))
        self._list.index = 0 if rows else None
        self._count.value = f"{len(rows)} flipped; a click opens one below" if rows else "no task flipped"

    def _opened(self, change: Any) -> None:
        if change["new"] is not None:
            self.inspector.select(change["new"])

    def _tables_html(self) -> Markup:
        note = f"{len(self.tasks)} tasks that all runs have"
        note += f"; {self.left_out} that some lack are left out" if self.left_out else ""
        parts = [Markup("<h4>Compared with {}</h4>{}<small>{}</small>").format(self.first, _html(self.summary), note)]
        tables = {what: self.by(what) for what in BY}
        parts += [view.folded(f"by {what}", _html(table)) for what, table in tables.items() if len(table)]
        return Markup("").join(parts)

    def html(self) -> Markup:
        """Render the static form: the tables, the beginning of the list, and the selected task."""
        flips = self.flips
        more = f"; the first {LISTED} are listed" if len(flips) > LISTED else ""
        listing = Markup("<h4>Flipped tasks</h4><small>{} from {} to {}{}</small>{}").format(
            len(flips), self.first, self._run.value, more, _html(flips.head(LISTED)) if len(flips) else ""
        )
        return view.page(self._tables_html(), listing, self.inspector.rollout_html())

    def __repr__(self) -> str:
        return "\n".join(f"{self.first} → {label}: {self.difference(label)}" for label in self.others)

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return super()._repr_mimebundle_(**options) | {"text/plain": repr(self), "text/html": str(self.html())}


def _html(frame: pd.DataFrame) -> Markup:
    return view.table(frame.columns.tolist(), frame.to_numpy().tolist())


def _last_validations(frame: pd.DataFrame) -> pd.DataFrame:
    """Select the rollouts to compare: all of an evaluation, and those of a training run's last validation."""
    last = frame["run"].map(frame[frame["part"] == "validation"].groupby("run")["step"].max())
    return frame[(frame["part"] == "") | ((frame["part"] == "validation") & (frame["step"] == last))].copy()


def _constructs(data: Path | str | None, tasks: pd.DataFrame) -> dict[str, str]:
    """Return constructs by task key; empty if the data set is not available or names none."""
    constructs: dict[str, str] = {}
    for split in tasks["split"].unique():
        try:
            constructs |= {task.key: task.kind for task in open_dataset(data or "").load(split)}
        except SqlbenchError:
            continue
    return constructs
