"""One rollout, from a task to a trajectory with a reward; evaluation, training, environment and chat all run it.

A broken model, database, agent or reward never raises: it becomes `Trajectory.error` with reward None, which is counted
apart from a wrong answer (reward 0). Answers that make the next prompt too long are the policy's fault: reward 0, with
a reason of its own. A task known to be unscorable has reward None and a reason, and its rollout did not fail. A gold
query that fails although it ran in the gold audit counts as a broken database.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any, Protocol

from sqlbench.agent.graph import SelfCorrectingAgent
from sqlbench.agent.prompts import Prompts, render_execution, schema_style
from sqlbench.agent.repair import FixedRepair, RepairPolicy
from sqlbench.agent.trajectory import OVERLONG, Execution, Message, Trajectory, Transition
from sqlbench.config import RolloutConfig
from sqlbench.data.tasks import Task
from sqlbench.database.engine import in_thread
from sqlbench.database.linking import estimate_tokens, prompt_schema
from sqlbench.database.types import QueryResult, Schema
from sqlbench.errors import DatabaseError, ModelError, PromptTooLongError
from sqlbench.interfaces import Agent, Database, Model, Reward
from sqlbench.reward import Verdict, execution_match, score_async
from sqlbench.text import clean

SHOWN_ROWS = 20
NO_TEXT = "Allow it more tokens, or turn its thinking off with a request field."
MOST_CALLS = 999
"""Most model calls, and most queries, of one rollout; an agent that makes more fails."""


class RolloutCallback(Protocol):
    """Receives rollout events in order on the event loop. Implementations must be fast and must not raise."""

    def text(self, agent: str, turn: int, piece: str) -> None:
        """Receive a piece of a model's answer."""

    def transition(self, transition: Transition) -> None:
        """Receive a finished model call."""

    def execution(self, execution: Execution, execution_text: str) -> None:
        """Receive an executed query; the text is what the prompts show of it."""


class RolloutFailed(Exception):
    """Something outside the policy broke; the message is ``where: Type: message``."""


@dataclass
class RolloutContext:
    """One rollout: the question, what may be used to answer it, and everything done so far."""

    task: Task
    """Task without its gold query, which only the reward sees."""
    model: Model
    database: Database
    schema: Schema
    """Part of the schema that prompts show; `schema_text` may cut it further."""
    schema_text: str
    """The schema as prompts show it."""
    prompts: Prompts
    config: RolloutConfig
    repair: RepairPolicy | None = None
    observer: RolloutCallback | None = None
    history: list[tuple[str, str]] = field(default_factory=list)
    """Every query so far with the text of its result as prompts show it, those before this rollout first."""
    transitions: list[Transition] = field(default_factory=list)
    executions: list[Execution] = field(default_factory=list)
    sql: str | None = None
    """The query written last; after the rollout the final one."""
    error: str | None = None
    """The failure outside the policy, if any."""
    overlong: bool = False
    """True if the policy's own answers made a prompt too long, which is not a failure."""

    @property
    def takes_temperature(self) -> bool:
        """Tell whether the model accepts another temperature; a model of your own may not."""
        return "temperature" in inspect.signature(self.model.complete).parameters

    async def ask(
        self, agent: str, messages: list[Message], strategy: str | None = None, *, temperature: float | None = None
    ) -> str:
        """Return the model's answer, recorded as a transition of the sub-agent `agent`.

        Args:
            agent: name of the sub-agent.
            messages: the prompt.
            strategy: the repair strategy that the prompt asks for.
            temperature: temperature of this answer; None, or any where the model takes none, is the model's own.
        """
        turn = len(self.executions) + (agent != "check")
        options: dict[str, Any] = {}
        if self.observer is not None:
            options["on_text"] = partial(self.observer.text, agent, turn)
        if temperature is not None and self.takes_temperature:
            options["temperature"] = temperature
        with self.boundary("model", self.transitions):
            completion = await self.model.complete(messages, **options)
            transition = Transition(agent=agent, turn=turn, messages=messages, completion=completion, strategy=strategy)
        self.transitions.append(transition)
        if self.observer is not None:
            self.observer.transition(transition)
        return completion.text

    async def execute(self, sql: str) -> Execution:
        """Run a query and append it to `history`, with the text of its result that prompts show."""
        if not isinstance(sql, str):
            raise TypeError(f"Invalid query: {type(sql).__name__}. Pass a string.")
        self.sql = sql = clean(sql)
        limit = self.config.execution_truncate
        with self.boundary("database", self.executions):
            result = await in_thread(self.database.execute, sql)
            record = record_execution(len(self.executions) + 1, sql, result, limit)
        text = render_execution(record, self.prompts.family, limit, self.schema, self.schema_text)
        self.executions.append(record)
        self.history.append((sql, text))
        if self.observer is not None:
            self.observer.execution(record, text)
        return record

    @contextmanager
    def boundary(self, where: str, done: Sequence[object] = ()) -> Iterator[None]:
        """Attribute an exception of a block to a part of the rollout, and fail the rollout."""
        try:
            if self.error is not None:  # the agent continued after a failure
                raise RolloutFailed(self.error)
            if len(done) >= MOST_CALLS:
                where = "agent"
                raise RuntimeError(f"Too many calls in one rollout: {MOST_CALLS}. Stop the agent earlier.")
            yield
        except RolloutFailed:
            raise
        except Exception as error:
            self.overlong = isinstance(error, PromptTooLongError) and bool(self.transitions)
            self.error = self.error or failure(where, error)
            raise RolloutFailed(self.error) from error


