"""An endpoint either answers or ends in one `ModelError` that says what was wrong; nothing hangs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sqlbench.agent.trajectory import Message
from sqlbench.checks import capabilities
from sqlbench.data.tasks import Task, write_split
from sqlbench.errors import ModelError
from sqlbench.evaluation import evaluate
from sqlbench.models import open_model
from sqlbench.models.chat import EndpointChatModel
from sqlbench.runs import RunFolder

ASK = [Message(role="system", content="be brief"), Message(role="user", content="how many singers?")]


def answer(text: str | None, finish: str = "stop") -> dict:
    return {
        "id": "1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14},
    }  # fmt: skip


class Endpoint(ThreadingHTTPServer):
    """A real HTTP server on localhost that answers every request in one way, after some seconds."""

    daemon_threads = True

    def __init__(self, status: int, body: bytes, delay: float, kind: str) -> None:
        self.requests: list[dict] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                owner.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                time.sleep(delay)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@pytest.fixture
def serve(monkeypatch, tmp_path) -> Iterator:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(body: object, status: int = 200, delay: float = 0.0, kind: str = "application/json") -> Endpoint:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        servers.append(Endpoint(status, raw, delay, kind))
        monkeypatch.setenv("OPENAI_BASE_URL", servers[-1].url)
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(**options):
    return asyncio.run(EndpointChatModel("m", **options).complete(ASK))


def test_an_answer_comes_with_text_token_counts_and_finish_reason(serve):
    server = serve(answer("SELECT 1", "length"))
    completion = ask(temperature=0.5, max_tokens=7)
    assert (completion.text, completion.finish_reason) == ("SELECT 1", "length")
    assert (completion.prompt_tokens, completion.response_tokens) == (11, 3)
    request = server.requests[0]
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("m", 0.5, 7)
    assert [m["role"] for m in request["messages"]] == ["system", "user"]


@pytest.mark.parametrize(("temperature", "noted"), [(None, None), (0.5, None), (1.0, 1.0)])
def test_one_call_may_have_another_temperature(serve, temperature, noted):
    server = serve(answer("SELECT 1"))
    completion = asyncio.run(EndpointChatModel("m", temperature=0.5).complete(ASK, temperature=temperature))
    assert server.requests[0]["temperature"] == (noted or 0.5) and completion.temperature == noted


def test_one_model_serves_several_event_loops(serve):
    serve(answer("SELECT 1"))
    model = EndpointChatModel("m")
    assert [asyncio.run(model.complete(ASK)).text for _ in range(3)] == ["SELECT 1"] * 3


def test_an_unpaired_surrogate_in_an_answer_can_be_written_to_disk(serve):
    serve(answer("SELECT '\ud800'"))
    assert ask().text == "SELECT '\ufffd'"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"<html>hello</html>", 200, "No usable chat completion"),
        (b"", 200, "No usable chat completion"),
        ({"choices": []}, 200, "No usable chat completion"),
        ({"choices": None}, 200, "No usable chat completion"),
        ({"hello": 1}, 200, "No usable chat completion"),
        ([1, 2], 200, "No usable chat completion"),
        ({"error": {"message": "no such model"}}, 404, "HTTP 404.*Check the model's name"),
        ({"error": {"message": "bad key"}}, 401, "HTTP 401.*Check OPENAI_API_KEY"),
        ({"detail": "Server is pinned to 'x'"}, 400, "HTTP 400.*pinned"),
    ],
)
def test_garbage_and_refusals_are_model_errors_that_name_the_endpoint(serve, body, status, message):
    server = serve(body, status)
    with pytest.raises(ModelError, match=message) as caught:
        ask()
    assert server.url in str(caught.value) and "\n" not in str(caught.value)


def chunk(text: str | None, finish: str | None = None) -> bytes:
    choice = {"index": 0, "finish_reason": finish, "delta": {} if text is None else {"content": text}}
    body = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return f"data: {json.dumps(body)}\n\n".encode()


def test_an_answer_is_streamed_piece_by_piece(serve):
    words = ["SELECT", " name", " FROM", " singer"]
    server = serve(b"".join([*map(chunk, words), chunk(None, "length"), b"data: [DONE]\n\n"]), kind="text/event-stream")
    pieces: list[str] = []
    result = asyncio.run(EndpointChatModel("m").complete(ASK, pieces.append))
    assert pieces == words
    assert (result.text, result.finish_reason) == ("SELECT name FROM singer", "length")
    assert server.requests[0]["stream"] is True


def test_half_an_emoji_in_a_stream_waits_for_its_other_half(serve):
    words = ["SELECT '\ud83d", "\ude00", "\ud83d", "x", "\ud83d"]
    serve(b"".join([*map(chunk, words), chunk(None, "stop"), b"data: [DONE]\n\n"]), kind="text/event-stream")
    pieces: list[str] = []
    result = asyncio.run(EndpointChatModel("m").complete(ASK, pieces.append))
    assert pieces == ["SELECT '", "\U0001f600", "\ufffdx", "\ufffd"]
    assert result.text == "".join(pieces)


def test_a_stream_that_breaks_off_or_says_nothing_is_a_model_error(serve):
    for body in (chunk("SELECT") + b"data: {broken\n\n", b"data: [DONE]\n\n"):
        serve(body, kind="text/event-stream")
        with pytest.raises(ModelError, match="No usable chat completion"):
            asyncio.run(EndpointChatModel("m").complete(ASK, lambda piece: None))


def test_a_refused_connection_says_what_to_check(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(ModelError, match=r"Cannot reach model 'm' at http://127.0.0.1:9/v1.*OPENAI_BASE_URL"):
        ask()


def test_a_hanging_endpoint_ends_at_the_deadline(serve):
    serve(answer("late"), delay=5)
    with pytest.raises(ModelError, match=r"No answer within 0\.5 s"):
        ask(timeout=0.5)


def test_address_and_key_may_come_from_a_dotenv_file(serve, monkeypatch):
    server = serve(answer("SELECT 1"))
    Path(".env").write_text(f"OPENAI_BASE_URL={server.url}\nOPENAI_API_KEY=k\n")
    monkeypatch.delenv("OPENAI_BASE_URL")
    try:
        assert ask().text == "SELECT 1"
    finally:
        monkeypatch.setenv("OPENAI_API_KEY", "")  # what the file set is undone with the fixture


def test_a_dotenv_file_that_is_no_text_is_one_line(serve, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path(".env").write_bytes("# für mich\n".encode("latin-1"))
    with pytest.raises(ModelError, match=r"Cannot read .*\.env: .*Save it as UTF-8"):
        open_model("openai:m")
    missing = capabilities(tmp_path).set_index("to")["missing"]
    assert "in UTF-8" in missing["use a model behind an endpoint"]


def test_without_address_and_key_nothing_is_called(serve, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ModelError, match="Set OPENAI_API_KEY, or OPENAI_BASE_URL"):
        open_model("openai:m")


def test_an_unknown_model_is_refused_with_what_is_possible():
    with pytest.raises(ModelError, match="No checkpoint folder: no/such/model"):
        open_model("no/such/model")
    with pytest.raises(ModelError, match="No model named: openai:"):
        open_model("openai:")


@pytest.fixture
def served_nano(tmp_path, monkeypatch) -> Iterator[str]:
    """The embedded policy behind a real OpenAI-compatible server; gives the model's name there."""
    from pocket import NANO_PATH

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(NANO_PATH)]
    options = ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)}
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen([*command, *options], env=environment, stdout=log, stderr=log)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            assert server.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
            time.sleep(0.2)
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield str(NANO_PATH)
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_a_served_checkpoint_gives_the_verdicts_of_the_same_checkpoint_in_this_process(served_nano, tmp_path):
    root = tmp_path / "data"
    (root / "database" / "concert").mkdir(parents=True)
    with sqlite3.connect(root / "database" / "concert" / "concert.sqlite") as connection:
        connection.execute("CREATE TABLE singer (singer_id INTEGER PRIMARY KEY, name TEXT, country TEXT, age INTEGER)")
        connection.executemany("INSERT INTO singer VALUES (?, ?, ?, ?)", [(i, f"S{i}", "FI", 20 + i) for i in range(9)])
    questions = {
        "How many singers are there?": "SELECT count(*) FROM singer",
        "What is the average age of all singers?": "SELECT avg(age) FROM singer",
        "List the names of all singers.": "SELECT name FROM singer",
        "Which countries are singers from?": "SELECT DISTINCT country FROM singer",
    }
    tasks = [
        Task(task_id=str(i), db_id="concert", question=question, gold=gold, split="dev")
        for i, (question, gold) in enumerate(questions.items())
    ]
    write_split(root, "dev", tasks)
    (root / "dataset.json").write_text("{}")

    for run, model in (("here", "nano"), ("served", f"openai:{served_nano}")):
        evaluate(root, "dev", model, run, results=tmp_path, prompts="nano", max_tokens=64, max_turns=2, concurrency=2)
    here, served = (
        {t.task_id: (t.pred, t.reward, t.reason, t.error) for t in RunFolder(tmp_path / "laptop" / run).trajectories()}
        for run in ("here", "served")
    )
    assert here == served and len(here) == len(tasks)
