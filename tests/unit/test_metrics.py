"""Further scores, by hand: BIRD's soft F1 and efficiency, exact set match, a test suite; and where they are shown."""

from __future__ import annotations

import json
import math
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from sqlbench.agent.trajectory import Completion
from sqlbench.clauses import exact_match
from sqlbench.cli import main
from sqlbench.data.audit import audit_dataset
from sqlbench.data.tasks import Task, write_split
from sqlbench.database.types import Limits, QueryResult
from sqlbench.evaluation import evaluate
from sqlbench.metrics import RUNS, measure, r_ves, soft_f1, time_ratio, ves
from sqlbench.runs import RunFolder
from sqlbench_lab.display import metric_table


@pytest.mark.parametrize(
    ("gold", "pred", "expected"),
    [
        ([(1, "a"), (2, "b")], [(1, "a"), (2, "b")], 1),
        ([(1, "a")], [("a", 1)], 1),  # columns in any order
        ([(1,), (1,), (2,)], [(1,), (2,)], 1),  # repetitions are dropped
        ([(1,), (2,)], [(2,), (1,)], 0),  # rows in place
        ([(1, "a")], [(1,)], 2 / 3),  # found 1/2, missing 1/2: precision 1, recall 1/2
        ([(1,)], [(1, 9)], 2 / 3),  # found 1, too much 1: precision 1/2, recall 1
        ([(1,)], [(1,), (2,)], 2 / 3),  # a row too much
        ([(1, 2), (3, 4)], [(1, 5)], 0.5 / (0.5 + (0.5 + 1.5) / 2)),  # found 1/2, too much 1/2, missing 1/2 and a row
        ([], [], 1),
        ([], [(1,)], 0),
        ([(1,)], [], 0),
        ([(None, 2)], [(None, 2.0)], 1),
    ],
)
def test_soft_f1_is_that_of_the_published_script(gold, pred, expected):
    assert soft_f1(gold, pred) == pytest.approx(expected)


def test_times_far_from_the_others_are_dropped():
    assert time_ratio([2.0, 4.0], [1.0, 1.0]) == 3.0
    assert time_ratio([1.0] * 3, [0.5] * 3) == 2.0  # all equal: none is dropped
    assert time_ratio([1.0] * 19 + [100.0], [1.0] * 20) == 1.0  # mean 5.95, deviation 21.6: 100 is 4.4 of them away


@pytest.mark.parametrize(
    ("ratio", "reward"),
    [(3, 1.25), (2, 1.25), (1.99, 1), (1, 1), (0.99, 0.75), (0.5, 0.75), (0.49, 0.5), (0.25, 0.5), (0.24, 0.25)],
)
def test_the_reward_of_r_ves_goes_by_steps(ratio, reward):
    assert r_ves(ratio) == pytest.approx(math.sqrt(reward))
    assert ves(ratio) == pytest.approx(math.sqrt(ratio))


class Clock:
    """A database with known results and times."""

    dialect, limits, name = "sqlite", Limits(), "clock"

    def __init__(self, **results: QueryResult) -> None:
        self.results, self.asked = results, []

    def execute(self, sql: str, limits: Limits) -> QueryResult:
        self.asked.append(sql)
        return self.results[sql]


ALL = ["bird-ex", "soft-f1", "ves", "r-ves"]


def test_results_are_compared_and_timed_as_bird_does():
    rows = {"gold": [(1, "a"), (2, "b")], "fast": [(2, "b"), (1, "a"), (1, "a")], "wrong": [(1, "a")]}
    times = {"gold": 0.2, "fast": 0.1, "wrong": 0.1}
    database = Clock(**{name: QueryResult("ok", ("x", "y"), rows[name], seconds=times[name]) for name in rows})
    database.results["broken"] = QueryResult("timeout")
    fast = measure(ALL, "gold", "fast", [database])
    assert fast == pytest.approx({"bird-ex": 1, "soft-f1": 0, "ves": math.sqrt(2), "r-ves": math.sqrt(1.25)})
    assert len(database.asked) == 2 + 2 * RUNS
    assert measure(ALL, "gold", "wrong", [database]) == pytest.approx(dict(zip(ALL, [0, 2 / 3, 0, 0], strict=True)))
    assert measure(ALL, "gold", "broken", [database]) == dict.fromkeys(ALL, 0)
    assert measure(ALL, "broken", "gold", [database]) == dict.fromkeys(ALL)
    assert len(database.asked) == 2 + 2 * RUNS + 6  # only right queries are timed


