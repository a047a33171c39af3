"""Causes of wrong answers on pairs written by hand, and on texts that are hostile to a parser."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from sqlbench.agent.trajectory import OVERLONG, Execution, Trajectory
from sqlbench.database.engine import Database, open_database
from sqlbench.runs import RunFolder
from sqlbench_lab import mistakes
from sqlbench_lab.mistakes import (
    AGGREGATE,
    COLUMN,
    CONDITION,
    DISTINCT,
    EXTRA,
    JOIN,
    MISSING,
    NO_SQL,
    ORDER,
    OTHER,
    SET,
    SPELLING,
    TABLE,
    UNREADABLE,
    cause,
)

SCHEMA = """
CREATE TABLE singer (id INTEGER, name TEXT, city TEXT, age INTEGER);
INSERT INTO singer VALUES (1, 'Ann', 'Lima', 30), (2, 'Bob', 'Köln', 40), (3, 'Cid', 'Lima', 50),
  (4, 'Dee', 'Oslo', 40);
CREATE TABLE band (id INTEGER, name TEXT, city TEXT, leader INTEGER, founder INTEGER);
INSERT INTO band VALUES (1, 'Owls', 'Lima', 1, 2), (2, 'Bees', 'Oslo', 3, 1), (3, 'Ants', 'Rome', 3, 4);
CREATE TABLE venue (id INTEGER, name TEXT, city TEXT);
INSERT INTO venue VALUES (1, 'Hall', 'Oslo');
"""
J = "FROM singer AS T1 JOIN band AS T2 ON T1.id = T2.leader"
CASES = [
    ("SELECT name FROM singer", "I cannot answer that.", NO_SQL),
    ("SELECT name FROM singer", "", NO_SQL),
    ("SELECT name FROM singer", None, NO_SQL),
    ("SELECT name FROM singer", "SELECT nam FROM singer", "did not run: no such column"),
    ("SELECT name FROM singer", "SELECT name FROM singers", "did not run: no such table"),
    ("SELECT name FROM singer", "SELECT name FROM", "did not run: syntax"),
    ("SELECT name FROM singer", "SELECT name FROM venue", TABLE),
    ("SELECT max(age) FROM singer", "SELECT max(leader) FROM band", TABLE),
    (f"SELECT T2.name {J}", "SELECT name FROM band", ORDER),  # every band has a leader: the rows are gold's
    (f"SELECT T2.name {J} WHERE T1.age > 30", "SELECT name FROM band WHERE leader > 30", JOIN),
    (f"SELECT T1.name {J}", "SELECT T1.name FROM singer AS T1 JOIN band AS T2 ON T1.id = T2.founder", JOIN),
    (f"SELECT T1.name {J}", "SELECT singer.name FROM singer, band WHERE singer.id = band.founder", JOIN),
    (f"SELECT T1.name {J}", "SELECT T1.name FROM singer AS T1 LEFT JOIN band AS T2 ON T1.id = T2.leader", JOIN),
    ("SELECT name FROM singer WHERE id IN (SELECT leader FROM band)",
     "SELECT name FROM singer WHERE id IN (SELECT founder FROM band)", JOIN),
    ("SELECT name FROM singer WHERE id NOT IN (SELECT leader FROM band)",
     "SELECT name FROM singer WHERE id IN (SELECT leader FROM band)", JOIN),
    ("SELECT avg(age) FROM singer", "SELECT max(age) FROM singer", AGGREGATE),
    ("SELECT count(*) FROM singer WHERE age > 30", "SELECT name FROM singer WHERE age > 30", AGGREGATE),
    ("SELECT city, count(*) FROM singer GROUP BY city", "SELECT city, count(*) FROM singer GROUP BY id", AGGREGATE),
    ("SELECT city FROM singer GROUP BY city HAVING sum(age) > 50",
     "SELECT city FROM singer GROUP BY city HAVING count(*) > 50", AGGREGATE),
    ("SELECT name FROM singer", "SELECT city FROM singer", COLUMN),
    (f"SELECT T1.city {J}", f"SELECT T2.city {J}", COLUMN),
    ("SELECT name FROM singer WHERE age = 40", "SELECT name FROM singer WHERE id = 40", COLUMN),
    ("SELECT name FROM singer WHERE id = 2 ORDER BY age", "SELECT age FROM singer WHERE id = 2 ORDER BY name", COLUMN),
    ("SELECT city, name FROM singer", "SELECT name, name FROM singer", COLUMN),
    ("SELECT name FROM singer", "SELECT name, age FROM singer", EXTRA),
    ("SELECT name FROM singer WHERE age > 30", "SELECT age, name FROM singer WHERE id > 1 ORDER BY age", EXTRA),
    ("SELECT name, age FROM singer", "SELECT age FROM singer", MISSING),
    ("SELECT name, age FROM singer WHERE age > 30", "SELECT name FROM singer WHERE age > 40", MISSING),
    ("SELECT name FROM singer WHERE age > 30", "SELECT name FROM singer WHERE age > 40", CONDITION),
    ("SELECT name FROM singer WHERE age > 30", "SELECT name FROM singer WHERE age < 30", CONDITION),
    ("SELECT name FROM singer WHERE age > 30 AND city = 'Lima'", "SELECT name FROM singer WHERE age > 30", CONDITION),
    ("SELECT name FROM singer WHERE age > 30 AND city = 'Lima'",
     "SELECT name FROM singer WHERE age > 30 OR city = 'Lima'", CONDITION),
    ("SELECT name FROM singer WHERE city = 'Lima'", "SELECT name FROM singer WHERE city = 'Oslo'", CONDITION),
    ("SELECT name FROM singer WHERE city = 'Lima'", "SELECT name FROM singer WHERE city = 'lima'", SPELLING),
    ("SELECT name FROM singer WHERE city = 'Köln'", 'SELECT name FROM singer WHERE city = "Koln"', SPELLING),
    ("SELECT count(*) FROM singer WHERE city = 'Lima'", "SELECT count(*) FROM singer WHERE city = 'Limas'", SPELLING),
    ("SELECT city FROM singer", "SELECT upper(city) FROM singer", SPELLING),
    ("SELECT name FROM singer ORDER BY age, id", "SELECT name FROM singer ORDER BY age DESC, id DESC", ORDER),
    ("SELECT name FROM singer ORDER BY age LIMIT 1", "SELECT name FROM singer ORDER BY age DESC LIMIT 1", ORDER),
    ("SELECT name FROM singer ORDER BY age LIMIT 1", "SELECT name FROM singer ORDER BY age LIMIT 3", ORDER),
    ("SELECT count(DISTINCT city) FROM singer", "SELECT count(city) FROM singer", DISTINCT),
    ("SELECT city FROM (SELECT DISTINCT city FROM singer)", "SELECT city FROM (SELECT city FROM singer)", DISTINCT),
    ("SELECT city FROM singer INTERSECT SELECT city FROM band",
     "SELECT city FROM singer UNION SELECT city FROM band", SET),
    ("SELECT age - id FROM singer", "SELECT age + id FROM singer", OTHER),
]  # fmt: skip


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Database:
    file = tmp_path_factory.mktemp("db") / "music.sqlite"
    with sqlite3.connect(file) as connection:
        connection.executescript(SCHEMA)
    connection.close()
    return open_database(file)


@pytest.mark.parametrize(("gold", "pred", "expected"), CASES)
def test_each_pair_has_the_cause_that_a_reader_gives_it(database: Database, gold, pred, expected) -> None:
    results = [database.execute(sql) if sql else None for sql in (gold, pred)]
    assert results[0].ok, "a gold query must run"
    assert cause(gold, pred, *results) == expected


def test_the_trees_alone_name_most_causes() -> None:
    """Where the database is not at hand."""
    apart = {i: (cause(gold, pred), expected) for i, (gold, pred, expected) in enumerate(CASES)}
    ran = {i: pair for i, pair in apart.items() if not pair[1].startswith("did not run")}
    assert sum(found == expected for found, expected in ran.values()) >= len(ran) - 4, ran


@pytest.mark.parametrize(
    "text",
    [
        "SELECT " + "(" * 5000,
        "SELECT " + "a," * 4000 + "a FROM t",
        "SELECT * FROM t" + " JOIN t" * 1500,
        "SELECT a FROM t WHERE " + "a = 'x' AND " * 700 + "a = 'y'",
        "SELECT " + "(SELECT " * 90 + "1" + ")" * 90,
        "SELECT '" + "é" * 9000 + "'",
        "values " * 1400,
        "SELECT \x00\ud800 FROM t",
        "SELECT 1; DROP TABLE singer",
        "select",
    ],
)
def test_hostile_texts_end_in_a_cause(text: str) -> None:
    for gold, pred in (("SELECT name FROM singer", text), (text, "SELECT name FROM singer"), (text, text + " ")):
        assert isinstance(cause(gold, pred), str)


def test_wide_and_repeated_results_are_compared_within_bounds(database: Database) -> None:
    ones = ", ".join(["1"] * 60)
    gold, pred = f"SELECT {ones} FROM singer, band, singer", f"SELECT {ones}, 2 FROM singer, band, singer"
    assert cause(gold, pred, database.execute(gold), database.execute(pred)) in (EXTRA, UNREADABLE)


def test_the_wrong_rollouts_of_a_run_are_counted_by_cause(tmp_path: Path) -> None:
    """Without the run's database; failed and right rollouts have no cause."""
    (tmp_path / "run").mkdir()
    run = RunFolder(tmp_path / "run")
    error = Execution(turn=1, sql="SELECT x FROM t", status="error", error="no such column: x")
    rollouts = [
        ("a", "SELECT b FROM t", 0.0, {}),
        ("b", "SELECT b FROM t", 0.0, {}),
        ("c", "SELECT x FROM t", 0.0, {"executions": [error]}),
        ("d", "SELECT a FROM t", 1.0, {}),
        ("e", None, None, {"error": "model: ModelError: gone"}),
        ("f", "SELECT b FROM t", 0.0, {"reason": OVERLONG}),
    ]
    for task, pred, reward, more in rollouts:
        about = {"task_key": task, "task_id": task, "db_id": "d", "question": f"{task}?", "gold": "SELECT a FROM t"}
        run.append("trajectories.jsonl", Trajectory(**about, pred=pred, reward=reward, **more))
    found = mistakes.mistakes(run.root)
    expected = [("a", COLUMN), ("b", COLUMN), ("c", "did not run: no such column"), ("f", mistakes.TOO_LONG)]
    assert list(zip(found["task"], found["cause"], strict=True)) == expected
    table = mistakes.cause_table(found)
    assert table.to_numpy().tolist()[0] == [COLUMN, 2, "a?", "SELECT a FROM t", "SELECT b FROM t"]
    changes = mistakes.cause_changes({"one": (run.root, tmp_path)}, most=2)
    assert changes.to_numpy().tolist() == [["one", COLUMN, 2, 0], ["one", "did not run: no such column", 1, 0]]
