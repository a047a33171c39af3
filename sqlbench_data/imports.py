"""Import of questions with gold queries and their databases as an audited data set folder.

`import_release` takes a published release (`sqlbench_data.layouts`), `import_table` a file of your own. Rows that
cannot be tasks are left out. ``problems.csv`` lists them, with those that the gold audit excludes. Rows are
numbered by the lines of CSV (the header is line 1) and JSON lines, and by the records of JSON and Parquet.

The import is written beside its destination and moved there at the end, so an existing folder is complete. Importing
again replaces what the same kind of import wrote, and nothing else. The same input gives the same bytes.

Limitation: if several folders of a release hold a database of the same name, the first folder by name is used.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

import pandas as pd
from tqdm.auto import tqdm

from sqlbench.data.audit import Audit, Auditor
from sqlbench.data.tasks import Task, with_evidence, write_split
from sqlbench.database.sqlite_file import SIDE_FILES, merge
from sqlbench.errors import DataError
from sqlbench_data.archive import Release, open_release
from sqlbench_data.layouts import LAYOUTS, Layout
from sqlbench_data.rows import Read, Row, cell_text, find_columns, read_rows

SUBSET = 500
"""Size of a sampled split in tasks, the same as in the evaluation of the seed experiment."""
SHOWN = 10
"""Number of problems that a summary lists."""
_NAME = re.compile(r"\w[\w .+-]*")
_SUFFIXES = (".sqlite", ".sqlite3", ".db")


class Problem(NamedTuple):
    """A row that cannot be scored."""

    file: str
    row: int
    task_id: str
    """Empty where the row is not a task."""
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"row {self.row} of {self.file}: {self.reason}{f' ({self.detail})' if self.detail else ''}"


class Import(NamedTuple):
    """Outcome of an import: the gold audit, and the rows that cannot be scored."""

    audit: Audit
    problems: list[Problem]

    def summary(self) -> str:
        """Describe each split in one line, then the first problems."""
        lines = [self.audit.summary(), *map(str, self.problems[:SHOWN])]
        if self.problems:
            counts = Counter(problem.reason for problem in self.problems).most_common()
            reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
            lines.append(f"rows that cannot be scored: {len(self.problems)} ({reasons}); all are in problems.csv")
        return "\n".join(lines)


@dataclass
class _Rows:
    """Tasks by split, with the file and row of each."""

    db_id: str = ""
    """The database of every row, if there is only one."""
    tasks: dict[str, list[Task]] = field(default_factory=dict)
    origins: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def add(self, file: str, split: str, rows: Iterable[tuple[int, Read]], **names: str | None) -> None:
        """Make tasks of rows; `names` gives the columns that do not have their usual names."""
        rows = list(rows)
        columns = find_columns(
            file, dict.fromkeys(key for _, row in rows if isinstance(row, dict) for key in row), names
        )
        tasks_before = sum(map(len, self.tasks.values()))
        for number, row in rows:
            outcome = row if isinstance(row, tuple) else self._task(split, row, columns)
            if isinstance(outcome, Task):
                self.tasks.setdefault(outcome.split, []).append(outcome)
                self.origins.setdefault(outcome.split, []).append((file, number))
            else:
                self.problems.append(Problem(file, number, "", *outcome))
        if sum(map(len, self.tasks.values())) == tasks_before:
            first = next((f"; {p}" for p in self.problems if p.file == file), "")
            raise DataError(f"No usable task in {file}: {len(rows)} rows{first}. Check its columns and rows.")

    def _task(self, split: str, row: Row, columns: Mapping[str, str]) -> Task | tuple[str, str]:
        cells = {name: cell_text(row.get(column)) for name, column in columns.items()}
        cells["db_id"] = self.db_id or cells.get("db_id", "")
        for name in ("question", "gold", "db_id"):
            if not cells.get(name):
                return f"no_{name}", ""
        for name in ("db_id", "split"):
            if cells.get(name) and not _NAME.fullmatch(cells[name]):
                return f"invalid_{name}", f"{cells[name]!r:.60}"
        split = cells.get("split") or split
        return Task(
            task_id=cells.get("task_id") or f"{split}-{len(self.tasks.get(split, [])):05d}",
            db_id=cells["db_id"],
            question=with_evidence(cells["question"], cells.get("evidence", "")),
            gold=cells["gold"],
            split=split,
            hardness=cells.get("hardness", ""),
        )


def _databases(release: Release, prefix: str, folders: str) -> dict[str, list[str]]:
    """Find the files of each database: ``<db_id>.sqlite``, with others if it is in a folder of that name."""
    inside = re.compile(re.escape(prefix) + folders + "/") if folders else re.compile("")
    paths = [PurePosixPath(name) for name in release.names if inside.match(name)]
    paths = [path for path in paths if path.suffix.lower() in _SUFFIXES]
    own_folders = {path.parent for path in paths if path.stem == path.parent.name}
    databases: dict[str, list[str]] = {}
    for path in paths:
        name = path.parent.name if path.parent in own_folders else path.stem
        files = databases.setdefault(name, [])
        if not files or PurePosixPath(files[0]).parent == path.parent:
            files.append(str(path))
    return databases


def _copy_databases(release: Release, files: Mapping[str, list[str]], names: Iterable[str], out: Path) -> None:
    """Copy the named databases and BIRD's descriptions of their columns."""
    for db_id in tqdm(sorted(set(names) & files.keys()), desc="databases", unit="db"):
        folder = out / "database" / db_id
        folder.mkdir(parents=True)
        for name in files[db_id]:
            target = folder / f"{PurePosixPath(name).stem if len(files[db_id]) > 1 else db_id}.sqlite"
            logs = [suffix for suffix in SIDE_FILES if name + suffix in release.names]
            for suffix in ("", *logs):
                release.copy(name + suffix, target.with_name(target.name + suffix))
            if logs:  # a part of the data is in a log next to the database
                try:
                    merge(str(target))
                except sqlite3.Error as error:
                    what = " and ".join([name, *(name + suffix for suffix in logs)])
                    raise DataError(f"Cannot merge {what} of the release: {error}. Import it whole.") from error
        described = f"{PurePosixPath(files[db_id][0]).parent}/database_description/"
        for name in [name for name in release.names if name.startswith(described) and name.endswith(".csv")]:
            (folder / "database_description").mkdir(exist_ok=True)
            release.copy(name, folder / "database_description" / PurePosixPath(name).name)


