"""The agent's task as an OpenEnv environment: reset gives a question, a step is one attempt, the reward is shaped.

An attempt is the rollout's own graph run for a single query, so prompts, limits and verdicts are those of evaluation
and training. What a client sees of gold is whether its query matched, never the gold query or its rows.

OpenEnv keeps one environment object for a WebSocket session, but makes a new one for every HTTP request. Episodes
therefore live in `Episodes`, beside both, and HTTP requests name theirs by the id that reset returned. Nobody logs in:
whoever reaches the port can spend the model's time, which is why the default address is this machine alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from openenv.core.client_types import StepResult
from openenv.core.env_client import EnvClient
from openenv.core.env_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, EnvironmentMetadata, Observation, State
from pydantic import Field, ValidationError

import sqlbench
from sqlbench.agent.prompts import DIALECTS, STRATEGIES, prompts_for, schema_style
from sqlbench.agent.repair import GENERATE, FixedRepair, failure_class, shaped
from sqlbench.agent.trajectory import Completion, Message, Record, is_correct
from sqlbench.config import RolloutConfig
from sqlbench.data.tasks import Task, open_dataset
from sqlbench.database.engine import cached_database, in_thread
from sqlbench.database.schema import schema_text
from sqlbench.errors import DataError, ServerError, SqlbenchError
from sqlbench.interfaces import Database, load_plugin
from sqlbench.models import open_model
from sqlbench.rollout import judge, run_agent
from sqlbench.serve import listen
from sqlbench.text import Text, clean

MAX_ATTEMPTS = 5
MAX_SESSIONS = 100
"""WebSocket sessions at a time."""
DESCRIPTION = "Answer questions about a database with one SQL query each; repair the query until its answer is right."


class SqlAction(Action):
    """One attempt."""

    strategy: Text = Field(json_schema_extra={"enum": [GENERATE, *STRATEGIES]})
    """``generate`` first, then one of the repair strategies."""
    sql: Text | None = None
    """A query of the caller's own; without one the server's model writes it."""


class SqlObservation(Observation):
    """What is known after reset or a step; `reward` and `done` are those of the step."""

    episode_id: str
    """Names the episode in HTTP requests."""
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
    """What the database answered, as the prompts show it."""
    error_class: str = ""
    """How it failed (`sqlbench.agent.repair.POTENTIAL`); ``none`` where it ran and gave rows."""
    success: bool | None = None
    """Whether its answer is right."""


class Attempt(Record):
    """One attempt as the state shows it."""

    strategy: str
    sql: Text
    result: Text
    error_class: str
    reward: float


class SqlState(State):
    """Where an episode stands; without an episode all is empty."""

    task_id: str = ""
    db_id: str = ""
    question: str = ""
    max_attempts: int = MAX_ATTEMPTS
    attempts: list[Attempt] = Field(default_factory=list)
    done: bool = False
    success: bool = False
    total_reward: float = 0.0


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
    used: float = field(default_factory=time.monotonic)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def done(self) -> bool:
        """Whether it was solved or all attempts are used."""
        return self.success or len(self.attempts) >= MAX_ATTEMPTS

    def observation(self) -> SqlObservation:
        """What a client sees after reset or the last step."""
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
        """Everything that happened in it."""
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
    """The caller's query in the model's place, so that it goes the same way through the graph."""

    name = "caller"

    def __init__(self, sql: str, family: str) -> None:
        self.sql, self.family = sql, family

    async def complete(self, messages: list[Message], on_text: object = None) -> Completion:
        return Completion(text=self.sql)


class Episodes:
    """The tasks, the model and all episodes of one server.

    Args:
        data: data set folder.
        split: which of its tasks are served; those that cannot be scored are left out.
        model: writes the queries that the caller does not write.
        reward: what a query that ends an episode is worth; the built-in one, or ``module:attribute``.
        limit: episodes that are kept; the one that was not used for longest goes first.
        idle_seconds: an episode is forgotten after so long without a step.
        query_timeout: seconds that a query may take, the caller's and the gold one alike.

    Raises:
        DataError: there is no such data set or split, or no task in it.
        ModelError: there is no such model.
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
            raise DataError(f"split '{split}' of {data} has no scorable task; choose another split")
        self.model, self.reward = open_model(model), load_plugin("reward", reward)
        self.prompts = prompts_for(self.model.family)
        self.config = RolloutConfig(max_turns=1, query_timeout=query_timeout)
        self.limit, self.idle_seconds = limit, idle_seconds
        self.order = self.shuffled(0)
        self._kept: dict[str, Episode] = {}  # the one used last is last

    def shuffled(self, seed: int) -> Iterator[Task]:
        """The tasks without end, in an order that depends on the seed alone."""
        random, tasks = Random(seed), list(self.tasks.values())
        while True:
            yield from random.sample(tasks, len(tasks))

    async def start(self, task: Task, episode_id: str, instead_of: Episode | None) -> Episode:
        """A new episode under this id; the one it takes the place of ends."""
        try:
            database = cached_database(self.dataset.database(task.db_id), self.config.limits)
            schema = await in_thread(database.schema)
        except SqlbenchError as error:
            raise RequestError(503, f"task {task.task_id} cannot be played: {error}") from error
        text = schema_text(schema, schema_style(self.prompts.family), self.config.table_info_truncate)
        self._expire()
        running = self._kept.get(episode_id)
        if running is not None and not running.done and running is not instead_of:
            raise RequestError(409, f"episode '{episode_id}' is running; choose another episode_id, or leave it out")
        if instead_of is not None:
            self._drop(instead_of)
        episode = Episode(episode_id, task, database, text)
        self._use(episode)
        episode.log("START", task_id=task.task_id, question=task.question, max_attempts=MAX_ATTEMPTS)
        return episode

    def find(self, episode_id: str) -> Episode:
        """The episode of this id."""
        self._expire()
        if episode_id not in self._kept:
            raise RequestError(404, f"no episode '{episode_id}': it never was, or it expired; call reset")
        return self._kept[episode_id]

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
            if not episode.done:
                episode.log_end(abandoned=True)

    async def attempt(self, episode: Episode, action: SqlAction) -> SqlObservation:
        """Play one attempt; where anything but the query fails, it does not count."""
        async with episode.lock:
            if self.find(episode.episode_id) is not episode:
                raise RequestError(404, f"episode '{episode.episode_id}' expired; call reset")
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
                raise RequestError(502, f"the attempt does not count, try again: {context.error}")
            value, verdict = await judge(episode.task, context, self.reward)
            if context.error is not None or value is None:
                why = context.error or f"no verdict is possible now ({verdict.reason})"
                raise RequestError(503, f"the attempt does not count, try again: {why}")
            episode.success = bool(is_correct(value, verdict.match))
            classes = [*(a.error_class for a in done), failure_class(context.executions[-1])]
            if episode.success or len(classes) == MAX_ATTEMPTS:
                reward = shaped(classes, value)[-1]
            else:  # a further attempt follows, and what it brings does not change this one's reward
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
        raise RequestError(422, f"unknown strategy '{action.strategy}'; choose one of: {', '.join(every)}")
    if episode.done:
        how = "solved" if episode.success else "not solved"
        raise RequestError(409, f"episode '{episode.episode_id}' is done ({how} in {number - 1} attempts); call reset")
    if action.strategy not in allowed:
        raise RequestError(422, f"attempt {number} cannot be '{action.strategy}'; choose {' or '.join(allowed)}")


