"""The chat page as a user has it: a real Voila server in front of a real kernel, in Chromium, and no other host."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sqlbench.agent.prompts import STRATEGIES
from sqlbench.data.tasks import DataSet
from sqlbench_chat.builtin import BuiltIn

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(900)]

BROKEN, BESIDE = "SELECT nme FROM nowhere", "SELECT 'something else'"
EVERY_ROW = "SELECT entry_id, amount FROM entry ORDER BY entry_id"
RULE = "Spell every name as the schema does."
WAIT = 400_000
"""Milliseconds; a kernel that loads a model on a busy machine takes its time."""


class Endpoint(ThreadingHTTPServer):
    """An OpenAI-compatible model that writes a word every 50 ms.

    It knows the gold queries, and gives them where its prompt holds a rule, which it adds itself when it is asked to
    improve the prompt. Without the rule it names a table that does not exist, and then answers beside the question.
    """

    daemon_threads = True

    def __init__(self, gold: dict[str, str]) -> None:
        self.gold = gold
        self.users: list[str] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = owner.answer([m["content"] for m in asked["messages"]])
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream" if asked.get("stream") else "application/json")
                self.end_headers()
                base = {"id": "1", "created": 1, "model": "m"}
                if not asked.get("stream"):
                    message = {"role": "assistant", "content": text}
                    choices = [{"index": 0, "finish_reason": "stop", "message": message}]
                    self.wfile.write(json.dumps(base | {"object": "chat.completion", "choices": choices}).encode())
                    return
                for word in re.findall(r"\s*\S+", text):
                    choices = [{"index": 0, "finish_reason": None, "delta": {"content": word}}]
                    chunk = base | {"object": "chat.completion.chunk", "choices": choices}
                    self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                    self.wfile.flush()
                    time.sleep(0.05)
                self.wfile.write(b"data: [DONE]\n\n")

            def log_message(self, *_: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, messages: list[str]) -> str:
        system, user = messages[0], messages[-1]
        if len(messages) == 1 and "lines of JSON" in user:
            return '{"question": "Who has the most money?", "sql": "SELECT full_name FROM customer LIMIT 1"}'
        if "plain sentences" in user:
            return "It is Ada."
        if len(messages) == 1:  # to improve the prompt
            part = re.search(r"of its prompts:\n```\n(.*?)\n```\n\nThis is how", user, re.S)
            assert part is not None
            return f"```\n{part[1]}\n- {RULE}\n```"
        if "You review" in system:
            return "The names are right. THE QUERY IS CORRECT"
        self.users.append(user)
        question = re.search(r"^Question: (.*)$", user, re.M)
        assert question is not None
        right = self.gold.get(question[1], "SELECT full_name FROM customer ORDER BY full_name")
        return f"```sql\n{right if RULE in system else BESIDE if 'An earlier' in system else BROKEN}\n```"


class Lister(Endpoint):
    """Names a table that does not exist, and then selects every row of the one that does."""

    def answer(self, messages: list[str]) -> str:
        if len(messages) == 1:
            return super().answer(messages)
        if "You review" in messages[0]:
            return "Every row, as asked. THE QUERY IS CORRECT"
        return f"```sql\n{EVERY_ROW if 'An earlier' in messages[0] else BROKEN}\n```"


@pytest.fixture
def serve(pocket: DataSet, repo: Path, tmp_path: Path) -> Iterator:
    """Starts ``sqlbench chat`` on the embedded data set; gives its address."""
    servers: list[subprocess.Popen] = []

    def start(*options: str, **environment: str) -> str:
        command = [sys.executable, "-c", "from sqlbench.cli import main; main()", "chat", "--port", "0", *options]
        command += ["--data", str(pocket.root), "--results", str(tmp_path / "results")]
        own = {"JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "NO_PROXY": "*", "PYTHONPATH": str(repo)}
        with (tmp_path / "voila.log").open("wb") as log:
            server = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, env=os.environ | own | environment, cwd=tmp_path, text=True
            )
        servers.append(server)
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+\S*", line)
        assert found, f"{line}{(tmp_path / 'voila.log').read_text()}"
        return found[0]

    start.servers = servers
    yield start
    for server in servers:
        server.terminate()
        try:
            assert server.wait(60) == 0
        finally:
            server.kill()
            server.wait()


@pytest.fixture
def endpoint(pocket: DataSet) -> Iterator[Endpoint]:
    builtin = BuiltIn(pocket.root)
    server = Endpoint({task.question: task.gold for task in builtin.tasks() if task.db_id == "concert"})
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def lister() -> Iterator[Lister]:
    server = Lister({})
    yield server
    server.shutdown()
    server.server_close()


def open_page(page: Page, address: str) -> None:
    page.goto(address, timeout=WAIT)
    page.get_by_text("connected to").wait_for(timeout=WAIT)


def field(page: Page, placeholder: str):
    return page.get_by_placeholder(re.compile(placeholder))


def ask(page: Page, question: str, cards: int) -> None:
    """Ask, and wait until so many answers can be judged."""
    field(page, "Ask a question").fill(question)
    field(page, "Ask a question").press("Enter")
    page.get_by_role("button", name="Retry differently").nth(cards - 1).wait_for(timeout=WAIT)


def test_ask_watch_judge_retry_connect_measure_and_evolve(
    page: Page, serve, endpoint: Endpoint, picture, tmp_path: Path
) -> None:
    requested: set[str] = set()
    page.on("response", lambda response: requested.add(response.url.split("/")[2]))
    address = f"http://127.0.0.1:{endpoint.server_address[1]}/v1"
    open_page(page, serve("--model", "openai:m", OPENAI_BASE_URL=address, OPENAI_API_KEY="none"))
    page.get_by_label("database", exact=True).select_option("concert")
    page.get_by_text("connected to concert").wait_for(timeout=WAIT)
    questions = [q for q in endpoint.gold if "'" not in q][:5]

    # The query comes word by word, its error stays, and the repair names its strategy.
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
            const shown = document.querySelector('.sqlbench .attempt pre');
            if (shown && window.seen.at(-1) !== shown.innerText) window.seen.push(shown.innerText);
        }).observe(document.body, {subtree: true, childList: true, characterData: true}); }"""
    )
    ask(page, questions[0], 1)
    seen = page.evaluate("window.seen")
    growing = [text for text in seen if BROKEN.startswith(text)]
    assert {"SELECT", "SELECT nme", "SELECT nme FROM", BROKEN} <= set(growing), seen
    attempts = page.locator(".sqlbench .attempt")
    assert attempts.count() == 2 and "no such table: nowhere" in attempts.nth(0).inner_text()
    assert attempts.nth(1).locator("code").inner_text() in STRATEGIES
    assert attempts.nth(1).locator("pre").first.inner_text() == BESIDE
    assert page.get_by_role("heading", name=re.compile("^Result: ")).count() == 1
    picture(page, "chat_answer")

    # Wrong, with a remark: kept as it was typed, and counted.
    field(page, "What is wrong").fill("<b>only</b> the newest")
    field(page, "What is wrong").press("Enter")
    page.get_by_text("Marked wrong: <b>only</b> the newest").wait_for(timeout=WAIT)
    kept = [json.loads(x) for x in (tmp_path / "results/laptop/chat/feedback.jsonl").read_text().splitlines()]
    assert (kept[-1]["verdict"], kept[-1]["remark"]) == ("wrong", "<b>only</b> the newest")
    page.get_by_text("1/4 questions to the next evolution").wait_for(timeout=WAIT)

    # Retry: the model sees what was not the answer.
    page.get_by_role("button", name="Retry differently").click()
    page.get_by_text("Marked wrong").wait_for(timeout=WAIT)
    page.get_by_role("button", name="Retry differently").nth(1).wait_for(timeout=WAIT)
    assert BROKEN in endpoint.users[-1] and BESIDE in endpoint.users[-1]

    # Further questions make an evolution due; the prompt changes before one's eyes.
    for number, question in enumerate(questions[1:4], 3):
        ask(page, question, number)
    page.get_by_role("button", name="Correct").last.click()
    page.get_by_text("System prompt, generation 1").wait_for(timeout=WAIT)
    page.locator(".sqlbench ins").get_by_text(RULE).wait_for(timeout=WAIT)
    picture(page, "chat_evolved")
    ask(page, questions[4], 6)
    assert page.locator(".sqlbench-card").last.locator(".attempt").count() == 1  # the rule helps

    # The benchmark of a built-in database.
    page.get_by_role("tab", name="Benchmark").click()
    page.get_by_role("button", name="Run the benchmark").click()
    page.get_by_text("48 of 48 questions").wait_for(timeout=WAIT)
    assert "48 of 48" in page.get_by_role("row", name=re.compile("^overall")).first.inner_text()
    picture(page, "chat_benchmark")

    # Databases of one's own: refused in one line without the password, or connected, drawn, and asked.
    (tmp_path / "notes.txt").write_text("no database " * 100)
    for target, message in {
        "postgresql://me:secret@127.0.0.1:1/x": "Cannot open postgresql://me@127.0.0.1:1/x",
        str(tmp_path / "notes.txt"): "file is not a database",
    }.items():
        field(page, "path.sqlite").fill(target)
        page.get_by_role("button", name="Connect").click()
        page.get_by_text(re.compile(re.escape(message))).wait_for(timeout=WAIT)
        assert page.get_by_text("secret").count() == 0
    with sqlite3.connect(tmp_path / "bank of mine.sqlite") as raw:
        raw.execute("CREATE TABLE customer (customer_id INTEGER PRIMARY KEY, full_name TEXT, money REAL)")
        raw.execute("CREATE TABLE transfer (transfer_id INTEGER PRIMARY KEY, payer INTEGER REFERENCES customer)")
        raw.execute("INSERT INTO customer VALUES (1, 'Ada <Lovelace>', 3.5), (2, 'Bo', 2)")
    field(page, "path.sqlite").fill("bank of mine.sqlite")  # from the folder in which the command was started
    page.get_by_role("button", name="Connect").click()
    page.get_by_text("connected to bank of mine: SQLite, 2 tables, read-only").wait_for(timeout=WAIT)
    assert page.get_by_role("tab").all_inner_texts() == ["Chat", "ER diagram"]
    page.get_by_role("button", name="Who has the most money?").wait_for(timeout=WAIT)  # from the model
    page.get_by_role("tab", name="ER diagram").click()
    diagram = page.locator("svg[aria-label*='bank of mine']")
    diagram.wait_for(timeout=WAIT)
    assert {"customer", "transfer", "full_name"} <= set(diagram.locator("text").all_text_contents())
    assert diagram.bounding_box()["height"] > 100
    picture(page, "chat_diagram")
    page.get_by_role("tab", name="Chat").click()
    page.get_by_role("button", name="Who has the most money?").click()
    page.get_by_role("cell", name="Ada <Lovelace>").wait_for(timeout=WAIT)
    assert all(host.startswith("127.0.0.1") for host in requested)


