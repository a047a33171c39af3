"""Endpoints that misbehave in every way that was seen or feared: a call ends in time, a run loses nothing.

Each is a real HTTP server on this machine.
"""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random

import pytest

from sqlbench.agent.trajectory import Completion, Message
from sqlbench.cli import main
from sqlbench.data.tasks import Task, write_split
from sqlbench.errors import ModelError, RunError
from sqlbench.evaluation import evaluate
from sqlbench.models import chat
from sqlbench.models.chat import EndpointChatModel
from sqlbench.runs import RunFolder

TASKS = 40
GOLD = "SELECT count(*) FROM t"
Fault = Callable[["Reply"], None]


class Reply(BaseHTTPRequestHandler):
    """One request to the server, whose `faults` say what becomes of it."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.stream = bool(request.get("stream"))
        check = request["messages"][0]["content"].startswith("check")
        self.text = "THE QUERY IS CORRECT" if check else GOLD
        with self.server.lock:
            self.server.times.append(time.monotonic())
            fault = next(self.server.faults, good)
        fault(self)

    def body(self, text: str) -> bytes:
        head = {"id": "1", "object": "chat.completion" + ".chunk" * self.stream, "created": 1, "model": "m"}
        if not self.stream:
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            return json.dumps(head | {"choices": [choice]}).encode()
        size = 5 + len(text) // 200
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        choices = [{"index": 0, "finish_reason": None, "delta": {"content": piece}} for piece in pieces]
        choices.append({"index": 0, "finish_reason": "stop", "delta": {}})
        return b"".join(b"data: " + json.dumps(head | {"choices": [c]}).encode() + b"\n\n" for c in choices)

    def send(self, body: bytes, status: int = 200, length: int = 0, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/event-stream" if self.stream else "application/json")
        self.send_header("Content-Length", str(length or len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, *_: object) -> None: ...


def good(reply: Reply) -> None:
    reply.send(reply.body(reply.text))


def failing(reply: Reply) -> None:
    reply.send(b'{"error": {"message": "boom"}}', 500)


def hangs(reply: Reply) -> None:
    body = reply.body(reply.text)
    reply.send(body[: len(body) // 2], length=len(body))
    reply.server.over.wait(20)


def breaks_off(reply: Reply) -> None:
    body = reply.body(reply.text)
    reply.send(body[: len(body) // 2], length=len(body))
    reply.close_connection = True


def slow(reply: Reply) -> None:
    reply.server.over.wait(0.6)
    good(reply)


def busy(reply: Reply) -> None:
    reply.send(b'{"error": {"message": "slow down"}}', 429, Retry_After="1.2")


def closed(reply: Reply) -> None:
    reply.send(b'{"error": {"message": "come back tomorrow"}}', 429, Retry_After="86400")


def truncated(reply: Reply) -> None:
    reply.send(reply.body(reply.text)[:-20] + b"\n\n")


def empty(reply: Reply) -> None:
    reply.send(b'{"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": []}')


def no_such_model(reply: Reply) -> None:
    reply.send(b'{"error": {"message": "The model `m` does not exist"}}', 404)


def huge(reply: Reply) -> None:
    reply.send(reply.body("SELECT '" + "x" * 1_000_000 + "'"))


def not_utf8(reply: Reply) -> None:
    reply.send(reply.body("SELECT 'X'").replace(b"X", b"\xff\xfe"))


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Reply)
        self.faults: Iterator[Fault] = iter(())
        self.times: list[float] = []
        """When each request came."""
        self.lock, self.over = threading.Lock(), threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is what happens here all the time."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}/v1")
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def always(fault: Fault) -> Iterator[Fault]:
    while True:
        yield fault


def ask(timeout: float = 10.0, pieces: list[str] | None = None) -> Completion:
    model = EndpointChatModel("m", timeout=timeout)
    question = [Message(role="system", content="write"), Message(role="user", content="how many?")]
    return asyncio.run(model.complete(question, None if pieces is None else pieces.append))


# --- one call ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (hangs, "did not answer within 1 s"),
        (truncated, "gave no usable chat completion: JSONDecodeError"),
        (empty, "gave no usable chat completion"),
        (not_utf8, "gave no usable chat completion: UnicodeDecodeError"),
        (no_such_model, "HTTP 404: .*does not exist.*check the model's name"),
        (closed, "HTTP 429: .*come back tomorrow"),
    ],
)
def test_what_no_further_try_can_mend_ends_at_once_in_one_line(server, fault, message, streamed):
    server.faults, started = always(fault), time.monotonic()
    with pytest.raises(ModelError, match=message) as caught:
        ask(1.0, [] if streamed else None)
    assert time.monotonic() - started < 3 and len(server.times) == 1
    assert "\n" not in str(caught.value) and f"127.0.0.1:{server.server_address[1]}" in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize("fault", [failing, breaks_off])
def test_what_may_pass_is_tried_again_with_growing_pauses(server, fault):
    server.faults = iter([fault, fault])
    assert ask().text == GOLD
    first, second, third = server.times
    assert 0.2 < second - first < third - second


def test_the_pause_that_the_endpoint_asks_for_is_kept(server):
    server.faults = iter([busy])
    assert ask().text == GOLD
    assert server.times[1] - server.times[0] >= 1.2


def test_tries_end_at_the_deadline_of_the_call(server):
    server.faults, started = always(busy), time.monotonic()
    with pytest.raises(ModelError, match=r"did not answer within 0\.8 s"):
        ask(0.8)
    assert time.monotonic() - started < 2.5


def test_a_broken_connection_is_named(server, monkeypatch):
    server.faults = always(breaks_off)
    with pytest.raises(ModelError, match=r"cannot reach model 'm' .*peer closed connection"):
        ask(10.0, [])
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(ModelError, match=r"cannot reach model 'm' .*All connection attempts failed"):
        ask()


def test_a_slow_first_token_is_waited_for(server):
    for pieces in (None, []):
        server.faults = iter([slow])
        assert ask(5.0, pieces).text == GOLD
    assert "".join(pieces) == GOLD


def test_what_came_before_the_hang_was_shown(server):
    server.faults, pieces = always(hangs), []
    with pytest.raises(ModelError, match="did not answer"):
        ask(1.0, pieces)
    shown = "".join(pieces)
    assert shown and GOLD.startswith(shown) and shown != GOLD


def test_an_answer_without_measure_is_cut(server):
    for pieces in (None, []):
        server.faults = iter([huge])
        answer = ask(20.0, pieces)
        assert len(answer.text) == chat.MAX_CHARS and answer.finish_reason == "length"
    assert "".join(pieces) == answer.text


def test_event_loops_that_come_and_go_leave_nothing_behind(server, capfd):
    model = EndpointChatModel("m")
    for _ in range(4):
        assert asyncio.run(model.complete([Message(role="user", content="?")])).text == GOLD
    del model
    assert capfd.readouterr().err == ""


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "database" / "a").mkdir(parents=True)
    with sqlite3.connect(root / "database" / "a" / "a.sqlite") as connection:
        connection.execute("CREATE TABLE t (x INTEGER)")
        connection.executemany("INSERT INTO t VALUES (?)", [(i,) for i in range(5)])
    connection.close()
    tasks = [Task(task_id=str(i), db_id="a", question=f"{i}?", gold=GOLD, split="dev") for i in range(TASKS)]
    write_split(root, "dev", tasks)
    (root / "dataset.json").write_text("{}")
    return root


def run(data: Path, **options):
    settings = {"prompts": "nano", "max_turns": 1, "timeout": 20, "concurrency": 8} | options
    return evaluate(data, "dev", "openai:m", "run", results=data.parent / "results", **settings)


def folder(data: Path) -> RunFolder:
    return RunFolder(data.parent / "results" / "laptop" / "run")


def test_an_endpoint_that_fails_in_three_of_ten_calls_costs_time_and_no_rollout(server, data):
    random = Random(1)
    server.faults = iter([random.choices([failing, good], [3, 7])[0] for _ in range(400)])
    summary = run(data)
    # Four failures in a row, which nobody tries again, come once in 123 calls.
    assert summary.score.ex == 1.0 and summary.failed <= 4
    assert len(server.times) > TASKS * 1.1
    while summary.failed:
        summary = run(data)
    assert (summary.score.n, summary.score.ex) == (TASKS, 1.0)


def test_failed_rollouts_are_on_record_and_run_again_when_the_run_is_repeated(server, data):
    faults = [truncated, empty, no_such_model, closed, not_utf8, huge, hangs]
    server.faults = iter([fault for fault in faults for fault in (good, good, fault)])
    summary = run(data, timeout=3)
    broken = [t for t in folder(data).trajectories() if t.failed]
    assert (summary.rollouts, summary.failed, summary.score.n) == (TASKS, 6, TASKS - 6)  # the huge answer is one
    assert all("model: ModelError: model 'm' at http" in t.error and "\n" not in t.error for t in broken)
    kept = {t.task_id: t for t in folder(data).trajectories() if not t.failed}
    calls = len(server.times)

    assert run(data, timeout=3).failed == 0
    assert len(server.times) == calls + 6
    after = {t.task_id: t for t in folder(data).trajectories()}
    assert len(after) == TASKS and kept.items() <= after.items()
    with pytest.raises(RunError, match="is finished"):
        run(data)


@pytest.mark.parametrize("alike", [True, False])
def test_a_run_stops_with_one_line_when_nothing_works(server, data, capsys, alike):
    words = iter(range(10_000))
    different = lambda reply: reply.send(json.dumps({"request": f"r{next(words)}"}).encode(), 400)  # noqa: E731
    server.faults = always(no_such_model if alike else different)
    with pytest.raises(SystemExit) as ended:
        arguments = ["--data", str(data), "--split", "dev", "--model", "openai:m", "--concurrency", "4"]
        main(["eval", "--run", "run", "--results", str(data.parent / "results"), "--prompts", "nano", *arguments])
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 1
    assert re.fullmatch(r"error: stopped: \d+ rollouts in a row failed with: .*HTTP 40[04].*same command.*", last), last
    assert len(server.times) < TASKS
    server.faults = always(good)
    assert run(data, max_turns=3, timeout=None, concurrency=4).score.n == TASKS


def test_a_run_goes_on_past_an_outage_that_ends(server, data):
    server.faults = iter([no_such_model] * 6)
    assert (run(data, concurrency=2).failed, run(data).failed) == (6, 0)