def failure(where: str, error: Exception) -> str:
    """Return the error text of a failed rollout, as its trajectory stores it."""
    return f"{where}: {type(error).__name__}: {' '.join(str(error).split())}"


async def rollout(
    task: Task,
    database: Database,
    model: Model,
    prompts: Prompts,
    config: RolloutConfig,
    repair: RepairPolicy | None = None,
    observer: RolloutCallback | None = None,
    *,
    agent: Agent | None = None,
    reward: Reward = execution_match,
) -> Trajectory:
    """Let an agent answer one task and judge its final query.

    A completion that was cut at the token limit is executed as it is; its `finish_reason` says so.

    Args:
        agent: the self-correcting one by default.
        reward: computes the trajectory's `reward`; execution match is recorded with it.
    """
    started = time.perf_counter()
    context = await run_agent(task, database, model, prompts, config, repair, observer, agent=agent)
    value, verdict = None, Verdict(None, "")
    if context.overlong:
        value, verdict, context.error = 0.0, Verdict(0, OVERLONG), None
    elif context.error is None:
        value, verdict = await judge(task, context, reward)
    failed = context.error is not None
    return Trajectory(
        **_of(task),
        dialect=database.dialect,
        transitions=context.transitions,
        executions=context.executions,
        pred=context.sql,
        reward=None if failed else value,
        match=None if failed or reward is execution_match else verdict.match,
        reason=verdict.reason,
        error=context.error,
        seconds=time.perf_counter() - started,
    )


async def judge(task: Task, context: RolloutContext, reward: Reward = execution_match) -> tuple[float | None, Verdict]:
    """Return the reward of a finished rollout and its execution match; record a failure in the context's `error`."""
    value, verdict = None, Verdict(None, "no_gold")
    try:
        with context.boundary("reward"):
            if task.gold.strip():
                verdict = await score_async(
                    task.gold, context.sql or "", context.database, strict=context.config.strict
                )
                if verdict.match is None and task.scorable:
                    hint = f"Check whether {context.database.target} was changed, or audit the data set again."
                    if verdict.reason == "gold_timeout":
                        hint = f"Raise --query-timeout from {context.config.query_timeout:g} s."
                    raise DatabaseError(f"Gold query of a scorable task failed: {verdict.reason}. {hint}")
            outcome: Any = verdict.match if reward is execution_match else reward(task, context)
            value = _in_range(await outcome if inspect.isawaitable(outcome) else outcome, reward)
    except RolloutFailed:
        pass
    return value, verdict


