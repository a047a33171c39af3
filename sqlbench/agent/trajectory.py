"""The records of one rollout, and their append-only JSONL store.

A `Trajectory` is everything one rollout left behind: every model call (`Transition`), every executed statement
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
"""What an endpoint gave instead of text, by finish reason."""


class Record(BaseModel):
    """Base of everything written to disk: immutable, unknown fields refused."""

    # Of a policy that diverged, log-probabilities may be no numbers: written as null they could not be read again.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Message(Record):
    """One chat message of a prompt."""

    role: str
    content: str


class Completion(Record):
    """What a model answered to one prompt. Token fields are None where the model does not give them."""

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
    """What the answer was sampled at, where that is not the model's own temperature; it is then not trained on."""
    sent: dict[str, Any] | None = None
    """Request fields, besides model and messages, that an endpoint accepted; None where the model is not one."""

    @property
    def empty(self) -> bool:
        """Whether nothing is left once the model's thinking is taken away."""
        _, closed, answer = self.text.rpartition("</think>")
        return not answer.strip() or (not closed and answer.lstrip().startswith("<think>"))

    @property
    def flaw(self) -> str:
        """Why the answer is empty or incomplete, in words; empty for a whole answer."""
        if self.empty:
            return f"empty: {WITHOUT_TEXT.get(self.finish_reason, 'no text')}"
        cut = {"length": "cut at the token limit", "content_filter": "cut by a content filter"}
        return cut.get(self.finish_reason, "")


class Transition(Record):
    """One prompt and response of one sub-agent."""

    agent: str
    """Name of the sub-agent: ``write``, ``check`` or ``rewrite``, or what an agent of your own calls it."""
    turn: int
    """1-based turn (write-or-rewrite, execute, check) in which the call was made."""
    messages: list[Message]
    completion: Completion
    strategy: str | None = None
    """The repair strategy that a rewrite was told to follow."""


class Execution(Record):
    """One executed statement and as much of its result as the prompts show."""

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
    """Its execution match, where a training rewards queries for themselves (`sqlbench.training.credit`)."""

    @property
    def cut(self) -> bool:
        """Whether it gave more rows or bytes than are kept; `error` then says how many, and `rows` are the first."""
        return self.status == "too_large" and bool(self.rows)

    @property
    def answered(self) -> bool:
        """Whether there is a result to look at: all of it, or its beginning."""
        return self.status == "ok" or self.cut

    @property
    def size(self) -> str:
        """How many rows it gave, in words."""
        return str(self.error) if self.cut else f"{self.n_rows} row{'s' * (self.n_rows != 1)}"


def is_correct(reward: float | None, match: float | None) -> bool | None:
    """Whether execution match is 1, from these fields of a `Trajectory`; None where there is no verdict."""
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
    hardness: str = ""
    split: str = ""
    transitions: list[Transition] = []
    executions: list[Execution] = []
    pred: str | None = None
    """The last query the agent wrote; None when the rollout failed before one."""
    reward: float | None = None
    """A number in [0, 1]; None for a failed rollout (never 0) or a task that cannot be scored."""
    match: float | None = None
    """Execution match, where `reward` is another number; None where the reward is the match itself."""
    reason: str = ""
    """Reason code of the verdict (`sqlbench.reward`), or `OVERLONG`."""
    error: str | None = None
    """Why the rollout failed, as ``where: Type: message``; None when it did not."""
    seconds: float = 0.0
    step: int | None = None
    """Trainer step; None outside training."""
    validation: bool = False
    """Whether a training made it to measure, not to learn from."""
    sample: int = 0
    """Index within the group of rollouts of one task."""

    @property
    def turns(self) -> int:
        """Number of queries that the model was asked for."""
        return max((t.turn for t in self.transitions), default=0)

    @property
    def correct(self) -> bool | None:
        """Whether execution match is 1; None where there is no verdict."""
        return is_correct(self.reward, self.match)

    @property
    def failed(self) -> bool:
        """Whether something outside the policy broke: excluded from accuracy and from training, but counted."""
        return self.error is not None
