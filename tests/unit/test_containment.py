"""Hostile and clumsy SQL on SQLite: nothing is written, nothing else is read, time and memory stay within limits."""

from __future__ import annotations

import hashlib
import resource
import sqlite3
import threading
from contextlib import closing

import pytest

from sqlbench.database.engine import open_database
from sqlbench.database.types import Limits

LIMITS = Limits(seconds=0.3, rows=1000)
COUNT = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r)"
GROW = "WITH RECURSIVE r(x) AS (SELECT 'aaaaaaaa' UNION ALL SELECT x || x FROM r WHERE length(x) < 1e9)"
LONG = "SELECT group_concat('aaaaaaaaaaaaaaaaaaaaaaaa', '') AS s FROM item a, item b"
LITERAL = "a" * 45_000
SIZES = (6400, 9600, 64_000, 640_000)

pytestmark = pytest.mark.timeout(60)


def straight(call: str, times: int = 450, size: int = 1) -> str:
    """A statement that makes the same call on one long value many times, with nowhere to interrupt it."""
    value = f"SELECT body AS s FROM doc WHERE size = {size}"
    return f"WITH t AS MATERIALIZED ({value}) SELECT " + " + ".join([call] * times) + " AS x FROM t"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    for name, secret in (("shop", "public"), ("other", "secret")):
        connection = sqlite3.connect(folder / f"{name}.sqlite")
        connection.execute("CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT)")
        connection.executemany("INSERT INTO item (name) VALUES (?)", [(f"{secret} {i}",) for i in range(100)])
        connection.execute("CREATE TABLE doc (size INTEGER PRIMARY KEY, body TEXT, global_rank INTEGER)")
        for size in SIZES:
            body = ("the river runs. " * (size // 16 + 1))[:size]
            connection.execute("INSERT INTO doc VALUES (?, ?, 1)", (size, body))
        connection.execute("INSERT INTO doc VALUES (1, ?, 1)", ("a" * 640_000,))
        connection.commit()
        connection.close()
    return folder


@pytest.fixture(scope="module")
def database(home):
    return open_database(home / "shop.sqlite", LIMITS)


def state(folder):
    """Every file of a folder with its content and time of change."""
    return {p.name: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in folder.iterdir()}


# name -> (statement, statuses that are fine); {home} is the folder of the databases
REFUSED = {"rejected"}
STOPPED = {"timeout", "too_large"}
QUICK = {"ok", *STOPPED}
"""For what would be slow with SQLite's own functions."""
HOSTILE = {
    "insert": ("INSERT INTO item (name) VALUES ('x')", REFUSED),
    "update": ("UPDATE item SET name = 'x'", REFUSED),
    "delete": ("DELETE FROM item", REFUSED),
    "with delete": ("WITH x AS (SELECT 1) DELETE FROM item", REFUSED),
    "returning": ("DELETE FROM item RETURNING id", REFUSED),
    "drop": ("DROP TABLE item", REFUSED),
    "alter": ("ALTER TABLE item RENAME TO x", REFUSED),
    "create": ("CREATE TABLE x (y)", REFUSED),
    "create as": ("CREATE TABLE x AS SELECT * FROM item", REFUSED),
    "temporary table": ("CREATE TEMP TABLE x (y)", REFUSED),
    "virtual table": ("CREATE VIRTUAL TABLE x USING fts5(y)", REFUSED),
    "trigger": ("CREATE TRIGGER x AFTER INSERT ON item BEGIN SELECT 1; END", REFUSED),
    "index": ("CREATE INDEX x ON item (name)", REFUSED),
    "reindex": ("REINDEX", REFUSED),
    "analyze": ("ANALYZE", REFUSED),
    "attach": ("ATTACH '{home}/other.sqlite' AS other", REFUSED),
    "attach a new file": ("ATTACH '{home}/new.sqlite' AS other", REFUSED),
    "detach": ("DETACH main", REFUSED),
    "vacuum": ("VACUUM", REFUSED),
    "vacuum into": ("VACUUM INTO '{home}/copy.sqlite'", REFUSED),
    "pragma": ("PRAGMA table_info(item)", REFUSED),
    "pragma that writes": ("PRAGMA user_version = 7", REFUSED),
    "pragma that lifts a limit": ("PRAGMA hard_heap_limit = 0", REFUSED),
    "pragma journal": ("PRAGMA journal_mode = wal", REFUSED),
    "pragma query_only": ("PRAGMA query_only = off", REFUSED),
    "pragma as a table": ("SELECT * FROM pragma_database_list", REFUSED),
    "pages as a table": ("SELECT * FROM sqlite_dbpage", {"rejected", "error"}),
    "load_extension": ("SELECT load_extension('{home}/x')", REFUSED),
    "readfile": ("SELECT readfile('{home}/other.sqlite')", {"error", "rejected"}),
    "writefile": ("SELECT writefile('{home}/w', 'x')", {"error", "rejected"}),
    "edit": ("SELECT edit('x', 'touch {home}/w')", {"error", "rejected"}),
    "tokenizer": ("SELECT fts3_tokenizer('simple')", REFUSED),
    "tokenizer in a table": ("SELECT * FROM fts3tokenize('simple', 'a')", {"error", "rejected"}),
    "fts3 optimize": ("SELECT optimize(item) FROM item", {"error", "rejected"}),
    "rtreecheck": ("SELECT rtreecheck('item')", {"error", "rejected"}),
    "begin": ("BEGIN IMMEDIATE", REFUSED),
    "savepoint": ("SAVEPOINT x", REFUSED),
    "two statements": ("SELECT 1; SELECT 2", REFUSED),
    "select, then drop": ("SELECT 1; DROP TABLE item", REFUSED),
    "empty": ("", REFUSED),
    "space": (" \n\t ", REFUSED),
    "semicolon": (";", REFUSED),
    "comment": ("-- SELECT 1", REFUSED),
    "open comment": ("/* SELECT 1", REFUSED),
    "NUL": ("SELECT 'a\0b'", REFUSED),
    "NUL after the end": ("SELECT 1\0; DROP TABLE item", REFUSED),
    "lone surrogate": ("SELECT '\ud800'", REFUSED),
    "1 MB of text": ("SELECT 1" + " + 1" * 250_000, REFUSED),
    "1 MB of nothing": ("SELECT 1" + " " * 1_000_000, REFUSED),
    "deep parentheses": ("SELECT " + "(" * 5000 + "1" + ")" * 5000, {"error"}),
    "deep subqueries": ("SELECT * FROM (" * 60 + "SELECT 1" + ")" * 60, {"error", "ok"}),
    "doubling subqueries": ("SELECT x + x AS x FROM (" * 14 + "SELECT 1 AS x" + ")" * 14, {"error", "ok", "too_large"}),
    "doubling names": (
        "WITH a0(x) AS (SELECT id FROM item)"
        + "".join(f", a{i}(x) AS (SELECT x + x FROM a{i - 1})" for i in range(1, 60)) + " SELECT x FROM a59",
        {"error", "too_large", "timeout"},
    ),
    "doubling joins": (
        "WITH a0(x) AS (SELECT id FROM item)"
        + "".join(f", a{i}(x) AS (SELECT l.x FROM a{i - 1} l JOIN a{i - 1} r)" for i in range(1, 30)) + " SELECT x FROM a29",  # noqa: E501
        {"error", "too_large", "timeout"},
    ),
    "huge IN list": ("SELECT 1 IN (" + ",".join(["1"] * 40_000) + ")", {"ok", "too_large"}),
    "huge OR": ("SELECT 1 WHERE " + " OR ".join(["id = 1"] * 5000), {"error"}),
    "long UNION": (" UNION ALL ".join(["SELECT 1"] * 5000), {"error"}),
    "endless recursion": (f"{COUNT} SELECT count(*) FROM r", {"timeout"}),
    "endless rows": (f"{COUNT} SELECT x FROM r", {"too_large"}),
    "endless sort": (f"{COUNT} SELECT x FROM r ORDER BY -x", STOPPED),
    "endless sort of text": (f"{COUNT} SELECT x FROM r ORDER BY 'aaaaaaaaaaaaaaaaaaaaaaa' || (x * 7919 % 10007)", STOPPED),  # noqa: E501
    "endless distinct": (f"{COUNT} SELECT count(DISTINCT x) FROM r", STOPPED),
    "endless group": (f"{COUNT} SELECT x, count(*) FROM r GROUP BY x", STOPPED),
    "endless union": ("WITH RECURSIVE r(x) AS (SELECT 1 UNION SELECT x + 1 FROM r) SELECT count(*) FROM r", STOPPED),
    "endless window": (f"{COUNT} SELECT sum(x) OVER () FROM r", STOPPED),
    "endless text": (f"{COUNT} SELECT group_concat(x) FROM r", STOPPED),
    "endless json": (f"{COUNT} SELECT json_group_array(x) FROM r", STOPPED),
    "cross join": ("SELECT count(*) FROM " + ", ".join(f"item a{i}" for i in range(12)), {"timeout"}),
    "cross join, sorted": ("SELECT * FROM " + ", ".join(f"item a{i}" for i in range(8)) + " ORDER BY 1, 3, 5", STOPPED),
    "randomblob": ("SELECT randomblob(1000000000)", {"too_large"}),
    "zeroblob": ("SELECT zeroblob(1000000000)", {"too_large"}),
    "hex of zeroblob": ("SELECT length(hex(zeroblob(200000)))", {"ok", "too_large"}),
    "many blobs": (f"{COUNT} SELECT randomblob(200000) FROM r", STOPPED),
    "many columns of blobs": ("SELECT " + ", ".join(["randomblob(250000)"] * 900) + " FROM item", STOPPED),
    "printf with a width": ("SELECT printf('%.*c', 1000000000, 'x')", {"error", "too_large"}),
    "printf with digits": ("SELECT printf('%1000000000d', 1)", {"error", "too_large"}),
    "printf with a negative width": ("SELECT printf('%*d', -2147483648, 1)", {"error", "too_large"}),
    "printf with text as width": ("SELECT format('%.*c', '1000000000', 'x')", {"error", "too_large"}),
    "printf with a format of bytes": ("SELECT printf(CAST('%.*c' AS BLOB), 1000000000, 'x')", {"error", "too_large"}),
    "quoted printf": ("SELECT \"printf\"('%.*c', 1e9, 'x')", {"error", "too_large"}),
    "doubling text": (f"{GROW} SELECT length(x) FROM r", {"too_large"}),
    "replace that grows": ("SELECT length(" + "replace(" * 9 + "'a'" + ", 'a', 'aaaaaaaaaa')" * 9 + ")", {"too_large"}),
    "slow instr": (f"SELECT sum(instr(s, substr(s, 1, length(s) / 2) || 'b')) FROM ({LONG}), item, item", QUICK),
    "slow instr on a literal": (f"SELECT instr('{LITERAL}', '{LITERAL[:22_000]}b') FROM item, item AS b", QUICK),
    "slow replace": (f"SELECT sum(length(replace(s, substr(s, 1, length(s) / 2) || 'b', ''))) FROM ({LONG}), item", QUICK),  # noqa: E501
    "slow trim": (f"SELECT sum(length(trim(s, 'b' || s))) FROM ({LONG}), item a, item b", QUICK),
    "slow like": (f"SELECT sum(s LIKE '{'%a' * 400}b') FROM ({LONG}), item a, item b", {"timeout", "too_large", "error"}),  # noqa: E501
    "slow like on a literal": (f"SELECT sum('{LITERAL}' LIKE '{'%a' * 400}b') FROM item a, item b", {"too_large", "timeout"}),  # noqa: E501
    "slow glob": (f"SELECT sum(s GLOB '{'*a' * 400}b') FROM ({LONG}), item a, item b", STOPPED),
    "long straight program": (
        f"WITH t AS MATERIALIZED ({LONG}) SELECT " + " + ".join(["instr(s, s || 'b')"] * 450) + " FROM t",
        {"timeout", "too_large", "ok", "error"},
    ),
    "string_agg that grows": (  # SQLite 3.44 and later have it
        "WITH t AS MATERIALIZED (SELECT string_agg('aaaaaaaaaaaaaaaaaaaa', '') AS s, string_agg('aaaaaaaaaa', '') AS u "
        "FROM item a, item b) SELECT " + " + ".join(["instr(s, u)"] * 120) + " FROM t",
        {"too_large", "error"},
    ),
    "json_tree of json_tree": (
        "SELECT count(*) FROM json_tree('[" + "1," * 900 + "1]') a, json_tree('[" + "1," * 900 + "1]') b, item, item c",
        {"timeout"},
    ),
    **{
        f"{call} in a row": (straight(call), {"too_large"})
        for call in (
            f"(s LIKE '{'%a' * 40}b')", f"(s LIKE '%{'a' * 60}b')", f"(s GLOB '*{'a' * 60}b')",
            f"(s GLOB '*{'[a-b]' * 12}c')", "instr(s, s || 'b')", "length(replace(s, substr(s, 9) || 'b', ''))",
            "length(trim(s, 'b' || s))", "length(ltrim(s, 'b' || s))", "length(rtrim(s, s))", "length(upper(s))",
            "length(hex(s))", "length(quote(s))", "length(strftime(s, 'now'))", "length(printf('%s%s', s, s))",
            "json_valid(s)", "json_quote(s)", "length(json_patch(json_object(s, 1), json_object(s, 2)))",
            "length(randomblob(640000))", "unicode(s)",
        )
    },
    "one LIKE with a long pattern": (straight(f"(s LIKE '%{'a' * 990}b')", 1), {"too_large"}),
    "one json_patch of long values": (straight("length(json_patch(json_object(s, 1), '{}'))", 1), {"too_large"}),
    "one trim of a long set": (straight("length(trim(s, 'b' || s))", 1), {"ok", "too_large"}),
    "doubling calls": (
        "SELECT x FROM (SELECT x || x AS x FROM (" * 12 + "SELECT instr(name, name) AS x FROM item" + "))" * 12,
        {"error", "ok", "too_large"},
    ),
    "deep json": ("SELECT json('" + "[" * 40_000 + "')", {"error", "too_large"}),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_statement(database, home, name):
    sql, statuses = HOSTILE[name]
    sql = sql.replace("{home}", str(home))
    before = state(home)
    result = database.execute(sql)
    if result.status == "timeout" and "timeout" not in statuses:  # the machine may be busy
        result = database.execute(sql, Limits(seconds=60, rows=LIMITS.rows))
    assert result.status in statuses, result.error
    assert result.error or result.status == "ok"
    assert state(home) == before
    assert "secret" not in repr(result.rows[:3])
    assert database.execute("SELECT count(*) FROM item").rows == [(100,)]


@pytest.mark.parametrize(
    "sql", ["SELECT 1 -- done", "SELECT 1;", "/* a */ SELECT 1; -- b", "VALUES (1)", "SELECT 1 /* open"]
)
def test_one_statement_with_comments_is_fine(database, sql):
    assert database.execute(sql).rows == [(1,)]


def test_the_elements_of_a_json_value_can_be_asked_for(database):
    assert database.execute("SELECT value FROM json_each('[7, 8]')").rows == [(7,), (8,)]
    assert database.execute("SELECT sum(atom) FROM json_tree('{\"a\": [7, 8]}')").rows == [(15,)]


@pytest.mark.parametrize(
    "sql", ["SELECT printf('%.2f|%5d|%s', 1.005, 42, 'x')", "SELECT printf('%,d', 1234567)", "SELECT format(NULL)"]
)
def test_printf_is_sqlites_own(database, sql):
    assert database.execute(sql).rows == sqlite3.connect(":memory:").execute(sql).fetchall()


# ---- long values


ON_LONG_TEXT = {
    "SELECT length(body) FROM doc WHERE size = {n} ORDER BY global_rank": "{n}",
    "SELECT count(*) FROM doc WHERE size = {n} AND body LIKE '%' || 'river' || '%'": "1",
    "SELECT count(*) FROM doc WHERE size = {n} AND (body LIKE '%river%' OR body LIKE '%sea%')": "1",
    "SELECT count(*) FROM doc WHERE size = {n} AND body GLOB '*r[iu]n*'": "1",
    "SELECT instr(body, 'runs') FROM doc WHERE size = {n}": "11",
    "SELECT length(replace(body, 'river', 'sea')) FROM doc WHERE size = {n}": "{n} * 14 / 16",
    "SELECT length(trim(body, ' .')) FROM doc WHERE size = {n}": "{n} - 2",
    "SELECT length(trim(body)) FROM doc WHERE size = {n}": "{n} - 1",
    "SELECT length(body || '!') FROM doc WHERE size = {n}": "{n} + 1",
    "SELECT length(printf('%s!', body)) FROM doc WHERE size = {n}": "{n} + 1",
    "SELECT length(group_concat(body, '')) FROM doc WHERE size = {n}": "{n}",
    "SELECT length(json_extract(json_object('a', body), '$.a')) FROM doc WHERE size = {n}": "{n}",
    "SELECT length(upper(substr(body, 1, instr(body, 'runs')))) FROM doc WHERE size = {n}": "11",
    "SELECT strftime('%Y', '2020-01-01') + length(body) FROM doc WHERE size = {n}": "2020 + {n}",
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sql", ON_LONG_TEXT)
def test_long_text_is_read_searched_and_replaced(database, sql, size):
    result = database.execute(sql.format(n=size), Limits())
    assert result.error is None and result.rows == [(eval(ON_LONG_TEXT[sql].format(n=size)),)]


@pytest.mark.parametrize("size", [1, 20_000])  # SQLite's own functions, and those that take their place
def test_functions_give_what_sqlite_gives(tmp_path, size):
    values = (
        "NULL",
        "''",
        "'a'",
        "'ab'",
        "'abcab'",
        "'äbä'",
        "12",
        "1.5",
        "1e30",
        "x'6162'",
        "x''",
        "'a' || char(0) || 'b'",
    )
    with closing(sqlite3.connect(tmp_path / "x.sqlite")) as connection:
        connection.executescript(
            "CREATE TABLE v (a); CREATE TABLE long (t);" + "".join(f"INSERT INTO v VALUES ({v});" for v in values)
        )
        connection.execute("INSERT INTO long VALUES (?)", ("x" * size,))
        connection.commit()
        two = ("instr", "trim", "ltrim", "rtrim")
        calls = [f"{f}(x.a, y.a)" for f in two] + [f"typeof({f}(x.a, y.a))" for f in two]
        calls += ["replace(x.a, y.a, z.a)", "typeof(replace(x.a, y.a, z.a))"]
        sql = f"SELECT {', '.join(calls)} FROM v x, v y, v z"
        opened = open_database(tmp_path / "x.sqlite", Limits(seconds=30))
        assert opened.execute("SELECT replace(t, 'y', '') FROM long").rows == [("x" * size,)]
        assert opened.execute(sql).rows == connection.execute(sql).fetchall()


@pytest.mark.parametrize(
    ("call", "size"),
    [
        ("(s LIKE '%river%')", 6400),
        ("(s GLOB '*river*')", 6400),
        ("instr(s, 'river')", 64_000),
        ("length(replace(s, 'river', ''))", 64_000),
        ("length(trim(s, 't'))", 64_000),
        ("length(strftime(s, 'now'))", 64_000),
        ("length(printf('%s', s))", 64_000),
        ("json_valid(s)", 64_000),
    ],
)
def test_costly_calls_in_a_row_shorten_the_longest_value(home, call, size):
    database = open_database(home / "shop.sqlite", LIMITS)
    assert database.execute(straight(call, 2, size)).ok
    result = open_database(home / "shop.sqlite", LIMITS).execute(straight(call, 450, size))
    assert result.status == "too_large" and "a value of more than" in result.error


def test_a_value_beyond_the_limit_is_named_with_it(database):
    result = database.execute("SELECT randomblob(1100000)", Limits())
    assert (result.status, result.error) == ("too_large", "a value of more than 1048576 bytes")


@pytest.mark.parametrize("operator", ["LIKE", "GLOB"])
def test_patterns_have_a_longest_length(home, operator):
    database = open_database(home / "shop.sqlite")
    assert database.execute(f"SELECT count(*) FROM item WHERE name {operator} '{'a' * 5000}'").rows == [(0,)]
    result = database.execute(f"SELECT count(*) FROM item WHERE name {operator} '{'a' * 5001}'")
    assert (result.status, result.error) == ("too_large", "a pattern of more than 5000 bytes")


def test_expressions_have_a_greatest_depth(database):
    assert database.execute("SELECT " + " + ".join(["id"] * 500) + " FROM item WHERE id = 1").rows == [(500,)]
    result = database.execute("SELECT " + " + ".join(["id"] * 502) + " FROM item WHERE id = 1")
    assert result.status == "error" and "maximum depth 500" in result.error


def test_exactly_as_many_rows_as_the_limit_are_a_result(database):
    assert database.execute("SELECT id FROM item", Limits(rows=100)).ok
    result = database.execute("SELECT id FROM item", Limits(rows=99))
    assert result.status == "too_large" and len(result.rows) == 99


def test_memory_stays_within_what_is_stated(database):
    names = ("endless sort", "endless sort of text", "endless union", "many columns of blobs", "many blobs")
    greedy = [HOSTILE[name][0] for name in names]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for sql in greedy:
        database.execute(sql, Limits(seconds=0.5))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < (64 + 32 + 2 * 32) << 20  # heap, one chunk, the result and its serialised copy


def test_a_statement_that_uses_up_the_heap_does_not_fail_its_neighbours(database):
    greedy = threading.Thread(target=database.execute, args=(HOSTILE["endless union"][0], Limits(seconds=1.5)))
    greedy.start()
    statuses = set()
    while greedy.is_alive():
        statuses.add(database.execute("SELECT name FROM item ORDER BY name DESC", Limits(seconds=60)).status)
    assert statuses <= {"ok"}
