"""The two tables of the seed experiment, and what their numbers do and do not say, from finished cells.

A finished cell is a ``cell.json``. It holds the outcome of every task before and after training, so that cells can be
compared task by task from what is kept in version control, without the rollouts themselves.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import pandas as pd

from sqlbench.agent.trajectory import Trajectory
from sqlbench.config import Settings
from sqlbench.errors import DataError
from sqlbench.grid import GRIDS, Cell
from sqlbench.models import policy_folder
from sqlbench.statistics import mcnemar, paired_bootstrap, wilson

CELL = "cell.json"


class Side(Settings):
    """One evaluation as a cell needs it."""

    outcomes: str
    """One character a task in the order of task keys: ``1`` right, ``0`` wrong, ``x`` failed."""
    transitions: float
    """Transitions of trained sub-agents a rollout."""
    prompt_tokens: float
    """Mean over those transitions."""
    response_tokens: float

    @property
    def n(self) -> int:
        """Scored rollouts."""
        return len(self.outcomes) - self.outcomes.count("x")

    @property
    def hits(self) -> int:
        """Right ones."""
        return self.outcomes.count("1")

    @property
    def accuracy(self) -> float:
        """Percent of the scored rollouts."""
        return 100 * self.hits / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson interval at 95%, in percent."""
        if not self.n:
            return math.nan, math.nan
        low, high = wilson(self.hits, self.n)
        return 100 * low, 100 * high

    @property
    def interval_text(self) -> str:
        """The interval as tables show it."""
        return "{:.1f} to {:.1f}".format(*self.interval)


class CellResult(Settings):
    """Content of ``cell.json``."""

    cell: Cell
    size: str
    split: str
    initial: Side
    final: Side
    gpus: int
    steps: int
    hours: float
    step_seconds: float
    rollout_percent: float
    update_percent: float


def measure(trajectories: Iterable[Trajectory], agents: str) -> Side:
    """What the tables say about one evaluation, counting the transitions of sub-agents that `agents` matches."""
    ordered = sorted(trajectories, key=lambda t: (t.task_key, t.task_id))
    marks = {None: "x", False: "0", True: "1"}
    scored = [t for t in ordered if t.correct is not None]
    calls = [x.completion for t in scored for x in t.transitions if re.search(agents, x.agent)]
    return Side(
        outcomes="".join(marks[t.correct] for t in ordered),
        transitions=len(calls) / len(scored) if scored else math.nan,
        prompt_tokens=_mean([c.prompt_tokens for c in calls]),
        response_tokens=_mean([c.response_tokens for c in calls]),
    )


def _mean(values: Sequence[int | None]) -> float:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else math.nan


def model_size(model: str) -> str:
    """Parameters of a model as tables show them: counted where the weights are at hand, else read off its name."""
    path = policy_folder(model) if model == "nano" else Path(model)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        named = re.search(r"(\d+(?:\.\d+)?)[bB](?![a-z])", model)
        return f"{named[1]}B" if named else "?"
    count = sum(_parameters(file) for file in files)
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"


