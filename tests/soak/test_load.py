"""Load as many users make it: episodes, chats, a long evaluation, hostile queries among honest ones.

``make test`` runs this small, by counts, and asserts no time; with SQLBENCH_LONG=1, as in ``make soak``, it runs at the
sizes that docs/reliability.md states.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import fmean, quantiles

import httpx
import psutil
import pytest

from sql_env import SqlAction, SqlEnvClient
from sqlbench.agent.prompts import STRATEGIES
from sqlbench.agent.repair import LinUCBRepair
from sqlbench.data.tasks import DataSet, Task, write_split
from sqlbench.database.engine import cached_database, open_database
from sqlbench.database.types import Limits
from sqlbench.models import open_model
from sqlbench.reward import score
from sqlbench.runs import RunFolder
from sqlbench_chat.connection import connect
from sqlbench_chat.generations import FeedbackStore
from sqlbench_chat.session import ChatSession
from sqlbench_chat.turn import Turn

LONG = os.environ.get("SQLBENCH_LONG") == "1"
SPLIT = "dev_seen_pretrain"
SQLBENCH = [sys.executable, "-c", "from sqlbench.cli import main; main()"]


def size(small: int, large: int) -> int:
    return large if LONG else small


@pytest.fixture
def note(figures) -> Callable[[str, str], None]:
    """Keeps a figure where it is one of the sizes that the documentation states."""
    return lambda what, value: figures.record("load", what, value) if LONG else None


class Model(BaseHTTPRequestHandler):
    """Answers at once: a query with the number in the question, one that fails at first; the review likes all."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        system, user = (m["content"] for m in request["messages"])
        number = re.search(r"#(\d+)", user)[1]
        text = f"SELECT {'nonsense' * ('senior' in system and 'An earlier' not in system)}{number}"
        if "You review" in system or system.startswith("check"):
            text = "THE QUERY IS CORRECT"
        kind = "delta" if request.get("stream") else "message"
        choice = {"index": 0, "finish_reason": "stop", kind: {"role": "assistant", "content": text}}
        answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        body = json.dumps(answer).encode()
        if request.get("stream"):
            body = b"data: " + body.replace(b"chat.completion", b"chat.completion.chunk") + b"\n\ndata: [DONE]\n\n"
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if request.get("stream") else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An endpoint of its own, named by the environment."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}/v1")
    yield
    server.shutdown()
    server.server_close()


@contextmanager
def running(*arguments: str, log: Path) -> Iterator[subprocess.Popen]:
    """The ``sqlbench`` command; standard error goes to a file."""
    with open(log, "w") as err:
        process = subprocess.Popen([*SQLBENCH, *arguments], stdout=subprocess.DEVNULL, stderr=err)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def megabytes(process: subprocess.Popen) -> float:
    return psutil.Process(process.pid).memory_info().rss / 1e6


def p99(seconds: list[float]) -> float:
    return quantiles(seconds, n=100)[98]


# --- the environment's server -----------------------------------------------------------------------------------------


