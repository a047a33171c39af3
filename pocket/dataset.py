"""The built-in data set: generated questions on 63 small databases of our own, byte for byte the same for a seed.

Splits cross schemas (seen or unseen in pretraining) with phrasing families (`pocket.phrasing`): ``train`` has the seen
schemas, synthetic ones, and families A, B and C; ``dev_<seen|unseen>_<pretrain|train|never>`` have family A, families B
and C, and family D. The headline split is unseen schemas with phrasing outside pretraining. No (database, gold) pair of
the dev splits occurs in pretraining or in ``train``. The ``sealed`` split is a data set of its own, written only on
request: its schemas, its family E and its rows are used nowhere else.

Every gold query runs and returns rows, no ordering depends on ties, and every small change to it (an inverted
comparison, another column, a condition left out: `sqlbench.data.mutation`) changes its result.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

from tqdm.auto import tqdm

from pocket.domains import Domain, SchemaGenerator, fill, read_domains
from pocket.phrasing import EVERYDAY, Skip
from pocket.pretraining import connect, held_out
from pocket.questions import WEIGHTS, Question, draw
from sqlbench.clauses import hardness
from sqlbench.data.mutation import unchanged_by
from sqlbench.data.tasks import DataSet, Task, write_split
from sqlbench.database.engine import open_database
from sqlbench.errors import DataError

VERSION = 2
"""Incremented with every change of the tasks; results of different versions are not comparable."""
TRAIN = {"A": 400, "B": 2200, "C": 2200}
"""Number of tasks of each phrasing family in the training split."""
TRAIN_EVERYDAY = 0.6
"""Probability that B and C use a word of A in the training split; lower than in the dev splits, because the policy
learns nothing from wording that it knows."""
MADE_UP = 40
"""Number of databases with synthetic names; only the training split has them, besides the seen ones."""
DEV = 400
"""Number of tasks of each dev cell."""
CELLS = {"pretrain": ("A",), "train": ("B", "C"), "never": ("D",)}
HEADLINE = "headline"
SEALED = "sealed"
_TURNS = 8
"""Number of databases tried for a construct before another construct is drawn."""
SEALED_TASKS = 800


class _Bench:
    """A filled domain with its open database, and the questions it accepts."""

    def __init__(self, domain: Domain, path: Path) -> None:
        self.domain = domain
        path.parent.mkdir(parents=True)
        with closing(connect(domain, str(path))) as connection:
            connection.execute("VACUUM")
        self.database = open_database(path)
        self._verdicts: dict[str, bool] = {}

    def draw(
        self, rng: Random, family: str, construct: str, everyday: float, fresh: Callable[[Question], bool]
    ) -> Question | None:
        """Draw a fresh and accepted question of a construct; None after 20 failed attempts."""
        for _ in range(20):
            try:
                question = draw(self.domain, rng, family, construct, everyday=everyday, telling=True)
            except Skip:
                return None
            if not fresh(question):
                continue
            if question.sql not in self._verdicts:
                self._verdicts[question.sql] = self.accepts(question)
            if self._verdicts[question.sql]:
                return question
        return None

    def accepts(self, question: Question) -> bool:
        """Return whether the gold result is worth asking for, has no ties, and differs from that of every mutant."""
        rows = self.database.execute(question.sql).rows
        if not rows or (len(rows) == 1 and all(cell in (None, 0) for cell in rows[0])):
            return False
        if question.keys:
            keys = self.database.execute(question.keys).rows
            if len(set(keys)) < len(keys):
                return False
        return next(unchanged_by(question.sql, self.database), None) is None


def _skeleton(sql: str) -> str:
    """Mask the names and literals of a query: hardness depends on the rest, which has few forms."""
    return re.sub(r"\b[a-z][a-z_]*\b(?!\()", "x", re.sub(r"'(?:[^']|'')*'|\b\d[\d.]*", "1", sql))


_hardness = functools.cache(hardness)


def _tasks(benches: list[_Bench], split: str, families: dict[str, int], rng: Random) -> list[Task]:
    """Draw the tasks of one split, evenly over its databases; no question (in dev no gold query) occurs twice."""
    dev = split != "train"
    everyday = EVERYDAY if dev else TRAIN_EVERYDAY
    seen: set[tuple[str, str]] = set()
    tasks: list[Task] = []

    def fresh(db_id: str, question: Question) -> bool:
        kept_apart = "unseen" in split or split == SEALED or held_out(db_id, question.sql) == dev
        return kept_apart and (db_id, question.sql if dev else question.text) not in seen

    for family, size in families.items():
        start = len(tasks)
        while len(tasks) - start < size:
            construct = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            for turn in range(_TURNS):  # drawing another construct at once would change their shares
                bench = benches[(len(tasks) - start + turn) % len(benches)]
                db_id = bench.domain.name
                question = bench.draw(rng, family, construct, everyday, partial(fresh, db_id))
                if question:
                    break
            if question is None:
                continue
            seen.add((db_id, question.sql if dev else question.text))
            tasks.append(
                Task(
                    task_id=f"{split}-{len(tasks):04d}",
                    db_id=db_id,
                    question=question.text,
                    gold=question.sql,
                    split=split,
                    hardness=_hardness(_skeleton(question.sql)),
                    kind=question.construct,
                    phrasing=family,
                    needs_order="order by" in question.sql.lower(),
                )
            )
    return tasks


def _made_up(seed: int) -> list[Domain]:
    """Make synthetic schemas for training only: wording learned on many of them carries over to unseen ones."""
    inventor, domains = SchemaGenerator(), []
    for i in range(MADE_UP):
        domain = inventor.domain(Random(f"made up {seed} {i}"), 2)
        domains.append(replace(domain, name=f"made_up_{i:02d}"))
    return domains


def _spider_tables(domain: Domain) -> dict:
    """Return a schema in the form of Spider's ``tables.json``."""
    types = {"id": "number", "key": "number", "integer": "number", "real": "number", "year": "number", "date": "time"}
    names: list[tuple[int, str]] = [(-1, "*")]
    kinds, at = ["text"], {}
    for i, (table, fields) in enumerate(domain.tables.items()):
        for f in fields:
            at[table, f.name] = len(names)
            names.append((i, f.name))
            kinds.append(types.get(f.kind, "text"))
    return {
        "db_id": domain.name,
        "table_names": [t.replace("_", " ") for t in domain.tables],
        "table_names_original": list(domain.tables),
        "column_names": [[i, n.replace("_", " ")] for i, n in names],
        "column_names_original": names,
        "column_types": kinds,
        "primary_keys": [at[t, p] for t in domain.tables if (p := domain.primary(t))],
        "foreign_keys": [[at[t, c], at[ref, key]] for t, c, ref, key in domain.links()],
    }


