"""Settings, in which each option exists once: as a field with its name, type, bounds, default and description.

The command line (`sqlbench.cli`), the arguments of the functions that `takes` decorates and the ``config.json`` of an
evaluation are generated from these models. Fields that no result depends on have ``exclude`` and are not stored there.
The defaults are those of the reported tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import Parameter, Signature, getdoc
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field

from sqlbench.database.types import LONGEST_QUERY, Limits

MOST_ROWS = 20
"""Most sample rows of a table that a prompt can show."""
POCKET, RESULTS = Path("data/pocket"), Path("results")
Result = TypeVar("Result")

# Fields that several commands share. "flags" are an option's names on the command line where they differ from the
# field's; an empty list makes it positional. The heading of a model is that of its fields in a help text.
Data = Annotated[Path, Field(description="Data set folder, or module:attribute.")]
OwnData = Annotated[Path | None, Field(description="Data set folder, or module:attribute; the profile's by default.")]
MODEL = "nano, a folder, a Hugging Face name (owner/name), openai:NAME, or module:attribute."
Model = Annotated[str, Field(description=MODEL)]
Agent = Annotated[str, Field(description="self-correcting, conversation, resampling, published, or module:attribute.")]
Reward = Annotated[str, Field(description="execution-match, runs (a control), or module:attribute of your own.")]
Strategy = Literal[
    "rewrite_full",
    "fix_column",
    "fix_table",
    "add_groupby",
    "rewrite_cte",
    "fix_syntax",
    "change_dialect",
    "relax_filter",
    "resample",
]
"""What a rewrite can be told to do; ``resample`` forgets the query and samples another one for the question."""
QueryTimeout = Annotated[float, Field(ge=0.01, le=LONGEST_QUERY, description="Seconds a query may take, gold or not.")]
SchemaCharacters = Annotated[int, Field(ge=1, description="Characters of schema in a prompt.")]
Profile = Annotated[str, Field(description="laptop or gpu.", exclude=True)]
Run = Annotated[str, Field(description="Name of the run: results/<profile>/<run>/.", exclude=True)]
Results = Annotated[Path, Field(description="Folder of all results.", exclude=True)]
Overwrite = Annotated[bool, Field(description="Discard what the run folder holds.", exclude=True)]
Overrides = Annotated[list[str], Field(description="Settings for verl, unchanged.", json_schema_extra={"flags": []})]
Track = Annotated[str | None, Field(description="Send metrics to wandb, mlflow or tensorboard too.")]
Prices = Annotated[Path | None, Field(description="TOML file, [prices.MODEL] with prompt and response.", exclude=True)]
Cache = Annotated[Path | None, Field(description="Folder that keeps an endpoint's answers.", exclude=True)]
Seed = Annotated[int, Field(description="Equal seeds give equal results.")]
Metrics = Annotated[
    list[Literal["test-suite", "exact-match", "bird-ex", "soft-f1", "ves", "r-ves"]],
    Field(
        description="Another score: test-suite, exact-match, bird-ex, soft-f1, ves or r-ves; repeatable.",
        json_schema_extra={"flags": ["--metric"]},
        exclude=True,
    ),
]
Request = Annotated[
    str | None,
    Field(description="Request fields for an endpoint, a JSON object; null leaves one out. Also SQLBENCH_REQUEST."),
]
Port = Annotated[int, Field(ge=0, le=65535, description="Port to listen on; 0 picks a free one.")]
Host = Annotated[str, Field(description="Address to listen on; the default is this machine alone.")]


class Settings(BaseModel):
    """Base of all settings: immutable, unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class SchemaConfig(Settings):
    """The part of a schema that prompts show, which never exceeds its budget.

    A command replaces None by the model's usual value (`decided`) and stores that value. Elsewhere None means off.
    """

    heading: ClassVar = "Schema in prompts"
    table_info_truncate: SchemaCharacters = 2048
    schema_tokens: int | None = Field(None, ge=1, description="Tokens of schema in a prompt, instead of characters.")
    schema_linking: bool | None = Field(
        None, description="Choose the shown part of a larger schema by the question, instead of cutting it."
    )
    sample_rows: int | None = Field(
        None, ge=0, le=MOST_ROWS, description="Rows of each table, where there is room; 0 for nano, else 3 by default."
    )
    value_hints: bool | None = Field(
        None, description="Show values that the question names beside their columns; not by default for nano."
    )

    def decided(self, family: str, agent: str = "", trained: Mapping[str, Any] | None = None) -> Self:
        """Return these settings without None: as the policy was trained, else by the family of its prompts.

        The published agent keeps what it was published with: a cut schema.

        Args:
            family: prompt family.
            agent: name of the agent.
            trained: the settings of the training that made the policy, if any.
        """
        rich = family != "nano"
        usual = {"schema_linking": True, "sample_rows": 3 * rich, "value_hints": rich}
        if trained is not None or agent == "published":
            usual = CUT | {name: value for name, value in (trained or {}).items() if name in CUT}
        return self.model_copy(update={name: usual[name] for name in usual if getattr(self, name) is None})


