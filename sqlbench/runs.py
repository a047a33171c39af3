"""Run folders: one process at a time writes a folder, in whole lines only, and any run can be resumed.

The files are ``config.json`` (all settings), ``trajectories.jsonl`` (one rollout per line), ``metrics.jsonl`` (one step
per line) and ``summary.json`` (present when the run is finished). Lines are flushed, not synced: after a crash of the
machine the end of a file may be missing. Every reader, and the next writer, drops a line that was torn by a kill or a
full disk. The locks are the operating system's, so they end with their process; they do not hold across machines that
share a network drive.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ValidationError

from sqlbench.agent.trajectory import Trajectory
from sqlbench.config import CUT
from sqlbench.errors import DataError, RunError

CONFIG, TRAJECTORIES, METRICS, SUMMARY = "config.json", "trajectories.jsonl", "metrics.jsonl", "summary.json"
_MADE = ("checkpoints", "policy", "logs", "tensorboard", "wandb", "mlflow.db", "gepa", "prompts.toml")
PARTS = (SUMMARY, *_MADE, TRAJECTORIES, METRICS, CONFIG)
"""Files and folders that a run leaves behind, in the order of removal: a kill in between leaves an unfinished run,
never the checkpoints of another."""


class RunFolder:
    """A run folder; reading needs nothing, writing needs `open`."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._lock: IO[str] | None = None

    @property
    def finished(self) -> bool:
        """Tell whether the run has its summary."""
        return (self.root / SUMMARY).is_file()

    def config(self) -> dict[str, Any]:
        """Read the settings of the run.

        Raises:
            DataError: this is not a run folder.
        """
        return _read_json(self.root / CONFIG)

    def summary(self) -> dict[str, Any]:
        """Read the summary of a finished run.

        Raises:
            DataError: the run is not finished, or this is not a run folder.
        """
        return _read_json(self.root / SUMMARY)

    def trajectories(self) -> Iterator[Trajectory]:
        """Read all rollouts written so far."""
        return read_trajectories(self.root / TRAJECTORIES)

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Read all metric lines written so far."""
        return read_jsonl(self.root / METRICS)

    def open(self, config: BaseModel | dict[str, Any], *, overwrite: bool = False) -> RunFolder:
        """Lock the folder for writing, as a new run or as the continuation of one with the same config.

        Use the result as a context manager, or call `close`.

        Raises:
            RunError: it cannot be written, another process writes it, it is finished without a failed rollout (and
                `overwrite` is not set), or it was started with another config.
        """
        wanted = json.loads(_dump(config))
        self._lock = lock(self.root)
        try:
            self._claim(wanted, overwrite)
        except BaseException:
            self.close()
            raise
        return self

    def _claim(self, wanted: dict[str, Any], overwrite: bool) -> None:
        if overwrite:
            self._discard()
        elif self.finished and not self.summary().get("failed"):
            raise RunError(f"Run is already finished: {self.root}. Choose another --run, or pass --overwrite.")
        elif (self.root / CONFIG).is_file() and (difference := differences(*map(_completed, (self.config(), wanted)))):
            raise RunError(
                f"Run was started with other settings: {self.root} ({'; '.join(difference[:5])}). "
                "Choose another --run, or pass --overwrite."
            )
        try:
            (self.root / SUMMARY).unlink(missing_ok=True)
            for name in (TRAJECTORIES, METRICS):
                if (self.root / name).is_file():
                    with open(self.root / name, "r+b") as file:
                        _drop_torn_line(file)
        except OSError as error:
            raise _cannot_write(self.root, error) from error
        write_whole(self.root / CONFIG, [json.dumps(wanted, indent=2, ensure_ascii=False) + "\n"])

    def _discard(self) -> None:
        try:
            for path in (self.root / name for name in PARTS):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_write(self.root, error) from error

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, name: str, record: BaseModel | dict[str, Any]) -> None:
        """Append one line to ``trajectories.jsonl`` or ``metrics.jsonl``."""
        append_line(self.root / name, record)

    def rewrite(self, name: str, records: Iterable[BaseModel | dict[str, Any]]) -> None:
        """Replace a file of lines in one step."""
        write_whole(self.root / name, (_dump(record) + "\n" for record in records))

    def finish(self, summary: BaseModel | dict[str, Any]) -> None:
        """Write the summary, which marks the run as finished."""
        write_whole(self.root / SUMMARY, [json.dumps(json.loads(_dump(summary)), indent=2, ensure_ascii=False) + "\n"])


def lock(folder: Path) -> IO[str]:
    """Lock a folder for writing, creating it if missing; close the result or end the process to release it.

    Raises:
        RunError: it cannot be written, or another process has locked it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise RunError(f"Cannot write the run folder {folder}: {error.strerror}. Choose another.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise RunError(f"Another process is writing the run: {folder}. Wait, or choose another --run.") from error
    return file


def write_whole(path: Path, parts: Iterable[str]) -> None:
    """Replace a file in one move; the old one stays until the new one is complete.

    Raises:
        RunError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(parts)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def append_line(path: Path, record: BaseModel | dict[str, Any]) -> None:
    """Append one line to a file that several processes may append to; a torn line before it is dropped.

    Raises:
        RunError: it cannot be written.
    """
    try:
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            _drop_torn_line(file)
            file.write(_dump(record).encode() + b"\n")
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> RunError:
    return RunError(
        f"Cannot write {path}: {error.strerror}. Free some space or make it writable, then rerun the command; finished "
        "work is kept."
    )


def run_path(results: str | Path, profile: str, run: str) -> Path:
    """Return ``<results>/<profile>/<run>``; the name of a run may have several parts below its profile.

    Raises:
        RunError: the name is not valid.
    """
    for what, name in (("profile", profile), ("run", run)):
        if not name.strip() or not Path(name).parts or Path(name).is_absolute() or ".." in Path(name).parts:
            raise RunError(f"Invalid {what} name: {name!r}. Use letters, digits, '-' and '_'.")
    return Path(results) / profile / run


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Read the lines of a file without a torn last one; a missing file has none.

    Raises:
        DataError: a line before the last is not a JSON object.
    """
    for number, line in _lines(path):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"Not JSON: {path}, line {number} ({error}). Remove the line.") from error
        if not isinstance(record, dict):
            raise DataError(f"Not a JSON object: {path}, line {number} ({line[:60]!r}). Remove the line.")
        yield record


