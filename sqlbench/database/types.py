"""Limits and result of a statement, how its rows are fetched within them, and the schema."""

from __future__ import annotations

import json
import marshal
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import Any

CHUNK_BYTES = 32 << 20
"""Largest amount of row data fetched between two checks of the size of the result."""
SQL_BYTES = 100_000
"""Longest statement that is run; a longer one is rejected."""
LONGEST_QUERY = 86_400.0
"""Largest time limit, in seconds."""
NO_STATEMENT = "there is no statement: the text is empty or only a comment"


@dataclass(frozen=True, slots=True)
class Limits:
    """Resources that one statement may use."""

    seconds: float = 5.0
    rows: int = 10_000
    result_bytes: int = 32 << 20
    """Serialised size of all rows together."""


@dataclass(slots=True)
class QueryResult:
    """Outcome of one statement."""

    status: str
    """``ok``; ``error`` (the database refused it); ``timeout``; ``too_large`` (rows, bytes or memory; `rows` then holds
    what came before the limit); ``rejected`` (not one read-only statement)."""
    columns: tuple[str, ...] = ()
    rows: list[tuple] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Tell whether the statement ran to its end."""
        return self.status == "ok"


def fetch(
    some: Callable[[int], list[tuple]],
    columns: tuple[str, ...],
    longest: int,
    limits: Limits,
    between: Callable[[], None] = lambda: None,
) -> QueryResult:
    """Fetch the rows of a statement until a limit.

    Args:
        some: fetches the next rows, at most as many as asked for.
        columns: names of the columns.
        longest: most bytes that are expected of a value; decides how many rows are fetched at a time.
        limits: limits of rows and bytes.
        between: called after each chunk.
    """
    step = max(1, min(1000, limits.rows + 1, CHUNK_BYTES // (max(1, len(columns)) * longest)))
    rows: list[tuple] = []
    size = 0
    while True:
        chunk = some(step)
        rows += chunk
        if len(rows) > limits.rows:
            return QueryResult("too_large", columns, rows[: limits.rows], f"more than {limits.rows:,} rows")
        if len(chunk) < step:
            return QueryResult("ok", columns, rows)
        size += len(marshal.dumps(chunk))
        if size > limits.result_bytes:
            error = f"more than {limits.result_bytes:,} bytes in the first {len(rows):,} rows"
            return QueryResult("too_large", columns, rows, error)
        between()


_PLAIN = (int, str, float, bytes, type(None))


def plain_rows(rows: list[tuple]) -> list[tuple]:
    """Convert values to those that SQLite has, which can be hashed, compared and written as JSON."""
    return [tuple([c if isinstance(c, _PLAIN) and c == c else _plain(c) for c in row]) for row in rows]


def _plain(cell: Any) -> Any:
    if isinstance(cell, Decimal):
        if not cell.is_finite():
            return str(cell)
        return int(cell) if cell == cell.to_integral_value() and abs(cell) < 2**63 else float(cell)
    if isinstance(cell, (list, tuple, dict)):
        try:
            return json.dumps(cell, default=str, sort_keys=True, ensure_ascii=False)
        except TypeError:  # a map whose keys are not texts
            return str(cell)
    return str(cell)


@dataclass(frozen=True)
class Column:
    """One column; `type` is the declared type, a built-in one in upper case ('' if none is declared)."""

    name: str
    type: str = ""
    nullable: bool = True
    primary_key: bool = False
    comment: str = ""
    """The database's comment on it, for schema linking."""
    values: tuple[str, ...] = ()
    """Its values that a question names, which its text shows."""


@dataclass(frozen=True)
class ForeignKey:
    """`column` of the owning table refers to `ref_table.ref_column`."""

    column: str
    ref_table: str
    ref_column: str
    ref_schema: str = ""
    """Schema of `ref_table`, as in `Table`."""

    @property
    def ref_label(self) -> str:
        """Return the label of the table that it refers to."""
        return label(self.ref_table, self.ref_schema)


@dataclass(frozen=True)
class Table:
    """One table or view, columns in declared order."""

    name: str
    columns: tuple[Column, ...]
    foreign_keys: tuple[ForeignKey, ...] = ()
    schema: str = ""
    """The schema that its name needs; empty if the search path finds it."""
    view: bool = field(default=False, compare=False)
    rows: tuple[tuple[str, ...], ...] = ()
    """Sample rows that its text shows, their cells as short texts of one line."""

    @property
    def label(self) -> str:
        """Return its name as a person writes it, with its schema if that is needed."""
        return label(self.name, self.schema)


def label(name: str, schema: str) -> str:
    """Join a name to its schema, unquoted."""
    return f"{schema}.{name}" if schema else name


@dataclass(frozen=True)
class Schema:
    """All tables of one database, in a stable order; `dialect` as in `sqlbench.interfaces.Database`."""

    tables: tuple[Table, ...]
    dialect: str = "sqlite"
    name: str = ""
    unreadable: tuple[str, ...] = ()
    """Tables and views that were left out because a part of them is missing here."""
    part: bool = False
    """True for the part of a larger schema that `sqlbench.database.linking` chose, which is written briefly."""

    @cached_property
    def texts(self) -> dict[tuple[str, int], str]:
        """Cache the texts of `sqlbench.database.schema.schema_text`."""
        return {}

    @cached_property
    def with_rows(self) -> dict[int, Schema]:
        """Cache the results of `sqlbench.database.schema.with_rows`, by number of rows."""
        return {}

    @cached_property
    def linkers(self) -> dict[bool, Any]:
        """Cache `sqlbench.database.linking.Linker`, by whether it knows the values."""
        return {}
