"""A database of the user's own: what is found out about it, and what is said when it cannot be opened."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sqlite3
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import psycopg
import pytest

from sqlbench.agent.trajectory import Completion
from sqlbench.database.schema import mermaid_er
from sqlbench.database.types import Column, ForeignKey, Schema, Table
from sqlbench.errors import DatabaseError
from sqlbench_chat.connection import connect, model_examples
from sqlbench_lab.diagram import MAX_COLUMNS, MAX_TABLES, er_svg


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A small shop: two tables and a key, one empty table."""
    path = tmp_path / "shop.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(
            "CREATE TABLE customer (customer_id INTEGER PRIMARY KEY, full_name TEXT, balance REAL);"
            "CREATE TABLE orders (order_id INTEGER PRIMARY KEY, customer_id INTEGER REFERENCES customer, price REAL);"
            "CREATE TABLE nothing_yet (nothing_id INTEGER PRIMARY KEY, label TEXT);"
            "INSERT INTO customer VALUES (1, 'Ada', 10.5), (2, 'Bo', 3);"
            "INSERT INTO orders VALUES (1, 1, 5), (2, 1, 7), (3, 2, 1)"
        )
    return path


@pytest.fixture(scope="module")
def chinook(postgres: str, shared: Path) -> str:
    """Address of the Chinook sample database on a real server."""
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("CREATE DATABASE chinook")
    address = postgres.replace("/postgres?", "/chinook?")
    script = (shared / "chinook" / "Chinook_PostgreSql.sql").read_text(encoding="utf-8")
    with psycopg.connect(address) as connection:
        connection.execute(script.split("\\c chinook;")[1].encode())
    return address


def refusal(target: str | Path) -> str:
    with pytest.raises(DatabaseError) as caught:
        connect(target)
    return str(caught.value)


# --- what is found out ------------------------------------------------------------------------------------------------


def test_a_sqlite_file_is_introspected_and_its_examples_run(shop: Path) -> None:
    connection = connect(f" {shop} ")
    assert (connection.name, connection.database.dialect, connection.notice) == ("shop", "sqlite", "")
    assert [t.name for t in connection.schema.tables] == ["customer", "orders", "nothing_yet"]
    assert [e.question for e in connection.examples] == [
        "How many customers are there?",
        "List the full name of all customers.",
        "What is the average balance of all customers?",
        "What is the full name of the customer with the highest balance?",
        "How many orders are there for each customer?",
    ]
    answers = [connection.database.execute(e.sql).rows for e in connection.examples]
    assert answers == [[(2,)], [("Ada",), ("Bo",)], [(6.75,)], [("Ada",)], [(1, 2), (2, 1)]]


def test_postgresql_is_introspected_and_its_examples_run(chinook: str) -> None:
    connection = connect(chinook)
    assert (connection.name, connection.schema.dialect, len(connection.schema.tables)) == ("chinook", "postgresql", 11)
    assert len({e.question for e in connection.examples}) == 5
    assert all(connection.database.execute(e.sql).rows for e in connection.examples)
    assert "invoice_line" in er_svg(connection.schema)


@pytest.fixture(scope="module")
def company(postgres: str) -> str:
    """Address of a database whose tables are in schemas of their own; a login named guest may read none of them."""
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("CREATE DATABASE company")
        connection.execute("CREATE ROLE guest LOGIN")
    address = postgres.replace("/postgres?", "/company?")
    with psycopg.connect(address) as connection:
        connection.execute(
            'CREATE SCHEMA sales; CREATE SCHEMA "HR"; CREATE DOMAIN sales.label AS text;'
            "CREATE TABLE sales.client (id int PRIMARY KEY, title sales.label, budget numeric);"
            'CREATE TABLE "HR"."Visit" ("Visit" int, client_id int REFERENCES sales.client);'
            'CREATE TABLE "HR".visit (id int, client_id int REFERENCES sales.client);'
            "INSERT INTO sales.client VALUES (1, 'Ada', 10), (2, 'Bo', 4);"
            """INSERT INTO "HR"."Visit" VALUES (1, 1), (2, 1), (3, 2); INSERT INTO "HR".visit VALUES (1, 1)"""
        )
    return address


def test_tables_of_other_schemas_are_drawn_and_their_examples_run(company: str) -> None:
    connection = connect(company)
    assert connection.notice == "" and [t.label for t in connection.schema.tables] == [
        "HR.Visit",
        "HR.visit",
        "sales.client",
    ]
    asked = {e.question: connection.database.execute(e.sql).rows for e in connection.examples}
    assert asked["What is the title of the client with the highest budget?"] == [("Ada",)]
    assert asked["How many visits are there for each client?"] in ([(1, 2), (2, 1)], [(1, 1)])
    svg = er_svg(connection.schema)
    assert {"HR.Visit", "HR.visit", "sales.client"} <= set(texts(svg))
    assert svg.count("<path") == 2 and "client_id refers to sales.client.id" in svg
    assert "HR_Visit }o--|| sales_client : client_id" in mermaid_er(connection.schema)


def test_a_login_that_may_read_nothing_is_told_so(company: str) -> None:
    assert "has no tables that can be read" in connect(company.replace("//postgres:", "//guest:")).notice


def test_an_empty_database_opens_and_says_so(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "empty.sqlite").close()
    for target in (":memory:", tmp_path / "empty.sqlite"):
        connection = connect(target)
        assert "has no tables" in connection.notice and connection.examples == ()
        assert "No tables" in er_svg(connection.schema)


