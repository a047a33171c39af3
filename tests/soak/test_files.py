"""Full and read-only disks, torn lines, old settings, lost databases, two writers: one clear line, and nothing is lost.

Each test takes the cause away again: the same command then ends with the results of an undisturbed run. The disks are
real ones in memory, which takes the right to mount.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sqlbench.data.tasks import DataSet
from sqlbench.runs import RunFolder, read_trajectories

from .test_kill import CASES

if TYPE_CHECKING:
    from .conftest import Figures, Stage

RUN = "run"
SHORT = ["eval", "train"]


class Disk:
    """The results folder of a stage as a disk of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        made = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"no disk can be mounted here: {made.stderr.strip()}")

    def become(self, options: str) -> None:
        """Change the size, or whether it can be written."""
        subprocess.run(["mount", "-o", f"remount,{options}", self.folder], check=True)


@pytest.fixture
def disk(stage: Stage) -> Iterator[Disk]:
    disk = Disk(stage.results)
    yield disk
    for process in stage.processes():
        process.kill()
    subprocess.run(["umount", "-l", disk.folder], check=True)


def undisturbed(stage: Stage, command: str, data: Path) -> object:
    """What an undisturbed run leaves, made beside the results."""
    case = CASES[command]
    assert stage.run(*case.arguments(RUN, data), "--results", stage.home / "beside") == 0, stage.last(20)
    return case.facts(stage.home / case.results.replace("results", "beside") / "laptop" / RUN)


def fails(stage: Stage, *arguments: str | Path) -> str:
    """The one line that a failing command ends with."""
    stage.log.write_text("")
    assert stage.run(*arguments) == 1, stage.last(20)
    text = stage.log.read_text()
    assert "Traceback" not in text and "internal error" not in text, stage.last(30)
    line = stage.last()
    assert line.startswith("error: "), stage.last(5)
    return line


def ends_well(stage: Stage, command: str, data: Path, expected: object) -> None:
    case = CASES[command]
    assert stage.run(*case.arguments(RUN, data)) == 0, stage.last(20)
    assert case.facts(stage.home / case.results / "laptop" / RUN) == expected
    assert stage.settled() == []


@pytest.mark.parametrize("command", CASES)
def test_a_disk_that_is_full_and_then_is_not(
    command: str, pocket: DataSet, stage: Stage, disk: Disk, figures: Figures
) -> None:
    """The disk is full at several points: while little is written, rollouts, checkpoints, and towards the end."""
    expected = undisturbed(stage, command, pocket.root)
    total = sum(p.stat().st_size for p in (stage.home / "beside").rglob("*") if p.is_file())
    said = []
    for share in (0.002, 0.3, 0.8) if command in SHORT else (0.3,):
        shutil.rmtree(stage.home / CASES[command].results / "laptop", ignore_errors=True)
        disk.become(f"size={max(65536, int(share * total))}")
        line = fails(stage, *CASES[command].arguments(RUN, pocket.root))
        assert "No space left on device" in line, line
        said.append(line)
        disk.become("size=1g")
        ends_well(stage, command, pocket.root, expected)
    figures.record("full disk", f"sqlbench {command}", f"{len(said)} times, refused in one line, completed with room")


@pytest.mark.parametrize("command", CASES)
def test_a_disk_that_cannot_be_written(
    command: str, pocket: DataSet, stage: Stage, disk: Disk, figures: Figures
) -> None:
    disk.become("ro")
    started = time.monotonic()
    assert "Read-only file system" in fails(stage, *CASES[command].arguments(RUN, pocket.root))
    seconds = time.monotonic() - started
    figures.record("read-only disk", f"sqlbench {command}", f"refused in one line after {seconds:.0f} s")


def interrupt(stage: Stage, command: str, data: Path, lines: int) -> Path:
    """Kill a command when it has written so many rollouts; its run folder."""
    folder = stage.results / "laptop" / RUN
    process = stage.start(*CASES[command].arguments(RUN, data), *(["--concurrency", "4"] if command == "eval" else []))
    while process.poll() is None and sum(1 for _ in read_trajectories(folder)) < lines:
        time.sleep(0.05)
    assert process.poll() is None, stage.last(20)
    stage.kill(process, everything=True)
    return folder


