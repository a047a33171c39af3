"""Makes the tables and the figure of trainings on a GPU from the small forms of their run folders.

    python benchmarks/gpu_report.py [results/gpu] [--page docs/gpu.md]

Every folder in it with a ``config.json`` and a ``metrics.jsonl`` is a run (`compact_run.py` makes such a folder). The
tables replace what stands between ``<!-- table:NAME -->`` and ``<!-- /table:NAME -->`` in the README of the folder and
in ``--page``; NAME is ``gpu-accuracy``, ``gpu-validation`` or ``gpu-time``. The figure is ``gpu.png`` in the folder.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import pandas as pd
from compact_run import VALIDATION
from matplotlib.figure import Figure

from sqlbench.clauses import HARDNESS
from sqlbench.results import difference
from sqlbench.runs import CONFIG, METRICS, RunFolder
from sqlbench_lab.figures import COLOURS, DASHES, MARKERS, STYLE, png
from sqlbench_lab.tables import EvalStats, markdown
from sqlbench_train.metrics import read_rows

PARTS = {
    "rollout": "timing_s/gen",
    "old log-prob": "timing_s/old_log_prob",
    "update": "timing_s/update_actor",
}


@dataclass(frozen=True)
class Run:
    """A run read from its folder."""

    name: str
    config: dict[str, Any]
    rows: dict[int, dict[str, float]]
    finished: bool
    validations: dict[int, list[dict[str, Any]]]
    """Compact rollouts by step."""

    @property
    def model(self) -> str:
        """Name of the trained model, without the owner's name."""
        return Path(self.config["sqlbench"]["model"]).name

    @property
    def settings(self) -> str:
        """Settings in which runs differ; unusual ones are named."""
        ours = self.config["sqlbench"]
        usual = {"sampling": "uniform", "credit": "rollout", "max_turns": 3, "control": None}
        usual |= {"random_reward": False}  # the older name
        words = [ours["trained_agents"], f"lr {self.config['actor_rollout_ref']['actor']['optim']['lr']:g}"]
        words += [f"{key} {ours[key]}" for key, value in usual.items() if ours.get(key, value) != value]
        return ", ".join(words)

    @property
    def batch(self) -> str:
        """Tasks per step and rollouts per task."""
        return f"{self.config['data']['train_batch_size']} x {self.config['actor_rollout_ref']['rollout']['n']}"


