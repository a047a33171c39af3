"""Answers that are kept: of an endpoint that never says the same thing twice."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sqlbench.agent.trajectory import Completion, Message
from sqlbench.data.tasks import Task, write_split
from sqlbench.errors import ModelError
from sqlbench.evaluation import evaluate
from sqlbench.models import open_model
from sqlbench.models.cache import AnswerCache
from sqlbench.models.chat import EndpointChatModel
from sqlbench.runs import RunFolder
from sqlbench.usage import Usage

KEY = "sk-secret-0123456789"


class Server(ThreadingHTTPServer):
    """Numbers its answers; `say` replaces one, and None refuses."""

    daemon_threads = True

    def __init__(self) -> None:
        self.asked, self.say = [], "answer {}"
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                owner.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                text = owner.say and owner.say.format(len(owner.asked))
                message = {"role": "assistant", "content": text}
                body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
                body |= {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
                body |= {"usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}}
                raw = json.dumps(body).encode()
                self.send_response(400 if text is None else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{made.server_address[1]}/v1?token={KEY}")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")
    yield made
    made.shutdown()
    made.server_close()


def model(tmp_path: Path, **options) -> EndpointChatModel:
    return EndpointChatModel("m", **{"cache": tmp_path / "cache", **options})


def ask(one: EndpointChatModel, *questions: str, **options) -> list[str]:
    async def every() -> list[Completion]:
        return [await one.complete([Message(role="user", content=q)], **options) for q in questions]

    return [answer.text for answer in asyncio.run(every())]


def test_a_greedy_request_is_sent_once_and_never_by_another_process(server: Server, tmp_path: Path) -> None:
    assert ask(model(tmp_path), "a", "a", "b") == ["answer 1", "answer 1", "answer 2"]
    assert ask(model(tmp_path), "b", "a") == ["answer 2", "answer 1"] and len(server.asked) == 2
    answer = asyncio.run(model(tmp_path).complete([Message(role="user", content="a")]))
    assert answer.cached and answer.seconds == 0 and answer.prompt_tokens == 7 and answer.sent["temperature"] == 0
    pieces: list[str] = []
    assert ask(model(tmp_path), "a", on_text=pieces.append) == pieces == ["answer 1"]


def test_without_a_folder_every_request_is_sent(server: Server, tmp_path: Path) -> None:
    assert ask(model(tmp_path, cache=None), "a", "a") == ["answer 1", "answer 2"]
    assert not (tmp_path / "cache").exists()


def test_another_request_has_another_answer(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [model(tmp_path), model(tmp_path, max_tokens=5), model(tmp_path, request={"top_p": 0.5})]
    other = EndpointChatModel("other", cache=tmp_path / "cache")
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://localhost:{server.server_address[1]}/v1")
    elsewhere = model(tmp_path)
    assert len({ask(one, "a")[0] for one in (*models, other, elsewhere)}) == 5
    assert len({ask(one, "a")[0] for one in (*models, other, elsewhere)}) == 5 and len(server.asked) == 5


def test_samples_differ_within_a_run_and_repeat_in_the_next(server: Server, tmp_path: Path) -> None:
    def run() -> list[list[str]]:
        base = model(tmp_path, temperature=1.0)
        return [ask(base.numbered(sample), "a", "a", "b") for sample in range(3)]

    first = run()
    assert len({text for some in first for text in some}) == 9, "also the same request, made twice in one sample"
    assert run() == first and len(server.asked) == 9
    greedy = model(tmp_path)  # asked at another temperature for one answer
    assert len({*ask(greedy, "a", "a", temperature=0.7), *ask(greedy, "a")}) == 3


def test_an_answer_that_failed_or_is_empty_is_asked_for_again(server: Server, tmp_path: Path) -> None:
    for bad in (None, " "):
        server.say = bad
        if bad is None:
            with pytest.raises(ModelError):
                ask(model(tmp_path), "a")
        else:
            assert ask(model(tmp_path), "a") == [" "]
        assert not list((tmp_path / "cache").glob("*/*"))
    server.say = "answer {}"
    assert ask(model(tmp_path), "a", "a") == ["answer 3"] * 2


def test_a_damaged_file_is_a_miss_and_no_key_is_in_the_folder(server: Server, tmp_path: Path) -> None:
    ask(model(tmp_path), "a")
    (file,) = (tmp_path / "cache").glob("*/*")
    assert KEY not in file.read_text() and KEY not in file.name
    file.write_text(file.read_text()[:20])
    assert ask(model(tmp_path), "a") == ["answer 2"] and ask(model(tmp_path), "a") == ["answer 2"]


def test_processes_share_a_folder(tmp_path: Path) -> None:
    """Many writers of the same few keys: every reader sees a whole answer or none."""
    code = """if True:
        import sys
        from sqlbench.agent.trajectory import Completion
        from sqlbench.models.cache import AnswerCache
        cache, text = AnswerCache(sys.argv[1]), sys.argv[2] * 20000
        for i in range(200):
            key = AnswerCache.key({"n": i % 3})
            cache.put(key, Completion(text=text))
            found = cache.get(key)
            assert found is not None and len(set(found.text)) == 1 and len(found.text) == 20000, "torn"
        """
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    processes = [subprocess.Popen([*command, letter]) for letter in "ab"]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(list((tmp_path / "cache").glob("*/*"))) == 3, "nothing is left beside the answers"


def test_a_folder_that_cannot_be_written_and_a_model_without_a_cache_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ModelError, match=r"^Cannot write the cache .*file: Not a directory\. Choose another --cache\.$"
    ):
        AnswerCache(tmp_path / "file").put("ab", Completion(text="x"))
    with pytest.raises(ModelError, match="No cache for answers of nano"):
        open_model("nano", cache=tmp_path)


def test_an_evaluation_that_is_repeated_sends_and_pays_nothing(server: Server, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "database/a").mkdir(parents=True)
    with sqlite3.connect(data / "database/a/a.sqlite") as connection:
        connection.execute("CREATE TABLE t (x INTEGER)")
    connection.close()
    about = {"db_id": "a", "gold": "SELECT 1", "split": "dev"}
    write_split(data, "dev", [Task(task_id=str(i), question=f"{i}?", **about) for i in range(3)])
    (data / "dataset.json").write_text('{"name": "t", "headline": "dev"}')
    (tmp_path / "prices.toml").write_text("[prices.m]\nprompt = 1\nresponse = 10\n")
    server.say = "```sql\nSELECT {}\n```"

    def run(name: str) -> tuple[Usage, dict[tuple[str, int], str | None]]:
        options = {"samples": 2, "temperature": 1.0, "max_turns": 1, "results": tmp_path / "results"}
        options |= {"cache": tmp_path / "cache", "prices": tmp_path / "prices.toml"}
        summary = evaluate(data, "dev", "openai:m", name, **options)
        records = RunFolder(tmp_path / "results/laptop" / name).trajectories()
        assert summary.usage is not None
        return summary.usage, {(t.task_id, t.sample): t.pred for t in records}

    first, again = run("first"), run("again")
    assert len(server.asked) == 6 and again[1] == first[1] and len(set(first[1].values())) == 6
    assert first[0].calls["all"].cost == pytest.approx(6 * (7 * 1 + 2 * 10) / 1e6) and first[0].cached == 0
    assert (again[0].calls["all"].cost, again[0].cached, again[0].rollout) == (0.0, 6, None)