@pytest.mark.parametrize("command", SHORT)
def test_torn_lines_are_dropped(command: str, pocket: DataSet, stage: Stage, figures: Figures) -> None:
    expected = undisturbed(stage, command, pocket.root)
    folder = interrupt(stage, command, pocket.root, 12)
    for name in ("trajectories.jsonl", "metrics.jsonl", "logs/attempt.jsonl"):
        if (folder / name).is_file() and (text := (folder / name).read_bytes()):
            last = text.rstrip(b"\n").rfind(b"\n") + 1
            (folder / name).write_bytes(text[: last + (len(text) - last) // 2])
    note = folder / "checkpoints/latest_checkpointed_iteration.txt"
    if note.is_file():
        note.write_text("")
    ends_well(stage, command, pocket.root, expected)
    figures.record("torn last lines", f"sqlbench {command}", "dropped; completed")


@pytest.mark.parametrize("command", SHORT)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda config: json.dumps({k: v for k, v in config.items() if k not in ("family", "tasks")}), "was null"),
        (lambda config: json.dumps(config | {"version": 0}), "version was 0, is now null"),
        (lambda config: json.dumps(config)[:-10], "Cannot read"),
        (lambda config: "[]", "Cannot read"),
    ],
    ids=["missing key", "other version", "torn", "no object"],
)
def test_settings_of_another_version_are_refused(
    command: str, change: Callable[[dict], str], says: str, pocket: DataSet, stage: Stage
) -> None:
    folder = interrupt(stage, command, pocket.root, 4)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(change(json.loads(config)))
    kept = (folder / "trajectories.jsonl").read_bytes()
    assert says in fails(stage, *CASES[command].arguments(RUN, pocket.root))
    assert (folder / "trajectories.jsonl").read_bytes() == kept, "a refused run is left as it is"
    (folder / "config.json").write_text(config)
    assert stage.run(*CASES[command].arguments(RUN, pocket.root)) == 0, stage.last(20)


@pytest.mark.parametrize("damage", ["removed", "cut", "emptied"])
def test_a_database_that_is_lost_in_the_middle(damage: str, pocket: DataSet, stage: Stage, figures: Figures) -> None:
    data = stage.home / "data"
    shutil.copytree(pocket.root, data)
    expected = undisturbed(stage, "eval", data)
    folder = stage.results / "laptop" / RUN
    process = stage.start(*CASES["eval"].arguments(RUN, data), "--concurrency", "4")
    while process.poll() is None and sum(1 for _ in read_trajectories(folder)) < 12:
        time.sleep(0.05)
    files = {task.db_id: DataSet(data).database(task.db_id) for task in DataSet(data).load("headline")[:60]}
    for path in files.values():
        shutil.copy2(path, path.with_suffix(".kept"))
        if damage == "removed":
            path.unlink()
        else:
            with open(path, "r+b") as file:
                file.truncate(0 if damage == "emptied" else path.stat().st_size // 2)
    assert process.wait(300) == 1, "eight failures in a row stop an evaluation"
    assert "rollouts in a row failed" in stage.last() and "Traceback" not in stage.last(40)
    records = list(RunFolder(folder).trajectories())
    failed = [t for t in records if t.failed]
    assert failed and all(t.reward is None for t in failed)
    for path in files.values():
        path.with_suffix(".kept").replace(path)
    ends_well(stage, "eval", data, expected)
    figures.record("lost database", damage, f"{len(failed)} rollouts failed, none was scored; completed with it back")


def test_databases_that_are_lost_stop_a_training(pocket: DataSet, stage: Stage, figures: Figures) -> None:
    data = stage.home / "data"
    shutil.copytree(pocket.root, data)
    expected = undisturbed(stage, "train", data)
    process = stage.start(*CASES["train"].arguments(RUN, data))
    while process.poll() is None and sum(1 for _ in read_trajectories(stage.results / "laptop" / RUN)) < 10:
        time.sleep(0.05)
    (data / "database").rename(data / "away")
    assert process.wait(300) == 1, stage.last(20)
    line = stage.last()
    assert line.startswith("error: Training stopped") and "rollouts of step" in line and "Cannot open database" in line
    (data / "away").rename(data / "database")
    ends_well(stage, "train", data, expected)
    figures.record("lost databases", "sqlbench train", "stopped in one line; completed with them back")


@pytest.mark.parametrize("command", CASES)
def test_a_second_process_on_a_run_is_refused(command: str, pocket: DataSet, stage: Stage, figures: Figures) -> None:
    case = CASES[command]
    first = stage.start(*case.arguments(RUN, pocket.root))
    while first.poll() is None and not any((stage.home / case.results / "laptop" / RUN).rglob(".lock")):
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)  # so that it does not end meanwhile
    assert "Another process is writing the run" in fails(stage, *case.arguments(RUN, pocket.root))
    first.send_signal(signal.SIGCONT)
    assert first.wait(900) == 0, stage.last(20)
    case.facts(stage.home / case.results / "laptop" / RUN)
    figures.record("two writers", f"sqlbench {command}", "the second is refused, the first is not disturbed")
