"""The gold audit: runs every gold query to find the tasks of a data set whose verdicts can be trusted.

A task is excluded (kept in its split, counted, never scored) when

- ``missing_database``: the data set does not hold its database;
- ``database_without_rows``: no table of its database has a row, so any query without rows matches;
- ``gold_error``, ``gold_timeout``, ``gold_too_large``, ``gold_rejected``: its gold query does not run, or not within
  the limits;
- ``self_check``: its gold query, scored as a prediction, is not accepted in both reward modes (for example because it
  gives another answer at every call).

Three weaker findings are recorded without exclusion: a gold query that returns no rows, one that reads a table without
rows, and one whose result some small change leaves the same (`sqlbench.data.mutation`), so that a wrong prediction
scores. The audit writes ``audit.parquet`` (one row per task and split) and ``audit.json`` (counts per split and
reason, the excluded tasks, empty tables, and the score of a policy that answers everything with one constant query).
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable
from contextlib import closing, suppress
from functools import cache
from pathlib import Path

import pandas as pd
from pydantic import BaseModel, ConfigDict
from tqdm.auto import tqdm

from sqlbench.clauses import hardness
from sqlbench.data.mutation import unchanged_by
from sqlbench.data.tasks import DataSet, Task, find_databases, write_split
from sqlbench.database import engine
from sqlbench.database.engine import cached_database
from sqlbench.database.schema import quote
from sqlbench.database.types import Limits
from sqlbench.errors import DatabaseError, DataError
from sqlbench.interfaces import Database
from sqlbench.reward import GOLD_ROWS, score
from sqlbench.sql_analysis import outer_order, subject

MODES = {"reference": False, "strict": True}
NO_ROWS = "SELECT 1 WHERE 0"
"""The constant query that matches every zero-row gold answer if the reward allows it."""


class Finding(BaseModel):
    """Findings of the audit on one task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: str
    task_id: str
    key: str
    db_id: str
    gold_runs: bool = False
    n_rows: int = 0
    needs_order: bool = False
    """True if row order matters: the gold query itself, not a subquery of it, ends in ORDER BY."""
    hardness: str = ""
    empty_tables: str = ""
    """Comma-separated tables without rows that the gold query reads."""
    unchanged_by: str = ""
    """Comma-separated mutations of the gold query that leave its result as it is (see `sqlbench.data.mutation`)."""
    excluded: str = ""
    detail: str = ""
    """The database's message, or the verdict of the self-check."""


class SplitAudit(BaseModel):
    """Counts of one split. `tasks` = `scorable` + the sum of `excluded`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: int
    scorable: int
    excluded: dict[str, int]
    with_rows: int
    """Tasks whose database exists and has rows."""
    zero_rows: int
    """Gold queries that run and return no rows, excluded tasks included."""
    zero_rows_scorable: int
    reads_empty_table: int
    needs_order: int
    hardness: dict[str, int]
    """Scorable tasks by hardness."""
    unchanged: int
    """Scorable tasks that some mutation of the gold query leaves with the same result."""
    unchanged_by: dict[str, int]
    """The same by mutation; a task counts once per mutation."""
    constant_floor: dict[str, float]
    """Share of scorable tasks that one constant query earns: the best one found (modes ``reference`` and ``strict``),
    and one without rows (``reference_no_rows``, ``strict_no_rows``)."""


class Audit(BaseModel):
    """Content of ``audit.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    splits: dict[str, SplitAudit]
    missing_databases: dict[str, int]
    """Database to number of tasks that name it, each task counted once."""
    databases_without_rows: dict[str, int]
    tables_without_rows: dict[str, list[str]]
    """Tables without rows, by database that has rows in others."""
    excluded: list[Finding]
    unreadable_tables: dict[str, list[str]] = {}
    """Tables and views, by database, that are left out because a module of SQLite is missing."""

    def summary(self) -> str:
        """Describe each split in one line, as the command line prints it."""
        lines = []
        for name, s in self.splits.items():
            reasons = ", ".join(f"{n} {reason}" for reason, n in s.excluded.items()) or "none"
            lines.append(
                f"{name}: {s.tasks} tasks, {s.scorable} scorable; excluded: {reasons}; without rows: {s.zero_rows}; "
                f"result unchanged by some mutation of the gold query: {s.unchanged}"
            )
        for db_id, names in self.unreadable_tables.items():
            lines.append(f"{db_id}: left out, since SQLite cannot read them here: {', '.join(names)}")
        return "\n".join(lines)


