"""Endpoints that misbehave in every way that was seen or feared: a call ends in time, a run loses nothing.

Each is a real HTTP server on this machine.
"""

from __future__ import annotations

import asyncio
import json
import os
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
        self.sent = request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        self.stream = bool(request.get("stream"))
        check = request["messages"][0]["content"].startswith("check")
        self.text = "THE QUERY IS CORRECT" if check else GOLD
        with self.server.lock:
            self.server.times.append(time.monotonic())
            fault = next(self.server.faults, good)
        fault(self)

    def message(self, finish: str, **message: object) -> bytes:
        """The body of an answer that holds this message, streamed in one piece where that is asked for."""
        head = {"id": "1", "object": "chat.completion" + ".chunk" * self.stream, "created": 1, "model": "m"}
        part = {"delta" if self.stream else "message": {"role": "assistant", "content": None} | message}
        raw = json.dumps(head | {"choices": [{"index": 0, "finish_reason": finish} | part]}).encode()
        return b"data: " + raw + b"\n\n" if self.stream else raw

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
        self.requests: list[dict] = []
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
        (hangs, "No answer within 1 s"),
        (truncated, "No usable chat completion from .*: JSONDecodeError"),
        (empty, "No usable chat completion"),
        (not_utf8, "No usable chat completion from .*: UnicodeDecodeError"),
        (no_such_model, "HTTP 404: .*does not exist.*Check the model's name"),
        (closed, "HTTP 429: .*come back tomorrow"),
    ],
)
def test_what_no_further_try_can_mend_ends_at_once_in_one_line(server, fault, message, streamed):
    server.faults = always(fault)
    with pytest.raises(ModelError, match=message) as caught:
        ask(1.0, [] if streamed else None)
    assert len(server.times) == 1
    assert "\n" not in str(caught.value) and f"127.0.0.1:{server.server_address[1]}" in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize("fault", [failing, breaks_off])
def test_what_may_pass_is_tried_again(server, fault):
    server.faults = iter([fault, fault])
    assert ask().text == GOLD
    assert len(server.times) == 3


def test_the_pause_that_the_endpoint_asks_for_is_kept(server):
    server.faults = iter([busy])
    assert ask().text == GOLD
    assert server.times[1] - server.times[0] >= 1.2


def test_tries_end_at_the_deadline_of_the_call(server):
    server.faults = always(busy)
    with pytest.raises(ModelError, match=r"No answer within 0\.8 s"):
        ask(0.8)


def test_a_broken_connection_is_named(server, monkeypatch):
    server.faults = always(breaks_off)
    with pytest.raises(ModelError, match=r"Cannot reach model 'm' .*peer closed connection"):
        ask(10.0, [])
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(ModelError, match=r"Cannot reach model 'm' .*All connection attempts failed"):
        ask()


def test_a_slow_first_token_is_waited_for(server):
    for pieces in (None, []):
        server.faults = iter([slow])
        assert ask(5.0, pieces).text == GOLD
    assert "".join(pieces) == GOLD


def test_what_came_before_the_hang_was_shown(server):
    server.faults, pieces = always(hangs), []
    with pytest.raises(ModelError, match="No answer within"):
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


# --- what an endpoint does not take ---------------------------------------------------------------------------------


def complaint(message: str, status: int = 400) -> tuple[int, bytes]:
    return status, json.dumps({"error": {"message": message, "type": "invalid_request_error"}}).encode()


OPENAI = {
    "max_tokens": complaint(
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    ),
    "temperature": complaint(
        "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported."
    ),
    "system": complaint("Unsupported value: 'messages[0].role' does not support 'system' with this model."),
}
GATEWAY = {
    "max_tokens": complaint(
        "litellm.UnsupportedParamsError: openai does not support parameters: ['max_tokens'], for model=m. To drop "
        "these, set `litellm.drop_params=True`"
    ),
    "temperature": complaint(
        "litellm.BadRequestError: gpt-5 models don't support temperature=0.0. Only temperature=1 is supported."
    ),
    "system": complaint("ValidationException: This model doesn't support system messages. Try again without them."),
}
STRICT = {
    "max_tokens": complaint("max_tokens: Extra inputs are not permitted"),
    "temperature": (
        422,
        b'{"detail":[{"type":"extra_forbidden","loc":["body","temperature"],"msg":"Extra inputs are not permitted",'
        b'"input":0.0}]}',
    ),
    "system": complaint("Conversation roles must alternate user/assistant/user/assistant/..."),
}
GEMMA = {"system": complaint("System role not supported")}


