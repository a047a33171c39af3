"""Import of a Spider release: complete, audited, and the same bytes for the same archive and seed.

A release is the official layout, zipped or unpacked, at the top or inside one or more enclosing folders::

    train_spider.json, dev.json, tables.json       questions with gold SQL; schemas
    database/<db_id>/<db_id>.sqlite
    train_others.json                              optional: joins the train split
    test.json, test_tables.json, test_database/    optional: becomes the test split

The import is written next to its destination and renamed at the end, so an existing folder is complete.
Tasks that cannot be scored stay in their split, marked by the gold audit (`sqlbench.data.audit`).

Not covered: a database that ``database/`` and ``test_database/`` hold under one name is taken from ``database/``.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import re
import shutil
import sqlite3
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Protocol
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from sqlbench.data.audit import Audit, Auditor
from sqlbench.data.tasks import Task, write_split
from sqlbench.database.sqlite_file import SIDE_FILES, merge
from sqlbench.errors import DataError

SPIDER_PAGE = "https://yale-lily.github.io/spider"
"""Where the authors publish the data set (CC BY-SA 4.0)."""
SPIDER_URL = (
    "https://drive.usercontent.google.com/download?id=1403EGqzIDoHMdQF4c9Bkyl7dZLZ5Wt6J&export=download&confirm=t"
)
"""The archive (about 200 MB) that `SPIDER_PAGE` links to, without the interstitial page of its host."""

SUBSET = 500
"""Tasks in ``dev_500``, as many as the seed experiment evaluated on."""

_NAME = re.compile(r"\w[\w .+-]*")
_BLOCK = 1 << 20


class _Source(Protocol):
    """A release as a set of relative file names, zipped or not."""

    names: list[str]

    def open(self, name: str) -> IO[bytes]: ...


class _Folder:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())

    def open(self, name: str) -> IO[bytes]:
        return (self.root / name).open("rb")


class _Zip:
    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        for info in archive.infolist():
            path = PurePosixPath(info.filename.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", info.filename):
                raise DataError(
                    f"Archive member leads outside {archive.filename}: {info.filename}. Get an intact archive."
                )
            if (info.external_attr >> 16) & 0o170000 == 0o120000:
                raise DataError(f"Symbolic link in {archive.filename}: {info.filename}. Get an archive without links.")
        self.names = sorted(i.filename for i in archive.infolist() if not i.is_dir())

    def open(self, name: str) -> IO[bytes]:
        try:
            return self.archive.open(name)
        except RuntimeError as error:  # a password, or a compression that Python does not have
            raise DataError(f"Cannot read {self.archive.filename}: {error}. Unpack it and give the folder.") from error


@contextmanager
def _opened(source: Path) -> Iterator[_Source]:
    if source.is_dir():
        yield _Folder(source)
    elif source.is_file():
        try:
            with zipfile.ZipFile(source) as archive:
                yield _Zip(archive)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise DataError(
                f"Not an intact zip archive: {source} ({error}). Download it again from {SPIDER_PAGE}."
            ) from error
    else:
        raise DataError(f"No such file: {source}. Give the path of a Spider zip or of its unpacked folder.")


def _locate(source: Path, names: list[str]) -> str:
    """Find the prefix ('' or ending in '/') of the folder that holds the release; the shallowest one wins."""
    present = set(names)
    wanted = ("dev.json", "train_spider.json", "tables.json")
    prefixes = [n[: -len("dev.json")] for n in names if PurePosixPath(n).name == "dev.json"]
    for prefix in sorted(prefixes, key=lambda p: (p.count("/"), p)):
        if all(prefix + w in present for w in wanted) and any(n.startswith(prefix + "database/") for n in names):
            return prefix
    raise DataError(f"Not a Spider release: {source}. Give one that holds {', '.join(wanted)} and database/.")


def _load_json(source: _Source, name: str) -> list[dict]:
    try:
        with source.open(name) as file:
            rows = json.load(file)
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"Not JSON: {name} of the release ({error}). Download the release again.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"Not a list of objects: {name} of the release. Download the release again.")
    return rows


def _tasks(source: _Source, prefix: str, files: tuple[str, ...], split: str) -> list[Task]:
    tasks: list[Task] = []
    for file in files:
        if prefix + file not in source.names:
            continue
        for i, row in enumerate(_load_json(source, prefix + file)):
            fields = [str(row.get(k) or "").strip() for k in ("db_id", "question", "query")]
            if not all(fields) or not _NAME.fullmatch(fields[0]):
                raise DataError(f"No usable db_id, question or query: row {i} of {file}. Give a Spider release.")
            db_id, question, gold = fields
            task_id = f"{split}-{len(tasks):05d}"
            tasks.append(Task(task_id=task_id, db_id=db_id, question=question, gold=gold, split=split))
    return tasks


def _copy_databases(source: _Source, prefix: str, out: Path) -> None:
    wanted: dict[str, str] = {}
    for folder in ("database/", "test_database/"):
        for name in source.names:
            if name.startswith(prefix + folder):
                path = PurePosixPath(name[len(prefix + folder) :])
                if len(path.parts) == 2 and path.name == f"{path.parts[0]}.sqlite" and _NAME.fullmatch(path.parts[0]):
                    wanted.setdefault(path.parts[0], name)
    for db_id, name in tqdm(sorted(wanted.items()), desc="databases", unit="db"):
        target = out / "database" / db_id / f"{db_id}.sqlite"
        target.parent.mkdir(parents=True)
        files = [f for suffix in ("", *SIDE_FILES) if (f := name + suffix) in source.names]
        for file in files:
            with source.open(file) as read, target.with_name(PurePosixPath(file).name).open("wb") as write:
                shutil.copyfileobj(read, write, _BLOCK)
        if len(files) > 1:  # a part of the data is in a log next to the database
            try:
                merge(str(target))
            except sqlite3.Error as error:
                raise DataError(
                    f"Cannot merge {' and '.join(files)} of the release: {error}. Import it whole."
                ) from error


def import_spider(source: str | Path, out: str | Path, *, seed: int = 0, query_timeout: float = 5.0) -> Audit:
    """Write a Spider release, zipped or unpacked, as a data set and return its gold audit.

    Splits: ``train`` (with train_others.json where present), ``dev``, ``test`` where present, and ``dev_500``, a seeded
    sample of the scorable dev tasks. A gold query that takes longer than `query_timeout` seconds excludes its task.

    Raises:
        DataError: `source` is missing, damaged or not a Spider release, or `out` is not empty.
    """
    source, out = Path(source), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"Folder is not empty: {out}. Remove it, or choose another with --out.")
    with _opened(source) as release:
        prefix = _locate(source, release.names)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        except OSError as error:
            raise DataError(f"Cannot write next to {out}: {error}. Choose another folder with --out.") from error
        try:
            audit = _write(release, prefix, work, seed, query_timeout)
            work.chmod(0o755)
            if out.exists():
                out.rmdir()
            os.replace(work, out)
        except OSError as error:
            raise DataError(
                f"Cannot write {out}: {error}. Free some space, or choose another folder with --out."
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return audit


def _write(release: _Source, prefix: str, work: Path, seed: int, query_timeout: float) -> Audit:
    splits = {
        "train": _tasks(release, prefix, ("train_spider.json", "train_others.json"), "train"),
        "dev": _tasks(release, prefix, ("dev.json",), "dev"),
        "test": _tasks(release, prefix, ("test.json",), "test"),
    }
    splits = {name: tasks for name, tasks in splits.items() if tasks}
    if "dev" not in splits or "train" not in splits:
        raise DataError("No train or dev tasks in the release. Give a complete one.")
    _copy_databases(release, prefix, work)
    tables = {row["db_id"]: row for row in _load_json(release, prefix + "tables.json") if "db_id" in row}
    if prefix + "test_tables.json" in release.names:
        for row in _load_json(release, prefix + "test_tables.json"):
            tables.setdefault(row.get("db_id", ""), row)
    (work / "tables.json").write_text(json.dumps(list(tables.values()), indent=1) + "\n", encoding="utf-8")

    auditor = Auditor(work, query_timeout)
    audited = {name: auditor.audit(tasks, name) for name, tasks in splits.items()}
    usable = [t for t in audited["dev"] if t.scorable]
    chosen = sorted(random.Random(seed).sample(range(len(usable)), min(SUBSET, len(usable))))
    subset = [usable[i].model_copy(update={"split": "dev_500"}) for i in chosen]
    audited["dev_500"] = auditor.audit(subset, "dev_500")
    for name, tasks in audited.items():
        write_split(work, name, tasks)
    audit = auditor.write(audited)
    about = {
        "name": "spider",
        "source": SPIDER_PAGE,
        "license": "CC BY-SA 4.0",
        "seed": seed,
        "headline": "dev_500",
        "counts": {name: len(tasks) for name, tasks in audited.items()},
    }
    (work / "dataset.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return audit


def download_spider(folder: str | Path, *, url: str = SPIDER_URL, timeout: float = 30.0) -> Path:
    """Fetch the public archive into `folder` and return its path, ready for `import_spider`.

    The checksum of the first download is recorded next to the archive and every later call is compared with it; an
    archive that is there and agrees is not fetched again.

    Raises:
        DataError: no network, the answer is not a zip, or the checksum differs.
    """
    folder = Path(folder)
    archive, record = folder / "spider_data.zip", folder / "spider_data.zip.sha256"
    known = record.read_text()[:64] or None if record.is_file() else None
    if archive.is_file() and known is not None:
        if _sha256(archive) != known:
            raise DataError(f"Checksum in {record.name} does not match: {archive}. Delete the archive and rerun.")
        return archive
    part, host = folder / "spider_data.zip.part", urlsplit(url).hostname
    by_hand = f"download the archive from {SPIDER_PAGE} by hand and pass it with --from"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=timeout) as answer, part.open("wb") as file:
            total = int(answer.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, desc=archive.name, unit="B", unit_scale=True, unit_divisor=1024) as bar:
                while block := answer.read(_BLOCK):
                    file.write(block)
                    bar.update(len(block))
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error) or type(error).__name__
        raise DataError(
            f"Cannot download Spider from {host}: {reason}. Connect to the network, or {by_hand}."
        ) from error
    except OSError as error:
        raise DataError(f"Cannot write {part}: {error}. Free some space, or make the folder writable.") from error
    if total is not None and part.stat().st_size != total:
        raise DataError(f"Connection broken after {part.stat().st_size} of {total} bytes. Rerun the command.")
    if not zipfile.is_zipfile(part):
        part.unlink()
        raise DataError(f"Not a zip archive (often a quota page): the answer of {host}. Wait, or {by_hand}.")
    found = _sha256(part)
    if known is not None and found != known:
        raise DataError(
            f"Archive changed: recorded {known[:12]}, downloaded {found[:12]} (kept as {part.name}). "
            f"Delete {record} and rerun to accept the new one."
        )
    part.replace(archive)
    record.write_text(f"{found}  {archive.name}\n")
    return archive


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