@contextmanager
def _replaced(out: Path, name: str) -> Iterator[Path]:
    """Yield a folder to write that becomes `out` at the end, in place of an earlier import of the same kind."""
    try:
        old = json.loads((out / "dataset.json").read_text(encoding="utf-8"))["name"] == name
    except (OSError, ValueError, LookupError, TypeError):
        old = False
    if out.exists() and not old and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"Folder is not empty: {out}. Remove it, or choose another with --out.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise DataError(f"Cannot write next to {out}: {error}. Choose another folder with --out.") from error
    try:
        yield work
        work.chmod(0o755)
        if old:
            os.replace(out, work / ".old")
        elif out.exists():
            out.rmdir()
        os.replace(work, out)
        shutil.rmtree(out / ".old", ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"Cannot write {out}: {error}. Free some space, or choose another folder with --out."
        ) from error
    except DataError as error:
        raise DataError(str(error).replace(str(work), str(out))) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _locate(layout: Layout, release: Release) -> str | None:
    """Find the prefix ('' or ending in '/') of the folder that holds a release; the shallowest one wins."""
    present, files = set(release.names), {file for group in layout.splits.values() for file in group}
    prefixes = {name[: -len(path.name)] for name in present if (path := PurePosixPath(name)).name in files}
    for prefix in sorted(prefixes, key=lambda p: (p.count("/"), p)):
        if all(prefix + file in present for file in layout.required) and _databases(release, prefix, layout.databases):
            return prefix
    return None


def import_release(
    name: str, source: str | Path, out: str | Path, *, seed: int = 0, query_timeout: float | None = None
) -> Import:
    """Write a published release, zipped or unpacked, as a data set.

    Args:
        name: its layout, one of `LAYOUTS`.
        source: the archive or folder.
        out: folder to write.
        seed: seed of a sampled split.
        query_timeout: seconds after which a gold query excludes its task; the layout's by default.

    Raises:
        DataError: `source` is missing, damaged or of another layout, or `out` holds something else.
    """
    layout = LAYOUTS[name]
    with open_release(Path(source), layout.page) as release, _replaced(Path(out), name) as work:
        prefix = _locate(layout, release)
        if prefix is None:
            wanted = layout.required or [file for group in layout.splits.values() for file in group]
            other = next((key for key, other in LAYOUTS.items() if _locate(other, release) is not None), "")
            hint = f"Run 'sqlbench data {other}'" if other else "Give one that holds"
            listed = "" if other else f" {', '.join(wanted)} and databases in {layout.databases}/"
            raise DataError(f"Not a {layout.title} release: {source}. {hint}{listed}.")
        rows = _Rows()
        for split, files in layout.splits.items():
            for file in [file for file in files if prefix + file in release.names]:
                read = read_rows(release, prefix + file)
                adapted = ((n, layout.adapt(release, prefix, r) if isinstance(r, dict) else r) for n, r in read)
                rows.add(file, split, adapted)
        _copy_databases(release, _databases(release, prefix, layout.databases), _used(rows), work)
        tables: dict[str, Row] = {}
        for file in [prefix + file for file in layout.tables if prefix + file in release.names]:
            for _, row in read_rows(release, file):
                if isinstance(row, dict) and "db_id" in row:
                    tables.setdefault(row["db_id"], row)
        if tables:
            text = json.dumps(list(tables.values()), indent=1)
            (work / "tables.json").write_text(text + "\n", encoding="utf-8")
        about = {"name": name, "source": layout.page, "license": layout.license, "seed": seed}
        about["query_timeout"] = layout.query_timeout if query_timeout is None else query_timeout
        return _write(rows, work, about, layout.headline, layout.sampled)


