"""The DuckDB half of `sqlbench.database.engine`: statements run in a few separate processes, which can be ended.

DuckDB reads with ``access_mode=read_only``, without external access (no other file, no network, no extension) and with
its configuration locked, and `sqlbench.database.duckdb_worker` runs one SELECT at most. DuckDB's memory limit does not
count every value, and an interrupt waits for the running function, so the kernel limits both: a process that takes
more than `MEMORY` fails, and one that is late by `GRACE` seconds ends. At most `PROCESSES` run at a time; a statement's
time begins when one of them takes it.

Parquet and CSV files are copied into a private DuckDB file first, each as a table, and again when they change.
"""

from __future__ import annotations

import marshal
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlbench.database.sqlite_file import remove_folder, side_stamp, stamp
from sqlbench.database.target import TABLES
from sqlbench.database.types import Column, ForeignKey, Limits, QueryResult, Table
from sqlbench.errors import DatabaseError

if TYPE_CHECKING:
    from sqlbench.database.engine import Database

PROCESSES = 4
MEMORY = 1 << 30
"""Bytes that a process may take; `ENGINE_MEMORY` is DuckDB's own limit."""
ENGINE_MEMORY = 512 << 20
GRACE = 0.5
_CATALOG = Limits(seconds=60.0, rows=1_000_000)


def identity(path: str) -> tuple:
    """Return a value that changes when the content may have changed: inode, size and mtime of all its files.

    Raises:
        DatabaseError: the file does not exist.
    """
    files = _tables_of(path)
    return (path, *map(stamp, files)) if files else (path, stamp(path), side_stamp(path + ".wal"))


def _tables_of(path: str) -> list[str]:
    """Return the files that are tables; none for a DuckDB file."""
    if os.path.isdir(path):
        return sorted(str(file) for file in Path(path).iterdir() if file.name.lower().endswith(TABLES))
    return [path] if path.lower().endswith(TABLES) else []


class DuckdbFile:
    """A DuckDB file, read `in_place`, or a private copy of files that are tables; `uri` is its path.

    Raises:
        DatabaseError: DuckDB is not installed, or a file cannot be read.
    """

    def __init__(self, path: str) -> None:
        if find_spec("duckdb") is None:
            raise DatabaseError(f"DuckDB is not installed, which reads {path}. Run: pip install 'sqlbench[duckdb]'.")
        self.identity = identity(path)
        tables = _tables_of(path)
        self.in_place = not tables
        if os.path.isdir(path) and not tables:
            raise DatabaseError(f"Cannot open database {path}: no Parquet or CSV file in this folder. Check the path.")
        self.uri = self._copy(tables) if tables else path
        DuckdbConnection(self).run("SELECT 1", _CATALOG, 0.0)

    def _copy(self, tables: list[str]) -> str:
        import duckdb

        folder = tempfile.mkdtemp(prefix="sqlbench-")
        self._remove = weakref.finalize(self, remove_folder, folder, os.getpid())
        copy = os.path.join(folder, "copy.duckdb")
        file = ""
        try:
            with duckdb.connect(copy, config={"temp_directory": folder}) as connection:
                for file in tables:
                    name = re.sub(r"\.\w+(\.gz)?$", "", Path(file).name)
                    reader = connection.read_parquet if file.lower().endswith(".parquet") else connection.read_csv
                    reader(file).create(name)
        except (duckdb.Error, OSError) as error:
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise DatabaseError(f"Cannot read {file}: {reason}. Check the file, and the space in TMPDIR.") from error
        return copy


class _Process:
    """A process that runs statements, one at a time (`sqlbench.database.duckdb_worker`)."""

    def __init__(self) -> None:
        self.running = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "sqlbench.database.duckdb_worker",
                str(ENGINE_MEMORY),
                str(MEMORY),
                str(GRACE),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TZ": "UTC"},
            start_new_session=True,  # so that Ctrl-C does not reach it
        )

    def ask(self, request: tuple) -> Any:
        """Send a request and return the answer, or the exit status if the process ended."""
        assert self.running.stdin and self.running.stdout
        try:
            marshal.dump(request, self.running.stdin)
            self.running.stdin.flush()
            size = int.from_bytes(self.running.stdout.read(8))
            return marshal.loads(self.running.stdout.read(size))
        except (OSError, EOFError):
            self.running.kill()
            return self.running.wait()


