"""What runs and rollouts look like in a terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sqlbench.agent.trajectory import Completion, Execution, Message, Trajectory, Transition
from sqlbench.cli import main
from sqlbench.data.tasks import DataSet
from sqlbench.runs import RunFolder
from sqlbench_lab.view import MARKS


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run a command and return its status and what it printed."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def made(task: str, reward: float | None, sql: str = "SELECT 1", hardness: str = "easy") -> Trajectory:
    def turn(agent: str, number: int, text: str) -> Transition:
        messages = [Message(role="user", content=f"prompt of {agent}")]
        return Transition(agent=agent, turn=number, messages=messages, completion=Completion(text=text))

    return Trajectory(
        task_key=f"key {task}",
        task_id=task,
        db_id="d",
        question=f"question {task}?",
        gold="SELECT 1",
        hardness=hardness,
        reward=reward,
        error=None if reward is not None else "model: ModelError: gone",
        pred=sql,
        transitions=[turn("write", 1, "SELECT 0"), turn("check", 1, "THE QUERY IS INCORRECT"), turn("rewrite", 2, sql)],
        executions=[
            Execution(turn=1, sql="SELECT 0", status="ok", columns=["0"], rows=[[0]], n_rows=1),
            Execution(turn=2, sql=sql, status="ok", columns=["1"], rows=[[1]], n_rows=1),
        ],
    )


def write_run(folder: Path, *records: Trajectory, ex: float = 0.5) -> Path:
    run = RunFolder(folder)
    with run.open({"kind": "eval", "model": "m", "data": "data/x", "split": "dev"}):
        for record in records:
            run.append("trajectories.jsonl", record)
        run.finish({"score": {"ex": ex, "n": len(records)}})
    return folder


def test_a_question_is_answered_step_by_step(pocket: DataSet, capsys: pytest.CaptureFixture[str]) -> None:
    file = pocket.root / "database/concert/concert.sqlite"
    status, out, _ = call(capsys, "ask", "How many singers are there?", "--db", file)
    assert status == 0 and "write (turn 1)" in out and "-> 1 rows: " in out
    assert out.rstrip().splitlines()[-2:] == ["answer", "  SELECT count(*) FROM singer"]
    assert "| " not in out
    assert "[user]" in call(capsys, "ask", "How many singers are there?", "--db", file, "--verbose")[1]


def test_what_cannot_be_asked_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(capsys, "ask", "How many?", "--db", tmp_path / "none.sqlite")
    assert status == 1 and len(err.strip().splitlines()) == 1 and "none.sqlite" in err
    status, _, err = call(capsys, "ask", "--db", "x")
    assert status == 2 and "question" in err and len(err.strip().splitlines()) == 1


def test_an_answer_that_does_not_run_is_not_given_as_one(
    pocket: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stubborn.py").write_text(
        "from sqlbench.agent.trajectory import Completion\n"
        "class Stubborn:\n"
        "    name, family = 'stubborn', 'chat'\n"
        "    async def complete(self, messages, on_text=None):\n"
        "        return Completion(text='SELECT x FROM nowhere')\n"
        "model = Stubborn()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    file = pocket.root / "database/concert/concert.sqlite"
    status, out, err = call(capsys, "ask", "How many?", "--db", file, "--model", "stubborn:model")
    assert status == 1 and "no such table: nowhere" in out and "answer" not in out
    assert err.strip() == "error: No query that runs after 1 of them. Try a larger --model."


def test_runs_are_listed_and_the_best_comes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "laptop/low", made("a", 1.0), ex=0.25)
    write_run(tmp_path / "laptop/high", made("a", 1.0), ex=0.75)
    RunFolder(tmp_path / "laptop/open").open({"kind": "training", "config": {"sqlbench": {"model": "nano"}}}).close()
    (tmp_path / "laptop/other").mkdir()
    (tmp_path / "laptop/other/config.json").write_text("not ours")
    _, out, _ = call(capsys, "runs", "--results", tmp_path, "--best")
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines[1:]] == ["laptop/high", "laptop/low", "laptop/open"]
    assert lines[1][1:] == ["eval", "m", "data/x", "dev", "75.0", "1", "finished"]
    assert lines[3][1:] == ["training", "nano", "unfinished"]
    assert len(call(capsys, "runs", "--results", tmp_path, "--kind", "eval", "--filter", "low")[1].splitlines()) == 2
    status, _, err = call(capsys, "runs", "--results", tmp_path / "none")
    assert status == 1 and "No runs in" in err


def test_rollouts_are_listed_and_one_is_shown_step_by_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", made("a", 1.0), made("b", 0.0, "SELECT 2"), made("c", None))
    _, out, _ = call(capsys, "show", run)
    listed, usage = out.split("\n\n")
    assert [line.split()[:2] for line in listed.splitlines()] == [["right", "a"], ["wrong", "b"], ["failed", "c"]]
    assert usage.splitlines()[1].split()[:2] == ["all", "9"] and "9 answers have no token counts" in usage
    assert call(capsys, "show", run, "--limit", 1)[1].splitlines()[1] == "... 2 more (--limit)"
    _, out, _ = call(capsys, "show", run, "--task", "b")
    steps = [out.index(text) for text in ("gold", "write (turn 1)", "SELECT 0", "check (turn 1)", "INCORRECT")]
    steps += [out.index(text) for text in ("rewrite (turn 2)", "SELECT 2", "answer")]
    assert steps == sorted(steps) and "prompt of write" not in out
    assert "prompt of write" in call(capsys, "show", run, "--task", "b", "--verbose")[1]
    status, _, err = call(capsys, "show", run, "--task", "z")
    assert status == 1 and "No such rollout" in err and len(err.strip().splitlines()) == 1
    assert "No rollouts in" in call(capsys, "show", tmp_path)[2]


def test_wrong_rollouts_are_shown_by_cause_with_gold_beside_the_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [made("b", 0.0, "SELECT 2"), made("c", 0.0, "SELECT 1, 2"), made("d", 0.0, "SELECT 3")]
    run = write_run(tmp_path / "run", made("a", 1.0), *wrong, made("e", None))
    (run / "config.json").unlink()  # not a whole configuration
    lines = [line.split() for line in call(capsys, "show", run, "--wrong")[1].splitlines() if line]
    assert lines[0] == ["3", "wrong", "rollouts", "by", "cause"]
    assert lines[1:5] == [
        ["2", "other", "difference"],
        ["b", "question", "b?"],
        ["gold", "SELECT", "1"],
        ["predicted", "SELECT", "2"],
    ]
    assert lines[5:] == [
        ["1", "extra", "column"],
        ["c", "question", "c?"],
        lines[3],
        ["predicted", "SELECT", "1,", "2"],
    ]
    assert "question d?" in call(capsys, "show", run, "--wrong", "--verbose")[1]
    page = tmp_path / "page.html"
    call(capsys, "show", run, "--wrong", "--html", page)
    assert "extra column" in page.read_text() and MARKS[1].format("2") in page.read_text()
    assert "question a?" not in page.read_text(), "right rollouts are filtered out"
    none = write_run(tmp_path / "none", made("a", 1.0))
    (none / "config.json").unlink()
    assert call(capsys, "show", none, "--wrong")[1] == "0 wrong rollouts by cause\n"


def test_the_page_of_a_rollout_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, page = write_run(tmp_path / "run", made("a", 1.0), made("b", 0.0, "SELECT 2")), tmp_path / "page.html"
    (run / "config.json").unlink()  # not a whole configuration
    status, _, _ = call(capsys, "show", run, "--task", "b", "--html", page)
    assert status == 0 and "question b?" in page.read_text() and page.read_text().startswith("<!doctype html>")
    assert "No such task" in call(capsys, "show", run, "--task", "z", "--html", page)[2]


def test_two_evaluations_are_compared_task_by_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = [made(t, 0.0) for t in "abcd"] + [made("e", 1.0, hardness="hard"), made("f", 1.0, hardness="hard")]
    after = [made(t, 1.0) for t in "abcd"] + [made("e", 0.0, hardness="hard"), made("f", 1.0, hardness="hard")]
    first, second = write_run(tmp_path / "first", *before), write_run(tmp_path / "second", *after)
    _, out, _ = call(capsys, "compare", first, second, "--limit", 3)
    assert "first: 33.3%" in out and "second: 83.3%" in out
    assert "second - first: +50.0 points" in out and "4 gained, 1 lost" in out
    assert "  easy: +100.0 points" in out and "  hard: -50.0 points" in out
    assert [line.split()[:2] for line in out.splitlines()[-4:-1]] == [["gained", "a"], ["gained", "b"], ["gained", "c"]]
    assert out.splitlines()[-1] == "... 2 more (--limit)"
    fewer = write_run(tmp_path / "fewer", *after[:3])
    status, _, err = call(capsys, "compare", first, fewer)
    assert status == 1 and len(err.strip().splitlines()) == 1
    assert json.loads((first / "summary.json").read_text())["score"]["n"] == 6  # nothing was changed
