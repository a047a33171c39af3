"""Rows of question files (CSV, TSV, JSON, JSON lines and Parquet) and the meaning of their columns."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import pandas as pd

from sqlbench.errors import DataError
from sqlbench_data.archive import Release

COLUMNS = {
    "task_id": ("task_id", "question_id", "instance_id", "id"),
    "db_id": ("db_id", "db", "database", "database_id", "db_name"),
    "question": ("question", "nl_question", "utterance"),
    "gold": ("gold", "query", "sql", "gold_sql", "gold_query"),
    "evidence": ("evidence", "hint", "external_knowledge"),
    "hardness": ("hardness", "difficulty"),
    "split": ("split",),
}
"""Column names that published data sets use for the fields of a task, the likeliest first; case does not matter."""

Row = dict[str, Any]
Read = Row | tuple[str, str]
"""A row, or the reason and detail of why it cannot be used."""


def find_columns(file: str, present: Iterable[str], names: Mapping[str, str | None]) -> dict[str, str]:
    """Find the column of each field of a task."""
    by_name = {str(name).lower(): str(name) for name in reversed(list(present))}
    columns = {}
    for part, usual in COLUMNS.items():
        custom = names.get(part)
        if custom and custom.lower() not in by_name:
            listed = ", ".join(reversed(by_name.values())) or "none"
            raise DataError(f"No column '{custom}' in {file}. Its columns are: {listed}.")
        there = [by_name[name.lower()] for name in ([custom] if custom else usual) if name.lower() in by_name]
        if there:
            columns[part] = there[0]
    return columns


def cell_text(value: Any) -> str:
    """Return a cell as text; a missing cell is an empty text."""
    return "" if value is None or (isinstance(value, float) and value != value) else str(value).strip()


def read_rows(release: Release, name: str) -> Iterator[tuple[int, Read]]:
    """Yield the numbered rows of a file; a row that cannot be read yields its reason and detail."""
    suffix, where = PurePosixPath(name).suffix.lower(), f"{name} of {release.source}"
    try:
        with release.open(name) as file:
            if suffix == ".json":
                rows = json.load(file)
                if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                    raise DataError(f"Not a list of objects: {where}. Give a JSON list with one object per question.")
                yield from enumerate(rows, 1)
            elif suffix == ".jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield number, _json_line(line)
            elif suffix in (".csv", ".tsv"):
                lines = io.TextIOWrapper(file, "utf-8-sig", newline="")
                reader = csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ",")
                for row in reader:
                    extra = row.pop(None, None)
                    yield reader.line_num, row if extra is None else ("too_many_cells", f"{extra!r:.60}")
            elif suffix == ".parquet":
                for number, row in enumerate(pd.read_parquet(io.BytesIO(file.read())).to_dict("records"), 1):
                    yield number, {str(key): value for key, value in row.items()}
            else:
                raise DataError(f"Unknown format: {name}. Give a .csv, .tsv, .json, .jsonl or .parquet file.")
    except (ValueError, RecursionError, csv.Error, OSError) as error:
        if isinstance(error, DataError):
            raise
        kind = {".json": "JSON", ".parquet": "Parquet"}.get(suffix, "UTF-8 text with commas or tabs")
        why = " ".join(str(error).split())[:200]
        raise DataError(f"Not {kind}: {where} ({why}). Correct it, or get it again.") from error


def _json_line(line: bytes) -> Read:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return "not_json", " ".join(str(error).split())[:100]
    return row if isinstance(row, dict) else ("not_an_object", f"{row!r:.60}")
