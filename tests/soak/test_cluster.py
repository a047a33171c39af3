"""Trainings that join a Ray cluster which is there already: on this machine, one node, the laptop profile."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from sqlbench.data.tasks import DataSet
from sqlbench.errors import TrainingError
from sqlbench.grid import SMALLEST
from sqlbench.runs import RunFolder
from sqlbench.training.launch import train

OWN = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
START = "--head --block --num-cpus=8 --num-gpus=1 --include-dashboard=false --object-store-memory=300000000"


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Address of a cluster of this test's own, and the process that holds it."""
    folder = tempfile.mkdtemp(prefix="sqlbench-cluster-")  # short: Ray puts sockets there
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray = Path(sys.executable).with_name("ray")
    arguments = [*START.split(), f"--port={port}", f"--temp-dir={folder}", "--disable-usage-stats"]
    head = subprocess.Popen([ray, "start", *arguments], start_new_session=True, stdout=subprocess.DEVNULL)
    ready = False
    while not ready and head.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            ready = bool(list(Path(folder).glob("session_latest/sockets/raylet*")))
        time.sleep(0.5)
    assert ready, "ray start ended"
    yield f"127.0.0.1:{port}", head
    with suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        head.wait(30)
    for process in psutil.process_iter(["cmdline"]):
        if any(folder in part for part in process.info["cmdline"] or ()):
            with suppress(psutil.Error):
                process.kill()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("name", ["first", "second"])
def test_trainings_join_one_after_the_other_and_leave_the_cluster_as_it_was(
    name: str, cluster: tuple[str, subprocess.Popen[bytes]], pocket: DataSet, tmp_path: Path
) -> None:
    address, head = cluster
    overrides = [*SMALLEST, "trainer.total_training_steps=1", f"ray_kwargs.ray_init.address={address}"]
    folder = train("laptop", name, pocket.root, results=tmp_path, overrides=overrides)
    assert RunFolder(folder).summary()["steps"] == 1 and RunFolder(folder).summary()["failed_rollouts"] == 0
    assert "Connecting to existing Ray cluster" in (folder / "logs/train.log").read_text()
    assert head.poll() is None
    deadline = time.time() + 60
    while (left := _actors(head.pid)) and time.time() < deadline:
        time.sleep(0.5)
    assert not left, "actors of a training outlive it on the cluster"


def test_a_cluster_that_is_not_there_ends_in_one_line(pocket: DataSet, tmp_path: Path) -> None:
    overrides = [*SMALLEST, "trainer.total_training_steps=1", "ray_kwargs.ray_init.address=127.0.0.1:1"]
    with pytest.raises(TrainingError, match=r"training stopped: .*127\.0\.0\.1:1") as caught:
        train("laptop", "none", pocket.root, results=tmp_path, overrides=overrides)
    assert "\n" not in str(caught.value)


def _actors(head: int) -> list[str]:
    """Titles of the cluster's processes that belong to a training."""
    titles = [" ".join(p.cmdline()) for p in psutil.Process(head).children(recursive=True)]
    return [t for t in titles if t.startswith("ray::") and t not in OWN]
