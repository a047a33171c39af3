"""What a database looks like: introspection, prompt text with truncation, mermaid ER diagram, sample rows."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Column:
    """One column; `type` is the declared type in upper case ('' where none is declared)."""

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


@dataclass(frozen=True)
class Table:
    """One table or view, columns in declared order."""

    name: str
    columns: tuple[Column, ...]
    foreign_keys: tuple[ForeignKey, ...] = ()


@dataclass(frozen=True)
class Schema:
    """All tables of one database, in a stable order; `dialect` is ``sqlite`` or ``postgresql``."""

    tables: tuple[Table, ...]
    dialect: str = "sqlite"
    name: str = ""
    samples: dict[str, list[tuple]] = field(default_factory=dict, compare=False)
