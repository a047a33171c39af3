"""Hardness by Spider's published rules, component F1, error classes of both databases, and what a query is about."""

from __future__ import annotations

import gzip
import json
import sqlite3
import sys
import zipfile
from collections import Counter

import pytest

from sqlbench import sql_analysis
from sqlbench.clauses import component_match, hardness
from sqlbench.database.error_classes import ERROR_CLASSES, error_class
from sqlbench.sql_analysis import MAX_CHARS, outer_order, same_subject, statements, with_order_keys
from sqlbench_lab.view import pretty

# Counted by hand: (components, nested, others) in the comment.
HARDNESS = [
    ("SELECT name FROM t", "easy"),  # 0 0 0
    ("SELECT count(*) FROM t WHERE a > 1", "easy"),  # 1 0 0
    ("SELECT DISTINCT a FROM t ORDER BY b", "easy"),  # 1 0 0
    ("SELECT a FROM t WHERE b BETWEEN 1 AND 2", "easy"),  # 1 0 0: BETWEEN is one condition
    ("SELECT a, b FROM t", "medium"),  # 0 0 1
    ("SELECT count(*), max(a) FROM t", "medium"),  # 0 0 2: two columns, two aggregates
    ("SELECT a FROM t ORDER BY b LIMIT 1", "medium"),  # 2 0 0
    ("SELECT a FROM t WHERE b = 1 AND c = 2", "medium"),  # 1 0 1
    ("SELECT a FROM t WHERE b LIKE '%x%'", "medium"),  # 2 0 0: WHERE and LIKE
    ("SELECT a FROM t JOIN u ON t.x = u.y WHERE b = 1", "medium"),  # 2 0 0
    ("SELECT a FROM t, u WHERE b = 1", "medium"),  # 2 0 0
    ("SELECT a, count(*) FROM t GROUP BY a", "medium"),  # 1 0 1
    ("SELECT a FROM t GROUP BY a HAVING count(*) > 1 ORDER BY a", "medium"),  # 2 0 0
    ("SELECT a FROM (SELECT a FROM t)", "easy"),  # 0 0 0: a subquery in FROM is not nested
    ("SELECT a FROM t WHERE b = 1 OR c = 2 ORDER BY a", "hard"),  # 3 0 1
    ("SELECT a, b FROM t WHERE c = 1 AND d = 2 ORDER BY e", "extra"),  # 2 0 2
    ("SELECT a, b, max(c), min(c) FROM t WHERE d = 1 AND e = 2 GROUP BY a, b", "hard"),  # 2 0 4
    ("SELECT a FROM t JOIN u ON t.x = u.y GROUP BY a ORDER BY count(*)", "hard"),  # 3 0 0
    ("SELECT a FROM t WHERE b IN (SELECT c FROM u)", "hard"),  # 1 1 0
    ("SELECT a FROM t WHERE b NOT IN (SELECT c FROM u)", "hard"),  # 1 1 0: one NOT is not more than one
    (
        "SELECT a FROM t UNION SELECT b FROM u WHERE c = 1 AND d = 2 ORDER BY 1",
        "hard",
    ),  # 0 1 0: the first SELECT counts
    ("SELECT a, b FROM t EXCEPT SELECT a, b FROM u", "extra"),  # 0 1 1
    ("SELECT a FROM t JOIN u ON t.x = u.y JOIN v ON v.x = u.z GROUP BY a ORDER BY count(*) LIMIT 1", "extra"),  # 5 0 0
    ("SELECT a FROM t WHERE b > (SELECT avg(b) FROM t) AND c = 1", "extra"),  # 1 1 1
    ("not a query", "extra"),
]


@pytest.mark.parametrize(("sql", "level"), HARDNESS)
def test_hardness(sql, level):
    assert hardness(sql) == level


