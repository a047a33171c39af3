"""LoRA through verl on a CPU: rollouts sample what is trained, and the exported policy is a plain checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pocket import NANO_PATH
from sqlbench.data.tasks import DataSet
from sqlbench.evaluation import evaluate
from sqlbench_train.launch import train
from sqlbench_train.metrics import read_rows
from sqlbench_train.serve import find_policy

pytestmark = pytest.mark.training
LORA = [
    "actor_rollout_ref.model.lora_rank=4",
    "actor_rollout_ref.model.lora_alpha=8",
    "actor_rollout_ref.actor.optim.lr=0.01",
    "data.train_batch_size=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.rollout.n=4",
    "sqlbench.max_turns=1",
    "sqlbench.drop_useless_groups=false",
    "sqlbench.validation_tasks=2",
    "sqlbench.sampling=uniform",
    "trainer.total_training_steps=2",
    "trainer.save_freq=1",
    "trainer.test_freq=2",
]


@pytest.fixture(scope="module")
def run(pocket: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("laptop", "run", pocket.root, results=tmp_path_factory.mktemp("results"), overrides=LORA)


def test_rollouts_sample_from_the_adapted_weights(run: Path) -> None:
    rows = read_rows(run / "metrics.jsonl")
    assert sorted(rows) == [0, 1, 2] and json.loads((run / "summary.json").read_text())["failed_rollouts"] == 0
    assert all(rows[step]["training/rollout_probs_diff_max"] < 1e-4 for step in (1, 2)), rows


def test_the_policy_is_nano_with_the_adapters_added(run: Path) -> None:
    nano, policy = load_file(NANO_PATH / "model.safetensors"), load_file(run / "policy/model.safetensors")
    assert policy.keys() == nano.keys()
    saved = load_file(run / "checkpoints/global_step_2/actor/huggingface/model.safetensors")
    changed = {name for name in nano if not torch.equal(nano[name], policy[name])}
    assert changed and all("_proj" in name for name in changed)
    for name in changed:
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        down, up = (saved[f"{layer}.lora_{side}.default.weight"] for side in "AB")
        assert down.shape[0] == up.shape[1] == 4
        torch.testing.assert_close(policy[name], nano[name] + 8 / 4 * up @ down)


def test_the_run_is_evaluated_and_can_be_served(run: Path, pocket: DataSet, tmp_path: Path) -> None:
    summary = evaluate(pocket.root, "headline", str(run), "r", results=tmp_path, limit=3)
    assert summary.failed == 0 and summary.score.n == 3
    assert find_policy(str(run))[0] == (run / "policy").resolve()