def import_table(
    file: str | Path,
    db: str | Path,
    out: str | Path,
    *,
    split: str = "dev",
    query_timeout: float = 5.0,
    **columns: str | None,
) -> Import:
    """Write a CSV, JSON, JSON lines or Parquet file of questions with gold queries as a data set.

    Args:
        file: one question per row. A column ``split`` tells the splits apart.
        db: a SQLite file or the address of a database, used for every row; or a folder or zip archive of files
            ``<db_id>.sqlite``.
        out: folder to write.
        split: name of the split where there is no such column.
        query_timeout: seconds after which a gold query excludes its task.
        columns: names of columns by field of `sqlbench_data.rows.COLUMNS`, where they are not the usual ones.

    Raises:
        DataError: a file is missing or damaged, no row is usable, or `out` holds something else.
    """
    file, address = Path(file), str(db) if "://" in str(db) else ""
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise DataError(f"Invalid address of --db: {error}. Give one such as postgresql://user@host/name.") from error
    if parts.password:
        raise DataError("Password in the address of --db. Leave it out, and give it in PGPASSWORD or ~/.pgpass.")
    if not _NAME.fullmatch(split):
        raise DataError(f"Invalid name of a split: {split!r}. Use letters, digits, '-' and '_'.")
    with open_release(file) as source, _replaced(Path(out), "import") as work:
        path = Path(parts.path if address else db)
        single = address or (path.is_file() and path.suffix.lower() != ".zip")
        one = re.sub(r"[^\w .+-]|^\W", "_", path.stem or "database") if single else ""
        rows = _Rows(one)
        rows.add(file.name, split, read_rows(source, file.name), **columns)
        if address:
            (work / "database").mkdir()
            (work / "database" / f"{one}.url").write_text(address.replace(":@", "@", 1) + "\n", encoding="utf-8")
        else:
            with open_release(path) as release:
                files = {one: [path.name]} if one else _databases(release, "", "")
                _copy_databases(release, files, _used(rows), work)
        about = {"name": "import", "source": file.name, "query_timeout": query_timeout}
        return _write(rows, work, about, ("dev", split, *rows.tasks))


def _used(rows: _Rows) -> set[str]:
    return {task.db_id for tasks in rows.tasks.values() for task in tasks}


def _write(rows: _Rows, work: Path, about: Row, headline: tuple[str, ...], sampled: str = "") -> Import:
    """Audit the tasks and write everything but the databases."""
    auditor = Auditor(work, about["query_timeout"])
    audited = {name: auditor.audit(tasks, name) for name, tasks in rows.tasks.items()}
    problems = list(rows.problems)
    for (file, row), finding in zip([o for part in rows.origins.values() for o in part], auditor.findings, strict=True):
        if finding.excluded:
            problems.append(Problem(file, row, finding.task_id, finding.excluded, finding.detail))
    if sampled:
        usable, name = [task for task in audited[sampled] if task.scorable], f"{sampled}_{SUBSET}"
        chosen = sorted(random.Random(about["seed"]).sample(range(len(usable)), min(SUBSET, len(usable))))
        audited[name] = auditor.audit([usable[i].model_copy(update={"split": name}) for i in chosen], name)
    for name, tasks in audited.items():
        write_split(work, name, tasks)
    audit = auditor.write(audited)
    order = {file: n for n, file in enumerate(dict.fromkeys(problem.file for problem in problems))}
    problems.sort(key=lambda problem: (order[problem.file], problem.row))
    pd.DataFrame(problems, columns=list(Problem._fields)).to_csv(work / "problems.csv", index=False)
    about |= {
        "headline": next(name for name in headline if name in audited),
        "counts": {name: len(tasks) for name, tasks in audited.items()},
        "problems": len(problems),
    }
    (work / "dataset.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return Import(audit, problems)