def test_hardness_of_spider_dev_is_the_published_one(shared):
    with zipfile.ZipFile(shared / "spider_data.zip") as archive:
        tasks = json.loads(archive.read("spider_data/dev.json"))
    assert Counter(hardness(t["query"]) for t in tasks) == {"easy": 248, "medium": 446, "hard": 174, "extra": 166}


def test_components_of_equal_queries_match_whatever_their_spelling():
    gold = (
        "SELECT T1.N FROM singer AS T1 JOIN concert AS T2 ON T1.id = T2.sid WHERE T1.age > 20 ORDER BY T1.age LIMIT 3"
    )
    pred = "select singer.n from concert join singer on concert.sid = singer.id where age > 20 order by age limit 3"
    assert component_match(gold, pred) == {"select": 1, "where": 1, "order": 1, "joins": 1}


@pytest.mark.parametrize(
    ("gold", "pred", "part", "f1"),
    [
        ("SELECT a, b FROM t", "SELECT a FROM t", "select", 2 / 3),
        ("SELECT a FROM t", "SELECT DISTINCT a FROM t", "select", 2 / 3),
        ("SELECT a FROM t WHERE b = 1 AND c = 2", "SELECT a FROM t WHERE c = 2", "where", 2 / 3),
        ("SELECT a FROM t WHERE b = 1", "SELECT a FROM t WHERE b = 2", "where", 0),
        ("SELECT a FROM t GROUP BY a HAVING count(*) > 1", "SELECT a FROM t GROUP BY a", "group", 2 / 3),
        ("SELECT a FROM t ORDER BY a", "SELECT a FROM t ORDER BY a DESC", "order", 0),
        ("SELECT a FROM t UNION SELECT b FROM u", "SELECT a FROM t EXCEPT SELECT b FROM u", "set", 0),
        ("SELECT a FROM t JOIN u ON t.x = u.x", "SELECT a FROM t", "joins", 0),
        ("SELECT a FROM t", "not a query", "select", 0),
    ],
)
def test_component_f1(gold, pred, part, f1):
    assert component_match(gold, pred)[part] == pytest.approx(f1)


def test_a_clause_of_neither_query_is_left_out():
    assert component_match("SELECT a FROM t", "SELECT b FROM t") == {"select": 0}


@pytest.mark.parametrize(
    ("sql", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("SELECT a FROM t UNION SELECT b FROM u ORDER BY 1", True),
        ("WITH x AS (SELECT a FROM t ORDER BY a) SELECT a FROM x", False),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a LIMIT 3)", False),
        ("SELECT 'order by'", False),
        ("SELEC", None),
    ],
)
def test_outer_order(sql, ordered):
    assert outer_order(sql) is ordered


@pytest.mark.parametrize(
    ("gold", "pred", "same"),
    [
        ("SELECT a FROM t WHERE b = 'X'", "SELECT z.a FROM t AS z WHERE z.b LIKE '%x%'", True),
        ("SELECT a FROM t WHERE b = 1", "SELECT a FROM t WHERE b IN (1)", True),
        ("SELECT a FROM t GROUP BY a HAVING count(*) >= 2", "SELECT a FROM t GROUP BY a HAVING count(*) > 1", True),
        (
            "SELECT a FROM t WHERE x NOT IN (SELECT y FROM u)",
            "SELECT a FROM t LEFT JOIN u ON x = y WHERE y IS NULL",
            True,
        ),
        ("SELECT a FROM t WHERE b = 1", "SELECT a FROM u WHERE b = 1", False),
        ("SELECT a FROM t WHERE b = 1", "SELECT a FROM t WHERE b = 2", False),
        ("SELECT a FROM t WHERE b = 1", "SELECT a FROM t WHERE c = 1", False),
        ("SELECT a FROM t WHERE b = 1", "SELECT a FROM t WHERE b = 1 AND b <> b", False),
        ("SELECT a FROM t WHERE b = 1", "SELECT a FROM t WHERE b = 1 LIMIT 1 OFFSET 1000", False),
        ("SELECT a FROM t", "SELECT a FROM t LIMIT 0", False),
        ("SELECT a FROM t", "SELECT a FROM t WHERE NOT 1", False),
        ("SELECT a FROM t", "SELECT a FROM t WHERE a IS NULL AND NULL", False),
    ],
)
def test_same_subject(gold, pred, same):
    assert same_subject(gold, pred) == same


