"""The SQLite half of `sqlbench.database.engine`: one read-only statement inside limits that SQLite itself enforces.

An authorizer allows reading and plain functions only. SQLite can be interrupted between the steps of a loop but not
inside one call, nor between two calls in a row, so the cost of those is bounded before a statement runs: the longest
value times the work per byte stays under `STEP_BUDGET`. Most statements run at once under `_SMALL`, where that always
holds. One that calls a costly function or meets a longer value is weighed first: SQLite's own EXPLAIN lists
every call, and the lengths that these calls allow become the limits.
"""

from __future__ import annotations

import re
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from sqlbench.database.types import CHUNK_BYTES, NO_STATEMENT, SQL_BYTES, Limits, QueryResult, fetch

HEAP_BYTES = 64 << 20
"""Hard limit of SQLite's heap in this process."""
VALUE_BYTES = 1 << 20
"""Longest value, if a statement does little work on it."""
PROGRAM_STEPS = 20_000
"""Longest program, in SQLite's instructions."""
STEP_BUDGET = 400_000_000
"""Nanoseconds that an uninterruptible part may take on a common processor."""

_LIMITS = {
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: SQL_BYTES,
    sqlite3.SQLITE_LIMIT_VDBE_OP: PROGRAM_STEPS,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 500,
    sqlite3.SQLITE_LIMIT_COLUMN: 1000,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 200,
}


@dataclass(frozen=True, slots=True)
class _Bounds:
    value: int
    """Longest value in bytes."""
    pattern: int = 5000
    """Longest pattern of LIKE and GLOB in bytes."""


_SMALL = _Bounds(8 << 10)
_WEIGHING = _Bounds(VALUE_BYTES)

_READING = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE})
_DATA_VERSION = (sqlite3.SQLITE_PRAGMA, "data_version", None)
"""Read of a number that FTS5 needs before a search."""
_FORBIDDEN = frozenset({"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"})

# Nanoseconds that one call may take per byte of the longest value. Those of _NATIVE grow with its length and hold for
# the length of _SMALL; that of json_patch holds for _PATCH_BYTES.
_CALL, _JSON, _PATTERN = 8, 25, 3
_COST = {"strftime": 60, "printf": 60, "format": 60, "json_patch": 1600, "jsonb_patch": 1600}
_NATIVE = {"instr": 30, "replace": 30, "trim": 60_000, "ltrim": 60_000, "rtrim": 60_000}
_LINEAR = {"instr": 20, "replace": 40, "trim": 100, "ltrim": 100, "rtrim": 100}
"""The same for their replacements in `_FUNCTIONS`, on a connection that met long values."""
_PATCH_BYTES = 16 << 10
_PATTERNS = frozenset({"like", "glob"})
_COSTLY = frozenset({*_COST, *_NATIVE, *_PATTERNS})
_CALLS = frozenset({"Function", "PureFunc", "AggStep", "AggStep1", "AggInverse", "AggValue", "AggFinal"})


class _Authorizer:
    """Allows what only reads. In a statement that was not weighed, costly functions are refused and noted."""

    __slots__ = ("costly", "weighed")

    def __init__(self) -> None:
        self.weighed = self.costly = False

    def decide(self, action: int, first: str | None, second: str | None, schema: str | None, source: str | None) -> int:
        if action in _READING:
            return sqlite3.SQLITE_OK
        if action != sqlite3.SQLITE_FUNCTION or second is None or second in _FORBIDDEN:
            return sqlite3.SQLITE_OK if (action, first, second) == _DATA_VERSION else sqlite3.SQLITE_DENY
        if not self.weighed and (second in _COSTLY or second.startswith(_JSON_NAMES)):
            self.costly = True
            return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK


_JSON_NAMES = ("json", "->")


def _cost(call: str, known: dict[str, int]) -> int:
    """Return the cost per byte of a call, written as EXPLAIN does: ``trim(2)``."""
    name, _, arity = call.partition("(")
    if name in _NATIVE and arity == "1)":
        return _CALL
    return known.get(name, _JSON if name.startswith(_JSON_NAMES) else _CALL)