def test_50_episodes_at_once_do_not_mix_and_memory_is_bounded(pocket: DataSet, model, tmp_path, note):
    tasks, until = [t for t in pocket.load(SPLIT) if t.scorable], size(4, 60)
    log, steps, memory = tmp_path / "err", [], []
    episodes = itertools.count()

    async def client(number: int, url: str, end: float) -> None:
        async with SqlEnvClient(base_url=url) as mine:
            played = 0
            while time.monotonic() < end or not played:
                played += 1
                task, mark = tasks[next(episodes) % len(tasks)], f"client {number}"
                start = (await mine.reset(task_id=task.task_id)).observation
                assert (start.question, start.attempt, start.sql) == (task.question, 0, "")
                for attempt, strategy in enumerate(("generate", *STRATEGIES[:4]), 1):
                    sql = f"SELECT '{mark}, {start.episode_id}, {attempt}'"
                    began = time.perf_counter()
                    seen = (await mine.step(SqlAction(strategy=strategy, sql=sql))).observation
                    steps.append(time.perf_counter() - began)
                    assert (seen.episode_id, seen.sql, seen.attempt) == (start.episode_id, sql, attempt)
                    assert mark in seen.result and start.episode_id in seen.result and not seen.success
                attempts = (await mine.state()).attempts
                assert [a.sql.rsplit(", ")[1] for a in attempts] == [start.episode_id] * 5

    async def all_of_them(url: str, process: subprocess.Popen) -> None:
        end = time.monotonic() + until

        async def watch() -> None:
            while time.monotonic() < end or len(memory) < 4:
                memory.append(megabytes(process))
                await asyncio.sleep(until / 40)

        await asyncio.gather(watch(), *(client(number, url, end) for number in range(50)))

    arguments = ["env", "--data", str(pocket.root), "--split", SPLIT, "--port", "0", "--model", "openai:m"]
    with running(*arguments, log=log) as process:
        deadline = time.monotonic() + 200
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        asyncio.run(all_of_them(found[0], process))
    assert "Traceback" not in log.read_text()
    warm, most = memory[len(memory) // 4], max(memory)
    assert len(steps) >= 50 * 5 and most < 1.2 * warm + 20
    note("environment, 50 episodes for 60 s", f"{len(steps):,} steps, none mixed up, p99 {1000 * p99(steps):.0f} ms")
    note("memory of its server after 15 s, and at most", f"{warm:.0f} MB, {most:.0f} MB")


def test_20_clients_of_the_api_get_their_own_answers_and_memory_is_bounded(model, tmp_path, note):
    """One in four leaves before its answer is there."""
    log, numbers, answers, memory, until = tmp_path / "err", itertools.count(1), [], [], size(4, 60)
    with closing(sqlite3.connect(tmp_path / "shop.sqlite")) as connection, connection:
        connection.execute("CREATE TABLE item (name TEXT)")

    async def client(http: httpx.AsyncClient, end: float) -> None:
        kept = False
        while time.monotonic() < end or not kept:
            number = next(numbers)
            async with http.stream("POST", "/api/ask", json={"question": f"#{number}"}) as answer:
                assert answer.status_code == 200
                if number % 4 == 0:
                    continue
                told = await answer.aread()
            done = json.loads(re.search(r"^event: done\ndata: (.*)$", told.decode(), re.M)[1])
            assert done["result"]["rows"] == [[number]]
            kept = not answers.append(number)

    async def all_of_them(url: str, process: subprocess.Popen) -> None:
        end = time.monotonic() + until

        async def watch() -> None:
            while time.monotonic() < end or len(memory) < 4:
                memory.append(megabytes(process))
                await asyncio.sleep(until / 40)

        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=200) as http:
            await asyncio.gather(watch(), *(client(http, end) for _ in range(20)))

    limits = ["--concurrency", "40", "--per-client", "40"]  # a place is free a moment after its client has left
    with running("api", "--db", "shop.sqlite", "--model", "openai:m", "--port", "0", *limits, log=log) as process:
        deadline = time.monotonic() + 200
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        asyncio.run(all_of_them(found[0], process))
    assert "Traceback" not in log.read_text()
    warm, most = memory[len(memory) // 4], max(memory)
    assert len(answers) >= 20 and most < 1.2 * warm + 20
    note("API, 20 clients for 60 s", f"{len(answers):,} answers, none mixed up")
    note("memory of the API's server after 15 s, and at most", f"{warm:.0f} MB, {most:.0f} MB")


# --- the chat ---------------------------------------------------------------------------------------------------------


def test_5_chats_on_one_folder_keep_apart_and_lose_nothing(model, tmp_path, note):
    """Each page of the chat is a kernel with a session of its own; what they learn they keep in one folder."""
    with closing(sqlite3.connect(tmp_path / "shop.sqlite")) as connection, connection:
        connection.execute("CREATE TABLE customer (customer_id INTEGER PRIMARY KEY, name TEXT)")
    questions, folder, waited = size(6, 100), tmp_path / "state", []
    together = threading.Barrier(5)

    def chat(number: int) -> None:
        together.wait()
        session, shop = ChatSession(open_model("openai:m"), folder), connect(tmp_path / "shop.sqlite")

        async def use() -> None:
            for i in range(questions):
                mark = number * 1000 + i
                turn, began = Turn(question=f"what is #{mark}?", database=shop.name), time.perf_counter()
                chat_turn = await session.ask(turn, shop)
                waited.append(time.perf_counter() - began)
                assert [sql for sql, _ in turn.history] == [f"SELECT nonsense{mark}", f"SELECT {mark}"]
                assert chat_turn.context.executions[-1].rows == [[mark]] and f"SELECT {mark}" in turn.html()
                session.judge(turn, i % 2 == 0, chat_turn=chat_turn)

        asyncio.run(use())

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(chat, range(5)))
    kept = FeedbackStore(folder / "feedback.jsonl").all()
    assert {f.question for f in kept} == {f"what is #{n * 1000 + i}?" for n in range(5) for i in range(questions)}
    assert len(kept) == 5 * questions and all(f.verdict for f in kept)
    assert len(LinUCBRepair.load(folder / "bandit.json").lessons) == 5 * questions
    note(f"chat, 5 sessions with {questions} questions each", f"all kept, p99 {p99(waited):.2f} s an answer")


