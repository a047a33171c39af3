"""Views of data, rollouts and runs for the notebooks, as values that Jupyter and GitHub both render.

Tables come from summaries and audits, stories from trajectories; no result is computed here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd
from IPython.display import HTML, Markdown

from sqlbench.agent.trajectory import Execution, Trajectory
from sqlbench.clauses import HARDNESS
from sqlbench.data.audit import audit_dataset, read_audit
from sqlbench.data.tasks import DataSet, Task
from sqlbench.results import Rollouts, Score, Summary, in_order
from sqlbench.runs import RunFolder, flat
from sqlbench_lab import view
from sqlbench_lab.rollouts import RunFacts, advantages, rollout_table

SHOWN_ROWS = 3
SQL = {"gold", "pred", "predicted", "before", "after", "query"}
"""Columns that hold SQL."""
SETTINGS = {
    "group size": "actor_rollout_ref.rollout.n",
    "tasks per step": "data.train_batch_size",
    "sampling of tasks": "sqlbench.sampling",
    "tasks per optimizer step": "actor_rollout_ref.actor.ppo_mini_batch_size",
    "steps": "trainer.total_training_steps",
    "learning rate": "actor_rollout_ref.actor.optim.lr",
    "clip, lower": "actor_rollout_ref.actor.clip_ratio_low",
    "clip, upper": "actor_rollout_ref.actor.clip_ratio_high",
    "KL loss": "actor_rollout_ref.actor.use_kl_loss",
    "sampling temperature": "actor_rollout_ref.rollout.temperature",
    "advantage divided by the deviation": "algorithm.norm_adv_by_std_in_grpo",
    "credit": "sqlbench.credit",
    "maximum turns": "sqlbench.max_turns",
    "context (characters)": "sqlbench.table_info_truncate",
}
"""Configuration keys of the training settings that decide what is learned, by displayed name."""


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
        data: data set folder.
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
        if summary.samples and summary.transitions is not None:  # the calls lead to the answers after the last turn
            rows[-1]["calls per task"] = round(summary.samples.n * summary.transitions, 1)
    return pd.DataFrame(rows).fillna("")


def error_table(summary: Summary) -> pd.DataFrame:
    """Tabulate the reasons for zero scores, the failed statements and the failed rollouts, by class."""
    rows = [("verdict", k, n) for k, n in summary.reasons.items()]
    rows += [("failed statement", k, n) for k, n in summary.query_errors.items()]
    rows += [("failed rollout", k, n) for k, n in summary.failures.items()]
    return pd.DataFrame(rows, columns=["what", "class", "count"])


def flips(before: Iterable[Trajectory], after: Iterable[Trajectory]) -> pd.DataFrame:
    """Tabulate the tasks whose verdict changed between two evaluations, gains first."""
    old, new = (Rollouts.of(side).rollouts.set_index(["task", "sample"]) for side in (before, after))
    both = new.join(old[["correct", "pred"]], rsuffix=" before", how="inner").rename(columns={"pred before": "before"})
    change = (both["correct"] - both["correct before"]).map({1.0: "gained", -1.0: "lost"})
    changed = both.assign(change=change, after=both["pred"])[change.notna()]
    columns = ["change", "hardness", "question", "before", "after", "gold"]
    return changed[columns].sort_values(["change", "question"], ignore_index=True)


def query_table(frame: pd.DataFrame) -> HTML:
    """Show a table with its columns of SQL (`SQL`) left-aligned and coloured, in untrusted notebooks too."""
    columns = frame.columns.tolist()
    rows = [
        ["" if value is None else view.sql_html(value) if name in SQL else value for name, value in row.items()]
        for row in frame.to_dict("records")
    ]
    return HTML(view.page(view.table(columns, rows)))


def training_settings(run: Path | str) -> pd.DataFrame:
    """Tabulate the `SETTINGS` in the configuration of a training."""
    config = flat(RunFolder(run).config()["config"])
    rows = [(name, str(config.get(key, "not recorded")), key) for name, key in SETTINGS.items()]
    return pd.DataFrame(rows, columns=["setting", "value", "key"])


def advantage_example(run: Path | str) -> pd.DataFrame:
    """Compute the advantages of a training's first group with unequal rewards, one row per rollout.

    Empty if no group has unequal rewards, or if this training does not compare the rollouts of a group.
    """
    by_std = RunFacts.of(Path(run)).by_std
    frame = rollout_table(run)
    frame = frame[(frame["part"] == "training") & frame["reward"].notna()]
    groups = (group for _, group in frame.groupby(["step", "key"], sort=True) if group["reward"].nunique() > 1)
    group = next(groups, None)
    columns = ["step", "rollout", "question", "predicted", "reward", "group mean", "group deviation", "advantage"]
    if group is None or by_std is None:
        return pd.DataFrame(columns=columns)
    rewards = group["reward"]
    values = (
        group["step"],
        group["sample"],
        group["question"],
        group["pred"],
        rewards,
        round(rewards.mean(), 3),
        round(rewards.std(), 3) if by_std else "not used",
        [round(a, 2) for a in advantages(rewards.tolist(), by_std)],
    )
    return pd.DataFrame(dict(zip(columns, values, strict=True))).reset_index(drop=True)


def found(*sentences: str) -> Markdown:
    """Format the findings that close a notebook."""
    return Markdown("\n\n".join(["**Found.**", *sentences]))


def baseline_found(summary: Summary, causes: pd.DataFrame) -> Markdown:
    """Summarize an evaluation: accuracy, the hardest and the easiest level, and the main cause of wrong answers."""
    sentences = [
        f"The agent answers {summary.score.percent:.1f}% of {summary.score.n} tasks ({summary.score.interval_text})."
    ]
    if len(levels := sorted(summary.by_hardness, key=lambda level: summary.by_hardness[level].percent)) > 1:
        low, high = (f"{summary.by_hardness[k].percent:.1f}% on {k}" for k in (levels[0], levels[-1]))
        sentences.append(f"By hardness it is least accurate with {low} and most accurate with {high} tasks.")
    if len(causes):
        first, total = causes.iloc[0], causes["rollouts"].sum()
        ran = total - causes.loc[causes["cause"].str.startswith("did not run"), "rollouts"].sum()
        sentences.append(
            f"Of {total} wrong queries {ran} ran. The most frequent cause is '{first['cause']}' ({first['rollouts']})."
        )
    return found(" ".join(sentences))


def audit_found(audit: pd.DataFrame) -> Markdown:
    """Summarize `audit_table`: the number of reliable gold queries, and the score of a constant query."""
    tasks, scorable, floor = audit["tasks"].sum(), audit["scorable"].sum(), audit["constant query (%)"].max()
    return found(
        f"{scorable} of {tasks} tasks (a task counts in each of its splits) have a gold query that gives a verdict. "
        f"A constant query scores at most {floor}% of a split; any accuracy has to be read against that."
    )


def clause_table(summary: Summary) -> pd.DataFrame:
    """Tabulate the share of predictions that equal gold in each clause, the lowest first."""
    return pd.DataFrame(
        sorted(((name, round(share, 3)) for name, share in summary.components.items()), key=lambda row: row[1]),
        columns=["clause", "equal to gold (share)"],
    )


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
        text = _one_line(transition.completion.text)
        if transition.agent == "check":
            lines.append(f"{len(lines) - 1}. *check*: `{text}`")
            continue
        lines.append(f"{len(lines) - 1}. *{transition.agent}*:\n\n    ```sql\n    {text}\n    ```")
        if transition.turn in executions:
            lines[-1] += f"\n\n    *database*: {_result(executions[transition.turn])}"
    return Markdown("\n".join([*lines, "", f"gold: `{_one_line(trajectory.gold)}`"]))


def _result(execution: Execution) -> str:
    if execution.status != "ok":
        return f"{execution.status}: {_one_line(execution.error or '')}"
    rows = "; ".join(str(tuple(row)) for row in execution.rows[:SHOWN_ROWS])
    more = " ..." if execution.n_rows > SHOWN_ROWS else ""
    return f"{execution.n_rows} row{'s' * (execution.n_rows != 1)}" + (f": `{_one_line(rows)}{more}`" if rows else "")


def _one_line(text: str) -> str:
    return " ".join(text.replace("`", "'").split())
