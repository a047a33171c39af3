"""What a statement's result looks like, and that databases can be shared, replaced and opened wrongly."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from contextlib import closing

import pytest

from sqlbench.database import engine
from sqlbench.database.engine import cached_database, open_database
from sqlbench.database.sqlite import SqliteConnection
from sqlbench.database.types import Limits
from sqlbench.errors import DatabaseError


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
        task = asyncio.create_task(open_database(path, Limits(seconds=0.2)).aexecute(slow))
        ticks = 0
        while not task.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks, task.result().status

    ticks, status = asyncio.run(tick())
    assert ticks > 5 and status == "timeout"


@pytest.mark.parametrize("content", [None, b"this is no database, whatever it is called"])
def test_what_is_no_database_is_refused_when_opened(tmp_path, content):
    path = tmp_path / "x.sqlite"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatabaseError, match=r"cannot open database .*x\.sqlite"):
        open_database(path)
    assert path.exists() == (content is not None)


def test_memory_is_an_empty_database():
    result = open_database(":memory:").execute("SELECT 1 + 1")
    assert result.rows == [(2,)]


def test_the_deadline_thread_sleeps_while_nothing_runs(path):
    database = open_database(path)
    database.execute("SELECT 1")
    end = time.monotonic() + 2
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
