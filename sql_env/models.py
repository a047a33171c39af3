"""Messages between client and server: actions, observations, state."""

from __future__ import annotations

from openenv.core.env_server.types import Action, Observation, State
from pydantic import Field

from sqlbench.agent.prompts import STRATEGIES
from sqlbench.agent.repair import GENERATE
from sqlbench.agent.trajectory import Record
from sqlbench.text import Text

MAX_ATTEMPTS = 5


class SqlAction(Action):
    """One attempt."""

    strategy: Text = Field(json_schema_extra={"enum": [GENERATE, *STRATEGIES]})
    """``generate`` first, then one of the repair strategies."""
    sql: Text | None = None
    """The caller's own query; without one, the server's model writes it."""


class SqlObservation(Observation):
    """Observation after reset or a step; `reward` and `done` are those of the step."""

    episode_id: str
    """Name of the episode in HTTP requests, where it may be left out for the client's latest."""
    task_id: str
    db_id: str
    dialect: str
    question: str
    schema_text: str
    attempt: int = 0
    attempts_left: int = MAX_ATTEMPTS
    sql: str = ""
    """The last query."""
    result: str = ""
    """The result of the query, as the prompts show it."""
    error_class: str = ""
    """Failure class of the query (`sqlbench.agent.repair.POTENTIAL`); ``none`` if it ran and gave rows."""
    success: bool | None = None
    """Verdict on the query: true if its answer is right."""


class Attempt(Record):
    """One attempt as the state shows it."""

    strategy: str
    sql: Text
    result: Text
    error_class: str
    reward: float


class SqlState(State):
    """State of an episode."""

    task_id: str = ""
    db_id: str = ""
    question: str = ""
    max_attempts: int = MAX_ATTEMPTS
    attempts: list[Attempt] = Field(default_factory=list)
    done: bool = False
    success: bool = False
    total_reward: float = 0.0