# --- a long evaluation ------------------------------------------------------------------------------------------------


def test_memory_stays_flat_over_a_long_evaluation(model, tmp_path, note):
    count = size(300, 5000)
    root = tmp_path / "data"
    (root / "database" / "a").mkdir(parents=True)
    with closing(sqlite3.connect(root / "database" / "a" / "a.sqlite")) as connection, connection:
        connection.execute("CREATE TABLE t (x INTEGER)")
        connection.executemany("INSERT INTO t VALUES (?)", [(i,) for i in range(5)])
    tasks = [Task(task_id=str(i), db_id="a", question=f"#{i}?", gold=f"SELECT {i}", split="dev") for i in range(count)]
    write_split(root, "dev", tasks)
    (root / "dataset.json").write_text("{}")
    memory: list[tuple[int, float]] = []
    lines, log = tmp_path / "results/laptop/run/trajectories.jsonl", tmp_path / "err"
    arguments = ["eval", "--data", str(root), "--split", "dev", "--model", "openai:m", "--run", "run"]
    arguments += ["--prompts", "nano", "--results", str(tmp_path / "results")]
    with running(*arguments, log=log) as process:
        done = 0
        while process.poll() is None:
            time.sleep(0.05 if not LONG else 0.5)
            if done < count and lines.is_file():
                done = lines.read_bytes().count(b"\n")
            if process.poll() is None and done:
                memory.append((done, megabytes(process)))
        assert process.returncode == 0, log.read_text()[-2000:]
    summary = RunFolder(lines.parent).summary()
    assert (summary["rollouts"], summary["score"]["correct"], summary["failed"]) == (count, count, 0)
    during = [used for done, used in memory if count / 5 <= done < count] or [memory[-1][1]]  # looked at now and then
    warm, most, end = during[0], max(during), max(used for _, used in memory)
    assert most < (1.1 if LONG else 1.3) * warm, f"{warm:.0f} MB after {count // 5} rollouts, {most:.0f} MB later"
    assert end < most + 80, f"{most:.0f} MB, {end:.0f} MB for the summary"  # which brings its parser of SQL along
    note(f"evaluation of {count:,} tasks, memory after {count // 5:,}, and at most", f"{warm:.0f} MB, {most:.0f} MB")
    note("memory while its summary is made", f"{end:.0f} MB")


# --- the reward -------------------------------------------------------------------------------------------------------

