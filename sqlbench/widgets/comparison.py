"""Two or more runs over the same tasks: who gained, who lost, where, and whether chance would explain it.

Every run is compared with the first one, task by task: tasks that failed in either run are left out of that pair, tasks
that only some of the runs have are left out and counted. Of a training run its last validation is compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ipywidgets as w
import pandas as pd
from markupsafe import Markup

from sqlbench.data.tasks import open_dataset
from sqlbench.errors import DataError, SqlbenchError
from sqlbench.sqltree import HARDNESS
from sqlbench.tables import Difference, Side, difference
from sqlbench.widgets import view
from sqlbench.widgets.inspector import LISTED, Inspector
from sqlbench.widgets.rollouts import RunFacts, rollout_table

BY = ("hardness", "database", "construct")
FLIP = {("wrong", "right"): "gained", ("right", "wrong"): "lost"}


class Comparison(w.VBox):
    """Runs against the first of them; a task that flipped opens in the inspector below the list.

    Args:
        runs: run folders by label, the one to compare with first.
        data: data set folder, where it is not the one that the runs' configs name; constructs come from it.

    Raises:
        DataError: fewer than two runs, a run without rollouts, or no task in common.
    """

    def __init__(self, runs: Mapping[str, Path | str], data: Path | str | None = None) -> None:
        if len(runs) < 2:
            raise DataError(f"a comparison needs at least two runs, got {len(runs)}")
        self.first, *self.others = runs
        frame = _last_validations(rollout_table(runs))
        frame["nth"] = frame.groupby(["run", "key"]).cumcount()  # a split may hold a task twice
        numbers = frame.reset_index().pivot(index=["key", "nth"], columns="run", values="index")
        shared = numbers.dropna().astype(int)
        if shared.empty:
            raise DataError(f"the runs {', '.join(runs)} have no task in common; compare runs over the same split")
        self.left_out = len(numbers) - len(shared)
        frame = frame.loc[sorted(shared.to_numpy().ravel())]
        self.tasks = frame.loc[shared[self.first].sort_values(), ["hardness", "database", "key", "split", "question"]]
        """The shared tasks, numbered as the first run's rollouts are."""
        by_task = shared.set_index(self.first, drop=False).loc[self.tasks.index]
        self._numbers = {label: by_task[label].to_numpy() for label in runs}
        self._outcomes = pd.DataFrame(
            {label: frame.loc[n, "outcome"].to_numpy() for label, n in self._numbers.items()}, index=self.tasks.index
        )
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
        """One row a run: accuracy with its interval, and the paired difference from the first run."""
        rows = []
        for label in (self.first, *self.others):
            side, d = self._side(label, self.tasks.index), self.difference(label)
            row = {"run": label, "tasks": side.n, "EX (%)": round(side.accuracy, 1), "95% CI": side.interval_text}
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
        """How a run differs from the first one."""
        return difference(self._side(self.first, self.tasks.index), self._side(run, self.tasks.index))

    def by(self, what: str) -> pd.DataFrame:
        """Accuracy, gained and lost by ``hardness``, ``database`` or ``construct``; empty where that is not known.

        Raises:
            DataError: no such breakdown.
        """
        if what not in BY:
            raise DataError(f"no breakdown by '{what}'; choose one of {', '.join(BY)}")
        groups = {name: part.index for name, part in self.tasks.groupby(what) if name}
        rows = []
        for name in sorted(groups, key=lambda n: (HARDNESS.index(n) if n in HARDNESS else 9, n)):
            sides = {label: self._side(label, groups[name]) for label in (self.first, *self.others)}
            row: dict[str, Any] = {what: name, "tasks": len(groups[name])}
            row[f"{self.first}: EX (%)"] = round(sides[self.first].accuracy, 1)
            for label in self.others:
                d = difference(sides[self.first], sides[label])
                row[f"{label}: EX (%)"] = round(sides[label].accuracy, 1)
                row |= {f"{label}: gained": d.gained, f"{label}: lost": d.lost}
            rows.append(row)
        return pd.DataFrame(rows)

    @property
    def flips(self) -> pd.DataFrame:
        """Tasks that the chosen run gained or lost; ``number`` is its rollout's in the inspector."""
        pairs = zip(self._outcomes[self.first], self._outcomes[self._run.value], strict=True)
        flips = self.tasks.assign(change=[FLIP.get(p, "") for p in pairs], number=self._numbers[self._run.value])
        flips = flips[flips["change"].map(lambda change: change != "" and change in self._change.value)]
        columns = ["change", "hardness", "database", "construct", "question", "number"]
        return flips[columns].sort_values("change", kind="stable", ignore_index=True)

    # -- inside

    def _side(self, label: str, tasks: pd.Index) -> Side:
        marks = self._outcomes.loc[tasks, label].map({"right": "1", "wrong": "0"}).fillna("x")
        return Side(outcomes="".join(marks), transitions=math.nan, prompt_tokens=math.nan, response_tokens=math.nan)

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
        """The static form: the tables, the beginning of the list, the task that is looked at."""
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
    """The rollouts to compare: all of an evaluation, of a training run those of its last validation."""
    last = frame["run"].map(frame[frame["part"] == "validation"].groupby("run")["step"].max())
    return frame[(frame["part"] == "") | ((frame["part"] == "validation") & (frame["step"] == last))].copy()


def _constructs(data: Path | str | None, tasks: pd.DataFrame) -> dict[str, str]:
    """Construct by task key; empty where the data set is not at hand or names none."""
    found: dict[str, str] = {}
    for split in tasks["split"].unique():
        try:
            found |= {task.key: task.kind for task in open_dataset(data or "").load(split)}
        except SqlbenchError:
            continue
    return found