def test_an_answer_of_more_rows_than_are_kept_is_shown_by_its_first_and_may_be_right(
    page: Page, serve, lister: Lister, picture, tmp_path: Path
) -> None:
    with sqlite3.connect(tmp_path / "ledger.sqlite") as raw:
        raw.execute("CREATE TABLE entry (entry_id INTEGER PRIMARY KEY, amount INTEGER)")
        raw.executemany("INSERT INTO entry VALUES (?, ?)", ((i, 7 * i) for i in range(1, 10_002)))
    address = f"http://127.0.0.1:{lister.server_address[1]}/v1"
    open_page(page, serve("--model", "openai:m", OPENAI_BASE_URL=address, OPENAI_API_KEY="none"))
    field(page, "path.sqlite").fill("ledger.sqlite")
    page.get_by_role("button", name="Connect").click()
    page.get_by_text("connected to ledger").wait_for(timeout=WAIT)
    ask(page, "List every entry.", 1)
    card = page.locator(".sqlbench-card").first
    attempts = card.locator(".attempt")
    assert attempts.count() == 2 and attempts.nth(1).locator("pre").first.inner_text() == EVERY_ROW
    assert "more than 10,000 rows" in attempts.nth(1).inner_text()
    heading = card.get_by_role("heading", name=re.compile("^Result: "))
    assert heading.inner_text() == "Result: more than 10,000 rows, 1 to 20 of 10000 are shown"

    def cells() -> list[str]:
        return card.locator(".sqlbench-result .scroll td").all_inner_texts()

    assert cells() == [str(value) for i in range(1, 21) for value in (i, 7 * i)]
    assert "gave up" not in card.inner_text()
    picture(page, "chat_large")

    # All rows are there: the next page, the other order, a file, and another query by hand.
    card.get_by_role("button", name="More").click()
    card.get_by_text("21 to 40 of 10000").wait_for(timeout=WAIT)
    for _ in range(2):
        card.get_by_role("button", name="amount").click()
        time.sleep(1)
    card.get_by_role("cell", name="70000", exact=True).wait_for(timeout=WAIT)
    with page.expect_download(timeout=WAIT) as saved:
        card.get_by_role("button", name="CSV").click()
    assert saved.value.path().read_text().splitlines()[:2] == ["entry_id,amount", "10000,70000"]
    card.get_by_role("button", name="Edit SQL").click()
    card.get_by_role("textbox", name="SQL to run").fill("SELECT amount * 0.1 AS tenth FROM entry LIMIT 2")
    card.get_by_role("button", name="Run SQL").click()
    card.get_by_text("as edited by hand").wait_for(timeout=WAIT)
    assert cells() == ["0.7", "1.4"]

    # Nothing was learned against the repair, and the verdict rewards it.
    bandit = tmp_path / "results/laptop/chat/bandit.json"
    assert not bandit.exists()
    page.get_by_role("button", name="Correct").click()
    card.get_by_text("Marked right").wait_for(timeout=WAIT)
    (lesson,) = json.loads(bandit.read_text())["lessons"]
    assert lesson["strategy"] == attempts.nth(1).locator("code").inner_text() and lesson["reward"] > 0.5


