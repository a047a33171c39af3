"""Measures the share of what a gold query needs that is in the prompt, by the share of the schema shown.

    python benchmarks/linking.py --data data/spider --tokenizer models/Qwen2.5-Coder-0.5B-Instruct --out DIR

The budgets are shares of the tokens that the whole schema takes as CREATE TABLE statements. Two kinds of database: each
task's own, and a wide one into which all databases of the data set are merged (``<db_id>_<table>``, rows included, made
in DIR once). Three ways to fill a budget: the first tables (the cut), linking by names, and linking by names and the
values that the question names. What a gold query needs is read from its tree.

It writes ``linking.json`` after each kind, and prints its tables, with the times of the first question to a database,
which reads its values, and of the others.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
import time
from contextlib import closing
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
from sqlglot import exp
from tqdm.auto import tqdm

from sqlbench.config import SchemaConfig
from sqlbench.data.tasks import DataSet
from sqlbench.database.engine import Database, open_database
from sqlbench.database.linking import WHOLE, estimate_tokens, prompt_schema
from sqlbench.database.schema import quote, schema_text, shown
from sqlbench.database.types import Schema
from sqlbench.sql_analysis import parse
from sqlbench_lab.tables import markdown

WAYS: dict[str, dict[str, Any]] = {
    "cut": {"schema_linking": False},
    "names": {"schema_linking": True},
    "names and values": {"schema_linking": True, "value_hints": True},
}
SHARES = {"own": (0.1, 0.25, 0.5, 0.75), "wide": (0.01, 0.05, 0.1)}
WIDE = 100
"""Number of questions that are asked of the wide database."""
Needed = tuple[set[str], set[tuple[str, str]]]
"""Tables, and columns with their tables, in lower case."""


def needed(sql: str, schema: Schema) -> Needed | None:
    """Return the tables and columns of a schema that a query needs; None if it cannot be parsed."""
    tree = parse(sql)
    if tree is None:
        return None
    columns = {table.name.lower(): {column.name.lower() for column in table.columns} for table in schema.tables}
    sources = [table for table in tree.find_all(exp.Table) if table.name.lower() in columns]
    meant = {name.lower(): t.name.lower() for t in sources for name in (t.name, t.alias) if name}
    references = set()
    for column in tree.find_all(exp.Column):
        name, of = column.name.lower(), meant.get(column.table.lower())
        tables = [of] if of else meant.values()  # without a qualifier it may be of any; a quoted text is of none
        references |= {(table, name) for table in tables if name in columns[table]}
    return set(meant.values()), references


def merge(data: DataSet, path: Path) -> None:
    """Make one database of all databases of a data set, with their rows and references."""
    unfinished = path.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    with closing(sqlite3.connect(unfinished)) as connection:
        for folder in tqdm(sorted((data.root / "database").iterdir()), desc="merging", unit="database"):
            database = open_database(folder / f"{folder.name}.sqlite")
            connection.execute("ATTACH ? AS own", (database.target,))
            for table in database.schema().tables:
                keys = tuple(replace(k, ref_table=f"{folder.name}_{k.ref_table}") for k in table.foreign_keys)
                merged = replace(table, name=f"{folder.name}_{table.name}", foreign_keys=keys)
                connection.executescript(schema_text(Schema((merged,)), "ddl", WHOLE))
                connection.execute(f"INSERT INTO {quote(merged.name)} SELECT * FROM own.{quote(table.name)}")
            connection.commit()
            connection.execute("DETACH own")
            database.close()
    unfinished.replace(path)


class Bench:
    """Tasks, databases and token counter of the measurements."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.data, self.count = DataSet(options.data), estimate_tokens
        tasks = self.data.load(options.split)
        self.tasks = Random(0).sample(tasks, len(tasks))[: options.limit]
        if options.tokenizer:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
            line = cache(lambda text: len(tokenizer.encode(text, add_special_tokens=False)))
            self.count = lambda text: sum(line(text + "\n") for text in text.split("\n"))  # lines repeat often
        self.wide = options.out / "wide.sqlite"
        if not self.wide.is_file():
            merge(self.data, self.wide)
        self.open = cache(open_database)

    @cache  # noqa: B019
    def tokens(self, database: Database) -> int:
        """Count the tokens of a whole schema."""
        return self.count(schema_text(database.schema(), "ddl", WHOLE))

    def ask(self, database: Database, question: str, way: str, share: float) -> tuple[Needed, float]:
        """Return the tables and columns that a prompt shows, and the seconds that it took to choose them."""
        budget = max(1, int(share * self.tokens(database)))
        shape = SchemaConfig(schema_tokens=budget, **WAYS[way])
        began = time.perf_counter()
        part, text = prompt_schema(database.schema(), database, question, "ddl", shape, self.count)
        took = time.perf_counter() - began
        assert self.count(text) <= budget
        seen = shown(part, text, "ddl").tables
        columns = {(table.name.lower(), column.name.lower()) for table in seen for column in table.columns}
        return ({table.name.lower() for table in seen}, columns), took

    def measure(self, kind: str) -> dict[str, Any]:
        """Measure all ways and shares on one kind of database."""
        rows, first = [], {way: [0.0] for way in WAYS}
        opened: set[Database] = set()
        for task in tqdm(self.tasks[: WIDE if kind == "wide" else None], desc=kind, unit="question"):
            task_database = self.open(self.data.database(task.db_id))
            if (wanted := needed(task.gold, task_database.schema())) is None:
                continue
            database = self.open(self.wide) if kind == "wide" else task_database
            prefix = f"{task.db_id}_".lower() if kind == "wide" else ""
            tables = {prefix + table for table in wanted[0]}
            columns = {(prefix + table, column) for table, column in wanted[1]}
            if database not in opened:
                opened.add(database)
                for way, took in first.items():
                    took.append(self.ask(database, "", way, SHARES[kind][0])[1])
            for way, share in product(WAYS, SHARES[kind]):
                (have, have_columns), took = self.ask(database, task.question, way, share)
                complete = tables <= have and columns <= have_columns
                counts = len(tables & have), len(tables), len(columns & have_columns), len(columns)
                rows.append((way, share, *counts, complete, took))
        frame = pd.DataFrame(rows, columns=["way", "share", "tables", "of", "columns", "of_columns", "all", "seconds"])
        groups = frame.groupby(["way", "share"], sort=False)
        sums = groups.sum()
        recall = pd.DataFrame(
            {
                "tables": 100 * sums["tables"] / sums["of"],
                "columns": 100 * sums["columns"] / sums["of_columns"],
                "all": 100 * groups["all"].mean(),
            }
        )
        speed = frame.groupby("way", sort=False)["seconds"].agg(["median", "max"])
        return {
            "questions": int(groups.size().iloc[0]),
            "databases": len(opened),
            "tables": max(len(database.schema().tables) for database in opened),
            "tokens": max(self.tokens(database) for database in opened),
            "recall": recall.round(1).reset_index().to_dict("records"),
            "seconds": {way: values.round(3).to_dict() for way, values in speed.iterrows()},
            "first_seconds": {way: round(max(times), 3) for way, times in first.items()},
        }


