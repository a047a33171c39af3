"""The schema of a database: introspection, prompt text with truncation, mermaid ER diagram, sample rows."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING

from sqlbench.database.engine import Database
from sqlbench.database.types import Column, ForeignKey, Schema, Table
from sqlbench.errors import DatabaseError

if TYPE_CHECKING:
    from sqlbench.interfaces import Database as AnyDatabase

CELL = 100
"""Most characters of a value in a sample row."""
ROW_SECONDS = 1.0
"""Seconds that the sample rows of one table may take: a view may never end."""


def introspect(database: Database) -> Schema:
    """Read the schema of a database, once for each content.

    Raises:
        DatabaseError: its catalogue cannot be read.
    """
    seen = database.look()
    if database.described is None or database.described[0] != seen:
        database.described = (seen, _read(database))
    return database.described[1]


def _read(database: Database) -> Schema:
    if database.dialect == "postgresql":
        from sqlbench.database.postgres import read_tables

        return Schema(read_tables(database.address), database.dialect, database.name)
    if database.dialect == "duckdb":
        from sqlbench.database import duckdb

        return Schema(duckdb.read_tables(database), database.dialect, database.name)
    try:
        with closing(sqlite3.connect(database.uri(), uri=True)) as connection:
            tables, unreadable = _sqlite_tables(connection)
            return Schema(tables, database.dialect, database.name, unreadable)
    except sqlite3.Error as error:
        raise DatabaseError(
            f"Cannot read the schema of {database.target}: {error}. Check that the file is intact."
        ) from error


SQLITE_TABLES = r"""
SELECT name, type FROM sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite\_%' ESCAPE '\'
AND name NOT IN (SELECT name FROM pragma_table_list WHERE schema = 'main' AND type = 'shadow') ORDER BY type, rowid"""
"""Tables and views, without the tables in which virtual ones keep their data."""


def _sqlite_tables(connection: sqlite3.Connection) -> tuple[tuple[Table, ...], tuple[str, ...]]:
    """Read the tables, and the names of those that cannot be read."""
    connection.text_factory = lambda raw: raw.decode(errors="replace")
    info, views, unreadable = {}, set(), []
    for name, kind in connection.execute(SQLITE_TABLES).fetchall():
        try:  # the last field says whether a column is hidden (1) or generated (2, 3)
            described = connection.execute(f"PRAGMA table_xinfo({quote(name)})").fetchall()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_ERROR:
                raise
            unreadable.append(name)  # a view of something that is gone, or a table whose module SQLite lacks here
            continue
        info[name] = [column for column in described if column[6] != 1]
        if kind == "view":
            views.add(name)
    keys = {
        name.lower(): [column[1] for column in sorted(rows, key=lambda c: c[5]) if column[5]]
        for name, rows in info.items()
    }
    tables = []
    for name, rows in info.items():
        columns = tuple(Column(c[1], c[2].upper(), nullable=not c[3], primary_key=bool(c[5])) for c in rows)
        references = []
        for _, part, ref_table, column, ref_column, *_ in connection.execute(f"PRAGMA foreign_key_list({quote(name)})"):
            implied = keys.get(ref_table.lower(), [])  # REFERENCES without a column means the primary key
            target = ref_column or (implied[part] if part < len(implied) else "")
            references.append(ForeignKey(column, ref_table, target))
        keyed = tuple(sorted(references, key=lambda r: (r.column, r.ref_table)))
        tables.append(Table(name, columns, keyed, view=name in views))
    return tuple(tables), tuple(unreadable)


def quote(name: str, schema: str = "") -> str:
    """Quote a name as an SQL identifier of any dialect, with its schema if it has one."""
    return (quote(schema) + "." if schema else "") + '"' + name.replace('"', '""') + '"'


def schema_text(schema: Schema, style: str = "compact", max_chars: int = 2048) -> str:
    """Write the schema as a prompt shows it, in at most `max_chars` characters.

    ``compact`` is one line per table, `` name: column, column > referenced table``; ``ddl`` is CREATE TABLE statements.
    Sample rows (`with_rows`) follow the columns, as comments in ``ddl``.
    Text that does not fit is left out by whole lines, and ``ddl`` says how many tables are missing or cut.
    """
    if (style, max_chars) not in schema.texts:
        schema.texts[style, max_chars] = _text(schema, style, max_chars)
    return schema.texts[style, max_chars]


def _text(schema: Schema, style: str, max_chars: int) -> str:
    if style == "compact":
        return _fit([_compact_line(table) for table in schema.tables], max_chars)
    if style != "ddl":
        raise ValueError(f"Unknown schema style: {style}. Use 'compact' or 'ddl'.")
    blocks = [_create_table(table, schema) for table in schema.tables]
    text = "\n".join(blocks)
    if len(text) <= max_chars:
        return text
    for count in range(len(blocks) - 1, -1, -1):
        note = f"-- {len(blocks) - count} of {len(blocks)} tables left out or cut to stay under {max_chars} characters"
        head = "".join(block + "\n" for block in blocks[:count])
        if len(head) + len(note) <= max_chars:
            cut = _fit(blocks[count].split("\n"), max_chars - len(head) - len(note) - 1, whole=True)
            return head + (cut + "\n" if cut else "") + note
    return _fit(blocks, max_chars)


def shown(schema: Schema, text: str, style: str) -> Schema:
    """Return the part of a schema that its text, cut or not, shows."""
    tables, at = [], 0
    for table in schema.tables:
        block = _compact_line(table) if style == "compact" else _create_table(table, schema)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(block, text[at:], strict=False))
        seen = "".join(letter for letter, _ in same)
        words = set(re.findall(r"\w+", seen))
        columns = tuple(c for c in table.columns if seen == block or c.name in words)
        if seen == block or table.name in words:
            tables.append(replace(table, columns=columns))
        at += len(block) + 1
    return replace(schema, tables=tuple(tables))


def _compact_line(table: Table) -> str:
    references = {key.column.lower(): key.ref_label for key in table.foreign_keys}
    columns = [
        f"{c.name} > {references[c.name.lower()]}" if c.name.lower() in references else c.name for c in table.columns
    ]
    rows = "".join(f" ({', '.join(row)})" for row in table.rows)
    return f" {table.label}: {', '.join(columns)}{rows and ' e.g.' + rows}".replace("\n", " ")


def _fit(lines: list[str], max_chars: int, whole: bool = False) -> str:
    """Keep the first lines that fit; if not even one does, its beginning (or nothing if only `whole` lines count)."""
    text = "\n".join(lines)
    if len(text) <= max_chars:
        return text
    end = text.rfind("\n", 0, max(max_chars, 0) + 1)
    return text[:end] if end > 0 else "" if whole else text[: max(max_chars, 0)]


def _create_table(table: Table, schema: Schema) -> str:
    """Write a table as a statement; in a part of a schema, without NOT NULL and with short references."""

    def name(text: str, schema_name: str = "") -> str:
        return identifier(text, schema.dialect, schema_name)

    primary = [c.name for c in table.columns if c.primary_key]
    targets = [
        (
            key.column,
            f"REFERENCES {name(key.ref_table, key.ref_schema)}" + f" ({name(key.ref_column)})" * bool(key.ref_column),
        )
        for key in table.foreign_keys
    ]
    parts = []
    for c in table.columns:
        inline = " PRIMARY KEY" if primary == [c.name] else "" if c.nullable or schema.part else " NOT NULL"
        if schema.part:
            inline += "".join(f" {target}" for column, target in targets if column.lower() == c.name.lower())
        parts.append((f"  {name(c.name)} {c.type}".rstrip() + inline, f" -- {', '.join(c.values)}" * bool(c.values)))
    if len(primary) > 1:
        parts.append((f"  PRIMARY KEY ({', '.join(map(name, primary))})", ""))
    if not schema.part:
        parts += [(f"  FOREIGN KEY ({name(column)}) {target}", "") for column, target in targets]
    lines = [f"{text}{',' * (i < len(parts))}{note}" for i, (text, note) in enumerate(parts, 1)]
    text = "\n".join([f"CREATE TABLE {name(table.name, table.schema)} (", *lines, ");"])
    if not table.rows:
        return text
    names = [" ".join(c.name.split()) for c in table.columns]
    lines = [f"-- first {len(table.rows)} rows, {' | '.join(names)}:", *(f"-- {' | '.join(r)}" for r in table.rows)]
    return "\n".join([text, *lines])


def identifier(name: str, dialect: str, schema: str = "") -> str:
    """Write a name as a query needs it, quoted only where it must be, with its schema if it has one."""
    plain = re.fullmatch(r"[A-Za-z_]\w*", name) and name.lower() not in _RESERVED
    folded = dialect == "postgresql" and name != name.lower()  # it would be read in lower case
    return (identifier(schema, dialect) + "." if schema else "") + (name if plain and not folded else quote(name))


# Words that one of the two dialects does not take as the name of a table or column without quotes.
_WORDS = """
    add all alter analyse analyze and any array as asc asymmetric authorization autoincrement between binary both
    case cast check collate collation column commit concurrently constraint create cross current_catalog
    current_date current_role current_schema current_time current_timestamp current_user default deferrable delete
    desc distinct do drop else end escape except exists false fetch for foreign freeze from full grant group having
    if ilike in index initially inner insert intersect into is isnull join lateral leading left like limit localtime
    localtimestamp natural not nothing notnull null offset on only or order outer overlaps placing primary raise
    references returning right select session_user set similar some symmetric system_user table tablesample then to
    trailing transaction true union unique update user using values variadic verbose when where window with
