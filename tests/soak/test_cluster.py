"""Trainings that join a Ray cluster which is there already: on this machine, one node, the laptop profile."""

from __future__ import annotations

import shutil
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
from sqlbench.grid import SMALLEST
from sqlbench.runs import RunFolder
from sqlbench.training.launch import train

OWN = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
START = "--head --num-cpus=8 --num-gpus=1 --include-dashboard=false --object-store-memory=300000000"


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, psutil.Process]]:
    """Address of a cluster of this test's own, and the process that holds its workers."""
    folder = tempfile.mkdtemp(prefix="sqlbench-cluster-")  # short: Ray puts sockets there
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [*START.split(), f"--port={port}", f"--temp-dir={folder}", "--disable-usage-stats"]
    try:
        subprocess.run([Path(sys.executable).with_name("ray"), "start", *arguments], check=True)
        (raylet,) = (p for p in _processes(folder) if Path(p.cmdline()[0]).name == "raylet")
        yield f"127.0.0.1:{port}", raylet
    finally:
        for process in _processes(folder):
            with suppress(psutil.Error):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _processes(folder: str) -> list[psutil.Process]:
    """Ray's servers: it names its folder in each of their command lines."""
    return [p for p in psutil.process_iter(["cmdline"]) if any(folder in a for a in p.info["cmdline"] or ())]


@pytest.mark.parametrize("name", ["first", "second"])
def test_trainings_join_one_after_the_other_and_leave_the_cluster_as_it_was(
    name: str, cluster: tuple[str, psutil.Process], pocket: DataSet, tmp_path: Path
) -> None:
    address, raylet = cluster
    overrides = [*SMALLEST, "trainer.total_training_steps=1", f"ray_kwargs.ray_init.address={address}"]
    folder = train("laptop", name, pocket.root, results=tmp_path, overrides=overrides)
    assert RunFolder(folder).summary()["steps"] == 1 and RunFolder(folder).summary()["failed_rollouts"] == 0
    assert "Connecting to existing Ray cluster" in (folder / "logs/train.log").read_text()
    assert raylet.is_running()
    deadline = time.time() + 60
    while (left := _actors(raylet)) and time.time() < deadline:
        time.sleep(0.5)
    assert not left, "actors of a training outlive it on the cluster"


def _actors(raylet: psutil.Process) -> list[str]:
    """Titles of the cluster's processes that belong to a training."""
    titles = [p.cmdline()[0].strip() for p in raylet.children(recursive=True) if p.cmdline()]
    return [t for t in titles if t.startswith("ray::") and t not in OWN]
