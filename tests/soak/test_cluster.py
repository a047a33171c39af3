"""Trainings that join a Ray cluster which is there already: one node, and two, all of them raylets on this machine.

What two machines would have of their own (addresses, clocks, disks) is shared here.
"""

from __future__ import annotations

import json
import os
import secrets
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
from typing import TYPE_CHECKING

import psutil
import pytest

from sqlbench.data.tasks import DataSet
from sqlbench.errors import TrainingError
from sqlbench.models.policy import checkpointed, latest_checkpoint
from sqlbench.profiles import PROFILES
from sqlbench.runs import RunFolder
from sqlbench_lab.sweep import SMALLEST
from sqlbench_train.launch import train
from sqlbench_train.metrics import read_rows
from verl_cpu.engine import LocalEngine

from . import counted
from .test_kill import CASES

if TYPE_CHECKING:
    from .conftest import Figures, Stage

OWN = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
NODE = "--num-cpus=16 --num-gpus=2 --object-store-memory=300000000 --disable-usage-stats"
STEPS = (1, 2)
COMPARED = (
    "data.train_batch_size=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.policy_loss.loss_mode=token_mean",  # by rollout a loss is about 0, whatever is compared
    "actor_rollout_ref.rollout.n=4",
    "sqlbench.control=coin",  # groups divide whatever the policy answers
    "sqlbench.sampling=uniform",  # so that the number of rollouts is known
    "sqlbench.validation_tasks=2",
    "trainer.total_training_steps=2",
    "trainer.save_freq=2",
    "trainer.test_freq=-1",
)


