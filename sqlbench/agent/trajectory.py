"""The records of one rollout, and their append-only JSONL store.

A `Trajectory` holds everything of one rollout: every model call (`Transition`), every executed statement
(`Execution`), the reward and its reason code, or the error that made it fail. Records are frozen and written
whole, one line per rollout; readers drop a torn last line.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from sqlbench.text import Text

OVERLONG = "overlong"
"""Reason of the reward 0 of a rollout whose answers made its next prompt too long."""
WITHOUT_TEXT = {
    "length": "thinking cut at the token limit",
    "reasoning": "only reasoning",
    "tool_calls": "only a tool call",
    "refusal": "a refusal",
    "content_filter": "stopped by a content filter",
}
"""Descriptions of an answer without text, by finish reason."""


class Record(BaseModel):
    """Base of everything written to disk: immutable, unknown fields refused."""

    # A diverged policy may have NaN log-probabilities, which could not be read back if written as null.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Message(Record):
    """One chat message of a prompt."""

    role: str
    content: str


class Completion(Record):
    """Answer of a model to one prompt. Token fields are None if the model does not give them."""

    text: Text
    prompt_ids: list[int] | None = None
    response_ids: list[int] | None = None
    """Sampled token ids, end-of-sequence token included."""
    logprobs: list[float] | None = None
    """Log-probability of each sampled token under the sampling distribution; same length as `response_ids`."""
    prompt_tokens: int | None = None
    response_tokens: int | None = None
    finish_reason: str = "stop"
    """``stop``, ``length`` (cut at the token limit), ``content_filter``, or another key of `WITHOUT_TEXT`."""
    seconds: float = 0.0
    temperature: float | None = None
    """Temperature of the answer if it is not the model's own; such an answer is not trained on."""
    sent: dict[str, Any] | None = None
    """Request fields, besides model and messages, that an endpoint accepted; None for other models."""

    @property
    def cached(self) -> bool:
        """Tell whether it came from a cache (`sqlbench.models.cache`), without cost or waiting."""
        return bool(self.sent and self.sent.get("cached"))

    @property
    def empty(self) -> bool:
        """Tell whether the answer has no text besides the model's thinking."""
        _, closed, answer = self.text.rpartition("</think>")
        return not answer.strip() or (not closed and answer.lstrip().startswith("<think>"))

    @property
    def flaw(self) -> str:
        """Explain why the answer is empty or incomplete; empty for a whole answer."""
        if self.empty:
            return f"empty: {WITHOUT_TEXT.get(self.finish_reason, 'no text')}"
        cut = {"length": "cut at the token limit", "content_filter": "cut by a content filter"}
        return cut.get(self.finish_reason, "")


class Transition(Record):
    """One prompt and response of one sub-agent."""

    agent: str
    """Name of the sub-agent: ``write``, ``check`` or ``rewrite``, or a name from an agent of your own."""
    turn: int
    """1-based turn (write-or-rewrite, execute, check) in which the call was made."""
    messages: list[Message]
    completion: Completion
    strategy: str | None = None
    """The repair strategy that a rewrite was told to follow."""


class Execution(Record):
    """One executed statement and the part of its result that the prompts show."""

    turn: int
    sql: str
    status: str
    """``ok``, ``error``, ``timeout``, ``too_large`` or ``rejected`` (see `sqlbench.database.types.QueryResult`)."""
    error: str | None = None
    columns: list[str] = []
    rows: list[list[str | int | float | None]] = []
    """At most the first 20 rows; bytes are shown as hexadecimal text."""
    n_rows: int = 0
    seconds: float = 0.0
    match: int | None = None
    """Its execution match, if a training rewards each query (`sqlbench_train.credit`)."""

    @property
    def cut(self) -> bool:
        """Tell whether it gave more rows or bytes than the limit; `error` then says how many, `rows` are the first."""
        return self.status == "too_large" and bool(self.rows)

    @property
    def answered(self) -> bool:
        """Tell whether it has a result to look at: all of it, or its beginning."""
        return self.status == "ok" or self.cut

    @property
    def size(self) -> str:
        """Describe how many rows it gave."""
        return str(self.error) if self.cut else f"{self.n_rows} row{'s' * (self.n_rows != 1)}"


def is_correct(reward: float | None, match: float | None) -> bool | None:
    """Tell whether execution match is 1, from these fields of a `Trajectory`; None without a verdict."""
    verdict = reward if match is None else match
    return None if verdict is None else verdict == 1


class Trajectory(Record):
    """One rollout of one task."""

    task_key: str
    """Content key of the task (`sqlbench.data.tasks.Task.key`)."""
    task_id: str
    db_id: str
    question: str
    gold: str
    dialect: str = "sqlite"
    """Dialect of the database, as in `sqlbench.interfaces.Database`."""
    hardness: str = ""
    split: str = ""
    transitions: list[Transition] = []
    executions: list[Execution] = []
    pred: str | None = None
    """The last query the agent wrote; None when the rollout failed before one."""
    reward: float | None = None
    """A number in [0, 1]; None for a failed rollout (never 0) or a task that cannot be scored."""
    match: float | None = None
    """Execution match if `reward` is another number; None if the reward is the match itself."""
    reason: str = ""
    """Reason code of the verdict (`sqlbench.reward`), or `OVERLONG`."""
    error: str | None = None
    """Reason for the failure, as ``where: Type: message``; None if the rollout did not fail."""
    seconds: float = 0.0
    step: int | None = None
    """Trainer step; None outside training."""
    validation: bool = False
    """True for a rollout that validates a training and is not learned from."""
    sample: int = 0
    """Index within the group of rollouts of one task."""

    @property
    def turns(self) -> int:
        """Count the queries that the model was asked for."""
        return max((t.turn for t in self.transitions), default=0)

    @property
    def correct(self) -> bool | None:
        """Tell whether execution match is 1; None without a verdict."""
        return is_correct(self.reward, self.match)

    @property
    def failed(self) -> bool:
        """Tell whether something outside the policy broke: excluded from accuracy and training, but counted."""
        return self.error is not None
