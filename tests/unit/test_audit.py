from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest

from sqlbench.data.audit import audit_dataset, read_audit
from sqlbench.data.tasks import DataSet, Task, write_split
from sqlbench.database.engine import cached_database
from sqlbench.errors import DataError
from sqlbench.reward import score

SCRIPTS = {
    "shop": "CREATE TABLE item (id INTEGER, name TEXT); INSERT INTO item VALUES (1, 'nut'), (2, 'bolt');"
    "CREATE TABLE sold (item_id INTEGER); CREATE VIEW recent AS SELECT * FROM sold;",
    "bare": "CREATE TABLE a (x INTEGER); CREATE TABLE b (y TEXT);",
}
GOLD = {
    # name: (database, gold, excluded, returns_rows, needs_order)
    "plain": ("shop", "SELECT name FROM item", "", True, False),
    "order": ("shop", "SELECT name FROM item ORDER  BY id DESC", "", True, True),
    "no_rows": ("shop", "SELECT name FROM item WHERE id = 7", "", False, False),
    "empty_table": ("shop", "SELECT count(*) FROM sold", "", True, False),
    "empty_view": ("shop", "SELECT count(*) FROM recent", "", True, False),
    "inner_order": ("shop", "SELECT name FROM (SELECT name FROM item ORDER BY id LIMIT 1)", "", True, False),
    "broken": ("shop", "SELECT colour FROM item", "gold_error", False, False),
    "restless": ("shop", "SELECT random()", "self_check", True, False),
    "bare": ("bare", "SELECT x FROM a", "database_without_rows", False, False),
    "bare_count": ("bare", "SELECT count(*) FROM a", "database_without_rows", True, False),
    "gone": ("gone", "SELECT 1", "missing_database", False, False),
}


@pytest.fixture
def root(tmp_path) -> Path:
    for name, script in SCRIPTS.items():
        path = tmp_path / "database" / name / f"{name}.sqlite"
        path.parent.mkdir(parents=True)
        connection = sqlite3.connect(path)
        connection.executescript(script)
        connection.close()
    tasks = [
        Task(task_id=name, db_id=db_id, question=f"{name}?", gold=gold, split="dev")
        for name, (db_id, gold, *_) in GOLD.items()
    ]
    write_split(tmp_path, "dev", tasks)
    write_split(tmp_path, "part", [t.model_copy(update={"split": "part"}) for t in tasks[6:]])
    (tmp_path / "dataset.json").write_text("{}")
    return tmp_path


def test_every_kind_of_hole_is_found_and_no_task_is_dropped(root):
    audit_dataset(root)
    tasks = {t.task_id: t for t in DataSet(root).load("dev")}
    assert list(tasks) == list(GOLD)
    for name, (_, _, excluded, returns_rows, needs_order) in GOLD.items():
        task = tasks[name]
        assert (task.excluded, task.returns_rows, task.needs_order) == (excluded, returns_rows, needs_order), name
        assert task.scorable == (not excluded)
        assert task.hardness in {"easy", "medium", "hard", "extra"}


def test_the_counts_add_up_and_name_every_excluded_task(root):
    audit = audit_dataset(root)
    for split in audit.splits.values():
        assert split.tasks == split.scorable + sum(split.excluded.values())
        assert sum(split.hardness.values()) == split.scorable
    dev = audit.splits["dev"]
    assert (dev.tasks, dev.scorable, dev.with_rows) == (11, 6, 8)
    assert (dev.zero_rows, dev.zero_rows_scorable, dev.reads_empty_table) == (2, 1, 4)
    assert {f.task_id for f in audit.excluded if f.split == "dev"} == {n for n, g in GOLD.items() if g[2]}
    assert "colour" in next(f.detail for f in audit.excluded if f.task_id == "broken")
    assert audit.missing_databases == {"gone": 1}  # once, though two splits hold the task
    assert audit.databases_without_rows == {"bare": 2}
    assert audit.tables_without_rows == {"shop": ["sold"]}


def test_a_gold_that_a_mutation_leaves_unchanged_is_named_and_stays_scorable(root):
    golds = ["SELECT count(*) FROM item WHERE id = 1", "SELECT name FROM item WHERE id = 1"]
    tasks = [Task(task_id=str(i), db_id="shop", question="?", gold=g, split="luck") for i, g in enumerate(golds)]
    write_split(root, "luck", tasks)
    audit = audit_dataset(root)
    assert (audit.splits["luck"].unchanged, audit.splits["luck"].unchanged_by) == (1, {"comparison": 1})
    assert "luck: 2 tasks, 2 scorable" in audit.summary()
    found = pd.read_parquet(root / "audit.parquet").set_index(["split", "task_id"])["unchanged_by"]
    assert list(found["luck"]) == ["comparison", ""]  # one row on each side of the flipped condition
    assert all(t.scorable for t in DataSet(root).load("luck"))


