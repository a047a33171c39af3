"""A release of a data set read as files with relative names, whether it is a folder or a zip archive.

A zip archive inside it with a name like ``..._databases.zip``, as BIRD has it, is read as the folder that it would
unpack to. No file is written to a path that an archive names.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from sqlbench.database.sqlite_file import SIDE_FILES
from sqlbench.errors import DataError

BLOCK = 1 << 20
_MACOS = re.compile(r"(^|/)(__MACOSX/|\._)")
"""Files that macOS adds to archives."""


class Release:
    """Files by their relative names, sorted."""

    def __init__(self, source: Path, files: dict[str, Callable[[], IO[bytes]]]) -> None:
        self.source = source
        self._files = files
        self.names = sorted(name for name in files if not _MACOS.search(name))

    def open(self, name: str) -> IO[bytes]:
        """Open one file for reading."""
        try:
            return self._files[name]()
        except RuntimeError as error:  # a password, or a compression that Python does not have
            raise DataError(f"Cannot read {self.source}: {error}. Unpack it and give the folder.") from error

    def copy(self, name: str, target: Path) -> None:
        """Write one file to `target`."""
        with self.open(name) as read, target.open("wb") as write:
            shutil.copyfileobj(read, write, BLOCK)


@contextmanager
def open_release(source: Path, page: str = "its origin") -> Iterator[Release]:
    """Open a folder, a zip archive, or a single file of another kind (a database with its log).

    Args:
        source: its path.
        page: address to download an archive from again.

    Raises:
        DataError: the release is missing or damaged.
    """
    if not source.exists():
        raise DataError(f"No such file: {source}. Give the path of a zip archive or of its unpacked folder.")
    with ExitStack() as stack:
        try:
            if source.is_dir():
                paths = sorted(path for path in source.rglob("*") if path.is_file())
                files = {path.relative_to(source).as_posix(): _opener(path) for path in paths}
            elif source.suffix.lower() == ".zip" or zipfile.is_zipfile(source):
                files = _members(stack.enter_context(zipfile.ZipFile(source)))
            else:
                logs = [source.with_name(source.name + suffix) for suffix in SIDE_FILES]
                files = {path.name: _opener(path) for path in (source, *logs) if path.is_file()}
            for name in [name for name in files if name.endswith("_databases.zip")]:
                files |= _nested(files[name], name, stack)
            yield Release(source, files)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise DataError(f"Not an intact zip archive: {source} ({error}). Download it again from {page}.") from error


def _opener(path: Path) -> Callable[[], IO[bytes]]:
    return lambda: path.open("rb")


def _members(archive: zipfile.ZipFile) -> dict[str, Callable[[], IO[bytes]]]:
    files: dict[str, Callable[[], IO[bytes]]] = {}
    for info in archive.infolist():
        path = PurePosixPath(info.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", info.filename):
            raise DataError(f"Archive member leads outside {archive.filename}: {info.filename}. Get an intact archive.")
        if (info.external_attr >> 16) & 0o170000 == 0o120000:
            raise DataError(f"Symbolic link in {archive.filename}: {info.filename}. Get an archive without links.")
        if not info.is_dir():
            files[info.filename] = lambda info=info: archive.open(info)  # type: ignore[misc]
    return files


def _nested(opener: Callable[[], IO[bytes]], name: str, stack: ExitStack) -> dict[str, Callable[[], IO[bytes]]]:
    """Return the files of an archive in a release by the names they would have if it were unpacked beside itself."""
    # Seeking in a packed file is slow.
    copy = stack.enter_context(tempfile.SpooledTemporaryFile(BLOCK))  # noqa: SIM115
    with opener() as packed:
        shutil.copyfileobj(packed, copy, BLOCK)
    archive, (folder, _, _) = stack.enter_context(zipfile.ZipFile(copy)), name.rpartition("/")
    return {f"{folder}/{inner}".removeprefix("/"): opener for inner, opener in _members(archive).items()}
