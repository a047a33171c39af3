"""An evaluation through a full disk, a kill and a missing database ends with the rows of one that nothing happened to.

The long form, with every command and random moments, is tests/soak.
"""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sqlbench.data.tasks import DataSet
from sqlbench.errors import RunError
from sqlbench.evaluation import evaluate
from sqlbench.runs import RunFolder
from sqlbench_chat.generations import Feedback, FeedbackStore

LIMIT = 16


def start(
    data: Path, results: Path, *options: str, largest_file: int = resource.RLIM_INFINITY
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            Path(sys.executable).with_name("sqlbench"), "eval", "--run", "run", "--limit", str(LIMIT),
            "--concurrency", "4", "--data", str(data), "--results", str(results),
        ],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY)),
    )  # fmt: skip


def rows(folder: RunFolder) -> list[tuple]:
    return sorted((t.task_key, t.task_id, t.pred, t.reward, t.reason, t.error) for t in folder.trajectories())


def test_a_full_disk_a_lost_database_and_a_kill_lose_nothing(pocket: DataSet, tmp_path: Path) -> None:
    data, results = tmp_path / "data", tmp_path / "results"
    shutil.copytree(pocket.root, data)
    run = RunFolder(results / "laptop/run")

    full = start(data, results, largest_file=60_000)
    error = full.communicate(timeout=120)[1].splitlines()[-1]
    assert full.returncode == 1 and error.startswith("error: Cannot write") and "File too large" in error
    kept = rows(run)
    assert 0 < len(kept) < LIMIT

    lost = next(t.db_id for t in DataSet(data).load("headline")[:LIMIT] if t.key not in {row[0] for row in kept})
    away = data / "database" / lost
    away.rename(tmp_path / "away")
    broken = start(data, results)
    broken.communicate(timeout=120)
    assert any(t.failed and t.db_id == lost and t.reward is None for t in run.trajectories())
    (tmp_path / "away").rename(away)

    killed = start(data, results)
    seen = len(rows(run))
    deadline = time.monotonic() + 120
    while killed.poll() is None and len(rows(run)) in (0, seen) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    with open(run.root / "trajectories.jsonl", "ab") as file:
        file.write(b'{"task_key": "torn')

    last = start(data, results)
    errors = last.communicate(timeout=120)[1]
    undisturbed = evaluate(data, "headline", "nano", "undisturbed", results=results, limit=LIMIT, concurrency=4)
    if killed.returncode == -signal.SIGKILL:
        assert last.returncode == 0, errors
    assert rows(run) == rows(RunFolder(results / "laptop/undisturbed"))
    times = {"seconds": 0, "rollout_seconds": 0, "usage": 0}
    assert run.summary() | times == undisturbed.model_dump(mode="json") | times


def test_a_full_disk_keeps_the_feedback_that_was_given(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "feedback.jsonl")
    store.append(Feedback(question="first", db="d", sql="SELECT 1"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (store.path.stat().st_size + 20, before[1]))
    try:
        with pytest.raises(RunError, match=r"Cannot write .*feedback.jsonl: File too large"):
            store.append(Feedback(question="lost", db="d", sql="SELECT 2"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [f.question for f in store.all()] == ["first"]
    store.append(Feedback(question="second", db="d", sql="SELECT 3"))
    assert [f.question for f in store.all()] == ["first", "second"]