class Cluster:
    """A Ray cluster of these tests' own; a token of its own is in the environment. Each node has GPUs for two ranks."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="sqlbench-cluster-")  # short: Ray puts sockets there
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"

    def add(self) -> psutil.Process:
        """Start a node, at first the head; its raylet, of which its workers are children."""
        if self.raylets():
            return self._start(f"--address={self.address}")
        return self._start("--head", f"--port={self.port}", f"--temp-dir={self.folder}", "--include-dashboard=false")

    def _start(self, *arguments: str) -> psutil.Process:
        before, here = self.raylets(), Path(__file__).resolve().parent
        # What each node must be able to import; the second makes Ray's own processes start faster.
        paths = [here.parents[1], here.parents[1] / "verl_cpu/startup", here]
        patience = PROFILES["laptop"].environment | {"RAY_agent_register_timeout_ms": "300000"}
        subprocess.run(
            [Path(sys.executable).with_name("ray"), "start", *arguments, *NODE.split()],
            env=os.environ | patience | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
            check=True,
        )
        (raylet,) = (p for p in self.raylets() if p not in before)
        return raylet

    def raylets(self) -> list[psutil.Process]:
        """One process a node."""
        return [p for p in self._processes() if Path(p.cmdline()[0]).name == "raylet"]

    def _processes(self) -> list[psutil.Process]:
        """Ray's servers: it names its folder in each of their command lines."""
        return [p for p in psutil.process_iter(["cmdline"]) if any(self.folder in a for a in p.info["cmdline"] or ())]

    def left(self, seconds: float = 60) -> list[str]:
        """Titles of the processes of a training that are still there after a while."""
        deadline = time.monotonic() + seconds
        while (found := self._actors()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return found

    def _actors(self) -> list[str]:
        titles = []
        for process in (child for raylet in self.raylets() for child in raylet.children(recursive=True)):
            with suppress(psutil.Error):
                titles += [line[0].strip() for line in [process.cmdline()] if line]
        return [t for t in titles if t.startswith("ray::") and t not in OWN]

    def end(self) -> None:
        """Kill it all."""
        for process in [child for raylet in self.raylets() for child in raylet.children(recursive=True)]:
            kill(process)
        for process in self._processes():
            kill(process)
        shutil.rmtree(self.folder, ignore_errors=True)


def kill(*processes: psutil.Process) -> None:
    """Kill -9, in the order given."""
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster of one node."""
    cluster = Cluster()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        try:
            cluster.add()
            yield cluster
        finally:
            cluster.end()


@pytest.fixture
def second(cluster: Cluster) -> Iterator[psutil.Process]:
    """Another node, for one test."""
    raylet = cluster.add()
    yield raylet
    with suppress(psutil.Error):
        kill(raylet, *raylet.children(recursive=True))


@pytest.mark.parametrize("name", ["first", "second"])
def test_trainings_join_one_after_the_other_and_leave_the_cluster_as_it_was(
    name: str, cluster: Cluster, pocket: DataSet, tmp_path: Path
) -> None:
    before = cluster.raylets()
    overrides = [*SMALLEST, "trainer.total_training_steps=1", f"ray_kwargs.ray_init.address={cluster.address}"]
    folder = train("laptop", name, pocket.root, results=tmp_path, overrides=overrides)
    assert RunFolder(folder).summary()["steps"] == 1 and RunFolder(folder).summary()["failed_rollouts"] == 0
    assert "Connecting to existing Ray cluster" in (folder / "logs/train.log").read_text()
    assert cluster.raylets() == before
    assert not cluster.left(), "actors of a training outlive it on the cluster"


def test_two_nodes_train_as_one_does_and_share_the_rollouts(
    cluster: Cluster,
    second: psutil.Process,
    pocket: DataSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    figures: Figures,
) -> None:
    """Compared with as many ranks on one node, whose gradients are summed in the same parts.

    With one rank the loss is the same too (`tests/training/test_ranks.py`), but its gradients are rounded differently,
    and Adam makes a step of a gradient as small as that: 1 of 918,912 weights was 4e-5 apart.
    """
    monkeypatch.setenv("PYTHONPATH", str(Path(counted.__file__).parent))
    monkeypatch.setenv(counted.FILE, str(tmp_path / "counted"))
    runs = {}
    joined = [f"ray_kwargs.ray_init.address={cluster.address}", *counted.OVERRIDES]
    for nodes, more in ((1, ["trainer.n_gpus_per_node=2"]), (2, ["trainer.nnodes=2", *joined])):
        overrides = [*COMPARED, *more]
        runs[nodes] = train("laptop", f"nodes{nodes}", pocket.root, results=tmp_path, overrides=overrides)

    sampled = [
        {
            (r.step, r.task_key, r.sample, number): t.completion.response_ids
            for r in RunFolder(folder).trajectories()
            if not r.validation
            for number, t in enumerate(r.transitions)
        }
        for folder in runs.values()
    ]
    assert sampled[0] == sampled[1] and len({key[:3] for key in sampled[0]}) == 32
    one, two = (read_rows(folder / "metrics.jsonl") for folder in runs.values())
    worst = 0.0
    for step in STEPS:
        for name in ("actor/pg_loss", "actor/grad_norm", "actor/entropy"):
            assert one[step][name] == pytest.approx(two[step][name], rel=1e-5, abs=1e-7), name
            worst = max(worst, abs(one[step][name] - two[step][name]))
    assert any(abs(one[step]["actor/pg_loss"]) > 1e-3 for step in STEPS), "nothing was compared"
    weights = [LocalEngine(latest_checkpoint(folder)).model.state_dict() for folder in runs.values()]
    apart = max(float((tensor - weights[1][name]).abs().max()) for name, tensor in weights[0].items())
    assert apart < 1e-5

    found = json.loads((tmp_path / "counted").read_text())
    assert len(found["prompts"]) == len(found["workers"]) == 2 and set(found["workers"].values()) == {1}
    least, all_of_them = min(found["prompts"].values()), sum(found["prompts"].values())
    assert least > all_of_them / 4
    figures.record("two nodes", "loss, gradient norm, entropy against one node", f"at most {worst:.1g} apart")
    figures.record("two nodes", "weights after two steps, against one node", f"at most {apart:.1g} apart")
    figures.record("two nodes", "prompts sampled", f"{all_of_them - least} on one, {least} on the other")


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "silent"])
def test_a_lost_node_ends_a_training_in_one_line_and_the_same_command_resumes_on_the_other(
    sent: signal.Signals, cluster: Cluster, second: psutil.Process, pocket: DataSet, stage: Stage, figures: Figures
) -> None:
    """Killed, its connections break at once; stopped, it only falls silent, as a machine without power does."""
    command = [*CASES["train"].arguments("run", pocket.root), "trainer.nnodes=2"]
    command += [f"ray_kwargs.ray_init.address={cluster.address}", "trainer.total_training_steps=6"]
    process, folder = stage.start(*command), stage.results / "laptop/run"
    while not checkpointed(folder) and process.poll() is None:
        time.sleep(0.1)
    assert process.poll() is None, stage.last(20)
    lost = [second, *second.children(recursive=True)]
    for one in lost:
        with suppress(psutil.Error):
            one.send_signal(sent)
    began = time.monotonic()
    assert process.wait(300) == 1, stage.last(20)
    seconds = time.monotonic() - began
    line = stage.last()
    assert line.startswith("error: Training stopped: TrainingError: a process of the training is gone ("), line
    assert "verl_cpu_server_" in line and "a node may be lost, or the memory used up. See " in line
    assert "Traceback" not in stage.log.read_text()
    kill(*lost)
    assert not cluster.left(), "actors of a training outlive it on the other node"

    assert stage.run(*command) == 0, stage.last(20)
    assert RunFolder(folder).summary()["resumed_at"] >= 1
    CASES["train"].facts(folder)  # every step and every rollout is there once
    assert len(cluster.raylets()) == 1
    what = "killed" if sent == signal.SIGKILL else "silent"
    figures.record("two nodes", f"one of them {what}", f"one line after {seconds:.0f} s, resumed on the other")


def test_a_cluster_without_room_is_refused_and_not_waited_for(
    cluster: Cluster, second: psutil.Process, pocket: DataSet, tmp_path: Path
) -> None:
    """There are four GPUs, but no node has three."""
    overrides = [*SMALLEST, f"ray_kwargs.ray_init.address={cluster.address}", "trainer.n_gpus_per_node=3"]
    overrides += ["actor_rollout_ref.rollout.n=3"]  # verl wants rollouts for every rank
    with pytest.raises(TrainingError, match="TrainingError: The Ray cluster has room for 0 of 1 nodes") as caught:
        train("laptop", "run", pocket.root, results=tmp_path, overrides=overrides)
    assert "\n" not in str(caught.value)