def test_500_columns_are_opened_drawn_and_announced(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "wide.sqlite") as raw:
        raw.execute(f"CREATE TABLE wide ({', '.join(f'measurement_{i} REAL' for i in range(500))})")
        raw.execute(f"INSERT INTO wide VALUES ({', '.join('1' * 500)})")
    connection = connect(tmp_path / "wide.sqlite")
    assert "1 table, 500 columns" in connection.notice and "\n" not in connection.notice
    assert len(connection.examples) >= 2
    svg = er_svg(connection.schema)
    assert f"and {500 - MAX_COLUMNS + 1} more columns" in svg and len(svg) < 20_000


class Scripted:
    """A model that always gives the same answer."""

    name, family = "scripted", "chat"

    def __init__(self, text: str) -> None:
        self.text, self.prompt = text, ""

    async def complete(self, messages, on_text=None) -> Completion:
        self.prompt = messages[-1].content
        return Completion(text=self.text)


def test_examples_of_a_model_are_kept_where_they_give_rows(shop: Path) -> None:
    lines = [
        {"question": "Who is richest?", "sql": "SELECT full_name FROM customer ORDER BY balance DESC LIMIT 1;"},
        {"question": "What is our churn?", "sql": "SELECT churn FROM customer"},
        {"question": "Who owes us?", "sql": "SELECT full_name FROM customer WHERE balance < 0"},
        {"question": "Clean up", "sql": "DELETE FROM orders"},
        {"question": "no query"},
    ]
    connection = connect(shop)
    model = Scripted("Sure!\n" + "\n".join(map(json.dumps, lines)) + "\n{broken")
    examples = asyncio.run(model_examples(connection, model))
    assert [e.question for e in examples] == ["Who is richest?"]
    assert "SQLite" in model.prompt and "full_name" in model.prompt


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("", "No database given. Give the path"),
        ("mysql://me:secret@localhost/shop", "Unsupported kind of database: mysql. Give"),
        ("postgresql+psycopg://me:secret@localhost/shop", r"kind of database: postgresql\+psycopg. Give"),
        ("no/such/file.sqlite", "Cannot open database no/such/file.sqlite: No such file"),
        ("host=db user=me password=secret", r"Cannot open database host=db"),
        ("postgresql://me:secret@localhost:1/x", r"Cannot open postgresql://me@localhost:1/x: .*refused"),
        ("postgresql://localhost:1/x?password=secret", "Cannot open postgresql://localhost:1/x"),
        ("postgresql://localhost:1/x?password=secret&nonsense=1", "Not a PostgreSQL address"),
        (
            "postgresql://me:se/cret@localhost:1/x",
            "Cannot read the address: postgresql://me@localhost:1/x. In the pass",
        ),
        ("postgresql://me:se@cret@localhost:1/x", "Cannot read the address: postgresql://me@localhost:1/x"),
        ("postgresql://me:se cret@localhost:1/x", "Cannot read the address: postgresql://me@localhost:1/x"),
        ("postgresql://me:cret%zz@localhost:1/x", "Cannot read the address: postgresql://me@localhost:1/x"),
        ("postgresql://localhost:port/x", "Cannot open postgresql://localhost:port/x: "),
    ],
)
def test_a_bad_target_is_one_line_without_the_password(target: str, message: str) -> None:
    said = refusal(target)
    assert re.search(message, said), said
    assert "\n" not in said and "cret" not in said


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("just text, " * 200)
    assert re.search(
        r"notes.txt: file is not a database. Check that it is a SQLite file", refusal(tmp_path / "notes.txt")
    )
    assert "Cannot open database" in refusal(tmp_path)


def test_a_wrong_password_is_refused_by_the_real_server(postgres: str) -> None:
    said = refusal(postgres.replace("//postgres:", "//nobody:secret"))
    assert 'role "nobody" does not exist' in said and "secret" not in said and "\n" not in said


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "timeout" in refusal(f"postgresql://me@127.0.0.1:{silent.getsockname()[1]}/x")


# --- the diagram ------------------------------------------------------------------------------------------------------


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_diagram_shows_tables_columns_and_keys_and_needs_nothing_else(shop: Path) -> None:
    svg = er_svg(connect(shop).schema)
    assert {"customer", "orders", "full_name", "REAL", "PK", "FK"} <= set(texts(svg))
    assert svg.count("<path") == 1 and "customer_id refers to customer.customer_id" in svg
    assert "script" not in svg and "href" not in svg and svg.count("http") == 1  # the namespace, which is no request


def test_names_in_the_diagram_are_escaped() -> None:
    name = "<script>alert('&')</script>"
    schema = Schema((Table(name, (Column(name, name),)),), name=f'"{name}')
    assert name in texts(er_svg(schema))


def test_tables_do_not_overlap_even_where_keys_run_in_circles() -> None:
    def table(name: str, *refs: str) -> Table:
        columns = tuple(Column(f"c{i}", "INTEGER") for i in range(5))
        return Table(name, columns, tuple(ForeignKey(f"c{i}", ref, "c0") for i, ref in enumerate(refs)))

    tables = [
        table("a", "b", "a"),
        table("b", "c"),
        table("c", "a", "nowhere"),
        *(table(f"t{i}", "c") for i in range(90)),
    ]
    svg = er_svg(Schema(tuple(tables)))
    assert f"and {93 - MAX_TABLES} more tables" in svg
    boxes = [
        tuple(float(r.attrib[k]) for k in ("x", "y", "width", "height"))
        for r in list(ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect"))[::2]
    ]
    assert len(boxes) == MAX_TABLES
    for i, (x, y, w, h) in enumerate(boxes):
        assert all(x + w < a or a + c < x or y + h < b or b + d < y for a, b, c, d in boxes[:i])
