"""The same promises on PostgreSQL, on a server of its own: as a superuser login and as a low role."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest

from sqlbench.agent.prompts import render_execution
from sqlbench.database.engine import open_database
from sqlbench.database.error_classes import error_class
from sqlbench.database.postgres import _CALLS, _SUSPECT
from sqlbench.database.schema import introspect, quote, sample_rows, schema_text
from sqlbench.database.types import ForeignKey, Limits
from sqlbench.errors import DatabaseError
from sqlbench.reward import score
from sqlbench.rollout import record_execution

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
            "CREATE FUNCTION dblink(text, text) RETURNS SETOF record LANGUAGE sql AS 'SELECT 1';"
            "CREATE FUNCTION crosstab(text) RETURNS text LANGUAGE sql AS 'SELECT $1';"
            "CREATE SCHEMA care CREATE VIEW agents_stats AS"
            " SELECT name, name AS patients_status, 'set_config' AS lo_status FROM public.singer LIMIT 2;"
            "CREATE ROLE reader LOGIN; GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader;"
            "GRANT USAGE ON SCHEMA care TO reader; GRANT SELECT ON care.agents_stats TO reader"
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
    "dblink": ("SELECT * FROM public.dblink('dbname=postgres', 'SELECT 1') AS t(a int)", REFUSED),
    "crosstab": ("SELECT * FROM crosstab('SELECT set_' || 'config(''role'', ''none'', false)')", REFUSED),
    "set": ("SET statement_timeout = 0", REFUSED),
    "set_config": ("SELECT set_config('statement_timeout', '0', false)", REFUSED),
    "set_config of the role": ("SELECT set_config('role', 'none', false)", REFUSED),
    "set_config in a string": ("SELECT query_to_xml('SELECT set_' || 'config(''role'', ''none'', false)', true, true, '')", REFUSED),  # noqa: E501
    "terminate": ("SELECT pg_terminate_backend(pg_backend_pid())", REFUSED),
    "passwords": ("SELECT rolpassword FROM pg_authid", REFUSED),
    "passwords, as a view": ("SELECT passwd FROM pg_catalog.\"pg_shadow\"", REFUSED),
    "passwords, joined": ("SELECT r.rolname, a.* FROM pg_roles r JOIN pg_authid a USING (oid)", REFUSED),
    "passwords, as XML": ("SELECT table_to_xml('pg_' || 'authid', true, true, '')", REFUSED),
    "schema as XML": ("SELECT schema_to_xml('pg_catalog', true, true, '')", REFUSED),
    "statistics of all tables": ("TABLE pg_statistic", REFUSED),
    "foreign passwords": ("SELECT umoptions FROM pg_user_mapping", REFUSED),
    "ts_stat": ("SELECT * FROM ts_stat('SELECT set_' || 'config(''role'', ''none'', false)::tsvector')", REFUSED),
    "ts_rewrite": ("SELECT ts_rewrite('a'::tsquery, 'SELECT set_' || 'config(''role'', ''none'', false)')", REFUSED),
    "qualified, comment between": ("SELECT pg_catalog . /* '*/ set_config -- (\n ('role', 'none', false)", REFUSED),
    "quoted and qualified": ('SELECT "pg_catalog"."set_config"(\'role\', \'none\', false)', REFUSED),
    "escaped with another sign": ("SELECT U&\"!0073et_config\" UESCAPE '!' ('role', 'none', false)", REFUSED),
    "after a string that goes on": ("SELECT E'a'\n'\\'' , set_config('role', 'none', false), ''", REFUSED),
    "after a dollar string": ("SELECT $a$ ' $a$, set_config('role', 'none', false), ''", REFUSED),
    "in LIMIT": ("SELECT 1 LIMIT length(set_config('role', 'none', false))", REFUSED),
    "in a window frame": ("SELECT sum(1) OVER (ORDER BY 2 ROWS length(set_config('role', 'none', false)) PRECEDING)", REFUSED),  # noqa: E501
    "in VALUES": ("VALUES (1, set_config('role', 'none', false))", REFUSED),
    "in FROM": ("SELECT * FROM ROWS FROM (set_config('role', 'none', false), generate_series(1, 2))", REFUSED),
    "in a branch": ("SELECT CASE WHEN false THEN set_config('role', 'none', false) END", REFUSED),
    "in IN": ("SELECT 1 WHERE set_config('role', 'none', false) IN (SELECT name FROM singer)", REFUSED),
    "in a WITH": ("WITH a AS (SELECT (SELECT set_config('role', 'none', false)) b) SELECT b FROM a", REFUSED),
    "large object": ("SELECT lo_from_bytea(0, 'x'), loread(lo_open(1, 262144), 1)", REFUSED),
    "kill the others": ("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()", REFUSED),
    "seed": ("SELECT setseed(0.5)", REFUSED),
    "notify": ("SELECT pg_notify('a', 'b')", REFUSED),
    "snapshot": ("SELECT pg_export_snapshot()", REFUSED),
    "explain of a call": ("EXPLAIN SELECT set_config('role', 'none', false)", REFUSED),
    "prepared": ("PREPARE x AS SELECT pg_read_file('/etc/passwd')", REFUSED),
    "listen": ("LISTEN pg_x", REFUSED),
    "comment in a comment": ("/* /* */ SELECT 1 */", REFUSED),
    "comments without end": ("/*" * 49_000, {"rejected"}),
    "more bytes than characters": (f"SELECT '{'ä' * 60_000}'", {"rejected"}),
    "quote without end": ("SELECT '" + "pg_" * 30_000, {"error"}),
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
    result = database.execute(sql)
    if result.status == "timeout" and "timeout" not in statuses:  # the machine may be busy
        result = database.execute(sql, Limits(seconds=60, rows=LIMITS.rows))
    assert result.status in statuses, result.error
    assert snapshot(server) == before
    assert "root:" not in repr(result.rows)
    assert database.execute("SELECT count(*), current_setting('transaction_read_only') FROM singer").rows == [
        (200, "on")
    ]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT name, patients_status FROM care.agents_stats",
        "SELECT 1 AS set_config, 2 AS \"pg_read_file('x')\", 3 AS pg_authid",
        "SELECT 'set_config(1)', $$pg_sleep(1), dblink('x')$$, E'\\'nextval(1)'",
        "SELECT 1 /* SELECT pg_read_file('/etc/passwd') */ -- pg_authid",
        "SELECT name FROM care.agents_stats AS pg_authid (name, lo_export)",
        'SELECT U&"n\\0061me" FROM singer',
        "/* INSERT /* nested */ DROP */ SELECT 1",
        "-- DROP TABLE singer\nSELECT 1",
        "(((SELECT 1)))",
        "TABLE stadium",
        "VALUES (1)",
        "SELECT 1 ;\n",
        "SELECT rolname, r.rolpassword FROM pg_roles r",
        "SELECT usename, passwd FROM pg_catalog.pg_user",
        "SELECT ts_rewrite('a & b'::tsquery, 'a'::tsquery, 'c'::tsquery)",
        "SELECT random(), clock_timestamp(), pg_sleep(0), pg_total_relation_size('singer'), pg_backend_pid()",
        "SELECT count(*) FROM pg_locks, pg_stat_activity, pg_sequences WHERE sequencename LIKE 'pg_%'",
        "SELECT relname FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname = 'public'",
    ],
)
def test_what_only_looks_like_a_call_that_is_refused_runs(database, sql):
    result = database.execute(sql)
    assert result.ok, result.error


@pytest.fixture(scope="module")
def renamed(server):
    """A database in which calls that are refused have other names."""
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("CREATE DATABASE renamed TEMPLATE template0")
    address = server.replace("/stadiums?", "/renamed?")
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(
            "CREATE VIEW a_call AS SELECT set_config('role', 'none', false);"
            "CREATE VIEW two_calls AS SELECT * FROM a_call;"
            "CREATE OPERATOR ~!~ (RIGHTARG = bigint, FUNCTION = pg_advisory_lock);"
            "CREATE VIEW an_operator AS SELECT 1 FROM generate_series(1, 2) i WHERE (~!~ i::bigint) IS NULL;"
            "CREATE CAST (bigint AS boolean) WITH FUNCTION pg_try_advisory_lock(bigint);"
            "CREATE AGGREGATE setting(text, boolean) (SFUNC = set_config, STYPE = text, INITCOND = 'role');"
            "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader"
        )
    return address


@pytest.mark.parametrize("role", ["postgres", "reader"])
@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM a_call",
        "SELECT count(*) FROM two_calls",
        "SELECT ~!~ 1::bigint",
        "SELECT * FROM an_operator",
        "SELECT 1::bigint::boolean",
        "SELECT setting('none', false)",
    ],
)
def test_a_call_under_another_name_is_refused(renamed, role, sql):
    database = open_database(renamed.replace("//postgres:", f"//{role}:"), LIMITS)
    result = database.execute(sql)
    assert result.status == "rejected" and result.error.startswith("not allowed in a read-only query: ")
    assert database.execute("SELECT 1").rows == [(1,)]
    database.close()


def test_every_call_that_is_refused_makes_its_text_suspect(server):
    with psycopg.connect(server) as connection:
        named = (
            f"SELECT DISTINCT p.proname FROM pg_proc p WHERE {_CALLS} AND NOT 'internal'::regtype = ANY (proargtypes)"
        )
        names = [
            name
            for (name,) in connection.execute(
                f"{named} AND prorettype NOT IN ('trigger'::regtype, 'internal'::regtype)"
            )
        ]
    assert len(names) > 150 and [name for name in names if not _SUSPECT.search(name)] == []


def test_a_login_that_was_given_a_dangerous_function_cannot_call_it_here(server):
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("CREATE ROLE trusted LOGIN; GRANT EXECUTE ON FUNCTION pg_read_file(text) TO trusted")
    result = open_database(server.replace("//postgres:", "//trusted:"), LIMITS).execute("SELECT pg_read_file('x')")
    assert (result.status, result.error) == ("rejected", "not allowed in a read-only query: pg_read_file")


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
    assert schema_text(schema) == (
        " singer: singer_id, name, stadium_id > stadium\n stadium: stadium_id, name, price\n"
        " care.agents_stats: name, patients_status, lo_status"
    )
    assert schema.tables[0].foreign_keys == (ForeignKey("stadium_id", "stadium", "stadium_id"),)
    assert [(c.type, c.nullable, c.primary_key) for c in schema.tables[1].columns] == [
        ("INTEGER", False, True), ("CHARACTER VARYING(20)", False, False), ("NUMERIC(6,2)", True, False),
    ]  # fmt: skip
    assert sample_rows(database, "stadium", 1) == [(1, "Arena", 10.5)]


def created(postgres, name, *statements, options=""):
    """Address of a new database."""
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template0 {options}")
    address = postgres.replace("/postgres?", f"/{name}?")
    with psycopg.connect(address, autocommit=True, client_encoding="utf8") as connection:
        for statement in statements:
            connection.execute(statement)
    return address


def as_role(address, role):
    return address.replace("//postgres:", f"//{role}:")


ASKED = "SELECT name FROM place WHERE name = 'café'"


@pytest.mark.parametrize("encoding", ["UTF8", "LATIN1"])
def test_text_is_utf8_whatever_the_environment_the_address_or_the_database_say(postgres, monkeypatch, encoding):
    name = f"places_{encoding.lower()}"
    address = created(
        postgres,
        name,
        "CREATE TABLE place (name text)",
        "INSERT INTO place VALUES ('café')",
        f"ALTER DATABASE {name} SET client_encoding = 'LATIN1'",
        options=f"ENCODING {encoding} LOCALE 'C'",
    )
    assert open_database(address).execute(ASKED).rows == [("café",)]
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    for more in ("", "&client_encoding=LATIN1", "&options=-c%20client_encoding%3DLATIN1"):
        assert open_database(address + more).execute(ASKED).rows == [("café",)]
    if encoding == "LATIN1":
        assert open_database(address).execute("SELECT 1 FROM place WHERE name = '東京'").status == "error"


def test_a_database_without_an_encoding_shows_what_is_no_utf8_as_replaced(postgres):
    address = created(
        postgres,
        "places_ascii",
        "CREATE TABLE place (name text, kinds varchar[])",
        "INSERT INTO place VALUES ('café', '{}'), (E'caf\\xe9', ARRAY[E'bl\\xe5'])",
        options="ENCODING SQL_ASCII LOCALE 'C'",
    )
    database = open_database(address)
    assert database.execute(ASKED).rows == [("café",)]
    assert database.execute("SELECT * FROM place").rows == [("café", "[]"), ("caf\ufffd", '["bl\ufffd"]')]
    assert score("SELECT name FROM place", "SELECT name FROM place", database).match == 1


SHOWN = {
    "TIMESTAMPTZ '2024-01-31 23:30:00+00'": "2024-01-31 23:30:00+00",
    "TIMESTAMPTZ '2024-01-31 23:30:00+00'::date::text": "2024-01-31",
    "'01/02/2024'::date": "2024-01-02",
    "INTERVAL '1 day 2 hours'": "1 day 02:00:00",
    "INTERVAL '1 day 2 hours' || ''": "1 day 02:00:00",
    "0.1::float8 + 0.2::float8": 0.1 + 0.2,
    "(0.1::float8 + 0.2::float8)::text": "0.30000000000000004",
    "'\\x61'::bytea::text": "\\x61",
    "'a\\b'": "a\\b",
    "(NULL = NULL) IS NULL": True,
    "ARRAY[DATE '2024-02-01']::text": "{2024-02-01}",
}


def test_values_are_shown_alike_whatever_the_environment_the_role_or_the_database_say(postgres, monkeypatch):
    settings = {
        "datestyle": "German, DMY",
        "intervalstyle": "iso_8601",
        "timezone": "Asia/Tokyo",
        "extra_float_digits": "-5",
        "bytea_output": "escape",
        "standard_conforming_strings": "off",
        "transform_null_equals": "on",
    }
    changes = [
        f"ALTER {of} SET {k} = '{v}'" for of in ("ROLE abroad", "DATABASE settings") for k, v in settings.items()
    ]
    address = created(postgres, "settings", "CREATE ROLE abroad LOGIN", *changes)
    monkeypatch.setenv("PGTZ", "Asia/Tokyo")
    monkeypatch.setenv("PGDATESTYLE", "German")
    monkeypatch.setenv("PGOPTIONS", "-c intervalstyle=iso_8601 -c extra_float_digits=-5")
    for role in ("postgres", "abroad"):
        assert open_database(as_role(address, role)).execute(f"SELECT {', '.join(SHOWN)}").rows == [
            tuple(SHOWN.values())
        ]


@pytest.fixture(scope="module")
def corp(postgres):
    """A database with tables of every kind in several schemas, some of which the role may not read."""
    return created(
        postgres,
        "corp",
        "CREATE SCHEMA corp; CREATE SCHEMA \"Data Mart\"; CREATE SCHEMA closed; CREATE ROLE clerk LOGIN",
        "CREATE TYPE corp.mood AS ENUM ('sad', 'ok'); CREATE DOMAIN corp.email AS varchar(80) CHECK (VALUE LIKE '%@%')",
        "CREATE TABLE corp.customer (id int PRIMARY KEY, name text, mail corp.email, mood corp.mood, moods corp.mood[], tags text[])",  # noqa: E501
        "CREATE TABLE corp.orders (id int, day date, customer_id int REFERENCES corp.customer, PRIMARY KEY (id, day)) PARTITION BY RANGE (day)",  # noqa: E501
        *[f"CREATE TABLE corp.orders_{y} PARTITION OF corp.orders FOR VALUES FROM ('{y}-01-01') TO ('{y + 1}-01-01')" for y in range(1990, 2038)],  # noqa: E501
        "CREATE TABLE corp.delivery (order_id int, day date, FOREIGN KEY (order_id, day) REFERENCES corp.orders)",
        "CREATE TABLE corp.log (day date); CREATE TABLE corp.log_1 (CHECK (day < '2024-01-01')) INHERITS (corp.log)",
        "CREATE TABLE corp.city (name text); CREATE TABLE corp.capital (state text) INHERITS (corp.city)",
        'CREATE TABLE "Data Mart"."Order Lines" ("Line" int PRIMARY KEY, customer_id int REFERENCES corp.customer)',
        "CREATE TABLE public.customer (id int); CREATE TABLE public.visit (customer_id int REFERENCES corp.customer)",
        "CREATE VIEW corp.sad AS SELECT name FROM corp.customer WHERE mood = 'sad'",
        "CREATE MATERIALIZED VIEW corp.names AS SELECT name FROM corp.customer",
        "CREATE MATERIALIZED VIEW corp.unfilled AS SELECT name FROM corp.customer WITH NO DATA",
        "CREATE TABLE corp.salary (id int PRIMARY KEY, amount numeric); CREATE TABLE closed.secret (id int)",
        "CREATE TABLE corp.employee (id int PRIMARY KEY, name text, salary_id int REFERENCES corp.salary, phone text)",
        "CREATE TABLE corp.extension_own (id int); ALTER EXTENSION plpgsql ADD TABLE corp.extension_own",
        "INSERT INTO corp.customer VALUES (1, 'Ada', 'ada@x.org', 'ok', '{sad,ok}', '{a}'), (2, 'Bo', 'bo@x.org', 'sad', '{}', '{}')",  # noqa: E501
        "INSERT INTO corp.orders VALUES (1, '2024-05-05', 1), (2, '1999-05-05', 1), (3, '2024-05-06', 2)",
        'GRANT USAGE ON SCHEMA corp, "Data Mart" TO clerk; GRANT SELECT ON ALL TABLES IN SCHEMA corp TO clerk',
        'GRANT SELECT ON ALL TABLES IN SCHEMA public, "Data Mart", closed TO clerk',
        "REVOKE SELECT ON corp.salary FROM clerk",
        "REVOKE SELECT ON corp.employee FROM clerk; GRANT SELECT (id, name, salary_id) ON corp.employee TO clerk",
        "CREATE ROLE stranger LOGIN; ALTER ROLE clerk IN DATABASE corp SET search_path = public",
    )  # fmt: skip


TEXT = """\
 customer: id
 visit: customer_id > corp.customer
 Data Mart.Order Lines: Line, customer_id > corp.customer
 corp.capital: name, state
 corp.city: name
 corp.customer: id, name, mail, mood, moods, tags
 corp.delivery: order_id > corp.orders, day > corp.orders
 corp.employee: id, name, salary_id
 corp.log: day
 corp.orders: id, day, customer_id > corp.customer
 corp.names: name
 corp.sad: name"""


def test_the_schema_shows_what_the_role_may_read_in_every_schema_and_no_partitions(corp):
    schema = introspect(open_database(as_role(corp, "clerk")))
    assert schema_text(schema, max_chars=9999) == TEXT
    everything = {table.label for table in introspect(open_database(corp)).tables}
    assert everything - {table.label for table in schema.tables} == {"corp.salary", "closed.secret"}
    assert not introspect(open_database(as_role(corp, "stranger"))).tables


def test_names_of_other_schemas_are_qualified_and_quoted_in_ddl_and_types_stay_as_they_are(corp):
    text = schema_text(introspect(open_database(as_role(corp, "clerk"))), "ddl", 9999)
    assert (
        """\
