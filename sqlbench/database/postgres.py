"""The PostgreSQL half of `sqlbench.database.engine`: one statement as a cursor of a read-only transaction.

DECLARE CURSOR takes only SELECT, VALUES and TABLE without data-modifying WITH, and the extended protocol takes only one
statement; ``statement_timeout`` ends it, a cancel request follows if it does not, and a server that still says nothing
a second later is disconnected, which is an error and not a timeout. A login that could reach server files or programs
steps down to ``pg_read_all_data``.

That leaves functions that anybody may call although they outlive the transaction, change the session (one could step up
again) or run SQL held in a string. They are refused by the server's own parse: a statement whose text could name
one is parsed first, and the server sends the tree (``debug_print_parse``), in which every call is a number. The server
also writes the tree to its own log.

Text and values do not depend on the environment, the role or the database: sessions speak UTF-8, and `_SESSION` holds
the settings that would change how a value is read or shown.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import threading
import time
from typing import Any

import psycopg
import psycopg.conninfo
from psycopg import errors, pq
from psycopg.types.string import TextLoader

from sqlbench.database.target import PASSWORD, without_password
from sqlbench.database.types import (
    NO_STATEMENT,
    SQL_BYTES,
    Column,
    ForeignKey,
    Limits,
    QueryResult,
    Table,
    fetch,
    plain_rows,
)
from sqlbench.errors import DatabaseError

_SUSPECT = re.compile(
    r"pg_|lo_|loread|lowrite|set_config|setseed|nextval|setval|to_xml|ts_stat|ts_rewrite|currtid|brin_|gin_clean|"
    r"binary_upgrade|plpgsql_|dblink|crosstab|connectby|xpath_table|U&\"",
    re.IGNORECASE,
)
"""Parts of names without which a text calls no function of `_CALLS` by name; U&"..." could spell any of them."""
_HARMLESS = (
    r"amvalidate|txid_status|random|random_normal|gen_random_uuid|uuidv[47]|clock_timestamp|timeofday|array_(sample|shuffle)|currval|lastval|"
    r"pg_sleep|pg_sleep_(for|until)|pg_(relation|table|indexes|total_relation|database|tablespace)_size|current_query|"
    r"pg_partition_(tree|ancestors)|pg_is_in_recovery|pg_lock_status|pg_sequence_last_value|pg_stat_get_\w+"
)
_CALLS = rf"""(p.pronamespace = 'pg_catalog'::regnamespace
        AND (p.provolatile = 'v' AND p.proname !~ '^({_HARMLESS})$' OR p.proname ~ '^(table|schema|database)_to_xml')
    OR p.proname ~ '^(dblink\w*|crosstab(\d|n|_hash)?|connectby|xpath_table|pg_file_\w+)$')"""
"""The functions that are refused: volatile ones of PostgreSQL itself but for the harmless, those that show whole tables
as XML, and those of its extensions that run text, open connections or write files."""
_JUDGE = f"""SELECT p.proname FROM pg_proc p WHERE {_CALLS} AND p.oid IN (
        SELECT unnest(%(calls)s::oid[]) UNION ALL SELECT oprcode FROM pg_operator WHERE oid = ANY (%(operators)s::oid[])
        UNION ALL SELECT unnest(ARRAY[aggtransfn, aggfinalfn]) FROM pg_aggregate WHERE aggfnoid = ANY (%(calls)s::oid[])
    ) UNION ALL SELECT relname FROM pg_class c WHERE oid = ANY (%(relations)s::oid[]) AND oid < 16384
        AND NOT has_table_privilege('public', oid, 'SELECT') LIMIT 1"""
"""Query for the first refused function among those called, or the first system table that is not open to everybody,
such as the table of passwords: ``pg_read_all_data`` may read them all."""
_HIDDEN = rf"""SELECT EXISTS (SELECT FROM pg_proc p WHERE {_CALLS} AND p.oid IN (
        SELECT oprcode FROM pg_operator WHERE oid >= 16384 UNION ALL SELECT castfunc FROM pg_cast WHERE oid >= 16384
        UNION ALL SELECT unnest(ARRAY[aggtransfn, aggfinalfn]) FROM pg_aggregate WHERE aggfnoid >= 16384
        UNION ALL SELECT call[1]::oid FROM pg_rewrite, regexp_matches(ev_action::text, ':funcid (\d+)', 'g') call
        WHERE ev_class >= 16384))"""
"""Query for a view, operator, cast or aggregate of the database's own that hides a call to a refused function."""
_SHOW_TREE = (
    "SET LOCAL client_min_messages = log; SET LOCAL debug_pretty_print = off; "
    "SET LOCAL debug_print_rewritten = on; SET LOCAL debug_print_parse = on"
)
_HIDE_TREE = (
    "SET LOCAL debug_print_parse = off; SET LOCAL debug_print_rewritten = off; SET LOCAL client_min_messages = warning"
)
_STEP_DOWN = """SELECT rolsuper OR pg_has_role(current_user, 'pg_read_server_files', 'member')
    OR pg_has_role(current_user, 'pg_write_server_files', 'member')
    OR pg_has_role(current_user, 'pg_execute_server_program', 'member')
    FROM pg_roles WHERE rolname = current_user"""
