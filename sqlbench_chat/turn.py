"""One question and its outcome: a record that is shown while it grows, then stored."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any, Literal

from jinja2 import ChoiceLoader, PackageLoader
from markupsafe import Markup
from pydantic import BaseModel, Field

from sqlbench.agent.prompts import extract_sql, parse_verdict
from sqlbench.agent.repair import GENERATE, normal
from sqlbench.agent.trajectory import Execution, Transition
from sqlbench.text import Text
from sqlbench_chat.generations import Feedback
from sqlbench_lab import view

TEMPLATES = view.TEMPLATES.overlay(loader=ChoiceLoader([PackageLoader("sqlbench_chat"), PackageLoader("sqlbench_lab")]))
HTML: Any = TEMPLATES.get_template("chat.html").module
WRITING, RUNNING = "writing ...", "running ..."


class Attempt(BaseModel):
    """One query, in progress or executed."""

    turn: int
    strategy: str = GENERATE
    text: Text = ""
    """The model's answer so far."""
    execution: Execution | None = None
    result: Text = ""
    """Text of the result as the prompts show it."""
    review: Text = ""
    doing: str = WRITING
    repeats: bool = False
    """Mark of a repeated query, which is not executed again."""

    @property
    def sql(self) -> str:
        """The query so far."""
        return extract_sql(self.text)

    @property
    def approved(self) -> bool:
        """Return whether the review calls the query correct."""
        return parse_verdict(self.review)


class Turn(BaseModel):
    """A question, the attempts to answer it, and the user's verdict."""

    key: str = Field(default_factory=lambda: secrets.token_hex(8))
    question: Text
    database: str
    """Name of the database."""
    model: str = ""
    generation: int = 0
    """Generation of the prompt that answered."""
    earlier: list[tuple[Text, Text]] = []
    """Queries that did not answer it, each with the text of its result; the model tries another way."""
    attempts: list[Attempt] = []
    sql: Text = ""
    """The final query; empty if there is none."""
    conclusion: Text = ""
    error: Text = ""
    """Reason for a missing answer."""
    summary: Text = ""
    """The answer in words."""
    verdict: Literal["right", "wrong"] | None = None
    remark: Text = ""

    @property
    def over(self) -> bool:
        """Return whether the turn is complete."""
        return bool(self.conclusion or self.error)

    @property
    def history(self) -> list[tuple[str, str]]:
        """Every query for this question so far, with the text of its result."""
        return [*self.earlier, *((a.execution.sql, a.result) for a in self.attempts if a.execution)]

    @property
    def found(self) -> Execution | None:
        """The execution of the final query."""
        return next((a.execution for a in self.attempts[::-1] if a.execution and a.execution.sql == self.sql), None)

    @property
    def same(self) -> bool:
        """Return whether the answer repeats a rejected one."""
        return bool(self.sql) and normal(self.sql) in {normal(sql) for sql, _ in self.earlier}

    def feedback(self) -> Feedback | None:
        """Return the record for prompt evolution; None if there was no query."""
        result = next((text for sql, text in self.history[::-1] if sql == self.sql), None)
        if result is None:
            return None
        return Feedback(
            question=self.question,
            db=self.database,
            sql=self.sql,
            execution=result,
            verdict=self.verdict,
            remark=self.remark,
            generation=self.generation,
        )

    def html(self) -> Markup:
        """Render every attempt and the conclusion."""
        return HTML.turn(self)


class LiveTranscript:
    """Watches a rollout and writes every event into a turn, which is consistent at every moment.

    Args:
        turn: turn to write into.
        changed: called after every event.
    """

    def __init__(self, turn: Turn, changed: Callable[[], None] = lambda: None) -> None:
        self.turn, self.changed = turn, changed

    def _attempt(self, number: int, **news: object) -> None:
        attempts = self.turn.attempts
        if number > len(attempts):
            attempts.append(Attempt(turn=number))
        for name, value in news.items():
            setattr(attempts[number - 1], name, value)
        self.changed()

    def strategy(self, name: str) -> None:
        """Record the strategy of the next query."""
        self._attempt(len(self.turn.attempts) + 1, strategy=name)

    def text(self, agent: str, turn: int, piece: str) -> None:
        """Record a piece of a model's answer."""
        if agent == "check":
            self._attempt(turn, doing="reviewing ...")
        else:
            here = self.turn.attempts[turn - 1] if turn <= len(self.turn.attempts) else Attempt(turn=turn)
            over = here.doing == RUNNING  # the text so far is complete: the query is requested again
            self._attempt(turn, text=piece if over else here.text + piece, doing=WRITING)

    def transition(self, transition: Transition) -> None:
        """Record a finished model call."""
        text = transition.completion.text
        if transition.agent == "check":
            self._attempt(transition.turn, review=text.strip(), doing="")
        else:
            self._attempt(transition.turn, text=text, doing=RUNNING)

    def execution(self, execution: Execution, execution_text: str) -> None:
        """Record an executed query."""
        self._attempt(execution.turn, execution=execution, result=execution_text, doing="")

    def conclude(self, conclusion: str, error: str = "") -> None:
        """Record the conclusion of the turn."""
        self.turn.conclusion, self.turn.error = conclusion, error
        for attempt in self.turn.attempts:
            attempt.doing = ""
        self.changed()
