"""The PostgreSQL half of `sqlbench.database.engine`: one statement as a cursor of a read-only transaction.

DECLARE CURSOR takes only SELECT, VALUES and TABLE without data-modifying WITH, and the extended protocol takes only one
statement; ``statement_timeout`` ends it, a cancel request follows if it does not, and a server that still says nothing
a second later is hung up on, which is an error and no timeout. A login that could reach server files or programs steps
down to ``pg_read_all_data``. Since one function call could step up again and others run SQL from strings, calls of
those names are refused before the server sees them.
"""

from __future__ import annotations

import contextlib
import json
import marshal
import math
import os
import re
import socket
import threading
import time
from decimal import Decimal
from typing import Any

import psycopg
import psycopg.conninfo
from psycopg import errors
from psycopg.types.string import TextLoader

from sqlbench.database.types import CHUNK_BYTES, NO_STATEMENT, SQL_BYTES, Column, ForeignKey, Limits, QueryResult, Table
from sqlbench.errors import DatabaseError

_COMMENT = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)
_COMMAND = re.compile(
    r"[\s(]*(insert|update|delete|merge|create|drop|alter|truncate|copy|set|reset|do|call|grant|revoke|begin|start|commit|"
    r"rollback|savepoint|vacuum|analyze|explain|lock|listen|notify|prepare|execute|declare|fetch|load|reindex|cluster|"
    r"comment|refresh|import|security|discard|checkpoint|show|abort|end|release|reassign|close|move|unlisten)\b",
    re.IGNORECASE,
)
# Calls that change the session, outlive the transaction, or run SQL held in a string, and tables of passwords, which
# `pg_read_all_data` may read too. U&"..." could spell any of them.
_REFUSED = re.compile(
    r"set_config|session_authorization|(query|cursor|table|schema|database)_to_xml|ts_stat|ts_rewrite|dblink|crosstab|"
    r"connectby|xpath_table|lo_(import|export|creat|unlink|put|get|open|from_bytea|trunc|lseek|tell)|lowrite|loread|"
    r"pg_(read_|ls_|stat_file|file_|(try_)?advisory|terminate|cancel|export|logical|create_|reload|rotate|switch|promote|"
    r"backup|start_|stop_|wal_|drop_|replication|notify|log_|authid|shadow|user_mapping|subscription)|U&\s*\"",
    re.IGNORECASE,
)
_STEP_DOWN = """SELECT rolsuper OR pg_has_role(current_user, 'pg_read_server_files', 'member')
    OR pg_has_role(current_user, 'pg_write_server_files', 'member')
    OR pg_has_role(current_user, 'pg_execute_server_program', 'member')
    FROM pg_roles WHERE rolname = current_user"""
_SETTINGS = (
    "SET LOCAL statement_timeout = {ms}; SET LOCAL lock_timeout = {ms}; SET LOCAL work_mem = '16MB'; "
    "SET LOCAL jit = off; SET LOCAL max_parallel_workers_per_gather = 0"
)
_TIMES = ("date", "time", "timetz", "timestamp", "timestamptz", "interval")
"""Types read as the server writes them: Python has no infinite date, no year before Christ and no 24 o'clock."""
_PLAIN = (int, str, float, bytes, type(None))