def write_pocket(root: Path, seed: int = 1, progress: bool = True, sealed: bool = False) -> None:
    """Write the data set; the folder appears complete or not at all.

    Another process that writes the folder is waited for. What it wrote is kept where it is what was asked for.

    Args:
        root: folder of the data set; an earlier pocket data set there is replaced.
        seed: seed of rows and questions. The wording was tuned while looking at scores on seed 0, so results are
            reported on another.
        progress: show a bar.
        sealed: write the sealed split and its databases instead, which no model may see before the end of a study.

    Raises:
        DataError: the folder holds something else.
    """
    root = Path(root)
    filled = root.exists() and any(root.iterdir())
    if filled and not ((root / "dataset.json").is_file() and DataSet(root).about.get("name") == "pocket"):
        raise DataError(f"Not a pocket data set: {root}. Choose another folder, or empty it.")
    work = root.parent / f".{root.name}.partial"
    root.parent.mkdir(parents=True, exist_ok=True)
    with open(root.parent / f".{root.name}.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not filled and (root / "dataset.json").is_file():
            about = DataSet(root).about
            if (about["seed"], about["headline"]) == (seed, SEALED if sealed else HEADLINE):
                return
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            _write(work, seed, progress, sealed)
            shutil.rmtree(root, ignore_errors=True)
            work.rename(root)
        finally:
            shutil.rmtree(work, ignore_errors=True)


Plan = list[tuple[str, list[_Bench], dict[str, int]]]


def _write(root: Path, seed: int, progress: bool, sealed: bool) -> None:
    def benches(domains: list[Domain]) -> list[_Bench]:
        return [
            _Bench(fill(d, Random(f"rows {seed} {d.name}")), root / "database" / d.name / f"{d.name}.sqlite")
            for d in domains
        ]

    if sealed:
        groups = {SEALED: benches(read_domains(SEALED))}
        plan: Plan = [(SEALED, groups[SEALED], {"E": SEALED_TASKS})]
    else:
        groups = {name: benches(read_domains(name)) for name in ("seen", "unseen")}
        groups["made_up"] = benches(_made_up(seed))
        plan = [("train", groups["seen"] + groups["made_up"], TRAIN)]
        for schema in ("seen", "unseen"):
            plan += [
                (f"dev_{schema}_{cell}", groups[schema], {f: DEV // len(families) for f in families})
                for cell, families in CELLS.items()
            ]
    splits: dict[str, list[Task]] = {}
    with tqdm(total=sum(sum(f.values()) for _, _, f in plan), desc="pocket", disable=not progress) as bar:
        for name, group, families in plan:
            splits[name] = _tasks(group, name, families, Random(f"{name} {seed}"))
            bar.update(len(splits[name]))
    for name, tasks in splits.items():  # families and cells are mixed, so that the first tasks are a fair sample
        Random(f"order {seed} {name}").shuffle(tasks)
    if not sealed:
        dev = [t for name in sorted(splits) if name != "train" for t in splits[name]]
        Random(f"order {seed}").shuffle(dev)
        splits["dev"] = dev
        splits["dev_500"] = Random(f"dev_500 {seed}").sample(dev, 500)
        splits[HEADLINE] = [t for t in dev if t.split in ("dev_unseen_train", "dev_unseen_never")]
    for name, tasks in splits.items():
        write_split(root, name, tasks)
    everything = [bench for group in groups.values() for bench in group]
    for bench in everything:
        bench.database.close()
    tables = [_spider_tables(b.domain) for b in everything]
    (root / "tables.json").write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    note = {
        "name": "pocket",
        "version": VERSION,
        "source": "generated by sqlbench; schemas, word lists and phrasings are its own",
        "seed": seed,
        "headline": SEALED if sealed else HEADLINE,
        "splits": {name: len(tasks) for name, tasks in sorted(splits.items())},
        "databases": {group: [b.domain.name for b in members] for group, members in groups.items()},
        "phrasing_families": sorted({f for _, _, families in plan for f in families}),
        "sha256": digest(root, splits),
    }
    (root / "dataset.json").write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")


def digest(root: Path, splits: dict[str, list[Task]]) -> str:
    """Hash all tasks and all rows with SHA-256, independent of the versions of Parquet and SQLite."""
    hasher = hashlib.sha256()
    for name, tasks in sorted(splits.items()):
        hasher.update(f"{name}\n".encode())
        hasher.update("".join(f"{t.key}\x1f{t.task_id}\n" for t in tasks).encode())
    for path in sorted((root / "database").rglob("*.sqlite")):
        with closing(sqlite3.connect(path)) as connection:
            hasher.update("\n".join((path.stem, *connection.iterdump())).encode())
    return hasher.hexdigest()