class Auditor:
    """Audits tasks over the databases of one data set folder; equal (database, gold) pairs are run once."""

    def __init__(self, root: str | Path, query_timeout: float = 5.0) -> None:
        self.root = Path(root)
        self.limits = Limits(query_timeout, rows=GOLD_ROWS)
        self.findings: list[Finding] = []
        self._gold: dict[tuple[str, str], dict] = {}
        self._values: dict[tuple[str, str], str] = {}  # gold answers that are one value, as SQL literals
        self._tables = cache(self._read_tables)

    def audit(self, tasks: list[Task], split: str) -> list[Task]:
        """Fill in the audit's fields of the tasks; keep the findings for `write`."""
        audited = []
        for task in tqdm(tasks, desc=f"gold audit of {split}", unit="task", mininterval=0.5):
            pair = (task.db_id, task.gold)
            if pair not in self._gold:
                self._gold[pair] = self._examine(*pair)
            finding = Finding(
                split=split,
                task_id=task.task_id,
                key=task.key,
                db_id=task.db_id,
                hardness=task.hardness or hardness(task.gold, self._dialect(task.db_id)),
                **self._gold[pair],
            )
            self.findings.append(finding)
            audited.append(
                task.model_copy(
                    update={
                        "hardness": finding.hardness,
                        "scorable": not finding.excluded,
                        "excluded": finding.excluded,
                        "needs_order": finding.needs_order,
                        "returns_rows": finding.n_rows > 0,
                    }
                )
            )
        return audited

    def write(self, splits: dict[str, list[Task]]) -> Audit:
        """Write ``audit.parquet`` and ``audit.json`` for the tasks audited so far."""
        frame = pd.DataFrame([f.model_dump() for f in self.findings], columns=list(Finding.model_fields))
        frame.to_parquet(self.root / "audit.parquet", index=False)
        first = {f.key: f for f in reversed(self.findings)}.values()  # a task of several splits counts once
        empty = {db: t for db in sorted({f.db_id for f in self.findings}) if (t := self._tables(db)) is not None}
        audit = Audit(
            splits={name: self._count(name, tasks) for name, tasks in splits.items()},
            missing_databases=_tally(f.db_id for f in first if f.excluded == "missing_database"),
            databases_without_rows=_tally(f.db_id for f in first if f.excluded == "database_without_rows"),
            tables_without_rows={db: sorted(bare) for db, (filled, bare) in empty.items() if filled and bare},
            excluded=[f for f in self.findings if f.excluded],
            unreadable_tables={db: list(names) for db in empty if (names := self._database(db).schema().unreadable)},
        )
        (self.root / "audit.json").write_text(audit.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return audit

    def _count(self, split: str, tasks: list[Task]) -> SplitAudit:
        findings = [f for f in self.findings if f.split == split]
        scorable = [f for f in findings if not f.excluded]
        without = ("missing_database", "database_without_rows")
        return SplitAudit(
            tasks=len(findings),
            scorable=len(scorable),
            excluded=_tally(f.excluded for f in findings if f.excluded),
            with_rows=sum(f.excluded not in without for f in findings),
            zero_rows=sum(f.gold_runs and f.n_rows == 0 for f in findings),
            zero_rows_scorable=sum(f.n_rows == 0 for f in scorable),
            reads_empty_table=sum(bool(f.empty_tables) for f in findings),
            needs_order=sum(f.needs_order for f in findings),
            hardness=_tally(f.hardness for f in scorable),
            unchanged=sum(bool(f.unchanged_by) for f in scorable),
            unchanged_by=_tally(name for f in scorable if f.unchanged_by for name in f.unchanged_by.split(",")),
            constant_floor=self._floor([t for t in tasks if t.scorable]),
        )

    def _floor(self, tasks: list[Task]) -> dict[str, float]:
        """Score constant queries: one without rows, and the most common single values of gold answers."""
        common = Counter(v for t in tasks if (v := self._values.get((t.db_id, t.gold)))).most_common(5)
        candidates = {NO_ROWS: [t for t in tasks if not t.returns_rows]}
        for value, _ in sorted(common):
            candidates[f"SELECT {value}"] = [t for t in tasks if self._values.get((t.db_id, t.gold)) == value]
        floor = {}
        for mode, strict in MODES.items():
            shares = {
                query: sum(score(t.gold, query, self._database(t.db_id), strict=strict).match == 1 for t in possible)
                / max(1, len(tasks))
                for query, possible in candidates.items()
            }
            floor[mode] = max(shares.values())
            floor[f"{mode}_no_rows"] = shares[NO_ROWS]
        return floor

    def _examine(self, db_id: str, gold: str) -> dict:
        """Run the gold query and return the fields of a `Finding`."""
        tables = self._tables(db_id)
        if tables is None:
            return {"excluded": "missing_database", "detail": f"no {db_id}.sqlite"}
        filled, empty = tables
        database = self._database(db_id)
        result = database.execute(gold)
        if (
            result.status == "ok"
            and len(result.rows) == len(result.columns) == 1
            and (value := _literal(result.rows[0][0]))
        ):
            self._values[db_id, gold] = value
        order = outer_order(gold, database.dialect)
        fields = {
            "needs_order": "order by" in " ".join(gold.lower().split()) if order is None else order,
            "gold_runs": result.status == "ok",
            "n_rows": len(result.rows),
            "empty_tables": ",".join(sorted(self._reads(db_id, gold) & empty)) if empty else "",
        }
        if not filled:
            return fields | {"excluded": "database_without_rows"}
        if result.status != "ok":
            return fields | {"excluded": f"gold_{result.status}", "detail": result.error or ""}
        for mode, strict in MODES.items():
            verdict = score(gold, gold, database, strict=strict)
            if verdict.match != 1:
                return fields | {"excluded": "self_check", "detail": f"{mode} mode: {verdict.reason}"}
        return fields | {"unchanged_by": ",".join(sorted(set(unchanged_by(gold, database))))}

    def _database(self, db_id: str) -> Database:
        return cached_database(find_databases(self.root, db_id)[0], self.limits)

    def _dialect(self, db_id: str) -> str:
        return "sqlite" if self._tables(db_id) is None else self._database(db_id).dialect

    def _read_tables(self, db_id: str) -> tuple[set[str], set[str]] | None:
        """Return the lower-case names of the tables with and without rows; None where the database is missing."""
        if not find_databases(self.root, db_id):
            return None
        filled: set[str] = set()
        empty: set[str] = set()
        try:
            database = self._database(db_id)
            for table in database.schema().tables:
                if not table.view:
                    result = database.execute(f"SELECT 1 FROM {quote(table.name, table.schema)} LIMIT 1")
                    if not result.ok:
                        raise DatabaseError(f"{table.label}: {result.error}")
                    (filled if result.rows else empty).add(table.name.lower())
        except DatabaseError as error:
            raise DataError(
                f"Cannot read database '{db_id}': {str(error).rstrip('.')}. Check it, or import it again."
            ) from error
        return filled, empty

    def _reads(self, db_id: str, gold: str) -> set[str]:
        """Return the lower-case names of the tables that a query reads; SQLite itself reports them, even in views."""
        database = self._database(db_id)
        if not isinstance(database, engine.Database) or database.dialect != "sqlite":
            parsed = subject(gold, database.dialect)
            return set(parsed.tables) if parsed else set()
        tables: set[str] = set()

        def note(action: int, first: str | None, *rest: str | None) -> int:
            if action == sqlite3.SQLITE_READ and first:
                tables.add(first.lower())
            return sqlite3.SQLITE_OK

        with closing(sqlite3.connect(database.uri(), uri=True)) as connection, suppress(sqlite3.Error):
            connection.set_authorizer(note)
            connection.execute(f"EXPLAIN {gold}")  # a query that does not compile is reported by its execution
        return tables


def _literal(value: object) -> str:
    """Write a value as SQL; empty where it has no short plain form."""
    if value is None:
        return "NULL"
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return repr(value) if isinstance(value, int | float) else ""


def _tally(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def audit_dataset(root: str | Path, query_timeout: float | None = None) -> Audit:
    """Audit every split of a data set folder, rewrite the splits with the findings, and write the audit's two files.

    Args:
        root: the folder.
        query_timeout: seconds that a gold query may take; by default as many as in the import, else 5.

    Raises:
        DataError: the folder is not a data set, or one of its databases is damaged.
    """
    data = DataSet(root)
    auditor = Auditor(data.root, query_timeout or data.about.get("query_timeout", 5.0))
    audited = {split: auditor.audit(data.load(split), split) for split in data.splits()}
    for split, tasks in audited.items():
        write_split(data.root, split, tasks)
    return auditor.write(audited)


def read_audit(root: str | Path) -> Audit:
    """Read the audit of a data set folder, as `audit_dataset` wrote it.

    Raises:
        DataError: the folder was not audited, or by another version.
    """
    path = Path(root) / "audit.json"
    try:
        return Audit.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problem = type(error).__name__
        raise DataError(
            f"No usable gold audit in {root} ({problem}). Run 'sqlbench data audit --data {root}'."
        ) from error
