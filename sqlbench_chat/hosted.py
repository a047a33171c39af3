"""One model shared by several processes: a host process, and a client that calls it over a socket.

Each message is a line of JSON. The socket is a file of this user. The host process ends with its parent.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlbench import errors
from sqlbench.agent.trajectory import Completion, Message
from sqlbench.interfaces import Model

LINE = 1 << 26
"""Maximum size of a message in bytes."""
PATIENCE = 60.0
"""Seconds that a client waits for the host process to open its socket."""


class HostedModel:
    """A model in another process, as a `sqlbench.interfaces.Model`."""

    def __init__(self, path: str, name: str, family: str) -> None:
        self.path, self.name, self.family = path, name, family

    async def complete(
        self,
        messages: list[Message],
        on_text: Callable[[str], None] | None = None,
        temperature: float | None = None,
    ) -> Completion:
        """Answer one prompt; see `sqlbench.interfaces.Model.complete`."""
        reader, writer = await self._open()
        try:
            request = {"messages": [m.model_dump() for m in messages], "temperature": temperature}
            writer.write(json.dumps(request | {"stream": on_text is not None}).encode() + b"\n")
            await writer.drain()
            while line := await reader.readline():
                kind, value = json.loads(line)
                if kind == "completion":
                    return Completion.model_validate(value)
                if kind != "text":
                    raise getattr(errors, kind, errors.ModelError)(value)
                if on_text is not None:
                    on_text(value)
        except OSError as error:
            raise errors.ModelError(f"Lost the model's process: {error}. Start the chat again.") from error
        finally:
            writer.close()
        raise errors.ModelError(f"The model's process ended: {self.name}. Start the chat again.")

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        deadline = asyncio.get_running_loop().time() + PATIENCE
        while True:
            try:
                return await asyncio.open_unix_connection(self.path, limit=LINE)
            except OSError as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise errors.ModelError(
                        f"Cannot reach the model's process: {error.strerror}. Start the chat again."
                    ) from error
                await asyncio.sleep(0.2)


def start_host(path: Path, spec: str) -> subprocess.Popen:
    """Start the host process of a model; it ends when its standard input closes."""
    command = [sys.executable, "-m", "sqlbench_chat.hosted", str(path), spec]
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | {"TQDM_DISABLE": "1"})


async def host(path: str, spec: str) -> None:
    """Serve a model on a socket; requests are accepted at once and wait until the model is loaded."""
    from sqlbench.models import open_model

    loading: asyncio.Future[Model] = asyncio.ensure_future(asyncio.to_thread(open_model, spec))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def send(kind: str, value: Any) -> None:
            writer.write(json.dumps([kind, value]).encode() + b"\n")

        async def answer() -> None:
            try:
                request = json.loads(await reader.readline())
                options = {"on_text": lambda piece: send("text", piece)} if request["stream"] else {}
                if request["temperature"] is not None:
                    options["temperature"] = request["temperature"]
                model = await asyncio.shield(loading)
                done = await model.complete([Message(**m) for m in request["messages"]], **options)
                send("completion", done.model_dump(mode="json"))
            except Exception as error:
                send(type(error).__name__, str(error))
            await writer.drain()

        answering = asyncio.ensure_future(answer())
        gone = asyncio.ensure_future(_gone(reader, answering))
        await asyncio.wait([answering, gone], return_when=asyncio.FIRST_COMPLETED)
        for task in (answering, gone):
            task.cancel()
        writer.close()

    async with await asyncio.start_unix_server(serve, path, limit=LINE) as server:
        await server.serve_forever()


async def _gone(reader: asyncio.StreamReader, answering: asyncio.Future) -> None:
    """Wait until the client has disconnected or is answered."""
    while not reader.at_eof() and not answering.done():
        await asyncio.sleep(0.1)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    asyncio.run(host(*sys.argv[1:]))