_SETTINGS = (
    "SET LOCAL statement_timeout = {ms}; SET LOCAL lock_timeout = {ms}; SET LOCAL work_mem = '16MB'; "
    "SET LOCAL jit = off; SET LOCAL max_parallel_workers_per_gather = 0"
)
_SESSION = (
    "SET DateStyle = 'ISO, MDY'; SET IntervalStyle = postgres; SET TimeZone = 'UTC'; SET extra_float_digits = 1; "
    "SET bytea_output = hex; SET xmlbinary = base64; SET standard_conforming_strings = on; SET array_nulls = on; "
    "SET transform_null_equals = off; SET row_security = on; SET synchronize_seqscans = off; "
    "SET client_min_messages = warning"
)
_TIMES = ("date", "time", "timetz", "timestamp", "timestamptz", "interval")
"""Types read as the server writes them: Python lacks infinite dates, years before Christ and 24 o'clock."""
_COMMENTS = 1000
"""Most comments of a statement: nested ones take the server time quadratic in their number, without interruption."""
_DECLARE = 'DECLARE "sqlbench" CURSOR FOR '


class _AnyBytes(TextLoader):
    """Loader for text of an SQL_ASCII database, which keeps the bytes that it was given: UTF-8 as a rule."""

    def load(self, data: Any) -> str:
        return bytes(data).decode(errors="replace")


