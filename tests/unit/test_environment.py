"""The OpenEnv server: episodes over HTTP and WebSocket that do not mix, and gold that never leaves it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from sql_env import SqlAction, SqlEnvClient, SqlObservation
from sql_env.server.episodes import Episodes, RequestError
from sql_env.server.sql_environment import SqlEnvironment
from sqlbench.agent.prompts import STRATEGIES
from sqlbench.cli import main
from sqlbench.data.tasks import DataSet, Task
from sqlbench.database.engine import open_database

SQLBENCH = [sys.executable, "-c", "from sqlbench.cli import main; main()"]
SPLIT = "dev_seen_pretrain"
WRONG = "SELECT 'wrong'"


def mark(question: str) -> str:
    return "Q" + hashlib.sha256(question.encode()).hexdigest()[:8]


class Model(ThreadingHTTPServer):
    """An OpenAI-compatible model: its query names the question it was asked, and how many queries came before."""

    daemon_threads = True

    def __init__(self) -> None:
        self.prompts: list[str] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                messages = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
                prompt = messages[-1]["content"]
                owner.prompts.append(prompt)
                question = re.search(r"^Question: (.*)$", prompt, re.M)[1]
                text = f"```sql\nSELECT '{mark(question)}', {prompt.count('```sql')}\n```"
                time.sleep(0.01 + 0.03 * (len(owner.prompts) % 3))
                answer = {"role": "assistant", "content": text}
                body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
                body |= {"choices": [{"index": 0, "finish_reason": "stop", "message": answer}]}
                raw = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


@dataclass
class Server:
    url: str
    out: Path
    tasks: list[Task]
    model: Model
    seen: list[str] = field(default_factory=list)
    """Every response body."""

    def call(self, path: str, body: dict | None = None) -> tuple[int, dict]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=200) as response:
                status, text = response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        self.seen.append(text)
        return status, json.loads(text)

    def reset(self, **options: object) -> dict:
        status, answer = self.call("/reset", options)
        assert status == 200, answer
        return answer["observation"]

    def step(self, episode: str, strategy: str, sql: str | None = None) -> dict:
        status, answer = self.call("/step", {"action": {"strategy": strategy, "sql": sql}, "episode_id": episode})
        assert status == 200, answer
        return answer

    def lines(self, episode: str) -> list[tuple[str, dict]]:
        found = [re.fullmatch(r"\[(START|STEP|END)\] (\{.*\})", line) for line in self.out.read_text().splitlines()]
        assert all(found), self.out.read_text()
        parsed = [(m[1], json.loads(m[2])) for m in found if m]
        return [(tag, line) for tag, line in parsed if line["episode_id"] == episode]


@pytest.fixture(scope="module")
def server(pocket: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, model = tmp_path_factory.mktemp("server"), Model()
    address = f"http://127.0.0.1:{model.server_address[1]}/v1"
    # With OpenEnv's own page, as `openenv push` has it, and a standard output that knows few letters.
    environment = os.environ | {"OPENAI_BASE_URL": address, "NO_PROXY": "*", "ENABLE_WEB_INTERFACE": "true"}
    environment |= {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    command = [*SQLBENCH, "env", "--data", str(pocket.root), "--port", "0", "--split", SPLIT, "--model", "openai:m"]
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        # A background job of a shell has Ctrl-C ignored, and hands that down.
        restore = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=err, cwd=folder, preexec_fn=restore)
    try:
        deadline = time.monotonic() + 200
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", (folder / "err").read_text())):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "err").read_text()
            time.sleep(0.1)
        tasks = [task for task in pocket.load(SPLIT) if task.scorable]
        yield Server(found[0], folder / "out", tasks, model)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(200) == 130, "Ctrl-C must end the server"
        finally:
            process.kill()
            model.shutdown()
            model.server_close()


def test_openenv_accepts_the_server(server):
    command = [sys.executable, "-m", "openenv.cli", "validate", "--url", server.url, "--timeout", "60"]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    report = json.loads(shown.stdout)
    assert report["passed"] and report["mode"] == "simulation" and not report["summary"]["failed_criteria"]


def test_openenv_accepts_the_folder(repo):
    command = [sys.executable, "-m", "openenv.cli", "validate", ".", "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=repo / "sql_env")
    report = json.loads(shown.stdout)
    assert report["passed"] and all(report["deployment_modes"].values()), report


def test_without_an_id_a_request_means_the_latest_episode_of_its_address(server):
    """The three documented calls in a row, from two addresses of this machine at the same time."""

    def call(source: str, path: str, body: dict | None = None) -> dict:
        connection = http.client.HTTPConnection(*server.url[7:].split(":"), source_address=(source, 0))
        header = {"Content-Type": "application/json"}
        connection.request("GET" if body is None else "POST", path, body and json.dumps(body), header)
        return json.loads(connection.getresponse().read())

    attempt = {"action": {"strategy": "generate", "sql": WRONG}}
    for answer in (call("127.0.0.2", "/state"), call("127.0.0.2", "/step", attempt)):
        assert answer == {"detail": "No episode is running. Call reset first, or give the episode_id of one."}
    old, other, new = (call(f"127.0.0.{n}", "/reset", {})["observation"]["episode_id"] for n in (2, 3, 2))
    assert call("127.0.0.2", "/step", attempt)["observation"]["episode_id"] == new
    assert call("127.0.0.3", "/state")["episode_id"] == other
    states = [call("127.0.0.3", f"/state?episode_id={name}") for name in (old, other, new)]
    assert [state["step_count"] for state in states] == [0, 0, 1]
    assert call("127.0.0.2", "/state") == states[2]


def test_an_http_episode_is_kept_by_its_id_and_solved_by_a_query_of_the_caller(server):
    task = server.tasks[0]
    start = server.reset(task_id=task.task_id)
    assert (start["question"], start["attempt"], start["attempts_left"]) == (task.question, 0, 5)
    assert start["success"] is None and start["schema_text"]
    episode = start["episode_id"]
    first = server.step(episode, "generate")
    assert mark(task.question) in first["observation"]["sql"] and mark(task.question) in first["observation"]["result"]
    assert (first["done"], first["observation"]["success"], first["observation"]["attempts_left"]) == (False, False, 4)
    last = server.step(episode, "rewrite_full", task.gold)
    assert (last["done"], last["observation"]["success"], last["observation"]["attempts_left"]) == (True, True, 0)
    assert first["reward"] + last["reward"] == pytest.approx(1 - 2 * 0.05)
    _, state = server.call(f"/state?episode_id={episode}")
    assert (state["step_count"], state["done"], state["success"]) == (2, True, True)
    assert [a["strategy"] for a in state["attempts"]] == ["generate", "rewrite_full"]
    assert state["total_reward"] == pytest.approx(0.9)


def test_structured_lines_tell_the_whole_episode_on_standard_output(server):
    task = server.tasks[1]
    episode = server.reset(task_id=task.task_id)["episode_id"]
    server.step(episode, "generate", "SELECT nonsense FROM nowhere")
    server.step(episode, "fix_table", task.gold)
    (start, a), (step, b), (again, c), (end, d) = server.lines(episode)
    assert (start, step, again, end) == ("START", "STEP", "STEP", "END")
    assert (a["task_id"], a["question"], a["max_attempts"]) == (task.task_id, task.question, 5)
    assert (b["attempt"], b["action"], b["success"], b["done"]) == (1, "generate", False, False)
    assert (c["attempt"], c["action"], c["success"], c["done"]) == (2, "fix_table", True, True)
    assert (d["success"], d["attempts"]) == (True, 2)
    assert d["total_reward"] == pytest.approx(b["reward"] + c["reward"]) == pytest.approx(0.9)


def test_five_failures_end_an_episode_at_the_cost_of_its_attempts(server):
    episode = server.reset(task_id=server.tasks[2].task_id)["episode_id"]
    steps = [server.step(episode, s, WRONG) for s in ("generate", *STRATEGIES[:4])]
    assert [s["done"] for s in steps] == [False] * 4 + [True]
    assert sum(s["reward"] for s in steps) == pytest.approx(-5 * 0.05)
    status, answer = server.call("/step", {"action": {"strategy": "fix_column"}, "episode_id": episode})
    assert status == 409 and "(not solved in 5 attempts). Call reset." in answer["detail"]


def test_a_rewrite_is_shown_every_query_so_far_and_its_strategy(server):
    task = server.tasks[3]
    episode = server.reset(task_id=task.task_id)["episode_id"]
    server.step(episode, "generate", "SELECT 'first try'")
    server.step(episode, "fix_column", "SELECT 'second try'")
    assert server.step(episode, "relax_filter")["observation"]["sql"] == f"SELECT '{mark(task.question)}', 2"
    prompt = next(p for p in reversed(server.model.prompts) if task.question in p)
    assert prompt.index("first try") < prompt.index("second try") and "look at the conditions" in prompt


def test_what_writes_is_refused_and_counts_as_an_attempt(server):
    episode = server.reset(task_id=server.tasks[4].task_id)["episode_id"]
    answer = server.step(episode, "generate", "CREATE TABLE x (a)")
    assert answer["observation"]["error_class"] == "rejected" and answer["observation"]["attempts_left"] == 4


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/reset", {"task_id": "none such"}, 404, "Unknown task of split dev_seen_pretrain: none such"),
        ("/reset", {"tsak_id": "x"}, 422, "Unknown argument of reset: tsak_id."),
        ("/reset", {"seed": "\ud800"}, 422, "unable to parse raw data as a unicode string"),
        ("/reset", {"seed": float("nan")}, 422, "should be a finite number"),
        ("/reset", {"task_id": "\ud800"}, 404, r"dev_seen_pretrain: \ufffd."),
        ("/step", {"action": {"strategy": "generate"}, "episode_id": ["@"]}, 422, "Invalid episode_id"),
        ("/step", {"action": {"strategy": "generate"}, "episode_id": "x"}, 404, "expired episode: x"),
        ("/step", {"action": {"strategy": "guess"}, "episode_id": "@"}, 422, "Unknown strategy: guess. Choose one of"),
        (
            "/step",
            {"action": {"strategy": "fix_column"}, "episode_id": "@"},
            422,
            "Invalid strategy for attempt 1: fix_column",
        ),
        ("/step", {"action": {"sql": "SELECT 1"}, "episode_id": "@"}, 422, "Field required"),
        ("/step", {"action": {"strategy": "generate", "query": "x"}, "episode_id": "@"}, 422, "not permitted"),
        ("/state?episode_id=x", None, 404, "expired episode: x"),
        ("/web/step", {"action": {"sql": "SELECT 1"}}, 422, "Field required"),
        ("/web/reset", {"tsak_id": "x"}, 422, "Unknown argument of reset: tsak_id."),
    ],
)
def test_a_request_that_cannot_be_answered_says_why(server, path, body, status, message):
    if body and body.get("episode_id") == "@":
        body = body | {"episode_id": server.reset()["episode_id"]}
    got, answer = server.call(path, body)
    assert got == status and message in json.dumps(answer), answer


def test_a_body_that_is_no_text_is_refused(server):
    with pytest.raises(urllib.error.HTTPError, match="422"):
        urllib.request.urlopen(f"{server.url}/reset", b"\xff\xfe", timeout=60)


def test_text_that_is_no_unicode_is_answered(server):
    episode = server.reset(episode_id="é")["episode_id"]
    assert server.step(episode, "generate", "SELECT '\ud800'")["observation"]["sql"] == "SELECT '\ufffd'"
    server.step(episode, "rewrite_full", "SELECT char(55296)")
    assert [tag for tag, _ in server.lines("é")] == ["START", "STEP", "STEP"]


def test_the_page_of_openenv_plays_an_episode(server):
    """`ENABLE_WEB_INTERFACE=true`: its own calls, and what its buttons send through Gradio."""
    status, answer = server.call("/web/state")
    assert status == 409 and "Call reset first" in answer["detail"]
    status, start = server.call("/web/reset", {})
    assert status == 200 and start["observation"]["attempts_left"] == 5
    for strategy in ("generate", "fix_column"):  # by the server's model
        status, answer = server.call("/web/step", {"action": {"strategy": strategy}})
        assert status == 200 and mark(start["observation"]["question"]) in answer["observation"]["result"]
    _, state = server.call("/web/state")
    assert (state["episode_id"], state["step_count"]) == (start["observation"]["episode_id"], 2)

    _, config = server.call("/web/config")
    numbers = {d["api_name"]: d["id"] for d in config["dependencies"]}

    def press(button: str, *fields: str | None) -> list[str]:
        """What the page shows after a click."""
        job = {"data": fields, "fn_index": numbers[button], "session_hash": f"{button}{len(server.seen)}"}
        assert server.call("/web/gradio_api/queue/join", job)[0] == 200
        events = f"{server.url}/web/gradio_api/queue/data?session_hash={job['session_hash']}"
        with urllib.request.urlopen(events, timeout=200) as lines:
            for line in lines:
                event = json.loads(line.removeprefix(b"data:") if line.strip() else b"{}")
                if event.get("msg") == "process_completed":
                    return event["output"]["data"]
        raise AssertionError("no answer")

    assert press("reset_env")[2] == "Environment reset successfully."
    _, shown, status = press("step_form", "generate", "SELECT 'by hand'")
    assert status == "Step complete." and "by hand" in json.loads(shown)["observation"]["result"]
    assert press("step_form", "generate", None)[2].startswith("Error: Invalid strategy for attempt 2: generate.")
    assert json.loads(press("get_state_sync")[0])["step_count"] == 1


def test_an_episode_goes_on_when_nobody_reads_its_lines(play, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full, os.fdopen(os.dup(writer), "w") as pipe:
        for stream in (full, pipe):
            monkeypatch.setattr(sys, "stdout", stream)
            env = SqlEnvironment(play())
            env.reset()
            assert env.step(SqlAction(strategy="generate", sql=WRONG)).attempt == 1
            with contextlib.suppress(OSError):
                stream.close()


HALF = "\ud83d"
"""Half an emoji: JSON can carry it, UTF-8 cannot."""


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/step", {"action": {"strategy": HALF}, "episode_id": "@"}, 422),
        ("/step", {"action": {"strategy": "generate", HALF: HALF}, "episode_id": "@"}, 422),
        ("/step", {"action": {"strategy": "generate"}, "episode_id": HALF}, 404),
        ("/step", {"action": {"strategy": "generate"}, "timeout_s": HALF}, 422),
        ("/step", {"action": {"strategy": "generate"}, "episode_id": [HALF]}, 422),
        ("/step", {"action": HALF}, 422),
        ("/reset", {"task_id": HALF}, 404),
        ("/reset", {HALF: 1}, 422),
        ("/reset", {"seed": [HALF]}, 422),
    ],
)
def test_half_a_character_in_a_request_that_is_refused_is_shown_by_a_stand_in(server, path, body, status):
    if body.get("episode_id") == "@":
        body = body | {"episode_id": server.reset()["episode_id"]}
    got, answer = server.call(path, body)
    assert got == status and answer["detail"]


def test_half_a_character_or_nul_in_a_query_is_one_wrong_attempt(server):
    start = server.reset(task_id=server.tasks[8].task_id)
    for strategy, odd in (("generate", HALF), ("rewrite_full", "\0")):
        answer = server.step(start["episode_id"], strategy, f"SELECT '{odd}'")
        assert (answer["observation"]["sql"], answer["observation"]["success"]) == ("SELECT '\ufffd'", False)
    assert server.step(start["episode_id"], "fix_syntax", server.tasks[8].gold)["observation"]["success"]


def test_an_id_in_use_is_refused_and_one_that_is_done_can_be_used_again(server):
    task = server.tasks[5]
    assert server.reset(episode_id="mine", task_id=task.task_id)["episode_id"] == "mine"
    status, answer = server.call("/reset", {"episode_id": "mine"})
    assert status == 409 and "Episode is already running: mine." in answer["detail"]
    server.step("mine", "generate", task.gold)
    assert server.reset(episode_id="mine", task_id=server.tasks[6].task_id)["question"] == server.tasks[6].question


def test_tasks_and_info_say_what_is_served(server):
    _, tasks = server.call("/env/tasks")
    assert [t["task_id"] for t in tasks] == [t.task_id for t in server.tasks]
    assert all(set(t) == {"task_id", "db_id", "question", "hardness"} for t in tasks)
    _, info = server.call("/env/info")
    assert info["actions"] == ["generate", *STRATEGIES] and info["tasks"] == len(server.tasks)
    assert (info["max_attempts"], info["model"], info["split"]) == (5, "openai:m", SPLIT)


def test_a_websocket_session_keeps_its_episode_and_survives_mistakes(server):
    task = server.tasks[7]
    with SqlEnvClient(base_url=server.url).sync() as client:
        for call in (client.state, lambda: client.step(SqlAction(strategy="generate"))):
            with pytest.raises(RuntimeError, match=r"No episode is running. Call reset first"):
                call()
        start = client.reset(task_id=task.task_id)
        assert isinstance(start.observation, SqlObservation) and start.observation.question == task.question
        with pytest.raises(RuntimeError, match="Unknown strategy: guess"):
            client.step(SqlAction(strategy="guess"))
        first = client.step(SqlAction(strategy="generate"))
        assert mark(task.question) in first.observation.sql and not first.done
        last = client.step(SqlAction(strategy="add_groupby", sql=task.gold))
        assert last.done and last.observation.success and first.reward + last.reward == pytest.approx(0.9)
        state = client.state()
        assert [a.sql for a in state.attempts] == [first.observation.sql, task.gold] and state.success
        with pytest.raises(RuntimeError, match="is done"):
            client.step(SqlAction(strategy="fix_column"))


def test_a_client_that_is_gone_leaves_no_traceback(server):
    code = """if True:
        import os, sys
        from sql_env import SqlEnvClient
        client = SqlEnvClient(base_url=sys.argv[1]).sync()
        client.connect()
        print(client.reset().observation.episode_id, flush=True)
        os._exit(1)
        """
    shown = subprocess.run([sys.executable, "-c", code, server.url], capture_output=True, text=True)
    assert server.call(f"/state?episode_id={shown.stdout.strip()}")[0] == 200
    time.sleep(1)
    assert "Traceback" not in server.out.with_name("err").read_text()


def test_two_websocket_sessions_and_ten_http_episodes_at_once_do_not_mix(server):
    chosen = server.tasks[20:32]
    assert len({t.question for t in chosen}) == 12

    def own(task: Task, attempts: list[dict]) -> None:
        """Every query and result of an episode names its own question, and the model saw its own history only."""
        name = mark(task.question)
        assert [a["sql"] for a in attempts] == [f"SELECT '{name}', {n}" for n in range(5)], task
        assert all(set(re.findall(r"Q[0-9a-f]{8}", a["result"])) == {name} for a in attempts)
        prompts = [p for p in server.model.prompts if f"Question: {task.question}" in p.splitlines()]
        assert len(prompts) == 5 and {m for p in prompts for m in re.findall(r"'(Q[0-9a-f]{8})'", p)} <= {name}

    def over_http(task: Task) -> None:
        episode = server.reset(task_id=task.task_id)["episode_id"]
        own(task, [server.step(episode, s)["observation"] for s in ("generate", *STRATEGIES[:4])])

    async def over_websocket(task: Task) -> None:
        async with SqlEnvClient(base_url=server.url) as client:
            await client.reset(task_id=task.task_id)
            for strategy in ("generate", *STRATEGIES[:4]):
                await client.step(SqlAction(strategy=strategy))
            own(task, [a.model_dump() for a in (await client.state()).attempts])

    async def both() -> None:
        await asyncio.gather(*map(over_websocket, chosen[:2]))

    with ThreadPoolExecutor(11) as pool:
        running = [pool.submit(over_http, task) for task in chosen[2:]] + [pool.submit(asyncio.run, both())]
        for job in running:
            job.result()


def test_no_response_holds_a_gold_query_or_its_rows(server, pocket):
    questions = "\n".join(t.question for t in server.tasks)

    def texts(task: Task) -> set[str]:
        """Cells of the gold answer that no question gives away."""
        rows = open_database(pocket.database(task.db_id)).execute(task.gold).rows
        return {c for row in rows for c in row if isinstance(c, str) and len(c) > 5 and c not in questions}

    task, cells = max(((t, texts(t)) for t in server.tasks[40:]), key=lambda pair: len(pair[1]))
    assert len(cells) > 3, "this test needs an answer with several texts"
    before = len(server.seen)
    first = server.reset(task_id=task.task_id)
    episode = first["episode_id"]
    cells = {cell for cell in cells if cell not in json.dumps(first)}  # the schema shows some rows of each table
    assert len(cells) > 3
    server.step(episode, "generate")
    for strategy, sql in zip(STRATEGIES, ["SELECT", "SELECT 1 WHERE 1 = 2", WRONG, None], strict=False):
        server.step(episode, strategy, sql)
    paths = ["/env/tasks", "/env/info", f"/state?episode_id={episode}", "/state", "/schema", "/metadata", "/health"]
    for path in [*paths, "/openapi.json", "/gold", "/docs/gold"]:
        server.call(path)
    for body in ({"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}, {}):
        server.call("/mcp", body)
    server.call("/step", {"action": {"strategy": "generate"}, "episode_id": episode})
    with SqlEnvClient(base_url=server.url).sync() as client:
        answers = [client.reset(task_id=task.task_id), client.step(SqlAction(strategy="generate", sql=WRONG))]
        server.seen += [a.observation.model_dump_json() for a in answers] + [client.state().model_dump_json()]
    new = server.seen[before:]
    assert len(new) > 15 and any(task.question in text for text in new)
    for text in [*new, *(json.dumps(line) for _, line in server.lines(episode))]:
        plain = text.replace("\\", "")
        assert not [cell for cell in cells if cell in plain], text[:300]
        assert not [t.gold for t in server.tasks if t.gold in plain], text[:300]


@pytest.fixture
def play(pocket: DataSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Episodes in this process, with a model that is not there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("NO_PROXY", "*")
    return lambda **options: Episodes(pocket.root, SPLIT, "openai:gone", **options)


def test_a_model_that_is_gone_does_not_use_up_an_attempt(play):
    env = SqlEnvironment(play())
    env.reset()
    with pytest.raises(RequestError, match=r"does not count: model: ModelError: Cannot reach .* Try again") as caught:
        env.step(SqlAction(strategy="generate"))
    assert caught.value.status == 502 and env.state.step_count == 0
    assert env.step(SqlAction(strategy="generate", sql=WRONG)).attempts_left == 4


def test_a_step_past_its_time_does_not_use_up_an_attempt(play):
    env = SqlEnvironment(play())
    env.reset()
    slow = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    with pytest.raises(RequestError, match=r"timed out and does not count: 0\.2 s") as caught:
        env.step(SqlAction(strategy="generate", sql=slow), timeout_s=0.2)
    assert caught.value.status == 408 and env.state.step_count == 0


def test_a_seed_gives_an_order_of_tasks_that_a_session_goes_on_in(play):
    episodes = play()
    first, second = SqlEnvironment(episodes), SqlEnvironment(episodes)
    ordered = [first.reset(seed=3).task_id, first.reset().task_id, first.reset().task_id]
    assert [second.reset(seed=3).task_id, second.reset().task_id, second.reset().task_id] == ordered
    assert len(set(ordered)) == 3 and second.reset(seed=4).task_id != ordered[0]


def test_old_episodes_go_when_there_are_too_many_and_after_their_time(play, capsys):
    episodes = play(limit=2, idle_seconds=1000)
    names = [SqlEnvironment(episodes).reset(episode_id=f"e{i}").episode_id for i in range(3)]
    step = SqlEnvironment(episodes).step
    with pytest.raises(RequestError, match="Unknown or expired episode: e0"):
        step(SqlAction(strategy="generate", sql=WRONG), episode_id="e0")
    assert step(SqlAction(strategy="generate", sql=WRONG), episode_id="e1").attempt == 1
    SqlEnvironment(episodes).reset(episode_id="e3")  # e2 is now the one not used for longest
    assert episodes.find("e1") and names[2] == "e2"
    with pytest.raises(RequestError, match="expired episode: e2"):
        episodes.find("e2")
    episodes.idle_seconds = 0
    with pytest.raises(RequestError, match="expired episode: e1"):
        episodes.find("e1")
    ended = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[END]")]
    assert len(ended) == 4 and all('"abandoned": true' in line for line in ended)


def test_a_session_that_resets_again_ends_its_episode(play, capsys):
    env = SqlEnvironment(play())
    env.reset(episode_id="mine")
    env.step(SqlAction(strategy="generate", sql=WRONG))
    assert env.reset(episode_id="mine").attempt == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "[START]",
        "[STEP]",
        "[END]",
        "[START]",
    ]


def test_nano_plays_an_episode(pocket):
    env = SqlEnvironment(Episodes(pocket.root, SPLIT))
    env.reset(seed=0)
    first = env.step(SqlAction(strategy="generate"))
    assert first.sql and first.success == first.done
    if not first.done:
        assert env.step(SqlAction(strategy="fix_column")).attempt == 2


def test_the_manifest_names_an_application_that_starts(repo, pocket, monkeypatch):
    from uvicorn.importer import import_from_string

    manifest = yaml.safe_load((repo / "sql_env/openenv.yaml").read_text())
    monkeypatch.setenv("SQLBENCH_DATA", str(pocket.root))
    assert manifest["name"] == "sqlbench"
    assert {"/reset", "/step", "/state", "/env/tasks"} <= {r.path for r in import_from_string(manifest["app"]).routes}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "none"], "error: No data set in none"),
        (["--split", "none"], "Unknown split of .*: none. Choose one of: dev"),
        (["--model", "none"], "error: .*none"),
        (["--host", "256.1.1.1"], "error: Cannot listen on 256.1.1.1:0: .*. Choose another --port or --host"),
        (["--port", "@"], r"error: Cannot listen on 127.0.0.1:\d+: Address already in use. Choose another"),
    ],
)
def test_a_server_that_cannot_start_says_so_in_one_line(pocket, options, message, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as ended:
        options = [str(taken.getsockname()[1]) if o == "@" else o for o in options]
        main(["env", "--port", "0", "--data", str(pocket.root), *options])
    shown = capsys.readouterr()
    assert ended.value.code == 1 and shown.out == ""
    assert re.fullmatch(f".*{message}.*\n", shown.err), shown.err