def only(complaints: dict[str, tuple[int, bytes]]) -> Fault:
    """An endpoint that complains of one thing at a time."""

    def fault(reply: Reply) -> None:
        system = {"system"} & {message["role"] for message in reply.sent["messages"]}
        for name in complaints.keys() & (reply.sent.keys() | system):
            return reply.send(complaints[name][1], complaints[name][0])
        good(reply)

    return fault


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("complaints", [OPENAI, GATEWAY, STRICT, GEMMA])
def test_what_an_endpoint_refuses_is_not_sent_again(server, complaints, streamed):
    server.faults, model = always(only(complaints)), EndpointChatModel("m", max_tokens=77)
    question = [Message(role="system", content="write"), Message(role="user", content="how many?")]
    first = asyncio.run(model.complete(question, [].append if streamed else None))
    assert first.text == GOLD and len(server.requests) == len(complaints) + 1
    second = asyncio.run(model.complete(question, [].append if streamed else None))
    assert second.text == GOLD and len(server.requests) == len(complaints) + 2

    last, limit = server.requests[-1], "max_completion_tokens" if "max_tokens" in complaints else "max_tokens"
    assert last[limit] == first.sent[limit] == second.sent[limit] == 77
    assert ("temperature" in last) == ("temperature" in second.sent) == ("temperature" not in complaints)
    assert last["messages"] == [{"role": "user", "content": "write\n\nhow many?"}] and "system" in second.sent


def test_calls_at_the_same_time_learn_it_a_bounded_number_of_times(server):
    server.faults, model = always(only(OPENAI)), EndpointChatModel("m")
    question = [Message(role="system", content="write"), Message(role="user", content="how many?")]

    async def together() -> list[Completion]:
        return await asyncio.gather(*(model.complete(question) for _ in range(16)))

    assert {answer.text for answer in asyncio.run(together())} == {GOLD}
    assert len(server.requests) <= 16 * (len(OPENAI) + 1)
    learnt = len(server.requests)
    asyncio.run(together())
    assert len(server.requests) == learnt + 16


def test_an_endpoint_that_takes_nothing_is_given_up(server):
    def refuses_all(reply: Reply) -> None:
        names = " ".join(reply.sent.keys() - {"messages", "model", "stream"})
        reply.send(*reversed(complaint(f"not supported: {names} and the system message")))

    server.faults = always(refuses_all)
    with pytest.raises(ModelError, match=r"HTTP 400: .*not supported"):
        ask()
    assert len(server.requests) <= 5


@pytest.mark.parametrize(
    "message",
    [
        "'max_tokens' or 'max_completion_tokens' is too large: 2048. This model's maximum context length is 1000.",
        "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 9 instead.",
        "Invalid prompt",
        '{"echo": {"temperature": 0.0, "max_tokens": 2048}}',
    ],
)
def test_what_is_wrong_with_one_request_teaches_nothing(server, message):
    server.faults, model = iter([lambda reply: reply.send(*reversed(complaint(message)))]), EndpointChatModel("m")
    with pytest.raises(ModelError, match="HTTP 400"):
        asyncio.run(model.complete([Message(role="user", content="?")]))
    assert len(server.requests) == 1
    assert asyncio.run(model.complete([Message(role="user", content="?")])).text == GOLD
    assert server.requests[1] == server.requests[0]


def test_what_did_not_help_is_not_kept(server):
    refusals = [OPENAI["temperature"], complaint("Invalid prompt")]
    server.faults = iter([lambda reply, said=said: reply.send(*reversed(said)) for said in refusals])
    model = EndpointChatModel("m")
    with pytest.raises(ModelError, match="Invalid prompt"):
        asyncio.run(model.complete([Message(role="user", content="?")]))
    assert asyncio.run(model.complete([Message(role="user", content="?")])).text == GOLD
    assert ["temperature" in request for request in server.requests] == [True, False, True]


