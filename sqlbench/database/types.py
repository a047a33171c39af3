"""What passes between the parts of a database: limits and result of a statement, and the schema."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

CHUNK_BYTES = 32 << 20
"""Largest amount of row data that is fetched between two looks at the size of the result."""
SQL_BYTES = 100_000
"""Longest statement that is looked at."""
LONGEST_QUERY = 86_400.0
"""Seconds; the most that a time limit can be."""
NO_STATEMENT = "there is no statement: the text is empty or only a comment"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one statement may use."""

    seconds: float = 5.0
    rows: int = 10_000
    result_bytes: int = 32 << 20
    """Serialised size of all rows together."""


@dataclass(slots=True)
class QueryResult:
    """What became of one statement."""

    status: str
    """``ok``; ``error`` (the database refused it); ``timeout``; ``too_large`` (rows, bytes or memory; `rows` then holds
    what came before the limit); ``rejected`` (not one read-only statement)."""
    columns: tuple[str, ...] = ()
    rows: list[tuple] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the statement ran to its end."""
        return self.status == "ok"


@dataclass(frozen=True)
class Column:
    """One column; `type` is the declared type, a built-in one in upper case ('' where none is declared)."""

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
        """The label of the table that it refers to."""
        return label(self.ref_table, self.ref_schema)


@dataclass(frozen=True)
class Table:
    """One table or view, columns in declared order."""

    name: str
    columns: tuple[Column, ...]
    foreign_keys: tuple[ForeignKey, ...] = ()
    schema: str = ""
    """The PostgreSQL schema that must stand before its name; empty where the search path finds it without."""
    rows: tuple[tuple[str, ...], ...] = ()
    """Sample rows that its text shows, their cells as short texts of one line."""

    @property
    def label(self) -> str:
        """Its name as a person writes it, with its schema where that is needed."""
        return label(self.name, self.schema)


def label(name: str, schema: str) -> str:
    """A name with its schema before it, unquoted."""
    return f"{schema}.{name}" if schema else name


@dataclass(frozen=True)
class Schema:
    """All tables of one database, in a stable order; `dialect` is ``sqlite`` or ``postgresql``."""

    tables: tuple[Table, ...]
    dialect: str = "sqlite"
    name: str = ""
    unreadable: tuple[str, ...] = ()
    """Tables and views that were left out: what they are made of is missing here."""

    @cached_property
    def texts(self) -> dict[tuple[str, int], str]:
        """What `sqlbench.database.schema.schema_text` made of it so far."""
        return {}

    @cached_property
    def with_rows(self) -> dict[int, Schema]:
        """What `sqlbench.database.schema.with_rows` made of it so far, by number of rows."""
        return {}
