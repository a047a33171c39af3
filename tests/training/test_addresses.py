"""A training whose data set has the address of a PostgreSQL database: checked before, and used by its rollouts."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from pocket import NANO_PATH
from sqlbench.data.audit import audit_dataset
from sqlbench.data.tasks import DataSet, Task, write_split
from sqlbench.errors import DatabaseError
from sqlbench.profiles import PROFILES
from sqlbench.runs import read_trajectories
from sqlbench_train.compose import compose
from sqlbench_train.preflight import load_tasks

GOLD = "SELECT count(*) FROM singer"
WRONG = "SELECT name FROM singer"


@pytest.fixture
def root(postgres, tmp_path):
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(
            "DROP TABLE IF EXISTS singer; CREATE TABLE singer (name text); INSERT INTO singer VALUES ('Ann')"
        )
    (tmp_path / "data" / "database").mkdir(parents=True)
    (tmp_path / "data" / "database" / "club.url").write_text(postgres.replace("//postgres:@", "//postgres@"))
    for split in ("train", "dev"):
        task = Task(task_id=split, db_id="club", question="How many singers are there?", gold=GOLD, split=split)
        write_split(tmp_path / "data", split, [task])
    (tmp_path / "data" / "dataset.json").write_text("{}")
    audit_dataset(tmp_path / "data", query_timeout=30)
    return tmp_path / "data"


def configured(root, tmp_path, *overrides):
    return compose(
        PROFILES["laptop"],
        run="r",
        folder=tmp_path / "r",
        data=root,
        model=str(NANO_PATH),
        overrides=["sqlbench.query_timeout=30", *overrides],
    )


def test_tasks_are_loaded_and_a_server_that_is_away_is_one_line(root, tmp_path):
    train, validation = load_tasks(configured(root, tmp_path))
    assert ([t.scorable for t in train], len(validation)) == ([True], 1)
    (root / "database" / "club.url").write_text("postgresql://me@localhost:1/club")
    with pytest.raises(DatabaseError, match="Cannot open postgresql://me@localhost:1/club") as caught:
        load_tasks(configured(root, tmp_path))
    assert "\n" not in str(caught.value)


def test_a_rollout_of_the_agent_loop_is_rewarded_by_the_server_of_the_database(root, tmp_path):
    from transformers import AutoTokenizer

    from sqlbench_train.agent_loop import SqlAgentLoop

    tokenizer = AutoTokenizer.from_pretrained(NANO_PATH)
    answers = iter([WRONG, GOLD])

    class Server:
        async def generate(self, **_: Any) -> Any:
            ids = [*tokenizer.encode(next(answers), add_special_tokens=False), tokenizer.eos_token_id]
            return SimpleNamespace(token_ids=ids, log_probs=[-1.0] * len(ids), extra_fields={}, stop_reason="stop")

    config = configured(root, tmp_path, "sqlbench.max_turns=1")
    (tmp_path / "r").mkdir()
    loop = SqlAgentLoop(SimpleNamespace(config=config), Server(), tokenizer, SimpleNamespace(config={}))
    task = next(iter(DataSet(root).load("train")))
    for session in range(2):
        info = {"task": task.model_dump_json(), "validation": False}
        row = {"extra_info": info, "global_steps": 1, "session_id": session}
        outputs = asyncio.run(loop.run({"temperature": 1.0}, **row))
        assert [output.reward_score for output in outputs] == [float(session)]
    first, second = read_trajectories(tmp_path / "r" / "trajectories.jsonl")
    assert (first.reward, second.reward, second.dialect) == (0.0, 1.0, "postgresql")
    assert json.loads((root / "audit.json").read_text())["excluded"] == []
