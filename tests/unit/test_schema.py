"""Introspection, prompt text that always fits, diagrams and sample rows."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqlbench.database.engine import open_database
from sqlbench.database.schema import introspect, mermaid_er, sample_rows, schema_text, shown, with_rows
from sqlbench.database.types import ForeignKey
from sqlbench.errors import DatabaseError
from sqlbench_chat.connection import connect


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    path = tmp_path_factory.mktemp("schema") / "concert.sqlite"
    sqlite3.connect(path).executescript(
        "CREATE TABLE stadium (stadium_id INTEGER PRIMARY KEY, name text NOT NULL, capacity INT);"
        "CREATE TABLE singer (singer_id INTEGER PRIMARY KEY, name TEXT, stadium_id INT REFERENCES stadium);"
        'CREATE TABLE "odd ""one" (a INT, "b c" REAL, PRIMARY KEY (a, "b c"));'
        "CREATE VIEW big AS SELECT name FROM stadium;"
        "INSERT INTO stadium VALUES (1, 'Arena', 10), (2, 'Dome', 20), (3, 'Field', 30);"
    )
    return open_database(path)


def test_generated_columns_are_columns_and_a_view_of_what_is_gone_is_left_out(tmp_path):
    connection = sqlite3.connect(tmp_path / "x.sqlite")
    connection.executescript(
        "CREATE TABLE sale (price REAL, tax REAL AS (price / 5), gross REAL AS (price * 1.2) STORED);"
        "CREATE TABLE t (x); CREATE VIEW gone AS SELECT x FROM t; DROP TABLE t;"
    )
    connection.close()
    database = open_database(tmp_path / "x.sqlite")
    assert schema_text(introspect(database)) == " sale: price, tax, gross"
    assert database.execute("SELECT * FROM sale").columns == ("price", "tax", "gross")


def test_introspection(database):
    schema = introspect(database)
    assert [t.name for t in schema.tables] == ["stadium", "singer", 'odd "one', "big"]
    stadium, singer, odd, _ = schema.tables
    assert [(c.name, c.type, c.nullable, c.primary_key) for c in stadium.columns] == [
        ("stadium_id", "INTEGER", True, True),
        ("name", "TEXT", False, False),
        ("capacity", "INT", True, False),
    ]
    assert singer.foreign_keys == (ForeignKey("stadium_id", "stadium", "stadium_id"),)
    assert [c.primary_key for c in odd.columns] == [True, True]
    assert (schema.dialect, schema.name) == ("sqlite", "concert")
    assert introspect(database) is schema


def test_compact_text_is_one_line_a_table(database):
    assert schema_text(introspect(database)).split("\n") == [
        " stadium: stadium_id, name, capacity",
        " singer: singer_id, name, stadium_id > stadium",
        ' odd "one: a, b c',
        " big: name",
    ]


def test_ddl_text_makes_the_same_schema_again(database, tmp_path):
    text = schema_text(introspect(database), "ddl")
    sqlite3.connect(tmp_path / "again.sqlite").executescript(text)
    again = introspect(open_database(tmp_path / "again.sqlite"))
    assert again.tables == introspect(database).tables


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 900), st.sampled_from(["compact", "ddl"]), st.sampled_from([0, 2]))
def test_text_never_exceeds_its_limit(database, limit, style, rows):
    schema = with_rows(introspect(database), database, rows)
    full, text = schema_text(schema, style, 10_000), schema_text(schema, style, limit)
    assert len(text) <= limit
    assert (text == full) == (len(full) <= limit)


def test_cut_text_ends_at_a_line_and_says_so(database):
    schema = introspect(database)
    assert schema_text(schema, "compact", 60) == " stadium: stadium_id, name, capacity"
    text = schema_text(schema, "ddl", 260)
    assert text.startswith("CREATE TABLE stadium (")
    assert text.endswith("-- 3 of 4 tables left out or cut to stay under 260 characters")


def test_unknown_style_is_refused(database):
    with pytest.raises(ValueError, match=r"Unknown schema style: json. Use 'compact' or 'ddl'"):
        schema_text(introspect(database), "json")


def test_diagram_names_tables_and_references(database):
    text = mermaid_er(introspect(database))
    assert text.startswith("erDiagram\n    stadium {\n        INTEGER stadium_id PK\n        TEXT name\n")
    assert "    singer }o--|| stadium : stadium_id\n" in text
    assert "    odd_one {\n        INT a PK\n        REAL b_c PK\n" in text


def test_sample_rows_follow_the_columns_and_are_hidden_with_them(database):
    schema = with_rows(introspect(database), database, 2)
    assert (
        schema_text(schema).split("\n")[0] == " stadium: stadium_id, name, capacity e.g. (1, Arena, 10) (2, Dome, 20)"
    )
    text = schema_text(schema, "ddl")
    assert ");\n-- first 2 rows, stadium_id | name | capacity:\n-- 1 | Arena | 10\n-- 2 | Dome | 20\nCREATE" in text
    assert "-- first" not in text[text.index("CREATE TABLE singer") : text.index("CREATE TABLE big")], "no rows"
    for style in ("compact", "ddl"):
        whole = schema_text(schema, style, 10_000)
        assert shown(schema, whole, style) == schema
        first, *others = shown(schema, schema_text(schema, style, {"compact": 130, "ddl": 200}[style]), style).tables
        assert first.name == "stadium" and len(first.columns) == 3 and len(others) < 3


def test_a_sample_row_is_one_short_line_whatever_it_holds(tmp_path):
    with closing(sqlite3.connect(tmp_path / "x.sqlite")) as connection, connection:
        connection.execute("CREATE TABLE t (a, b, c, d)")
        hostile = "x\n*/ DROP TABLE t;\u2028-- " + "y" * 10_000
        connection.execute("INSERT INTO t VALUES (?, ?, NULL, 1.5)", (hostile, b"\x00\xff" * 10_000))
    database = open_database(tmp_path / "x.sqlite")
    schema = with_rows(introspect(database), database, 3)
    a, b, *rest = schema.tables[0].rows[0]
    assert a.startswith("x */ DROP TABLE t; -- yyy") and len(a) <= 100 and b == ("00ff" * 50)[:100]
    assert rest == ["NULL", "1.5"]
    lines = schema_text(schema, "ddl").splitlines()
    assert lines[-2:] == ["-- first 1 rows, a | b | c | d:", f"-- {a} | {b} | NULL | 1.5"]
    sqlite3.connect(":memory:").executescript("\n".join(lines))


def test_sample_rows(database):
    assert sample_rows(database, "stadium", 2) == [(1, "Arena", 10), (2, "Dome", 20)]
    assert sample_rows(database, 'odd "one', 2) == []
    with pytest.raises(DatabaseError, match="Cannot read table nosuch"):
        sample_rows(database, "nosuch")


def test_an_altered_file_is_introspected_anew(tmp_path):
    path = tmp_path / "x.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE a (b INT)")
    database = open_database(path)
    assert schema_text(introspect(database)) == " a: b"
    connection.execute("ALTER TABLE a ADD COLUMN c INT")
    assert schema_text(introspect(database)) == " a: b, c"


# ---- full-text and other virtual tables

VIRTUAL = """
CREATE VIRTUAL TABLE page USING fts5(title, body);
INSERT INTO page VALUES ('a', 'the river runs'), ('b', 'rivers, and more of them');
CREATE VIRTUAL TABLE old_page USING fts4(title, body);
INSERT INTO old_page VALUES ('a', 'the river runs');
CREATE VIRTUAL TABLE oldest USING fts3(body);
INSERT INTO oldest VALUES ('the river runs');
CREATE VIRTUAL TABLE box USING rtree(id, x0, x1);
INSERT INTO box VALUES (1, 0, 2), (2, 5, 6);
CREATE VIRTUAL TABLE word USING fts5vocab(page, 'row');
CREATE TABLE "order line" (id INTEGER PRIMARY KEY, cents INT, label TEXT AS (printf('%.2f', cents / 100.0)));
INSERT INTO "order line" (id, cents) VALUES (1, 250);
CREATE TABLE pair (a TEXT, b INT, PRIMARY KEY (a, b)) WITHOUT ROWID;
CREATE TABLE typed (n INTEGER) STRICT;
CREATE VIEW labels AS SELECT format('%s!', label) AS label FROM "order line";
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("virtual") / "library.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(VIRTUAL)
        connection.execute("PRAGMA writable_schema = on")  # as a program with an extension of SQLite's would leave it
        statement = "CREATE VIRTUAL TABLE shape USING no_such_module(x)"
        connection.execute("INSERT INTO sqlite_master VALUES ('table', 'shape', 'shape', 0, ?)", (statement,))
        connection.commit()
    return path


