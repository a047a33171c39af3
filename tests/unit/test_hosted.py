"""A model that one process holds for several: its answers, its errors, and an answer that nobody awaits any more."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from sqlbench.agent.trajectory import Completion, Message
from sqlbench.errors import ModelError, PromptTooLongError
from sqlbench_chat.hosted import HostedModel, host

LOG: list[str] = []


class Scripted:
    """Says what it was told, or breaks as it was told."""

    name, family = "scripted", "chat"

    async def complete(self, messages, on_text=None, temperature=None) -> Completion:
        text = messages[-1].content
        if text == "too long":
            raise PromptTooLongError("It is too long.")
        if text == "broken":
            raise ValueError("It is broken.")
        if text == "wait":
            try:
                LOG.append("waits")
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                LOG.append("cancelled")
                raise
        for piece in text.split(","):
            if on_text:
                on_text(piece)
        return Completion(text=text, temperature=temperature)


def hosted(tmp_path: Path, use: Callable[[HostedModel], Awaitable[object]]) -> object:
    async def run() -> object:
        path = str(tmp_path / "model")
        hosting = asyncio.ensure_future(host(path, f"{__name__}:Scripted"))
        try:
            return await use(HostedModel(path, "scripted", "chat"))
        finally:
            hosting.cancel()

    return asyncio.run(run())


def say(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


def test_an_answer_comes_in_pieces_and_whole(tmp_path: Path) -> None:
    pieces: list[str] = []

    async def use(model: HostedModel) -> None:
        whole = await model.complete(say("\u00fc,\u4e2d\n,c"), pieces.append, 0.5)
        assert whole == Completion(text="\u00fc,\u4e2d\n,c", temperature=0.5)
        many = await asyncio.gather(*(model.complete(say(f"{i}" * 99_000)) for i in range(5)))
        assert [m.text[0] for m in many] == list("01234")

    hosted(tmp_path, use)
    assert pieces == ["\u00fc", "\u4e2d\n", "c"]


def test_errors_keep_their_kind(tmp_path: Path) -> None:
    async def use(model: HostedModel) -> None:
        with pytest.raises(PromptTooLongError, match="too long"):
            await model.complete(say("too long"))
        with pytest.raises(ModelError, match="It is broken"):
            await model.complete(say("broken"))

    hosted(tmp_path, use)


def test_an_answer_that_nobody_waits_for_is_given_up(tmp_path: Path) -> None:
    async def use(model: HostedModel) -> None:
        asking = asyncio.ensure_future(model.complete(say("wait")))
        while "waits" not in LOG:
            await asyncio.sleep(0.01)
        asking.cancel()
        while "cancelled" not in LOG:
            await asyncio.sleep(0.01)

    hosted(tmp_path, use)


def test_the_process_says_what_it_cannot_load_and_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    starter = (
        "import sys; from pathlib import Path; from sqlbench_chat.hosted import start_host\n"
        "print(start_host(Path(sys.argv[1]), 'no/such/folder').pid, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", starter, str(tmp_path / "model")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        with pytest.raises(ModelError, match="No checkpoint folder: no/such/folder"):
            asyncio.run(HostedModel(str(tmp_path / "model"), "m", "chat").complete(say("x")))
        process.kill()
    stat = Path(f"/proc/{pid}/stat")
    while stat.exists() and stat.read_text().split()[2] != "Z":  # a test that hangs here has failed
        time.sleep(0.1)