def _in_range(value: Any, reward: Any) -> float | None:
    if value is None or (isinstance(value, Real) and 0 <= float(value) <= 1):
        return None if value is None else float(value)
    name = getattr(reward, "__qualname__", type(reward).__qualname__)
    raise ValueError(f"Invalid value of the reward {name}: {value!r}. Return a number from 0 to 1, or None.")


async def run_agent(
    task: Task,
    database: Database,
    model: Model,
    prompts: Prompts,
    config: RolloutConfig,
    repair: RepairPolicy | None = None,
    observer: RolloutCallback | None = None,
    start: Sequence[tuple[str, str]] = (),
    *,
    agent: Agent | None = None,
) -> RolloutContext:
    """Let an agent answer a question, which needs no gold query; `error` of the result says what broke, if anything.

    A final query that was not executed yet is executed, so that its result is recorded.

    Args:
        repair: chooses the strategy of each rewrite (`sqlbench.agent.repair`), instead of `config.repair`.
        observer: receives every event as it happens.
        start: earlier queries that did not answer the question, oldest first, each with the text of its result; the
            built-in agent then begins with a rewrite of the last one.
        agent: the self-correcting one by default.
    """
    agent = agent or SelfCorrectingAgent()
    if repair is None and config.repair is not None:
        repair = FixedRepair(config.repair)
    visible = task.model_copy(update={"gold": ""})
    context = RolloutContext(visible, model, database, Schema(()), "", prompts, config, repair, observer, list(start))
    try:
        with context.boundary("schema"):
            how = schema_style(prompts.family), config, getattr(model, "count_tokens", estimate_tokens)
            shown = await in_thread(prompt_schema, database.schema(), database, task.question, *how)
            context.schema, context.schema_text = shown
        with context.boundary("agent"):
            sql = await agent.run(context)
            if context.error is None:
                if not isinstance(sql, str):
                    kind = type(agent).__name__
                    raise TypeError(f"Invalid value of {kind}.run: {type(sql).__name__}. Return the final query.")
                sql = clean(sql)
                if sql not in {execution.sql for execution in context.executions}:
                    await context.execute(sql)
                context.sql = sql
    except RolloutFailed:
        pass
    answers = [transition.completion for transition in context.transitions]
    # A policy in this process that returns no text is wrong; an endpoint that returns none was not measured.
    if context.error is None and answers and all(a.empty and a.sent is not None for a in answers):
        flaws = ", ".join(sorted({a.flaw.removeprefix("empty: ") for a in answers}))
        context.error = failure("model", ModelError(f"No text at all from {model.name}: {flaws}. {NO_TEXT}"))
    return context


def failed_rollout(task: Task, where: str, error: Exception) -> Trajectory:
    """Record a rollout that could not start."""
    return Trajectory(**_of(task), error=failure(where, error))


def _of(task: Task) -> dict[str, str]:
    copied = ("task_id", "db_id", "question", "gold", "hardness", "split")
    return {"task_key": task.key, **{name: str(getattr(task, name)) for name in copied}}


def record_execution(turn: int, sql: str, result: QueryResult, max_chars: int) -> Execution:
    """Record the first rows of a query's result, with cells as JSON values of at most `max_chars` characters."""
    return Execution(
        turn=turn,
        sql=sql,
        status=result.status,
        error=result.error,
        columns=list(result.columns),
        rows=[[_cell(value, max_chars) for value in row] for row in result.rows[:SHOWN_ROWS]],
        n_rows=len(result.rows),
        seconds=result.seconds,
    )


def _cell(value: Any, max_chars: int) -> str | int | float | None:
    if value is None or type(value) is int or (type(value) is float and math.isfinite(value)):
        return value
    if isinstance(value, (bytes, memoryview)):
        return bytes(value[: max_chars // 2 + 1]).hex()[:max_chars]
    return str(value)[:max_chars]
