"""Trajectory inspector: finds a rollout among thousands and shows all of it.

Light fields of every rollout are read once; a rollout is parsed when it is selected. If the run's database is on this
machine, queries are executed live, read-only and within the usual limits. Otherwise the stored first rows of the
prediction are shown. Without a kernel the inspector is static HTML: the beginning of the list, and the selected
rollout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ipywidgets as w
import pandas as pd
from markupsafe import Markup
from traitlets import TraitError

from sqlbench.agent.trajectory import Trajectory
from sqlbench.clauses import LEVELS
from sqlbench.data.tasks import open_dataset
from sqlbench.database.engine import cached_database
from sqlbench.database.types import NO_STATEMENT, QueryResult
from sqlbench.errors import DataError, SqlbenchError
from sqlbench.interfaces import Database
from sqlbench.reward import REFERENCE, STRICT, prepare
from sqlbench_lab import view
from sqlbench_lab.rollouts import RunFacts, Source, advantages, read_rollout, rollout_table

ALL = "all"
LISTED = 25
"""Maximum number of rows of a list in a static form."""
CHOICES = ("outcome", "hardness", "database", "run", "step", "part")
"""Filters with a menu; the last three only if rollouts differ in them."""


class Inspector(w.VBox):
    """A list of rollouts with filters, and the selected one in full.

    Args:
        source: a run folder, several by label, or trajectories; or the part of a `rollout_table` to show.
        data: data set folder, if not the one that the run's config names.

    Raises:
        DataError: there are no rollouts.
    """

    def __init__(self, source: Source | pd.DataFrame, data: Path | str | None = None) -> None:
        self.rollouts = source if isinstance(source, pd.DataFrame) else rollout_table(source)
        """Light fields of all rollouts; the index numbers them."""
        self._data = Path(data) if data is not None else None
        self._runs: dict[Path, RunFacts] = {}
        self._several = self.rollouts["run"].nunique() > 1
        same = ["key"] if self._several else ["key", "part", "step"]
        self._group = self.rollouts.groupby(same, dropna=False).ngroup()
        self._number: int | None = None
        self._trajectory: Trajectory | None = None
        self._quiet = False
        columns = [c for c in ("run", "step", "part", "sample") if self.rollouts[c].nunique() > 1]
        columns += ["outcome", "hardness", "database", "turns", "reward", "question"]
        shown = self.rollouts[columns].astype(object).where(self.rollouts[columns].notna(), "")
        outcomes = [f"{view.OUTCOMES[o]} {o}" for o in shown["outcome"]]
        self._shown = shown.assign(outcome=outcomes, reward=[r if r == "" else f"{r:g}" for r in shown["reward"]])
        lines, heading = _lines(self._shown)
        self._labels = dict(zip(self.rollouts.index, lines, strict=True))
        self._controls = self._make_controls()
        self._defaults = {name: control.value for name, control in self._controls.items()}
        self._count = w.HTML()
        self._list = w.Select(layout=w.Layout(width="100%", max_width="1250px"))
        self._list.add_class("sqlbench-list")
        self._siblings = w.ToggleButtons(style={"button_width": "auto"})
        self._detail = w.HTML()
        for control in self._controls.values():
            control.observe(self._filtered, "value")
        for chooser in (self._list, self._siblings):
            chooser.observe(self._chosen, "value")
        bar = w.HBox(list(self._controls.values()), layout=w.Layout(flex_flow="row wrap"))
        super().__init__([bar, self._count, w.HTML(heading), self._list, self._siblings, self._detail])
        self.add_class("sqlbench-inspector")
        self._filtered()

    # -- for Python

    @property
    def selected(self) -> Trajectory | None:
        """The selected rollout; None if no rollout passes the filters."""
        return self._trajectory

    @property
    def matches(self) -> list[int]:
        """Numbers of the rollouts that pass the filters."""
        return list(self._list._options_values)

    def filter(self, **values: Any) -> Inspector:
        """Set filters by their displayed names; ``turns`` and ``reward`` are pairs (lowest, highest).

        All other filters are reset.

        Raises:
            DataError: a filter or value does not exist.
        """
        for name, value in values.items():
            if name not in self._controls:
                raise DataError(f"Unknown filter: {name}. Choose one of {', '.join(self._controls)}.")
            if name in CHOICES and value not in (options := self._controls[name].options):
                raise DataError(f"Invalid filter: {name}={value!r}. Choose one of {', '.join(map(str, options))}.")
        self._quiet = True
        try:
            for name, control in self._controls.items():
                control.value = values.get(name, self._defaults[name])
        except TraitError as error:
            raise DataError(f"Invalid filter: {name}={values[name]!r} ({error}). Give another value.") from error
        finally:
            self._quiet = False
            self._filtered()
        return self

    def select(self, number: int) -> Inspector:
        """Select one rollout, whether or not it passes the filters.

        Raises:
            DataError: the number does not exist, or the file was rewritten since it was opened.
        """
        if number not in self.rollouts.index:
            raise DataError(
                f"Unknown rollout: {number}. Give a number from {self.rollouts.index[0]} to {self.rollouts.index[-1]}."
            )
        self._show(number)
        return self

    def results(self) -> tuple[QueryResult | None, QueryResult | None]:
        """Return gold's and the prediction's result as the verdict compares them; None if unknown."""
        rollout = self._trajectory
        if rollout is None:
            return None, None
        database, rules = self._database(rollout.db_id), STRICT if self._run.strict else REFERENCE
        stored = next((e for e in reversed(rollout.executions) if e.sql == rollout.pred), None)
        pred = None
        if stored is not None:  # a query that failed in the rollout is not tried again
            more = (
                f"the first of {stored.n_rows}, as stored with the rollout"
                if stored.n_rows > len(stored.rows)
                else None
            )
            pred = QueryResult(
                stored.status, tuple(stored.columns), list(map(tuple, stored.rows)), stored.error or more
            )
        if database is None:
            return None, pred
        if rollout.pred is not None and (pred is None or pred.ok):
            pred = _execute(database, prepare(rollout.pred, rules))
        return _execute(database, prepare(rollout.gold, rules)), pred

    # -- display

    def html(self) -> Markup:
        """Render the static form: filters in words, the beginning of the list, the selected rollout."""
        shown = self._shown.loc[self.matches[:LISTED]]
        listing = view.table(
            ["number", *shown], [[n, *row] for n, row in zip(shown.index, shown.to_numpy(), strict=True)]
        )
        more = f"; the first {LISTED} are listed" if len(self.matches) > LISTED else ""
        return view.page(view.HTML.listing(self._summary() + more, listing), self.rollout_html())

    def __repr__(self) -> str:
        return f"Inspector: {self._summary()}"

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return super()._repr_mimebundle_(**options) | {"text/plain": repr(self), "text/html": str(self.html())}

    def _summary(self) -> str:
        counts = self.rollouts.loc[self.matches, "outcome"].value_counts()
        parts = ", ".join(f"{counts[o]} {o}" for o in view.OUTCOMES if o in counts)
        active = [
            f"{name} {'{} to {}'.format(*c.value) if isinstance(c.value, tuple) else c.value}"
            for name, c in self._controls.items()
            if c.value != self._defaults[name]
        ]
        filters = f" (filters: {', '.join(active)})" if active else ""
        return f"{len(self.matches)} of {len(self.rollouts)} rollouts{': ' * bool(parts)}{parts}{filters}"

    # -- the list

    def _make_controls(self) -> dict[str, Any]:
        def look(width: int) -> dict[str, Any]:
            return {"layout": w.Layout(width=f"{width}px"), "style": {"description_width": "70px"}}

        ranks = {value: n for n, value in enumerate((*view.OUTCOMES, *LEVELS))}
        controls: dict[str, Any] = {}
        for name in CHOICES:
            values = [v for v in self.rollouts[name].dropna().unique() if v != ""]
            if len(values) > 1 or name in CHOICES[:3]:
                values.sort(key=lambda v: (ranks.get(v, 99), v))
                controls[name] = w.Dropdown(options=[ALL, *values], description=name, **look(210))
        turns, rewards = self.rollouts["turns"], self.rollouts["reward"].dropna()
        low, high = int(turns.min()), int(turns.max())
        controls["turns"] = w.IntRangeSlider(value=(low, high), min=low, max=high, description="turns", **look(290))
        best = max(1.0, rewards.max()) if len(rewards) else 1.0
        controls["reward"] = w.FloatRangeSlider(
            value=(0.0, best), min=0.0, max=best, step=0.05, description="reward", **look(290)
        )
        controls["text"] = w.Text(placeholder="question, SQL, answers, errors", description="text", **look(360))
        return controls

    def _filtered(self, _: Any = None) -> None:
        if self._quiet:
            return
        keep = pd.Series(True, index=self.rollouts.index)
        for name, control in self._controls.items():
            if control.value == self._defaults[name]:
                continue
            column = self.rollouts[name]
            if name == "text":
                keep &= column.str.contains(control.value.lower(), regex=False)
            else:
                passes = column == control.value if name in CHOICES else column.between(*control.value)
                keep &= passes.fillna(False).astype(bool)
        numbers = keep.index[keep].tolist()
        self._quiet = True
        self._list.options = [(self._labels[n], n) for n in numbers]
        self._list.rows = min(12, max(3, len(numbers)))
        self._quiet = False
        self._count.value = view.HTML.strong(self._summary())
        self._show(self._number if self._number in set(numbers) else next(iter(numbers), None))

    def _chosen(self, change: Any) -> None:
        if not self._quiet and change["new"] is not None:
            self._show(change["new"])

    # -- one rollout

    def _show(self, number: int | None) -> None:
        if number is None or number != self._number:
            self._number, self._trajectory = number, None
            self._trajectory = None if number is None else read_rollout(self.rollouts.loc[number])
            self._detail.value = view.page(self.rollout_html())
        self._quiet = True
        self._list.value = number if number in self._list._options_values else None
        group = self._siblings_of(number)
        self._siblings.layout.display = "" if len(group) > 1 else "none"
        self._siblings.options = [(self._name(n), n) for n in group]
        self._siblings.value = number
        self._quiet = False

    @property
    def _run(self) -> RunFacts:
        """Facts about the run of the selected rollout."""
        where = self.rollouts.at[self._number, "where"]
        if isinstance(where, Trajectory):
            return RunFacts()
        folder = where[0].parent
        if folder not in self._runs:
            self._runs[folder] = RunFacts.of(folder)
        return self._runs[folder]

    def _database(self, name: str) -> Database | None:
        root = self._data or self._run.data
        try:
            return cached_database(open_dataset(root).database(name)) if root else None
        except SqlbenchError:
            return None

    def _siblings_of(self, number: int | None) -> list[int]:
        return [] if number is None else self._group.index[self._group == self._group[number]].tolist()

    def _name(self, number: int) -> str:
        row = self.rollouts.loc[number]
        return f"{row['run'] or 'sample ' + str(row['sample'])} {view.OUTCOMES[row['outcome']]}"

    def _advantages(self, number: int) -> dict[int, float]:
        """Compute the advantages in a training rollout's group, by number; empty for other rollouts."""
        row, by_std = self.rollouts.loc[number], self._run.by_std
        if by_std is None or row["part"] != "training":
            return {}
        group = self.rollouts.loc[self._siblings_of(number)]
        rewards = group.loc[(group["run"] == row["run"]) & (group["step"] == row["step"]), "reward"].dropna()
        return dict(zip(rewards.index, advantages(rewards.tolist(), by_std), strict=True))

    def rollout_html(self) -> Markup:
        """Render the selected rollout, for `view.page`."""
        rollout, number = self._trajectory, self._number
        if rollout is None or number is None:
            return view.HTML.nothing()
        row, run, advantage = self.rollouts.loc[number], self._run, self._advantages(number)
        notes = [row["run"], f"step {rollout.step}" * (rollout.step is not None), row["part"]]
        notes.append(f"sample {rollout.sample}" * (row["part"] == "training"))
        notes.append("" if rollout.reward is None else f"reward {rollout.reward:g}")
        notes.append(f"advantage {advantage[number]:+.2f}" if number in advantage else "")
        gold, pred = self.results()
        results = view.results_html(gold, pred, rollout.correct is True, rollout.reason == "order_differs")
        rules = STRICT if run.strict else REFERENCE
        prepared = gold and any(sql and prepare(sql, rules) != sql for sql in (rollout.gold, rollout.pred))
        group = self._group_html(number, advantage, rollout.dialect)
        timeline = view.timeline_html(rollout, run.tokenizer)
        return view.HTML.rollout(rollout, notes, results, prepared, group, timeline)

    def _group_html(self, number: int, advantage: dict[int, float], dialect: str) -> Markup:
        """Render the rollouts of the same task side by side, each compared with the selected one."""
        group = self.rollouts.loc[self._siblings_of(number)]
        if len(group) < 2:
            return Markup("")
        cards = []
        for n, row in group.iterrows():
            facts = [row["outcome"], row["reason"], f"{row['turns']} turn{'s' * (row['turns'] != 1)}"]
            facts.append("" if row["reward"] in (0, 1) or pd.isna(row["reward"]) else f"reward {row['reward']:g}")
            facts.append(f"advantage {advantage[n]:+.2f}" if n in advantage else "")
            _, sql = view.token_diff(*(view.pretty(sql, dialect) for sql in (group.at[number, "pred"], row["pred"])))
            cards.append((self._name(n), facts, sql, n == number))
        title = "The same task in all runs" if self._several else "Its group: all rollouts of this task in this step"
        if advantage and not any(advantage.values()):
            title += "; all rewards are equal, so nothing is learnt from it"
        return view.HTML.group(title, cards)


def _lines(shown: pd.DataFrame) -> tuple[list[str], Markup]:
    """Format the rows of the list as text in columns, and their heading as HTML in the same font."""
    texts = shown.astype(str).replace(r"\s+", " ", regex=True)
    widths = [min(24, max(len(name), texts[name].str.len().max())) for name in texts.columns[:-1]]
    lines = [
        "  ".join([*(cell[:n].ljust(n) for cell, n in zip(row, widths, strict=False)), row[-1]]).replace(" ", "\u00a0")
        for row in [list(texts.columns), *texts.to_numpy().tolist()]
    ]
    return lines[1:], view.HTML.heading(lines[0])


def _execute(database: Database, sql: str | None) -> QueryResult:
    return QueryResult("rejected", error=NO_STATEMENT) if sql is None else database.execute(sql)