@pytest.fixture
def request_fields() -> Iterator[dict[str, object]]:
    """Fields of every request, from a file ``.env`` in the working directory."""
    Path(".env").write_text(
        'SQLBENCH_REQUEST={"temperature": null, "max_completion_tokens": 9, "reasoning_effort": "low"}\n'
    )
    yield {"max_completion_tokens": 9, "reasoning_effort": "low"}
    os.environ.pop("SQLBENCH_REQUEST", None)


def test_request_fields_of_the_user_are_sent_as_they_are(server, request_fields):
    assert ask().sent == request_fields
    assert request_fields.items() <= server.requests[0].items()
    assert not server.requests[0].keys() & {"temperature", "max_tokens"}
    # What the user asked for is never dropped in silence.
    server.faults = always(lambda reply: reply.send(*reversed(complaint("reasoning_effort is not supported"))))
    with pytest.raises(ModelError, match="reasoning_effort is not supported"):
        ask()
    assert len(server.requests) == 2


@pytest.mark.parametrize("command", ["eval --run r", "chat", "env"])
@pytest.mark.parametrize(
    "text",
    ["temperature=1", "[1]", '"x"', '{"a": NaN}', '{"a": 1e999}', '{"stream": true}', "[" * 9999, '{"a": "\\ud800"}'],
)
def test_request_fields_that_cannot_be_sent_are_refused_in_one_line(server, capsys, command, text):
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--model", "openai:m", "--request", text])
    err = capsys.readouterr().err
    assert ended.value.code == 1 and err.startswith("error: Invalid request fields: ") and err.count("\n") == 1
    assert len(err) < 300


# --- answers without text -------------------------------------------------------------------------------------------

CALL = {"id": "c", "index": 0, "type": "function", "function": {"name": "run", "arguments": "{}"}}
SILENT = [
    ("stop", {"reasoning_content": "the user wants ..."}, "only reasoning"),
    ("stop", {"reasoning": "the user wants ...", "content": ""}, "only reasoning"),
    ("stop", {"content": "<think>\nthe user wants ...\n</think>\n"}, "no text"),
    ("length", {"reasoning_content": "the user wants ..."}, "thinking cut at the token limit"),
    ("length", {"content": "<think>\nthe user wants ..."}, "thinking cut at the token limit"),
    ("tool_calls", {"tool_calls": [CALL]}, "only a tool call"),
    ("stop", {"refusal": "I cannot help with that."}, "a refusal"),
    ("content_filter", {}, "stopped by a content filter"),
    ("stop", {}, "no text"),
    ("stop", {"content": "  \n"}, "no text"),
]


def saying(finish: str, message: dict) -> Fault:
    return lambda reply: reply.send(reply.message(finish, **message))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("finish", "message", "why"), SILENT)
def test_an_answer_without_text_says_what_it_has_instead(server, finish, message, why, streamed):
    server.faults = iter([saying(finish, message)])
    answer = ask(pieces=[] if streamed else None)
    assert answer.empty and answer.flaw == f"empty: {why}"


@pytest.mark.parametrize("finish", ["length", "LENGTH", "MAX_TOKENS", "model_length"])
def test_an_answer_that_was_cut_is_known_by_any_name(server, finish):
    server.faults = iter([saying(finish, {"content": "SELECT"})])
    assert ask().flaw == "cut at the token limit"


