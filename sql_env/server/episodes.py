"""Episodes of the agent's task: reset gives a question, a step is one attempt, the reward is shaped.

An attempt runs the rollout's own graph for a single query, so prompts, limits and verdicts are those of evaluation
and training. A client learns only whether its query matched gold, never the gold query or its rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from sql_env.models import MAX_ATTEMPTS, Attempt, SqlAction, SqlObservation, SqlState
from sqlbench.agent.prompts import DIALECTS, STRATEGIES, prompts_for, schema_style
from sqlbench.agent.repair import GENERATE, FixedRepair, failure_class, shaped
from sqlbench.agent.trajectory import Completion, Message, is_correct
from sqlbench.config import RolloutConfig
from sqlbench.data.tasks import Task, open_dataset
from sqlbench.database.engine import cached_database, in_thread
from sqlbench.database.linking import estimate_tokens, prompt_schema
from sqlbench.errors import DataError, ServerError, SqlbenchError
from sqlbench.interfaces import Database, load_plugin
from sqlbench.models import open_model
from sqlbench.rollout import judge, run_agent
from sqlbench.text import clean


class RequestError(ServerError):
    """A request that cannot be answered; `status` is its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(clean(message))
        self.status = status


@dataclass(eq=False)
class Episode:
    """One task being worked on."""

    episode_id: str
    task: Task
    database: Database
    schema_text: str
    attempts: list[Attempt] = field(default_factory=list)
    success: bool = False
    client: str | None = None
    used: float = field(default_factory=time.monotonic)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def done(self) -> bool:
        """Return whether it is solved or all attempts are used."""
        return self.success or len(self.attempts) >= MAX_ATTEMPTS

    def observation(self) -> SqlObservation:
        """Return the observation after reset or the last step."""
        last = self.attempts[-1].model_dump(exclude={"strategy"}) | {"success": self.success} if self.attempts else {}
        return SqlObservation(
            **self._facts(),
            dialect=DIALECTS[self.database.dialect],
            schema_text=self.schema_text,
            attempt=len(self.attempts),
            attempts_left=0 if self.done else MAX_ATTEMPTS - len(self.attempts),
            **last,
        )

    def state(self) -> SqlState:
        """Return everything that happened in it."""
        total, steps = sum(a.reward for a in self.attempts), len(self.attempts)
        return SqlState(
            **self._facts(), step_count=steps, attempts=self.attempts, success=self.success, total_reward=total
        )

    def log(self, tag: str, **fields: Any) -> None:
        """Print one structured line, in ASCII; an episode does not depend on anyone reading it."""
        with contextlib.suppress(OSError):
            print(f"[{tag}] {json.dumps({'episode_id': self.episode_id, **fields})}", flush=True)

    def log_end(self, **fields: Any) -> None:
        """Print the line that closes the episode."""
        total = sum(a.reward for a in self.attempts)
        self.log("END", success=self.success, attempts=len(self.attempts), total_reward=total, **fields)

    def _facts(self) -> dict[str, Any]:
        named = {name: getattr(self.task, name) for name in ("task_id", "db_id", "question")}
        return {"episode_id": self.episode_id, "done": self.done, **named}


class _Given:
    """A model that answers with the caller's query, which thus takes the same path through the graph."""

    name = "caller"

    def __init__(self, sql: str, family: str) -> None:
        self.sql, self.family = sql, family

    async def complete(self, messages: list[Message], on_text: object = None) -> Completion:
        return Completion(text=self.sql)


