"""Commands are killed at random moments, as often as SOAK_TRIALS says, and end as if nothing had happened.

A kill hits everything that a command has started, or its main process alone, so that the others have to notice; the
command is started again at once, or when all is quiet. Moments are drawn over as long as an undisturbed run takes.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from sqlbench.data.tasks import DataSet
from sqlbench.runs import RunFolder
from sqlbench_lab.notebooks import ORDER
from sqlbench_lab.sweep import GRIDS, SMALLEST

if TYPE_CHECKING:
    from conftest import Figures, Stage

TIMES = {"seconds", "startup_seconds", "rollout_seconds", "resumed_at", "hours", "step_seconds"}
TIMES |= {"rollout_percent", "update_percent", "p50", "p95"}
"""What may differ between two equal runs."""


@dataclass(frozen=True)
class Case:
    """A command and what it leaves."""

    arguments: Callable[[str, Path], list[str]]
    """Made from the name of the run and the data set."""
    facts: Callable[[Path], Any]
    """What two equal runs have in common, read from the run folder; fails where something is there twice."""
    span: float = 1e9
    """Kills come within so many seconds, where an undisturbed run takes longer: each start has to come far enough."""
    results: str = "results"


def plain(summary: Any) -> Any:
    if not isinstance(summary, dict):
        return summary
    return {key: plain(value) for key, value in summary.items() if key not in TIMES}


def rollouts(folder: Path) -> list[tuple]:
    """Every rollout with its answer, sorted; the file's lines are whole and no rollout is there twice."""
    records = list(RunFolder(folder).trajectories())
    assert len(records) == (folder / "trajectories.jsonl").read_bytes().count(b"\n")
    keys = [(t.step or 0, t.validation, t.sample, t.task_key, t.task_id) for t in records]
    assert len(set(keys)) == len(keys)
    answers = [(t.pred or "", t.reward, t.reason, t.error, len(t.transitions)) for t in records]
    return sorted(zip(keys, answers, strict=True))


def evaluated(folder: Path) -> Any:
    return rollouts(folder), plain(RunFolder(folder).summary())


class Weights:
    """Weights of a policy, equal to others as far as rounding goes.

    With several turns the time decides which prompts share a batch, and a batch decides the last bits of probabilities.
    """

    def __init__(self, policy: Path) -> None:
        self.tensors = load_file(policy / "model.safetensors")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Weights) or self.tensors.keys() != other.tensors.keys():
            return False
        return all(torch.allclose(t, other.tensors[name], rtol=0, atol=1e-5) for name, t in self.tensors.items())

    __hash__ = None  # type: ignore[assignment]


def trained(folder: Path) -> Any:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rewards = [(x["step"], x["data"].get("sqlbench/ex"), x["data"].get("sqlbench/val_ex")) for x in lines]
    assert [step for step, _, _ in rewards] == list(range(len(rewards)))
    saved = sorted(path.name for path in (folder / "checkpoints").glob("global_step_*"))
    return rollouts(folder), plain(RunFolder(folder).summary()), rewards, Weights(folder / "policy"), saved


def ablated(folder: Path) -> Any:
    cells = {path.parent.name: plain(json.loads(path.read_text())) for path in folder.glob("cells/*/cell.json")}
    assert len(cells) == len(GRIDS["smoke"].cells)
    return cells, {name: trained(folder / "cells" / name / "train") for name in cells}


def executed(folder: Path) -> Any:
    assert sorted(path.stem for path in (folder / "notebooks").glob("*.ipynb")) == sorted(ORDER)
    cells = {path.parent.name: plain(json.loads(path.read_text())) for path in folder.glob("cells/*/cell.json")}
    return cells, {name: trained(folder / "cells" / name / "train") for name in cells}


NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
CASES = {
    "eval": Case(lambda run, data: ["eval", "--run", run, "--data", str(data), "--limit", "60"], evaluated),
    "train": Case(
        lambda run, data: [
            "train", "--run", run, "--data", str(data), *SMALLEST,
            "actor_rollout_ref.rollout.n=8",  # so that groups differ and every step changes the weights
            "trainer.total_training_steps=4", "trainer.save_freq=1", "trainer.test_freq=2",
        ],
        trained,
    ),
    "ablate": Case(
        lambda run, data: ["ablate", "--grid", "smoke", "--run", run, "--data", str(data)], ablated, span=60
    ),
    "notebooks": Case(
        lambda run, data: ["notebooks", "--profile", "smoke", "--run", run, "--folder", str(NOTEBOOKS)],
        executed,
        span=60,
        results="results/smoke",
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", CASES)
def test_killed_at_random_moments_it_ends_as_if_undisturbed(
    command: str, pocket: DataSet, stage: Stage, figures: Figures, trials: int, seed: int
) -> None:
    case, random = CASES[command], Random(f"{seed} {command}")
    laptop = stage.home / case.results / "laptop"
    started = time.monotonic()
    assert stage.run(*case.arguments("undisturbed", pocket.root)) == 0, stage.last(20)
    duration = time.monotonic() - started
    expected = case.facts(laptop / "undisturbed")
    kills = alone = runs = 0
    while kills < trials:
        name = f"run{runs}"
        while True:
            process = stage.start(*case.arguments(name, pocket.root))
            try:
                moment = random.uniform(0, min(duration, case.span)) if kills < trials else 900
                status = process.wait(moment)
            except subprocess.TimeoutExpired:
                assert kills < trials, f"no end after 900 s: {stage.last(20)}"
                everything = random.random() < 0.5
                stage.kill(process, everything)
                kills, alone = kills + 1, alone + (not everything)
                if random.random() < 0.5:
                    assert not [line for line in stage.settled() if "/" in line], "processes outlive the kill"
                continue
            # A kill after the summary was written left nothing to do, and the command says so.
            assert status == 0 or " is already finished: " in stage.last(), stage.last(20)
            break
        assert case.facts(laptop / name) == expected
        runs += 1
    assert stage.settled() == []
    value = (
        f"{kills} kills, {alone} of them of the main process alone, in {runs} runs; all ended as the undisturbed one"
    )
    figures.record("kill -9", f"sqlbench {command}", value)


@pytest.mark.parametrize("command", CASES)
def test_ctrl_c_stops_within_five_seconds_and_says_how_to_go_on(
    command: str, pocket: DataSet, stage: Stage, figures: Figures, trials: int, seed: int
) -> None:
    case, random, slowest = CASES[command], Random(f"{seed} {command} interrupt"), 0.0
    laptop = stage.home / case.results / "laptop"
    for trial in range(max(1, trials // 4)):
        process = stage.start(*case.arguments(f"run{trial}", pocket.root))
        while not any(laptop.glob(f"run{trial}/**/.lock")) and process.poll() is None:
            time.sleep(0.05)
        time.sleep(random.uniform(0, 3 if command == "eval" else 25))
        stage.log.write_text("")
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (130, 0), stage.last(20)
        if process.returncode == 130:
            assert "Run the same command again to resume" in stage.last()
            slowest = max(slowest, time.monotonic() - started)
            assert slowest < 5
    assert stage.settled() == []
    figures.record("Ctrl-C", f"sqlbench {command}", f"{trial + 1} times, stopped within {slowest:.1f} s")
