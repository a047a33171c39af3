"""The pocket data set: what its splits promise, checked on a data set written once."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from random import Random

import pytest

from pocket.dataset import CELLS, write_pocket
from pocket.domains import NOVEL_WORDS, Inventor, fill, seen_domains, unseen_domains
from pocket.phrasing import FAMILIES, LEXICON
from pocket.pretraining import Examples, held_out
from pocket.questions import CONSTRUCTS, draw
from sqlbench.data.tasks import DataSet, Task
from sqlbench.errors import DataError


@pytest.fixture(scope="module")
def tasks(pocket: DataSet) -> list[Task]:
    return [t for split in ("train", "dev") for t in pocket.load(split)]


def digests(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_another_process_with_another_hash_seed_writes_the_same_bytes(pocket: DataSet, tmp_path: Path) -> None:
    code = "import sys; from pocket.dataset import write_pocket; write_pocket(sys.argv[1], progress=False)"
    env = {**os.environ, "PYTHONHASHSEED": "4711"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], check=True, env=env)
    assert digests(tmp_path / "again") == digests(pocket.root)


def test_splits_have_their_promised_sizes(pocket: DataSet) -> None:
    sizes = {split: len(pocket.load(split)) for split in pocket.splits()}
    cells = {f"dev_{schema}_{cell}": 400 for schema in ("seen", "unseen") for cell in CELLS}
    assert sizes.pop("train") >= 4000
    assert sizes == {**cells, "dev": 2400, "dev_500": 500, "headline": 800}


def test_headline_is_unseen_schemas_with_phrasing_outside_pretraining(pocket: DataSet) -> None:
    unseen = {d.name for d in unseen_domains()}
    headline = pocket.load(json.loads((pocket.root / "dataset.json").read_text())["headline"])
    assert {t.db_id for t in headline} == unseen
    assert {t.phrasing for t in headline} == {"B", "C", "D"}


def test_training_meets_seen_and_made_up_schemas_and_never_family_d(pocket: DataSet) -> None:
    train = pocket.load("train")
    made = set(json.loads((pocket.root / "dataset.json").read_text())["databases"]["made_up"])
    assert {t.db_id for t in train} == {d.name for d in seen_domains()} | made
    assert not made & {t.db_id for t in pocket.load("dev")}
    assert {t.phrasing for t in train} == {"A", "B", "C"}


def test_no_gold_of_dev_occurs_in_train(pocket: DataSet) -> None:
    train = {(t.db_id, t.gold) for t in pocket.load("train")}
    assert not train & {(t.db_id, t.gold) for t in pocket.load("dev")}


def test_pretraining_holds_no_gold_of_dev(pocket: DataSet) -> None:
    assert all(held_out(t.db_id, t.gold) for t in pocket.load("dev") if t.split.startswith("dev_seen"))
    examples = Examples(3, made_up=0.0)
    names = {d.name for d in examples.seen}
    assert names == {d.name for d in seen_domains()}
    golds = {t.gold for t in pocket.load("dev") if t.split.startswith("dev_seen")}
    shown = [e for e in (examples.draw(2) for _ in range(1500)) if e.agent == "write"]
    # A query text may exist on two databases (`SELECT name FROM member`); the pair is what is held out.
    assert sum(e.answer in golds for e in shown) / len(shown) < 0.02


def test_gold_runs_and_returns_rows_and_no_single_null_or_zero(pocket: DataSet, tasks: list[Task]) -> None:
    connections = {d: sqlite3.connect(pocket.database(d)) for d in {t.db_id for t in tasks}}
    for t in tasks:
        rows = connections[t.db_id].execute(t.gold).fetchall()
        assert rows, t
        assert t.returns_rows
        assert len(rows) > 1 or any(cell not in (None, 0) for cell in rows[0]), t
    for connection in connections.values():
        connection.close()


def test_a_limit_never_cuts_through_a_tie(pocket: DataSet, tasks: list[Task]) -> None:
    limited = [t for t in tasks if t.kind in ("superlative", "top_k")]
    assert len(limited) > 200
    for t in limited:
        body, k = t.gold.rsplit(" LIMIT ", 1)
        column = body.split(" ORDER BY ")[1].split()[0]
        query = f"SELECT {column} FROM {body.split(' FROM ')[1]} LIMIT {int(k) + 1}"
        with closing(sqlite3.connect(pocket.database(t.db_id))) as connection:
            keys = connection.execute(query).fetchall()
        assert len(set(keys)) == len(keys), t


def test_there_are_four_hardness_levels_and_thirty_constructs_in_every_family(tasks: list[Task]) -> None:
    for family in FAMILIES:
        mine = [t for t in tasks if t.phrasing == family]
        assert {t.hardness for t in mine} == {"easy", "medium", "hard", "extra"}
        assert len({t.kind for t in mine}) >= 30


def test_no_question_is_worded_the_same_in_two_families() -> None:
    domain = fill(seen_domains()[0], Random(0))
    said = {f: {draw(domain, Random(f"{i}"), f).question for i in range(1500)} for f in FAMILIES}
    for f, g in itertools.combinations(FAMILIES, 2):
        assert not said[f] & said[g]


def test_an_operation_has_words_of_all_families_or_of_a_alone_and_a_construct_has_frames_of_all() -> None:
    assert all(set(words) in ({"A"}, set(FAMILIES)) for words in LEXICON.values())
    assert all(all(c.frames[f] for f in FAMILIES) for c in CONSTRUCTS.values())


def test_the_databases_hold_nulls_dates_quotes_accents_and_checked_foreign_keys(pocket: DataSet) -> None:
    cells = []
    for domain in seen_domains() + unseen_domains():
        connection = sqlite3.connect(pocket.database(domain.name))
        assert not connection.execute("PRAGMA foreign_key_check").fetchall()
        assert 2 <= len(domain.tables) <= 5
        assert domain.links()
        for table in domain.tables:
            cells += [cell for row in connection.execute(f"SELECT * FROM {table}") for cell in row]
    texts = [c for c in cells if isinstance(c, str)]
    assert None in cells
    assert any("'" in t for t in texts)
    assert any(not t.isascii() for t in texts)
    assert any(len(t) == 10 and t[4] == t[7] == "-" for t in texts)
    assert any(isinstance(c, float) for c in cells)


def test_made_up_schemas_use_no_word_of_an_unseen_schema() -> None:
    inventor, rng = Inventor(), Random(0)
    for _ in range(200):
        domain = inventor.domain(rng, 2)
        names = {n for t, fields in domain.tables.items() for n in (t, *(f.name for f in fields))}
        words = {w for n in names for w in n.split("_")} - {"code"}  # ``_code`` ends made-up keys, by construction
        assert not NOVEL_WORDS & words


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="no pocket data set"):
        write_pocket(tmp_path, progress=False)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    (tmp_path / "dataset.json").write_text("{torn")
    with pytest.raises(DataError, match="remove the folder"):
        write_pocket(tmp_path, progress=False)