# What opens, what is repeated, what stands inside, what closes each repetition.
REPEATS = {
    "join": ("SELECT 1 FROM t", " JOIN t", "", ""),
    "join on": ("SELECT 1 FROM t", " JOIN t ON 1", "", ""),
    "join in parentheses": ("SELECT 1 FROM ", "(t JOIN ", "t", ")"),
    "lateral": ("SELECT 1 FROM t", ", LATERAL (SELECT 1 FROM t", "", ""),
    "comma": ("SELECT 1 FROM t", ", t", "", ""),
    "union": ("SELECT 1", " UNION SELECT 1", "", ""),
    "parenthesis": ("SELECT ", "(", "1", ")"),
    "open parenthesis": ("SELECT ", "(", "", ""),
    "subquery": ("SELECT 1 FROM ", "(SELECT 1 FROM ", "t", ")"),
    "in subquery": ("SELECT 1 FROM t WHERE a", " IN (SELECT a FROM t WHERE a", " = 1", ")"),
    "with": ("", "WITH a AS (", "SELECT 1", ") SELECT 1"),
    "case": ("SELECT ", "CASE WHEN 1 THEN ", "1", " END"),
    "when": ("SELECT CASE", " WHEN 1 THEN 1", " END", ""),
    "in list": ("SELECT 1 FROM t WHERE a IN (1", ", 1", ")", ""),
    "not": ("SELECT ", "NOT ", "1", ""),
    "minus": ("SELECT ", "- ", "1", ""),
    "and": ("SELECT 1 FROM t WHERE 1", " AND 1", "", ""),
    "equals": ("SELECT 1 FROM t WHERE a", " = a", "", ""),
    "concatenation": ("SELECT 'a'", " || 'a'", "", ""),
    "arrow": ("SELECT a", "->>1", "", ""),
    "index": ("SELECT a", "[1]", "", ""),
    "type": ("SELECT ", "STRUCT(", "", ""),
    "call": ("SELECT ", "f(", "1", ")"),
    "lambda": ("SELECT f(", "x -> ", "1)", ""),
    "comment": ("SELECT 1", " /* c */", "", ""),
    "open comment": ("SELECT 1", " /*", "", ""),
    "open quote": ("SELECT ", "'a", "", ""),
    "statement": ("SELECT 1", "; SELECT 1", "", ""),
    "pipe": ("FROM t", " |> SELECT 1", "", ""),
    "space": ("SELECT", " ", "1", ""),
    "number": ("SELECT a FROM t ORDER BY 0x", "f", "", ""),
}


def repeated(kind: str, times: int) -> str:
    head, unit, inside, close = REPEATS[kind]
    return head + unit * times + inside + close * times