"""
_RESERVED = frozenset(_WORDS.split())


def mermaid_er(schema: Schema) -> str:
    """Draw the schema as a mermaid entity-relationship diagram."""
    lines = ["erDiagram"]
    for table in schema.tables:
        lines.append(f"    {_plain(table.label)} {{")
        keys = {key.column for key in table.foreign_keys}
        for c in table.columns:
            mark = ", ".join(["PK"] * c.primary_key + ["FK"] * (c.name in keys))
            lines.append(f"        {_plain(c.type or 'ANY')} {_plain(c.name)} {mark}".rstrip())
        lines.append("    }")
    for table in schema.tables:
        for key in table.foreign_keys:
            lines.append(f"    {_plain(table.label)} }}o--|| {_plain(key.ref_label)} : {_plain(key.column)}")
    return "\n".join(lines) + "\n"


def _plain(name: str) -> str:
    """Turn a name into one word for mermaid."""
    word = re.sub(r"\W+", "_", name).strip("_")
    return word if word[:1].isalpha() else f"_{word}"


def with_rows(schema: Schema, database: AnyDatabase, n: int) -> Schema:
    """Add the first `n` rows of each table to the schema, except for tables that cannot be read in time."""
    if n not in schema.with_rows:
        tables = []
        limits = replace(database.limits, seconds=min(ROW_SECONDS, database.limits.seconds))
        for table in schema.tables:
            result = database.execute(f"SELECT * FROM {quote(table.name, table.schema)} LIMIT {int(n)}", limits)
            cells = [tuple(_short(value) for value in row) for row in result.rows[:n]] if result.ok else []
            tables.append(replace(table, rows=tuple(cells)))
        schema.with_rows[n] = replace(schema, tables=tuple(tables))
    return schema.with_rows[n]


def _short(value: object) -> str:
    """Shorten a value of a sample row to one line of at most `CELL` characters."""
    if value is None:
        return "NULL"
    text = bytes(value[:CELL]).hex() if isinstance(value, (bytes, memoryview)) else str(value)[: 2 * CELL]
    return " ".join(text.split())[:CELL]


def sample_rows(database: Database, table: str, n: int = 3) -> list[tuple]:
    """Return the first `n` rows of a table.

    Raises:
        DatabaseError: the table does not exist.
    """
    result = database.execute(f"SELECT * FROM {quote(table)} LIMIT {int(n)}")
    if result.status != "ok":
        raise DatabaseError(f"Cannot read table {table} of {database.name}: {result.error}. Choose another table.")
    return result.rows