def kernels(server: subprocess.Popen) -> int:
    """Kernels below the server."""
    below = subprocess.run(["pgrep", "-P", str(server.pid), "-f", "ipykernel"], capture_output=True, text=True).stdout
    return len(below.split())


def test_the_embedded_policy_answers_out_of_the_box_and_the_page_keeps_the_conversation(
    page: Page, serve, picture, tmp_path: Path
) -> None:
    address = serve()
    open_page(page, address)
    assert page.title() == "sqlbench chat"
    page.get_by_label("database", exact=True).select_option("concert")
    page.get_by_text("connected to concert").wait_for(timeout=WAIT)
    page.locator(".sqlbench-examples button").first.click()
    page.get_by_role("button", name="Retry differently").wait_for(timeout=WAIT)
    assert page.locator(".sqlbench .attempt pre").first.inner_text().startswith("SELECT")
    page.get_by_text("prompt evolution is off").wait_for(timeout=WAIT)
    picture(page, "chat_nano")

    # The arrows bring the question back.
    question = page.locator("[data-question]").get_attribute("data-question")
    field(page, "Ask a question").press("ArrowUp")
    assert field(page, "Ask a question").input_value() == question

    # Every field has a name for those who cannot see it, and the page fits a telephone, in the dark too.
    unnamed = "input:not([aria-label], [aria-labelledby]), select:not([aria-label], [aria-labelledby])"
    fields = page.locator(".sqlbench-chat").locator(unnamed).all()
    assert [f.get_attribute("id") for f in fields if f.is_visible() and not f.evaluate("e => e.labels.length")] == []
    page.set_viewport_size({"width": 400, "height": 850})
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 400
    picture(page, "chat_400")
    page.set_viewport_size({"width": 1500, "height": 1000})
    page.emulate_media(color_scheme="dark")
    picture(page, "chat_dark")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark == "rgb(17, 17, 17)"
    page.emulate_media(color_scheme="light")

    # A database that nano does not know.
    with sqlite3.connect(tmp_path / "foreign.sqlite") as raw:
        raw.execute("CREATE TABLE album (album_id INTEGER PRIMARY KEY, title TEXT)")
        raw.execute("INSERT INTO album VALUES (1, 'Blue')")
    field(page, "path.sqlite").fill("foreign.sqlite")
    page.get_by_role("button", name="Connect").click()
    page.get_by_text("was trained on the databases that come with sqlbench").wait_for(timeout=WAIT)
    page.get_by_text(re.compile("Ollama")).wait_for(timeout=WAIT)
    picture(page, "chat_foreign")

    # Reloaded, the page has its conversation; the kernel of the page before ends, and nothing is in the terminal.
    page.reload(timeout=WAIT)
    page.locator("[data-question]").wait_for(timeout=WAIT)
    assert page.locator("[data-question]").get_attribute("data-question") == question
    page.get_by_role("button", name="New").click()
    page.locator("[data-question]").wait_for(state="detached", timeout=WAIT)
    deadline = time.monotonic() + WAIT / 1000
    while kernels(serve.servers[-1]) > 2 and time.monotonic() < deadline:  # this page's, and the one kept warm
        time.sleep(0.5)
    assert kernels(serve.servers[-1]) <= 2
    assert (tmp_path / "voila.log").read_text() == ""