class PostgresConnection:
    """One connection, as the engine requires it (`sqlbench.database.engine.Connection`)."""

    def __init__(self, target: str) -> None:
        try:
            self.raw = psycopg.connect(
                target, connect_timeout=5, autocommit=True, application_name="sqlbench", client_encoding="UTF8"
            )
            self.raw.execute(_SESSION)
            row = self.raw.execute(_STEP_DOWN).fetchone()
            if row and row[0]:
                self.raw.execute("SET ROLE pg_read_all_data")
            row = self.raw.execute(_HIDDEN).fetchone()
            self.hidden = bool(row and row[0])
            for name in _TIMES:
                self.raw.adapters.register_loader(name, TextLoader)
            if (
                self.raw.info.parameter_status("server_encoding") == "SQL_ASCII"
            ):  # a server checks what it sends as UTF-8
                self.raw.execute("SET client_encoding = LATIN1")  # lets every byte pass as it is, both ways
                for kind in (0, "text", "varchar", "bpchar", "name"):
                    self.raw.adapters.register_loader(kind, _AnyBytes)
            self.trees: list[tuple[str, str]] = []
            self.raw.add_notice_handler(
                lambda note: self.trees.append((str(note.message_primary), str(note.message_detail)))
            )
            self.raw.autocommit = False
            self.raw.read_only = True
        except errors.UndefinedObject as error:
            raise DatabaseError(
                f"Superuser login of an old PostgreSQL refused: {error}. Make a role that may only read: "
                "CREATE ROLE reader LOGIN; GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader."
            ) from error
        except (psycopg.Error, UnicodeError) as error:
            why = " ".join(str(error).split()).rstrip(".?")
            raise DatabaseError(f"Cannot open {without_password(target)}: {why}. Check address and login.") from error
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
        if len(sql.encode(errors="replace")) > SQL_BYTES:
            return QueryResult("rejected", error=f"statement of more than {SQL_BYTES} bytes")
        if "\0" in sql:
            return QueryResult("rejected", error="the query contains a null character")
        if sql.count("/*") > _COMMENTS:
            return QueryResult("rejected", error=f"more than {_COMMENTS} comments")
        self.deadline, self.cancelled = deadline, False
        try:
            self._time_left()
            if refused := self._refused(sql):
                return QueryResult("rejected", error=f"not allowed in a read-only query: {refused}")
            return self._fetch(sql, limits)
        except (errors.QueryCanceled, errors.LockNotAvailable):
            if time.perf_counter() < deadline - 0.002:  # meant for the statement before, or sent by somebody else
                self.raw.rollback()
                return self.run(sql, limits, deadline)
            return QueryResult("timeout", error=f"no result within {limits.seconds:g} s")
        except (
            errors.InsufficientPrivilege,
            errors.ReadOnlySqlTransaction,
            errors.FeatureNotSupported,
            errors.InvalidCursorDefinition,
        ) as error:
            return QueryResult("rejected", error=_message(error))
        except (errors.OutOfMemory, errors.ProgramLimitExceeded, errors.StatementTooComplex, MemoryError) as error:
            return QueryResult("too_large", error=_message(error))
        except UnicodeError as error:
            return QueryResult("rejected", error=str(error))
        except psycopg.Error as error:
            if self.raw.closed:
                raise DatabaseError(
                    f"Connection to PostgreSQL lost: {_message(error)}. Check the server and try again."
                ) from error
            return QueryResult("error", error=_message(error))
        finally:
            self.deadline = math.inf
            with contextlib.suppress(psycopg.Error):  # if it is lost, the next statement will say so
                self.raw.rollback()

    def _parse(self, sql: str) -> None:
        """Let the server parse a statement without running it."""
        result = self.raw.pgconn.prepare(b"", sql.encode())
        if result.status == pq.ExecStatus.FATAL_ERROR:
            raise errors.error_from_result(result)

    def _refused(self, sql: str) -> str:
        """Return the forbidden function or table that a statement uses; empty if it uses none."""
        if not self.hidden and not _SUSPECT.search(sql):
            return ""
        self.raw.execute(_SHOW_TREE)
        self.trees.clear()
        self._parse(sql)
        trees = self.trees.copy()
        self.raw.execute(_HIDE_TREE)
        if not trees:
            return NO_STATEMENT
        everything = " ".join([tree for _, tree in trees])
        parameters = {
            "calls": re.findall(r":(?:funcid|aggfnoid|winfnoid)\s(\d+)", everything),
            "operators": re.findall(r":opno\s(\d+)", everything),
            # System views such as pg_roles show harmless columns of restricted tables.
            "relations": re.findall(
                r":relid\s(\d+)", " ".join([tree for name, tree in trees if name == "parse tree:"])
            ),
        }
        row = self.raw.execute(_JUDGE, parameters).fetchone()
        return row[0] if row else ""

    def _not_a_query(self, sql: str, error: errors.SyntaxError) -> QueryResult:
        """Tell a statement that a cursor does not take from text that is not a statement, by parsing it alone."""
        wrong = QueryResult("error", error=_message(error))
        if error.diag.internal_query:  # of a function that runs text
            return wrong
        self.raw.rollback()
        self._time_left()
        try:
            self._parse(sql)
        except errors.SyntaxError as alone:
            if alone.diag.statement_position:  # several statements have none
                return wrong
        except errors.ProgrammingError:  # the grammar has nothing against it
            pass
        else:
            if int(error.diag.statement_position or 0) > len(_DECLARE + sql.rstrip("; \t\r\n")):
                return QueryResult("rejected", error=NO_STATEMENT)
        return QueryResult("rejected", error="not one SELECT, VALUES or TABLE statement")

    def _fetch(self, sql: str, limits: Limits) -> QueryResult:
        with self.raw.cursor(name="sqlbench") as cursor:
            try:
                cursor.execute(sql.encode())
            except errors.SyntaxError as wrong:
                return self._not_a_query(sql, wrong)
            encoding = self.raw.info.encoding
            columns = tuple([d.name.encode(encoding).decode(errors="replace") for d in cursor.description or ()])
            return fetch(lambda n: plain_rows(cursor.fetchmany(n)), columns, 32768, limits, self._time_left)

    def _time_left(self) -> None:
        remaining = int((self.deadline - time.perf_counter()) * 1000)
        if remaining <= 0:
            raise errors.QueryCanceled
        self.raw.execute(_SETTINGS.format(ms=remaining).encode())


def _message(error: BaseException) -> str:
    return str(error).split("\n")[0] or type(error).__name__


