"""Tests that do damage for real and take long: `make soak` runs them all and ends with a table of what was measured.

SOAK_TRIALS sets how often each thing is done (20), SOAK_SEED which moments are drawn (1), SOAK_OUT where the figures
are collected (build/soak.jsonl).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import pytest


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    part: str
    what: str
    value: str


class Figures:
    """What was measured, in a file that outlives the session."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def record(self, part: str, what: str, value: str) -> None:
        """Add one line; of a thing that was measured again the later value stands in the table."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(Figure(part, what, value)), ensure_ascii=False) + "\n")

    def table(self) -> str:
        """All lines as markdown, in the order in which they were first measured."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        rows = {(f.part, f.what): f.value for f in (Figure(**json.loads(line)) for line in lines)}
        body = [f"| {part} | {what} | {value} |" for (part, what), value in rows.items()]
        return "\n".join(["| part | what | value |", "|---|---|---|", *body]) if body else ""


FIGURES = Figures(Path(os.environ.get("SOAK_OUT", "build/soak.jsonl")).absolute())  # tests go to other folders


@pytest.fixture(scope="session")
def figures() -> Figures:
    """`figures.record(part, what, value)`: one line of the table at the end."""
    return FIGURES


@pytest.fixture(scope="session")
def trials() -> int:
    """How often a thing is done that happens at random."""
    return int(os.environ.get("SOAK_TRIALS", "20"))


@pytest.fixture(scope="session")
def seed() -> int:
    """Seed of all random moments and inputs."""
    return int(os.environ.get("SOAK_SEED", "1"))


class Stage:
    """A place of its own for `sqlbench` commands: what they start or leave behind is found by its temporary folder."""

    def __init__(self, home: Path, temporary: Path) -> None:
        self.home, self.temporary = home, temporary
        self.results, self.log = home / "results", home / "log"

    def start(self, *arguments: str | Path) -> subprocess.Popen[bytes]:
        """Start a command as a shell does: it leads a process group."""
        caches = {"JUPYTER_RUNTIME_DIR": "jupyter", "IPYTHONDIR": "ip", "TORCHINDUCTOR_CACHE_DIR": "torch"}
        names = {"TMPDIR": self.temporary} | {name: self.home / folder for name, folder in caches.items()}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [Path(sys.executable).with_name("sqlbench"), *map(str, arguments)],
                cwd=self.home,
                env=os.environ | {name: str(path) for name, path in names.items()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # A background job of a shell has Ctrl-C ignored, and hands that down.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def run(self, *arguments: str | Path, timeout: float = 900) -> int:
        """Run a command to its end; its exit status."""
        return self.start(*arguments).wait(timeout)

    def last(self, lines: int = 1) -> str:
        """The last lines that commands wrote."""
        text = self.log.read_text(errors="replace").replace("\r", "\n")
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])

    def processes(self) -> list[psutil.Process]:
        """Everything that still runs of what was started here."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("TMPDIR", "").startswith(str(self.temporary)):
                    found.append(process)
        return [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def kill(self, process: subprocess.Popen[bytes], everything: bool) -> None:
        """Kill -9 a command: alone, or together with all that it started."""
        others = self.processes() if everything else []
        process.send_signal(signal.SIGKILL)
        for other in others:
            with suppress(psutil.Error):
                other.kill()
        process.wait()

    def settled(self, seconds: float = 30) -> list[str]:
        """Wait until nothing runs any more; what still does, and what lies in the temporary folder."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        lines = []
        for process in left:
            with suppress(psutil.Error):
                lines.append(" ".join(process.cmdline())[:150])
        # The connection file of a killed kernel (Jupyter's, under a random name) stays: nobody reads it again.
        names = [path.name for path in self.temporary.iterdir()]
        return [*lines, *(name for name in names if not re.fullmatch(r"tmp\w+\.json", name))]

    def end(self) -> None:
        """End what still runs; what a failed test left at home stays to be looked at, as pytest keeps it."""
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """A place for commands that are killed; its temporary folder has a short name, because Ray puts sockets below."""
    stage = Stage(tmp_path, Path(tempfile.mkdtemp(prefix="s", dir="/tmp")))
    yield stage
    stage.end()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table, ready for docs/reliability.md."""
    if table := FIGURES.table():
        terminalreporter.write_sep("=", "figures")
        terminalreporter.write_line(table)
