"""Settings. An option exists once: as a field, with its name, type, bounds, default and description.

The command line (`sqlbench.cli`), the arguments of the functions that `takes` decorates and the ``config.json`` of an
evaluation are generated from these models. What no number depends on has ``exclude`` and is not stored there. Each
default is the one that the tables report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import Parameter, Signature, getdoc
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from sqlbench.database.types import LONGEST_QUERY, Limits

MOST_ROWS = 20
"""Sample rows of a table that a prompt can show."""
POCKET, RESULTS = Path("data/pocket"), Path("results")
Result = TypeVar("Result")

# What several commands have. "flags" are an option's names on the command line where they are not the field's own;
# without any, its values stand there alone. The heading of a model is that of its fields in a help text.
Data = Annotated[Path, Field(description="Data set folder, or module:attribute.")]
OwnData = Annotated[Path | None, Field(description="Data set folder, or module:attribute; the profile's by default.")]
MODEL = "nano, a folder, a Hugging Face name (owner/name), openai:NAME, or module:attribute."
Model = Annotated[str, Field(description=MODEL)]
Agent = Annotated[str, Field(description="self-correcting, conversation, resampling, published, or module:attribute.")]
Reward = Annotated[str, Field(description="execution-match, runs (a control), or module:attribute of your own.")]
QueryTimeout = Annotated[float, Field(ge=0.01, le=LONGEST_QUERY, description="Seconds a query may take, gold or not.")]
SchemaCharacters = Annotated[int, Field(ge=1, description="Characters of schema in a prompt.")]
Profile = Annotated[str, Field(description="laptop or gpu.", exclude=True)]
Run = Annotated[str, Field(description="Name of the run: results/<profile>/<run>/.", exclude=True)]
Results = Annotated[Path, Field(description="Folder of all results.", exclude=True)]
Overwrite = Annotated[bool, Field(description="Discard what the run folder holds.", exclude=True)]
Overrides = Annotated[list[str], Field(description="For verl, passed on unchanged.", json_schema_extra={"flags": []})]
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
Port = Annotated[int, Field(ge=0, le=65535, description="0 takes a free one.")]
Host = Annotated[str, Field(description="Address to listen on; the default is this machine alone.")]


class Settings(BaseModel):
    """Base of all settings: immutable, unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class SchemaConfig(Settings):
    """What prompts show of a database, which never exceeds its budget.

    A command decides what is None by the model (`decided`), and stores that. Where nobody decides, None is off.
    """

    heading: ClassVar = "Schema in prompts"
    table_info_truncate: SchemaCharacters = 2048
    schema_tokens: int | None = Field(None, ge=1, description="Tokens of schema in a prompt, instead of characters.")
    schema_linking: bool | None = Field(
        None, description="Choose what is shown of a larger schema by the question; or else it is cut."
    )
    sample_rows: int | None = Field(
        None, ge=0, le=MOST_ROWS, description="Rows of each table, where there is room; 0 for nano, else 3 by default."
    )
    value_hints: bool | None = Field(
        None, description="Show values that the question names beside their columns; not by default for nano."
    )

    def decided(self, family: str, agent: str = "", trained: Mapping[str, Any] | None = None) -> Self:
        """Return these settings without None: as the policy was trained, else by the family of its prompts.

        The published agent has what it was published with: a cut schema.

        Args:
            family: of the prompts.
            agent: who answers.
            trained: the settings of the training that made the policy, if any.
        """
        rich = family != "nano"
        usual = {"schema_linking": True, "sample_rows": 3 * rich, "value_hints": rich}
        if trained is not None or agent == "published":
            usual = CUT | {name: value for name, value in (trained or {}).items() if name in CUT}
        return self.model_copy(update={name: usual[name] for name in usual if getattr(self, name) is None})


CUT: dict[str, Any] = {"schema_linking": False, "sample_rows": 0, "value_hints": False}
"""What runs had that were stored before these settings: the first tables and nothing beside them."""


class RolloutConfig(SchemaConfig):
    """What shapes one rollout besides the task, the model and the prompts."""

    heading: ClassVar = "Rollout"
    max_turns: int = Field(3, ge=1, description="Queries the agent may write.")
    execution_truncate: int = Field(2048, ge=1, description="Characters of a result in a prompt.")
    strict: bool = Field(True, description="Close the reference evaluator's holes.")
    query_timeout: QueryTimeout = 5.0

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> RolloutConfig:
        """Read them from the section ``sqlbench`` of a training's configuration."""
        return cls(**{name: section[name] for name in cls.model_fields})

    @property
    def limits(self) -> Limits:
        """What every statement of the rollout may use."""
        return Limits(seconds=self.query_timeout)


