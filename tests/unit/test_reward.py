"""Verdicts: the reference's rules, each option of the strict mode, gold answers that cannot be scored, concurrency."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from dataclasses import replace

import pytest

from sqlbench import reward
from sqlbench.database.engine import LOOK_SECONDS, open_database
from sqlbench.database.types import Limits
from sqlbench.reward import LONG_TEXT, REFERENCE, STRICT, clear_gold_cache, prepare, score, score_async

ENDLESS = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT count(*) FROM r"


def make(path, scores=(3, 3, 1, 2)):
    """Four players of two teams; two tie on score."""
    connection = sqlite3.connect(path)
    connection.executescript(
        "CREATE TABLE team (id INTEGER PRIMARY KEY, city TEXT);"
        "CREATE TABLE player (id INTEGER PRIMARY KEY, name TEXT, score INT, weight REAL, team INT REFERENCES team);"
        "INSERT INTO team VALUES (1, 'Rome'), (2, 'Oslo');"
    )
    for i, (name, value) in enumerate(zip(["ann", "bob", "cid", "dan"], scores, strict=True), 1):
        connection.execute("INSERT INTO player VALUES (?, ?, ?, ?, ?)", (i, name, value, i / 10, 1 + i % 2))
    connection.commit()
    connection.close()
    return path


@pytest.fixture
def database(tmp_path):
    clear_gold_cache()
    return open_database(make(tmp_path / "club.sqlite"), Limits(seconds=0.5))


# gold, pred, reference, reference with DISTINCT kept, strict
VERDICTS = [
    ("SELECT name, score FROM player", "SELECT score, name FROM player", 1, 1, 1),
    ("SELECT name FROM player", "SELECT name FROM player ORDER BY score", 1, 1, 1),
    ("SELECT name FROM player ORDER BY id", "SELECT name FROM player ORDER BY id DESC", 0, 0, 0),
    ("SELECT name FROM player", "SELECT name FROM player LIMIT 3", 0, 0, 0),
    ("SELECT name FROM player", "SELECT name, id FROM player", 0, 0, 0),
    ("SELECT name FROM player WHERE score > = 3", "SELECT name FROM player WHERE score >= 3", 1, 1, 1),
    ("SELECT 2020 - YEAR(CURDATE())", "SELECT 0", 1, 1, 1),
    ("SELECT DISTINCT team FROM player", "SELECT team FROM player", 1, 0, 1),
    ("SELECT count(DISTINCT team) FROM player", "SELECT count(team) FROM player", 1, 0, 0),
    ("SELECT count(*) FROM (SELECT DISTINCT team FROM player)", "SELECT count(*) FROM player", 1, 0, 0),
    ("SELECT name FROM player", "SELECT name FROM player; SELECT 1", 1, 0, 0),
    ("SELECT name FROM player", "SELECT name FROM player;  ", 1, 1, 1),
    ("SELECT name FROM player WHERE score > 9", "SELECT 1 WHERE 0", 1, 1, 0),
    ("SELECT name FROM player WHERE score > 9", "-- nothing", 1, 1, 0),
    ("SELECT name FROM player WHERE score > 9", "SELECT name FROM player LIMIT 0", 1, 1, 0),
    ("SELECT name FROM player WHERE score > 9", "SELECT name FROM player WHERE score > 9 AND 1 = 0", 1, 1, 0),
    ("SELECT name FROM player WHERE score > 9", "SELECT name FROM team WHERE city = 'x'", 0, 0, 0),
    ("SELECT name FROM player WHERE score > 9", "SELECT p.name FROM player AS p WHERE p.score >= 10", 1, 1, 1),
    ("SELECT name FROM player WHERE score > 9", "SELECT name, id FROM player WHERE score > 9", 1, 1, 0),
    ("SELECT name FROM player WHERE score > 9", "DELETE FROM player WHERE score > 9", 0, 0, 0),
    ("SELECT name FROM player WHERE id IN (SELECT id FROM player ORDER BY id)", "SELECT name FROM player ORDER BY id DESC", 0, 0, 1),  # noqa: E501
    ("SELECT name FROM player ORDER BY score", "SELECT name FROM player ORDER BY score, id DESC", 0, 0, 1),
    ("SELECT name FROM player ORDER BY score", "SELECT name FROM player ORDER BY score DESC", 0, 0, 0),
    ("SELECT name FROM player ORDER BY score DESC LIMIT 1", "SELECT name FROM player ORDER BY score DESC, id DESC LIMIT 1", 0, 0, 1),  # noqa: E501
    ("SELECT name FROM player ORDER BY score DESC LIMIT 1", "SELECT name FROM player WHERE name = 'dan'", 0, 0, 0),
    ("SELECT name FROM player ORDER BY score DESC LIMIT 2, 1", "SELECT name FROM player WHERE name = 'dan'", 1, 1, 1),
    ("SELECT sum(weight) FROM player", "SELECT 0.4 + 0.3 + 0.2 + 0.1 + 1e-16", 1, 1, 1),
    ("SELECT 0.3", "SELECT 0.1 + 0.2", 0, 0, 1),
    ("SELECT 1, 10", "SELECT 1.0, 10", 0, 0, 1),
    ("SELECT 4155550100, 1.5", "SELECT 4155550101, 1.5", 0, 0, 0),
    ("SELECT 4155550100, 1.5", "SELECT 4155550100.000001, 1.5", 0, 0, 1),
    ("SELECT name FROM player", "", 0, 0, 0),
    ("SELECT name FROM player", "SELECT nam FROM player", 0, 0, 0),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "pred", "reference", "kept", "strict"), VERDICTS)
def test_verdict(database, gold, pred, reference, kept, strict):
    got = [
        score(gold, pred, database, strict=False).match,
        score(gold, pred, database, strict=False, keep_distinct=True).match,
        score(gold, pred, database).match,
    ]
    assert got == [reference, kept, strict]


@pytest.mark.parametrize(
    ("option", "gold", "pred", "without", "with_it"),
    [
        ("one_statement", "SELECT 1", "SELECT 1; SELECT 2", 1, 0),
        ("keep_inner_distinct", "SELECT count(DISTINCT team) FROM player", "SELECT count(team) FROM player", 1, 0),
        ("real_empty", "SELECT id FROM player WHERE score > 9", "SELECT 1 WHERE 0", 1, 0),
        ("outer_order", "SELECT id FROM (SELECT id FROM player ORDER BY name)", "SELECT id FROM player ORDER BY 1 DESC", 0, 1),  # noqa: E501
        ("float_tolerance", "SELECT 0.3", "SELECT 0.1 + 0.2", 0, 1),
        ("ties", "SELECT name FROM player ORDER BY score", "SELECT name FROM player ORDER BY score, id DESC", 0, 1),
        ("any_number_type", "SELECT 1, 10", "SELECT 1.0, 10", 0, 1),
    ],
)  # fmt: skip
def test_every_deviation_is_one_option(database, option, gold, pred, without, with_it):
    assert score(gold, pred, database, strict=replace(STRICT, **{option: False})).match == without
    assert score(gold, pred, database, strict=replace(REFERENCE, **{option: True})).match == with_it


def test_numbers_of_rows_that_tie_are_compared_within_the_tolerance(database):
    gold, pred = "SELECT name, 0.3 FROM player ORDER BY score", "SELECT name, {} FROM player ORDER BY score, id DESC"
    assert score(gold, pred.format("0.1 + 0.2"), database).match == 1
    assert score(gold, pred.format("0.1 + 0.2001"), database).match == 0
    assert score(gold, pred.format("0.1 + 0.2"), database, strict=replace(STRICT, float_tolerance=False)).match == 0


def test_ties_that_are_not_those_of_the_gold_answer_count_for_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("sqlbench.database.engine.LOOK_SECONDS", 1e9)  # a change of the file goes unnoticed
    clear_gold_cache()
    database = open_database(make(tmp_path / "club.sqlite"))
    gold, pred = "SELECT name FROM player ORDER BY score", "SELECT name FROM player ORDER BY id DESC"
    assert score(gold, gold, database).match == 1
    make(tmp_path / "other.sqlite", scores=(1, 1, 1, 1)).replace(tmp_path / "club.sqlite")
    database.close()
    assert score(gold, pred, database).reason == "order_differs"


@pytest.mark.parametrize("marker", ["DISTINCT", "; SELECT 1"])
def test_a_text_too_long_for_the_lexer_is_run_as_it_stands(marker):
    text = f"SELECT {marker} '{'/*' * LONG_TEXT}'"
    for rules in (STRICT, REFERENCE):
        assert prepare(text, rules) == text
        assert prepare("SELECT DISTINCT 1", rules) != "SELECT DISTINCT 1"


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("gold", "reason"),
    [
        ("SELECT nosuch FROM player", "gold_error"),
        ("SELECT 1; SELECT nosuch", "gold_rejected"),
        ("DROP TABLE player", "gold_rejected"),
        ("", "gold_rejected"),
        (ENDLESS, "gold_timeout"),
    ],
)
def test_a_gold_that_cannot_be_scored_is_null_not_zero(database, gold, reason, strict):
    verdict = score(gold, "SELECT 1", database, strict=strict, keep_distinct=True, limits=Limits(seconds=0.1))
    if gold == "" and not strict:  # the reference sees an empty answer
        assert verdict.match == 0
    else:
        assert (verdict.match, verdict.reason) == (None, reason)


@pytest.mark.parametrize(
    ("pred", "reason"),
    [
        ("SELECT nosuch FROM player", "pred_error"),
        (ENDLESS, "pred_timeout"),
        ("DELETE FROM player", "pred_rejected"),
        ("SELECT zeroblob(100000000)", "too_large"),
        ("SELECT 1, 2", "columns_differ"),
        ("SELECT 'x'", "rows_differ"),
        ("SELECT name FROM player ORDER BY name DESC", "order_differs"),
        ("SELECT a.name FROM player a, player b, player c, player d", "rows_differ"),
    ],
)
def test_reasons(database, pred, reason):
    verdict = score("SELECT name FROM player ORDER BY name", pred, database)
    assert (verdict.match, verdict.reason) == (0, reason)


def test_a_suite_of_databases_needs_a_match_on_each(tmp_path):
    one, two = make(tmp_path / "a.sqlite"), make(tmp_path / "b.sqlite", scores=(1, 2, 3, 4))
    databases = [open_database(one), open_database(two)]
    gold, pred = "SELECT count(DISTINCT score) FROM player", "SELECT 3"
    assert [score(gold, pred, d).match for d in databases] == [1, 0]
    assert score(gold, pred, databases).match == 0


def test_gold_is_run_once_until_the_database_changes(database, monkeypatch):
    runs = []
    run = database.execute_unchecked
    monkeypatch.setattr(database, "execute_unchecked", lambda *a: (runs.append(a[0]), run(*a))[1])
    gold, pred = "SELECT count(*) FROM player", "SELECT 4"
    assert [score(gold, pred, database).match for _ in range(3)] == [1, 1, 1]
    assert runs.count(gold) == 1
    connection = sqlite3.connect(database.target)
    connection.execute("DELETE FROM player WHERE id = 1")
    connection.commit()
    connection.close()
    time.sleep(2 * LOOK_SECONDS)
    assert score(gold, pred, database).match == 0
    assert runs.count(gold) == 2


def test_a_gold_that_failed_for_a_limit_is_run_again_under_another(database):
    gold = "SELECT name FROM player ORDER BY name"
    tight = Limits(result_bytes=1, rows=1)
    wide = "SELECT a.name, b.name, c.name, d.name, e.name FROM player a, player b, player c, player d, player e"
    assert score(wide, wide, database, limits=tight).reason == "gold_too_large"
    assert score(wide, wide, database).match == 1
    assert score(wide, wide, database, limits=tight).reason == "gold_too_large"
    assert score(gold, gold, database).match == 1


def test_a_gold_that_timed_out_is_run_again(database, monkeypatch):
    runs = []
    run = database.execute_unchecked
    monkeypatch.setattr(database, "execute_unchecked", lambda *a: (runs.append(a[0]), run(*a))[1])
    limits = Limits(seconds=0.05)
    assert [score(ENDLESS, "SELECT 1", database, limits=limits).reason for _ in range(3)] == ["gold_timeout"] * 3
    assert runs.count(ENDLESS) == 3


def test_the_gold_cache_is_bounded(database, monkeypatch):
    monkeypatch.setattr(reward, "_CACHED_CELLS", 500)
    for i in range(50):
        score(f"SELECT {i}", "SELECT 1", database)
    assert len(reward._cache) <= 10


def test_a_slow_query_does_not_hold_up_64_others(database):
    async def both():
        slow = asyncio.create_task(score_async("SELECT 1", ENDLESS, database))
        await asyncio.sleep(0.05)
        start = time.perf_counter()
        quick = await asyncio.gather(
            *(score_async("SELECT name FROM player", "SELECT name FROM player", database) for _ in range(64))
        )
        return slow.done(), quick, time.perf_counter() - start, await slow

    done, quick, seconds, slow = asyncio.run(both())
    assert all(v.match == 1 for v in quick)
    assert not done or seconds > 0.4
    assert slow.reason == "pred_timeout"
