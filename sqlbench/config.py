"""Frozen settings that are written to disk with every run; each default is the one the tables report."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sqlbench.database.types import LONGEST_QUERY, Limits

MOST_ROWS = 20
"""Sample rows of a table that a prompt can show."""


class Settings(BaseModel):
    """Base of all settings: immutable, unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class RolloutConfig(Settings):
    """What shapes one rollout besides the task, the model and the prompts."""

    max_turns: int = Field(3, ge=1)
    """Write-or-rewrite calls at most."""
    table_info_truncate: int = Field(2048, ge=1)
    """Characters of schema text in a prompt."""
    sample_rows: int = Field(0, ge=0, le=MOST_ROWS)
    """Rows of each table that the schema text shows; they count as its characters."""
    execution_truncate: int = Field(2048, ge=1)
    """Characters of an execution result in a prompt."""
    strict: bool = True
    """Close the reference evaluator's holes (`sqlbench.reward.score`)."""
    query_timeout: float = Field(5.0, gt=0, le=LONGEST_QUERY)
    """Seconds that a query may take: the agent's, the gold one and the prediction that is scored."""

    @property
    def limits(self) -> Limits:
        """What every statement of the rollout may use."""
        return Limits(seconds=self.query_timeout)


class EvalConfig(Settings):
    """Everything an evaluation's numbers depend on; two evaluations with equal configs may be continued as one."""

    kind: str = "eval"
    data: str
    split: str
    limit: int | None = None
    """Only the first so many scorable tasks of the split."""
    model: str
    weights: str | None = None
    """Checksum of a local model's weights."""
    temperature: float = 0.0
    samples: int = Field(1, ge=1)
    """Rollouts a task."""
    seed: int | None = None
    """Of the samples of a local model; None is the model's own."""
    max_tokens: int | None = None
    """Tokens of an answer at most; None is the model's own default."""
    request: dict[str, Any] = {}
    """Further request fields for an endpoint (`sqlbench.models.chat`)."""
    rollout: RolloutConfig = RolloutConfig()
    prompts: dict[str, str]
    family: str
    agent: str = "self-correcting"
    reward: str = "execution-match"
