"""The same promises on PostgreSQL, on a server of its own: as a superuser login and as a low role."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from sqlbench.database.engine import open_database
from sqlbench.database.schema import introspect, sample_rows, schema_text
from sqlbench.database.types import ForeignKey, Limits
from sqlbench.errors import DatabaseError
from sqlbench.reward import score
from sqlbench.sqltree import error_class

psycopg = pytest.importorskip("psycopg")
LIMITS = Limits(seconds=0.3, rows=1000)


@pytest.fixture(scope="module")
def server(postgres):
    """Address of a database with two tables."""
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("CREATE DATABASE stadiums")
    address = postgres.replace("/postgres?", "/stadiums?")
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE stadium (stadium_id int PRIMARY KEY, name varchar(20) NOT NULL, price numeric(6, 2));"
            "CREATE TABLE singer (singer_id int PRIMARY KEY, name text, stadium_id int REFERENCES stadium);"
            "CREATE SEQUENCE counter;"
            "INSERT INTO stadium VALUES (1, 'Arena', 10.50), (2, 'Dome', 20), (3, 'Field', 20);"
            "INSERT INTO singer SELECT i, 'singer ' || i, 1 + i % 3 FROM generate_series(1, 200) i;"
            "CREATE ROLE reader LOGIN; GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader"
        )
    return address


@pytest.fixture(scope="module", params=["postgres", "reader"])
def database(server, request):
    database = open_database(server.replace("//postgres:", f"//{request.param}:"), LIMITS)
    yield database
    database.close()


def snapshot(server):
    with psycopg.connect(server) as connection:
        return connection.execute(
            "SELECT (SELECT array_agg(s::text ORDER BY 1) FROM stadium s), (SELECT count(*) FROM singer),"
            " (SELECT last_value FROM counter), (SELECT count(*) FROM pg_class), (SELECT count(*) FROM pg_largeobject_metadata)"  # noqa: E501
        ).fetchone()


REFUSED = {"rejected"}
HOSTILE = {
    "insert": ("INSERT INTO stadium VALUES (9, 'x', 1)", REFUSED),
    "with delete": ("WITH d AS (DELETE FROM stadium RETURNING *) SELECT * FROM d", REFUSED),
    "drop": ("DROP TABLE singer", REFUSED),
    "create as": ("CREATE TABLE x AS SELECT 1", REFUSED),
    "select into": ("SELECT * INTO x FROM stadium", REFUSED),
    "two statements": ("SELECT 1; SELECT 2", REFUSED),
    "select, then drop": ("SELECT 1; DROP TABLE singer", REFUSED),
    "commit, then drop": ("COMMIT; DROP TABLE singer", REFUSED),
    "comment before": ("/* SELECT */ DROP TABLE singer", REFUSED),
    "for update": ("SELECT * FROM stadium FOR UPDATE", REFUSED),
    "sequence": ("SELECT nextval('counter')", REFUSED),
    "copy to program": ("COPY (SELECT 1) TO PROGRAM 'touch /tmp/sqlbench-was-here'", REFUSED),
    "copy from file": ("COPY stadium FROM '/etc/passwd'", REFUSED),
    "do": ("DO $$ BEGIN DELETE FROM stadium; END $$", REFUSED),
    "explain analyze": ("EXPLAIN ANALYZE DELETE FROM stadium", REFUSED),
    "pg_read_file": ("SELECT pg_read_file('/etc/passwd')", REFUSED),
    "quoted": ("SELECT \"pg_read_file\"('/etc/passwd')", REFUSED),
    "escaped name": ("SELECT U&\"pg\\005fread_file\"('/etc/passwd')", REFUSED),
    "pg_ls_dir": ("SELECT pg_ls_dir('/')", REFUSED),
    "lo_import": ("SELECT lo_import('/etc/passwd')", REFUSED),
    "lo_export": ("SELECT lo_export(1, '/tmp/x')", REFUSED),
    "lo_create": ("SELECT lo_create(0)", REFUSED),
    "dblink": ("SELECT * FROM dblink('dbname=postgres', 'SELECT 1') AS t(a int)", REFUSED),
    "set": ("SET statement_timeout = 0", REFUSED),
    "set_config": ("SELECT set_config('statement_timeout', '0', false)", REFUSED),
    "set_config of the role": ("SELECT set_config('role', 'none', false)", REFUSED),
    "set_config in a string": ("SELECT query_to_xml('SELECT set_' || 'config(''role'', ''none'', false)', true, true, '')", REFUSED),  # noqa: E501
    "terminate": ("SELECT pg_terminate_backend(pg_backend_pid())", REFUSED),
    "passwords": ("SELECT rolpassword FROM pg_authid", REFUSED),
    "passwords, as a view": ("SELECT passwd FROM pg_catalog.\"pg_shadow\"", REFUSED),
    "advisory lock": ("SELECT pg_advisory_lock(1)", REFUSED),
    "empty": ("", REFUSED),
    "comment": ("-- SELECT 1", REFUSED),
    "NUL": ("SELECT 'a\0b'", REFUSED),
    "lone surrogate": ("SELECT '\ud800'", REFUSED),
    "1 MB of text": ("SELECT 1" + " + 1" * 250_000, REFUSED),
    "deep nesting": ("SELECT " + "(" * 20_000 + "1" + ")" * 20_000, {"error", "too_large", "timeout", "ok"}),
    "huge IN list": ("SELECT 1 IN (" + ",".join(["1"] * 20_000) + ")", {"ok"}),
    "sleep": ("SELECT pg_sleep(10)", {"timeout"}),
    "sleep per row": ("SELECT pg_sleep(0.1) FROM singer", {"timeout"}),
    "endless rows": ("SELECT generate_series(1, 1000000000000)", {"too_large"}),
    "endless count": ("SELECT count(*) FROM generate_series(1, 1000000000000)", {"timeout"}),
    "endless recursion": ("WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT count(*) FROM r", {"timeout", "error"}),  # noqa: E501
    "cross join": ("SELECT count(*) FROM " + ", ".join(f"singer a{i}" for i in range(8)), {"timeout"}),
    "regular expression": ("SELECT repeat('a', 50000) ~ '(a*)*(a*)*b'", {"timeout", "ok", "error", "too_large"}),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_statement(database, server, name):
    sql, statuses = HOSTILE[name]
    before = snapshot(server)
    start = time.perf_counter()
    result = database.execute(sql)
    seconds = time.perf_counter() - start
    assert result.status in statuses, result.error
    assert seconds < LIMITS.seconds + 0.2
    assert snapshot(server) == before
    assert "root:" not in repr(result.rows)
    assert database.execute("SELECT count(*), current_setting('transaction_read_only') FROM singer").rows == [
        (200, "on")
    ]


def test_a_superuser_login_steps_down(server):
    database = open_database(server, LIMITS)
    assert database.execute("SELECT current_user").rows == [("pg_read_all_data",)]


def test_values_can_be_compared_and_written_as_json(database):
    sql = (
        "SELECT 1.50::numeric, 2::numeric, DATE '2024-02-29', ARRAY[1, 2], 'NaN'::float8, true, NULL, '\\x6162'::bytea"
    )
    assert database.execute(sql).rows == [(1.5, 2, "2024-02-29", "[1, 2]", "nan", True, None, b"ab")]


def test_times_that_python_does_not_have_are_values_all_the_same(database):
    sql = (
        "SELECT 'infinity'::date, '0044-03-15 BC'::date, '-infinity'::timestamp, TIME '24:00', TIMESTAMP '2024-02-29',"
        " INTERVAL '1 year 2 days'"
    )
    rows = [("infinity", "0044-03-15 BC", "-infinity", "24:00:00", "2024-02-29 00:00:00", "1 year 2 days")]
    assert database.execute(sql).rows == rows


def test_introspection(database):
    schema = introspect(database)
    assert (schema.dialect, schema.name) == ("postgresql", "stadiums")
    assert schema_text(schema) == " singer: singer_id, name, stadium_id > stadium\n stadium: stadium_id, name, price"
    assert schema.tables[0].foreign_keys == (ForeignKey("stadium_id", "stadium", "stadium_id"),)
    assert [(c.type, c.nullable, c.primary_key) for c in schema.tables[1].columns] == [
        ("INTEGER", False, True), ("CHARACTER VARYING(20)", False, False), ("NUMERIC(6,2)", True, False),
    ]  # fmt: skip
    assert sample_rows(database, "stadium", 1) == [(1, "Arena", 10.5)]


@pytest.mark.parametrize(
    ("gold", "pred", "match"),
    [
        ("SELECT name, price FROM stadium", "SELECT price, name FROM stadium", 1),
        ("SELECT DISTINCT price FROM stadium", "SELECT price FROM stadium", 1),
        ("SELECT count(DISTINCT price) FROM stadium", "SELECT count(price) FROM stadium", 0),
        ("SELECT name FROM stadium ORDER BY price", "SELECT name FROM stadium ORDER BY price, name DESC", 1),
        ("SELECT name FROM stadium WHERE price > 99", "SELECT name FROM stadium WHERE false", 0),
        ("SELECT avg(price) FROM stadium", "SELECT sum(price) / count(*) FROM stadium", 1),
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
        ("SELECT 1 / 0", "type"),
        ("SELECT 1 UNION SELECT 1, 2", "type"),
        ("SELECT pg_sleep(10)", "timeout"),
    ],
)
def test_error_classes(database, sql, name):
    assert error_class(database.execute(sql).error) == name


def test_somebody_elses_cancel_is_no_timeout(database, server):
    with psycopg.connect(server, autocommit=True) as other:
        cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name = 'sqlbench'"
        timer = threading.Timer(0.1, other.execute, args=(cancel,))
        timer.start()
        result = database.execute("SELECT count(*), pg_sleep(0.3) FROM stadium", Limits(seconds=3))
        timer.join()
    assert result.rows == [(3, "")] and result.seconds > 0.3


def test_connections_that_were_lost_while_nothing_ran_are_opened_anew(server):
    database = open_database(server, LIMITS)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(database.execute, ["SELECT pg_sleep(0.1)"] * 2))
    with psycopg.connect(server) as other:
        other.execute(
            "SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity "
            "WHERE application_name = 'sqlbench' AND state = 'idle'"
        )
    assert [database.execute("SELECT 1").rows for _ in range(3)] == [[(1,)]] * 3


def test_a_server_that_hangs_is_an_error_and_holds_up_no_other_deadline(tmp_path, server):
    endless = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT x FROM r LIMIT 1 OFFSET 30000000"
    database, other = open_database(server, LIMITS), open_database(":memory:")
    with psycopg.connect(server) as connection:
        postmaster = connection.execute("SELECT split_part(pg_read_file('postmaster.pid'), E'\n', 1)::int").fetchone()
    processes = [psutil.Process(*postmaster), *psutil.Process(*postmaster).children()]
    try:
        for process in processes:
            process.suspend()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(database.execute, "SELECT pg_sleep(9)")
            for _ in range(3):
                result = other.execute(endless, Limits(seconds=0.3))
                assert result.status == "timeout" and result.seconds < 0.5
            with pytest.raises(DatabaseError, match="lost the connection"):
                waiting.result(timeout=5)
    finally:
        for process in processes:
            process.resume()
    assert database.execute("SELECT 1").rows == [(1,)]


def test_what_cannot_be_reached_is_one_line_without_the_password():
    with pytest.raises(DatabaseError, match=r"cannot open postgresql://me@localhost:1/x") as error:
        open_database("postgresql://me:secret@localhost:1/x")
    assert "secret" not in str(error.value)
