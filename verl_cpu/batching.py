"""Collects concurrent requests into batches of an engine."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verl_cpu.engine import Generation, GenerationRequest, LocalEngine


_Line = list[tuple["GenerationRequest", "asyncio.Future[Generation]"]]
"""Requests that wait on one event loop."""


class BatchedEngine:
    """Collects concurrent requests into large batches and runs them one batch after another in a thread of its own.

    A batch starts when no new request has come for `wait_ms`, or when `max_batch` requests wait. Requests of similar
    prompt length go together. Event loops of several threads may use it; each has batches of its own.
    """

    def __init__(self, engine: LocalEngine, max_batch: int = 256, wait_ms: float = 15.0) -> None:
        self.engine = engine
        self.max_batch = max_batch
        self.wait = wait_ms / 1000
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="local-engine")
        self._lines: dict[asyncio.AbstractEventLoop, tuple[_Line, asyncio.Task[None]]] = {}

    async def generate(self, request: GenerationRequest) -> Generation:
        """Generate the answer to one prompt, in a batch with the other waiting ones.

        Raises:
            EngineError: see `LocalEngine.generate`; only the request at fault gets it.
        """
        loop = asyncio.get_running_loop()
        if loop not in self._lines:
            new: _Line = []
            self._lines[loop] = new, loop.create_task(self._run(loop, new))
        future: asyncio.Future[Generation] = loop.create_future()
        self._lines[loop][0].append((request, future))
        return await future

    async def run(self, function: Any, *args: Any) -> Any:
        """Call a function of the engine between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def _run(self, loop: asyncio.AbstractEventLoop, line: _Line) -> None:
        try:
            while line:
                await self._next_batch(line)
        finally:
            del self._lines[loop]

    async def _next_batch(self, line: _Line) -> None:
        seen = -1
        while seen != len(line) < self.max_batch:
            seen = len(line)
            await asyncio.sleep(self.wait)
        line.sort(key=lambda pair: (len(pair[0].prompt_ids), pair[0].prompt_ids))
        batch, line[:] = line[: self.max_batch], line[self.max_batch :]
        answers = await self.run(self._attempt, [request for request, _ in batch])
        for (_, future), answer in zip(batch, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def _attempt(self, requests: list[GenerationRequest]) -> list[Generation | Exception]:
        try:
            return list(self.engine.generate(requests))
        except Exception as error:
            if len(requests) == 1:
                return [error]
            return [answer for request in requests for answer in self._attempt([request])]
