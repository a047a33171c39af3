"""Views of data, rollouts and runs for the notebooks, as values that Jupyter and GitHub both render.

Tables are made from summaries and audits, stories from trajectories; no result is computed here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd
from IPython.display import Markdown

from sqlbench.agent.trajectory import Execution, Trajectory
from sqlbench.clauses import HARDNESS
from sqlbench.data.audit import audit_dataset, read_audit
from sqlbench.data.tasks import DataSet, Task
from sqlbench.results import Rollouts, Score, Summary, in_order

SHOWN_ROWS = 3


def open_project() -> Path:
    """Make the project folder the working directory, wherever the notebook was opened, and return it."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "pyproject.toml").is_file():
            os.chdir(folder)
            break
    pd.set_option("display.max_colwidth", None, "display.max_rows", 200)
    return Path.cwd()


def ensure_data(data: Path | str, source: str = "pocket") -> DataSet:
    """Open the data set in a folder; make and audit it first if it is missing.

    Args:
        data: its folder.
        source: ``pocket``, ``download`` for the public Spider archive, or the path of a Spider release.
    """
    root = Path(data)
    if not (root / "dataset.json").is_file():
        if source == "pocket":
            from pocket.dataset import write_pocket

            write_pocket(root)
        else:
            from sqlbench_data.imports import import_release
            from sqlbench_data.spider import download_spider

            import_release("spider", download_spider(root.parent) if source == "download" else source, root)
    if not (root / "audit.json").is_file():
        audit_dataset(root)
    return DataSet(root)


def audit_table(data: Path | str) -> pd.DataFrame:
    """Tabulate the gold audit, one row per split, with the score of one constant query."""
    splits = read_audit(data).splits
    levels = in_order({level for split in splits.values() for level in split.hardness})
    return pd.DataFrame(
        {
            "split": name,
            "tasks": split.tasks,
            "scorable": split.scorable,
            "excluded": ", ".join(f"{count} {reason}" for reason, count in split.excluded.items()) or "none",
            "gold without rows": split.zero_rows,
            "same result after a mutation": split.unchanged,
            "needs order": split.needs_order,
            **{level: split.hardness.get(level, 0) for level in (HARDNESS if {*levels} <= {*HARDNESS} else levels)},
            "constant query (%)": round(100 * max(split.constant_floor.values(), default=0.0), 1),
        }
        for name, split in splits.items()
    )


def task_frame(tasks: Iterable[Task]) -> pd.DataFrame:
    """Tabulate tasks."""
    return pd.DataFrame([task.model_dump() for task in tasks], columns=list(Task.model_fields))


def score_table(scores: Mapping[str, Score], name: str) -> pd.DataFrame:
    """Tabulate accuracies with their intervals, in percent."""
    rows = [
        {name: key, "tasks": s.n, "EX (%)": s.percent, "95% CI": s.interval_text} for key, s in scores.items() if s.n
    ]
    return pd.DataFrame(rows, columns=[name, "tasks", "EX (%)", "95% CI"]).round(1)


def metric_table(summary: Summary) -> pd.DataFrame:
    """Tabulate execution accuracy and the further scores of an evaluation by hardness, in percent."""
    levels = {"all": summary.score} | summary.by_hardness
    rows = [
        {"hardness": level, "tasks": score.n, "EX": score.percent}
        | {name: 100 * values.get(level, math.nan) for name, values in summary.metrics.items()}
        for level, score in levels.items()
    ]
    return pd.DataFrame(rows).round(1)


def sample_table(summaries: Mapping[str, Summary]) -> pd.DataFrame:
    """Tabulate the estimates from several rollouts per task after each turn, in percent, and their model calls.

    Args:
        summaries: evaluations by name; those with one rollout per task are left out.
    """
    rows = []
    for name, summary in summaries.items():
        for turn, estimates in enumerate(summary.samples.by_turn if summary.samples else (), 1):
            shown = {k: f"{100 * e.value:.1f} ({100 * e.low:.1f} to {100 * e.high:.1f})" for k, e in estimates.items()}
            rows.append({"run": name, "turn": turn} | shown)
        if summary.samples and summary.transitions is not None:  # the answers are those after the last turn
            rows[-1]["calls per task"] = round(summary.samples.n * summary.transitions, 1)
    return pd.DataFrame(rows).fillna("")


def error_table(summary: Summary) -> pd.DataFrame:
    """Tabulate why rollouts scored nothing, and which executed statements failed."""
    rows = [("verdict", k, n) for k, n in summary.reasons.items()]
    rows += [("failed statement", k, n) for k, n in summary.query_errors.items()]
    rows += [("failed rollout", k, n) for k, n in summary.failures.items()]
    return pd.DataFrame(rows, columns=["what", "class", "count"])


def flips(before: Iterable[Trajectory], after: Iterable[Trajectory]) -> pd.DataFrame:
    """Tabulate the tasks whose verdict changed between two evaluations, gained ones first."""
    old, new = (Rollouts.of(side).rollouts.set_index(["task", "sample"]) for side in (before, after))
    both = new.join(old[["correct", "pred"]], rsuffix=" before", how="inner").rename(columns={"pred before": "before"})
    change = (both["correct"] - both["correct before"]).map({1.0: "gained", -1.0: "lost"})
    changed = both.assign(change=change, after=both["pred"])[change.notna()]
    columns = ["change", "hardness", "question", "before", "after", "gold"]
    return changed[columns].sort_values(["change", "question"], ignore_index=True)


def story(trajectory: Trajectory) -> Markdown:
    """Tell one rollout step by step: the answers of the sub-agents and of the database."""
    verdict = {None: "could not be scored", False: "wrong", True: "right"}[trajectory.correct]
    if trajectory.match is not None:
        verdict += f", reward {trajectory.reward:g}"
    if trajectory.failed:
        verdict = f"failed: {trajectory.error}"
    lines = [f"**{trajectory.question}** ({trajectory.db_id}, {trajectory.hardness or 'no hardness'}): {verdict}", ""]
    executions = {e.turn: e for e in trajectory.executions}
    for transition in trajectory.transitions:
        lines.append(f"{len(lines) - 1}. *{transition.agent}*: `{_one_line(transition.completion.text)}`")
        if transition.agent != "check" and transition.turn in executions:
            lines[-1] += f"  \n   *database*: {_result(executions[transition.turn])}"
    return Markdown("\n".join([*lines, "", f"gold: `{_one_line(trajectory.gold)}`"]))


def _result(execution: Execution) -> str:
    if execution.status != "ok":
        return f"{execution.status}: {_one_line(execution.error or '')}"
    rows = "; ".join(str(tuple(row)) for row in execution.rows[:SHOWN_ROWS])
    more = " ..." if execution.n_rows > SHOWN_ROWS else ""
    return f"{execution.n_rows} row{'s' * (execution.n_rows != 1)}" + (f": `{_one_line(rows)}{more}`" if rows else "")


def _one_line(text: str) -> str:
    return " ".join(text.replace("`", "'").split())
