"""What prompts show of a schema larger than their budget, the values of a question, and sample rows."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqlbench.agent.prompts import prompts_for, render_execution
from sqlbench.agent.trajectory import Completion
from sqlbench.config import CUT, RolloutConfig, SchemaConfig
from sqlbench.data.tasks import Task
from sqlbench.database.engine import open_database
from sqlbench.database.linking import WHOLE, estimate_tokens, prompt_schema
from sqlbench.database.schema import schema_text
from sqlbench.database.values import LONGEST, name_words, words
from sqlbench.models import trained_with
from sqlbench.rollout import rollout
from sqlbench.runs import RunFolder

SCHOOL = """
CREATE TABLE student (student_id INTEGER PRIMARY KEY, first_name TEXT, home_town TEXT);
CREATE TABLE course (course_id INTEGER PRIMARY KEY, title TEXT NOT NULL, credits INT);
CREATE TABLE r_17 (student_id INT REFERENCES student, course_id INT REFERENCES course (course_id));
CREATE TABLE building (building_id INTEGER PRIMARY KEY, address TEXT, floors INT, architect TEXT, opened TEXT);
CREATE TABLE invoice (invoice_id INTEGER PRIMARY KEY, total REAL, vendor TEXT, due TEXT, paid TEXT);
INSERT INTO student VALUES (1, 'Ann', 'New Haven'), (2, 'Bob', 'Bergen');
INSERT INTO course VALUES (1, 'Algebra', 5), (2, 'O''Neil''s Law', 3);
"""
ENROLLED = "Which students take the course Algebra?"


def made(path, script):
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(script)
    return open_database(path)


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    return made(tmp_path_factory.mktemp("school") / "school.sqlite", SCHOOL)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """600 tables, each with the one before it as its parent."""
    kinds = ("order", "client", "shipment", "invoice", "employee", "warehouse")
    script = "".join(
        f"CREATE TABLE {kinds[i % 6]}_{i} (id INTEGER PRIMARY KEY, {kinds[i % 6]}_name TEXT, city{i} TEXT, "
        f"parent_id INT REFERENCES {kinds[(i - 1) % 6]}_{i - 1});"
        f"INSERT INTO {kinds[i % 6]}_{i} (city{i}) VALUES ('Town {i}x');"
        for i in range(600)
    )
    return made(tmp_path_factory.mktemp("wide") / "wide.sqlite", script.replace("REFERENCES warehouse_-1", ""))


def shown(database, question, style="ddl", count=estimate_tokens, **shape):
    shape = {"schema_linking": True} | shape
    return prompt_schema(database.schema(), database, question, style, SchemaConfig(**shape), count)


def names(schema):
    return {table.name for table in schema.tables}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("SourceAirports", ["source", "airport"]),
        ("dept_IDs2", ["dept", "i", "ds", "2"]),
        ("HTTPCode", ["http", "code"]),
        ("countries", ["country"]),
        ("§", []),
    ],
)
def test_a_name_is_split_into_words(text, found):
    assert name_words(text) == [*found, text.lower()]


def test_a_schema_that_fits_is_shown_whole(school):
    for style in ("compact", "ddl"):
        whole = schema_text(school.schema(), style, WHOLE)
        for shape in ({}, {"schema_tokens": 2000}, CUT):
            schema, text = shown(school, ENROLLED, style, **({"table_info_truncate": len(whole)} | shape))
            assert (schema, text) == (school.schema(), whole)


def test_without_linking_the_first_tables_are_shown(school):
    schema = school.schema()
    for style in ("compact", "ddl"):
        for limit in range(0, 900, 60):
            expected = schema_text(schema, style, limit + 1)
            assert shown(school, ENROLLED, style, table_info_truncate=limit + 1, **CUT) == (schema, expected)


@pytest.mark.parametrize("style", ["compact", "ddl"])
def test_the_tables_of_a_question_are_shown_with_the_one_that_joins_them(school, style):
    schema, text = shown(school, ENROLLED, style, table_info_truncate=250 if style == "ddl" else 100)
    assert names(schema) >= {"student", "course", "r_17"} and "invoice" not in text
    links = {(table.name, key.column, key.ref_table) for table in schema.tables for key in table.foreign_keys}
    assert links == {("r_17", "student_id", "student"), ("r_17", "course_id", "course")}
    for table, column, other in links:
        assert column in {c.name for t in schema.tables if t.name == table for c in t.columns}
        assert [c.name for t in schema.tables if t.name == other for c in t.columns if c.primary_key]


def test_linked_statements_make_a_schema(school, tmp_path):
    schema, text = shown(school, ENROLLED, table_info_truncate=300, value_hints=True)
    assert "  title TEXT, -- 'Algebra'\n" in text or "  title TEXT -- 'Algebra'\n" in text
    again = made(tmp_path / "again.sqlite", text).schema()
    assert [(t.name, [c.name for c in t.columns], t.foreign_keys) for t in again.tables] == [
        (t.name, [c.name for c in t.columns], t.foreign_keys) for t in schema.tables
    ]


def test_another_question_gets_other_tables(school):
    schema, _ = shown(school, "What is the total that each vendor is paid?", table_info_truncate=160)
    assert "invoice" in names(schema) and "student" not in names(schema)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 900),
    st.booleans(),
    st.sampled_from(["compact", "ddl"]),
    st.booleans(),
    st.sampled_from([0, 2]),
    st.booleans(),
    st.sampled_from([ENROLLED, "", "'; -- \n```", "Algebra in New Haven " * 99, "vendors of buildings"]),
)
def test_no_text_exceeds_its_budget(school, budget, in_tokens, style, linking, rows, hints, question):
    counted = lambda text: len(text.split())  # noqa: E731
    limit = {"schema_tokens" if in_tokens else "table_info_truncate": budget}
    more = {"schema_linking": linking, "sample_rows": rows, "value_hints": hints}
    schema, text = shown(school, question, style, counted, **limit, **more)
    assert (counted(text) if in_tokens else len(text)) <= budget
    for table in schema.tables if schema.part else ():
        assert table.name in text and all(column.name in text for column in table.columns)


def test_values_of_a_question_stand_beside_their_columns(school):
    _, text = shown(school, "Who from new haven takes O'Neil's Law?", value_hints=True)
    assert "  home_town TEXT -- 'New Haven'\n" in text and "  title TEXT NOT NULL, -- 'O''Neil''s Law'\n" in text
    assert text.count("--") == 2
    assert "--" not in shown(school, ENROLLED)[1]


def test_a_value_finds_its_table(wide):
    schema, text = shown(wide, "How many are in Town 437x?", table_info_truncate=400, value_hints=True)
    assert "warehouse_437" in names(schema) and "-- 'Town 437x'" in text


def test_values_and_rows_get_only_what_room_is_left(school):
    whole = schema_text(school.schema(), "ddl", WHOLE)
    for room in range(len(whole), len(whole) + 400, 7):
        _, text = shown(school, ENROLLED, table_info_truncate=room, value_hints=True, sample_rows=3)
        bare = "\n".join(line.partition(" -- ")[0] for line in text.splitlines() if not line.startswith("-- "))
        assert bare == whole
    assert "-- 1 | Ann | New Haven" in text and "title TEXT NOT NULL, -- 'Algebra'" in text


def test_a_wide_schema_shows_the_table_that_is_asked_for(wide):
    schema, text = shown(wide, "List the client names of client 301", table_info_truncate=2048)
    assert "client_301" in names(schema) and 2 < len(schema.tables) < 60 and len(text) <= 2048
    compact = shown(wide, "List the client names of client 301", "compact", table_info_truncate=2048)[0]
    assert len(compact.tables) > len(schema.tables)


def test_hostile_names_and_values_break_nothing(tmp_path):
    evil = "x'; DROP TABLE t; --\n``` {schema} \ud7ff"
    with closing(sqlite3.connect(tmp_path / "evil.sqlite")) as connection, connection:
        connection.execute(f'CREATE TABLE "{"n" * 5000}" ("{"c" * 5000}" TEXT, "" TEXT, "§" TEXT)')
        connection.execute('CREATE TABLE "a\nb" ("drop table" TEXT, blob, note TEXT)')
        connection.execute(
            "CREATE VIEW slow AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT * FROM n"
        )
        rows = [(evil, b"\xff" * 99, "word " * 500), ("the", 1, "x" * LONGEST), (None, None, "Crimson\n\tTide")]
        connection.executemany('INSERT INTO "a\nb" VALUES (?, ?, ?)', rows)
    database = open_database(tmp_path / "evil.sqlite")
    question = f"the crimson tide {evil} " + "word " * 5000 + "x" * 100_000
    for room in (1, 60, 200, 6000, 30_000):
        for style in ("compact", "ddl"):
            _, text = shown(database, question, style, table_info_truncate=room, value_hints=True, sample_rows=1)
            assert len(text) <= room
    text = shown(database, question, table_info_truncate=30_000, value_hints=True)[1]
    assert "note TEXT -- 'Crimson Tide'\n" in text
    assert "\"drop table\" TEXT, -- 'x''; DROP TABLE t; -- ``` {schema} \ud7ff'\n" in text
    assert names(made(tmp_path / "again.sqlite", text).schema()) == names(database.schema())
    empty = made(tmp_path / "empty.sqlite", "")
    assert shown(empty, "", table_info_truncate=1, value_hints=True, sample_rows=3)[1] == ""


def test_postgres_is_linked_too(postgres):
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("CREATE DATABASE linked")
    address = postgres.replace("/postgres?", "/linked?")
    script = SCHOOL.replace("INTEGER PRIMARY KEY", "INT PRIMARY KEY")
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(script + "CREATE SCHEMA far; CREATE TABLE far.away (id INT PRIMARY KEY, word TEXT);")
    schema, text = shown(open_database(address), ENROLLED, table_info_truncate=300, value_hints=True)
    assert names(schema) >= {"student", "course", "r_17"} and "-- 'Algebra'" in text and len(text) <= 300
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("COMMENT ON COLUMN building.opened IS 'inauguration ceremony'")
    found = shown(open_database(address), "When was the inauguration?", table_info_truncate=90)[0]
    assert [[c.name for c in t.columns] for t in found.tables if t.name == "building"] == [["building_id", "opened"]]
    assert "far.away" in shown(open_database(address), "Which word is far away?", table_info_truncate=200)[1]


class Counting:
    """A model that sees its prompts, and counts words as tokens."""

    name = "counting"

    def __init__(self, family):
        self.family, self.prompts = family, []

    def count_tokens(self, text):
        return len(text.split())

    async def complete(self, messages, on_text=None):
        self.prompts.append(messages[-1].content)
        return Completion(text="SELECT nowhere")


def asked(database, family, **config):
    model = Counting(family)
    task = Task(task_id="1", db_id="school", question=ENROLLED, gold="SELECT 1", split="dev")
    config = RolloutConfig(max_turns=1, **config)
    record = asyncio.run(rollout(task, database, model, prompts_for(family), config))
    assert record.error is None
    return model.prompts[0], record


def test_a_rollout_has_what_its_settings_say(school):
    chat = RolloutConfig().decided("chat").model_dump(include=set(SchemaConfig.model_fields))
    prompt, _ = asked(school, "chat", **chat)
    assert "-- 'Algebra'" in prompt and "-- 1 | Ann | New Haven" in prompt
    whole = schema_text(school.schema(), "compact", WHOLE)
    nano = RolloutConfig().decided("nano").model_dump(include=set(SchemaConfig.model_fields))
    assert whole in asked(school, "nano", **nano)[0] and whole in asked(school, "nano")[0]
    prompt, _ = asked(school, "nano", schema_tokens=14, schema_linking=True)
    assert " r_17: student_id > student, course_id > course" in prompt and "building" not in prompt


def test_an_error_names_nothing_that_linking_hides(school):
    _, record = asked(school, "chat", schema_linking=True, table_info_truncate=250)
    assert record.executions[0].error == "no such column: nowhere"
    schema, text = shown(school, ENROLLED, table_info_truncate=250)
    failed = record.executions[0].model_copy(update={"error": "no such table: building"})
    assert "building" not in render_execution(failed, "chat", 2048, schema, text).replace("no such table: building", "")
    failed = record.executions[0].model_copy(update={"error": "no such table: studen"})
    assert "student" in render_execution(failed, "chat", 2048, schema, text)


def test_open_settings_are_decided_once(tmp_path):
    chat, nano = RolloutConfig().decided("chat"), RolloutConfig().decided("nano")
    assert (chat.schema_linking, chat.sample_rows, chat.value_hints) == (True, 3, True)
    assert (nano.schema_linking, nano.sample_rows, nano.value_hints) == (True, 0, False)
    given = RolloutConfig(sample_rows=1, schema_linking=False, value_hints=False)
    assert given.decided("chat") == given.decided("nano") == given
    published = RolloutConfig(sample_rows=3).decided("chat", "published")
    assert (published.schema_linking, published.sample_rows, published.value_hints) == (False, 3, False)
    assert all(published.model_dump()[name] is not None for name in CUT)


@pytest.mark.parametrize("kind", ["training", "sft"])
def test_a_trained_policy_is_prompted_as_in_its_training(tmp_path, kind):
    own = {"schema_linking": False, "sample_rows": 2, "max_turns": 3}
    config = {"kind": kind, "config": {"sqlbench": own}, "rollout": own}
    RunFolder(tmp_path / "run").open(config).close()
    for spec in (tmp_path / "run", tmp_path / "run" / "policy"):
        settings = RolloutConfig().decided("chat", trained=trained_with(str(spec)))
        assert (settings.schema_linking, settings.sample_rows, settings.value_hints) == (False, 2, False)
    assert trained_with("openai:gpt") is trained_with("nano") is trained_with(str(tmp_path)) is None


def test_a_run_stored_before_these_settings_resumes_with_what_it_had(tmp_path):
    old = {"kind": "eval", "rollout": {"max_turns": 3, "sample_rows": 0}}
    RunFolder(tmp_path).open(old).close()
    RunFolder(tmp_path).open({"kind": "eval", "rollout": {"max_turns": 3, **CUT}}).close()


def test_words_of_any_text_are_found_at_once():
    assert words("a" * 100_000) == ["a" * 10_000] and len(words("a b " * 100_000)) == 5000