def calls(function, *arguments) -> int:
    """How many Python functions are called: the same on every machine."""
    count = 0

    def hear(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(hear)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("kind", REPEATS)
def test_a_clause_that_is_repeated_is_read_in_a_bounded_number_of_steps(kind):
    head, unit, inside, close = REPEATS[kind]
    most = (MAX_CHARS - len(head + inside)) // len(unit + close)
    for times in (14, 60, most, 10 * most):
        text = repeated(kind, min(times, 100_000))
        for dialect in ("sqlite", "postgresql"):
            assert calls(statements, text, dialect) < 1_000_000
            assert outer_order(text, dialect) in (None, False, True)
            with_order_keys(text, ("a",), dialect)
            same_subject(text, text, dialect)
        assert hardness(text) in ("easy", "medium", "hard", "extra")
        assert set(component_match(text, text).values()) <= {1.0}
        assert pretty(text)


def test_a_query_over_the_bounds_has_no_tree():
    assert hardness(repeated("join", 5)) == "extra" != hardness(repeated("join", 1))
    assert component_match(repeated("join", 5), repeated("join", 5)) == {"select": 1, "joins": 1}
    over = repeated("join", 16), repeated("parenthesis", 500), repeated("and", 150), "SELECT 1" + " " * MAX_CHARS
    for text in over:
        assert statements(text) == [] and component_match(text, text) == {}
        assert outer_order(f"{text} ORDER BY 1") is None and not same_subject(text, text)
        assert pretty(text) == text


def test_every_real_query_is_far_inside_the_bounds(shared, monkeypatch):
    with zipfile.ZipFile(shared / "spider_data.zip") as archive:
        names = ("dev", "train_spider")
        queries = {t["query"] for n in names for t in json.loads(archive.read(f"spider_data/{n}.json"))}
    with gzip.open(shared / "spider_dev_pairs.jsonl.gz", "rt") as lines:
        queries |= {row[side] for row in map(json.loads, lines) for side in ("gold", "pred")}
    free = [query for query in queries if statements(query)]
    for name in ("MAX_CHARS", "MAX_STEPS", "MAX_DEPTH", "MAX_HEX"):
        monkeypatch.setattr(sql_analysis, name, getattr(sql_analysis, name) // 4)
    assert len(queries) > 6000 and [query for query in queries if statements(query)] == free
    for name in ("MAX_CHARS", "MAX_STEPS", "MAX_DEPTH", "MAX_HEX"):
        monkeypatch.setattr(sql_analysis, name, 10**6)
    assert [query for query in queries if statements(query)] == free


FAILING = {
    "SELECT nosuch FROM t": "no_such_column",
    "SELECT x.a FROM t": "no_such_column",
    "SELECT a FROM nosuch": "no_such_table",
    "SELEC a FROM t": "syntax",
    "SELECT a FROM t WHERE": "syntax",
    "SELECT a FROM t WHERE a = 'x": "syntax",
    "SELECT a FROM t WHERE a = 'function a does not exist": "syntax",
    "SELECT a FROM t WHERE a = '" + "type and " * 5000: "syntax",
    "SELECT a FROM t JOIN u": "ambiguous_column",
    "SELECT nosuch(a) FROM t": "function",
    "SELECT abs() FROM t": "function",
    "SELECT a FROM t WHERE count(*) > 1": "aggregation",
    "SELECT a FROM t HAVING a > 1": "aggregation",
    "SELECT a FROM t UNION SELECT a, b FROM u": "type",
    "SELECT a FROM t WHERE a IN (SELECT a, b FROM u)": "type",
    "SELECT a FROM t LIMIT 'x'": "type",
}


@pytest.mark.parametrize("sql", FAILING)
def test_error_classes_of_sqlite(sql):
    connection = sqlite3.connect(":memory:")
    connection.executescript("CREATE TABLE t (a INT); CREATE TABLE u (a INT, b INT);")
    with pytest.raises(sqlite3.Error) as error:
        connection.execute(sql).fetchall()
    assert error_class(str(error.value)) == FAILING[sql]


def test_every_message_has_a_class():
    assert error_class("no result within 5 s") == "timeout"
    assert error_class("disk I/O error") == "other"
    assert {error_class(m) for m in ("", "near", "x")} <= set(ERROR_CLASSES)


@pytest.mark.parametrize("dialect", ["postgresql", "duckdb"])
def test_hardness_and_components_are_of_the_dialect(dialect):
    sql = "SELECT a FROM t WHERE b ~ 'x'"
    assert (hardness(sql), hardness(sql, dialect)) == ("extra", "easy")  # SQLite has no such operator
    assert component_match(sql, sql) == {} and component_match(sql, sql, dialect) == {"select": 1, "where": 1}