def table(found: dict[str, Any]) -> str:
    """Write the recalls as a Markdown table: tables, columns, and questions with everything, in percent."""
    frame = pd.DataFrame(found["recall"])
    recalls = zip(frame["tables"], frame["columns"], frame["all"], strict=True)
    frame["found"] = [" / ".join(f"{value:.1f}" for value in three) for three in recalls]
    wide = frame.pivot(index="share", columns="way", values="found")[list(WAYS)]
    wide.index = pd.Index([f"{share:.1%}" for share in wide.index], name="share of the tokens")
    return markdown(wide.reset_index())


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/spider"))
    parser.add_argument("--split", default="dev")
    parser.add_argument("--tokenizer", type=Path, help="checkpoint whose tokens count; estimated without")
    parser.add_argument("--limit", type=int, help="questions, drawn by chance")
    parser.add_argument("--only", action="append", choices=list(SHARES), help="one kind of database")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    place, bench = options.out / "linking.json", Bench(options)
    results = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
    for kind in options.only or SHARES:
        results[kind] = bench.measure(kind)
        place.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"\n{kind}: {results[kind]['questions']} questions, up to {results[kind]['tables']} tables\n")
        print(table(results[kind]))
        for way in WAYS:
            seconds = {**results[kind]["seconds"][way], "first": results[kind]["first_seconds"][way]}
            print(f"{way}: " + ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items()))


if __name__ == "__main__":
    sys.exit(main())
