"""What a statement's result looks like, and that databases can be shared, replaced and opened wrongly."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from sqlbench.config import ScoreConfig
from sqlbench.database import duckdb, engine, postgres, sqlite
from sqlbench.database.engine import cached_database, open_database
from sqlbench.database.schema import introspect, sample_rows
from sqlbench.database.sqlite import SqliteConnection
from sqlbench.database.types import CHUNK_BYTES, SQL_BYTES, Limits
from sqlbench.errors import DatabaseError
from sqlbench.evaluation import STOP_AFTER
from sqlbench.models.chat import MAX_CHARS, RETRIES, EndpointChatModel
from sqlbench.reward import GOLD_ROWS
from sqlbench_chat.connection import connect


def test_the_limits_on_the_page_are_those_of_the_code(repo):
    page = (repo / "docs/reliability.md").read_text()
    limits, score_seconds = Limits(), ScoreConfig.model_fields["query_timeout"].default
    depth, columns, compound = (sqlite._LIMITS[getattr(sqlite3, f"SQLITE_LIMIT_{name}")] for name in (
        "EXPR_DEPTH", "COLUMN", "COMPOUND_SELECT"
    ))  # fmt: skip
    endpoint = inspect.signature(EndpointChatModel).parameters
    for promised in (
        f"| time | `--query-timeout` ({limits.seconds:g} s; `score` {score_seconds:g} s)",
        f"| rows | {limits.rows:,}; a gold query {GOLD_ROWS:,};",
        f"| bytes of a result | {limits.result_bytes >> 20} MB | {limits.result_bytes >> 20} MB | 32 MB |",
        f"| memory | {sqlite.HEAP_BYTES >> 20} MB for SQLite in the whole process | `work_mem` 16 MB | "
        f"{duckdb.ENGINE_MEMORY >> 20} MB in DuckDB, {duckdb.MEMORY >> 20} MB in a process, of which "
        f"{duckdb.PROCESSES} run",
        f"| the same; {duckdb.GRACE} s later the process ends",
        f"| 1 GB | {(limits.result_bytes + CHUNK_BYTES) >> 20} MB |",
        f"| text of a statement | {SQL_BYTES:,} bytes | {SQL_BYTES:,} bytes | {SQL_BYTES:,} bytes |",
        f"| {sqlite.PROGRAM_STEPS:,} instructions, expressions {depth} deep, {columns:,} columns, {compound} parts of",
        f"| one value | {sqlite.VALUE_BYTES >> 20} MB; ",
        f"has to end within {sqlite.STEP_BUDGET / 1e9:g} s | 1 GB |",
        f"| pattern of LIKE and GLOB | {sqlite._SMALL.pattern:,} bytes,",
        f"| json_patch | values of {sqlite._PATCH_BYTES >> 10} kB |",
        f"| comments | none | {postgres._COMMENTS:,} |",
        f"(`--timeout`, {endpoint['timeout'].default:g} s)",
        f"An answer is kept up to {MAX_CHARS:,} characters",
        f"After {STOP_AFTER} failures in a row in the same words, or {3 * STOP_AFTER} in any words",
    ):
        assert promised in page, promised
    assert "work_mem = '16MB'" in postgres._SETTINGS and (RETRIES, "tried again up to three times" in page) == (3, True)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "a b's.sqlite"
    connection = sqlite3.connect(file)
    connection.executescript(
        "CREATE TABLE t (id INTEGER, name TEXT);"
        "INSERT INTO t VALUES (1, 'Ann'), (2, CAST(x'ff41c3' AS TEXT)), (3, NULL);"
    )
    connection.close()
    return file


def test_result_has_columns_and_rows(path):
    result = open_database(path).execute("SELECT id AS number, name FROM t WHERE id = 1")
    assert (result.status, result.columns, result.rows, result.error) == ("ok", ("number", "name"), [(1, "Ann")], None)
    assert result.ok and result.seconds > 0


def test_invalid_utf8_is_read_as_the_reference_reads_it(path):
    assert open_database(path).execute("SELECT name FROM t ORDER BY id").rows == [("Ann",), ("A",), (None,)]


@pytest.mark.parametrize(("limits", "error"), [(Limits(rows=2), "2 rows"), (Limits(result_bytes=5000), "5,000 bytes")])
def test_what_came_before_a_limit_is_kept(path, limits, error):
    endless = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT x FROM r"
    result = open_database(path, limits).execute(endless)
    assert result.status == "too_large" and error in result.error
    assert result.rows[:2] == [(1,), (2,)]


def test_threads_share_a_database(path):
    database, results = open_database(path), []

    def work():
        results.extend(database.execute(f"SELECT count(*) + {i} FROM t").rows[0][0] for i in range(50))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == sorted(list(range(3, 53)) * 8)


def test_a_stopped_statement_does_not_harm_the_next(path):
    database = open_database(path)
    cross = "SELECT count(*) FROM t a, t b, t c, t d, t e, t f, t g, t h, t i, t j, t k, t l, t m, t n, t o, t p"
    for _ in range(3):
        assert database.execute(cross, Limits(seconds=0.05)).status == "timeout"
        assert database.execute("SELECT count(*) FROM t").rows == [(3,)]


def test_a_replaced_file_is_read_anew(path):
    database = open_database(path)
    assert database.execute("SELECT count(*) FROM t").rows == [(3,)]
    other = path.with_suffix(".new")
    sqlite3.connect(other).executescript("CREATE TABLE t (id INTEGER); INSERT INTO t VALUES (1);")
    before = database.identity()
    os.replace(other, path)
    time.sleep(2 * engine.LOOK_SECONDS)
    assert database.execute("SELECT count(*) FROM t").rows == [(1,)]
    assert database.identity() != before


def test_a_file_that_is_being_written_is_read_with_what_was_committed(tmp_path):
    writer = sqlite3.connect(tmp_path / "w.sqlite", isolation_level=None)
    writer.execute("PRAGMA journal_mode = wal")
    writer.execute("CREATE TABLE t (x)")
    writer.execute("INSERT INTO t VALUES (1)")
    assert open_database(tmp_path / "w.sqlite").execute("SELECT x FROM t").rows == [(1,)]


def test_a_forked_child_opens_its_own_connections(path):
    database = cached_database(path)
    assert database.execute("SELECT count(*) FROM t").ok
    child = os.fork()
    if child == 0:
        ok = database.execute("SELECT count(*) FROM t").rows == [(3,)]
        slow = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT count(*) FROM r"
        ok = ok and database.execute(slow, Limits(seconds=0.05)).status == "timeout"
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert cached_database(path) is database


def test_the_event_loop_goes_on_while_a_statement_runs(path):
    slow = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT count(*) FROM r"

    async def tick():
        task = asyncio.create_task(open_database(path, Limits(seconds=1)).aexecute(slow))
        ticks = 0
        while not task.done():
            await asyncio.sleep(0)
            ticks += 1
        return ticks, task.result().status

    ticks, status = asyncio.run(tick())
    assert ticks > 5 and status == "timeout"


@pytest.mark.parametrize("content", [None, b"this is no database, whatever it is called"])
def test_what_is_no_database_is_refused_when_opened(tmp_path, content):
    path = tmp_path / "x.sqlite"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatabaseError, match=r"Cannot open database .*x\.sqlite"):
        open_database(path)
    assert path.exists() == (content is not None)


def test_memory_is_an_empty_database():
    result = open_database(":memory:").execute("SELECT 1 + 1")
    assert result.rows == [(2,)]


def test_the_deadline_thread_sleeps_while_nothing_runs(path):
    database = open_database(path)
    database.execute("SELECT 1")
    end = time.monotonic() + 120
    while engine._watchdog.wake.is_set() and time.monotonic() < end:
        time.sleep(0.01)
    assert not engine._watchdog.wake.is_set()
    assert not engine._watchdog.running


def test_a_statement_that_outlives_its_file_leaves_nothing_of_it_behind(path):
    slow = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT count(*) FROM r"
    database, other = open_database(path), path.with_suffix(".new")
    thread = threading.Thread(target=database.execute, args=(slow, Limits(seconds=0.4)))
    thread.start()
    time.sleep(0.1)
    sqlite3.connect(other).executescript("CREATE TABLE t (id INTEGER); INSERT INTO t VALUES (1);")
    os.replace(other, path)
    time.sleep(2 * engine.LOOK_SECONDS)
    assert database.execute("SELECT count(*) FROM t").rows == [(1,)]
    thread.join()
    assert [database.execute("SELECT count(*) FROM t").rows for _ in range(3)] == [[(1,)]] * 3


def test_what_is_written_to_a_log_beside_the_file_is_seen(tmp_path):
    path = tmp_path / "w.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("PRAGMA journal_mode = wal; CREATE TABLE t (x)")
    database = open_database(path)
    assert not path.with_name("w.sqlite-wal").exists()
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        for n in (1, 2, 3):
            writer.execute("INSERT INTO t VALUES (1)")
            time.sleep(2 * engine.LOOK_SECONDS)
            assert database.execute("SELECT count(*) FROM t").rows == [(n,)]


def test_a_connection_that_was_closed_meanwhile_does_not_end_the_deadlines_of_others(path):
    closed, database = SqliteConnection(path.as_uri()), open_database(path)
    closed.close()
    engine._watchdog.watch(closed, 0.0)
    time.sleep(0.1)
    engine._watchdog.forget(closed)
    slow = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT x FROM r LIMIT 1 OFFSET 30000000"
    assert database.execute(slow, Limits(seconds=0.05)).status == "timeout"


def test_two_databases_are_never_taken_for_one():
    seen = set()
    for _ in range(20):  # each is gone before the next one is made, and its place in memory is free
        seen.add(open_database(":memory:").identity())
    assert len(seen) == 20


# ---- files with a log beside them


def listing(folder):
    """Every file of a folder with its content and time of change."""
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}


def in_wal_mode(folder):
    """A database in WAL mode whose writer closed it: no file beside it."""
    with closing(sqlite3.connect(folder / "x.sqlite")) as connection:
        connection.executescript("PRAGMA journal_mode = wal; CREATE TABLE t (x); INSERT INTO t VALUES (1)")


def after_a_crash_in_wal_mode(folder):
    """What a writer leaves that was killed: the last commits are in the log alone."""
    with closing(sqlite3.connect(folder / "w.sqlite", isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = wal")
        writer.execute("CREATE TABLE t (x)")
        writer.execute("INSERT INTO t VALUES (1)")
        for suffix in ("", "-wal"):
            shutil.copy(folder / f"w.sqlite{suffix}", folder / f"x.sqlite{suffix}")
    (folder / "w.sqlite").unlink()


def after_a_crash_with_a_journal(folder):
    """A transaction that was under way when its writer was killed: half of it is in the file, and has to go again."""
    with closing(sqlite3.connect(folder / "w.sqlite", isolation_level=None)) as writer:
        writer.executescript("CREATE TABLE t (x, pad); PRAGMA cache_size = 5; BEGIN")
        writer.executemany("INSERT INTO t VALUES (?, ?)", [(int(n == 0), "p" * 500) for n in range(1000)])
        writer.execute("COMMIT")
        writer.execute("BEGIN")
        writer.execute("UPDATE t SET x = 7")
        for suffix in ("", "-journal"):
            shutil.copy(folder / f"w.sqlite{suffix}", folder / f"x.sqlite{suffix}")
    (folder / "w.sqlite").unlink()


@pytest.mark.parametrize("make", [in_wal_mode, after_a_crash_in_wal_mode, after_a_crash_with_a_journal])
def test_what_was_committed_is_read_and_nothing_changes_beside_the_file(tmp_path, monkeypatch, make):
    folder, private = tmp_path / "data", tmp_path / "private"
    folder.mkdir()
    private.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(private))
    make(folder)
    before = listing(folder)
    os.chmod(folder, 0o555)
    database = open_database(folder / "x.sqlite")
    assert database.execute("SELECT sum(x) FROM t").rows == [(1,)]
    assert [t.name for t in introspect(database).tables] == ["t"]
    assert sample_rows(database, "t", 1)[0][0] == 1
    assert listing(folder) == before
    del database
    gc.collect()
    assert list(private.iterdir()) == []


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_a_file_that_another_program_writes_is_read_whole_or_not_at_all(tmp_path, mode):
    path = tmp_path / "bank.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA journal_mode = {mode}")
        connection.execute("CREATE TABLE account (id INTEGER PRIMARY KEY, money INTEGER, pad TEXT)")
        connection.executemany("INSERT INTO account VALUES (?, 10, ?)", [(n, "p" * 1000) for n in range(100)])
    done = threading.Event()

    def write():
        with closing(sqlite3.connect(path, isolation_level=None)) as writer:
            while not done.is_set():
                writer.execute("UPDATE account SET money = money + CASE WHEN id % 2 THEN 1 ELSE -1 END")
                time.sleep(0.02)

    thread = threading.Thread(target=write)
    thread.start()
    seen = []
    try:
        database = open_database(path)
        for _ in range(200):
            try:
                seen.append(database.execute("SELECT sum(money), count(*) FROM account").rows)
            except DatabaseError as error:
                assert "changed while it was read" in str(error) or "keeps writing" in str(error)
    finally:
        done.set()
        thread.join()
    assert seen and all(rows == [(1000, 100)] for rows in seen)


def test_a_file_that_was_changed_under_a_query_fails_the_query(path):
    slow = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT count(*) FROM r"
    database, caught = open_database(path), []

    def ask():
        with pytest.raises(DatabaseError, match="changed while it was read") as error:
            database.execute(slow, Limits(seconds=0.5))
        caught.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.1)
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("INSERT INTO t VALUES (4, 'Dan')")
    thread.join()
    assert caught and database.execute("SELECT count(*) FROM t").rows == [(4,)]


def test_a_file_without_room_for_a_copy_is_refused_in_one_line(tmp_path, monkeypatch):
    after_a_crash_in_wal_mode(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(DatabaseError, match=r"Cannot copy .*x\.sqlite .*PRAGMA journal_mode=delete") as caught:
        open_database(tmp_path / "x.sqlite")
    assert "\n" not in str(caught.value)


# ---- addresses


@pytest.mark.parametrize("opener", [open_database, cached_database, lambda target: connect(target).database])
def test_the_address_of_a_file_opens_it(path, opener, monkeypatch):
    monkeypatch.chdir(path.parent)
    for address in (f"sqlite:///{path.name}", f"sqlite:///{path}"):
        assert opener(address).execute("SELECT count(*) FROM t").rows == [(3,)]
    assert opener("sqlite://").execute("SELECT 1").rows == opener("sqlite:///:memory:").execute("SELECT 1").rows


@pytest.mark.parametrize(
    "address", ["sqlite:x.db", "sqlite://x.db", "sqlite:/x.db", "sqlite:///", "sqlite+aiosqlite:///x"]
)
@pytest.mark.parametrize("opener", [open_database, connect])
def test_a_wrong_address_is_refused_in_one_line(address, opener):
    with pytest.raises(DatabaseError, match=r"Not the address of a SQLite file: .* Write sqlite:///") as caught:
        opener(address)
    assert "\n" not in str(caught.value)


def test_databases_that_nothing_uses_leave_room_for_those_in_use(tmp_path):
    """Connections of 150 wide databases need more than SQLite may have in one process."""
    first = tmp_path / "0.sqlite"
    with closing(sqlite3.connect(first)) as connection:
        for table in range(200):
            columns = ", ".join(f"a_long_name_of_column_{n} TEXT" for n in range(60))
            connection.execute(f"CREATE TABLE a_long_name_of_table_{table} ({columns})")
    opened = []
    for number in range(150):
        file = tmp_path / f"{number}.sqlite"
        if number:
            shutil.copyfile(first, file)
        opened.append(open_database(file))
        assert opened[-1].execute("SELECT count(*) FROM a_long_name_of_table_7").rows == [(0,)]
    assert all(database.execute("SELECT 1 FROM a_long_name_of_table_9").ok for database in opened)


def test_databases_can_be_opened_while_others_are_told_to_close_what_is_idle(path):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns wherever they can
    try:
        with ThreadPoolExecutor(3) as pool:
            opened = [pool.submit(open_database, path) for _ in range(600)]
            while not all(one.done() for one in opened):
                engine.close_idle()
    finally:
        sys.setswitchinterval(interval)
    assert all(one.result().execute("SELECT 1").ok for one in opened)
