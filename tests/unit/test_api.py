"""Questions over HTTP: the events of a rollout, the limits, the token, and a client that leaves."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from sqlbench.agent.trajectory import Completion, Message
from sqlbench.cli import main
from sqlbench.data.tasks import DataSet
from sqlbench_chat.answer import Answerer
from sqlbench_chat.api import LARGEST, LONGEST, create
from sqlbench_chat.settings import ApiConfig

QUESTION = "How many singers are there?"
SQL = "SELECT count(*) FROM singer"


class Scripted:
    """A model whose answer is held back until the test lets it go."""

    name, family = "scripted", "chat"

    def __init__(self, answer: str) -> None:
        self.answer, self.go, self.asked, self.left = answer, threading.Event(), 0, 0

    async def complete(self, messages: list[Message], on_text: Callable[[str], None] | None = None) -> Completion:
        self.asked += 1
        try:
            while not self.go.is_set():
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.left += 1
            raise
        return Completion(text=self.answer)


@contextmanager
def served(pocket: DataSet, model: Any = None, token: str | None = None, **options: Any) -> Iterator[httpx.Client]:
    """A client of a server in this process, on an embedded database."""
    if model is not None:
        options = {"max_turns": 1, **options}  # no check
    settings = ApiConfig(db=str(pocket.root / "database/concert/concert.sqlite"), **options)
    answerer = Answerer(settings)
    answerer.model = model or answerer.model
    server = uvicorn.Server(uvicorn.Config(create(answerer, settings, token), log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with httpx.Client(base_url=url, trust_env=False, timeout=200) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    return [(name, json.loads(data)) for name, data in re.findall(r"^event: (\w+)\ndata: (.*)$", text, re.M)]


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nano_answers_and_every_step_is_an_event(pocket: DataSet) -> None:
    with served(pocket) as client:
        answer = client.post("/api/ask", json={"question": QUESTION})
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        told = events(answer.text)
        first = [name for name, _ in told if name != "text"]
        assert first == ["query", "result", "verdict", "done"] and told[-1][0] == "done"
        pieces = "".join(data["text"] for name, data in told if name == "text" and data["agent"] == "write")
        by_name = dict(told)
        assert by_name["query"] == {"agent": "write", "turn": 1, "sql": SQL, "strategy": None} and SQL in pieces
        assert (by_name["result"]["status"], by_name["result"]["n_rows"]) == ("ok", 1)
        assert by_name["verdict"]["correct"] is True
        done = by_name["done"]
        assert (done["sql"], done["turns"], done["calls"]) == (SQL, 1, 2) and done["result"] == by_name["result"]
        info = client.get("/api/info").json()
        assert (info["database"], info["dialect"], info["model"]) == ("concert", "sqlite", "nano")
        assert "singer" in info["tables"] and info["examples"]
        described = client.get("/openapi.json").json()["paths"]["/api/ask"]["post"]
        assert (
            "text/event-stream" in described["responses"]["200"]["content"] and "`verdict`" in described["description"]
        )


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{}", 422, "body.question: Field required"),
        (b'{"question": ""}', 422, "at least 1 character"),
        (json.dumps({"question": "?" * (LONGEST + 1)}).encode(), 422, f"at most {LONGEST} characters"),
        (b'{"question": "?", "db": "/etc/passwd"}', 422, "body.db: Extra inputs"),
        (b'{"question": ["?"]}', 422, "valid string"),
        (b'{"question": "\\ud83d"}', 422, "unicode"),
        (b'{"question": ', 422, "JSON"),
        (b"\xff\xfe", 4, ""),
        (b" " * (LARGEST + 1), 413, f"Send at most {LARGEST}"),
        (iter([b"{}"]), 411, "Send Content-Length"),
    ],
)
def test_a_bad_request_is_one_clear_error(pocket: DataSet, body: Any, status: int, message: str) -> None:
    with served(pocket, Scripted(SQL)) as client:
        answer = client.post("/api/ask", content=body, headers={"Content-Type": "application/json"})
        assert str(answer.status_code).startswith(str(status)) and list(answer.json()) == ["error"]
        assert message in answer.json()["error"] and "\n" not in answer.json()["error"]
        for path, wanted in (("/api/none", 404), ("/api/ask", 405)):
            answer = client.get(path)
            assert answer.status_code == wanted and list(answer.json()) == ["error"]


def test_a_token_is_asked_for_before_anything_else(pocket: DataSet) -> None:
    model = Scripted(SQL)
    model.go.set()
    with served(pocket, model, token="secret") as client:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            answer = client.post("/api/ask", json={"question": QUESTION}, headers=header)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert "Authorization: Bearer" in answer.json()["error"]
            assert client.get("/api/info", headers=header).status_code == 401
        assert model.asked == 0
        answer = client.post("/api/ask", json={"question": QUESTION}, headers={"Authorization": "Bearer secret"})
        assert events(answer.text)[-1][0] == "done"


def test_without_a_token_only_names_of_this_machine_are_answered(pocket: DataSet) -> None:
    with served(pocket, Scripted(SQL)) as client:
        for host, name in (
            ("elsewhere.example:80", "elsewhere.example"),
            ("[", ""),
            ("127.0.0.1.example", "127.0.0.1."),
        ):
            answer = client.get("/api/info", headers={"Host": host})
            assert answer.status_code == 403 and f"Not a name of this machine: {name}" in answer.json()["error"]
        for host in ("localhost:1", "127.0.0.1", "[::1]:80"):
            assert client.get("/api/info", headers={"Host": host}).status_code == 200


def test_a_page_may_ask_from_an_allowed_origin_only(pocket: DataSet) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    with served(pocket, Scripted(SQL), token="secret", origin=["https://front.example"]) as client:
        for origin, allowed in (("https://front.example", True), ("https://other.example", False)):
            answer = client.options("/api/ask", headers={"Origin": origin, **asks})
            assert ("access-control-allow-origin" in answer.headers) is allowed


def test_questions_at_a_time_are_limited_and_a_client_that_leaves_makes_room(pocket: DataSet) -> None:
    model = Scripted(SQL)
    with served(pocket, model, concurrency=2, per_client=1) as client:
        with client.stream("POST", "/api/ask", json={"question": QUESTION}):
            until(lambda: model.asked == 1)
            refused = client.post("/api/ask", json={"question": QUESTION})
            assert refused.status_code == 429 and "of yours at a time: 1" in refused.json()["error"]
            other = httpx.HTTPTransport(local_address="127.0.0.2")
            third = httpx.HTTPTransport(local_address="127.0.0.3")
            with (
                httpx.Client(base_url=client.base_url, transport=other, timeout=200) as second,
                httpx.Client(base_url=client.base_url, transport=third, timeout=200) as full,
                second.stream("POST", "/api/ask", json={"question": QUESTION}),
            ):
                until(lambda: model.asked == 2)
                refused = full.post("/api/ask", json={"question": QUESTION})
                assert refused.status_code == 503 and "at a time: 2" in refused.json()["error"]
        until(lambda: model.left == 2)  # both rollouts were cancelled
        model.go.set()

        def answered() -> bool:
            return client.post("/api/ask", json={"question": QUESTION}).status_code == 200

        until(answered)


def test_an_answer_that_takes_too_long_or_breaks_ends_in_an_error(pocket: DataSet) -> None:
    model = Scripted(SQL)
    with served(pocket, model, seconds=0.2) as client:
        told = events(client.post("/api/ask", json={"question": QUESTION}).text)
        assert told == [("error", {"error": "No answer in 0.2 s. Ask something simpler, or raise --seconds."})]
        until(lambda: model.left == 1)
    model = Scripted("SELECT nothing FROM nowhere")
    model.go.set()
    with served(pocket, model) as client:
        name, data = events(client.post("/api/ask", json={"question": QUESTION}).text)[-1]
        assert name == "error" and data["error"].startswith("No query that runs after ")


def test_beyond_this_machine_the_command_asks_for_a_token_of_its_own(pocket: DataSet, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sqlbench", "api", "--host", "0.0.0.0", "--port", "0"]
    command += ["--db", str(pocket.root / "database/concert/concert.sqlite")]
    environment = {k: v for k, v in os.environ.items() if k != "SQLBENCH_TOKEN"}
    with (tmp_path / "err").open("w") as err:
        restore = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
        process = subprocess.Popen(command, stderr=err, env=environment, preexec_fn=restore)
        try:
            until(lambda: "/api/ask" in (tmp_path / "err").read_text() or process.poll() is not None)
            said = (tmp_path / "err").read_text()
            token, port = re.search(r"Token of this start: (\S+)\.", said)[1], re.search(r"0\.0\.0\.0:(\d+)", said)[1]
            url = f"http://127.0.0.1:{port}/api/info"
            assert httpx.get(url, trust_env=False, timeout=200).status_code == 401
            header = {"Authorization": f"Bearer {token}"}
            assert httpx.get(url, headers=header, trust_env=False, timeout=200).status_code == 200
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(200) == 130
    assert "Traceback" not in (tmp_path / "err").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--db", "none.sqlite"], "none.sqlite"), (["--host", "256.1.1.1", "--db", "x"], "Cannot listen on 256.1.1.1")],
)
def test_a_server_that_cannot_start_says_so_in_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["api", "--port", "0", *options])
    assert ended.value.code == 1 and re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)
