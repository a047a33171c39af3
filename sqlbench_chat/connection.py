"""The user's own database: opened read-only, introspected, with example questions whose queries run.

Every fault of the target raises a one-line `DatabaseError` that never shows a password. A database that is merely
unusual (no tables, a schema longer than a prompt shows) opens, and `Connection.notice` says so.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlbench.agent.prompts import DIALECTS, extract_sql
from sqlbench.agent.trajectory import Message
from sqlbench.config import RolloutConfig
from sqlbench.database.engine import in_thread, open_database
from sqlbench.database.schema import quote, schema_text
from sqlbench.database.target import TARGETS, without_password
from sqlbench.database.types import Column, Limits, Schema, Table
from sqlbench.errors import DatabaseError
from sqlbench.interfaces import Database, Model, is_plugin, load_plugin
from sqlbench.text import clean

EXAMPLES = 5
SMALL, LARGE = RolloutConfig().table_info_truncate, 12_000
"""Schema size in characters above which a schema is large for the nano policy, and for any other model."""
BUDGETS = {"nano": {"schema_tokens": 512}}
"""Schema budgets in prompts: nano reads 1,024 tokens, and an unknown name takes one token per two characters."""
_LIMITS = Limits(seconds=1.0, rows=1000)
_SECONDS = 5.0
"""Time limit for trying examples, in seconds."""


@dataclass(frozen=True)
class Example:
    """A question about a database, with a query that runs there and returns rows."""

    question: str
    sql: str


@dataclass(frozen=True)
class Connection:
    """An open database with its schema and examples."""

    name: str
    """Display name, without path, user or password."""
    database: Database
    schema: Schema
    examples: tuple[Example, ...]
    """Questions generated from the schema, or those of a data set."""
    notice: str = ""
    """One line about limits of this database; empty if it has none."""


def connect(target: str | Path | Database) -> Connection:
    """Open a database for reading: a target of `sqlbench.database.target.TARGETS`, or a database object.

    Raises:
        DatabaseError: the target is not an address or a database, does not exist, or cannot be reached.
        PluginError: ``module:attribute`` cannot be loaded.
    """
    if not isinstance(target, str | Path):
        return _connection(target)
    text = str(target).strip()
    if not text:
        raise DatabaseError(f"No database given. Give {TARGETS}.")
    if is_plugin(text):
        return _connection(load_plugin("database", text))
    try:
        return _connection(open_database(os.path.expanduser(text)))
    except DatabaseError as error:
        raise DatabaseError(without_password(" ".join(str(error).split()))) from None


def _connection(database: Database) -> Connection:
    schema, name = database.schema(), database.name or database.dialect
    examples = tuple(schema_examples(database, schema))
    return Connection(name, database, schema, examples, _notice(name, schema))


def _notice(name: str, schema: Schema) -> str:
    if not schema.tables:
        return f"{name} has no tables that can be read, so there is nothing to ask about"
    if schema.unreadable:
        return f"SQLite cannot read these tables of {name} here, so they are left out: {', '.join(schema.unreadable)}"
    if len(schema_text(schema, "compact", 1 << 30)) <= SMALL and len(schema_text(schema, "ddl", 1 << 30)) <= LARGE:
        return ""
    tables, columns = len(schema.tables), sum(len(table.columns) for table in schema.tables)
    return (
        f"{name} is large ({tables} table{'s' * (tables != 1)}, {columns:,} columns): prompts show only the part of "
        "its schema that a question seems to need"
    )


# --- example questions ----------------------------------------------------------------------------------------------


def schema_examples(database: Database, schema: Schema) -> list[Example]:
    """Generate up to five questions from the schema alone, of different kinds and on different tables if possible."""
    deadline = time.monotonic() + _SECONDS
    tables = [_questions(table) for table in schema.tables if table.columns]
    kinds = [[tables[(kind + i) % len(tables)][kind] for i in range(len(tables))] for kind in range(EXAMPLES)]
    examples: list[Example] = []
    for choices in [*kinds, *([example] for questions in tables for example in questions)]:
        for example in choices:
            if example and example not in examples and time.monotonic() < deadline and _answers(database, example):
                examples.append(example)
                break
        if len(examples) == EXAMPLES:
            break
    return examples


async def model_examples(connection: Connection, model: Model) -> list[Example]:
    """Ask the model for five questions, and keep those whose queries return rows.

    Raises:
        ModelError: the model cannot be reached.
    """
    schema = schema_text(connection.schema, "ddl", LARGE)
    dialect = DIALECTS[connection.database.dialect]
    prompt = (
        f"Schema ({dialect}):\n{schema}\n\nWrite {EXAMPLES} questions that somebody who works with this data would "
        f"ask, from easy to hard, each with one read-only {dialect} query that answers it. Answer with {EXAMPLES} "
        'lines of JSON and nothing else:\n{"question": "...", "sql": "SELECT ..."}'
    )
    answer = await model.complete([Message(role="user", content=prompt)])
    return await in_thread(lambda: [e for e in _parse(answer.text) if _answers(connection.database, e)][:EXAMPLES])


def _parse(text: str) -> Iterator[Example]:
    for block in re.findall(r"\{[^{}]*\}", text):
        try:
            pair = json.loads(block)
            yield Example(clean(str(pair["question"])), extract_sql(clean(str(pair["sql"]))))
        except (ValueError, KeyError, RecursionError):
            continue


def _answers(database: Database, example: Example) -> bool:
    result = database.execute(example.sql, _LIMITS)
    return result.ok and any(cell is not None for row in result.rows for cell in row)


def _words(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_+", " ", name).strip().lower()


def _plural(words: str) -> str:
    if words.endswith("s"):
        return words
    if re.search("[^aeiou]y$", words):
        return words[:-1] + "ies"
    return words + ("es" if words.endswith(("x", "ch", "sh")) else "s")


def _columns(table: Table, *types: str) -> list[Column]:
    """Return the columns of these types that are not keys."""
    keys = {key.column for key in table.foreign_keys}
    return [
        c
        for c in table.columns
        if not (c.primary_key or c.name in keys or re.search(r"(^|_|[a-z])(id|Id|ID|key)$", c.name))
        and any(t in c.type for t in types)
    ]


_NUMBERS, _TEXT = ("INT", "REAL", "NUM", "DEC", "DOUBLE", "FLOA", "MONEY"), ("CHAR", "TEXT", "CLOB")


def _questions(table: Table) -> list[Example | None]:
    """Generate one question of each kind; None if the table has no columns for it."""
    one, many, name = _words(table.name), _plural(_words(table.name)), quote(table.name, table.schema)
    examples: list[Example | None] = [Example(f"How many {many} are there?", f"SELECT count(*) FROM {name}")]
    labels, numbers = _columns(table, *_TEXT), _columns(table, *_NUMBERS)
    parent = next((k for k in table.foreign_keys if k.ref_column and k.ref_label != table.label), None)
    label, label_words = (quote(labels[0].name), _words(labels[0].name)) if labels else ("", "")
    number, number_words = (quote(numbers[0].name), _words(numbers[0].name)) if numbers else ("", "")
    examples += [
        Example(f"List the {label_words} of all {many}.", f"SELECT {label} FROM {name}") if label else None,
        Example(f"What is the average {number_words} of all {many}?", f"SELECT avg({number}) FROM {name}")
        if number
        else None,
        Example(
            f"What is the {label_words} of the {one} with the highest {number_words}?",
            f"SELECT {label} FROM {name} WHERE {number} IS NOT NULL ORDER BY {number} DESC LIMIT 1",
        )
        if label and number
        else None,
    ]
    if parent:
        key, other = quote(parent.ref_column), quote(parent.ref_table, parent.ref_schema)
        joined = f"{name} c JOIN {other} p ON c.{quote(parent.column)} = p.{key}"
        sql = f"SELECT p.{key}, count(*) FROM {joined} GROUP BY p.{key}"
        return [*examples, Example(f"How many {many} are there for each {_words(parent.ref_table)}?", sql)]
    return [*examples, None]
