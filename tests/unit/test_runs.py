"""A run folder has one writer, survives a torn line, and refuses what would mix two runs."""

from __future__ import annotations

import fcntl
import math
import subprocess
import sys
import threading

import pytest

from sqlbench.agent.trajectory import Completion, Trajectory, Transition
from sqlbench.errors import DataError, RunError
from sqlbench.runs import RunFolder, append_line, read_jsonl, read_trajectories


def trajectory(number: int, **fields) -> Trajectory:
    return Trajectory(task_key=f"k{number}", task_id=str(number), db_id="d", question="¿q\u2028?", gold="g", **fields)


def test_what_is_appended_is_read_back(tmp_path):
    records = [trajectory(i, reward=0.5) for i in range(3)]
    with RunFolder(tmp_path / "a" / "run").open({"seed": 1}) as run:
        for record in records:
            run.append("trajectories.jsonl", record)
        run.append("metrics.jsonl", {"step": 1})
    again = RunFolder(tmp_path / "a" / "run")
    assert list(again.trajectories()) == records == list(read_trajectories(again.root))
    assert list(again.metrics()) == [{"step": 1}]
    assert again.config() == {"seed": 1}


def test_the_rollout_of_a_policy_that_diverged_can_be_read_again(tmp_path):
    done = Completion(text="x", response_ids=[1, 2], logprobs=[-math.inf, math.nan])
    record = trajectory(0, transitions=[Transition(agent="write", turn=1, messages=[], completion=done)])
    append_line(tmp_path / "trajectories.jsonl", record)
    (again,) = read_trajectories(tmp_path)
    assert repr(again) == repr(record)


def test_a_torn_last_line_is_dropped_and_overwritten_by_the_next(tmp_path):
    with RunFolder(tmp_path).open({}) as run:
        run.append("trajectories.jsonl", trajectory(1))
    with open(tmp_path / "trajectories.jsonl", "ab") as file:
        file.write(trajectory(2, pred="é" * 100_000).model_dump_json().encode()[:-3])
    assert [t.task_id for t in run.trajectories()] == ["1"]
    with RunFolder(tmp_path).open({}) as run:
        run.append("trajectories.jsonl", trajectory(3))
    assert [t.task_id for t in run.trajectories()] == ["1", "3"]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "trajectories.jsonl").write_text(trajectory(1).model_dump_json() + '\n{"x": 1}\n')
    with pytest.raises(DataError, match="line 2"):
        list(read_trajectories(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("{}\n[]\n")
    with pytest.raises(DataError, match="line 2"):
        list(read_jsonl(tmp_path / "metrics.jsonl"))


def test_a_missing_file_has_no_lines(tmp_path):
    assert list(read_jsonl(tmp_path / "none.jsonl")) == []


def test_a_second_process_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path):
    code = (
        "import sys, time; from sqlbench.runs import RunFolder\n"
        "run = RunFolder(sys.argv[1]).open({'a': 1}); print('locked', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RunError, match="Another process"):
            RunFolder(tmp_path).open({"a": 1})
    finally:
        other.kill()
        other.wait()
    with RunFolder(tmp_path).open({"a": 1}):
        pass


def test_a_finished_run_is_refused_unless_overwriting_is_asked(tmp_path):
    with RunFolder(tmp_path).open({"a": 1}) as run:
        run.append("trajectories.jsonl", trajectory(1))
        run.finish({"n": 1})
    assert run.finished and run.summary() == {"n": 1}
    with pytest.raises(RunError, match="is already finished"):
        RunFolder(tmp_path).open({"a": 1})
    with RunFolder(tmp_path).open({"a": 2}, overwrite=True) as run:
        assert not run.finished and list(run.trajectories()) == []


def test_a_finished_run_that_is_opened_again_for_its_failed_rollouts_is_not_finished(tmp_path):
    with RunFolder(tmp_path).open({"a": 1}) as run:
        run.finish({"failed": 1})
    with RunFolder(tmp_path).open({"a": 1}) as run:
        assert not run.finished, "killed now, it would stay half done, and refused"


def test_who_appends_waits_for_a_line_that_another_process_is_writing(tmp_path):
    path = tmp_path / "trajectories.jsonl"
    with open(path, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b'{"half": ')
        other.flush()
        appending = threading.Thread(target=append_line, args=(path, {"whole": 2}))
        appending.start()
        appending.join(0.5)  # without waiting it would be over by now, and have dropped the half line as a torn one
        other.write(b"1}\n")
    appending.join(20)
    assert list(read_jsonl(path)) == [{"half": 1}, {"whole": 2}]


def test_another_config_is_refused_with_the_difference_named(tmp_path):
    with RunFolder(tmp_path).open({"rollout": {"max_turns": 3}, "seed": 1}):
        pass
    with pytest.raises(RunError, match=r"rollout\.max_turns was 3, is now 1\)"):
        RunFolder(tmp_path).open({"rollout": {"max_turns": 1}, "seed": 1})
    with RunFolder(tmp_path).open({"seed": 1, "rollout": {"max_turns": 3}}):
        pass


def test_an_unwritable_place_is_a_run_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="Cannot write the run folder"):
        RunFolder(tmp_path / "file" / "run").open({})


def test_a_folder_that_is_no_run_says_so(tmp_path):
    with pytest.raises(DataError, match=r"config\.json"):
        RunFolder(tmp_path).config()


def test_rewriting_replaces_all_lines_at_once(tmp_path):
    with RunFolder(tmp_path).open({}) as run:
        for i in range(3):
            run.append("trajectories.jsonl", trajectory(i))
        run.rewrite("trajectories.jsonl", [t for t in run.trajectories() if t.task_id != "1"])
    assert [t.task_id for t in run.trajectories()] == ["0", "2"]