HOSTILE = [
    "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT max(x) FROM r",
    "WITH RECURSIVE r(x) AS (SELECT 'aaaaaaaa' UNION ALL SELECT x || x FROM r WHERE length(x) < 1e9) SELECT * FROM r",
    "SELECT group_concat(hex(randomblob(1000))) FROM (WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r "
    "LIMIT 1000000) SELECT x FROM r)",
    "SELECT randomblob(1000000000)",
    "DROP TABLE customer",
    "PRAGMA hard_heap_limit = 0",
    "SELECT replace(hex(zeroblob(100000)), '0', hex(zeroblob(100000)))",
    "ATTACH 'x.db' AS x",
    "((((((((((",
]
THREADS, ENEMIES = 64, 16


def test_hostile_queries_change_no_honest_verdict_and_slow_none_down_much(pocket: DataSet, note):
    """How much slower is a figure of ``make soak``: elsewhere the machine does other things meanwhile."""
    tasks = [t for t in pocket.load(SPLIT) if t.scorable][:60]
    pairs = [(t, pred) for t in tasks for pred in (t.gold, "SELECT 1", tasks[0].gold, "SELECT nothing FROM nowhere")]

    # In `make test` an honest query has a minute: whatever else the machine does, its verdict stays the same.
    patient = {t.db_id: open_database(pocket.database(t.db_id), Limits(seconds=5 if LONG else 60)) for t in tasks}

    def verdict(task: Task, pred: str, hostile: bool = False) -> tuple[int | None, str]:
        database = cached_database(pocket.database(task.db_id)) if hostile else patient[task.db_id]
        found = score(task.gold, pred, database)
        return found.match, found.reason

    alone = [verdict(*pair) for pair in pairs]
    assert {match for match, _ in alone} == {0, 1}
    wild, fought = load(verdict, pairs, alone, enemies=ENEMIES)
    assert fought >= ENEMIES and len(wild) >= THREADS - ENEMIES
    if not LONG:
        return
    calm, _ = load(verdict, pairs, alone, enemies=0)
    slower = fmean(wild) / fmean(calm)  # the median says little: a thread that has its turn answers many in a row
    assert slower < 3, f"{slower:.1f} times slower"
    note(
        "reward, hostile queries in 16 of 64 threads",
        f"{len(wild):,} honest verdicts unchanged, {fought:,} hostile ones",
    )
    times = f"mean {1000 * fmean(calm):.1f} ms, {1000 * fmean(wild):.1f} ms; p99 {1000 * p99(calm):.0f} ms, "
    note("honest latency without and with them", f"{times}{1000 * p99(wild):.0f} ms")


def load(verdict, pairs: list, alone: list, enemies: int) -> tuple[list[float], int]:
    """Seconds of every honest verdict in 64 threads, and how many hostile queries were scored meanwhile."""
    seconds, fought, end = [], itertools.count(), time.monotonic() + size(3, 60)

    def honest(number: int) -> None:
        for i in itertools.count(number * 7):
            began = time.perf_counter()
            found = verdict(*pairs[i % len(pairs)])
            seconds.append(time.perf_counter() - began)
            assert found == alone[i % len(pairs)], (pairs[i % len(pairs)], found)
            if time.monotonic() > end:
                return

    def hostile(number: int) -> None:
        for i in itertools.count(number):
            match, reason = verdict(pairs[i % len(pairs)][0], HOSTILE[i % len(HOSTILE)], hostile=True)
            late = not LONG and reason == "gold_timeout"  # on a machine that does other things meanwhile
            assert match == 0 or late, (HOSTILE[i % len(HOSTILE)], reason)
            next(fought)
            if time.monotonic() > end:
                return

    with ThreadPoolExecutor(THREADS) as pool:
        work = [pool.submit(hostile if i < enemies else honest, i) for i in range(THREADS)]
        for one in work:
            one.result()
    return seconds, next(fought)