def test_text_beside_reasoning_is_a_whole_answer(server):
    server.faults = iter([saying("stop", {"content": GOLD, "reasoning_content": "hm"})])
    answer = ask()
    assert (answer.text, answer.flaw, answer.finish_reason) == (GOLD, "", "stop")


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
    summary = run(data, timeout=10)
    broken = [t for t in folder(data).trajectories() if t.failed]
    assert (summary.rollouts, summary.failed, summary.score.n) == (TASKS, 6, TASKS - 6)  # the huge answer is one
    assert all(
        " model 'm' at http" in t.error and t.error.startswith("model: ModelError: ") and "\n" not in t.error
        for t in broken
    )
    kept = {t.task_id: t for t in folder(data).trajectories() if not t.failed}
    calls = len(server.times)

    assert run(data, timeout=10).failed == 0
    assert len(server.times) == calls + 6
    after = {t.task_id: t for t in folder(data).trajectories()}
    assert len(after) == TASKS and kept.items() <= after.items()
    with pytest.raises(RunError, match="is already finished"):
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
    says = r"error: Evaluation stopped: \d+ rollouts in a row failed with: .*HTTP 40[04].* rerun the command; .*"
    assert re.fullmatch(says, last), last
    assert len(server.times) < TASKS
    server.faults = always(good)
    assert run(data, max_turns=3, timeout=None, concurrency=4).score.n == TASKS


def test_a_run_goes_on_past_an_outage_that_ends(server, data):
    server.faults = iter([no_such_model] * 6)
    assert (run(data, concurrency=2).failed, run(data).failed) == (6, 0)


def test_a_rollout_without_any_text_is_failed_and_the_headline_says_why(server, data, capsys):
    faults = [saying("stop", {"reasoning_content": "hm"})] * 3 + [saying("stop", {"refusal": "no"})] * 2
    faults.append(saying("length", {"content": "SELECT"}))
    server.faults = iter(faults)
    with pytest.raises(SystemExit) as ended:
        arguments = ["--data", str(data), "--split", "dev", "--model", "openai:m", "--concurrency", "1"]
        options = ["--max-turns", "1", "--prompts", "nano", "--results", str(data.parent / "results")]
        main(["eval", "--run", "run", *arguments, *options])
    assert ended.value.code == 0
    headline = capsys.readouterr().out.splitlines()[0]
    assert headline.startswith(f"openai:m on dev: EX {34 / 35:.1%} ")
    assert headline.endswith(
        "5 failed, 0 unscorable; 3 answers empty: only reasoning; 2 answers empty: a refusal; "
        "1 answer cut at the token limit"
    )
    failed = [t for t in folder(data).trajectories() if t.failed]
    assert len(failed) == 5 and all(t.transitions and t.reward is None for t in failed)
    assert "No text at all from openai:m: only reasoning." in failed[0].error
    summary = folder(data).summary()
    assert summary["flaws"] == {"empty: only reasoning": 3, "empty: a refusal": 2, "cut at the token limit": 1}
    assert run(data).failed == 0


def test_a_rollout_with_some_text_is_scored(server, data):
    """The first answer of one rollout is empty, the query of its second turn is right."""
    server.faults = iter([saying("stop", {"reasoning_content": "hm"}), lambda r: r.send(r.body("no")), good, good])
    summary = run(data, max_turns=3, concurrency=1, limit=1)
    assert (summary.failed, summary.score.correct, summary.flaws) == (0, 1, {"empty: only reasoning": 1})


def test_a_run_of_silence_stops_with_the_reason(server, data):
    server.faults = always(saying("length", {"reasoning_content": "hm"}))
    with pytest.raises(
        ModelError, match=r"8 rollouts in a row failed with: .*thinking cut at the token limit\. Allow it"
    ):
        run(data, concurrency=1)


def test_a_run_keeps_what_was_sent_in_the_end(server, data, monkeypatch):
    server.faults = always(only(OPENAI))
    monkeypatch.setenv("SQLBENCH_REQUEST", '{"reasoning_effort": "low"}')
    summary = run(data, max_tokens=50)
    fields = "max_completion_tokens=50, reasoning_effort='low', system=\"in the user's message\""
    assert summary.sent == {fields: TASKS} and f"\nsent to the endpoint: {fields} ({TASKS} answers)" in summary.text()
    assert folder(data).config()["request"] == {"reasoning_effort": "low"}
    monkeypatch.setenv("SQLBENCH_REQUEST", '{"reasoning_effort": "high"}')
    (folder(data).root / "summary.json").unlink()
    with pytest.raises(RunError, match=r"request\.reasoning_effort was \"low\", is now \"high\""):
        run(data, max_tokens=50)