class SamplingConfig(Settings):
    """How answers are drawn; a model object, or one of ``module:attribute``, samples as it is set itself."""

    heading: ClassVar = "Sampling"
    temperature: float = Field(0.0, ge=0, description="0 is greedy.")
    samples: int = Field(1, ge=1, description="Rollouts per task, for avg@n, pass@k, majority and best of n.")
    seed: int | None = Field(None, description="Of a local model's samples; 0 by default.")
    max_tokens: int | None = Field(None, ge=1, description="Tokens of an answer at most; the model's own by default.")


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


class TrainConfig(Settings):
    """Train with GRPO through verl; resumes from the last checkpoint."""

    run: Run
    overrides: Overrides = []
    profile: Profile = "laptop"
    data: OwnData = None
    model: str | None = Field(None, description="Policy to start from: nano, or a checkpoint folder.")
    recipe: str | None = Field(None, description="Settings between profile and key=value: seed, as the published run.")
    control: str | None = Field(
        None, description="Rewards to learn nothing from: coin flips, or permuted in each task."
    )
    prompts: str | None = Field(None, description="Short for sqlbench.prompts=nano, chat or a .toml file.")
    seed: int | None = Field(None, description="Short for sqlbench.seed=N.")
    query_timeout: float | None = Field(None, description="Short for sqlbench.query_timeout=SECONDS.")
    track: Track = None
    results: Results = RESULTS
    dry_run: bool = Field(False, description="Print the resolved config and what it needs.")
    overwrite: Overwrite = False


class SftConfig(SchemaConfig):
    """Fine-tune a policy on right answers; resumes where it was interrupted."""

    data: Data = POCKET
    run: Run
    model: str = Field("nano", description="Policy to start from: nano, or a checkpoint folder.")
    source: Path | None = Field(None, description="Run whose right rollouts are imitated, instead of gold queries.")
    split: str = Field("train", description="The split whose tasks are used, with either source.")
    steps: int = Field(300, ge=1, description="Optimizer steps.")
    batch_size: int = Field(32, ge=1, description="Answers per step.")
    lr: float = Field(2e-4, ge=0, description="Learning rate of AdamW, constant.")
    seed: int = Field(1, description="Of the order of the answers.")
    profile: Profile = "laptop"
    results: Results = RESULTS
    overwrite: Overwrite = False


class AblateConfig(Settings):
    """Run or resume a grid of trainings and write the accuracy and efficiency tables."""

    overrides: Overrides = []
    profile: Profile = "laptop"
    grid: str | None = Field(None, description="short (default), full or smoke; seed (default of the profile gpu).")
    data: OwnData = None
    run: str | None = Field(None, description="Name of the run; the grid's name by default.")
    only: str | None = Field(None, description="One cell by name, as a dry run lists them.")
    parallel: int = Field(1, ge=1, description="Cells trained at the same time, each with its output in its cell.log.")
    track: Track = None
    results: Results = RESULTS
    dry_run: bool = Field(False, description="Only say what there is to do; with --only, the cell's config and needs.")


class EvolveConfig(RolloutConfig):
    """Rewrite a model's prompts with GEPA and keep what held-out tasks prove better; resumes where interrupted."""

    data: Data = POCKET
    split: str = Field("train", description="The split whose tasks are reflected on or held out.")
    model: Model = "nano"
    reflection: str | None = Field(None, description="Rewrites the prompts: openai:NAME; or else --model.")
    cache: Cache = None
    budget: int = Field(400, ge=1, description="Rollouts to spend; the last rewrite is finished.")
    held_out: int = Field(40, ge=1, description="Tasks that decide which prompts are better.")
    run: Run
    agent: Agent = "self-correcting"
    prompts: str | None = Field(None, description="Prompts to start from if not the model's own.")
    seed: int = Field(0, description="Decides which tasks are held out, and GEPA's choices.")
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
    split: str = Field("headline", description="The split that predictions of a .txt or .json file are of, in order.")
    metrics: Metrics = []
    query_timeout: QueryTimeout = 10.0
    workers: int | None = Field(
        None, ge=1, description="Processes; by default one per core where there are many pairs."
    )


class ExportConfig(Settings):
    """Write the final queries of an evaluation in Spider's form or BIRD's."""

    run: Path = Field(description="Folder of an evaluation.", json_schema_extra={"flags": []})
    out: Path = Field(description="File to write: .txt for Spider's form, .json for BIRD's.")


