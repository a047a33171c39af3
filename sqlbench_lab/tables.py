"""The two tables of the seed experiment, and the paired differences behind them, from finished cells.

A finished cell is a ``cell.json``. It holds the outcome of every task before and after training, so that cells can be
compared task by task from the files in version control, without the rollouts themselves.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from itertools import permutations
from operator import attrgetter
from pathlib import Path
from typing import Any

import pandas as pd

from sqlbench.config import Settings
from sqlbench.errors import DataError
from sqlbench.models import policy_folder
from sqlbench.results import Difference, Rollouts, Score, difference
from sqlbench_lab.sweep import GRIDS, Experiment

CELL = "cell.json"


class EvalStats(Settings):
    """Statistics of one evaluation for a cell."""

    outcomes: str
    """One character per task in the order of task keys: ``1`` right, ``0`` wrong, ``x`` failed."""
    transitions: float
    """Transitions of trained sub-agents per rollout."""
    prompt_tokens: float
    """Mean over those transitions."""
    response_tokens: float

    @property
    def right(self) -> pd.Series:
        """Outcomes as numbers: 1, 0, NaN if the rollout failed."""
        return pd.Series([{"1": 1.0, "0": 0.0}.get(mark, math.nan) for mark in self.outcomes], dtype=float)

    @property
    def score(self) -> Score:
        """Execution accuracy with its interval."""
        return Score.of(self.right, self.right.index)


class CellResult(Settings):
    """Content of ``cell.json``."""

    cell: Experiment
    size: str
    split: str
    initial: EvalStats
    final: EvalStats
    gpus: int
    steps: int
    hours: float
    step_seconds: float
    rollout_percent: float
    update_percent: float

    @property
    def gain(self) -> Difference:
        """Paired difference of final from initial accuracy, task by task."""
        return difference(self.initial.right, self.final.right)


def eval_stats(found: Rollouts, agents: str) -> EvalStats:
    """Measure one evaluation for the tables, counting the transitions of sub-agents that `agents` matches."""
    frame = found.rollouts.sort_values(["task_key", "task_id"], kind="stable")
    scored = frame.index[frame["correct"].notna()]
    counted = found.calls["agent"].map(re.compile(agents).search).notna()
    calls = found.calls[counted & found.calls["rollout"].isin(scored)]
    return EvalStats(
        outcomes="".join(frame["correct"].map({1.0: "1", 0.0: "0"}).fillna("x")),
        transitions=len(calls) / len(scored) if len(scored) else math.nan,
        prompt_tokens=calls["prompt"].mean(),
        response_tokens=calls["response"].mean(),
    )


def model_size(model: str) -> str:
    """Format a model's number of parameters: counted if the weights are available, else read off its name."""
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
    """Load the finished cells below a run folder, in the order of the tables: model, context, turns, agents, seed.

    Raises:
        DataError: there is no finished cell, or one cannot be read.
    """
    results = []
    for path in Path(folder).glob(f"cells/*/{CELL}"):
        try:
            results.append(CellResult.model_validate_json(path.read_text()))
        except ValueError as error:
            raise DataError(f"Cannot read {path}: {error}. Delete it and rerun the cell.") from error
    if not results:
        raise DataError(f"No trained cell in {folder}. Run notebook 03_grpo_training or 'sqlbench ablate' first.")
    order = attrgetter("model", "context", "turns", "agents", "steps", "seed")
    return sorted(results, key=lambda result: (result.cell.control or "", *order(result.cell)))


def training_runs(folder: Path | str) -> dict[str, list[Path]]:
    """Return the training runs of finished cells by title, with all seeds of a title, for `reward_curves`."""
    runs: dict[str, list[Path]] = {}
    for result in load_results(folder):
        runs.setdefault(result.cell.title, []).append(Path(folder) / "cells" / result.cell.name / "train")
    return runs


def accuracy_table(results: Sequence[CellResult]) -> pd.DataFrame:
    """Build the seed experiment's accuracy table, with 95% intervals and the number of tasks."""
    rows = [
        {
            "Acc (Initial)": round(r.initial.score.percent, 1),
            "95% CI (Initial)": r.initial.score.interval_text,
            "Acc (Final)": round(r.final.score.percent, 1),
            "95% CI (Final)": r.final.score.interval_text,
            "Transitions": f"{r.initial.transitions:.2f} → {r.final.transitions:.2f}",
            "Prompt Length": round(r.final.prompt_tokens, 1),
            "Response Length": f"{r.initial.response_tokens:.1f} → {r.final.response_tokens:.1f}",
            "Tasks": r.final.score.n,
        }
        for r in results
    ]
    return _labelled(results, rows)


