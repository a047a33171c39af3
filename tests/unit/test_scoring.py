"""Scoring a file of pairs: rows carried through in order, several databases, clear refusals."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import sqlite3
import threading
import time

import pytest

from sqlbench.errors import DataError
from sqlbench.scoring import score_pairs


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data" / "database" / "club"
    folder.mkdir(parents=True)
    for name, rows in (("club", 2), ("club_more", 3)):
        connection = sqlite3.connect(folder / f"{name}.sqlite")
        connection.execute("CREATE TABLE t (a INT, b INT)")
        connection.executemany("INSERT INTO t VALUES (?, ?)", [(i, i % 2) for i in range(rows)])
        connection.commit()
    return tmp_path / "data"


def write(path, rows):
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as lines:
        lines.writelines(json.dumps({"db_id": "club", "gold": "SELECT a FROM t"} | row) + "\n" for row in rows)
    return path


ROWS = [
    {"pred": "SELECT a FROM t", "source": "é", "n": 1},
    {"pred": "SELECT a FROM t LIMIT 2"},  # equal on one of the two databases
    {"pred": "SELECT c FROM t"},
    {"gold": "SELECT c FROM t", "pred": "SELECT a FROM t"},
    {"gold": "SELECT count(DISTINCT b) FROM t", "pred": "SELECT count(b) FROM t"},
    {"db_id": "nosuch", "pred": "SELECT 1"},
]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
@pytest.mark.parametrize("workers", [1, 2])
def test_rows_are_carried_through_in_order(data, tmp_path, name, workers):
    out = tmp_path / "out" / "scored.jsonl"
    summary = score_pairs(data, write(tmp_path / name, ROWS), out, workers=workers)
    rows = [json.loads(line) for line in out.open(encoding="utf-8")]
    assert [(r["match"], r["reason"]) for r in rows] == [
        (1, "equal"), (0, "rows_differ"), (0, "pred_error"), (None, "gold_error"), (1, "equal"), (None, "no_database"),
    ]  # fmt: skip
    assert (rows[0]["source"], rows[0]["n"]) == ("é", 1)
    assert rows[2]["pred_error"] == "no such column: c"
    assert all(r["ms"] >= 0 for r in rows)
    assert summary | {"pairs": 6, "scored": 4, "matched": 2, "equal": 2} == summary


def test_modes_are_passed_on(data, tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", ROWS[4:5])
    assert score_pairs(data, pairs, tmp_path / "o", keep_distinct=True)["matched"] == 0
    assert score_pairs(data, pairs, tmp_path / "o", strict=True)["matched"] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "No pairs in"),
        ("{", "line 1: not JSON"),
        ('{"db_id": "club", "gold": "SELECT 1"}', "needs text in db_id, gold and pred"),
        ('["x"]', "needs text in db_id, gold and pred"),
        ('{"db_id": "../..", "gold": "SELECT 1", "pred": "SELECT 1"}', "No database of"),
    ],
)
def test_malformed_pairs_are_refused_in_one_line(data, tmp_path, text, message):
    (tmp_path / "pairs.jsonl").write_text(text + "\n")
    with pytest.raises(DataError, match=message) as error:
        score_pairs(data, tmp_path / "pairs.jsonl", tmp_path / "o")
    assert "\n" not in str(error.value)


GOOD = '{"db_id": "club", "gold": "SELECT a FROM t", "pred": "SELECT a FROM t"}'


def test_a_broken_row_stops_nothing_and_a_null_prediction_is_an_empty_one(data, tmp_path):
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "o"
    broken = [
        b"{",
        b"[" * 100_000,
        b"\xff\xfe",
        b"7",
        b'{"db_id": "club", "gold": 1, "pred": ""}',
        b'{"gold": "", "pred": ""}',
    ]
    null = b'{"db_id": "club", "gold": "SELECT a FROM t", "pred": null}'
    pairs.write_bytes(b"\n".join([b"\xef\xbb\xbf" + GOOD.encode(), *broken, null, b"", GOOD.encode()]))
    summary = score_pairs(data, pairs, out)
    rows = [json.loads(line) for line in out.open(encoding="utf-8")]
    assert [r["match"] for r in rows] == [1, *[None] * 6, 0, 1]
    assert [r["reason"] for r in rows] == ["equal", *["bad_row"] * 6, "pred_rejected", "equal"]
    assert [r["line"] for r in rows[1:7]] == [2, 3, 4, 5, 6, 7] and rows[1]["pred_error"].startswith("line 2: not JSON")
    assert rows[7]["pred"] is None and "no statement" in rows[7]["pred_error"]
    assert summary == {"pairs": 9, "scored": 3, "matched": 2, "equal": 2, "bad_row": 6, "pred_rejected": 1}


@pytest.mark.parametrize("workers", [1, 2])
def test_half_a_character_anywhere_in_a_row_costs_no_other_row(data, tmp_path, workers):
    half, nul = "\ud83d", "\0"
    odd = [
        {"pred": f"SELECT '{half}'"},
        {"pred": f"SELECT '{nul}'"},
        {"pred": "SELECT a FROM t", "source": half, half: nul},
        {"gold": f"SELECT '{half}'", "pred": f"SELECT '{half}'"},
        {"db_id": half, "pred": "SELECT 1"},
        {"db_id": "x" * 5000, "pred": "SELECT 1"},
        {"pred": "SELECT '\ud83d\ude00' AS a FROM t"},
        {"pred": "SELECT a FROM t"},
    ]
    out = tmp_path / "o"
    score_pairs(data, write(tmp_path / "pairs.jsonl", odd), out, workers=workers)
    rows = [json.loads(line) for line in out.open(encoding="utf-8")]
    assert [r["match"] for r in rows] == [0, 0, 1, 1, None, None, 0, 1]
    assert rows[0]["pred"] == "SELECT '\ufffd'" and rows[6]["pred"] == "SELECT '\U0001f600' AS a FROM t"


def test_a_database_that_cannot_be_read_costs_no_other_database(data, tmp_path):
    (data / "database" / "bad").mkdir()
    (data / "database" / "bad" / "bad.sqlite").write_bytes(b"no database" * 1000)
    pairs = write(tmp_path / "pairs.jsonl", [{"db_id": "bad", "pred": "SELECT 1"}, {"pred": "SELECT a FROM t"}])
    summary = score_pairs(data, pairs, tmp_path / "o")
    assert summary == {"pairs": 2, "scored": 1, "matched": 1, "no_database": 1, "equal": 1}


def test_missing_inputs_are_refused(data, tmp_path):
    with pytest.raises(DataError, match="No databases in"):
        score_pairs(tmp_path / "nosuch", tmp_path / "pairs.jsonl", tmp_path / "o")
    with pytest.raises(DataError, match="Cannot read"):
        score_pairs(data, tmp_path / "nosuch.jsonl", tmp_path / "o")
    (tmp_path / "pairs.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="Cannot read"):
        score_pairs(data, tmp_path / "pairs.jsonl.gz", tmp_path / "o")


def test_a_scoring_process_that_is_killed_is_one_line(data, tmp_path):
    endless = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT count(*) FROM r"
    pairs = write(tmp_path / "pairs.jsonl", [{"db_id": "club", "gold": "SELECT 1", "pred": endless}])

    def kill():
        while not (children := multiprocessing.active_children()):
            time.sleep(0.01)
        time.sleep(0.2)
        children[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(DataError, match="Scoring process killed"):
        score_pairs(data, pairs, tmp_path / "out.jsonl", workers=2)
    killer.join()


def test_the_pairs_are_not_written_over(data, tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", ROWS)
    before = pairs.read_bytes()
    with pytest.raises(DataError, match="Choose another file"):
        score_pairs(data, pairs, pairs)
    assert pairs.read_bytes() == before


def test_the_time_limit_of_a_query_is_an_option(data, tmp_path):
    endless = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT count(*) FROM r"
    pairs = write(tmp_path / "pairs.jsonl", [{**ROWS[0], "pred": endless}])
    out = tmp_path / "out.jsonl"
    assert score_pairs(data, pairs, out, query_timeout=0.1)["pred_timeout"] == 1
    assert json.loads(out.read_text())["pred_error"] == "no result within 0.1 s"