class SqliteConnection:
    """One connection, as the engine requires it (`sqlbench.database.engine.Connection`)."""

    def __init__(self, uri: str) -> None:
        # Statements are not cached: the authorizer does not see a cached one when it runs again.
        self.raw = raw = sqlite3.connect(
            uri, uri=True, isolation_level=None, check_same_thread=False, timeout=1.0, cached_statements=0
        )
        for pragma in (
            f"hard_heap_limit={HEAP_BYTES}",
            "temp_store=memory",
            "query_only=on",
            "trusted_schema=on",  # views and generated columns may call printf; the authorizer looks into both
            "cache_size=-1024",
            "mmap_size=0",  # a file that is cut while it is mapped ends the process (SIGBUS)
        ):
            raw.execute(f"PRAGMA {pragma}").fetchall()
        virtual = """SELECT printf('"%w"', name) FROM sqlite_master WHERE type = 'table' AND rootpage = 0"""
        for table in ("json_each", "json_tree", *[name for (name,) in raw.execute(virtual).fetchall()]):
            with suppress(sqlite3.OperationalError):  # opened now, since opening them later asks for CREATE TABLE
                raw.execute(f"SELECT 1 FROM {table} LIMIT 0").fetchall()
        for limit, value in _LIMITS.items():
            raw.setlimit(limit, value)
        self.bounds: _Bounds | None = None
        self.holds_long = False
        for name in ("printf", "format"):
            raw.create_function(name, -1, _printf, deterministic=True)
        self.authorizer = _Authorizer()
        raw.set_authorizer(self.authorizer.decide)

    def interrupt(self) -> None:
        """Stop the running statement."""
        self.raw.interrupt()

    def close(self) -> None:
        """Close the connection."""
        self.raw.close()

    def run(self, sql: str, limits: Limits, deadline: float) -> QueryResult:
        """Run one statement."""
        authorizer, weigh = self.authorizer, self.holds_long
        while True:
            authorizer.weighed, authorizer.costly = weigh, False
            try:
                self._allow(self._weigh(sql) if weigh else _SMALL)
                return self._fetch(sql, limits)
            except (sqlite3.Error, ValueError) as error:
                message = str(error)
                if authorizer.costly:
                    weigh = True
                elif message == "interrupted":
                    if time.perf_counter() >= deadline:
                        return QueryResult("timeout", error=f"no result within {limits.seconds:g} s")
                elif message.startswith("string or blob too big") and not (weigh and self.holds_long):
                    self._expect_long_values()
                    weigh = True
                elif message.startswith("Could not decode to UTF-8"):
                    try:
                        self.raw.text_factory = _lenient
                        return self.run(sql, limits, deadline)
                    finally:
                        self.raw.text_factory = str
                else:
                    return self._failure(error, message)

    def _failure(self, error: Exception, message: str) -> QueryResult:
        bounds = self.bounds or _SMALL
        if message.startswith("string or blob too big"):
            return QueryResult("too_large", error=f"a value of more than {bounds.value} bytes")
        if message == "LIKE or GLOB pattern too complex":
            return QueryResult("too_large", error=f"a pattern of more than {bounds.pattern} bytes")
        if message == "query string is too large":
            return QueryResult("rejected", error=f"statement of more than {SQL_BYTES} bytes")
        plain = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.ProgrammingError)
        refused = "authoriz" in message or "prohibited" in message or "readonly" in message
        return QueryResult("error" if plain and not refused else "rejected", error=message)

    def _allow(self, bounds: _Bounds) -> None:
        if bounds is not self.bounds:
            self.raw.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, bounds.value)
            self.raw.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, bounds.pattern)
            self.bounds = bounds

    def _expect_long_values(self) -> None:
        """Switch to functions that stay fast on long values."""
        self.holds_long = True
        for name, arguments, function in _FUNCTIONS:
            self.raw.create_function(name, arguments, function, deterministic=True)

    def _weigh(self, sql: str) -> _Bounds:
        """Return the limits under which no piece of the compiled statement exceeds `STEP_BUDGET`."""
        self._allow(_WEIGHING)
        costs = _COST | (_LINEAR if self.holds_long else _NATIVE)
        work, patterns, longest = 0, 0, VALUE_BYTES if self.holds_long else _SMALL.value
        with closing(self.raw.execute("EXPLAIN " + sql)) as program:
            for _, operation, _, second, _, what, *_ in program:
                work += 1
                if operation == "ResultRow":
                    longest = min(longest, CHUNK_BYTES // second)
                elif operation in _CALLS:
                    name = what.partition("(")[0]
                    if name in _PATTERNS:
                        patterns += 1
                    else:
                        work += _cost(what, costs)
                    if name.endswith("_patch"):
                        longest = min(longest, _PATCH_BYTES)
        value = min(longest, STEP_BUDGET // (work + 64 * _PATTERN * patterns))
        pattern = (STEP_BUDGET // value - work) // max(1, _PATTERN * patterns)
        return _Bounds(value, pattern=max(64, min(5000, pattern)))

    def _fetch(self, sql: str, limits: Limits) -> QueryResult:
        longest = (self.bounds or _SMALL).value
        cursor = self.raw.execute(sql)
        try:
            description = cursor.description
            if description is None:
                return QueryResult("rejected", error=NO_STATEMENT)
            return fetch(cursor.fetchmany, tuple([d[0] for d in description]), longest, limits)
        finally:
            cursor.close()


def _lenient(raw: bytes) -> str:
    return raw.decode(errors="ignore")


# ---- functions that replace SQLite's own

_plain = threading.local()
_LARGE = re.compile(r"\s*[-+]?(\d{5}|[\d.]+e)", re.IGNORECASE)


def _native(expression: str, *arguments: Any) -> Any:
    """Let SQLite itself evaluate an expression."""
    if not hasattr(_plain, "connection"):
        _plain.connection = sqlite3.connect(":memory:")
        _plain.connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, VALUE_BYTES)
    return _plain.connection.execute(f"SELECT {expression}", arguments).fetchone()[0]


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="ignore")
    return _native("CAST(? AS TEXT)", value) if isinstance(value, float) else str(value)


def _printf(*arguments: Any) -> Any:
    """Call SQLite's own printf, but bound the width: it counts up to a width of 1e9 without checking any limit."""
    texts = [_text(a) for a in arguments]
    if texts and (re.search(r"\d{5}", texts[0]) or ("*" in texts[0] and any(map(_LARGE.match, texts[1:])))):
        raise ValueError("width or precision of more than 9999")
    return _native(f"printf({','.join('?' * len(arguments))})", *arguments)


def _instr(value: Any, part: Any) -> int | None:
    if value is None or part is None:
        return None
    if isinstance(value, bytes) and isinstance(part, bytes):
        return value.find(part) + 1
    return _text(value).find(_text(part)) + 1


def _replace(value: Any, old: Any, new: Any) -> Any:
    if value is None or old is None or old in ("", b""):
        return None if old is None else _text(value) if isinstance(value, bytes) else value
    if new is None:
        return None
    text, old, new = _text(value), _text(old), _text(new)
    growth = text.count(old) * (len(new.encode()) - len(old.encode()))
    if len(text.encode()) + growth > VALUE_BYTES:
        raise OverflowError  # sqlite3 says that the value is too big
    return text.replace(old, new)


def _trimmer(strip: Callable[[str, str], str]) -> Callable[[Any, Any], str | None]:
    def trim(value: Any, characters: Any) -> str | None:
        if value is None or characters is None:
            return None
        wanted = "".join(set(_text(characters).partition("\0")[0]))  # SQLite reads the set up to a zero
        if len(wanted) > 1000:
            raise OverflowError
        return strip(_text(value), wanted)

    return trim


_FUNCTIONS: tuple[tuple[str, int, Callable[..., Any]], ...] = (
    ("instr", 2, _instr),
    ("replace", 3, _replace),
    ("trim", 2, _trimmer(str.strip)),
    ("ltrim", 2, _trimmer(str.lstrip)),
    ("rtrim", 2, _trimmer(str.rstrip)),
)
