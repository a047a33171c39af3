"""Rollouts and runs as plain text, for ``sqlbench runs``, ``show`` and ``compare``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent
from typing import Any

import pandas as pd

from sqlbench.agent.prompts import render_execution
from sqlbench.agent.trajectory import Execution, Trajectory, Transition
from sqlbench.errors import DataError
from sqlbench.results import Rollouts, difference, in_order
from sqlbench.runs import CONFIG, TRAJECTORIES, RunFolder, read_trajectories
from sqlbench.stats import clustered
from sqlbench.usage import Usage
from sqlbench_lab.mistakes import cause_table, mistakes
from sqlbench_lab.settings import CompareConfig, RunsConfig, ShowConfig
from sqlbench_lab.view import outcome, page, table, token_diff

WIDTH = 72
"""Maximum number of characters of a question in a list."""
CHARACTERS = 2000
"""Maximum number of characters of a result."""


class Printer:
    """Prints a rollout as it happens (`sqlbench.rollout.RolloutCallback`)."""

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose

    def text(self, agent: str, turn: int, piece: str) -> None:
        """Print nothing, because `transition` prints the whole answer."""

    def transition(self, transition: Transition) -> None:
        """Print one answer, with its prompt if `verbose`."""
        strategy = f", strategy {transition.strategy}" if transition.strategy else ""
        print(f"\n{transition.agent} (turn {transition.turn}{strategy})")
        if self.verbose:
            for message in transition.messages:
                print(indent(f"[{message.role}]\n{message.content}", "  | "))
        if self.verbose or transition.agent == "check":
            print(indent(transition.completion.text.strip() or "(empty)", "  "), flush=True)

    def execution(self, execution: Execution, execution_text: str) -> None:
        """Print one query and its result."""
        print(indent(f"{execution.sql.strip() or '(no query)'}\n-> {execution_text}", "  "), flush=True)


def runs(settings: RunsConfig) -> pd.DataFrame:
    """List the runs below a folder, the newest or the most accurate first.

    Raises:
        DataError: there are no runs.
    """
    rows = sorted(_runs(settings), key=lambda row: -row.pop("changed"))
    if not rows:
        raise DataError(f"No runs in {settings.results}. Evaluate or train first, or give another --results.")
    if settings.best:
        rows.sort(key=lambda row: -1.0 if row["EX (%)"] == "" else row["EX (%)"], reverse=True)
    return pd.DataFrame(rows)


def _runs(settings: RunsConfig) -> Iterator[dict[str, Any]]:
    for file in settings.results.rglob(CONFIG):
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if not isinstance(config, dict) or settings.kind not in (None, config.get("kind")) or "kind" not in config:
            continue
        name = str(file.parent.relative_to(settings.results))
        if settings.filter not in name:
            continue
        folder = RunFolder(file.parent)
        summary = folder.summary() if folder.finished else {}
        ours = config.get("config", {}).get("sqlbench", config)
        usage = summary.get("usage") or {}
        ex = summary.get("score", {}).get("ex", summary.get("val_ex_last"))
        yield {
            "run": name,
            "kind": config["kind"],
            "model": ours.get("model", ""),
            "data": f"{ours.get('data', '')} {ours.get('split', '')}".strip(),
            "EX (%)": "" if ex is None else round(100 * ex, 1),
            "n": summary.get("score", {}).get("n", ""),
            "p50 (s)": round(rollout["p50"], 2) if (rollout := usage.get("rollout")) else "",
            "cost": "" if (cost := usage.get("calls", {}).get("all", {}).get("cost")) is None else f"{cost:.4g}",
            "state": "finished" if folder.finished else "unfinished",
            "changed": file.stat().st_mtime,
        }


def show(settings: ShowConfig) -> None:
    """Print the rollouts of a run as a list, or those of one task step by step.

    Raises:
        DataError: the run has no rollouts, or none of the task.
    """
    if not (settings.run / TRAJECTORIES).is_file():
        raise DataError(f"No rollouts in {settings.run}. Give the folder of an evaluation or training.")
    if settings.html is not None:
        _write_page(settings, settings.html)
        return
    if settings.wrong and not settings.task:
        _print_mistakes(settings)
        return
    count = 0
    for record in read_trajectories(settings.run):
        if settings.task and settings.task not in (record.task_id, record.task_key):
            continue
        if settings.wrong and record.correct is not False:
            continue
        count += 1
        if settings.task:
            _print_rollout(record, settings.verbose)
        elif count <= settings.limit:
            question = " ".join(record.question.split())[:WIDTH]
            print(f"{outcome(record.correct, record.error):10} {record.task_id:24} {question}")
    if not count:
        raise DataError(f"No such rollout in {settings.run}: {settings.task}. Leave it out for a list.")
    if not settings.task:
        if count > settings.limit:
            print(f"... {count - settings.limit} more (--limit)")
        model = RunFolder(settings.run).config().get("model", "") if (settings.run / CONFIG).is_file() else ""
        print(f"\n{Usage.of(Rollouts.of(read_trajectories(settings.run)), model, settings.prices).text()}")


def _write_page(settings: ShowConfig, file: Path) -> None:
    from sqlbench_lab.inspector import Inspector

    inspector = Inspector(settings.run)
    if settings.task:
        numbers = inspector.rollouts.index[inspector.rollouts["task"] == settings.task]
        if numbers.empty:
            raise DataError(f"No such task in {settings.run}: {settings.task}. Leave it out for a list.")
        inspector.select(int(numbers[0]))
    causes = ""
    if settings.wrong and not settings.task:
        inspector.filter(outcome="wrong")
        rows = cause_table(mistakes(settings.run)).itertuples(index=False)
        cells = [[r.cause, r.rollouts, r.example, *token_diff(r.gold, r.predicted)] for r in rows]
        causes = page(table(["cause", "rollouts", "example", "gold", "predicted"], cells))
    head = f"<!doctype html><meta charset='utf-8'><title>{settings.run.name}</title>"
    file.write_text(f"{head}{causes}{inspector.html()}", encoding="utf-8")
    print(f"wrote {file}")


def _print_mistakes(settings: ShowConfig) -> None:
    frame = mistakes(settings.run)
    print(f"{len(frame)} wrong rollout{'s' * (len(frame) != 1)} by cause")
    for cause, group in frame.groupby("cause", sort=False):
        print(f"\n{len(group):5} {cause}")
        for row in group.head(settings.limit if settings.verbose else 1).itertuples():
            for name, text in ((row.task, row.question), ("gold", row.gold), ("predicted", row.pred or "(none)")):
                print(f"      {name:12} {' '.join(text.split())}")


def _print_rollout(record: Trajectory, verbose: bool) -> None:
    step = "" if record.step is None else f", step {record.step}{' (validation)' if record.validation else ''}"
    verdict = outcome(record.correct, record.error)
    print(f"{record.task_id} on {record.db_id}{step}: {verdict} {record.reason or record.error or ''}")
    print(f"question\n{indent(record.question, '  ')}\ngold\n{indent(record.gold, '  ')}")
    printer, executions = Printer(verbose), list(record.executions)
    for transition in record.transitions:
        printer.transition(transition)
        if transition.agent != "check" and executions and executions[0].turn <= transition.turn:
            printer.execution(executions[0], render_execution(executions.pop(0), "chat", CHARACTERS))
    for execution in executions:  # of an agent that runs its own queries
        printer.execution(execution, render_execution(execution, "chat", CHARACTERS))
    print(f"\nanswer\n{indent(record.pred or '(none)', '  ')}\n")


def compare(settings: CompareConfig) -> None:
    """Print the paired difference of two evaluations, by hardness too, and the tasks whose outcome changed.

    Raises:
        DataError: a run has no rollouts, or the two are not over the same tasks.
    """
    sides = []
    for folder in (settings.first, settings.second):
        frame = Rollouts.of(t for t in read_trajectories(folder) if t.step is None).rollouts
        if frame.empty:
            raise DataError(f"No evaluation in {folder}. Give the folder of one.")
        sides.append(frame)
    first, second = (frame.groupby("task")["correct"].mean() for frame in sides)
    print(f"{settings.first}: {100 * first.mean():.1f}%, {settings.second}: {100 * second.mean():.1f}%")
    print(f"second - first: {difference(first, second)}")
    about = sides[0].drop_duplicates("task").set_index("task")
    change = (second - first).dropna()
    if interval := clustered(change, about.loc[change.index, "db_id"]):
        print("  over databases instead of tasks: {:+.1f} to {:+.1f} points".format(*(100 * end for end in interval)))
    for level in in_order(about["hardness"].unique()):
        keys = about.index[about["hardness"] == level]
        a, b = first.loc[first.index.isin(keys)], second.loc[second.index.isin(keys)]
        print(f"  {level or '-'}: {difference(a, b)}")
    changed = first.index[(first - second).fillna(0) != 0]
    for key in changed[: settings.limit]:
        word = "gained" if second[key] > first[key] else "lost"
        print(f"{word:7} {about.loc[key, 'task_id']:24} {' '.join(about.loc[key, 'question'].split())[:WIDTH]}")
    if len(changed) > settings.limit:
        print(f"... {len(changed) - settings.limit} more (--limit)")
