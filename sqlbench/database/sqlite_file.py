"""A SQLite file that belongs to somebody else: read as it was last committed, with nothing left next to it.

A file that nobody is writing is opened as *immutable*: without locks, and without the ``-shm`` that even a reader of a
database in WAL mode would make. If a ``-wal`` or ``-journal`` next to it is not empty, the committed state is in
both files together; then they are copied to a private folder, where SQLite itself merges them.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import time
import weakref
from contextlib import closing, suppress
from pathlib import Path

from sqlbench.errors import DatabaseError

SIDE_FILES = ("-wal", "-journal")
_TRIES = 20


def identity(path: str) -> tuple:
    """Return a value that changes when the content may have changed: inode, size and mtime of all its files.

    Raises:
        DatabaseError: the file does not exist.
    """
    return (path, stamp(path), *[side_stamp(file) for file in _side_files(path)])


def _side_files(path: str) -> list[str]:
    real = os.path.realpath(path) if os.path.islink(path) else path  # SQLite looks next to the link's target
    return [real + suffix for suffix in SIDE_FILES]


def stamp(path: str) -> tuple[int, int, int]:
    """Return the inode, size and mtime of one file.

    Raises:
        DatabaseError: the file does not exist.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DatabaseError(f"Cannot open database {path}: {error.strerror}. Check the path.") from error
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns)


def side_stamp(path: str) -> tuple[int, int, int] | None:
    """Return the `stamp` of a file; None if it is missing or empty."""
    try:
        state = stamp(path)
    except DatabaseError:
        return None
    return state if state[1] else None


class Snapshot:
    """The committed state of a database file; `uri` opens it with sqlite3 as long as this object lives.

    It is read `in_place`, or as a private copy.

    Raises:
        DatabaseError: the file does not exist, cannot be copied, or is being written all the time.
    """

    def __init__(self, path: str) -> None:
        for _ in range(_TRIES):
            self.identity = identity(path)
            self.in_place = self.identity[2:] == (None, None)
            if self.in_place:
                self.uri = _immutable(path)
                return
            copy = self._copy(path)
            if identity(path) == self.identity:
                merge(copy)
                self.uri = _immutable(copy)
                return
            self._remove()
            time.sleep(0.05)
        raise DatabaseError(
            f"Cannot read {path}: another program keeps writing to it. Wait for it, or make a copy with "
            f"sqlite3 {path} '.backup copy.sqlite'."
        )

    def _copy(self, path: str) -> str:
        try:
            folder = tempfile.mkdtemp(prefix="sqlbench-")
            self._remove = weakref.finalize(self, remove_folder, folder, os.getpid())
            copy = os.path.join(folder, "copy.sqlite")
            shutil.copyfile(path, copy)
            for source, suffix in zip(_side_files(path), SIDE_FILES, strict=True):
                with suppress(FileNotFoundError):  # merged and removed meanwhile: the caller notices
                    shutil.copyfile(source, copy + suffix)
        except OSError as error:
            raise DatabaseError(
                f"Cannot copy {path} with its log to {tempfile.gettempdir()}: {error.strerror}. "
                f"Free some space, set TMPDIR, or merge the log with sqlite3 {path} 'PRAGMA journal_mode=delete'."
            ) from error
        return copy


def merge(path: str) -> None:
    """Merge the log or the hot journal of a file into it, and remove them.

    Raises:
        sqlite3.Error: it is not a database.
    """
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
        connection.execute("PRAGMA journal_mode=delete").fetchall()
    for suffix in SIDE_FILES:
        Path(path + suffix).unlink(missing_ok=True)


def _immutable(path: str) -> str:
    return Path(path).absolute().as_uri() + "?mode=ro&immutable=1"


def remove_folder(folder: str, owner: int) -> None:
    """Remove the folder of a private copy."""
    if os.getpid() == owner:  # not in a forked child
        shutil.rmtree(folder, ignore_errors=True)