def test_virtual_tables_are_shown_without_the_tables_that_hold_their_data(library):
    schema = introspect(open_database(library))
    assert [t.name for t in schema.tables] == [
        "page", "old_page", "oldest", "box", "word", "order line", "pair", "typed", "labels"
    ]  # fmt: skip
    assert [c.name for c in schema.tables[0].columns] == ["title", "body"]
    assert schema.unreadable == ("shape",)
    assert connect(library).notice == ("SQLite cannot read these tables of library here, so they are left out: shape")


@pytest.mark.parametrize(
    ("sql", "rows"),
    [
        ("SELECT title FROM page WHERE page MATCH 'river'", [("a",)]),
        ("SELECT title FROM page WHERE page MATCH 'river*' AND title LIKE '%b%'", [("b",)]),
        ("SELECT title FROM page('runs')", [("a",)]),
        ("SELECT title FROM page WHERE page MATCH 'river*' ORDER BY rank, title", [("a",), ("b",)]),
        ("SELECT bm25(page) < 0, snippet(page, 1, '[', ']', '', 9), highlight(page, 1, '<', '>') FROM page('runs')",
         [(1, "the river [runs]", "the river <runs>")]),
        ("SELECT snippet(old_page), offsets(old_page) FROM old_page WHERE old_page MATCH 'river'",
         [("the <b>river</b> runs", "1 0 4 5")]),
        ("SELECT count(*) FROM oldest WHERE body MATCH 'riv*'", [(1,)]),
        ("SELECT id FROM box WHERE x0 <= 1 AND x1 >= 1", [(1,)]),
        ("SELECT doc FROM word WHERE term = 'river'", [(1,)]),
        ('SELECT label FROM "order line"', [("2.50",)]),
        ("SELECT label FROM labels", [("2.50!",)]),
    ],
)  # fmt: skip
def test_virtual_tables_views_and_generated_columns_can_be_asked(library, sql, rows):
    result = open_database(library).execute(sql)
    assert result.error is None and result.rows == rows


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO page VALUES ('c', 'd')",
        "INSERT INTO page (page) VALUES ('optimize')",
        "INSERT INTO page (page, rank) VALUES ('rank', 'bm25(10.0)')",
        "INSERT INTO old_page (old_page) VALUES ('rebuild')",
        "UPDATE page SET title = 'x'",
        "DELETE FROM box",
        "DROP TABLE page",
        "SELECT optimize(old_page) FROM old_page",
        "SELECT rtreecheck('box')",
        "SELECT fts3_tokenizer('simple', x'00')",
    ],
)
def test_virtual_tables_are_not_written(library, sql):
    before = library.read_bytes()
    database = open_database(library)
    assert database.execute(sql).status == "rejected"
    assert library.read_bytes() == before and [p.name for p in library.parent.iterdir()] == [library.name]
    assert database.execute("SELECT count(*) FROM page").rows == [(2,)]


def test_long_documents_can_be_searched(tmp_path):
    with closing(sqlite3.connect(tmp_path / "x.sqlite")) as connection:
        connection.execute("CREATE VIRTUAL TABLE page USING fts5(body)")
        connection.execute("INSERT INTO page VALUES (?)", (" ".join(f"w{n}" for n in range(60_000)),))
        connection.commit()
    sql = "SELECT length(body) > 300000, snippet(page, 0, '[', ']', '', 1) FROM page WHERE page MATCH 'w59999'"
    assert open_database(tmp_path / "x.sqlite").execute(sql).rows == [(1, "[w59999]")]
