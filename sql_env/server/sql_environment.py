"""OpenEnv's side of the episodes.

OpenEnv keeps one environment object for a WebSocket session, but makes a new one for every HTTP request. Episodes
therefore live in `Episodes`, outside both. An HTTP request names one by the id that reset returned, or means the one
that its client (the address it comes from) started last.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import EnvironmentMetadata

import sqlbench
from sql_env.models import SqlAction, SqlObservation, SqlState
from sql_env.server.episodes import Episode, Episodes, RequestError

DESCRIPTION = "Answer questions about a database with one SQL query each; repair the query until its answer is right."


class SqlEnvironment(Environment[SqlAction, SqlObservation, SqlState]):
    """One client's view of the episodes: a WebSocket session, or a single HTTP request, which has a `client`."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, episodes: Episodes, client: str | None = None) -> None:
        super().__init__()
        self._episodes, self._client = episodes, client
        self._order = episodes.order
        self._episode: Episode | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def reset_async(
        self, seed: int | None = None, episode_id: str | None = None, task_id: str | None = None, **unknown: Any
    ) -> SqlObservation:
        """Start an episode.

        Args:
            seed: seed of the order of tasks from here on; without one, a session continues in its order.
            episode_id: name chosen by the caller; it must not be that of another running episode.
            task_id: task to start instead of the next one.
        """
        self._loop = asyncio.get_running_loop()
        if unknown:
            raise RequestError(
                422, f"Unknown argument of reset: {', '.join(sorted(unknown))}. Use seed, episode_id and task_id."
            )
        if seed is not None:
            self._order = self._episodes.shuffled(seed)
        task = next(self._order) if task_id is None else self._episodes.tasks.get(str(task_id))
        if task is None:
            raise RequestError(
                404, f"Unknown task of split {self._episodes.split}: {task_id}. Choose one that /env/tasks lists."
            )
        name = uuid.uuid4().hex if episode_id is None else str(episode_id)
        self._episode = await self._episodes.start(task, name, self._episode, self._client)
        return self._episode.observation()

    async def step_async(
        self, action: SqlAction, timeout_s: float | None = None, episode_id: str | None = None, **unknown: Any
    ) -> SqlObservation:
        """Play one attempt of this session's episode, or of the one named."""
        if not isinstance(episode_id, str | None):  # OpenEnv passes it on with any type
            raise RequestError(422, f"Invalid episode_id: {json.dumps(episode_id)[:60]}. Send a string.")
        episode = self._current(episode_id)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._episodes.attempt(episode, action)
        except TimeoutError as error:
            raise RequestError(
                408, f"Attempt timed out and does not count: {timeout_s:g} s. Allow more time."
            ) from error

    def reset(self, seed: int | None = None, episode_id: str | None = None, **options: Any) -> SqlObservation:
        """Call `reset_async` from a thread without an event loop."""
        return asyncio.run(self.reset_async(seed, episode_id, **options))

    def step(self, action: SqlAction, timeout_s: float | None = None, **options: Any) -> SqlObservation:
        """Call `step_async` from a thread without an event loop, as OpenEnv's page does."""
        work = self.step_async(action, timeout_s, **options)
        if self._loop is not None and self._loop.is_running():  # the model's connections belong to this loop
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        return asyncio.run(work)

    @property
    def state(self) -> SqlState:
        """Return the state of this session's episode."""
        return self._current().state()

    def _current(self, episode_id: str | None = None) -> Episode:
        if episode_id is not None:
            return self._episodes.find(episode_id)
        return self._episode or self._episodes.latest(self._client)

    def get_metadata(self) -> EnvironmentMetadata:
        """Return the metadata that OpenEnv shows."""
        return EnvironmentMetadata(name="sqlbench", description=DESCRIPTION, version=sqlbench.__version__)