CUT: dict[str, Any] = {"schema_linking": False, "sample_rows": 0, "value_hints": False}
"""Values in runs that were stored before these settings existed: the first tables and nothing beside them."""


class RolloutConfig(SchemaConfig):
    """Settings of one rollout besides the task, the model and the prompts."""

    heading: ClassVar = "Rollout"
    max_turns: int = Field(3, ge=1, description="Queries the agent may write.")
    check: bool = Field(True, description="Ask whether a query that ran is right; without, it is final.")
    repair: Strategy | None = Field(None, description=f"Strategy of every rewrite: {', '.join(get_args(Strategy))}.")
    execution_truncate: int = Field(2048, ge=1, description="Characters of a result in a prompt.")
    strict: bool = Field(True, description="Close the reference evaluator's holes.")
    query_timeout: QueryTimeout = 5.0

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> RolloutConfig:
        """Read the settings from the section ``sqlbench`` of a training's configuration."""
        return cls(**{name: section[name] for name in cls.model_fields})

    @property
    def limits(self) -> Limits:
        """Limits of every statement of the rollout."""
        return Limits(seconds=self.query_timeout)


class SamplingConfig(Settings):
    """Sampling of answers; a model object, or one of ``module:attribute``, keeps its own settings."""

    heading: ClassVar = "Sampling"
    temperature: float = Field(0.0, ge=0, description="0 is greedy.")
    samples: int = Field(1, ge=1, description="Rollouts per task, for avg@n, pass@k, majority and best of n.")
    seed: int | None = Field(None, description="Seed of a local model's samples; 0 by default.")
    max_tokens: int | None = Field(None, ge=1, description="Most tokens of an answer; the model's own by default.")


class EvalConfig(RolloutConfig, SamplingConfig):
    """Run the agent over a split and write trajectories and a summary; resumes where it was interrupted."""

    data: Data = POCKET
    split: str = Field("headline", description="A split, or 'headline'.")
    model: Any = Field("nano", description=MODEL)  # or a model object
    run: Run
    agent: Agent = "self-correcting"
    reward: Reward = "execution-match"
    limit: int | None = Field(None, ge=1, description="Use only the first N scorable tasks.")
    prompts: Any = Field(None, description="Prompts if not the model's own: nano, chat or a .toml file.")  # or Prompts
    metrics: Metrics = []
    timeout: float | None = Field(None, ge=0.01, description="Seconds a call to an endpoint may take.", exclude=True)
    concurrency: int | None = Field(
        None, ge=1, description="Rollouts at a time; 16 for endpoints, else 128.", exclude=True
    )
    prices: Prices = None
    cache: Cache = None
    profile: Profile = "laptop"
    results: Results = RESULTS
    overwrite: Overwrite = False


class ScoreConfig(Settings):
    """Score pairs of gold and predicted queries, by default with the reference evaluator's verdicts."""

    data: Path = Field(description="Data set folder; a prediction has to match on each database of database/<db_id>/.")
    pairs: Path = Field(
        description="JSON lines with db_id, gold, pred (.jsonl or .jsonl.gz); predict.txt; BIRD's predict_dev.json."
    )
    out: Path = Field(description="JSON lines to write: one verdict per pair.")
    keep_distinct: bool = Field(False, description="Do not drop DISTINCT.")
    strict: bool = Field(False, description="Close the reference evaluator's holes.")
    split: str = Field("headline", description="Split of the predictions in a .txt or .json file, in order.")
    metrics: Metrics = []
    query_timeout: QueryTimeout = 10.0
    workers: int | None = Field(
        None, ge=1, description="Processes; by default one per core where there are many pairs."
    )


class ExportConfig(Settings):
    """Write the final queries of an evaluation in Spider's form or BIRD's."""

    run: Path = Field(description="Folder of an evaluation.", json_schema_extra={"flags": []})
    out: Path = Field(description="File to write: .txt for Spider's form, .json for BIRD's.")


def takes(model: type[Settings], *positional: str) -> Callable[[Callable[[Any], Result]], Callable[..., Result]]:
    """Let a function of settings be called with their fields instead; the `positional` ones need no name.

    A positional field before a required one has no default in a call. `help` shows the signature and ``Args``.
    """
    fields = {name: model.model_fields[name] for name in (*positional, *model.model_fields)}
    needed = max((n for n, name in enumerate(positional) if fields[name].is_required()), default=-1)
    parameters = [
        Parameter(
            name,
            Parameter.POSITIONAL_OR_KEYWORD if name in positional else Parameter.KEYWORD_ONLY,
            default=Parameter.empty if n <= needed or field.is_required() else field.default,
            annotation=field.annotation,
        )
        for n, (name, field) in enumerate(fields.items())
    ]
    arguments = "".join(f"\n    {name}: {field.description}" for name, field in fields.items())

    def decorate(function: Callable[[Any], Result]) -> Callable[..., Result]:
        @wraps(function)
        def call(*given: Any, **named: Any) -> Result:
            if given and isinstance(given[0], model):
                return function(*given, **named)
            return function(model(**Signature(parameters).bind(*given, **named).arguments))

        call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        call.__doc__ = f"{getdoc(function)}\n\nArgs:{arguments}\n"
        return call

    return decorate