def test_the_audit_is_read_back_and_repeats_to_the_byte(root):
    first = audit_dataset(root)
    before = {p.name: p.read_bytes() for p in root.iterdir() if p.is_file()}
    assert read_audit(root) == first == audit_dataset(root)
    assert {p.name: p.read_bytes() for p in root.iterdir() if p.is_file()} == before
    assert list(pd.read_parquet(root / "audit.parquet")["task_id"]) == [*GOLD, *list(GOLD)[6:]]


@pytest.mark.parametrize("strict", [False, True])
def test_gold_as_prediction_scores_on_every_task_that_can_be_scored(root, strict):
    audit_dataset(root)
    data = DataSet(root)
    for task in data.load("dev"):
        if task.scorable:
            database = cached_database(data.database(task.db_id))
            assert score(task.gold, task.gold, database, strict=strict).match == 1, task.task_id


def test_the_floor_is_what_the_best_constant_query_earns(root):
    floor = audit_dataset(root).splits["dev"].constant_floor
    # SELECT 0 answers both counts of an empty table; a query without rows answers no_rows, where the mode lets it.
    assert floor["reference"] == floor["strict"] == pytest.approx(2 / 6)
    assert (floor["reference_no_rows"], floor["strict_no_rows"]) == (pytest.approx(1 / 6), 0)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_gold_as_prediction_scores_on_all_of_the_real_dev_split(spider, strict):
    data = DataSet(spider)
    tasks = [t for t in data.load("dev") if t.scorable]
    wrong = [
        t.task_id
        for t in tasks
        if score(t.gold, t.gold, cached_database(data.database(t.db_id)), strict=strict).match != 1
    ]
    assert len(tasks) == 972 and wrong == []


def test_without_an_audit_the_command_that_makes_one_is_named(tmp_path):
    with pytest.raises(DataError, match="sqlbench data audit"):
        read_audit(tmp_path)


ENDLESS = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT count(*) FROM r"
SHELF = """
CREATE VIRTUAL TABLE page USING fts5(title, body);
INSERT INTO page VALUES ('a', 'the river runs');
CREATE VIRTUAL TABLE draft USING fts5(body);
PRAGMA journal_mode = wal;
PRAGMA writable_schema = on;
INSERT INTO sqlite_master VALUES ('table', 'shape', 'shape', 0, 'CREATE VIRTUAL TABLE shape USING no_such_module(x)');
"""


def test_a_table_of_a_missing_module_is_left_out_with_a_note_and_the_rest_is_audited(tmp_path):
    path = tmp_path / "database/shelf/shelf.sqlite"
    path.parent.mkdir(parents=True)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in SHELF.strip().split("\n"):
            connection.execute(statement)
    golds = ["SELECT title FROM page WHERE page MATCH 'river'", "SELECT x FROM shape"]
    tasks = [
        Task(task_id=f"dev-{i}", db_id="shelf", question="Which?", gold=gold, split="dev")
        for i, gold in enumerate(golds)
    ]
    write_split(tmp_path, "dev", tasks)
    (tmp_path / "dataset.json").write_text("{}")
    audit = audit_dataset(tmp_path)
    assert [t.excluded for t in DataSet(tmp_path).load("dev")] == ["", "gold_error"]
    assert audit.unreadable_tables == {"shelf": ["shape"]}
    assert audit.tables_without_rows == {"shelf": ["draft"]}
    assert "shelf: left out, since SQLite cannot read them here: shape" in audit.summary()
    assert [p.name for p in path.parent.iterdir()] == ["shelf.sqlite"]


def test_the_time_limit_of_gold_queries_is_an_option(tmp_path):
    path = tmp_path / "database/shop/shop.sqlite"
    path.parent.mkdir(parents=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCRIPTS["shop"])
    write_split(tmp_path, "dev", [Task(task_id="dev-0", db_id="shop", question="How many?", gold=ENDLESS, split="dev")])
    (tmp_path / "dataset.json").write_text("{}")
    audit = audit_dataset(tmp_path, query_timeout=0.1)
    assert audit.excluded[0].excluded == "gold_timeout" and audit.excluded[0].detail == "no result within 0.1 s"
