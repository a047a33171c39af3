"""The pocket data set: what its splits promise, checked on a data set written once."""

from __future__ import annotations

import itertools
import json
import re
import sqlite3
import subprocess
import sys
from contextlib import closing, redirect_stdout
from io import StringIO
from pathlib import Path
from random import Random

import pytest

import pocket
from pocket.commands import data_pocket
from pocket.dataset import CELLS, SEALED_TASKS, VERSION, digest, write_pocket
from pocket.domains import NOVEL_WORDS, SchemaGenerator, fill, read_domains
from pocket.phrasing import FAMILIES, FRAMES, LEXICON, article, plural
from pocket.pretraining import Examples, held_out
from pocket.questions import CONSTRUCTS, draw
from sqlbench.data.mutation import unchanged_by
from sqlbench.data.tasks import DataSet, Task
from sqlbench.database.engine import open_database
from sqlbench.errors import DataError

DIGESTS = dict(
    reversed(line.split()) for line in (Path(pocket.__file__).parent / "sha256.txt").read_text().splitlines()
)


@pytest.fixture(scope="module")
def tasks(pocket: DataSet) -> list[Task]:
    return [t for split in ("train", "dev") for t in pocket.load(split)]


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """The sealed split; only its wording, its golds and its hash may be looked at, never a policy's answers to it."""
    root = tmp_path_factory.mktemp("sealed") / "sealed"
    with redirect_stdout(StringIO()) as shown:
        data_pocket(root, sealed=True)
    assert "sealed: 800 tasks, 800 scorable" in shown.getvalue()
    return DataSet(root)


def test_the_data_sets_are_those_whose_hash_is_committed(pocket: DataSet, sealed: DataSet) -> None:
    """Each session has a hash seed of its own, so equal digests also mean that no set's order decides anything."""
    assert {"pocket": pocket.about["sha256"], "sealed": sealed.about["sha256"]} == DIGESTS
    assert pocket.about["version"] == sealed.about["version"] == VERSION


def test_a_digest_is_that_of_the_tasks_and_rows_in_the_folder(sealed: DataSet, tmp_path: Path) -> None:
    tasks = sealed.load("sealed")
    assert digest(sealed.root, {"sealed": tasks}) == sealed.about["sha256"]
    assert digest(sealed.root, {"sealed": tasks[1:]}) != sealed.about["sha256"]


def test_the_sealed_split_has_its_own_databases_phrasing_and_words(pocket: DataSet, sealed: DataSet) -> None:
    tasks = sealed.load("sealed")
    assert (sealed.splits(), len(tasks)) == (["sealed"], SEALED_TASKS)
    assert {t.phrasing for t in tasks} == {"E"}
    others = [d for group in ("seen", "unseen") for d in read_domains(group)]
    assert {t.db_id for t in tasks} == {d.name for d in read_domains("sealed")}
    assert not {t.db_id for t in tasks} & {d.name for d in others}
    assert not {t for d in read_domains("sealed") for t in d.tables} & {t for d in others for t in d.tables}
    assert not {t.question for t in tasks} & {t.question for split in ("train", "dev") for t in pocket.load(split)}
    for said in [*LEXICON.values(), *FRAMES.values()]:
        assert not set(said.get("E", ())) & {words for f in "ABCD" for words in said.get(f, ())}


def test_the_sealed_rows_share_no_name_or_place_with_the_others(pocket: DataSet, sealed: DataSet) -> None:
    def names(data: DataSet, groups: tuple[str, ...]) -> set[str]:
        found: set[str] = set()
        for domain in (d for g in groups for d in read_domains(g)):
            with closing(sqlite3.connect(data.database(domain.name))) as connection:
                for table, fields in domain.tables.items():
                    for f in fields:
                        if f.kind == "name" or f.name in ("city", "country", "hometown"):
                            found |= {row[0] for row in connection.execute(f"SELECT {f.name} FROM {table}")}
        return found

    ours, theirs = names(sealed, ("sealed",)), names(pocket, ("seen", "unseen"))
    assert len(ours) > 200
    assert not ours & theirs