_idle: list[_Process] = []
_slots = threading.BoundedSemaphore(PROCESSES)
_inherited: list[_Process] = []


class DuckdbConnection:
    """A database as the engine's pool holds it; the processes are shared by all databases."""

    def __init__(self, file: DuckdbFile) -> None:
        self.file = file

    def interrupt(self) -> None:
        """Do nothing: the process ends its statement by itself."""

    def close(self) -> None:
        """Do nothing: the process may be in use, and closes databases that it has not needed for a while."""

    def run(self, sql: str, limits: Limits, deadline: float) -> QueryResult:
        """Run one statement."""
        request = (self.file.uri, repr(self.file.identity), sql, limits.seconds, limits.rows, limits.result_bytes)
        with _slots:
            try:
                process = _idle.pop()
            except IndexError:
                process = _Process()
            try:
                answer = process.ask(request)
            except BaseException:
                process.running.kill()
                raise
            if isinstance(answer, tuple) and not answer[-1]:
                _idle.append(process)
            else:  # it ended, or is full
                process.running.kill()
                process.running.wait()
        if answer == -signal.SIGALRM:
            return QueryResult("timeout", error=f"no result within {limits.seconds:g} s")
        if not isinstance(answer, tuple):
            return QueryResult("too_large", error=f"needs more than {MEMORY} bytes of memory")
        status, columns, rows, error, _ = answer
        if status == "lost":
            raise DatabaseError(f"Cannot open database {self.file.identity[0]}: {error}. Check the file.")
        return QueryResult(status, columns, rows, error)


def _after_fork() -> None:
    global _slots
    _inherited.extend(_idle)  # kept, since closing their pipes could write to them
    _idle.clear()
    _slots = threading.BoundedSemaphore(PROCESSES)


os.register_at_fork(after_in_child=_after_fork)

_COLUMNS = """SELECT CASE c.schema_name WHEN 'main' THEN '' ELSE c.schema_name END, c.table_name,
        v.view_oid IS NOT NULL,
        c.column_name, c.data_type, c.is_nullable,
        coalesce(list_contains(p.constraint_column_names, c.column_name), false)
    FROM duckdb_columns() c
    LEFT JOIN duckdb_views() v ON v.view_oid = c.table_oid AND v.database_oid = c.database_oid
    LEFT JOIN duckdb_constraints() p ON p.table_oid = c.table_oid AND p.constraint_type = 'PRIMARY KEY'
    WHERE c.database_name = current_database() AND NOT c.internal
    ORDER BY c.schema_name <> 'main', c.schema_name, 3, c.table_name, c.column_index"""
_KEYS = """SELECT CASE schema_name WHEN 'main' THEN '' ELSE schema_name END AS own, table_name,
        unnest(constraint_column_names), referenced_table, unnest(referenced_column_names), own
    FROM duckdb_constraints() WHERE constraint_type = 'FOREIGN KEY' ORDER BY ALL"""


def read_tables(database: Database) -> tuple[Table, ...]:
    """Read the tables and views; those outside the schema ``main`` carry theirs.

    Raises:
        DatabaseError: the catalogue cannot be read.
    """
    columns: dict[tuple[str, str, bool], list[Column]] = {}
    keys: dict[tuple[str, str], list[ForeignKey]] = {}
    for sql in (_COLUMNS, _KEYS):
        result = database.execute(sql, _CATALOG)
        if not result.ok:
            raise DatabaseError(f"Cannot read the schema of {database.target}: {result.error}. Check the file.")
        for schema, table, *fields in result.rows:
            if sql == _KEYS:
                keys.setdefault((schema, table), []).append(ForeignKey(*fields))
            else:
                columns.setdefault((schema, table, fields[0]), []).append(Column(*fields[1:]))
    return tuple(
        Table(name, tuple(parts), tuple(keys.get((schema, name), ())), schema, view)
        for (schema, name, view), parts in columns.items()
    )