class PostgresConnection:
    """One connection; what the engine asks of it is `sqlbench.database.engine.Connection`."""

    def __init__(self, target: str) -> None:
        try:
            self.raw = psycopg.connect(target, connect_timeout=5, autocommit=True, application_name="sqlbench")
            row = self.raw.execute(_STEP_DOWN).fetchone()
            if row and row[0]:
                self.raw.execute("SET ROLE pg_read_all_data")
            for name in _TIMES:
                self.raw.adapters.register_loader(name, TextLoader)
            self.raw.autocommit = False
            self.raw.read_only = True
        except errors.UndefinedObject as error:
            raise DatabaseError(
                f"refusing to use a superuser login of an old PostgreSQL ({error}); make a role that may only read: "
                "CREATE ROLE reader LOGIN; GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader"
            ) from error
        except (psycopg.Error, UnicodeError) as error:
            raise DatabaseError(f"cannot open {without_password(target)}: {str(error).strip()}") from error
        self.deadline = math.inf
        self.cancelled = False

    def interrupt(self) -> None:
        """Ask the server to stop, once, if its own timeout has not; hang up if it does not answer within a second."""
        late = time.perf_counter() - self.deadline
        if late > 0.05 and not self.cancelled:
            self.cancelled = True
            threading.Thread(target=self._cancel, daemon=True).start()  # a server that hangs would hold up the caller
        elif late > 1.0:
            with socket.socket(fileno=os.dup(self.raw.fileno())) as line:
                line.shutdown(socket.SHUT_RDWR)

    def _cancel(self) -> None:
        with contextlib.suppress(psycopg.Error):
            self.raw.cancel_safe(timeout=1.0)

    def close(self) -> None:
        """Close the connection."""
        self.raw.close()

    def run(self, sql: str, limits: Limits, deadline: float) -> QueryResult:
        """Run one statement."""
        if len(sql) > SQL_BYTES:
            return QueryResult("rejected", error=f"statement of more than {SQL_BYTES} bytes")
        if "\0" in sql:
            return QueryResult("rejected", error="the query contains a null character")
        text = _COMMENT.sub(" ", sql)
        if not text.strip(" \t\r\n;"):
            return QueryResult("rejected", error=NO_STATEMENT)
        if refused := _COMMAND.match(text) or _REFUSED.search(sql):
            return QueryResult("rejected", error=f"not allowed in a read-only query: {refused.group().strip()}")
        self.deadline, self.cancelled = deadline, False
        try:
            return self._fetch(sql, limits)
        except (errors.QueryCanceled, errors.LockNotAvailable):
            if time.perf_counter() < deadline - 0.002:  # meant for the statement before, or somebody else's
                self.raw.rollback()
                return self.run(sql, limits, deadline)
            return QueryResult("timeout", error=f"no result within {limits.seconds:g} s")
        except (errors.InsufficientPrivilege, errors.ReadOnlySqlTransaction, errors.FeatureNotSupported) as error:
            return QueryResult("rejected", error=_message(error))
        except (errors.OutOfMemory, errors.ProgramLimitExceeded, errors.StatementTooComplex, MemoryError) as error:
            return QueryResult("too_large", error=_message(error))
        except UnicodeError as error:
            return QueryResult("rejected", error=str(error))
        except psycopg.Error as error:
            if self.raw.closed:
                raise DatabaseError(f"lost the connection to PostgreSQL: {_message(error)}") from error
            message = _message(error)
            several = any(part in message for part in ("multiple commands", "DECLARE CURSOR", "INTO is not allowed"))
            return QueryResult("rejected" if several else "error", error=message)
        finally:
            self.deadline = math.inf
            with contextlib.suppress(psycopg.Error):  # if it is lost, the next statement will say so
                self.raw.rollback()

    def _fetch(self, sql: str, limits: Limits) -> QueryResult:
        self._time_left()
        with self.raw.cursor(name="sqlbench") as cursor:
            cursor.execute(sql.encode())
            columns = tuple([d.name for d in cursor.description or ()])
            step = max(1, min(1000, limits.rows + 1, CHUNK_BYTES // (32768 * max(1, len(columns)))))
            rows: list[tuple] = []
            size = 0
            while True:
                chunk = [
                    tuple([c if isinstance(c, _PLAIN) and c == c else _plain(c) for c in row])
                    for row in cursor.fetchmany(step)
                ]
                rows += chunk
                if len(rows) > limits.rows:
                    return QueryResult("too_large", columns, rows[: limits.rows], f"more than {limits.rows} rows")
                if len(chunk) < step:
                    return QueryResult("ok", columns, rows)
                size += len(marshal.dumps(chunk))
                if size > limits.result_bytes:
                    return QueryResult("too_large", columns, rows, f"more than {limits.result_bytes} bytes")
                self._time_left()

    def _time_left(self) -> None:
        left = int((self.deadline - time.perf_counter()) * 1000)
        if left <= 0:
            raise errors.QueryCanceled
        self.raw.execute(_SETTINGS.format(ms=left).encode())


def _plain(cell: Any) -> Any:
    """A value that can be hashed, compared and written as JSON."""
    if isinstance(cell, Decimal):
        if not cell.is_finite():
            return str(cell)
        return int(cell) if cell == cell.to_integral_value() and abs(cell) < 2**63 else float(cell)
    if isinstance(cell, (list, tuple, dict)):
        return json.dumps(cell, default=str, sort_keys=True, ensure_ascii=False)
    return str(cell)


def _message(error: BaseException) -> str:
    return str(error).split("\n")[0] or type(error).__name__


def database_name(target: str) -> str:
    """Name of the database that an address leads to.

    Raises:
        DatabaseError: it is not one; the message holds nothing of a password.
    """
    shown, password = without_password(target), _PASSWORD.search(target)
    if password and re.search(r"[/@?#\s]|%(?![0-9a-fA-F]{2})", password[2]):
        raise DatabaseError(
            f"cannot read the address {shown}: in the password write @ as %40, / as %2F, % as %25 and so on"
        )
    try:
        return str(psycopg.conninfo.conninfo_to_dict(target).get("dbname") or "")
    except psycopg.Error as error:
        reason = f": {_message(error)}" if shown == target else ""  # libpq quotes the part it does not understand
        raise DatabaseError(f"not a PostgreSQL address: {shown}{reason}") from error


def without_password(text: str) -> str:
    """An address, or a message with one in it, without its password."""
    return re.sub(r"(password\s*=\s*)('[^']*'|[^&\s]*)", r"\1***", _PASSWORD.sub(r"\1@", text))


_PASSWORD = re.compile(r"(://[^:/@\s]*):(.*)@", re.DOTALL)


_COLUMNS = """SELECT c.relname, a.attname, upper(format_type(a.atttypid, a.atttypmod)), NOT a.attnotnull,
        coalesce(a.attnum = ANY (p.conkey), false)
    FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN pg_constraint p ON p.conrelid = c.oid AND p.contype = 'p'
    WHERE c.relkind IN ('r', 'v', 'm', 'p', 'f') AND pg_table_is_visible(c.oid)
        AND c.relnamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
    ORDER BY c.relkind IN ('v', 'm'), c.relname, a.attnum"""
_KEYS = """SELECT c.relname, a.attname, r.relname, b.attname
    FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid JOIN pg_class r ON r.oid = k.confrelid
    CROSS JOIN LATERAL unnest(k.conkey, k.confkey) AS part(here, there)
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = part.here
    JOIN pg_attribute b ON b.attrelid = r.oid AND b.attnum = part.there
    WHERE k.contype = 'f' AND pg_table_is_visible(c.oid) ORDER BY 1, 2, 3, 4"""


def read_tables(target: str) -> tuple[Table, ...]:
    """The tables and views that need no schema prefix.

    Raises:
        DatabaseError: the server cannot be reached or its catalogue not read.
    """
    connection = PostgresConnection(target)
    try:
        columns: dict[str, list[Column]] = {}
        for table, *fields in connection.raw.execute(_COLUMNS):
            columns.setdefault(table, []).append(Column(*fields))
        keys: dict[str, list[ForeignKey]] = {}
        for table, *names in connection.raw.execute(_KEYS):
            keys.setdefault(table, []).append(ForeignKey(*names))
    except psycopg.Error as error:
        raise DatabaseError(f"cannot read the schema of {without_password(target)}: {_message(error)}") from error
    finally:
        connection.close()
    return tuple(Table(name, tuple(parts), tuple(keys.get(name, ()))) for name, parts in columns.items())