@pytest.mark.parametrize("split", ["train", "headline", "dev_seen_pretrain", "sealed"])
def test_no_mutation_of_a_gold_leaves_its_result_unchanged(pocket: DataSet, sealed: DataSet, split: str) -> None:
    data = sealed if split == "sealed" else pocket
    for t in data.load(split)[:100]:
        database = open_database(data.database(t.db_id))
        assert not list(unchanged_by(t.gold, database)), t
        database.close()


def test_splits_have_their_promised_sizes(pocket: DataSet) -> None:
    sizes = {split: len(pocket.load(split)) for split in pocket.splits()}
    cells = {f"dev_{schema}_{cell}": 400 for schema in ("seen", "unseen") for cell in CELLS}
    assert sizes.pop("train") >= 4000
    assert sizes == {**cells, "dev": 2400, "dev_500": 500, "headline": 800}


def test_headline_is_unseen_schemas_with_phrasing_outside_pretraining(pocket: DataSet) -> None:
    unseen = {d.name for d in read_domains("unseen")}
    headline = pocket.load(json.loads((pocket.root / "dataset.json").read_text())["headline"])
    assert {t.db_id for t in headline} == unseen
    assert {t.phrasing for t in headline} == {"B", "C", "D"}


def test_training_meets_seen_and_made_up_schemas_and_never_family_d(pocket: DataSet) -> None:
    train = pocket.load("train")
    made = set(json.loads((pocket.root / "dataset.json").read_text())["databases"]["made_up"])
    assert {t.db_id for t in train} == {d.name for d in read_domains("seen")} | made
    assert not made & {t.db_id for t in pocket.load("dev")}
    assert {t.phrasing for t in train} == {"A", "B", "C"}


def test_no_gold_of_dev_occurs_in_train(pocket: DataSet) -> None:
    train = {(t.db_id, t.gold) for t in pocket.load("train")}
    assert not train & {(t.db_id, t.gold) for t in pocket.load("dev")}


def test_pretraining_holds_no_gold_of_dev(pocket: DataSet) -> None:
    assert all(held_out(t.db_id, t.gold) for t in pocket.load("dev") if t.split.startswith("dev_seen"))
    examples = Examples(3, made_up=0.0)
    names = {d.name for d in examples.seen}
    assert names == {d.name for d in read_domains("seen")}
    golds = {t.gold for t in pocket.load("dev") if t.split.startswith("dev_seen")}
    shown = [e for e in (examples.draw(2) for _ in range(1500)) if e.agent == "write"]
    # A query text may exist on two databases (`SELECT name FROM member`); the pair is what is held out.
    assert sum(e.answer in golds for e in shown) / len(shown) < 0.02


def test_gold_runs_and_returns_rows_and_no_single_null_or_zero(pocket: DataSet, tasks: list[Task]) -> None:
    for t in tasks:
        with closing(sqlite3.connect(pocket.database(t.db_id))) as connection:
            rows = connection.execute(t.gold).fetchall()
        assert rows, t
        assert t.returns_rows
        assert len(rows) > 1 or any(cell not in (None, 0) for cell in rows[0]), t


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
    for family in "ABCD":
        mine = [t for t in tasks if t.phrasing == family]
        assert {t.hardness for t in mine} == {"easy", "medium", "hard", "extra"}
        assert len({t.kind for t in mine}) >= 30


def test_no_question_is_worded_the_same_in_two_families() -> None:
    domain = fill(read_domains("seen")[0], Random(0))
    wordings = {f: {draw(domain, Random(f"{i}"), f).text for i in range(1500)} for f in FAMILIES}
    for f, g in itertools.combinations(FAMILIES, 2):
        assert not wordings[f] & wordings[g]


