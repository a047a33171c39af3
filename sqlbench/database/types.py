"""Data types of the database package: limits and result of a statement, and the schema."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

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


@dataclass(frozen=True)
class Column:
    """One column; `type` is the declared type, a built-in one in upper case ('' if none is declared)."""

    name: str
    type: str = ""
    nullable: bool = True
    primary_key: bool = False


@dataclass(frozen=True)
class ForeignKey:
    """`column` of the owning table refers to `ref_table.ref_column`."""

    column: str
    ref_table: str
    ref_column: str
    ref_schema: str = ""
    """As in `Table`."""

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
    """The PostgreSQL schema that its name needs; empty if the search path finds it."""
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
    """All tables of one database, in a stable order; `dialect` is ``sqlite`` or ``postgresql``."""

    tables: tuple[Table, ...]
    dialect: str = "sqlite"
    name: str = ""
    unreadable: tuple[str, ...] = ()
    """Tables and views that were left out because a part of them is missing here."""

    @cached_property
    def texts(self) -> dict[tuple[str, int], str]:
        """Cache the texts of `sqlbench.database.schema.schema_text`."""
        return {}

    @cached_property
    def with_rows(self) -> dict[int, Schema]:
        """Cache the results of `sqlbench.database.schema.with_rows`, by number of rows."""
        return {}
