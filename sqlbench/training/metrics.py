"""What a training run leaves in ``metrics.jsonl``, and how it is made from trajectories.

A line of ``metrics.jsonl`` is ``{"step": n, "data": {name: value}}``, verl's own metrics together with ours
(``sqlbench/...``, listed in `StepRecord.metrics`). Steps never repeat: what a killed attempt logged after its last
checkpoint is replaced by what the resumed attempt logs.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from sqlbench.agent.prompts import parse_verdict
from sqlbench.agent.repair import repeated
from sqlbench.agent.trajectory import OVERLONG, Trajectory
from sqlbench.runs import RunFolder, read_jsonl


class TrajectoryReader:
    """Follows a growing ``trajectories.jsonl``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = path.stat().st_size if path.is_file() else 0
        self._steps: dict[tuple[int, bool], list[Trajectory]] = defaultdict(list)

    def step(self, step: int, validation: bool) -> list[Trajectory]:
        """All rollouts of one step on record so far; those of earlier steps are forgotten."""
        if self.path.is_file():
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._offset += len(whole)
            for line in whole.splitlines():
                record = Trajectory.model_validate_json(line)
                self._steps[record.step or 0, record.validation].append(record)
        for old in [key for key in self._steps if key[0] < step]:
            del self._steps[old]
        return self._steps[step, validation]


class StepRecord:
    """The rollouts of one step, summed up."""

    def __init__(self, records: list[Trajectory]) -> None:
        self.rollouts = len(records)
        self.failed = sum(r.failed for r in records)
        self.overlong = sum(r.reason == OVERLONG for r in records)
        self.error = next((r.error for r in records if r.failed), None)
        self.scored = [r for r in records if r.reward is not None]
        self.judged = [r.correct for r in records if r.correct is not None]
        self.groups = {r.task_key for r in records}

    def metrics(self, prefix: str) -> dict[str, float]:
        """Counts and means, by name.

        Rollouts, failed ones, those with reward 0 because an answer made the next prompt too long, and over the scored
        ones: EX, mean reward, transitions and turns a rollout, prompt and response tokens a transition, share of
        responses cut at the limit, seconds a rollout, share of rewrites that repeat an earlier query, answers that were
        sampled at another temperature and so not trained on, and, where queries were judged one by one, the balanced
        accuracy of the check.
        """
        transitions = [t.completion for r in self.scored for t in r.transitions]
        values = {
            "rollouts": self.rollouts,
            "failed_rollouts": self.failed,
            "overlong_rollouts": self.overlong,
            "ex": _mean(self.judged),
            "reward": _mean([r.reward for r in self.scored]),
            "all_transitions": _mean([len(r.transitions) for r in self.scored]),
            "turns": _mean([r.turns for r in self.scored]),
            "prompt_tokens": _mean([t.prompt_tokens for t in transitions]),
            "response_tokens": _mean([t.response_tokens for t in transitions]),
            "truncated_share": _mean([t.finish_reason == "length" for t in transitions]),
            "rollout_seconds": _mean([r.seconds for r in self.scored]),
            "repeated_share": _mean(self._repeated()),
            "other_temperature": sum(t.temperature is not None for t in transitions),
            "check_balanced_accuracy": self._balanced_accuracy(),
        }
        return {prefix + name: value for name, value in values.items() if value is not None}

    def _repeated(self) -> list[bool]:
        return [
            same
            for record in self.scored
            for t, same in zip(record.transitions, repeated(record.transitions, record.executions), strict=True)
            if t.agent == "rewrite"
        ]

    def _balanced_accuracy(self) -> float | None:
        """The mean of the check's accuracies on right and on wrong queries; None unless it saw both."""
        kinds: dict[bool, list[bool]] = {True: [], False: []}
        for record in self.scored:
            right = {e.turn: e.match == 1 for e in record.executions if e.match is not None}
            for t in record.transitions:
                if t.agent == "check" and t.turn in right:
                    kinds[right[t.turn]].append(parse_verdict(t.completion.text) == right[t.turn])
        return _mean([_mean(kind) for kind in kinds.values()]) if all(kinds.values()) else None


def _mean(values: list[Any]) -> float | None:
    return float(sum(values) / len(values)) if values else None


def read_rows(path: Path) -> dict[int, dict[str, float]]:
    """Metrics by step; of a step that was logged twice the later values win, and a torn last line is dropped.

    Raises:
        DataError: a line before the last is no JSON object.
    """
    rows: dict[int, dict[str, float]] = {}
    for record in read_jsonl(path):
        rows.setdefault(record["step"], {}).update(record["data"])
    return rows


def write_rows(path: Path, rows: dict[int, dict[str, float]]) -> None:
    """Replace a metrics file in one move.

    Raises:
        RunError: it cannot be written.
    """
    RunFolder(path.parent).rewrite(path.name, [{"step": step, "data": rows[step]} for step in sorted(rows)])
