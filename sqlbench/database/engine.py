"""One read-only statement on SQLite or PostgreSQL, inside limits of time, rows, bytes and memory.

Whatever text is executed, on SQLite: nothing is written (files are opened ``mode=ro``, an authorizer allows only
reading and plain functions), nothing outside the file is read (no ATTACH, PRAGMA, extension), the statement ends within
0.2 s of its deadline, SQLite's heap stays under `HEAP_BYTES` in the whole process and a result under
`Limits.result_bytes` plus one chunk of `CHUNK_BYTES`. On PostgreSQL the text runs as a cursor of a read-only
transaction with ``statement_timeout``, so only a single SELECT, VALUES or TABLE can run at all; a superuser login steps
down to ``pg_read_all_data``, and functions that could step up again or run SQL held in strings are refused (see
`sqlbench.database.postgres`), as are the tables of passwords.

Not covered: a database file that was itself made hostile (corrupt pages, virtual tables); a single full count or index
search over a file of many gigabytes; server memory of PostgreSQL, and one PostgreSQL value of up to 1 GB on its way to
the client; PostgreSQL extensions and server functions that were installed to run commands. A role that may only read
the tables meant for it is the real boundary there: ``CREATE ROLE reader LOGIN; GRANT SELECT ON ... TO reader``.
SQLite's heap limit belongs to the process: other users of sqlite3 in the process share it.
"""

from __future__ import annotations

import asyncio
import contextlib
import marshal
import os
import re
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sqlbench.database.types import CHUNK_BYTES, NO_STATEMENT, SQL_BYTES, Limits, QueryResult
from sqlbench.errors import DatabaseError

if TYPE_CHECKING:
    from sqlbench import interfaces
    from sqlbench.database.types import Schema

HEAP_BYTES = 64 << 20
"""Hard limit of SQLite's heap in this process."""
IDLE_CONNECTIONS = 2
"""Kept open for each database: one takes about 150 kB of the heap that all databases of the process share."""
LOOK_SECONDS = 0.01
"""How soon a replaced file is noticed: looking at it for every statement would cost a sixth of a small one."""


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
                    with contextlib.suppress(Exception):  # closed since: whatever it says, this thread has to go on
                        connection.interrupt()
            if not self.running:
                self.wake.clear()
                if self.running:  # added between the two lines above
                    self.wake.set()


_watchdog = _Watchdog()

