"""The six replaceable parts of an experiment, and the look-up of a replacement by its name.

A name is one that sqlbench ships, or ``module:attribute`` of your own, looked up in the working directory first.
Configurations hold names: runs resume by them, and the processes of a training resolve them again. A class is called
without arguments. Its object serves all rollouts of its process, several at a time, so the state of one rollout
belongs in local variables. Agents and rewards get a `sqlbench.rollout.RolloutContext`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sqlbench.agent.trajectory import Completion, Message
from sqlbench.errors import PluginError

if TYPE_CHECKING:
    from sqlbench.data.tasks import Task
    from sqlbench.database.types import Limits, QueryResult, Schema
    from sqlbench.rollout import RolloutContext
    from sqlbench.runs import RunFolder


class Model(Protocol):
    """Answers prompts: ``nano``, a checkpoint folder, ``openai:NAME``, or your own."""

    name: str
    """Name shown in tables and stored in run configs."""
    family: str
    """Prompt components that fit it (`sqlbench.agent.prompts.prompts_for`): ``nano`` or ``chat``."""

    async def complete(self, messages: list[Message], on_text: Callable[[str], None] | None = None) -> Completion:
        """Answer one prompt. An exception fails the rollout.

        A method with a third parameter, ``temperature: float | None = None``, can be asked for another answer to the
        same prompt, at that temperature instead of its own. Without it the built-in agents do not sample again. A model
        whose method ``seeded(seed: int)`` returns it sampling from that seed has reproducible samples. A model with a
        method ``count_tokens(text: str) -> int`` counts the schema's tokens, which are estimated otherwise.

        Args:
            messages: the prompt.
            on_text: called on the event loop with each piece of the answer as it is generated.
        """
        ...


class Database(Protocol):
    """Executes read-only statements: a file, a ``postgresql://`` address, or your own.

    Only the database itself can enforce its limits: see `sqlbench.database.engine` for the guarantees.
    """

    name: str
    target: str
    """The database as messages show it."""
    dialect: str
    """``sqlite``, ``postgresql``, ``duckdb``, or another dialect that sqlglot knows."""
    limits: Limits

    def schema(self) -> Schema:
        """Describe the tables."""
        ...

    def refresh(self) -> tuple:
        """Return a value that changes when the content may have changed; it is the cache key of gold results."""
        ...

    def execute(self, sql: str, limits: Limits | None = None) -> QueryResult:
        """Run one statement and return its result, even if it fails; raise only if the database is gone."""
        ...


class Dataset(Protocol):
    """Questions with their gold queries and databases: a data set folder, or your own."""

    def splits(self) -> list[str]:
        """Name the splits. ``headline`` means the attribute of that name, or the only split."""
        ...

    def load(self, split: str) -> list[Task]:
        """Read the tasks of a split, in a fixed order."""
        ...

    def database(self, db_id: str) -> Path | str | Database:
        """Find the database of a task: a file, an address, or an object."""
        ...


class Agent(Protocol):
    """Answers a question about a database: ``self-correcting``, ``resampling``, ``published``, or your own."""

    async def run(self, context: RolloutContext) -> str:
        """Return the final query.

        ``await context.ask(name, messages)`` asks the model and ``await context.execute(sql)`` runs a query; both are
        recorded, limited and shown to observers. An exception of the model or database fails the rollout, even if the
        agent catches it. A sub-agent named ``check`` judges the last query; any other writes the next one.
        """
        ...


class Reward(Protocol):
    """Judges a finished rollout: ``execution-match``, ``runs``, or your own."""

    def __call__(self, task: Task, context: RolloutContext) -> float | Awaitable[float | None] | None:
        """Return a number from 0 to 1, or None where the task cannot be scored; a function may be ``async``.

        Execution match is recorded with it, so accuracies of runs with different rewards can be compared.
        """
        ...


class Trainer(Protocol):
    """Trains a policy: ``verl``, or your own."""

    def fit(self, run: RunFolder, config: Any, tasks: Sequence[Task], validation: Sequence[Task]) -> dict[str, Any]:
        """Train, or continue from what the run folder holds, and return the run's summary.

        Leave a checkpoint in ``<run>/policy`` and one line per step in ``metrics.jsonl``.

        Args:
            run: the folder, open for writing.
            config: verl's resolved configuration with the section ``sqlbench``.
            tasks: training tasks.
            validation: validation tasks.
        """
        ...


BUILT_IN = {
    "agent": {
        "self-correcting": "sqlbench.agent.graph:SelfCorrectingAgent",
        "published": "sqlbench.agent.published:PublishedAgent",
        "conversation": "sqlbench.agent.conversation:ConversationAgent",
        "resampling": "sqlbench.agent.resampling:ResamplingAgent",
    },
    "reward": {"execution-match": "sqlbench.reward:execution_match", "runs": "sqlbench.reward:runs"},
    "trainer": {"verl": "sqlbench_train.launch:VerlTrainer"},
}
"""Names that sqlbench ships. Models, databases and data sets are also named by paths and addresses."""
_REQUIRED = {
    "model": (Model, ["name", "family", "complete"]),
    "database": (Database, ["name", "target", "dialect", "limits", "schema", "refresh", "execute"]),
    "dataset": (Dataset, ["splits", "load", "database"]),
    "agent": (Agent, ["run"]),
    "reward": (Reward, ["__call__"]),
    "trainer": (Trainer, ["fit"]),
}
_ASYNC = {"model": "complete", "agent": "run"}
_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_plugin(name: object) -> bool:
    """Tell ``module:attribute`` from paths, addresses and ``openai:NAME``."""
    text = str(name)
    return (
        bool(_NAME.fullmatch(text))
        and not text.startswith(("openai:", "sqlite:", "duckdb:"))
        and not Path(text).exists()
    )


def load_plugin(kind: str, name: str) -> Any:
    """Return the object of a name, ready for use.

    Args:
        kind: ``model``, ``database``, ``dataset``, ``agent``, ``reward`` or ``trainer``.
        name: one of `BUILT_IN`, or ``module:attribute``.

    Raises:
        PluginError: the name is unknown, its module cannot be imported, or it is of another kind.
    """
    what, built_in = f"Cannot load {kind} '{name}'", BUILT_IN.get(kind, {})
    path, here = built_in.get(name, name), os.getcwd()
    if not _NAME.fullmatch(path):
        raise PluginError(f"{what}: unknown name. Give {' or '.join([*built_in, 'module:attribute'])}.")
    if here not in sys.path:
        sys.path.insert(0, here)
    module, _, attribute = path.partition(":")
    try:
        plugin: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise PluginError(
                f"{what}: no module '{error.name}' in {here} or among the installed packages. Check its name."
            ) from error
        raise PluginError(f"{what}: importing {module} raised {_brief(error)}. Fix the module.") from error
    for part in attribute.split("."):
        if not hasattr(plugin, part):
            close = difflib.get_close_matches(part, dir(plugin), 1)
            advice = f"Did you mean '{close[0]}'?" if close else "Check its name."
            raise PluginError(f"{what}: {module} has no '{part}'. {advice}")
        plugin = getattr(plugin, part)
    if inspect.isclass(plugin):
        try:
            plugin = plugin()
        except Exception as error:
            raise PluginError(
                f"{what}: calling it without arguments raised {_brief(error)}. Name an object instead of the class."
            ) from error
    protocol, names = _REQUIRED[kind]
    if lacking := [required for required in names if not hasattr(plugin, required)]:
        raise PluginError(
            f"{what}: a {type(plugin).__name__} without {', '.join(lacking)} is not one. "
            f"See sqlbench.interfaces.{protocol.__name__}."
        )
    if (method := _ASYNC.get(kind)) and not inspect.iscoroutinefunction(getattr(plugin, method)):
        raise PluginError(f"{what}: its method {method} is not a coroutine. Define it with 'async def'.")
    return plugin


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