def read_trajectories(path: str | Path) -> Iterator[Trajectory]:
    """Read the rollouts of a ``trajectories.jsonl``, or of the run folder that holds one.

    Raises:
        DataError: a line before the last is not a trajectory.
    """
    path = Path(path)
    for number, line in _lines(path / TRAJECTORIES if path.is_dir() else path):
        try:
            yield Trajectory.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise DataError(
                f"Not a trajectory: {path}, line {number} ({where} {first['msg']}). Remove the line."
            ) from error


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Describe every setting in which two configs differ."""
    before, now = flat(old), flat(new)
    return [
        f"{key} was {_short(before.get(key))}, is now {_short(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a tree of settings by their dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}.{key}" if prefix else key).items()}


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """Add the settings that did not exist when an evaluation was stored, with the values in effect then."""
    return config | {"rollout": CUT | config["rollout"]} if "rollout" in config else config


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _dump(record: BaseModel | dict[str, Any]) -> str:
    return record.model_dump_json() if isinstance(record, BaseModel) else json.dumps(record, ensure_ascii=False)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {path}: {error}. Choose another --run, or pass --overwrite.") from error
    return content


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    if not Path(path).is_file():
        return
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            yield number, line


def _drop_torn_line(file: IO[bytes]) -> None:
    end = size = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65536) if end < size else end - 1
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        file.truncate(end)
