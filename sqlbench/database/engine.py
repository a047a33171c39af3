"""One read-only statement on SQLite, PostgreSQL or DuckDB, inside limits of time, rows, bytes and memory.

For any text that is executed on SQLite: nothing is written (files are opened ``mode=ro``, an authorizer allows only
reading and plain functions), no file appears beside the database (`sqlbench.database.sqlite_file`), nothing outside it
is read (no ATTACH, PRAGMA, extension), the statement ends within half a second of its deadline
(`sqlbench.database.sqlite`), SQLite's heap stays under `HEAP_BYTES` in the whole process and a result under
`Limits.result_bytes` plus one chunk of `CHUNK_BYTES`. On PostgreSQL the text runs as a cursor of a read-only
transaction with ``statement_timeout``, so only a single SELECT, VALUES or TABLE can run at all; a superuser login steps
down to ``pg_read_all_data``, and functions that could step up again or run SQL held in strings are refused (see
`sqlbench.database.postgres`), as are the tables of passwords. DuckDB runs in processes of its own, which the kernel
ends where DuckDB's limits do not reach (`sqlbench.database.duckdb`).

Not covered: a database file that is itself hostile (corrupt pages); FTS5's snippet(), whose time grows with the
square of the hits in one document; a single full count or index search over a file of many gigabytes; server memory of
PostgreSQL, and one PostgreSQL value of up to 1 GB on its way to the client; PostgreSQL extensions and server functions
that were installed to run commands. A role that may only read the tables meant for it is the real boundary there:
``CREATE ROLE reader LOGIN; GRANT SELECT ON ... TO reader``. SQLite's heap limit belongs to the process: other users of
sqlite3 in the process share it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sqlbench.database.sqlite import HEAP_BYTES, PROGRAM_STEPS, SqliteConnection
from sqlbench.database.sqlite_file import Snapshot, identity, stamp
from sqlbench.database.target import resolve, without_password
from sqlbench.database.types import Limits, QueryResult, Schema
from sqlbench.errors import DatabaseError

if TYPE_CHECKING:
    from sqlbench import interfaces
    from sqlbench.database.duckdb import DuckdbFile

IDLE_CONNECTIONS = 2
"""Idle connections kept per database: one takes about 150 kB of the heap that all databases of the process share."""
LOOK_SECONDS = 0.01
"""Minimum interval between checks for a changed file; a check per statement would cost 17% of a short query."""


class Connection(Protocol):
    """One pooled connection; used by one thread at a time, interrupted from another."""

    def run(self, sql: str, limits: Limits, deadline: float) -> QueryResult: ...  # noqa: D102

    def interrupt(self) -> None: ...  # noqa: D102

    def close(self) -> None: ...  # noqa: D102


class _Watchdog:
    """Interrupts connections that are past their deadline, every 10 ms until they stop.

    One thread for the process, asleep while nothing runs. A progress handler would need the interpreter lock in the
    middle of every long statement; this needs it only when there is something to stop.
    """

    def __init__(self) -> None:
        self.running: dict[Any, float] = {}
        self.wake = threading.Event()
        self.thread: threading.Thread | None = None
        self.lock = threading.Lock()

    def watch(self, connection: Any, deadline: float) -> None:
        self.running[connection] = deadline
        if self.thread is None:
            self._start()
        if not self.wake.is_set():
            self.wake.set()

    def forget(self, connection: Any) -> None:
        del self.running[connection]

    def _start(self) -> None:
        with self.lock:
            if self.thread is None:
                self.thread = threading.Thread(target=self._loop, name="sqlbench-deadlines", daemon=True)
                self.thread.start()

    def _loop(self) -> None:
        while True:
            self.wake.wait()
            time.sleep(0.01)
            now = time.perf_counter()
            for connection, deadline in self.running.copy().items():
                if now > deadline:
                    with contextlib.suppress(Exception):  # closed meanwhile; this thread must continue in any case
                        connection.interrupt()
            if not self.running:
                self.wake.clear()
                if self.running:  # added between the two lines above
                    self.wake.set()


_watchdog = _Watchdog()


class Database:
    """A database opened for reading: thread-safe, with a pool of connections. Make one with `open_database`."""

    def __init__(self, target: str, limits: Limits) -> None:
        self.dialect, self.address = resolve(target)
        self.target = without_password(self.address)
        """Address without its password."""
        self.limits = limits
        self.name = Path(self.address).stem
        if self.dialect == "postgresql":
            from sqlbench.database.postgres import database_name

            self.name = database_name(self.address)
        self._is_file = self.dialect != "postgresql" and self.address != ":memory:"
        self.described: tuple[tuple, Schema] | None = None
        """Identity of the content, and its schema as `sqlbench.database.schema.introspect` read it."""
        self._idle: list[Connection] = []
        self._born = object()
        self._lock = threading.Lock()
        self._file = self._read_file() if self._is_file else None
        self._seen, self._looked = self._file.identity if self._file else self.identity(), time.monotonic()
        self._idle.append(self._connect())
        _all[id(self)] = self

    def identity(self) -> tuple:
        """Return a value that changes when the content may have changed: inode, size and mtime of all its files.

        PostgreSQL has no such value, so its results count as valid for as long as this object lives.
        """
        if not self._is_file:
            return (self.target, self._born)
        if self.dialect == "duckdb":
            from sqlbench.database import duckdb

            return duckdb.identity(self.address)
        return identity(self.address)

    def uri(self) -> str:
        """Return the URI with which sqlite3 opens the file as it was last seen."""
        return self._file.uri if self._file else "file::memory:"

    def _read_file(self) -> Snapshot | DuckdbFile:
        if self.dialect == "duckdb":
            from sqlbench.database.duckdb import DuckdbFile

            return DuckdbFile(self.address)
        try:
            return Snapshot(self.address)
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> DatabaseError:
        return DatabaseError(f"Cannot open database {self.target}: {error}. Check that it is a SQLite file.")

    def schema(self) -> Schema:
        """Describe the tables; read once for each content of the database."""
        from sqlbench.database.schema import introspect

        return introspect(self)

    def _connect(self) -> Connection:
        try:
            if self.dialect == "postgresql":
                from sqlbench.database.postgres import PostgresConnection

                return PostgresConnection(self.address)
            if self.dialect == "duckdb":
                from sqlbench.database.duckdb import DuckdbConnection

                return DuckdbConnection(self._file)  # type: ignore[arg-type]
            try:
                return SqliteConnection(self.uri())
            except MemoryError:
                close_idle()
                return SqliteConnection(self.uri())
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def execute(self, sql: str, limits: Limits | None = None) -> QueryResult:
        """Run one statement and wait for it. A failing statement is a `QueryResult`, never an exception.

        Raises:
            DatabaseError: the database itself is gone.
        """
        self.refresh()
        return self.execute_unchecked(sql, limits or self.limits)

    def refresh(self) -> tuple:
        """Check whether the file was replaced, close the connections to the old one, and return its identity."""
        now = time.monotonic()
        if self._is_file and now > self._looked + LOOK_SECONDS:
            self.look()
        return self._seen

    def look(self) -> tuple:
        """Check as `refresh` does, however recent the last check is."""
        self._looked = time.monotonic()
        if self.identity() != self._seen:
            with self._lock:
                if self.identity() != self._seen:
                    self._file = self._read_file()
                    self._seen = self._file.identity
                    self.close()
        return self._seen

    def execute_unchecked(self, sql: str, limits: Limits) -> QueryResult:
        """Run a statement as `execute` does, on the file as `refresh` last saw it."""
        file = self._file
        start = time.perf_counter()
        deadline = start + limits.seconds
        while True:
            tried = time.perf_counter()
            try:
                result = self._run(sql, limits, deadline)
                break
            except MemoryError:
                # All statements of the process share the heap: one that fails soon may be the victim of another that
                # is about to fail, or of idle connections, and gets a few more tries. One that has run for a while has
                # used up the memory itself.
                now = time.perf_counter()
                if now - tried > 0.05 or now - start > 0.15 or now + 0.1 > deadline:
                    error = f"needs more than {HEAP_BYTES} bytes of memory or {PROGRAM_STEPS} instructions"
                    result = QueryResult("too_large", error=error)
                    break
                close_idle()
                time.sleep(0.03)
        result.seconds = time.perf_counter() - start
        if file and file.in_place:
            current = stamp(self.address)
            seen = file.identity[1]
            same_file = current[0] == seen[0]  # otherwise the replaced file was read completely
            if current != seen and (same_file or result.status == "error"):
                reason = f" ({result.error})" if result.error else ""
                raise DatabaseError(f"Database changed while it was read: {self.target}{reason}. Run the query again.")
        return result

    def _run(self, sql: str, limits: Limits, deadline: float) -> QueryResult:
        idle, pooled = self._idle, True
        try:
            connection = idle.pop()
        except IndexError:
            connection, pooled = self._connect(), False
        _watchdog.watch(connection, deadline)
        try:
            result = connection.run(sql, limits, deadline)
        except BaseException as error:
            _watchdog.forget(connection)
            connection.close()
            if pooled and isinstance(error, DatabaseError) and time.perf_counter() < deadline:
                self.close()  # it was lost while nothing ran, and the others with it
                return self._run(sql, limits, deadline)
            raise
        _watchdog.forget(connection)
        if idle is self._idle and len(idle) < IDLE_CONNECTIONS:
            idle.append(connection)
        else:  # enough are kept, or the file has been replaced
            connection.close()
        return result

    async def aexecute(self, sql: str) -> QueryResult:
        """Run a statement as `execute` does, in a worker thread, so that the event loop is not blocked."""
        return await in_thread(self.execute, sql)

    def close(self) -> None:
        """Close the idle connections; the object can still be used and opens new ones."""
        idle, self._idle = self._idle, []
        with contextlib.suppress(IndexError):  # another thread may take the last one
            while True:
                idle.pop().close()


_all: weakref.WeakValueDictionary[int, Database] = weakref.WeakValueDictionary()


def _living() -> list[Database]:
    """List the databases of the process, safely while other threads open some, unlike a plain iteration."""
    return [database for reference in _all.valuerefs() if (database := reference()) is not None]


def close_idle() -> None:
    """Close the idle connections of all SQLite databases of the process, which share one limited heap."""
    for database in _living():
        if database.dialect == "sqlite":
            database.close()


def open_database(target: str | Path, limits: Limits | None = None) -> Database:
    """Open a database for reading: a file, a folder of Parquet or CSV files, ``:memory:``, or a PostgreSQL address.

    Raises:
        DatabaseError: it does not exist, is not a database, or cannot be reached.
    """
    return Database(str(target), limits or Limits())


_open: dict[tuple[str, Limits], interfaces.Database] = {}
_open_lock = threading.Lock()
_LIMITS = Limits()


def cached_database(path: str | Path | interfaces.Database, limits: Limits = _LIMITS) -> interfaces.Database:
    """Return the database of a name from the pool of this process, opened on first use; pass objects through."""
    if not isinstance(path, str | Path):
        return path
    key = (str(path), limits)
    database = _open.get(key)
    if database is None:
        with _open_lock:
            database = _open.get(key) or _open.setdefault(key, _opened(*key))
    return database


def _opened(target: str, limits: Limits) -> interfaces.Database:
    from sqlbench.interfaces import is_plugin, load_plugin

    return load_plugin("database", target) if is_plugin(target) else open_database(target, limits)


_threads: ThreadPoolExecutor | None = None


async def in_thread(function: Any, *arguments: Any) -> Any:
    """Run a blocking function on the database thread pool (64 threads, so slow queries do not block fast ones)."""
    global _threads
    if _threads is None:
        _threads = ThreadPoolExecutor(64, thread_name_prefix="sqlbench-db")
    return await asyncio.get_running_loop().run_in_executor(_threads, function, *arguments)


def _after_fork() -> None:
    """Reset a forked child, which has no threads and must not reuse SQLite connections."""
    global _watchdog, _threads, _open_lock
    _watchdog, _threads, _open_lock = _Watchdog(), None, threading.Lock()
    databases = _living()
    _inherited.extend(c for d in databases for c in d._idle)  # kept alive: closing them would touch shared locks
    for database in databases:
        database._idle, database._lock = [], threading.Lock()


_inherited: list[Connection] = []
os.register_at_fork(after_in_child=_after_fork)