def read_run(folder: Path, root: Path) -> Run:
    """Read one run."""
    validations: dict[int, list[dict[str, Any]]] = defaultdict(list)
    if (folder / VALIDATION).is_file():
        with gzip.open(folder / VALIDATION, "rt", encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                validations[record["step"]].append(record)
    run = RunFolder(folder)
    name = folder.relative_to(root).as_posix()
    return Run(
        name, run.config()["config"], read_rows(folder / METRICS), run.finished, dict(sorted(validations.items()))
    )


def read_runs(root: Path) -> list[Run]:
    """Read all runs in a folder, those with validations first."""
    folders = sorted(path.parent for path in root.glob(f"*/{METRICS}") if (path.parent / CONFIG).is_file())
    return sorted((read_run(folder, root) for folder in folders), key=lambda run: not run.validations)


# ---- validation


def share(values: Sequence[bool]) -> float:
    """Return the percentage of true values; not a number without any values."""
    return 100 * sum(values) / len(values) if values else float("nan")


def side(records: list[dict[str, Any]]) -> EvalStats:
    """Return the outcome of every task, for a comparison task by task."""
    ordered = sorted(records, key=lambda r: (r["task_key"], r["task_id"]))
    calls = [call for r in records for call in r["calls"]]
    return EvalStats(
        outcomes="".join({None: "x", False: "0", True: "1"}[r["right"]] for r in ordered),
        transitions=len(calls) / len(records),
        prompt_tokens=statistics.fmean(call["prompt"] for call in calls),
        response_tokens=statistics.fmean(call["response"] for call in calls),
    )


@dataclass(frozen=True)
class Loop:
    """Statistics of the agent's loop in one validation; shares are in percent."""

    first: float
    """EX of the first queries, where it is known."""
    last: float
    """EX of the same rollouts' last queries."""
    compared: int
    """Number of rollouts for which both are known."""
    fixed: int
    spoiled: int
    unknown: int
    """Number of rewrites without a verdict on both queries."""
    repeated: int
    rewrites: int
    said_incorrect: float
    """Share of checks that called the query incorrect."""
    balanced: float
    """Balanced accuracy of the checks: 50 is that of a coin, and of one verdict for all."""
    calls: float
    """Model calls per rollout."""
    cut: float
    """Share of answers that ran into the token limit."""
    broken: float
    """Share of last queries that did not run."""


def loop(records: list[dict[str, Any]]) -> Loop:
    """Summarize a validation."""
    scored = [r for r in records if r["right"] is not None]
    followed = [r for r in scored if r["queries"]]
    steps = [pair for r in followed for pair in pairwise(r["queries"])]
    verdicts = [(a["right"], b["right"]) for a, b in steps if None not in (a["right"], b["right"])]
    calls = [call for r in scored for call in r["calls"]]
    checks = [
        (call["correct"], r["queries"][call["turn"] - 1]["right"] if r["queries"] else None)
        for r in scored
        for call in r["calls"]
        if call["agent"] == "check"
    ]
    right, wrong = ([answer == truth for answer, truth in checks if truth is which] for which in (True, False))
    ends = [(r["queries"][0]["right"], r["right"]) for r in followed if r["queries"][0]["right"] is not None]
    return Loop(
        first=share([first for first, _ in ends]),
        last=share([last for _, last in ends]),
        compared=len(ends),
        fixed=verdicts.count((False, True)),
        spoiled=verdicts.count((True, False)),
        unknown=len(steps) - len(verdicts),
        repeated=sum(a["sql"] == b["sql"] for a, b in steps),
        rewrites=len(steps),
        said_incorrect=share([not answer for answer, _ in checks]),
        balanced=(share(right) + share(wrong)) / 2,
        calls=len(calls) / len(scored),
        cut=share([call.get("cut", False) for call in calls]),
        broken=share([r["reason"].startswith("pred_") for r in scored]),
    )


def accuracy_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return a row per run: validation EX before training and at the last validation, compared task by task."""
    rows = []
    for run in runs:
        if not run.validations:
            continue
        first_step, last_step = min(run.validations), max(run.validations)
        before, after = side(run.validations[first_step]), side(run.validations[last_step])
        gain = difference(before.right, after.right)
        rows.append(
            {
                "run": f"`{run.name}`",
                "model": run.model,
                "trained": run.settings,
                "tasks": after.score.n,
                "EX before": f"{before.score.percent:.1f}% ({before.score.interval_text})",
                "EX after": f"{after.score.percent:.1f}% ({after.score.interval_text})",
                "steps": last_step,
                "gain": f"{gain.points:+.1f} ({gain.interval_text})",
                "McNemar p": gain.p_text,
            }
        )
    return pd.DataFrame(rows)


def validation_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return a row per validation: accuracy, also by hardness, and statistics of the loop of check and rewrite."""
    rows = []
    for run in runs:
        for step, records in run.validations.items():
            stats = loop(records)
            row = {"run": f"`{run.name}`", "step": step}
            row["EX"] = f"{side(records).score.percent:.1f}%"
            for level in HARDNESS:
                row[level] = f"{share([r['right'] is True for r in records if r['hardness'] == level]):.0f}"
            row["first → last query"] = f"{stats.first:.1f} → {stats.last:.1f}%, {stats.compared} tasks"
            unknown = f", {stats.unknown} unknown" * (stats.unknown > 0)
            row["fixed / broken"] = f"{stats.fixed} / {stats.spoiled}{unknown}"
            row["rewrites that repeat"] = f"{stats.repeated} of {stats.rewrites}"
            row["check says incorrect"] = f"{stats.said_incorrect:.1f}%"
            row["balanced accuracy"] = f"{stats.balanced:.1f}%"
            row["calls"] = f"{stats.calls:.2f}"
            row["answers cut"] = f"{stats.cut:.1f}%"
            row["last query fails"] = f"{stats.broken:.0f}%"
            rows.append(row)
    return pd.DataFrame(rows)


# ---- time


@dataclass(frozen=True)
class Seconds:
    """Time of a run's steps by part, and the work done in it."""

    steps: int
    median: float
    mean: float
    parts: dict[str, float]
    """Mean seconds of each part, and of the rest."""
    work: dict[str, float]
    """Mean amounts of work per step, by metric."""


def seconds(run: Run) -> Seconds | None:
    """Summarize the steps after the first, and before the last of a finished run, which saves; None without any."""
    steps = [s for s in run.rows if s > 1 and not (run.finished and s == max(run.rows))]
    rows = [run.rows[step] for step in steps if "timing_s/step" in run.rows[step]]
    if not rows:
        return None

    def mean(key: str) -> float:
        return statistics.fmean(row.get(key, 0.0) for row in rows)

    every = [row["timing_s/step"] for row in rows]
    parts = {part: mean(key) for part, key in PARTS.items()}
    parts["rest"] = mean("timing_s/step") - sum(parts.values())
    names = ("rollouts", "rows", "rows_updated", "zero_variance_groups", "truncated_share")
    names += ("prompt_tokens", "response_tokens")
    work = {name: mean(f"sqlbench/{name}") for name in names}
    work["gigabytes"] = max(row.get("actor/perf/max_memory_allocated_gb", 0.0) for row in rows)
    return Seconds(len(rows), statistics.median(every), statistics.fmean(every), parts, work)


def time_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return a row per run: seconds per step by part, and the work that was done in them."""
    rows = []
    for run in runs:
        timing = seconds(run)
        if timing is None:
            continue
        work = timing.work
        row: dict[str, Any] = {"run": f"`{run.name}`", "batch": run.batch, "steps": timing.steps}
        row |= {"a step, s (median)": f"{timing.median:.1f}", "mean": f"{timing.mean:.1f}"}
        row |= {part: f"{value:.1f}" for part, value in timing.parts.items()}
        row["rollouts"] = f"{work['rollouts']:.0f}"
        row["rows updated"] = f"{work['rows_updated']:.0f} of {work['rows']:.0f}"
        row["groups without variance"] = f"{100 * work['zero_variance_groups']:.0f}%"
        row["answers cut"] = f"{100 * work['truncated_share']:.1f}%"
        row["tokens, prompt + response"] = f"{work['prompt_tokens']:.0f} + {work['response_tokens']:.0f}"
        row["trainer, GB"] = f"{work['gigabytes']:.1f}"
        rows.append(row)
    return pd.DataFrame(rows)


# ---- figure


def figure(runs: Sequence[Run]) -> Figure:
    """Draw validation EX with intervals, the same by hardness, the loop's statistics, and seconds per step."""
    validated, timed = [run for run in runs if run.validations], [run for run in runs if seconds(run)]
    with plt.rc_context(STYLE):
        drawn, ((ex, hardness), (repeats, time)) = plt.subplots(2, 2, figsize=(9.9, 6.6), layout="constrained")
        for number, run in enumerate(validated):
            steps, scores = list(run.validations), [side(records).score for records in run.validations.values()]
            loops = [loop(records) for records in run.validations.values()]
            colour, dash, marker = (kind[number % len(kind)] for kind in (COLOURS, DASHES, MARKERS))
            values = [s.percent for s in scores]
            spread = [[s.percent - s.interval[0] for s in scores], [s.interval[1] - s.percent for s in scores]]
            look = {"color": colour, "linestyle": dash, "marker": marker, "markersize": 4}
            ex.errorbar(steps, values, yerr=spread, capsize=3, label=run.name, **look)
            again = [100 * one.repeated / one.rewrites if one.rewrites else float("nan") for one in loops]
            repeats.plot(steps, again, label=f"{run.name}: rewrites that repeat", **look)
            faint = {**look, "alpha": 0.5, "linewidth": 1.0, "markerfacecolor": "white"}
            repeats.plot(steps, [one.said_incorrect for one in loops], label="checks that say incorrect", **faint)
            for level, shade in zip(HARDNESS, COLOURS, strict=False):
                cells = [
                    share([r["right"] is True for r in v if r["hardness"] == level]) for v in run.validations.values()
                ]
                hardness.plot(steps, cells, label=None if number else level, **{**look, "color": shade})
        bottoms = [0.0] * len(timed)
        for part, shade in zip([*PARTS, "rest"], ("#56B4E9", "#CC79A7", "#E69F00", "#BBBBBB"), strict=True):
            values = [timing.parts[part] for run in timed if (timing := seconds(run))]
            time.barh(range(len(timed)), values, left=bottoms, label=part, color=shade, edgecolor="white", height=0.6)
            bottoms = [a + b for a, b in zip(bottoms, values, strict=True)]
        for number, total in enumerate(bottoms):
            time.text(total, number, f" {total:.1f} s", va="center", fontsize=8)
        time.set_yticks(range(len(timed)), [run.name for run in timed])
        time.invert_yaxis()
        time.set_xlim(0, 1.15 * max(bottoms, default=1.0))
        time.set_xlabel("seconds per step (mean), validation left out")
        for axis, title in (
            (ex, "Validation EX, greedy, with 95% intervals (%)"),
            (hardness, "The same by hardness (%)"),
        ):
            axis.set_title(title, loc="left")
            axis.set_xlabel("step")
        hardness.set_ylim(0, 100)
        repeats.set(xlabel="step", ylim=(0, 103))
        repeats.set_title("Rewrites that repeat, checks that say incorrect (%)", loc="left")
        time.set_title("Where a step's time goes", loc="left")
        for axis, place in ((ex, "lower right"), (hardness, "upper right"), (repeats, "lower left"), (time, "best")):
            if not axis.has_data():
                continue
            axis.legend(fontsize=7, loc=place, ncols=len(HARDNESS) if axis is hardness else 1)
        plt.close(drawn)
    return drawn


# ---- output


def fill(text: str, tables: dict[str, str]) -> str:
    """Replace the tables of a page between their marks."""
    for name, table in tables.items():
        pattern = rf"(<!-- table:{name} -->\n).*?(<!-- /table:{name} -->)"
        text = re.sub(pattern, lambda found, table=table: found[1] + table + found[2], text, flags=re.DOTALL)
    return text


def tables_of(runs: Sequence[Run]) -> dict[str, str]:
    """Return all tables as Markdown, by name."""
    builders = {"gpu-accuracy": accuracy_table, "gpu-validation": validation_table, "gpu-time": time_table}
    return {name: markdown(table(runs)) for name, table in builders.items()}


def main() -> None:
    """Write the tables and the figure, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("results/gpu"))
    parser.add_argument("--page", type=Path, default=Path("docs/gpu.md"), help="a further page with the same marks")
    options = parser.parse_args()
    runs = read_runs(options.folder)
    if not runs:
        parser.error(f"no run below {options.folder}; make one with compact_run.py")
    tables = tables_of(runs)
    for page in (options.folder / "README.md", options.page):
        if page.is_file():
            page.write_text(fill(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
    (options.folder / "gpu.png").write_bytes(png(figure(runs), dpi=110))
    print("\n".join(tables.values()))


if __name__ == "__main__":
    main()
