"""Introspection, prompt text that always fits, diagrams and sample rows."""

from __future__ import annotations

import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqlbench.database.engine import open_database
from sqlbench.database.schema import introspect, mermaid_er, sample_rows, schema_text
from sqlbench.database.types import ForeignKey
from sqlbench.errors import DatabaseError


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
@given(st.integers(0, 600), st.sampled_from(["compact", "ddl"]))
def test_text_never_exceeds_its_limit(database, limit, style):
    schema = introspect(database)
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
    with pytest.raises(ValueError, match="unknown schema style 'json'; use 'compact' or 'ddl'"):
        schema_text(introspect(database), "json")


def test_diagram_names_tables_and_references(database):
    text = mermaid_er(introspect(database))
    assert text.startswith("erDiagram\n    stadium {\n        INTEGER stadium_id PK\n        TEXT name\n")
    assert "    singer }o--|| stadium : stadium_id\n" in text
    assert "    odd_one {\n        INT a PK\n        REAL b_c PK\n" in text


def test_sample_rows(database):
    assert sample_rows(database, "stadium", 2) == [(1, "Arena", 10), (2, "Dome", 20)]
    assert sample_rows(database, 'odd "one', 2) == []
    with pytest.raises(DatabaseError, match="cannot read table nosuch"):
        sample_rows(database, "nosuch")


def test_an_altered_file_is_introspected_anew(tmp_path):
    path = tmp_path / "x.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE a (b INT)")
    database = open_database(path)
    assert schema_text(introspect(database)) == " a: b"
    connection.execute("ALTER TABLE a ADD COLUMN c INT")
    assert schema_text(introspect(database)) == " a: b, c"