def _labelled(results: Sequence[CellResult], rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Build a table that begins with the training; the model's label names the steps if cells differ in them."""
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
    """Build the seed experiment's efficiency table. Time is the whole training run; a step excludes validation."""
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
    """Tabulate the accuracies that `sqlbench_lab.figures.before_after` draws."""
    rows = []
    for r in results:
        row: dict[str, Any] = {"label": r.cell.title + f", seed {r.cell.seed}" * (r.cell.seed != 1)}
        for name, score in (("initial", r.initial.score), ("final", r.final.score)):
            row |= {name: score.percent, f"{name}_low": score.interval[0], f"{name}_high": score.interval[1]}
        rows.append(row)
    return pd.DataFrame(rows)


def headline(results: Sequence[CellResult]) -> str:
    """Summarize the main cell in one line: of those nearest to the headline experiment, the longest trained."""
    main = max(
        results, key=lambda r: (r.cell.control is None, r.cell.title == Experiment().title, r.cell.steps, -r.cell.seed)
    )
    initial, final = main.initial.score, main.final.score
    return (
        f"accuracy on {final.n} {main.split} tasks: {initial.percent:.1f}% (95% CI {initial.interval_text}) before "
        f"training, {final.percent:.1f}% (95% CI {final.interval_text}) after {main.steps} steps: {main.gain}"
    )


def paired(first: EvalStats, second: EvalStats, names: tuple[str, str] = ("Initial", "Final")) -> dict[str, Any]:
    """Return two evaluations over the same tasks and their difference as columns of a table."""
    row: dict[str, Any] = {"Tasks": second.score.n}
    for name, score in zip(names, (first.score, second.score), strict=True):
        row |= {f"Acc ({name})": round(score.percent, 1), f"95% CI ({name})": score.interval_text}
    change = difference(first.right, second.right)
    return row | {
        "Gain": round(change.points, 1),
        "95% CI (Gain)": change.interval_text,
        "Gained / lost": f"{change.gained} / {change.lost}",
        "McNemar p": change.p_text,
    }


def _matched(results: Sequence[CellResult], setting: str) -> list[tuple[CellResult, CellResult]]:
    """Pair trained cells that differ in one setting only and share their tasks, the smaller value first."""
    pairs = []
    for one, two in permutations(results, 2):
        values = getattr(one.cell, setting), getattr(two.cell, setting)
        alike = one.cell.model_copy(update={setting: values[1]}) == two.cell and one.split == two.split
        if alike and values[0] < values[1] and len(one.final.outcomes) == len(two.final.outcomes):
            pairs.append((one, two))
    return pairs


def difference_table(results: Sequence[CellResult]) -> pd.DataFrame:
    """Compare every cell before and after training, then trained cells that differ in one setting, task by task."""
    pairs = [(r.cell.name, "before → after training", r.initial, r.final) for r in results]
    for setting in ("turns", "context", "agents"):
        for one, two in _matched(results, setting):
            change = f"{setting} {getattr(one.cell, setting)} → {getattr(two.cell, setting)}"
            pairs.append((two.cell.name, change, one.final, two.final))
    names = ("First", "Second")
    return pd.DataFrame([{"Cell": cell, "Change": change} | paired(a, b, names) for cell, change, a, b in pairs])


def answers(results: Sequence[CellResult]) -> str:
    """Describe the effects of turns, context and trained sub-agents, one Markdown line each, from trained cells.

    Only cells that differ in nothing else are compared. Cells with control rewards are left out.
    """
    trained, lines = [r for r in results if r.cell.control is None], []
    names = {"turns": "with {} turns", "context": "with a context of {} characters", "agents": "with `{}` trained"}
    for setting, name in names.items():
        sentences = []
        for one, two in _matched(trained, setting):
            first, second = (
                name.format(getattr(side.cell, setting)).replace("1 turns", "1 turn") for side in (one, two)
            )
            sentences.append(difference(one.final.right, two.final.right).sentence(first, second))
        values = {getattr(r.cell, setting) for r in trained}
        if len(values) == 1:
            sentences = [f"Not asked here: every training is {name.format(values.pop())}."]
        elif not sentences:
            sentences = ["Not answered here: no two trainings differ in this alone."]
            for r in trained:
                if getattr(r.cell, setting) == max(values):
                    sentences.append(f"`{r.cell.title}`: {r.gain.sentence('before training', 'after training')}")
        lines.append(f"- **{setting.capitalize()}.** {' '.join(sentences)}")
    return "\n".join(lines)


def markdown(table: pd.DataFrame) -> str:
    """Format a table as GitHub Markdown; a bar inside a cell becomes an entity."""
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
    """Write both tables of a run's finished cells to its ``tables/`` folder, and return them."""
    results = load_results(folder)
    tables = Path(folder) / "tables"
    return (
        write_table(accuracy_table(results), tables, "accuracy"),
        write_table(efficiency_table(results), tables, "efficiency"),
    )


SEED_FIGURES = Path(__file__).parent / "assets" / "seed_experiment.csv"
"""Both published tables of the seed experiment (Agent Lightning, "Training AI Agents to Write and Self-correct SQL
with Reinforcement Learning"; verl 0.5.0, vLLM 0.10.0), by the names of the rows of grid ``seed``. They are as
published, although ``llama-3b`` contradicts itself: 436 steps of 181.3 s are 22 h, not 10.3 h."""
SEED_TASKS = "500 of test"


def seed_comparison(folder: Path | str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tabulate accuracy and efficiency of each row of grid ``seed``: a published line, and a line from a run below it.

    The line of a missing cell or run stays empty. Both sides were measured on 500 tasks, but not on the same ones: the
    seed experiment drew its own from Spider's test split, grid ``seed`` uses ``dev_500``.
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
            values = {key: ours.get(key, "") for key in columns}
            tasks = f"{ours.get('Tasks')} of {GRIDS['seed'].split}" if same else ""
            lines.append({**labels, "Source": "sqlbench", **values, "Tasks": tasks})
        tables.append(pd.DataFrame(lines, dtype=object))
    return tables[0], tables[1].drop(columns="Tasks")


def write_seed_tables(folder: Path | str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write `seed_comparison` of a run to its ``tables/`` folder, and return it."""
    accuracy, efficiency = seed_comparison(folder)
    tables = Path(folder) / "tables"
    return write_table(accuracy, tables, "seed_accuracy"), write_table(efficiency, tables, "seed_efficiency")
