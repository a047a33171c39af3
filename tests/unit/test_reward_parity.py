"""The reference mode gives the reference evaluator's verdicts, on real pairs and on pairs derived by hand."""

from __future__ import annotations

import gzip
import json
import zipfile

import pytest

from sqlbench.database.engine import cached_database
from sqlbench.database.types import Limits
from sqlbench.reward import score
from sqlbench.scoring import score_pairs


@pytest.fixture(scope="module")
def release(shared, tmp_path_factory):
    root = tmp_path_factory.mktemp("release")
    with zipfile.ZipFile(shared / "spider_data.zip") as archive:
        archive.extractall(root)
    return root / "spider_data"


@pytest.mark.parametrize("keep_distinct", [False, True])
def test_real_pairs(shared, release, tmp_path, keep_distinct):
    out = tmp_path / "scored.jsonl"
    score_pairs(release, shared / "spider_dev_pairs.jsonl.gz", out, keep_distinct=keep_distinct, workers=1)
    rows = [json.loads(line) for line in out.open()]
    field = "ref_keep_distinct" if keep_distinct else "ref_default"
    deviations = [row for row in rows if row["match"] != row[field]]
    assert len(rows) == 2723
    # A stated deviation names its rule: the deadline, the size limits, read-only.
    unexplained = [r for r in deviations if r["reason"] not in ("pred_timeout", "too_large", "pred_rejected")]
    assert unexplained == []


def test_strict_mode_differs_from_the_reference_only_by_its_options(shared, release):
    unexplained = []
    with gzip.open(shared / "spider_dev_pairs.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    for row in rows:
        database = cached_database(release / "database" / row["db_id"] / f"{row['db_id']}.sqlite")
        verdict = score(row["gold"], row["pred"], database)
        ties, inner = "order by" in row["gold"].lower(), "distinct" in (row["gold"] + row["pred"]).lower()
        explained = verdict.reason == "empty_unrelated" or inner or (verdict.match == 1 and ties)
        if verdict.match != row["ref_default"] and not explained:
            unexplained.append(row)
    assert unexplained == []


def test_a_constant_query_without_rows_earns_9_percent_there_and_nothing_here(release):
    tasks = json.loads((release / "dev.json").read_text())
    earned = {True: 0, False: 0}
    for task in tasks:
        database = cached_database(release / "database" / task["db_id"] / f"{task['db_id']}.sqlite")
        for strict in earned:
            earned[strict] += score(task["query"], "SELECT 1 WHERE 0", database, strict=strict).match
    assert earned == {False: 93, True: 0}


# gold, pred, reference verdict, with DISTINCT kept; over the `concert` domain of the pocket data set. Derived from the
# queries alone, but for this: two stadiums share a city, ids are unique, every concert names a stadium.
POCKET = [
    ("SELECT name, city FROM stadium", "SELECT city, name FROM stadium", 1, 1),
    ("SELECT name, city, capacity FROM stadium", "SELECT capacity, name, city FROM stadium AS s", 1, 1),
    ("SELECT name FROM stadium", "SELECT stadium.name FROM stadium WHERE 1 = 1", 1, 1),
    ("SELECT name FROM stadium", "SELECT name FROM stadium ORDER BY capacity", 1, 1),
    ("SELECT stadium_id FROM stadium ORDER BY stadium_id", "SELECT stadium_id FROM stadium ORDER BY stadium_id DESC", 0, 0),  # noqa: E501
    ("SELECT stadium_id FROM stadium ORDER BY stadium_id", "SELECT stadium_id FROM stadium ORDER BY 1 ASC", 1, 1),
    ("SELECT DISTINCT city FROM stadium", "SELECT city FROM stadium", 1, 0),
    ("SELECT count(DISTINCT city) FROM stadium", "SELECT count(city) FROM stadium", 1, 0),
    ("SELECT count(*) FROM stadium", "SELECT count(stadium_id) FROM stadium", 1, 1),
    ("SELECT count(*) FROM stadium", "SELECT count(*) + 1 FROM stadium", 0, 0),
    ("SELECT max(capacity) FROM stadium", "SELECT capacity FROM stadium ORDER BY capacity DESC LIMIT 1", 1, 1),
    ("SELECT max(capacity) FROM stadium", "SELECT min(capacity) FROM stadium", 0, 0),
    ("SELECT city FROM stadium GROUP BY city", "SELECT DISTINCT city FROM stadium", 0, 1),
    ("SELECT stadium_id FROM stadium WHERE capacity > 0", "SELECT stadium_id FROM stadium WHERE NOT capacity <= 0", 1, 1),  # noqa: E501
    ("SELECT stadium_id FROM concert UNION SELECT stadium_id FROM concert", "SELECT DISTINCT stadium_id FROM concert GROUP BY stadium_id", 1, 1),  # noqa: E501
    ("SELECT concert_id FROM concert AS c JOIN stadium AS s ON c.stadium_id = s.stadium_id", "SELECT concert_id FROM concert WHERE stadium_id IN (SELECT stadium_id FROM stadium)", 1, 1),  # noqa: E501
    ("SELECT name FROM stadium WHERE capacity < 0", "SELECT title FROM concert WHERE title = 'none of these'", 1, 1),
    ("SELECT name FROM stadium WHERE capacity < 0", "SELECT nothing FROM stadium", 0, 0),
    ("SELECT name FROM stadium", "SELECT name FROM stadium; DROP TABLE stadium", 1, 0),
    ("SELECT name FROM stadium", "DROP TABLE stadium", 0, 0),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "pred", "default", "kept"), POCKET)
def test_pairs_over_the_pocket_data_set(pocket, gold, pred, default, kept):
    database = cached_database(pocket.database("concert"))
    got = [score(gold, pred, database, strict=False, keep_distinct=k, limits=Limits()).match for k in (False, True)]
    assert got == [default, kept]
