"""Rollouts of runs for the views: the light fields of all in one pass, and whole rollouts one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sqlbench.agent.trajectory import Trajectory
from sqlbench.errors import DataError
from sqlbench.models import policy_folder
from sqlbench.runs import CONFIG, TRAJECTORIES, RunFolder
from sqlbench_lab import view

Source = Path | str | Mapping[str, Path | str] | Iterable[Trajectory]


class _Answer(BaseModel):
    text: str


class _Call(BaseModel):
    agent: str
    turn: int
    completion: _Answer


class _Skipped(BaseModel):
    pass


class _Light(Trajectory):
    """The fields of a trajectory that the list needs; parsing is many times faster without the others."""

    model_config = ConfigDict(extra="ignore")
    transitions: list[_Call] = Field([])  # type: ignore[assignment]
    executions: list[_Skipped] = Field([])  # type: ignore[assignment]

    def row(self, label: str, where: Any) -> dict[str, Any]:
        """Return the rollout as a row of `rollout_table`."""
        answers = [call.completion.text for call in self.transitions]
        searched = [self.question, self.gold, self.pred, self.task_id, self.db_id, self.reason, self.error, *answers]
        return {
            "run": label,
            "step": self.step,
            "part": "" if self.step is None else "validation" if self.validation else "training",
            "sample": self.sample,
            "outcome": view.outcome(self.correct, self.error),
            "correct": self.correct,
            "hardness": self.hardness,
            "database": self.db_id,
            "turns": self.turns,
            "reward": self.reward,
            "question": self.question,
            "reason": self.reason,
            "pred": self.pred or "",
            "task": self.task_id,
            "key": self.task_key,
            "split": self.split,
            "text": "\n".join(filter(None, searched)).lower(),
            "where": where,
        }


def rollout_table(source: Source) -> pd.DataFrame:
    """Tabulate the light fields of rollouts in a run folder, several by label, or trajectories; one row each, in order.

    Raises:
        DataError: there are no rollouts, or a line is not a rollout.
    """
    if isinstance(source, str | Path):
        source = {"": source}
    if isinstance(source, Mapping):
        rows = [row for label, folder in source.items() for row in _rows(Path(folder), label)]
    else:
        rows = [_Light.model_validate(t, from_attributes=True).row("", t) for t in source]
    if not rows:
        raise DataError("No rollouts to inspect. Give the folder of an evaluation or a training.")
    return (
        pd.DataFrame(rows)
        .astype({"step": "Int64", "correct": float})
        .sort_values(["step", "part", "task", "key", "sample"], na_position="first", kind="stable", ignore_index=True)
    )


def _rows(folder: Path, label: str) -> Iterator[dict[str, Any]]:
    path, offset = folder / TRAJECTORIES, 0
    if not path.is_file() or not path.stat().st_size:
        raise DataError(f"No rollouts in {folder}: {TRAJECTORIES} is missing. Evaluate or train into it first.")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):  # still being written
                return
            try:
                yield _Light.model_validate_json(line).row(label, (path, offset, len(line)))
            except ValidationError as error:
                raise DataError(f"{path}, line {number}, is not a trajectory: {error.errors()[0]['msg']}") from error
            offset += len(line)


def read_rollout(row: pd.Series) -> Trajectory:
    """Read the whole rollout of a row of `rollout_table`.

    Raises:
        DataError: its file was rewritten since the table was made.
    """
    if isinstance(row["where"], Trajectory):
        return row["where"]
    path, offset, size = row["where"]
    with path.open("rb") as file:
        file.seek(offset)
        line = file.read(size)
    try:
        if _Light.model_validate_json(line).row(row["run"], None)["text"] == row["text"]:
            return Trajectory.model_validate_json(line)
    except ValidationError:
        pass
    raise DataError(f"{path} was rewritten since it was opened; open it again")


@dataclass(frozen=True)
class RunFacts:
    """Facts about a run besides its rollouts."""

    data: Path | None = None
    tokenizer: Path | None = None
    strict: bool = True
    by_std: bool | None = None
    """Division of GRPO's advantages by the standard deviation of the group; None if advantages are unknown."""

    @classmethod
    def of(cls, folder: Path) -> RunFacts:
        """Read the facts from the run's config, if there is one.

        Raises:
            DataError: the config is damaged, or not that of a run.
        """
        if not (folder / CONFIG).is_file():
            return cls()
        try:
            return cls._of(folder, RunFolder(folder).config())
        except (KeyError, TypeError) as error:
            raise DataError(f"{folder / CONFIG} is not the config of a run ({error!r}). Move it away.") from error

    @classmethod
    def _of(cls, folder: Path, config: dict[str, Any]) -> RunFacts:
        if config.get("kind") != "training":
            return cls(Path(config["data"]), _tokenizer(folder, config["model"]), config["rollout"]["strict"])
        ours, algorithm = config["config"]["sqlbench"], config["config"]["algorithm"]
        control = ours.get("control") or ours.get("random_reward")  # the older name
        grouped = algorithm["adv_estimator"] == "grpo" and not control and ours.get("credit", "rollout") == "rollout"
        by_std = bool(algorithm["norm_adv_by_std_in_grpo"]) if grouped else None
        return cls(Path(ours["data"]), _tokenizer(folder, ours["model"]), True, by_std)


def _tokenizer(run: Path, model: str) -> Path | None:
    folders = [policy_folder(model)] if model == "nano" else [run / "policy", Path(model) / "policy", Path(model)]
    return next((f / "tokenizer.json" for f in folders if (f / "tokenizer.json").is_file()), None)


def advantages(rewards: list[float], by_std: bool) -> list[float]:
    """Compute GRPO's advantages in one group; they are 0 in a group of one or without variance."""
    if len(rewards) < 2:
        return [0.0] * len(rewards)
    scale = stdev(rewards) + 1e-6 if by_std else 1.0
    return [(reward - mean(rewards)) / scale for reward in rewards]
