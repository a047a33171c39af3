"""Task rows, splits and the layout that every data set shares.

Every data set is a folder::

    <root>/dataset.json                          name, source, seed, counts, headline split
    <root>/<split>.parquet                       one `Task` per row
    <root>/database/<db_id>/<db_id>.sqlite       the databases; or <db_id>.duckdb, or Parquet and CSV files,
    <root>/database/<db_id>.url                  or the address of one, such as postgresql://user@host/name
    <root>/database/<db_id>/*.sqlite             further ones for test-suite accuracy
    <root>/tables.json                           schemas in Spider's form, where the release has them
    <root>/audit.parquet, audit.json             the gold audit (see `sqlbench.data.audit`)
    <root>/problems.csv                          rows of an import that cannot be scored, with the reason
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from sqlbench.database.target import TABLES, without_password
from sqlbench.errors import DataError
from sqlbench.interfaces import Dataset, is_plugin, load_plugin
from sqlbench.text import Text

Name = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)]
"""A text; a number, as other data sets have, becomes its digits."""


class Task(BaseModel):
    """One question on one database with its gold query."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task_id: Name
    db_id: Name
    question: Text
    gold: Text
    split: str
    hardness: str = ""
    """The data set's own level, else ``easy``, ``medium``, ``hard`` or ``extra`` by Spider's published rules."""
    kind: str = ""
    """Query construct, such as ``join_group`` (pocket only)."""
    phrasing: str = ""
    """Phrasing family (pocket only)."""
    scorable: bool = True
    """False where the audit found that no verdict on this task can be trusted; such tasks are counted, never run."""
    excluded: str = ""
    """Reason that the task is not scorable; empty otherwise."""
    needs_order: bool = False
    returns_rows: bool = True

    @property
    def key(self) -> str:
        """Return the content key: the same for equal (database, question, gold), regardless of the row number."""
        return hashlib.sha256("\x1f".join((self.db_id, self.question, self.gold)).encode()).hexdigest()[:16]


def with_evidence(question: str, evidence: str) -> str:
    """Return a question with the outside knowledge that it needs at its end, where every prompt shows it."""
    return f"{question} Hint: {evidence}" if evidence else question


def write_split(root: Path, split: str, tasks: list[Task]) -> Path:
    """Write one split as Parquet, whole or not at all, and return its path; the same tasks give the same bytes."""
    path, new = root / f"{split}.parquet", root / f".{split}.parquet.new"
    frame = pd.DataFrame([t.model_dump() for t in tasks], columns=list(Task.model_fields))
    frame.to_parquet(new, index=False)
    os.replace(new, path)
    return path


class DataSet:
    """A data set folder opened for reading.

    Raises:
        DataError: the folder, its ``dataset.json``, a split or a database is missing or malformed.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        note = self.root / "dataset.json"
        if not note.is_file():
            raise DataError(
                f"No data set in {self.root}: dataset.json is missing. Make one with "
                f"'sqlbench data pocket --out {self.root}', or import one ('sqlbench data --help')."
            )
        try:
            self.about: dict[str, Any] = dict(json.loads(note.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"Cannot read {note}: {error}. Remove the folder and make the data set again.") from error

    @property
    def headline(self) -> str | None:
        """Return the split on which results are reported, if the data set names one."""
        return self.about.get("headline")

    def splits(self) -> list[str]:
        """Return the sorted names of the splits."""
        return sorted(p.stem for p in self.root.glob("*.parquet") if p.stem != "audit")

    def load(self, split: str) -> list[Task]:
        """Return all tasks of a split, in file order, unscorable ones included.

        A column ``evidence``, as in BIRD, is appended to the question: "... Hint: <evidence>".
        """
        path = self.root / f"{split}.parquet"
        if not path.is_file():
            raise DataError(
                f"Unknown split of {self.root}: {split}. Choose one of: {', '.join(self.splits()) or 'none'}."
            )
        try:
            rows = pd.read_parquet(path).to_dict("records")
        except Exception as error:
            why = f"{type(error).__name__}: {error}".rstrip(".")
            raise DataError(f"Cannot read {path}: {why}. Make the data set again.") from error
        return [_task(path, number, {str(k): v for k, v in row.items()}) for number, row in enumerate(rows, 1)]

    def database(self, db_id: str) -> Path | str:
        """Return the path or address of a database."""
        if databases := find_databases(self.root, db_id):
            return databases[0]
        where = self.root / "database" / db_id / db_id
        raise DataError(
            f"No database '{db_id}' in {self.root}. Put it at {where}.sqlite, or its address into {db_id}.url."
        )


def find_databases(root: Path, db_id: str) -> list[Path | str]:
    """Find the address of a database or its files, the one with its name first; none where it is missing.

    Raises:
        DataError: the address holds a password.
    """
    folder = root / "database"
    present = {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}  # a db_id may be any text
    if url := present.get(f"{db_id}.url"):
        return [_address(url)]
    inside = present.get(db_id)
    files = sorted(path for path in inside.iterdir() if path.is_file()) if inside and inside.is_dir() else []
    databases: list[Path | str] = [
        p for p in files if ".sqlite" in p.name and not p.name.endswith(("-journal", "-wal", "-shm"))
    ]
    databases += [p for p in files if p.suffix == ".duckdb"]
    if inside and not databases and any(path.name.lower().endswith(TABLES) for path in files):
        databases = [inside]
    return sorted(databases, key=lambda path: Path(path).stem != db_id)


def _address(url: Path) -> str:
    """Read the address of a database; a path in it is relative to its folder.

    It never names code: a data set from elsewhere must not run any.
    """
    text = url.read_text(encoding="utf-8").strip()
    if (shown := without_password(text)) != text:
        raise DataError(f"Password in {url}: {shown}. Leave it out, and give it in PGPASSWORD or ~/.pgpass.")
    return text if "://" in text else str(url.parent / text)


def _task(path: Path, number: int, row: dict[str, Any]) -> Task:
    hint = row.pop("evidence", None)
    try:
        task = Task(**row)
    except ValidationError as error:
        wrong = error.errors()[0]
        field, value = wrong["loc"][0], "" if wrong["type"] == "missing" else f", not {wrong['input']!r:.60}"
        raise DataError(
            f"Invalid row {number} of {path}, field '{field}': {wrong['msg']}{value}. Correct it."
        ) from error
    return task.model_copy(update={"question": with_evidence(task.question, hint if isinstance(hint, str) else "")})


def open_dataset(source: str | Path) -> Dataset:
    """Open a data set folder, or one of your own by ``module:attribute``.

    Raises:
        DataError: the folder does not hold a data set.
        PluginError: the name cannot be loaded.
    """
    if is_plugin(source):
        return load_plugin("dataset", str(source))
    return DataSet(source)


def headline_split(dataset: Dataset) -> str:
    """Name the split on which results are reported: the data set's `headline`, else ``dev`` or its only split.

    Raises:
        DataError: the data set has several splits and none is the headline.
    """
    splits = dataset.splits()
    name = getattr(dataset, "headline", None) or ("dev" if "dev" in splits else splits[0] if len(splits) == 1 else "")
    if not name:
        raise DataError(f"No headline split in the data set. Name one of: {', '.join(splits) or 'none'}.")
    return name
