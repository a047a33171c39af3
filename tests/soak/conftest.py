"""Tests that do damage for real and take long: `make soak` runs them all and ends with a table of what was measured.

SOAK_TRIALS sets how often each thing is done (20), SOAK_SEED which moments are drawn (1), SOAK_OUT where the figures
are collected (build/soak.jsonl).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

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


def _figures() -> Figures:
    return Figures(Path(os.environ.get("SOAK_OUT", "build/soak.jsonl")))


@pytest.fixture(scope="session")
def figures() -> Figures:
    """`figures.record(part, what, value)`: one line of the table at the end."""
    return _figures()


@pytest.fixture(scope="session")
def trials() -> int:
    """How often a thing is done that happens at random."""
    return int(os.environ.get("SOAK_TRIALS", "20"))


@pytest.fixture(scope="session")
def seed() -> int:
    """Seed of all random moments and inputs."""
    return int(os.environ.get("SOAK_SEED", "1"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table, ready for docs/reliability.md."""
    if table := _figures().table():
        terminalreporter.write_sep("=", "figures")
        terminalreporter.write_line(table)
