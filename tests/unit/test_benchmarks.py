"""What the benchmarks of speed compare is the same work on both sides."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from pocket import NANO_PATH
from sqlbench.data.tasks import DataSet
from sqlbench.database.engine import open_database
from verl_cpu.engine import GenerationRequest, LocalEngine


@pytest.fixture(autouse=True)
def scripts(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))


def test_a_widened_nano_is_larger_and_answers_as_nano_does(tmp_path: Path) -> None:
    import training

    nano, wide = LocalEngine(NANO_PATH), LocalEngine(training.widened(2_000_000, tmp_path))
    size = sum(p.numel() for p in wide.model.parameters())
    assert 1_800_000 <= size <= 3_000_000
    prompts = [tuple(nano.tokenizer(text)["input_ids"]) for text in ("the names of all singers", "how many cars")]
    sampled = [e.generate([GenerationRequest(p, 20, 1.0, seed=1) for p in prompts]) for e in (nano, wide)]
    for ours, theirs in zip(*sampled, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)


def test_both_agents_answer_every_task_with_a_model_that_knows_the_answers(pocket: DataSet) -> None:
    pytest.importorskip("sqlalchemy", reason="the plain agent needs SQLAlchemy, which sqlbench does not")
    import plain_agent
    import rollout

    tasks = [task for task in pocket.load("train") if task.scorable][:20]
    works = {
        "ours, in the process": lambda some: rollout.ours(pocket.root, plain_agent.IN_PROCESS, 8, some),
        "plain, in the process": lambda some: rollout.plain(pocket.root, plain_agent.IN_PROCESS, None, some),
    }
    rates = rollout.compare(works, tasks, 1)  # asserts that all rollouts of both are right
    assert rates["ours, in the process"]["per_cpu_second"] > 2 * rates["plain, in the process"]["per_cpu_second"]


def test_what_a_gold_query_needs_is_read_from_it(tmp_path: Path) -> None:
    import linking

    with sqlite3.connect(tmp_path / "x.sqlite") as connection:
        connection.execute("CREATE TABLE Singer (id INT, Name TEXT, country TEXT)")
        connection.execute("CREATE TABLE concert (singer_id INT, year INT, name TEXT)")
    schema = open_database(tmp_path / "x.sqlite").schema()
    joined = 'SELECT s.name FROM singer AS s JOIN concert ON s.id = singer_id WHERE year > 2000 AND country = "Peru"'
    assert linking.needed(joined, schema) == (
        {"singer", "concert"},
        {("singer", "name"), ("singer", "id"), ("singer", "country"), ("concert", "singer_id"), ("concert", "year")},
    )
    nested = "SELECT count(*) FROM concert WHERE singer_id IN (SELECT id FROM Singer)"
    assert linking.needed(nested, schema) == ({"singer", "concert"}, {("concert", "singer_id"), ("singer", "id")})
    assert linking.needed("not a query", schema) is None