class SqlEnvironment(Environment[SqlAction, SqlObservation, SqlState]):
    """One client's view of the episodes: a WebSocket session, or a single HTTP request."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, episodes: Episodes) -> None:
        super().__init__()
        self._episodes = episodes
        self._order = episodes.order
        self._episode: Episode | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def reset_async(
        self, seed: int | None = None, episode_id: str | None = None, task_id: str | None = None, **unknown: Any
    ) -> SqlObservation:
        """Start an episode.

        Args:
            seed: the order of tasks from here on; without one a session goes on in its order.
            episode_id: a name of the caller's own; it must not be that of another running episode.
            task_id: this task instead of the next one.
        """
        self._loop = asyncio.get_running_loop()
        if unknown:
            raise RequestError(422, f"reset takes seed, episode_id and task_id, not {', '.join(sorted(unknown))}")
        if seed is not None:
            self._order = self._episodes.shuffled(seed)
        task = next(self._order) if task_id is None else self._episodes.tasks.get(str(task_id))
        if task is None:
            raise RequestError(404, f"no task '{task_id}' in split '{self._episodes.split}'; /env/tasks lists them")
        name = uuid.uuid4().hex if episode_id is None else str(episode_id)
        self._episode = await self._episodes.start(task, name, instead_of=self._episode)
        return self._episode.observation()

    async def step_async(
        self, action: SqlAction, timeout_s: float | None = None, episode_id: str | None = None, **unknown: Any
    ) -> SqlObservation:
        """Play one attempt of this session's episode, or of the one named."""
        if not isinstance(episode_id, str | None):  # OpenEnv passes on what came, whatever its type
            raise RequestError(422, f"episode_id is a text, not {json.dumps(episode_id)[:60]}")
        episode = self._episode if episode_id is None else self._episodes.find(episode_id)
        if episode is None:
            raise RequestError(409, "no episode: call reset first; over HTTP send the episode_id that it returned")
        try:
            async with asyncio.timeout(timeout_s):
                return await self._episodes.attempt(episode, action)
        except TimeoutError as error:
            raise RequestError(408, f"no attempt within {timeout_s:g} s; it does not count") from error

    def reset(self, seed: int | None = None, episode_id: str | None = None, **options: Any) -> SqlObservation:
        """`reset_async` for callers without an event loop."""
        return asyncio.run(self.reset_async(seed, episode_id, **options))

    def step(self, action: SqlAction, timeout_s: float | None = None, **options: Any) -> SqlObservation:
        """`step_async` for a thread without an event loop, as OpenEnv's page calls it."""
        work = self.step_async(action, timeout_s, **options)
        if self._loop is not None and self._loop.is_running():  # the model's connections belong to this loop
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        return asyncio.run(work)

    @property
    def state(self) -> SqlState:
        """Where this session's episode stands."""
        return SqlState() if self._episode is None else self._episode.state()

    def get_metadata(self) -> EnvironmentMetadata:
        """What OpenEnv shows of the environment."""
        return EnvironmentMetadata(name="sqlbench", description=DESCRIPTION, version=sqlbench.__version__)


