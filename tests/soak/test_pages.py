"""Twenty open pages of the chat, five of them asking at once, for an hour: memory stays bounded, no kernel is left.

SOAK_SECONDS makes it shorter.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from sqlbench.checks import find_browser
from sqlbench.data.tasks import DataSet
from sqlbench_chat.builtin import BuiltIn
from sqlbench_chat.scripted import ScriptedEndpoint
from sqlbench_chat.server import ABANDONED

SECONDS = float(os.environ.get("SOAK_SECONDS", "3600"))
PAGES, ASKING = 20, 5
WAIT = 400_000
"""Milliseconds after which something that should happen will not; a busy machine is slow."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(SECONDS + 3000)]


@pytest.fixture
def server(pocket: DataSet, tmp_path: Path) -> Iterator[subprocess.Popen]:
    """``sqlbench chat`` with an endpoint that follows a script."""
    endpoint = ScriptedEndpoint(task for task in BuiltIn(pocket.root).tasks() if task.db_id == "shop")
    command = [sys.executable, "-c", "from sqlbench.cli import main; main()", "chat", "--port", "0"]
    command += ["--data", str(pocket.root), "--results", str(tmp_path / "results"), "--model", "openai:scripted"]
    own = {"JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "NO_PROXY": "*", "OPENAI_BASE_URL": endpoint.url}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=os.environ | own, cwd=tmp_path, text=True
        )
    yield process
    process.kill()
    process.wait()
    endpoint.shutdown()


def below(server: subprocess.Popen) -> list[psutil.Process]:
    """The kernels of a server."""
    found = []
    for process in psutil.Process(server.pid).children(recursive=True):
        with suppress(psutil.Error):  # it ends just now
            found += [process] * ("ipykernel_launcher" in process.cmdline())
    return found


def megabytes(server: subprocess.Popen) -> tuple[float, float, float]:
    """Memory of the server, of its largest kernel, and of the browser's largest page."""
    renderers = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            renderers += [process] * ("--type=renderer" in process.cmdline())
    largest = []
    for processes in (below(server), renderers):
        sizes = [0.0]
        for process in processes:
            with suppress(psutil.Error):
                sizes.append(process.memory_info().rss / 1e6)
        largest.append(max(sizes))
    return psutil.Process(server.pid).memory_info().rss / 1e6, *largest


def test_20_pages_5_asking_memory_is_bounded_and_no_kernel_left(server, pocket: DataSet, tmp_path, figures) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if (browser := find_browser()) is None:
        pytest.skip("no Chromium on the PATH")
    address = re.search(r"http://\S+", server.stdout.readline())[0]
    questions = [task.question for task in BuiltIn(pocket.root).benchmark("shop")]
    memory: list[tuple[float, float, float]] = []
    answered = 0
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        context = chromium.new_context()
        context.set_default_timeout(WAIT)
        pages = [context.new_page() for _ in range(PAGES)]
        for page in pages:
            page.bring_to_front()
            page.goto(address, timeout=WAIT)
            page.get_by_text("connected to").wait_for()
            page.get_by_label("database", exact=True).select_option("shop")
            page.get_by_text("connected to shop").wait_for()
        assert PAGES <= len(below(server)) <= PAGES + 1  # and the one kept warm
        end = time.monotonic() + SECONDS
        for turn in itertools.count():
            asking = [pages[(turn * ASKING + i) % PAGES] for i in range(ASKING)]
            for i, page in enumerate(asking):
                page.bring_to_front()  # a tab in the background draws nothing, so nothing can be waited for in it
                page.get_by_placeholder("Ask a question").fill(questions[(turn * ASKING + i) % len(questions)])
                page.get_by_placeholder("Ask a question").press("Enter")
            for i, page in enumerate(asking):
                page.bring_to_front()
                card = page.locator(".sqlbench-card").last
                card.get_by_text(questions[(turn * ASKING + i) % len(questions)]).first.wait_for()
                card.get_by_role("button", name="Retry differently").wait_for()
                card.get_by_role("heading", name=re.compile("^Result: ")).wait_for()
                answered += 1
            memory.append(megabytes(server))
            if time.monotonic() > end and turn >= 2 * PAGES / ASKING:
                break
        chromium.close()
    deadline = time.monotonic() + 2 * ABANDONED + 60
    while (left := len(below(server))) > 1 and time.monotonic() < deadline:
        time.sleep(1)
    assert left <= 1, f"{left} kernels without a page"
    kernels = below(server)
    server.terminate()
    assert server.wait(60) == 0
    assert not psutil.wait_procs(kernels, timeout=30)[1]
    assert (tmp_path / "log").read_text() == ""

    warm = memory[len(memory) // 4]
    most = [max(values) for values in zip(*memory, strict=True)]
    # A browser gives memory back when it likes, so its page has twice as much room.
    rooms = (1.3, 1.3, 2.0)
    assert all(most[i] < room * warm[i] + 40 for i, room in enumerate(rooms)), (warm, most)
    figures.record(
        "load", f"chat, {PAGES} pages for {SECONDS:,.0f} s, {ASKING} asking at once", f"{answered:,} answers"
    )
    for what, first, peak in zip(("the server", "the largest kernel", "the largest page"), warm, most, strict=True):
        figures.record("load", f"memory of {what} after a quarter, and at most", f"{first:.0f} MB, {peak:.0f} MB")
    figures.record("load", "kernels after the pages are closed", f"{left} (kept warm); none after the server")