class Episodes:
    """The tasks, the model and all episodes of one server.

    Args:
        data: data set folder.
        split: split whose tasks are served; those that cannot be scored are left out.
        model: model that writes the queries that the caller does not write.
        reward: reward of a query that ends an episode: the built-in one, or ``module:attribute``.
        limit: number of episodes kept; the least recently used is dropped first.
        idle_seconds: time in seconds after which an episode without a step is dropped.
        query_timeout: time limit in seconds of a query, the caller's and the gold one alike.

    Raises:
        DataError: the data set or split does not exist, or has no scorable task.
        ModelError: the model does not exist.
    """

    def __init__(
        self,
        data: str | Path,
        split: str = "train",
        model: str = "nano",
        *,
        reward: str = "execution-match",
        limit: int = 1000,
        idle_seconds: float = 3600.0,
        query_timeout: float = 5.0,
    ) -> None:
        self.dataset, self.split = open_dataset(data), split
        self.tasks = {task.task_id: task for task in self.dataset.load(split) if task.scorable}
        if not self.tasks:
            raise DataError(f"No scorable task in the split: {split} of {data}. Choose another split.")
        self.model, self.reward = open_model(model), load_plugin("reward", reward)
        self.prompts = prompts_for(self.model.family)
        self.config = RolloutConfig(max_turns=1, query_timeout=query_timeout).decided(self.prompts.family)
        self.limit, self.idle_seconds = limit, idle_seconds
        self.order = self.shuffled(0)
        self._kept: dict[str, Episode] = {}  # the most recently used is last
        self._latest: dict[str, Episode] = {}  # by client

    def shuffled(self, seed: int) -> Iterator[Task]:
        """Yield the tasks without end, in an order that depends on the seed alone."""
        random, tasks = Random(seed), list(self.tasks.values())
        while True:
            yield from random.sample(tasks, len(tasks))

    async def start(
        self, task: Task, episode_id: str, instead_of: Episode | None = None, client: str | None = None
    ) -> Episode:
        """Start a new episode under this id, which is then its client's latest; end the one it replaces."""
        try:
            database = cached_database(self.dataset.database(task.db_id), self.config.limits)
            schema = await in_thread(database.schema)
            how = schema_style(self.prompts.family), self.config, getattr(self.model, "count_tokens", estimate_tokens)
            _, text = await in_thread(prompt_schema, schema, database, task.question, *how)
        except SqlbenchError as error:
            raise RequestError(
                503,
                f"Cannot open the database of task {task.task_id}: {str(error).rstrip('.')}. Choose another task_id.",
            ) from error
        self._expire()
        running = self._kept.get(episode_id)
        if running is not None and not running.done and running is not instead_of:
            raise RequestError(
                409, f"Episode is already running: {episode_id}. Choose another episode_id, or leave it out."
            )
        if instead_of is not None:
            self._drop(instead_of)
        episode = Episode(episode_id, task, database, text, client=client)
        if client is not None:
            self._latest[client] = episode
        self._use(episode)
        episode.log("START", task_id=task.task_id, question=task.question, max_attempts=MAX_ATTEMPTS)
        return episode

    def find(self, episode_id: str) -> Episode:
        """Find the episode of this id."""
        self._expire()
        if episode_id not in self._kept:
            raise RequestError(404, f"Unknown or expired episode: {episode_id}. Call reset first.")
        return self._kept[episode_id]

    def latest(self, client: str | None) -> Episode:
        """Find the episode that this client started last."""
        self._expire()
        if client not in self._latest:
            raise RequestError(409, "No episode is running. Call reset first, or give the episode_id of one.")
        return self._latest[client]

    def _use(self, episode: Episode) -> None:
        episode.used = time.monotonic()
        self._kept.pop(episode.episode_id, None)
        self._kept[episode.episode_id] = episode
        self._expire()

    def _expire(self) -> None:
        old = time.monotonic() - self.idle_seconds
        for episode in list(self._kept.values()):
            if episode.used > old and len(self._kept) <= self.limit:
                break
            self._drop(episode)

    def _drop(self, episode: Episode) -> None:
        if self._kept.get(episode.episode_id) is episode:
            del self._kept[episode.episode_id]
            if self._latest.get(episode.client or "") is episode:
                del self._latest[episode.client or ""]
            if not episode.done:
                episode.log_end(abandoned=True)

    async def attempt(self, episode: Episode, action: SqlAction) -> SqlObservation:
        """Play one attempt; it does not count if anything but the query fails."""
        async with episode.lock:
            if self.find(episode.episode_id) is not episode:
                raise RequestError(404, f"Unknown or expired episode: {episode.episode_id}. Call reset first.")
            done = episode.attempts
            _check(episode, action)
            self._use(episode)
            context = await run_agent(
                episode.task,
                episode.database,
                self.model if action.sql is None else _Given(action.sql, self.prompts.family),
                self.prompts,
                self.config,
                repair=FixedRepair(action.strategy) if done else None,
                start=[(a.sql, a.result) for a in done],
            )
            if context.error is not None:
                raise RequestError(502, f"Attempt failed and does not count: {context.error.rstrip('.')}. Try again.")
            value, verdict = await judge(episode.task, context, self.reward)
            if context.error is not None or value is None:
                why = context.error or f"no verdict ({verdict.reason})"
                raise RequestError(503, f"Attempt failed and does not count: {why.rstrip('.')}. Try again.")
            episode.success = bool(is_correct(value, verdict.match))
            classes = [*(a.error_class for a in done), failure_class(context.executions[-1])]
            if episode.success or len(classes) == MAX_ATTEMPTS:
                reward = shaped(classes, value)[-1]
            else:  # the outcome of the next attempt does not change this one's reward
                reward = shaped([*classes, classes[-1]], 0.0)[-2]
            sql, text = context.history[-1]
            result = {"result": text, "error_class": classes[-1], "reward": reward}
            done.append(Attempt(strategy=action.strategy, sql=sql, **result))
            outcome = {"reward": reward, "success": episode.success, "done": episode.done}
            episode.log("STEP", attempt=len(done), action=action.strategy, **outcome)
            if episode.done:
                episode.log_end()
            return episode.observation()


def _check(episode: Episode, action: SqlAction) -> None:
    every, number = (GENERATE, *STRATEGIES), len(episode.attempts) + 1
    allowed = STRATEGIES if episode.attempts else (GENERATE,)
    if action.strategy not in every:
        raise RequestError(422, f"Unknown strategy: {action.strategy}. Choose one of: {', '.join(every)}.")
    if episode.done:
        how = "solved" if episode.success else "not solved"
        raise RequestError(409, f"Episode is done: {episode.episode_id} ({how} in {number - 1} attempts). Call reset.")
    if action.strategy not in allowed:
        raise RequestError(
            422, f"Invalid strategy for attempt {number}: {action.strategy}. Choose {' or '.join(allowed)}."
        )