_ALLOWED = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE})
_FORBIDDEN = frozenset({"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "sqlite_dbpage"})


def _authorize(action: int, first: str | None, second: str | None, schema: str | None, source: str | None) -> int:
    if action not in _ALLOWED or (action == sqlite3.SQLITE_FUNCTION and second in _FORBIDDEN):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


# One call of these functions costs up to the square of its arguments' lengths, and no call can be interrupted. Where a
# statement could also build long arguments for them, values are kept short and the program small.
_SQUARE = ("instr", "replace", "trim", "like", "glob", "json")
_BUILDERS = (
    "||", "replace", "printf", "format", "concat", "hex", "blob", "char", "json", "strftime", "quote", "string_agg",
)  # fmt: skip
_LIMITS = {
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: SQL_BYTES,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1000,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 500,
    sqlite3.SQLITE_LIMIT_COLUMN: 1000,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 200,
}
_LOOSE, _TIGHT = (256 << 10, 20_000), (8 << 10, 1_500)
"""(longest value in bytes, longest program in instructions)."""


def _is_tight(sql: str) -> bool:
    text = sql.lower()
    return any(name in text for name in _SQUARE) and (len(text) > 2000 or any(name in text for name in _BUILDERS))


def _lenient(raw: bytes) -> str:
    return raw.decode(errors="ignore")


_plain = threading.local()
_LARGE = re.compile(r"\s*[-+]?(\d{5}|[\d.]+e)", re.IGNORECASE)


def _printf(*arguments: Any) -> Any:
    """SQLite's own printf, for widths that end: it counts up to a width of 1e9 without looking at any limit."""
    texts = [a.decode(errors="ignore") if isinstance(a, bytes) else str(a) for a in arguments]
    if texts and (re.search(r"\d{5}", texts[0]) or ("*" in texts[0] and any(map(_LARGE.match, texts[1:])))):
        raise ValueError("width or precision of more than 9999")
    if not hasattr(_plain, "connection"):
        _plain.connection = sqlite3.connect(":memory:")
    return _plain.connection.execute(f"SELECT printf({','.join('?' * len(arguments))})", arguments).fetchone()[0]


class _SqliteConnection:
    def __init__(self, path: str) -> None:
        if path == ":memory:":
            uri = "file::memory:"
        else:
            # An immutable file is read without locks and never grows a -shm beside it; a file in use by a writer
            # (it has a -wal or -journal) has to be read the ordinary way.
            busy = os.path.exists(path + "-wal") or os.path.exists(path + "-journal")
            uri = Path(path).absolute().as_uri() + ("?mode=ro" if busy else "?mode=ro&immutable=1")
        # A kept statement takes about 10 kB of the heap that all connections share, so few are kept.
        self.raw = raw = sqlite3.connect(
            uri, uri=True, isolation_level=None, check_same_thread=False, timeout=1.0, cached_statements=16
        )
        for pragma in (
            f"hard_heap_limit={HEAP_BYTES}",
            "temp_store=memory",
            "query_only=on",
            "trusted_schema=off",
            "cache_size=-1024",
            "mmap_size=0",  # a file that is cut while it is mapped ends the process (SIGBUS)
        ):
            raw.execute(f"PRAGMA {pragma}").fetchall()
        raw.execute("SELECT count(*) FROM sqlite_master").fetchall()
        with contextlib.suppress(sqlite3.OperationalError):  # made now, since making them later asks for CREATE TABLE
            raw.execute("SELECT 1 FROM json_each('[]'), json_tree('[]')").fetchall()
        for limit, value in _LIMITS.items():
            raw.setlimit(limit, value)
        self.bounds = (0, 0)
        for name in ("printf", "format"):
            raw.create_function(name, -1, _printf, deterministic=True)
        raw.set_authorizer(_authorize)

    def interrupt(self) -> None:
        self.raw.interrupt()

    def close(self) -> None:
        self.raw.close()

    def run(self, sql: str, limits: Limits, deadline: float) -> QueryResult:
        bounds = _TIGHT if _is_tight(sql) else _LOOSE
        if bounds is not self.bounds:
            self.raw.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, bounds[0])
            self.raw.setlimit(sqlite3.SQLITE_LIMIT_VDBE_OP, bounds[1])
            self.bounds = bounds
        while True:
            try:
                return self._fetch(sql, limits)
            except (sqlite3.Error, ValueError) as error:
                message = str(error)
                if message.startswith("Could not decode to UTF-8"):
                    try:
                        self.raw.text_factory = _lenient
                        return self.run(sql, limits, deadline)
                    finally:
                        self.raw.text_factory = str
                if message == "interrupted":
                    if time.perf_counter() < deadline:  # it was meant for the statement before this one
                        continue
                    return QueryResult("timeout", error=f"no result within {limits.seconds:g} s")
                if message == "string or blob too big":
                    return QueryResult("too_large", error=f"a value of more than {bounds[0]} bytes")
                if message == "query string is too large":
                    return QueryResult("rejected", error=f"statement of more than {SQL_BYTES} bytes")
                plain = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.ProgrammingError)
                refused = "authoriz" in message or "prohibited" in message or "readonly" in message
                return QueryResult("error" if plain and not refused else "rejected", error=message)

    def _fetch(self, sql: str, limits: Limits) -> QueryResult:
        cursor = self.raw.execute(sql)
        try:
            description = cursor.description
            if description is None:
                return QueryResult("rejected", error=NO_STATEMENT)
            columns = tuple([d[0] for d in description])
            step = max(1, min(1000, limits.rows + 1, CHUNK_BYTES // (len(columns) * self.bounds[0])))
            rows: list[tuple] = []
            size = 0
            while True:
                chunk = cursor.fetchmany(step)
                rows += chunk
                if len(rows) > limits.rows:
                    error = f"more than {limits.rows:,} rows"
                    return QueryResult("too_large", columns, rows[: limits.rows], error)
                if len(chunk) < step:
                    return QueryResult("ok", columns, rows)
                size += len(marshal.dumps(chunk))
                if size > limits.result_bytes:
                    error = f"more than {limits.result_bytes:,} bytes in the first {len(rows):,} rows"
                    return QueryResult("too_large", columns, rows, error)
        finally:
            cursor.close()


class Database:
    """A database opened for reading: thread-safe, with a pool of connections. Make one with `open_database`."""

    def __init__(self, target: str, limits: Limits) -> None:
        self.target = target
        self.limits = limits
        self.dialect = "postgresql" if is_postgres(target) else "sqlite"
        self.name = Path(target).stem
        if self.dialect == "postgresql":
            from sqlbench.database.postgres import database_name

            self.name = database_name(target)
        self._is_file = self.dialect == "sqlite" and target != ":memory:"
        self._idle: list[Connection] = []
        self._born = object()
        self._seen, self._looked = self.identity(), time.monotonic()
        self._idle.append(self._connect())

    def identity(self) -> tuple:
        """A value that changes when the content may have: inode, size and time of change of a file and of its -wal.

        PostgreSQL has none, so its results are good for as long as this object lives.
        """
        if not self._is_file:
            return (self.target, self._born)
        try:
            stamp = _stamp(self.target)
        except OSError as error:
            raise DatabaseError(f"cannot open database {self.target}: {error.strerror}") from error
        try:
            log = _stamp(self.target + "-wal")
        except OSError:
            log = None
        return (self.target, stamp, log)

    def schema(self) -> Schema:
        """Describe the tables; read once for each content of the database."""
        from sqlbench.database.schema import introspect

        return introspect(self)

    def _connect(self) -> Connection:
        try:
            if self.dialect == "postgresql":
                from sqlbench.database.postgres import PostgresConnection

                return PostgresConnection(self.target)
            return _SqliteConnection(self.target)
        except sqlite3.Error as error:
            raise DatabaseError(f"cannot open database {self.target}: {error}; is it a SQLite file?") from error

    def execute(self, sql: str, limits: Limits | None = None) -> QueryResult:
        """Run one statement and wait for it. A failing statement is a `QueryResult`, never an exception.

        Raises:
            DatabaseError: the database itself is gone.
        """
        self.refresh()
        return self.execute_as_seen(sql, limits or self.limits)

    def refresh(self) -> tuple:
        """Look whether the file was replaced, let go of what was open of it then, and return its identity."""
        now = time.monotonic()
        if self._is_file and now > self._looked + LOOK_SECONDS:
            self._looked = now
            identity = self.identity()
            if identity != self._seen:
                self.close()
                self._seen = identity
        return self._seen

    def execute_as_seen(self, sql: str, limits: Limits) -> QueryResult:
        """Like `execute`, on the file as `refresh` last saw it."""
        start = time.perf_counter()
        deadline = start + limits.seconds
        while True:
            tried = time.perf_counter()
            try:
                result = self._run(sql, limits, deadline)
                break
            except MemoryError:
                # The heap is the process's: a statement that fails soon may be the victim of another that is about to
                # fail itself, and gets a few more tries. One that has run for a while is what used the memory up.
                now = time.perf_counter()
                if now - tried > 0.05 or now - start > 0.15 or now + 0.1 > deadline:
                    error = f"needs more than {HEAP_BYTES} bytes of memory or {_LOOSE[1]} instructions"
                    result = QueryResult("too_large", error=error)
                    break
                time.sleep(0.03)
        if result.status == "error" and self._is_file and self.identity()[:2] != self._seen[:2]:
            raise DatabaseError(f"database {self.target} was changed while it was read: {result.error}")
        result.seconds = time.perf_counter() - start
        return result

    def _run(self, sql: str, limits: Limits, deadline: float) -> QueryResult:
        idle, kept = self._idle, True
        try:
            connection = idle.pop()
        except IndexError:
            connection, kept = self._connect(), False
        _watchdog.watch(connection, deadline)
        try:
            result = connection.run(sql, limits, deadline)
        except BaseException as error:
            _watchdog.forget(connection)
            connection.close()
            if kept and isinstance(error, DatabaseError) and time.perf_counter() < deadline:
                self.close()  # it was lost while nothing ran, and the others with it
                return self._run(sql, limits, deadline)
            raise
        _watchdog.forget(connection)
        if idle is self._idle and len(idle) < IDLE_CONNECTIONS:
            idle.append(connection)
        else:  # enough are kept, or the file was replaced since
            connection.close()
        return result

    async def aexecute(self, sql: str) -> QueryResult:
        """Like `execute`, in a worker thread: the event loop and other statements go on."""
        return await in_thread(self.execute, sql)

    def close(self) -> None:
        """Close the idle connections; the object can still be used and opens new ones."""
        idle, self._idle = self._idle, []
        while idle:
            idle.pop().close()


def _stamp(path: str) -> tuple[int, int, int]:
    stat = os.stat(path)
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns)


def is_postgres(target: str) -> bool:
    """Whether a database target is a PostgreSQL address."""
    return target.startswith(("postgresql://", "postgres://"))


def open_database(target: str | Path, limits: Limits | None = None) -> Database:
    """Open a SQLite file, ``:memory:`` or a ``postgresql://`` address for reading.

    Raises:
        DatabaseError: it does not exist, is no database, or cannot be reached.
    """
    return Database(str(target), limits or Limits())


_open: dict[str, Database] = {}
_open_lock = threading.Lock()


def cached_database(path: str | Path | interfaces.Database) -> interfaces.Database:
    """The database of this path from the pool of this process, opened on first use; a database object is returned."""
    if not isinstance(path, str | Path):
        return path
    key = str(path)
    database = _open.get(key)
    if database is None:
        with _open_lock:
            database = _open.get(key) or _open.setdefault(key, open_database(key))
    return database


_threads: ThreadPoolExecutor | None = None


async def in_thread(function: Any, *arguments: Any) -> Any:
    """Run a blocking function on the database threads: enough of them that slow statements do not stop the others."""
    global _threads
    if _threads is None:
        _threads = ThreadPoolExecutor(64, thread_name_prefix="sqlbench-db")
    return await asyncio.get_running_loop().run_in_executor(_threads, function, *arguments)


def _after_fork() -> None:
    """A forked child has no threads, and SQLite connections must not be carried over."""
    global _watchdog, _threads, _open_lock
    _watchdog, _threads, _open_lock = _Watchdog(), None, threading.Lock()
    _inherited.extend(c for d in _open.values() for c in d._idle)  # kept alive: closing them would touch shared locks
    for database in _open.values():
        database._idle = []


_inherited: list[Connection] = []
os.register_at_fork(after_in_child=_after_fork)