def database_name(target: str) -> str:
    """Return the name of the database at an address.

    Raises:
        DatabaseError: the address is invalid; the message does not show any of its password.
    """
    shown, password = without_password(target), PASSWORD.search(target)
    if password and re.search(r"[/@?#\s]|%(?![0-9a-fA-F]{2})", password[2]):
        raise DatabaseError(
            f"Cannot read the address: {shown}. In the password write @ as %40, / as %2F, % as %25 and so on."
        )
    try:
        return str(psycopg.conninfo.conninfo_to_dict(target).get("dbname") or "")
    except psycopg.Error as error:
        reason = f": {_message(error)}" if shown == target else ""  # libpq quotes the part it does not understand
        raise DatabaseError(
            f"Not a PostgreSQL address: {shown}{reason}. Write postgresql://user@host:port/name."
        ) from error


_SHOWN = """WITH shown AS (
    SELECT c.oid, c.relname AS name, CASE WHEN pg_table_is_visible(c.oid) THEN '' ELSE n.nspname END AS schema,
        c.relkind IN ('v', 'm') AS view
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'v', 'm', 'p', 'f') AND c.relpersistence <> 't' AND c.relispopulated
        AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
        AND has_schema_privilege(n.oid, 'USAGE') AND has_any_column_privilege(c.oid, 'SELECT')
        AND NOT EXISTS (SELECT FROM pg_depend WHERE classid = 'pg_class'::regclass AND objid = c.oid AND deptype = 'e')
        AND NOT c.relispartition AND NOT (  -- nor a partition made by hand: it only narrows the table it inherits from
            EXISTS (SELECT FROM pg_inherits WHERE inhrelid = c.oid)
            AND EXISTS (SELECT FROM pg_constraint WHERE conrelid = c.oid AND contype = 'c' AND conislocal)
            AND NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 AND attislocal)))
"""
"""Tables and views of which this login may read at least one column, except those of extensions."""
_COLUMNS = f"""{_SHOWN} SELECT c.schema, c.name, c.view, a.attname,
        CASE WHEN t.typnamespace = 'pg_catalog'::regnamespace THEN upper(type.name) ELSE type.name END,
        NOT a.attnotnull, coalesce(a.attnum = ANY (p.conkey), false), coalesce(col_description(c.oid, a.attnum), '')
    FROM shown c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    JOIN pg_type declared ON declared.oid = a.atttypid
    JOIN pg_type t ON t.oid = CASE declared.typtype WHEN 'd' THEN declared.typbasetype ELSE declared.oid END
    CROSS JOIN LATERAL format_type(t.oid, CASE declared.typtype WHEN 'd' THEN declared.typtypmod ELSE a.atttypmod END)
        AS type(name)
    LEFT JOIN pg_constraint p ON p.conrelid = c.oid AND p.contype = 'p'
    WHERE has_column_privilege(c.oid, a.attnum, 'SELECT')
    ORDER BY c.schema <> '', c.schema, c.view, c.name, a.attnum"""
_KEYS = f"""{_SHOWN} SELECT c.schema, c.name, a.attname, r.name, b.attname, r.schema
    FROM pg_constraint k JOIN shown c ON c.oid = k.conrelid JOIN shown r ON r.oid = k.confrelid
    CROSS JOIN LATERAL unnest(k.conkey, k.confkey) AS part(here, there)
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = part.here
    JOIN pg_attribute b ON b.attrelid = r.oid AND b.attnum = part.there
    WHERE k.contype = 'f' AND has_column_privilege(c.oid, a.attnum, 'SELECT')
        AND has_column_privilege(r.oid, b.attnum, 'SELECT')
    ORDER BY 1, 2, 3, 4, 5"""


def read_tables(target: str) -> tuple[Table, ...]:
    """Read the tables and views that can be read; those outside the search path carry their schema.

    Raises:
        DatabaseError: the server cannot be reached, or its catalogue cannot be read.
    """
    connection = PostgresConnection(target)
    try:
        columns: dict[tuple[str, str, bool], list[Column]] = {}
        for schema, table, view, *fields in connection.raw.execute(_COLUMNS):
            columns.setdefault((schema, table, view), []).append(Column(*fields))
        keys: dict[tuple[str, str], list[ForeignKey]] = {}
        for schema, table, *names in connection.raw.execute(_KEYS):
            keys.setdefault((schema, table), []).append(ForeignKey(*names))
    except psycopg.Error as error:
        raise DatabaseError(
            f"Cannot read the schema of {without_password(target)}: {_message(error)}. Check the rights of the login."
        ) from error
    finally:
        connection.close()
    return tuple(
        Table(name, tuple(parts), tuple(keys.get((schema, name), ())), schema, view)
        for (schema, name, view), parts in columns.items()
    )
