"""The metrics of a training run in ``metrics.jsonl``, computed from trajectories.

A line of ``metrics.jsonl`` is ``{"step": n, "data": {name: value}}``, verl's own metrics together with ours
(``sqlbench/...``, listed in `step_metrics`). Steps never repeat: the resumed attempt replaces the lines that a killed
attempt logged after its last checkpoint.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from sqlbench.agent.trajectory import OVERLONG, Trajectory
from sqlbench.results import Rollouts, balanced_accuracy, mean
from sqlbench.runs import RunFolder, read_jsonl


class TrajectoryReader:
    """Follows a growing ``trajectories.jsonl``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = path.stat().st_size if path.is_file() else 0
        self._steps: dict[tuple[int, bool], list[Trajectory]] = defaultdict(list)

    def step(self, step: int, validation: bool) -> list[Trajectory]:
        """Return all rollouts of one step on record so far, and forget those of earlier steps."""
        if self.path.is_file():
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
            chunk = data[: data.rfind(b"\n") + 1]
            self._offset += len(chunk)
            for line in chunk.splitlines():
                record = Trajectory.model_validate_json(line)
                self._steps[record.step or 0, record.validation].append(record)
        for old in [key for key in self._steps if key[0] < step]:
            del self._steps[old]
        return self._steps[step, validation]


def step_metrics(rollouts: Iterable[Trajectory], prefix: str) -> dict[str, float]:
    """Summarize the rollouts of one step: counts and means, by name.

    Over all rollouts: their number, failed ones, and those with reward 0 because an answer made the next prompt too
    long. Over the scored ones: EX, mean reward, transitions and turns per rollout, prompt and response tokens per
    transition, share of responses cut at the limit, seconds per rollout, share of rewrites that repeat an earlier
    query, answers sampled at another temperature and so not trained on, and, where queries were judged one by one,
    the balanced accuracy of the check.
    """
    frame, calls, queries = Rollouts.of(rollouts)
    scored = frame[frame["reward"].notna()]
    calls = calls[calls["rollout"].isin(scored.index)]
    checks = calls[calls["agent"] == "check"].merge(queries.dropna(subset="match"), on=["rollout", "turn"])
    values = {
        "rollouts": len(frame),
        "failed_rollouts": int(frame["failed"].sum()),
        "overlong_rollouts": int((frame["reason"] == OVERLONG).sum()),
        "ex": mean(frame["correct"]),
        "reward": mean(scored["reward"]),
        "all_transitions": len(calls) / len(scored) if len(scored) else None,
        "turns": mean(scored["turns"]),
        "prompt_tokens": mean(calls["prompt"]),
        "response_tokens": mean(calls["response"]),
        "truncated_share": mean(calls["cut"]),
        "rollout_seconds": mean(scored["seconds"]),
        "repeated_share": mean(calls.loc[calls["agent"] == "rewrite", "repeats"]),
        "other_temperature": int(calls["temperature"].count()),
        "check_balanced_accuracy": balanced_accuracy(checks["says"], checks["match"] == 1),
    }
    return {prefix + name: value for name, value in values.items() if value is not None}


def read_rows(path: Path) -> dict[int, dict[str, float]]:
    """Read the metrics by step; the later values of a step win, and a torn last line is dropped.

    Raises:
        DataError: a line before the last is not a JSON object.
    """
    rows: dict[int, dict[str, float]] = {}
    for record in read_jsonl(path):
        rows.setdefault(record["step"], {}).update(record["data"])
    return rows


def write_rows(path: Path, rows: dict[int, dict[str, float]]) -> None:
    """Replace a metrics file atomically.

    Raises:
        RunError: the file cannot be written.
    """
    RunFolder(path.parent).rewrite(path.name, [{"step": step, "data": rows[step]} for step in sorted(rows)])
