"""Resolution of a database's name: to a file, a folder of files, or a server."""

from __future__ import annotations

import re
from pathlib import Path

from sqlbench.errors import DatabaseError

TARGETS = (
    "the path of a SQLite or DuckDB file, of a Parquet or CSV file or a folder of them, :memory:, "
    "postgresql://user@host:port/name, or module:attribute of your own (sqlbench.interfaces.Database)"
)
TABLES = (".parquet", ".csv", ".tsv", ".csv.gz", ".tsv.gz")
"""Endings of files that are one table each."""


def resolve(target: str) -> tuple[str, str]:
    """Return the dialect of a database, and its path or address.

    Raises:
        DatabaseError: it is of a kind that is not supported.
    """
    if is_postgres(target):
        return "postgresql", target
    kind = re.match(r"(sqlite|duckdb)\b[^:/]*:", target, re.IGNORECASE)
    other = re.match(r"(\w+(?:\+\w+)?):/", target)
    if other and not kind:
        raise DatabaseError(f"Unsupported kind of database: {other[1]}. Give {TARGETS}.")
    path = _path(target, kind[1].lower()) if kind else target
    return ("duckdb" if _is_duckdb(path) else "sqlite"), path


def is_postgres(target: str) -> bool:
    """Tell whether a database target is a PostgreSQL address."""
    return target.startswith(("postgresql://", "postgres://"))


def _path(target: str, kind: str) -> str:
    """Return the path in an address such as ``sqlite:///shop.db`` or ``sqlite:////data/shop.db``."""
    scheme, _, location = target.partition(":")
    if target in ("sqlite://", "sqlite:///:memory:"):
        return ":memory:"
    if scheme != kind or not location.startswith("///") or not location.strip("/"):
        raise DatabaseError(
            f"Not the address of a {'SQLite' if kind == 'sqlite' else 'DuckDB'} file: {target}. "
            f"Write {kind}:///shop.db, or {kind}:////data/shop.db for the file /data/shop.db."
        )
    return location[3:]


def _is_duckdb(path: str) -> bool:
    if Path(path).is_dir() or path.lower().endswith((".duckdb", *TABLES)):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(12)[8:] == b"DUCK"
    except OSError:
        return False


def without_password(text: str) -> str:
    """Remove the password from an address, or from a message that holds one."""
    return re.sub(r"(password\s*=\s*)('[^']*'|[^&\s]*)", r"\1***", PASSWORD.sub(r"\1@", text))


PASSWORD = re.compile(r"(://[^:/@\s]*):(.*)@", re.DOTALL)