def test_an_operation_has_words_of_all_families_or_of_a_alone_and_a_form_of_sentence_has_frames_of_all() -> None:
    assert all(set(words) in ({"A"}, set(FAMILIES)) for words in LEXICON.values())
    assert all(all(FRAMES[c.form][f] for f in FAMILIES) for c in CONSTRUCTS.values())


def test_no_family_but_d_shares_its_own_words_with_another() -> None:
    for said in LEXICON.values():
        for f, g in itertools.combinations([f for f in FAMILIES if f in said and f != "D"], 2):
            assert not set(said[f]) & set(said[g]), said


@pytest.mark.parametrize(
    ("word", "many"),
    [("worker", "workers"), ("city", "cities"), ("status", "statuses"), ("class", "classes"), ("branch", "branches"),
     ("staff_members", "staff members"), ("level_of_membership", "levels of membership"), ("aircraft", "aircraft"),
     ("survey", "surveys")],
)  # fmt: skip
def test_plurals(word: str, many: str) -> None:
    assert plural(word) == many


def test_articles() -> None:
    assert [article(w) for w in ("age", "salary", "hour", "unit price", "audience")] == [
        "an age", "a salary", "an hour", "a unit price", "an audience",
    ]  # fmt: skip


def test_questions_are_whole_sentences_without_slips_of_grammar(tasks: list[Task]) -> None:
    slips = re.compile(
        r"\b(a [aeio]\w+|an [bcdfgjklmnpqrstvwxyz]\w+|(a|the) (a|the)|of of|number of number|1 [a-z]+s)\b"
        r"|[{}_]|  |[.?] "
    )
    for t in tasks:
        assert re.fullmatch(r"[A-Z].*[.?]", t.question), t.question
        if not t.db_id.startswith("made_up"):
            said = re.sub(r"'[^']*'|\d+\.\d+|\? Show", "x", t.question)
            assert not slips.search(said), t.question


def test_the_databases_hold_nulls_dates_quotes_accents_and_checked_foreign_keys(pocket: DataSet) -> None:
    cells = []
    for domain in read_domains("seen") + read_domains("unseen"):
        assert 2 <= len(domain.tables) <= 5
        assert domain.links()
        with closing(sqlite3.connect(pocket.database(domain.name))) as connection:  # SQLite's heap has a limit here
            assert not connection.execute("PRAGMA foreign_key_check").fetchall()
            for table in domain.tables:
                cells += [cell for row in connection.execute(f"SELECT * FROM {table}") for cell in row]
    texts = [c for c in cells if isinstance(c, str)]
    assert None in cells
    assert any("'" in t for t in texts)
    assert any(not t.isascii() for t in texts)
    assert any(len(t) == 10 and t[4] == t[7] == "-" for t in texts)
    assert any(isinstance(c, float) for c in cells)


def test_made_up_schemas_use_no_word_of_an_unseen_schema() -> None:
    inventor, rng = SchemaGenerator(), Random(0)
    for _ in range(200):
        domain = inventor.domain(rng, 2)
        names = {n for t, fields in domain.tables.items() for n in (t, *(f.name for f in fields))}
        words = {w for n in names for w in n.split("_")} - {"code"}  # ``_code`` ends made-up keys, by construction
        assert not NOVEL_WORDS & words


def test_two_processes_that_write_the_same_folder_at_once_write_it_once(tmp_path: Path, sealed: DataSet) -> None:
    command = [Path(sys.executable).with_name("sqlbench"), "data", "pocket", "--sealed", "--out", tmp_path / "sealed"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    said = [process.communicate()[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert DataSet(tmp_path / "sealed").about["sha256"] == sealed.about["sha256"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".sealed.lock", "sealed"]


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="Not a pocket data set"):
        write_pocket(tmp_path, progress=False)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    (tmp_path / "dataset.json").write_text("{torn")
    with pytest.raises(DataError, match="Remove the folder"):
        write_pocket(tmp_path, progress=False)