class SqlEnvClient(EnvClient[SqlAction, SqlObservation, SqlState]):
    """Typed client of one WebSocket session: ``async with SqlEnvClient(url)``, or ``with SqlEnvClient(url).sync()``."""

    def _step_payload(self, action: SqlAction) -> dict[str, Any]:
        return action.model_dump()

    def _parse_result(self, payload: dict[str, Any]) -> StepResult[SqlObservation]:
        outcome = {"reward": payload["reward"], "done": payload["done"]}
        return StepResult(observation=SqlObservation(**payload["observation"], **outcome), **outcome)

    def _parse_state(self, payload: dict[str, Any]) -> SqlState:
        return SqlState(**payload)


def create(episodes: Episodes) -> FastAPI:
    """The server's application: OpenEnv's routes, and ``/env/tasks`` and ``/env/info``."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # the page of ENABLE_WEB_INTERFACE=true reports home
    made = create_app(
        lambda: SqlEnvironment(episodes),  # a function: the page takes a `partial` for an environment
        SqlAction,
        SqlObservation,
        env_name="sqlbench",
        max_concurrent_envs=MAX_SESSIONS,
    )
    # OpenEnv's own /state asks a new environment, which has no episode.
    made.router.routes[:] = [route for route in made.router.routes if getattr(route, "path", "") != "/state"]

    @made.get("/state", tags=["State Management"])
    async def state(episode_id: str | None = None) -> SqlState:
        return SqlState() if episode_id is None else episodes.find(episode_id).state()

    @made.get("/env/tasks", tags=["Environment Info"])
    async def tasks() -> list[dict[str, str]]:
        shown = ("task_id", "db_id", "question", "hardness")
        return [{name: getattr(task, name) for name in shown} for task in episodes.tasks.values()]

    @made.get("/env/info", tags=["Environment Info"])
    async def info() -> dict[str, Any]:
        return {
            "name": "sqlbench",
            "version": sqlbench.__version__,
            "description": DESCRIPTION,
            "split": episodes.split,
            "tasks": len(episodes.tasks),
            "model": episodes.model.name,
            "max_attempts": MAX_ATTEMPTS,
            "actions": [GENERATE, *STRATEGIES],
            "action": SqlAction.model_json_schema(),
            "observation": SqlObservation.model_json_schema(),
            "state": SqlState.model_json_schema(),
        }

    async def refuse(request: Request, error: Any) -> Response:
        """Say what is wrong, without repeating what came: FastAPI's own answer breaks on text that is not Unicode."""
        if isinstance(error, RequestError):
            status, detail = error.status, str(error)
        elif isinstance(error, HTTPException):
            status, detail = error.status_code, error.detail
        else:
            status, detail = 422, error.errors()
        if isinstance(detail, list):
            detail = [{name: one[name] for name in ("type", "loc", "msg")} for one in detail]
        return Response(json.dumps({"detail": detail}), status, media_type="application/json")

    for kind in (RequestError, HTTPException, RequestValidationError, ValidationError):
        made.add_exception_handler(kind, refuse)
    return made


def __getattr__(name: str) -> FastAPI:
    """``sqlbench.environment:app``, for ``openenv.yaml``, with settings from the environment."""
    if name != "app":
        raise AttributeError(name)
    get = os.environ.get
    data = get("SQLBENCH_DATA", "data/pocket")
    reward = get("SQLBENCH_REWARD", "execution-match")
    return create(Episodes(data, get("SQLBENCH_SPLIT", "train"), get("SQLBENCH_MODEL", "nano"), reward=reward))


def serve(
    data: str | Path,
    port: int,
    host: str = "127.0.0.1",
    split: str = "train",
    model: str = "nano",
    reward: str = "execution-match",
    query_timeout: float = 5.0,
) -> None:
    """Serve until interrupted; port 0 takes a free one. Standard output carries the episodes' lines and nothing else.

    Raises:
        ServerError: the address is in use or no address of this machine.
        DataError: there is no such data set or split.
        ModelError: there is no such model.
    """
    with listen(host, port) as listener:
        made = create(Episodes(data, split, model, reward=reward, query_timeout=query_timeout))
        print(f"serving {data} on http://{host}:{listener.getsockname()[1]}; Ctrl-C stops", file=sys.stderr, flush=True)
        config = uvicorn.Config(made, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
        # OpenEnv closes sockets once more that the client closed; that is no error.
        logging.getLogger("uvicorn.error").addFilter(
            lambda r: not (r.exc_info and r.exc_info[0] is WebSocketDisconnect)
        )
        uvicorn.Server(config).run(sockets=[listener])
