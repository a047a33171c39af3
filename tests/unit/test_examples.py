"""The examples are short and do what their first lines say, each through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sqlbench.agent.trajectory import Trajectory
from sqlbench.cli import main
from sqlbench.runs import RunFolder

NAMES = ("self_consistency", "react_agent", "soft_f1", "bird_data")


def sqlbench_eval(results: Path, *options: str) -> list[Trajectory]:
    """What ``sqlbench eval`` leaves, in the order of the tasks."""
    with pytest.raises(SystemExit) as ended:
        main(["eval", "--run", "example", "--results", str(results), *options])
    assert ended.value.code == 0
    folder = RunFolder(results / "laptop/example")
    assert folder.summary()["failed"] == 0
    return sorted(folder.trajectories(), key=lambda t: t.task_id)


@pytest.fixture
def some(pocket, repo, monkeypatch) -> list[str]:
    """Options for a few tasks, in the folder of the examples."""
    monkeypatch.chdir(repo)
    return ["--data", str(pocket.root), "--split", "train", "--limit", "8"]


def test_each_is_under_fifty_lines_and_named_in_the_list(repo):
    listed = (repo / "examples/README.md").read_text()
    assert {path.stem for path in (repo / "examples").glob("*.py")} == set(NAMES)
    for name in NAMES:
        assert len((repo / f"examples/{name}.py").read_text().splitlines()) < 50 and f"{name}.py" in listed


def test_self_consistency_asks_three_times_and_keeps_the_majority(some, tmp_path):
    name = "examples.self_consistency:SelfConsistency"
    records = sqlbench_eval(tmp_path, *some, "--agent", name, "--temperature", "1", "--max-turns", "1")
    assert len(records) == 8
    for t in records:
        assert [x.agent for x in t.transitions] == ["write"] * 3
        assert t.pred in [e.sql for e in t.executions] and t.reward in (0, 1)
        results = [json.dumps(sorted(map(repr, e.rows))) for e in t.executions if e.status == "ok"]
        final = next((e for e in t.executions if e.sql == t.pred and e.status == "ok"), None)
        if results:
            counts = [results.count(r) for r in results]
            assert results.count(json.dumps(sorted(map(repr, final.rows)))) == max(counts)


def test_react_acts_until_its_turns_are_used(some, tmp_path):
    records = sqlbench_eval(tmp_path, *some, "--agent", "examples.react_agent:ReAct", "--max-turns", "2")
    for t in records:
        assert [(x.agent, x.turn) for x in t.transitions] == [("act", 1), ("act", 2)]
        first, second = t.transitions
        assert second.messages[-1].content.startswith("Result: ") and len(second.messages) == len(first.messages) + 2
        assert t.pred == t.executions[-1].sql


def test_soft_f1_gives_part_of_the_credit(some, tmp_path, monkeypatch):
    some[-1] = "40"
    records = sqlbench_eval(tmp_path, *some, "--reward", "examples.soft_f1:soft_f1")
    # Execution match leaves DISTINCT out of account, as Spider's evaluator does; the cells do not.
    assert all(t.reward == 1 for t in records if t.match == 1 and "DISTINCT" not in t.gold)
    assert any(0 < t.reward < 1 for t in records)
    summary = RunFolder(tmp_path / "laptop/example").summary()
    assert summary["reward"] == pytest.approx(sum(t.reward for t in records) / 40) != summary["score"]["ex"]


def test_bird_is_read_in_its_own_layout(pocket, repo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(repo / "examples/bird_data.py", tmp_path)
    tasks, root = [t for t in pocket.load("train") if t.scorable][:4], tmp_path / "data/bird"
    for db in {t.db_id for t in tasks}:
        (root / "dev_databases" / db).mkdir(parents=True)
        shutil.copy(pocket.database(db), root / "dev_databases" / db)
    levels = ("simple", "moderate", "challenging", "simple")
    rows = [
        {
            "question_id": i,
            "db_id": t.db_id,
            "question": t.question,
            "evidence": "",
            "SQL": t.gold,
            "difficulty": level,
        }
        for i, (t, level) in enumerate(zip(tasks, levels, strict=True))
    ]
    (root / "dev.json").write_text(json.dumps(rows))
    records = sqlbench_eval(tmp_path / "results", "--data", "bird_data:Bird")  # its only split is the headline
    assert [t.hardness for t in records] == ["easy", "medium", "hard", "easy"]
    assert [(t.question, t.gold) for t in records] == [(t.question, t.gold) for t in tasks]
    with pytest.raises(SystemExit):
        main(["eval", "--run", "other", "--data", "bird_data:Bird", "--split", "test"])
    assert "No split 'test' in data/bird. There are: dev." in capsys.readouterr().err