def _parameters(file: Path) -> int:
    with file.open("rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


# --- tables -------------------------------------------------------------------------------------------------------


def load_results(folder: Path | str) -> list[CellResult]:
    """Finished cells below a run folder, in the order of the tables: model, context, turns, agents, seed.

    Raises:
        DataError: there is none, or one cannot be read.
    """
    found = []
    for path in Path(folder).glob(f"cells/*/{CELL}"):
        try:
            found.append(CellResult.model_validate_json(path.read_text()))
        except ValueError as error:
            raise DataError(f"cannot read {path}: {error}; delete it and run the cell again") from error
    if not found:
        raise DataError(f"no trained cell in {folder}; run notebook 03_grpo_training or 'sqlbench ablate' first")
    order = attrgetter("model", "context", "turns", "agents", "steps", "seed")
    return sorted(found, key=lambda result: (result.cell.control or "", *order(result.cell)))


def training_runs(folder: Path | str) -> dict[str, list[Path]]:
    """Training runs of finished cells by what they have in common, seeds side by side: what `reward_curves` draws."""
    runs: dict[str, list[Path]] = {}
    for result in load_results(folder):
        runs.setdefault(result.cell.title, []).append(Path(folder) / "cells" / result.cell.name / "train")
    return runs


def accuracy_table(results: Sequence[CellResult]) -> pd.DataFrame:
    """The seed experiment's accuracy table, with 95% intervals and the number of tasks beside it."""
    rows = [
        {
            "Acc (Initial)": round(r.initial.accuracy, 1),
            "95% CI (Initial)": r.initial.interval_text,
            "Acc (Final)": round(r.final.accuracy, 1),
            "95% CI (Final)": r.final.interval_text,
            "Transitions": f"{r.initial.transitions:.2f} → {r.final.transitions:.2f}",
            "Prompt Length": round(r.final.prompt_tokens, 1),
            "Response Length": f"{r.initial.response_tokens:.1f} → {r.final.response_tokens:.1f}",
            "Tasks": r.final.n,
        }
        for r in results
    ]
    return _labelled(results, rows)


def _labelled(results: Sequence[CellResult], rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A table that begins with what was trained; the model's label names the steps where cells differ in them."""
    mixed = len({r.cell.steps for r in results}) > 1
    return pd.DataFrame(
        [
            {
                "Model": r.cell.label + f" ({r.steps} step{'s' * (r.steps != 1)})" * mixed,
                "Size": r.size,
                "Context": r.cell.context,
                "Max Turns": r.cell.turns,
                "Agents": r.cell.agents,
                **row,
            }
            for r, row in zip(results, rows, strict=True)
        ]
    )


def efficiency_table(results: Sequence[CellResult]) -> pd.DataFrame:
    """The seed experiment's efficiency table. Time is the whole training run; a step is without validation."""
    rows = [
        {
            "# GPUs": r.gpus,
            "# Steps": r.steps,
            "Time (h)": round(r.hours, 3),
            "Time/Step (s)": round(r.step_seconds, 2),
            "Rollout Time (%)": round(r.rollout_percent, 1),
            "Update Actor Time (%)": round(r.update_percent, 1),
        }
        for r in results
    ]
    return _labelled(results, rows)


def accuracy_rows(results: Sequence[CellResult]) -> pd.DataFrame:
    """What `sqlbench.curves.before_after` draws."""
    return pd.DataFrame(
        [
            {
                "label": r.cell.title + f", seed {r.cell.seed}" * (r.cell.seed != 1),
                "initial": r.initial.accuracy,
                "initial_low": r.initial.interval[0],
                "initial_high": r.initial.interval[1],
                "final": r.final.accuracy,
                "final_low": r.final.interval[0],
                "final_high": r.final.interval[1],
            }
            for r in results
        ]
    )


def headline(results: Sequence[CellResult]) -> str:
    """One line on the main cell: the one nearest to the headline experiment that was trained longest."""
    main = max(
        results, key=lambda r: (r.cell.control is None, r.cell.title == Cell().title, r.cell.steps, -r.cell.seed)
    )
    initial, final = main.initial, main.final
    return (
        f"accuracy on {final.n} {main.split} tasks: {initial.accuracy:.1f}% (95% CI {initial.interval_text}) before "
        f"training, {final.accuracy:.1f}% (95% CI {final.interval_text}) after {main.steps} steps: "
        f"{difference(initial, final)}"
    )


def markdown(table: pd.DataFrame) -> str:
    """A table as GitHub Markdown; a bar inside a cell is written as an entity."""
    rows = [table.columns.tolist(), ["---"] * table.shape[1], *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(str(c).replace("|", "&#124;") for c in row) + " |" for row in rows) + "\n"


def write_table(table: pd.DataFrame, folder: Path | str, name: str) -> pd.DataFrame:
    """Write ``<name>.csv`` and ``<name>.md`` and return the table."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name}.csv", index=False)
    (folder / f"{name}.md").write_text(markdown(table), encoding="utf-8")
    return table


def write_tables(folder: Path | str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables of a run's finished cells, written to its ``tables/`` folder."""
    results = load_results(folder)
    tables = Path(folder) / "tables"
    return (
        write_table(accuracy_table(results), tables, "accuracy"),
        write_table(efficiency_table(results), tables, "efficiency"),
    )


SEED_FIGURES = Path(__file__).parent / "assets" / "seed_experiment.csv"
"""Both tables that the seed experiment published (Agent Lightning, "Training AI Agents to Write and Self-correct SQL
with Reinforcement Learning"; verl 0.5.0, vLLM 0.10.0), by the names of the rows of grid ``seed``. They are as
published, although ``llama-3b`` contradicts itself: 436 steps of 181.3 s are 22 h, not 10.3 h."""
SEED_TASKS = "500 of test"


def seed_comparison(folder: Path | str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Accuracy and efficiency of each row of grid ``seed``: a line as published, and one of ours, from a run, below it.

    A cell that was not run, or the whole run, stays empty. Both sides were measured on 500 tasks, but not on the same
    ones: the seed experiment drew its own from Spider's test split, grid ``seed`` uses ``dev_500``.
    """
    results = load_results(folder) if any(Path(folder).glob(f"cells/*/{CELL}")) else []
    published = pd.read_csv(SEED_FIGURES, index_col="row").astype(object)
    keys = list(published.columns[:5])
    tables = []
    for table, columns in ((accuracy_table, list(published.columns[5:10])), (efficiency_table, published.columns[10:])):
        lines = []
        for name, cell in GRIDS["seed"].rows.items():
            same = [r for r in results if (r.cell, r.split, r.steps) == (cell, GRIDS["seed"].split, cell.steps)]
            ours = table(same).iloc[0] if same else {}
            labels = {"Row": name, **published.loc[name, keys]}
            lines.append({**labels, "Source": "published", **published.loc[name, columns], "Tasks": SEED_TASKS})
            found = {key: ours.get(key, "") for key in columns}
            tasks = f"{ours.get('Tasks')} of {GRIDS['seed'].split}" if same else ""
            lines.append({**labels, "Source": "sqlbench", **found, "Tasks": tasks})
        tables.append(pd.DataFrame(lines, dtype=object))
    return tables[0], tables[1].drop(columns="Tasks")


def write_seed_tables(folder: Path | str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`seed_comparison` of a run, written to its ``tables/`` folder."""
    accuracy, efficiency = seed_comparison(folder)
    tables = Path(folder) / "tables"
    return write_table(accuracy, tables, "seed_accuracy"), write_table(efficiency, tables, "seed_efficiency")


# --- what the numbers say -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A paired comparison on the same tasks."""

    points: float
    """Accuracy of the second minus the first, in percentage points."""
    low: float
    high: float
    """95% interval of `points`, by paired bootstrap over the tasks."""
    p: float
    """Two-sided exact McNemar test."""
    gained: int
    lost: int

    def __str__(self) -> str:
        counts = f"{self.gained} gained, {self.lost} lost"
        return f"{self.points:+.1f} points ({self.interval_text}; McNemar p {self.p_text}; {counts})"

    @property
    def interval_text(self) -> str:
        """The interval as tables show it."""
        return f"{self.low:+.1f} to {self.high:+.1f}"

    @property
    def p_text(self) -> str:
        """The p-value as tables show it."""
        return "< 0.001" if self.p < 0.001 else f"{self.p:.3f}"

    @property
    def clear(self) -> bool:
        """Whether chance alone would seldom give it (p < 0.05)."""
        return self.p < 0.05


def difference(first: Side, second: Side) -> Difference:
    """Compare two evaluations over the same tasks; tasks that failed in either are left out.

    Raises:
        DataError: they are not over the same tasks.
    """
    if len(first.outcomes) != len(second.outcomes):
        raise DataError(
            f"evaluations of {len(first.outcomes)} and {len(second.outcomes)} tasks cannot be compared task by task"
        )
    pairs = [(int(a), int(b)) for a, b in zip(first.outcomes, second.outcomes, strict=True) if "x" not in a + b]
    gained, lost = pairs.count((0, 1)), pairs.count((1, 0))
    if not pairs:
        return Difference(0.0, 0.0, 0.0, 1.0, 0, 0)
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    low, high = paired_bootstrap(before, after)
    points = 100 * (gained - lost) / len(pairs)
    return Difference(points, 100 * low, 100 * high, mcnemar(before, after), gained, lost)


def discuss(results: Sequence[CellResult]) -> str:
    """Markdown that says what the finished cells show and what they do not; every claim is made from their numbers."""
    gains = {r.cell.name: difference(r.initial, r.final) for r in results}
    lines = ["**Training.**"]
    for r in results:
        lines.append(
            f"- `{r.cell.name}`: {r.initial.accuracy:.1f}% → {r.final.accuracy:.1f}%, {gains[r.cell.name]}"
            + ("." if gains[r.cell.name].clear else "; **not distinguishable from no change**.")
        )
    lines += _seeds(results) + _control(results, gains)
    for title, attribute, words in (
        ("Turns", "turns", "{0} → {1} turns"),
        ("Context", "context", "context {0} → {1}"),
        ("Training the check step", "agents", "`{0}` → `{1}`"),
    ):
        found = []
        for first, second in _neighbours(results, attribute):
            change = difference(first.final, second.final)
            values = (getattr(first.cell, attribute), getattr(second.cell, attribute))
            others = [name for name in ("turns", "context", "agents") if name != attribute]
            rest = ", ".join(f"{name} {getattr(first.cell, name)}" for name in others)
            verdict = "" if change.clear else ", within chance"
            cost = second.step_seconds / first.step_seconds
            found.append(f"- {words.format(*values)} ({rest}): final {change}{verdict}; time a step times {cost:.2f}.")
        if found:
            lines += ["", f"**{title}.**", *found]
    return "\n".join(lines) + "\n"


def _tasks(result: CellResult) -> tuple[str, int]:
    return result.split, len(result.final.outcomes)


def _neighbours(results: Sequence[CellResult], attribute: str) -> Iterator[tuple[CellResult, CellResult]]:
    """Pairs of cells that differ in nothing but one setting, the smaller value first."""
    for first in results:
        for second in results:
            one, two = first.cell, second.cell
            if getattr(one, attribute) >= getattr(two, attribute):
                continue
            if one.model_copy(update={attribute: getattr(two, attribute)}) == two and _tasks(first) == _tasks(second):
                yield first, second


def _seeds(results: Sequence[CellResult]) -> list[str]:
    groups: dict[str, list[CellResult]] = {}
    for r in results:
        groups.setdefault(r.cell.model_copy(update={"seed": 1}).name, []).append(r)
    lines = []
    for name, group in groups.items():
        if len(group) > 1:
            rises = [r.final.accuracy - r.initial.accuracy for r in group]
            lines.append(
                f"- `{name}` over {len(group)} seeds: mean {sum(rises) / len(rises):+.1f} points, "
                f"from {min(rises):+.1f} to {max(rises):+.1f}. Cells that differ by less than that range do not differ."
            )
    return ["", "**Seeds.**", *lines] if lines else []


def _control(results: Sequence[CellResult], gains: dict[str, Difference]) -> list[str]:
    lines = []
    for r in results:
        if r.cell.control:
            gain = gains[r.cell.name]
            rose = gain.clear and gain.points > 0
            says = "**rises: the pipeline leaks, trust nothing above**" if rose else "does not rise, as it must not"
            drawn = {"coin": "drawn by coin", "permuted": "permuted within each task"}[r.cell.control]
            lines.append(f"- With rewards {drawn} the policy {says}: {gain}.")
    return ["", "**Control.**", *lines] if lines else []