def test_where_others_reach_the_address_a_browser_needs_its_token(page: Page, serve) -> None:
    address = serve("--host", "0.0.0.0")
    token = address.partition("?token=")[2]
    assert len(token) >= 16
    page.goto(address.partition("/?")[0], timeout=WAIT)
    assert page.get_by_text("connected to").count() == 0 and "login" in page.url
    open_page(page, address)


def test_a_page_keeps_its_connection(page: Page, serve, tmp_path: Path) -> None:
    closed: list[str] = []
    page.on("websocket", lambda socket: socket.on("close", lambda _: closed.append(socket.url)))
    open_page(page, serve())
    page.wait_for_timeout(65_000)  # Jupyter pings every 30 s, and closes what has not answered
    assert not closed
    assert (tmp_path / "voila.log").read_text() == ""


def test_no_more_pages_are_open_than_the_limit(page: Page, serve) -> None:
    address = serve("--pages", "1")
    open_page(page, address)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(address, timeout=WAIT / 1000)
    assert refused.value.code == 503
    assert refused.value.read() == b"Too many pages are open: 1. Close one, or start the chat with more --pages."
    page.reload(timeout=WAIT)  # the page before it gives its place back
    deadline = time.monotonic() + WAIT / 1000
    while page.get_by_text("Too many pages").count() and time.monotonic() < deadline:
        time.sleep(1)
        page.reload(timeout=WAIT)
    page.get_by_text("connected to").wait_for(timeout=WAIT)


def test_a_port_that_is_taken_is_one_line(pocket: DataSet) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-c", "from sqlbench.cli import main; main()", "chat", "--port", port]
        done = subprocess.run(
            [*command, "--data", str(pocket.root)], capture_output=True, text=True, timeout=WAIT / 1000
        )
    assert done.returncode == 1
    said = f"error: Cannot listen on 127.0.0.1:{port}: Address already in use. Choose another --port or --host.\n"
    assert done.stderr == said