CREATE TABLE "Data Mart"."Order Lines" (
  "Line" INTEGER PRIMARY KEY,
  customer_id INTEGER,
  FOREIGN KEY (customer_id) REFERENCES corp.customer (id)
);"""
        in text
    )
    assert (
        """\
CREATE TABLE corp.customer (
  id INTEGER PRIMARY KEY,
  name TEXT,
  mail CHARACTER VARYING(80),
  mood corp.mood,
  moods corp.mood[],
  tags TEXT[]
);"""
        in text
    )
    assert text.count("REFERENCES corp.orders (") == 2  # once for each column, and not again for each partition


def test_a_schema_of_the_search_path_needs_no_prefix(corp):
    schema = introspect(open_database(corp + "&options=-c%20search_path%3Dcorp,public"))
    names = {table.label for table in schema.tables}
    assert {"customer", "orders", "public.customer", "Data Mart.Order Lines"} <= names


def test_what_the_schema_shows_can_be_queried(corp):
    database = open_database(as_role(corp, "clerk"))
    for table in introspect(database).tables:
        columns = ", ".join(quote(column.name) for column in table.columns)
        result = database.execute(f"SELECT {columns} FROM {quote(table.name, table.schema)}")
        assert result.ok, result.error
    assert database.execute("SELECT count(*) FROM corp.orders").rows == [(3,)]


@pytest.mark.parametrize(
    ("sql", "hint"),
    [
        ("SELECT 1 FROM orders", "use corp.orders"),
        ("SELECT 1 FROM corp.order", "use corp.orders"),
        ("SELECT 1 FROM order_lines", 'use "Data Mart"."Order Lines"'),
        ('SELECT line FROM "Data Mart"."Order Lines"', 'use "Line"'),
        ("SELECT state FROM visit", "state is in corp.capital"),
    ],
)
def test_hints_name_the_schema(corp, sql, hint):
    database = open_database(as_role(corp, "clerk"))
    record = record_execution(1, sql, database.execute(sql), 2048)
    assert hint in render_execution(record, "chat", 2048, introspect(database))


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
        result = database.execute("SELECT count(*), pg_sleep(0.3) FROM stadium", Limits(seconds=60))
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
            with suppress(psutil.NoSuchProcess):  # the session of the question above may just have ended
                process.suspend()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(database.execute, "SELECT pg_sleep(9)")
            for _ in range(3):
                result = other.execute(endless, Limits(seconds=0.3))
                assert result.status == "timeout"
            with pytest.raises(DatabaseError, match="Connection to PostgreSQL lost"):
                waiting.result(timeout=120)
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()
    assert database.execute("SELECT 1").rows == [(1,)]


def test_what_cannot_be_reached_is_one_line_without_the_password():
    with pytest.raises(DatabaseError, match=r"Cannot open postgresql://me@localhost:1/x") as error:
        open_database("postgresql://me:secret@localhost:1/x")
    assert "secret" not in str(error.value)
