"""Layouts of published releases: the places of their questions, gold queries and databases."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sqlbench_data.archive import Release
from sqlbench_data.rows import Read, Row


@dataclass(frozen=True)
class Layout:
    """Places of the questions and databases of a release, relative to the folder that holds them all."""

    title: str
    page: str
    license: str
    splits: Mapping[str, tuple[str, ...]]
    """Files of each split; those that are missing are left out."""
    databases: str
    """Folders of the databases, as a regular expression."""
    required: tuple[str, ...] = ()
    """Files that must be present; by default one file of any split."""
    tables: tuple[str, ...] = ()
    """Files with the schemas in Spider's form."""
    headline: tuple[str, ...] = ()
    """Splits to report results on; the first that exists is used."""
    sampled: str = ""
    """Split from which `SUBSET` scorable tasks are drawn by the seed into a separate split."""
    query_timeout: float = 5.0
    """Time limit of a gold query in seconds."""
    adapt: Callable[[Release, str, Row], Read] = lambda release, prefix, row: row
    """Function that completes a row."""


def _spider2(release: Release, prefix: str, row: Row) -> Read:
    """Add the gold query and the text of the document, which are separate files."""
    name, document = str(row.get("instance_id")), row.get("external_knowledge")
    if not name.startswith("local"):
        return "not_sqlite", "the database is in a cloud"
    gold = f"{prefix}evaluation_suite/gold/sql/{name}.sql"
    if gold not in release.names:
        results = re.compile(rf"{re.escape(prefix)}evaluation_suite/gold/exec_result/{re.escape(name)}(_\w+)?\.csv")
        count = sum(bool(results.fullmatch(other)) for other in release.names)
        return "no_gold_sql", f"gold results only ({count} CSV files)" if count else "no gold results either"
    text = f"{prefix}resource/documents/{document}"
    texts = {"gold": _text(release, gold), "external_knowledge": _text(release, text) if text in release.names else ""}
    return row | texts


def _text(release: Release, name: str) -> str:
    with release.open(name) as file:
        return file.read().decode("utf-8-sig", "replace")


_SPIDER_PAGE = "https://yale-lily.github.io/spider"
LAYOUTS = {
    "spider": Layout(
        title="Spider",
        page=_SPIDER_PAGE,
        license="CC BY-SA 4.0",
        splits={
            "train": ("train_spider.json", "train_others.json"),
            "dev": ("dev.json",),
            "test": ("test.json",),
        },
        databases="(test_)?database",
        required=("dev.json", "train_spider.json", "tables.json"),
        tables=("tables.json", "test_tables.json"),
        headline=("dev_500",),
        sampled="dev",
    ),
    "bird": Layout(
        title="BIRD",
        page="https://bird-bench.github.io",
        license="CC BY-SA 4.0",
        splits={"train": ("train.json",), "dev": ("dev.json",), "mini_dev": ("mini_dev_sqlite.json",)},
        databases=r"\w*databases",
        tables=("dev_tables.json", "train_tables.json"),
        headline=("dev", "mini_dev", "train"),
        query_timeout=30.0,
    ),
    "spider2-lite": Layout(
        title="Spider 2.0-lite",
        page="https://spider2-sql.github.io",
        license="MIT",
        splits={"lite": ("spider2-lite.jsonl",)},
        databases="resource/databases",
        headline=("lite",),
        query_timeout=30.0,
        adapt=_spider2,
    ),
    "agent-lightning": Layout(
        title="Agent Lightning",
        page="https://github.com/microsoft/agent-lightning",
        license="CC BY-SA 4.0",
        splits={
            "train": ("train_spider.parquet",),
            "test_dev_500": ("test_dev_500.parquet",),
            "test_dev": ("test_dev.parquet",),
        },
        databases="(test_)?database",
        headline=("test_dev_500", "test_dev", "train"),
    ),
}
"""Layouts by the name of their command."""