@pytest.mark.parametrize(
    ("gold", "pred", "equal"),
    [
        ('SELECT name FROM t WHERE a = "Foo"', "select T1.name from T as T1 where T1.a = 'Bar'", True),
        ("SELECT a, b FROM t", "SELECT b, a FROM t", True),
        ("SELECT a FROM t WHERE x = 1 AND y = 2", "SELECT a FROM t WHERE y = 5 AND x = 3", True),
        ("SELECT count(DISTINCT a) FROM t", "SELECT count(a) FROM t", True),
        ("SELECT a FROM t ORDER BY b LIMIT 1", "SELECT a FROM t ORDER BY b LIMIT 3", True),
        ("SELECT a FROM t JOIN u ON t.i = u.i", "SELECT a FROM u JOIN t ON u.i = t.j", True),
        ("SELECT a FROM t ORDER BY b LIMIT 1", "SELECT a FROM t ORDER BY b", False),
        ("SELECT a FROM t ORDER BY b", "SELECT a FROM t ORDER BY b DESC", False),
        ("SELECT a FROM t", "SELECT a FROM u", False),
        ("SELECT max(a) FROM t", "SELECT min(a) FROM t", False),
        ("SELECT a FROM t WHERE x > 1", "SELECT a FROM t WHERE x < 1", False),
        ("SELECT a FROM t UNION SELECT a FROM u", "SELECT a FROM t INTERSECT SELECT a FROM u", False),
        ("SELECT a FROM (", "SELECT a FROM (", False),
    ],
)
def test_exact_set_match(gold, pred, equal):
    assert exact_match(gold, pred) is equal


class Says:
    """A model that knows one query for each question."""

    name, family = "says", "nano"

    async def complete(self, messages, on_text=None) -> Completion:
        prompt = messages[-1].content
        return Completion(text=next(sql for question, sql in ANSWERS.items() if question in prompt))


ANSWERS = {"Which names?": "SELECT name FROM item", "Which is first?": "SELECT min(name) FROM item"}
GOLD = {"Which names?": "SELECT name FROM item", "Which is first?": "SELECT name FROM item WHERE id = 1"}


@pytest.fixture
def data(tmp_path) -> Path:
    """On the task's own database the first name is the smallest, on the second one it is not."""
    folder = tmp_path / "data/database/shop"
    folder.mkdir(parents=True)
    for name, rows in (("shop", [(1, "bolt"), (2, "nut")]), ("another", [(1, "screw"), (2, "nut")])):
        with closing(sqlite3.connect(folder / f"{name}.sqlite")) as connection:
            connection.execute("CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT)")
            connection.executemany("INSERT INTO item VALUES (?, ?)", rows)
            connection.commit()
    tasks = [
        Task(task_id=str(n), db_id="shop", question=question, gold=gold, split="dev", hardness=level)
        for n, ((question, gold), level) in enumerate(zip(GOLD.items(), ("simple", "challenging"), strict=True))
    ]
    write_split(tmp_path / "data", "dev", tasks)
    (tmp_path / "data/dataset.json").write_text('{"headline": "dev"}')
    audit_dataset(tmp_path / "data")
    return tmp_path / "data"


def test_an_evaluation_shows_the_scores_that_were_asked_for(data, tmp_path):
    names = ["test-suite", "exact-match", "bird-ex", "soft-f1"]
    summary = evaluate(data, "dev", Says(), "run", results=tmp_path, max_turns=1, metrics=names)
    assert summary.score.ex == 1
    assert summary.metrics == {
        "test-suite": {"all": 0.5, "simple": 1.0, "challenging": 0.0},
        "exact-match": {"all": 0.5, "simple": 1.0, "challenging": 0.0},
        "bird-ex": {"all": 1.0, "simple": 1.0, "challenging": 1.0},
        "soft-f1": {"all": 1.0, "simple": 1.0, "challenging": 1.0},
    }
    assert "\ntest-suite: 50.0% (simple 100.0%, challenging 0.0%)\n" in summary.text()
    table = metric_table(summary)
    assert table[["hardness", "tasks", "EX", "test-suite"]].values.tolist() == [
        ["all", 2, 100.0, 50.0], ["simple", 1, 100.0, 100.0], ["challenging", 1, 100.0, 0.0],
    ]  # fmt: skip
    assert "metrics" not in RunFolder(tmp_path / "laptop/run").config()  # nothing depends on them


def test_without_being_asked_there_are_none(data, tmp_path):
    summary = evaluate(data, "dev", Says(), "run", results=tmp_path, max_turns=1)
    assert summary.metrics == {} and "metrics" not in RunFolder(tmp_path / "laptop/run").summary()


def test_pairs_are_scored_with_them_too(data, tmp_path, capsys):
    rows = [{"db_id": "shop", "gold": gold, "pred": ANSWERS[question]} for question, gold in GOLD.items()]
    rows.append({"db_id": "shop", "gold": "SELECT colour FROM item", "pred": "SELECT 1"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--data", data, "--pairs", tmp_path / "pairs.jsonl", "--out", tmp_path / "out.jsonl"]
    with pytest.raises(SystemExit) as ended:
        main(["score", *map(str, files), "--metric", "exact-match", "--metric", "soft-f1"])
    assert ended.value.code == 0
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    assert [(row["match"], row.get("exact-match"), row.get("soft-f1")) for row in out] == [
        (1, 1.0, 1.0), (0, 0.0, 1.0), (None, None, None),
    ]  # fmt: skip
    assert "exact-match 50.0%, soft-f1 100.0%" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["score", *map(str, files), "--metric", "bleu"])
    assert ended.value.code == 2 and "'--metric': input should be 'test-suite'" in capsys.readouterr().err
