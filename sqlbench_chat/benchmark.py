"""Benchmark tab: the agent's accuracy on a database's own questions, now and in earlier runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import ipywidgets as w
from markupsafe import Markup
from pydantic import ValidationError

from sqlbench.agent.trajectory import Record, Trajectory
from sqlbench.data.tasks import Task
from sqlbench.results import Rollouts, Score
from sqlbench.runs import append_line, read_jsonl
from sqlbench_chat.builtin import LEVELS
from sqlbench_chat.parts import WIDE, button, html
from sqlbench_chat.turn import HTML
from sqlbench_lab import view

if TYPE_CHECKING:
    from sqlbench_chat.view import ChatView

SHOWN = 20
"""Maximum number of earlier benchmarks shown, newest first."""


class Measured(Record):
    """Record of one benchmark."""

    at: str
    model: str
    generation: int
    database: str
    level: str
    of: int
    """Number of questions planned."""
    failed: int
    scores: dict[str, Score]
    """Scores by level, and overall."""


def scores(rollouts: Sequence[Trajectory]) -> dict[str, Score]:
    """Score rollouts by level and overall, leaving out levels without a verdict."""
    frame = Rollouts.of(rollouts).rollouts
    parts = {level: frame[frame["hardness"] == level] for level in LEVELS} | {"overall": frame}
    by_level = {name: Score.of(part["correct"], part["task"]) for name, part in parts.items()}
    return {name: score for name, score in by_level.items() if score.n}


def benchmark_html(rollouts: Sequence[Trajectory], of: int) -> Markup:
    """Render accuracy by level and overall, and every question with its verdict, its last query and gold."""
    levels = [[name, f"{s.correct} of {s.n}", str(s)] for name, s in scores(rollouts).items()]
    order = sorted(rollouts, key=lambda t: (LEVELS.index(t.hardness), t.question))
    rows = [[t.hardness, _verdict(t), t.turns, t.question, t.pred or "", t.gold] for t in order]
    return HTML.benchmark(len(rollouts), of, sum(t.error is not None for t in rollouts), levels, rows)


def _verdict(rollout: Trajectory) -> str:
    result = view.outcome(rollout.correct, rollout.error)
    return f"{view.OUTCOMES[result]} {rollout.error or result}"


class Benchmark(w.VBox):
    """The benchmark tab."""

    def __init__(self, chat: ChatView) -> None:
        self._chat = chat
        self.level = w.ToggleButtons(options=["all", *LEVELS], style={"button_width": "80px"})
        self.run = button("Run the benchmark", self._press)
        self.scores, self._history = w.HTML(layout=WIDE), w.HTML(layout=WIDE)
        super().__init__([w.HBox([self.level, self.run], layout={"flex_flow": "row wrap"}), self.scores, self._history])

    def _press(self) -> None:
        self._chat.stop() if self._chat.busy else self._chat.benchmark()

    def clear(self) -> None:
        """Remove the scores of the previous database, and show the earlier benchmarks."""
        self.scores.value = ""
        self.show_history()

    def show_history(self) -> None:
        """Show the earlier benchmarks of this folder."""
        session = self._chat.session
        if session is None:
            return
        records = []
        for line in read_jsonl(session.folder / "benchmarks.jsonl"):
            try:
                records.append(Measured.model_validate(line))
            except ValidationError:  # written by another version
                continue
        self._history.value = html(HTML.benchmarks(records[: -SHOWN - 1 : -1])) if records else ""

    async def measure(self, tasks: Sequence[Task]) -> None:
        """Run the benchmark; if it is cancelled, keep the questions scored so far."""
        session, connection = self._chat.session, self._chat.connection
        assert session is not None and connection is not None
        done: list[Trajectory] = []
        generation, level = session.evolution.generation, self.level.value

        def show(rollouts: list[Trajectory]) -> None:
            done[:] = rollouts
            self.scores.value = html(benchmark_html(done, len(tasks)))

        show([])
        try:
            await session.benchmark(connection, tasks, show)
        except asyncio.CancelledError:
            self._chat.say(f"benchmark cancelled after {len(done)} of {len(tasks)} questions")
        if done:
            record = Measured(
                at=time.strftime("%Y-%m-%d %H:%M"),
                model=session.model.name,
                generation=generation,
                database=connection.name,
                level=level,
                of=len(tasks),
                failed=sum(t.error is not None for t in done),
                scores=scores(done),
            )
            append_line(session.folder / "benchmarks.jsonl", record)
            self.show_history()