class NotebooksConfig(Settings):
    """Execute the ordered notebooks and keep them with their results."""

    profile: str = Field(
        "laptop", description="laptop, gpu, or smoke: as laptop, with everything as small as it can be."
    )
    run: Run = "demo"
    only: list[str] = Field([], description="A notebook by number or name; repeatable.")
    parameters: list[str] = Field(
        [],
        description="name=value for the parameters cells; repeatable.",
        json_schema_extra={"flags": ["--parameter", "-p"]},
    )
    folder: Path = Field(Path("notebooks"), description="Where the notebooks are.")
    results: Results = RESULTS
    force: bool = Field(False, description="Run again what is done.")


class EnvConfig(Settings):
    """Serve the task as an OpenEnv environment."""

    data: Data = POCKET
    port: Port = 8000
    host: Host = "127.0.0.1"
    split: str = Field("train", description="Whose tasks are served.")
    model: Model = "nano"
    reward: Reward = "execution-match"
    query_timeout: QueryTimeout = 5.0


class QuestionConfig(RolloutConfig):
    """What questions are asked on, and what answers them."""

    db: str = Field(description="A SQLite, DuckDB, Parquet or CSV file, a folder, or postgresql://...; only ever read.")
    model: Model = "nano"
    agent: Agent = "self-correcting"
    prompts: str | None = Field(None, description="Prompt family or TOML file, if not the model's own.")


class AskConfig(QuestionConfig):
    """Answer one question on a database, step by step."""

    question: str = Field(description="The question.", json_schema_extra={"flags": []})
    verbose: bool = Field(False, description="Show prompts and whole answers.")


class ApiConfig(QuestionConfig):
    """Answer questions on a database over HTTP, as events; SQLBENCH_TOKEN is the token that clients send."""

    port: Port = 8001
    host: Host = "127.0.0.1"
    concurrency: int = Field(4, ge=1, description="Questions at a time.")
    per_client: int = Field(2, ge=1, description="Questions at a time from one address.")
    seconds: float = Field(120.0, gt=0, description="Seconds that a question may take.")
    origin: list[str] = Field([], description="A web page's origin that may ask, as https://example.org; repeatable.")


class RunsConfig(Settings):
    """List runs, the newest first."""

    filter: str = Field("", description="Part of a run's name.", json_schema_extra={"flags": ["--filter"]})
    kind: str | None = Field(None, description="eval, training, sft or evolve.")
    best: bool = Field(False, description="The most accurate first.")
    results: Results = RESULTS


class ShowConfig(Settings):
    """Show the rollouts of a run in the terminal, or one task's step by step."""

    run: Path = Field(description="Folder of a run, as results/laptop/baseline.", json_schema_extra={"flags": []})
    task: str | None = Field(None, description="Only this task, step by step.")
    wrong: bool = Field(False, description="Only wrong rollouts, by cause, with an example of each.")
    verbose: bool = Field(False, description="Show prompts and whole answers; with --wrong, all rollouts.")
    html: Path | None = Field(None, description="Write the inspector's page to this file instead.")
    limit: int = Field(40, ge=1, description="Rollouts to list, of each cause with --wrong.")
    prices: Prices = None


class CompareConfig(Settings):
    """Compare two evaluations over the same tasks, task by task."""

    first: Path = Field(description="Folder of an evaluation.", json_schema_extra={"flags": []})
    second: Path = Field(description="Folder of the other.", json_schema_extra={"flags": []})
    limit: int = Field(20, ge=1, description="Changed tasks to list.")


class ServeConfig(Settings):
    """Serve a policy to any OpenAI client."""

    model: str = Field(description="nano, a checkpoint folder, or the folder of a training run.")
    port: Port = 8000
    host: Host = "127.0.0.1"
    engine: str | None = Field(None, description="vllm or transformers; vllm by default where it is installed.")


class ChatConfig(Settings):
    """Serve the chat as a web page."""

    data: Data = POCKET
    model: Model = "nano"
    port: Port = 8866
    host: Host = "127.0.0.1"
    token: str | None = Field(None, description="What a browser has to know; made up where others reach --host.")
    run: Run = "chat"
    results: Results = RESULTS
    reflection: str | None = Field(None, description="Endpoint for prompt evolution, openai:NAME; or else --model's.")
    agent: Agent = "self-correcting"
    prompts: str | None = Field(None, description="Prompts if not the model's own: nano, chat or a .toml file.")


def takes(model: type[Settings], *positional: str) -> Callable[[Callable[[Any], Result]], Callable[..., Result]]:
    """Let a function of settings be called with their fields instead; the `positional` ones need no name.

    A positional field before a required one has no default in a call. Signature and ``Args`` are what `help` shows.
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
