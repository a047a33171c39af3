"""The process that runs statements for `sqlbench.database.duckdb`: requests on stdin, answers on stdout."""

from __future__ import annotations

import marshal
import re
import resource
import signal
import sys
import threading
from collections import OrderedDict
from typing import Any

import duckdb

from sqlbench.database.types import CHUNK_BYTES, NO_STATEMENT, SQL_BYTES, Limits, QueryResult, fetch, plain_rows

KEPT = 4
"""Number of databases kept open."""
SETTINGS: dict[str, Any] = {
    "threads": 1,
    "temp_directory": "",  # nothing is spilled: a folder would appear beside the file
    "python_enable_replacements": False,
    "enable_external_access": False,
    "lock_configuration": True,
}
_VALUE = 8 << 10
"""Expected bytes of a value."""


class _Lost(Exception):
    """The database cannot be opened."""


class _Broken(Exception):
    """DuckDB met a defect of its own, after which it no longer uses the database."""


def serve(engine_memory: int, memory: int, grace: float) -> None:
    """Answer requests until the other end is closed.

    Each answer says whether the process is full: DuckDB keeps memory that a statement has freed, and the next statement
    could fail for lack of memory.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever blocks it
    opened: OrderedDict[tuple[str, str], duckdb.DuckDBPyConnection] = OrderedDict()
    while True:
        try:
            uri, version, sql, seconds, rows, size = marshal.load(sys.stdin.buffer)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, seconds + grace)
        try:
            result = _run(_open(opened, uri, version, engine_memory), sql, Limits(seconds, rows, size))
            answer = (result.status, result.columns, result.rows, result.error)
        except _Lost as error:
            answer = ("lost", (), [], str(error))
        except _Broken as error:
            answer = ("error", (), [], str(error))
            opened.clear()
        full = _data_bytes() > memory // 2
        data = marshal.dumps((*answer, full))
        if len(data) > size + CHUNK_BYTES:  # one long value
            data = marshal.dumps(("too_large", (), [], f"more than {size:,} bytes", full))
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(len(data).to_bytes(8) + data)
        sys.stdout.buffer.flush()


def _data_bytes() -> int:
    """Return the bytes of the process that count towards its memory limit (`proc_pid_statm(5)`, field ``data``)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * resource.getpagesize()


def _open(opened: OrderedDict, uri: str, version: str, memory: int) -> duckdb.DuckDBPyConnection:
    for key in [key for key in opened if key[0] == uri and key[1] != version]:
        opened.pop(key).close()
    if (uri, version) not in opened:
        try:
            connection = duckdb.connect(uri, read_only=True, config={"memory_limit": f"{memory}B"})
            for name, value in SETTINGS.items():  # in this order, which a config given to connect() does not keep
                connection.execute(f"SET GLOBAL {name} = {value!r}")
            opened[uri, version] = connection
        except duckdb.Error as error:
            raise _Lost(_message(error)) from error
        if len(opened) > KEPT:
            opened.popitem(last=False)[1].close()
    opened.move_to_end((uri, version))
    return opened[uri, version]


def _run(connection: duckdb.DuckDBPyConnection, sql: str, limits: Limits) -> QueryResult:
    cursor = connection.cursor()  # a separate session, so that its settings do not stay
    timer = threading.Timer(limits.seconds, cursor.interrupt)
    timer.start()
    try:
        if len(sql.encode()) > SQL_BYTES:
            return QueryResult("rejected", error=f"statement of more than {SQL_BYTES} bytes")
        if "\0" in sql:
            return QueryResult("rejected", error="the query contains a null character")
        statements = cursor.extract_statements(sql)
        if len(statements) != 1 or not _is_select(statements[0]):
            error = "not one SELECT, VALUES or FROM statement" if statements else NO_STATEMENT
            return QueryResult("rejected", error=error)
        cursor.execute(statements[0])
        columns = tuple([column[0] for column in cursor.description or ()])
        return fetch(lambda n: plain_rows(cursor.fetchmany(n)), columns, _VALUE, limits)
    except duckdb.InterruptException:
        return QueryResult("timeout", error=f"no result within {limits.seconds:g} s")
    except (duckdb.OutOfMemoryException, MemoryError) as error:
        return QueryResult("too_large", error=_message(error) or "not enough memory")
    except (duckdb.PermissionException, UnicodeError) as error:
        return QueryResult("rejected", error=_message(error))
    except (duckdb.FatalException, duckdb.InternalException) as error:
        raise _Broken(_message(error)) from error
    except Exception as error:
        refused = "attached in read-only mode" in str(error)
        return QueryResult("rejected" if refused else "error", error=_message(error))
    finally:
        timer.cancel()
        cursor.close()


def _is_select(statement: duckdb.Statement) -> bool:
    try:
        return statement.type == duckdb.StatementType.SELECT
    except ValueError:  # a kind for which the library has no name
        return False


def _message(error: BaseException) -> str:
    """Return the message without the quoted line of the query and without long lists of advice."""
    return " ".join(
        re.split(r"\n(?:LINE |\s*Candidate functions|Possible solutions)|Either add", str(error))[0].split()
    )[:1000]


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
