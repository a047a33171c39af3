"""The same promises on DuckDB: DuckDB files, and Parquet and CSV files as tables."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest

from sqlbench.database import duckdb as house
from sqlbench.database.engine import open_database
from sqlbench.database.error_classes import error_class
from sqlbench.database.schema import introspect, sample_rows, schema_text
from sqlbench.database.types import ForeignKey, Limits
from sqlbench.errors import DatabaseError
from sqlbench.reward import score
from sqlbench_chat.connection import connect

duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
LIMITS = Limits(seconds=0.5, rows=1000)
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    for name, secret in (("shop", "public"), ("other", "secret")):
        with duckdb.connect(str(folder / f"{name}.duckdb")) as connection:
            connection.execute(
                "CREATE TABLE stadium (stadium_id int PRIMARY KEY, name varchar NOT NULL, price decimal(6, 2))"
            )
            connection.execute("CREATE TABLE singer (singer_id int, name text, stadium_id int REFERENCES stadium)")
            connection.execute("INSERT INTO stadium VALUES (1, 'Arena', 10.50), (2, 'Dome', 20), (3, 'Field', 20)")
            connection.execute(f"INSERT INTO singer SELECT i, '{secret} ' || i, 1 + i % 3 FROM range(200) t(i)")
            connection.execute("CREATE SEQUENCE counter; CREATE MACRO leak(p) AS TABLE SELECT * FROM read_text(p)")
            connection.execute(
                "CREATE SCHEMA care; CREATE VIEW care.cheap AS SELECT name FROM stadium WHERE price < 15"
            )
            connection.execute(
                "CREATE VIEW outside AS SELECT * FROM read_csv('/etc/passwd', sep = ':', header = false)"
            )
    (folder / "data.csv").write_text("a,b\n1,secret\n")
    return folder


@pytest.fixture(scope="module")
def database(home):
    database = open_database(home / "shop.duckdb", Limits(seconds=30, rows=LIMITS.rows))
    yield database
    database.close()


def state(folder):
    return {p.name: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in folder.iterdir()}


REFUSED, CLOSED, STOPPED = {"rejected"}, {"rejected", "error"}, {"timeout", "too_large"}
COUNT = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r)"
HOSTILE = {
    "insert": ("INSERT INTO stadium VALUES (9, 'x', 1)", REFUSED),
    "update": ("UPDATE stadium SET name = 'x'", REFUSED),
    "delete": ("DELETE FROM singer", REFUSED),
    "with delete": ("WITH x AS (SELECT 1) DELETE FROM singer", REFUSED),
    "returning": ("DELETE FROM singer RETURNING *", REFUSED),
    "merge": ("MERGE INTO stadium USING singer s USING (stadium_id) WHEN MATCHED THEN DELETE", REFUSED),
    "drop": ("DROP TABLE singer", REFUSED),
    "alter": ("ALTER TABLE singer RENAME TO x", REFUSED),
    "comment on": ("COMMENT ON TABLE singer IS 'x'", REFUSED),
    "create": ("CREATE TABLE x (y int)", REFUSED),
    "create as": ("CREATE TABLE x AS SELECT * FROM singer", REFUSED),
    "temporary table": ("CREATE TEMP TABLE x AS SELECT 1", REFUSED),
    "view": ("CREATE OR REPLACE TEMP VIEW stadium AS SELECT 1", REFUSED),
    "macro": ("CREATE TEMP MACRO count(x) AS 7", REFUSED),
    "secret": ("CREATE SECRET s (TYPE s3)", CLOSED),
    "attach": ("ATTACH '{home}/other.duckdb' AS other", REFUSED),
    "attach memory": ("ATTACH ':memory:' AS m", REFUSED),
    "attach the web": ("ATTACH 'https://example.org/x.duckdb'", REFUSED),
    "detach": ("DETACH shop", REFUSED),
    "use": ("USE memory", REFUSED),
    "copy to": ("COPY singer TO '{home}/x.csv'", REFUSED),
    "copy from": ("COPY singer FROM '{home}/data.csv'", REFUSED),
    "copy a query": ("COPY (SELECT 1) TO '{home}/x.parquet' (FORMAT parquet)", REFUSED),
    "copy database": ("COPY FROM DATABASE shop TO other", REFUSED),
    "export": ("EXPORT DATABASE '{home}/export'", REFUSED),
    "import": ("IMPORT DATABASE '{home}/export'", REFUSED),
    "checkpoint": ("CHECKPOINT", REFUSED),
    "vacuum": ("VACUUM", REFUSED),
    "install": ("INSTALL httpfs", REFUSED),
    "install from": ("INSTALL httpfs FROM 'http://example.org'", REFUSED),
    "load": ("LOAD httpfs", REFUSED),
    "load a library": ("LOAD '{home}/x.duckdb_extension'", REFUSED),
    "update extensions": ("UPDATE EXTENSIONS", REFUSED),
    "pragma": ("PRAGMA database_list", REFUSED),
    "pragma that lifts a limit": ("PRAGMA memory_limit = '10GB'", REFUSED),
    "set": ("SET memory_limit = '10GB'", REFUSED),
    "set access": ("SET enable_external_access = true", REFUSED),
    "set lock": ("SET lock_configuration = false", REFUSED),
    "set log": ("SET log_query_path = '{home}/log'", REFUSED),
    "profile": ("PRAGMA profiling_output = '{home}/profile'", REFUSED),
    "reset": ("RESET memory_limit", REFUSED),
    "variable": ("SET VARIABLE x = 1", REFUSED),
    "begin": ("BEGIN", REFUSED),
    "commit": ("COMMIT", REFUSED),
    "call": ("CALL pragma_version()", REFUSED),
    "prepare": ("PREPARE x AS SELECT 1", REFUSED),
    "explain analyze": ("EXPLAIN ANALYZE DELETE FROM singer", REFUSED),
    "two statements": ("SELECT 1; SELECT 2", REFUSED),
    "select, then drop": ("SELECT 1; DROP TABLE singer", REFUSED),
    "comment before": ("/* SELECT */ DROP TABLE singer", REFUSED),
    "empty": ("", REFUSED),
    "space": (" \n\t ", REFUSED),
    "semicolon": (";", REFUSED),
    "comment": ("-- SELECT 1", REFUSED),
    "NUL": ("SELECT 'a\0b'", REFUSED),
    "lone surrogate": ("SELECT '\ud800'", REFUSED),
    "1 MB of text": ("SELECT 1" + " + 1" * 250_000, REFUSED),
    "read_csv": ("SELECT * FROM read_csv('/etc/passwd', header = false)", REFUSED),
    "read_csv of a neighbour": ("SELECT * FROM read_csv('{home}/data.csv')", REFUSED),
    "read_text": ("SELECT * FROM read_text('/etc/passwd')", REFUSED),
    "read_blob": ("SELECT * FROM read_blob('/proc/self/environ')", REFUSED),
    "read_json": ("SELECT * FROM read_json('/etc/passwd')", CLOSED),
    "read_parquet": ("SELECT * FROM read_parquet('https://example.org/x.parquet')", CLOSED),
    "sniff_csv": ("SELECT * FROM sniff_csv('/etc/passwd')", REFUSED),
    "glob": ("SELECT * FROM glob('/etc/*')", REFUSED),
    "path as a table": ("SELECT * FROM '{home}/data.csv'", CLOSED),
    "file inside a macro": ("SELECT * FROM leak('/etc/passwd')", REFUSED),
    "file inside a view": ("SELECT * FROM outside", REFUSED),
    "file inside a string": ("SELECT * FROM query('SELECT * FROM read_text(''/etc/passwd'')')", CLOSED),
    "statement inside a string": ("SELECT * FROM query('DROP TABLE singer')", CLOSED),
    "other tables of a string": ("SELECT * FROM query_table('{home}/data.csv')", CLOSED),
    "Python's variables": ("SELECT * FROM opened", CLOSED),
    "getenv": ("SELECT getenv('HOME')", CLOSED),
    "secrets": ("SELECT * FROM duckdb_secrets()", CLOSED),
    "sequence": ("SELECT nextval('counter')", REFUSED),
    "sleep": ("SELECT sleep_ms(20000)", {"timeout", "error"}),
    "deep nesting": ("SELECT " + "(" * 20_000 + "1" + ")" * 20_000, {"error", "too_large", "timeout", "ok"}),
    "deep functions": ("SELECT " + "abs(" * 15_000 + "1" + ")" * 15_000, {"error", "too_large", "timeout"}),
    "deep subqueries": ("SELECT * FROM (" * 3000 + "SELECT 1" + ")" * 3000, {"error", "too_large", "timeout"}),
    "huge IN list": ("SELECT 1 IN (" + ",".join(["1"] * 20_000) + ")", {"ok", "timeout"}),
    "doubling names": (
        "WITH a0(x) AS (SELECT 1)" + "".join(f", a{i}(x) AS (SELECT l.x FROM a{i - 1} l, a{i - 1} r)" for i in range(1, 30)) + " SELECT x FROM a29",  # noqa: E501
        {"ok", "error", *STOPPED},
    ),
    "endless rows": ("SELECT i FROM range(1000000000000) t(i)", STOPPED),
    "endless count": ("SELECT count(*) FROM range(1000000000000) t(i) WHERE i % 7 = 3", STOPPED),
    "endless recursion": (f"{COUNT} SELECT count(*) FROM r", STOPPED),
    "endless sort": ("SELECT i FROM range(1000000000000) t(i) ORDER BY -i", STOPPED),
    "endless distinct": ("SELECT count(DISTINCT i) FROM range(1000000000000) t(i)", STOPPED),
    "endless window": ("SELECT sum(i) OVER () FROM range(1000000000000) t(i)", STOPPED),
    "endless text": ("SELECT length(string_agg(i::varchar, '')) FROM range(1000000000000) t(i)", STOPPED),
    "endless list": ("SELECT len(list(i)) FROM range(1000000000000) t(i)", STOPPED),
    "endless unnest": ("SELECT unnest(range(1000000000))", STOPPED),
    "cross join": ("SELECT count(*) FROM " + ", ".join(f"singer a{i}" for i in range(8)), STOPPED),
    "a list of a billion": ("SELECT len(range(1000000000))", STOPPED),
    "generate_series": ("SELECT generate_series(1, 1000000000)", STOPPED),
    "repeat, which cannot be interrupted": ("SELECT length(repeat('x', 3000000000))", STOPPED),
    "lpad, which cannot be interrupted": ("SELECT length(lpad('x', 400000000, 'y'))", STOPPED),
    "printf with a width": ("SELECT printf('%1000000000d', 1)", {"error", *STOPPED}),
    "format with a width": ("SELECT format('{:1000000000}', 1)", {"error", *STOPPED}),
    "doubling text": ("WITH RECURSIVE r(x) AS (SELECT 'aaaaaaaa' UNION ALL SELECT x || x FROM r) SELECT length(x) FROM r", STOPPED),  # noqa: E501
    "replace that grows": ("SELECT length(replace(repeat('a', 10000000), 'a', repeat('b', 10000)))", STOPPED),
    "many long values": ("SELECT repeat('y', 1000000) FROM range(1000000)", STOPPED),
    "one value of many bytes": ("SELECT repeat('y', 100000000)", STOPPED),
    "levenshtein": ("SELECT levenshtein(repeat('ab', 100000), repeat('ba', 100000))", STOPPED),
    "jaro": ("SELECT jaro_similarity(repeat('ab', 400000), repeat('ba', 400000))", STOPPED),
    "regular expression": ("SELECT regexp_matches(repeat('a', 1000000), '(a*)*(a*)*b')", {"ok", *STOPPED}),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_statement(database, home, name):
    sql, statuses = HOSTILE[name]
    before = state(home)
    result = database.execute(sql.replace("{home}", str(home)), LIMITS)
    if result.status == "timeout" and "timeout" not in statuses:  # the machine may be busy
        result = database.execute(sql.replace("{home}", str(home)), Limits(seconds=60, rows=LIMITS.rows))
    assert result.status in statuses, result.error
    assert result.error or result.ok
    assert state(home) == before
    assert "root:" not in repr(result.rows) and "secret" not in repr(result.rows[:3])
    assert database.execute("SELECT count(*) FROM singer").rows == [(200,)]


def test_a_statement_leaves_nothing_for_the_next(database):
    assert database.execute("SELECT setseed(0.5)").ok
    first = database.execute("SELECT random()").rows
    assert database.execute("SELECT setseed(0.5)").ok
    assert database.execute("SELECT random()").rows != first


@pytest.mark.parametrize(
    "sql", ["SELECT 1 -- done", "SELECT 1;", "/* a */ SELECT 1; -- b", "VALUES (1)", "FROM (SELECT 1)"]
)
def test_one_statement_with_comments_is_fine(database, sql):
    assert database.execute(sql).rows == [(1,)]


def test_values_are_plain_and_do_not_depend_on_the_time_zone(database):
    sql = (
        "SELECT 1.50, 2.0::decimal(6, 1), DATE '2024-02-29', [1, 2], 'nan'::double, true, NULL, 'ab'::blob, {'a': 1}, "
        "TIMESTAMPTZ '2024-01-31 23:30:00+00', DATE '0044-03-15 (BC)'"
    )
    rows = [(1.5, 2, "2024-02-29", "[1, 2]", "nan", True, None, b"ab", '{"a": 1}', "2024-01-31 23:30:00+00:00")]
    assert [row[:-1] for row in database.execute(sql).rows] == rows


def test_a_map_with_other_keys_than_texts_is_a_value(database):
    assert database.execute("SELECT MAP {DATE '2024-02-29': 1}, MAP {[1]: 2}").ok


def test_what_came_before_a_limit_is_kept(database):
    result = database.execute("SELECT i FROM range(100000) t(i)", Limits(rows=2))
    assert (result.status, result.rows, result.error) == ("too_large", [(0,), (1,)], "more than 2 rows")
    result = database.execute("SELECT i FROM range(100000) t(i)", Limits(result_bytes=5000))
    assert result.status == "too_large" and "5,000 bytes" in result.error and result.rows[:2] == [(0,), (1,)]
    assert database.execute("SELECT singer_id FROM singer", Limits(rows=200)).ok


def test_introspection(database):
    schema = introspect(database)
    assert (schema.dialect, schema.name) == ("duckdb", "shop")
    assert schema_text(schema).split("\n")[:2] == [
        " singer: singer_id, name, stadium_id > stadium",
        " stadium: stadium_id, name, price",
    ]
    tables = {table.label: table for table in schema.tables}
    assert tables["singer"].foreign_keys == (ForeignKey("stadium_id", "stadium", "stadium_id"),)
    assert [(c.type, c.nullable, c.primary_key) for c in tables["stadium"].columns] == [
        ("INTEGER", False, True), ("VARCHAR", False, False), ("DECIMAL(6,2)", True, False),
    ]  # fmt: skip
    assert tables["care.cheap"].view and not tables["singer"].view
    assert "CREATE TABLE care.cheap (" in schema_text(schema, "ddl", 9999)
    assert database.execute("SELECT * FROM care.cheap").rows == [("Arena",)]
    assert sample_rows(database, "stadium", 1) == [(1, "Arena", 10.5)]


@pytest.mark.parametrize(
    ("gold", "pred", "match"),
    [
        ("SELECT name, price FROM stadium", "SELECT price, name FROM stadium", 1),
        ("SELECT count(DISTINCT price) FROM stadium", "SELECT count(price) FROM stadium", 0),
        ("SELECT name FROM stadium ORDER BY price", "SELECT name FROM stadium ORDER BY price, name DESC", 1),
        ("SELECT name FROM stadium WHERE price > 99", "SELECT name FROM stadium WHERE false", 0),
        ("SELECT name FROM stadium QUALIFY row_number() OVER (ORDER BY price) = 1", "SELECT 'Arena'", 1),
        ("SELECT nosuch FROM stadium", "SELECT 1", None),
    ],
)
def test_verdicts(database, gold, pred, match):
    assert score(gold, pred, database).match == match


@pytest.mark.parametrize(
    ("sql", "name"),
    [
        ("SELECT nosuch FROM singer", "no_such_column"),
        ("SELECT 1 FROM nosuch", "no_such_table"),
        ("SELECT x.name FROM singer", "no_such_table"),
        ("SELEC 1", "syntax"),
        ("SELECT name FROM singer a, singer b", "ambiguous_column"),
        ("SELECT nosuch(1)", "function"),
        ("SELECT name, count(*) FROM singer", "aggregation"),
        ("SELECT 1 FROM singer WHERE count(*) > 1", "aggregation"),
        ("SELECT name + 1 FROM singer", "type"),
        ("SELECT 'x'::int", "type"),
        ("SELECT 1 UNION SELECT 1, 2", "type"),
        ("SELECT sleep_ms(20000)", "timeout"),
    ],
)
def test_error_classes(database, sql, name):
    error = database.execute(sql, LIMITS if name == "timeout" else None).error
    assert error_class(error) == name, error
    assert "\n" not in error and len(error) < 1001


# ---- files


@pytest.fixture
def files(tmp_path):
    """A folder with a table in each kind of file."""
    (tmp_path / "city.csv").write_text("id,name,founded\n1,Graz,1128-01-01\n2,Linz,0799-01-01\n")
    (tmp_path / "my mayors.tsv").write_text("city_id\tname\n1\tAda\n")
    duckdb.sql("SELECT range AS id, 'street ' || range AS name FROM range(5)").write_parquet(
        str(tmp_path / "street.parquet")
    )
    (tmp_path / "notes.txt").write_text("not a table")
    return tmp_path


def test_parquet_and_csv_files_of_a_folder_are_tables(files):
    before = state(files)
    connection = connect(files)
    assert (connection.name, connection.database.dialect, connection.notice) == (files.name, "duckdb", "")
    assert {t.label: [(c.name, c.type) for c in t.columns] for t in connection.schema.tables} == {
        "city": [("id", "BIGINT"), ("name", "VARCHAR"), ("founded", "DATE")],
        "my mayors": [("city_id", "BIGINT"), ("name", "VARCHAR")],
        "street": [("id", "BIGINT"), ("name", "VARCHAR")],
    }
    asked = connection.database.execute('SELECT c.name, m.name FROM city c JOIN "my mayors" m ON m.city_id = c.id')
    assert asked.rows == [("Graz", "Ada")]
    assert {e.question for e in connection.examples} >= {"How many cities are there?"}
    assert connection.database.execute(f"SELECT * FROM read_csv('{files}/city.csv')").status == "rejected"
    assert state(files) == before


def test_a_single_file_is_a_table_and_is_read_anew_when_it_changes(files):
    database = open_database(files / "city.csv")
    assert database.execute("SELECT count(*) FROM city").rows == [(2,)]
    (files / "city.csv").write_text("id,name\n1,Graz\n2,Linz\n3,Wels\n")
    database.look()
    assert database.execute("SELECT count(*) FROM city").rows == [(3,)]
    assert len(introspect(database).tables[0].columns) == 2


def test_a_replaced_duckdb_file_is_read_anew(tmp_path):
    for name, rows in (("now", 1), ("next", 2)):
        with duckdb.connect(str(tmp_path / f"{name}.db")) as connection:  # known by its content
            connection.execute(f"CREATE TABLE t AS FROM range({rows})")
    database = open_database(tmp_path / "now.db")
    assert database.execute("SELECT count(*) FROM t").rows == [(1,)]
    os.replace(tmp_path / "next.db", tmp_path / "now.db")
    database.look()
    assert database.execute("SELECT count(*) FROM t").rows == [(2,)]


def test_what_is_only_in_the_log_is_read_and_the_log_stays(tmp_path):
    code = (
        "import duckdb, os, sys; c = duckdb.connect(sys.argv[1]); c.execute('PRAGMA disable_checkpoint_on_shutdown');"
        "c.execute('CREATE TABLE t AS SELECT 7 AS a'); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.duckdb")], check=True)
    before = state(tmp_path)
    assert (tmp_path / "x.duckdb.wal").stat().st_size
    assert open_database(tmp_path / "x.duckdb").execute("SELECT a FROM t").rows == [(7,)]
    assert state(tmp_path) == before


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path):
    (tmp_path / "broken.duckdb").write_text("x" * 5000)
    (tmp_path / "broken.parquet").write_text("PAR1 not really")
    (tmp_path / "none").mkdir()
    for name, message in {
        "broken.duckdb": "Cannot open database .*broken.duckdb: .*not a valid DuckDB",
        "broken.parquet": "Cannot read .*broken.parquet: ",
        "none": "Cannot open database .*none: no Parquet or CSV file",
        "gone.duckdb": "Cannot open database .*gone.duckdb: No such file",
        "gone.csv": "Cannot open database .*gone.csv: No such file",
    }.items():
        with pytest.raises(DatabaseError, match=message) as caught:
            connect(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_without_duckdb_the_line_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    (tmp_path / "t.csv").write_text("a\n1\n")
    with pytest.raises(DatabaseError, match=r"DuckDB is not installed.*pip install 'sqlbench\[duckdb\]'"):
        connect(tmp_path / "t.csv")


# ---- processes


def workers():
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "sqlbench.database.duckdb_worker" in process.cmdline():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            pass
    return found


def test_memory_stays_within_what_is_stated(database):
    peak, stop = [0], threading.Event()

    def watch():
        while not stop.is_set():
            for process in workers():
                with suppress(psutil.NoSuchProcess):
                    peak[0] = max(peak[0], process.memory_info().rss)
            stop.wait(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for name in (
        "repeat, which cannot be interrupted",
        "lpad, which cannot be interrupted",
        "endless sort",
        "many long values",
    ):
        database.execute(HOSTILE[name][0], Limits(seconds=2))
    stop.set()
    watcher.join()
    assert 0 < peak[0] < house.MEMORY + (100 << 20)  # and the code that is loaded


def test_memory_that_a_statement_took_is_there_for_the_next(database):
    """DuckDB keeps 600 MB after this one, and the next could fail for want of memory."""
    result = database.execute("SELECT length(repeat('x', 300000000))", Limits(seconds=60))
    assert result.rows == [(300_000_000,)], result.error
    assert all(worker.memory_info().data <= house.MEMORY // 2 for worker in workers())
    assert database.execute("SELECT count(*) FROM singer", Limits(seconds=60)).rows == [(200,)]


def test_threads_share_a_few_processes(database):
    with ThreadPoolExecutor(16) as pool:
        sql = [f"SELECT count(*) + {i} FROM singer" for i in range(64)]
        results = list(pool.map(lambda text: database.execute(text, Limits(seconds=60)).rows, sql))
    assert results == [[(200 + i,)] for i in range(64)]
    assert 1 <= len(workers()) <= house.PROCESSES


def test_a_statement_that_ends_its_process_costs_nobody_else_anything(database):
    with ThreadPoolExecutor(3) as pool:
        greedy = pool.submit(database.execute, HOSTILE["repeat, which cannot be interrupted"][0], Limits(seconds=1))
        statuses = {database.execute("SELECT count(*) FROM singer", Limits(seconds=60)).status for _ in range(50)}
        assert greedy.result().status in STOPPED
    assert statuses == {"ok"}


def _count(path):
    return open_database(path).execute("SELECT count(*) FROM singer").rows


def test_a_forked_process_has_workers_of_its_own(database, home):
    assert database.execute("SELECT 1").ok
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_count, [home / "shop.duckdb"] * 4) == [[(200,)]] * 4
    assert database.execute("SELECT 2").rows == [(2,)]


def test_workers_end_with_their_process(home):
    code = (
        "import psutil, sys; from sqlbench.database.engine import open_database\n"
        "assert open_database(sys.argv[1]).execute('SELECT 1').ok\n"
        "print(*[p.pid for p in psutil.Process().children()]); sys.stdout.flush(); import os; os._exit(1)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(home / "shop.duckdb")], capture_output=True, text=True)
    pids = [int(pid) for pid in done.stdout.split()]
    assert pids, done.stderr
    _gone, left = psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], timeout=60)
    assert not left


def test_a_file_that_another_program_writes_is_refused_in_one_line(tmp_path):
    code = (
        "import duckdb, sys; c = duckdb.connect(sys.argv[1]); c.execute('CREATE TABLE t (a int)');"
        "c.execute('CHECKPOINT'); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "busy.duckdb")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        with pytest.raises(DatabaseError, match=r"Cannot open database .*busy.duckdb: .*[Ll]ock"):
            open_database(tmp_path / "busy.duckdb")
        writer.stdin.close()
