"""Mutants of gold queries: every named kind is made, and what leaves a result as it was is found."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest

from sqlbench.data.mutation import MAX_MUTANTS, MUTATIONS, mutants, unchanged_by
from sqlbench.database.engine import Database, open_database
from sqlbench.database.schema import introspect

SCRIPT = """
CREATE TABLE shop (id INTEGER, name TEXT, city TEXT, size INTEGER, staff INTEGER);
INSERT INTO shop VALUES (1, 'Ash', 'Rome', 10, 4), (2, 'Elm', 'Rome', 20, 1);
INSERT INTO shop VALUES (3, 'Oak', 'Oslo', 30, 3), (4, 'Yew', 'Oslo', 60, 2);
CREATE TABLE sale (sale_id INTEGER, shop_id INTEGER, amount INTEGER);
INSERT INTO sale VALUES (1, 1, 5), (2, 1, 7), (3, 2, 9), (4, 4, 9);
"""


@pytest.fixture(scope="module")
def shops(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    path = tmp_path_factory.mktemp("mutation") / "shops.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCRIPT)
    database = open_database(path)
    yield database
    database.close()


def made(database: Database, gold: str) -> set[tuple[str, str]]:
    return {(name, text.upper()) for name, text in mutants(gold, introspect(database))}


@pytest.mark.parametrize(
    ("gold", "name", "mutant"),
    [
        ("SELECT name FROM shop WHERE size > 20", "comparison", "SELECT name FROM shop WHERE size < 20"),
        ("SELECT name FROM shop WHERE city = 'Rome'", "comparison", "SELECT name FROM shop WHERE city <> 'Rome'"),
        (
            "SELECT name FROM shop WHERE size BETWEEN 1 AND 20",
            "comparison",
            "SELECT name FROM shop WHERE NOT size BETWEEN 1 AND 20",
        ),
        (
            "SELECT name FROM shop WHERE id NOT IN (SELECT shop_id FROM sale)",
            "comparison",
            "SELECT name FROM shop WHERE id IN (SELECT shop_id FROM sale)",
        ),
        ("SELECT name FROM shop WHERE size > 20", "boundary", "SELECT name FROM shop WHERE size >= 20"),
        ("SELECT name FROM shop ORDER BY size DESC LIMIT 1", "order", "SELECT name FROM shop ORDER BY size LIMIT 1"),
        ("SELECT DISTINCT city FROM shop", "distinct", "SELECT city FROM shop"),
        ("SELECT count(DISTINCT city) FROM shop", "distinct", "SELECT COUNT(city) FROM shop"),
        ("SELECT count(city) FROM shop", "distinct", "SELECT COUNT(DISTINCT city) FROM shop"),
        ("SELECT max(size) FROM shop", "aggregate", "SELECT MIN(size) FROM shop"),
        ("SELECT name FROM shop WHERE size > 20", "column", "SELECT city FROM shop WHERE size > 20"),
        ("SELECT name FROM shop WHERE size > 20", "column", "SELECT name FROM shop WHERE staff > 20"),
        ("SELECT name FROM shop WHERE size > 20", "condition", "SELECT name FROM shop"),
        (
            "SELECT name FROM shop WHERE size > 20 AND staff < 3",
            "condition",
            "SELECT name FROM shop WHERE staff < 3",
        ),
        (
            "SELECT name FROM shop WHERE size > 20 AND staff < 3",
            "connective",
            "SELECT name FROM shop WHERE size > 20 OR staff < 3",
        ),
        (
            "SELECT city FROM shop GROUP BY city HAVING count(*) > 1",
            "condition",
            "SELECT city FROM shop GROUP BY city",
        ),
        (
            "SELECT city FROM shop WHERE size > 20 INTERSECT SELECT city FROM shop WHERE size < 40",
            "compound",
            "SELECT city FROM shop WHERE size > 20",
        ),
        (
            "SELECT city FROM shop WHERE size > 20 EXCEPT SELECT city FROM shop WHERE size < 40",
            "compound",
            "SELECT city FROM shop WHERE size > 20 UNION SELECT city FROM shop WHERE size < 40",
        ),
        (
            "SELECT T1.amount FROM sale AS T1 JOIN shop AS T2 ON T1.shop_id = T2.id",
            "join",
            "SELECT T1.amount FROM sale AS T1 JOIN shop AS T2 ON T1.sale_id = T2.id",
        ),
    ],
)
def test_every_kind_of_mutant_is_made(shops: Database, gold: str, name: str, mutant: str) -> None:
    assert name in MUTATIONS
    texts = {(n, text.replace(" ASC ", " ").replace(" NULLS LAST", "")) for n, text in made(shops, gold)}
    assert (name, mutant.upper()) in texts


def test_a_mutant_is_never_the_gold_query_and_occurs_once(shops: Database) -> None:
    gold = "SELECT name FROM shop WHERE size > 20 AND city = 'Rome' ORDER BY staff"
    texts = [text for _, text in mutants(gold, introspect(shops))]
    assert len(texts) == len(set(texts)) > 10
    assert all(text.lower() != gold.lower() for text in texts)


@pytest.mark.parametrize(
    ("gold", "expected"),
    [
        ("SELECT name FROM shop WHERE size > 30", set()),
        ("SELECT name FROM shop WHERE size > 25", {"boundary"}),
        ("SELECT name FROM shop WHERE size > (SELECT avg(size) FROM shop)", set()),
        ("SELECT count(*) FROM shop WHERE city = 'Rome'", {"comparison"}),  # two rows on each side
        ("SELECT city FROM shop ORDER BY staff DESC LIMIT 1", {"order"}),  # the shop with the fewest is in Rome too
        ("SELECT DISTINCT name FROM shop", {"distinct"}),
    ],
)
def test_a_gold_right_by_luck_is_named(shops: Database, gold: str, expected: set[str]) -> None:
    assert set(unchanged_by(gold, shops)) == expected


@pytest.mark.parametrize("gold", ["SELEC x", "", "SELECT " + "(" * 5000 + "1", "DELETE FROM shop", "VALUES (1)"])
def test_what_cannot_be_parsed_has_no_mutants(shops: Database, gold: str) -> None:
    assert list(mutants(gold, introspect(shops))) == []


def test_the_number_of_mutants_is_bounded(shops: Database) -> None:
    gold = "SELECT name FROM shop WHERE " + " OR ".join(f"size > {i}" for i in range(200))
    assert len(list(mutants(gold, introspect(shops)))) <= MAX_MUTANTS
