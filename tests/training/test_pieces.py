"""The parts of training on known numbers: composition, refusals, advantage, loss weights, tokens."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import verl_cpu
from pocket import NANO_PATH
from sqlbench.agent.trajectory import Completion, Execution, Message, Trajectory, Transition
from sqlbench.data.tasks import DataSet
from sqlbench.errors import (
    DataError,
    ModelError,
    PluginError,
    PromptTooLongError,
    RunError,
    SqlbenchError,
    TrainingError,
)
from sqlbench.models.policy import latest_checkpoint
from sqlbench.profiles import PROFILES
from sqlbench.runs import RunFolder
from sqlbench_train import processes
from sqlbench_train.compose import changes, compose, recipes
from sqlbench_train.launch import describe, train
from sqlbench_train.metrics import TrajectoryReader, read_rows, step_metrics, write_rows

SEED_EXPERIMENT = [
    "algorithm.adv_estimator=grpo",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
    "trainer.n_gpus_per_node=1",
    "data.train_batch_size=32",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=16",  # published 32 meant rows; see the recipe
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.multi_turn.format=hermes",
    "actor_rollout_ref.model.path=Qwen/Qwen2.5-Coder-3B-Instruct",
    "data.max_prompt_length=4096",
    "data.max_response_length=2048",
    "data.truncation=error",
    "trainer.val_before_train=True",
    "actor_rollout_ref.actor.optim.lr=1e-06",
    "actor_rollout_ref.model.use_remove_padding=True",
    "actor_rollout_ref.actor.use_kl_loss=False",
    "actor_rollout_ref.actor.kl_loss_coef=0.0",
    "actor_rollout_ref.actor.entropy_coeff=0",
    "actor_rollout_ref.actor.clip_ratio_low=0.2",
    "actor_rollout_ref.actor.clip_ratio_high=0.3",
    "actor_rollout_ref.model.enable_gradient_checkpointing=True",
    "actor_rollout_ref.actor.fsdp_config.param_offload=True",
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload=True",
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.gpu_memory_utilization=0.8",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.ref.fsdp_config.param_offload=True",
    "algorithm.use_kl_in_reward=False",
    "trainer.critic_warmup=0",
    "trainer.nnodes=1",
    "trainer.save_freq=256",
    "trainer.test_freq=32",
    "trainer.total_epochs=2",
]


def composed(profile: str, tmp_path: Path, *overrides: str, recipe: str | None = None) -> Any:
    model = str(NANO_PATH) if profile == "laptop" else PROFILES[profile].model
    return compose(
        PROFILES[profile],
        run="r",
        folder=tmp_path / "r",
        data=tmp_path / "data",
        model=model,
        overrides=overrides,
        recipe=recipe,
    )


def test_the_recipe_seed_has_every_parameter_of_the_seed_experiment(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    config = composed("gpu", tmp_path, recipe="seed")
    for line in SEED_EXPERIMENT:
        key, value = line.split("=")
        assert str(OmegaConf.select(config, key)) == value, key
    assert config.sqlbench.trained_agents == "write" and config.sqlbench.max_turns == 3
    assert config.actor_rollout_ref.rollout.val_kwargs.temperature == 0


@pytest.mark.parametrize(("profile", "recipe"), [("gpu", None), ("gpu", "seed"), ("laptop", None)])
def test_profiles_pass_verls_own_validation(profile: str, recipe: str | None, tmp_path: Path) -> None:
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    config = composed(profile, tmp_path, recipe=recipe)
    assert not need_critic(config) and not need_reference_policy(config)
    validate_config(config, use_reference_policy=False, use_critic=False)
    for section in (config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.algorithm):
        omega_conf_to_dataclass(section)


@pytest.mark.parametrize(("profile", "recipe"), [("gpu", None), *(("gpu", r) for r in recipes()), ("laptop", None)])
def test_profiles_only_name_keys_that_verl_has(profile: str, recipe: str | None, tmp_path: Path) -> None:
    import verl
    from hydra import compose as plain
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer/config"), version_base=None):
        defaults = OmegaConf.to_container(plain("ppo_trainer"))

    def unknown(tree: dict, below: Any, at: str = "") -> set[str]:
        if not isinstance(below, dict) or not below:
            return set()  # a free mapping, such as engine_kwargs
        return {
            name
            for key, value in tree.items()
            for name in ({at + key} if key not in below else unknown(value, below[key], f"{at}{key}."))
            if isinstance(value, dict) or key not in below
        }

    ours = {"sqlbench", "actor_rollout_ref.rollout.engine_kwargs.local"}
    ray = {f"ray_kwargs.ray_init.{name}" for name in ("address", "include_dashboard", "num_gpus")}
    silent = {  # verl reads them; its YAML leaves them out
        "actor_rollout_ref.actor.fsdp_config.mixed_precision",
        "actor_rollout_ref.rollout.agent.agent_loop_manager_class",
    }
    assert unknown(changes(profile, recipe), defaults) <= ours | ray | silent


def test_overrides_win_over_the_profile_and_seed_the_data_order(tmp_path: Path) -> None:
    config = composed("laptop", tmp_path, "actor_rollout_ref.rollout.n=4", "sqlbench.seed=7", "+trainer.extra=1")
    assert config.actor_rollout_ref.rollout.n == 4 and config.data.seed == 7 and config.trainer.extra == 1


@pytest.mark.parametrize(
    "override",
    [
        "actor_rollout_ref.rolout.n=4",
        "nonsense",
        "sqlbench.trained_agents=[",
        "trainer.nope=1",
        "sqlbench.drop_useless_groups=maybe",
    ],
)
def test_a_wrong_override_is_one_line_that_names_it(override: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        composed("laptop", tmp_path, override)
    assert "\n" not in str(caught.value) and override.split("=")[0].split(".")[-1][:5] in str(caught.value)


def test_dry_run_prints_the_config_and_the_needs_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("gpu", "r", tmp_path, results=tmp_path / "results", dry_run=True)
    out = capsys.readouterr().out
    assert (
        "gpu_memory_utilization: 0.5" in out
        and "warning" not in out
        and "# needs 1 GPU(s)" in out
        and "# needs vllm" in out
    )
    assert "downloaded from the Hugging Face hub" in out and not (tmp_path / "results").exists()


def test_dry_run_warns_first_and_in_one_line_of_a_card_that_is_too_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqlbench_train.preflight.gpu_bytes", lambda: 24_000_000_000)
    train("gpu", "r", tmp_path, overrides=["sqlbench.max_turns=1"], recipe="seed", dry_run=True)
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("# warning: This may not fit GPUs of 24.0 GB: it takes about ") and second[0] != "#"


def test_the_recipe_is_on_record_and_overrides_win_over_it(
    tmp_path: Path, pocket: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(OWN_TRAINER)
    overrides = ["sqlbench.trainer=mine:Trainer", "trainer.total_training_steps=1", "sqlbench.sample_rows=1"]
    folder = train("laptop", "r", pocket.root, overrides=overrides, results=tmp_path / "results", recipe="seed")
    record = RunFolder(folder).config()
    assert record["recipe"] == "seed"
    ours = record["config"]["sqlbench"]
    assert (ours["credit"], ours["agent"], ours["strict"], ours["sample_rows"]) == ("published", "published", False, 1)


def test_a_batch_of_the_recipe_seed_is_two_optimizer_steps_with_old_log_probabilities(tmp_path: Path) -> None:
    config = composed("gpu", tmp_path, recipe="seed")
    assert config.data.train_batch_size / config.actor_rollout_ref.actor.ppo_mini_batch_size == 2
    assert config.algorithm.rollout_correction.bypass_mode is False


def test_dry_run_refuses_what_verl_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TrainingError, match=r"refused by verl: .*\(32\) must be >= actor.ppo_mini_batch_size \(64\)"):
        overrides = ["actor_rollout_ref.actor.ppo_mini_batch_size=64", "actor_rollout_ref.actor.use_dynamic_bsz=false"]
        train("gpu", "r", tmp_path, overrides=overrides, dry_run=True)
    assert not capsys.readouterr().out


OWN_TRAINER = """
class Trainer:
    def fit(self, run, config, tasks, validation):
        return {"steps": config.trainer.total_training_steps, "tasks": len(tasks), "validation": len(validation)}
"""


def refusals(tmp_path: Path, pocket: DataSet) -> dict[str, tuple[dict[str, Any], type[SqlbenchError], str]]:
    broken = tmp_path / "broken"
    broken.mkdir()
    mute = shutil.copytree(NANO_PATH, tmp_path / "mute")
    (mute / "chat_template.jinja").unlink()
    finished = tmp_path / "results/laptop/finished"
    finished.mkdir(parents=True)
    (finished / "summary.json").write_text("{}")
    data = pocket.root
    return {
        "profile": ({"profile": "tpu", "data": data}, RunError, "Unknown profile: tpu"),
        "data": ({"data": tmp_path / "none"}, DataError, "No data set in"),
        "model": ({"data": data, "model": "no/such/folder"}, ModelError, "No checkpoint folder"),
        "half model": ({"data": data, "model": str(broken)}, ModelError, "Not a complete Hugging Face checkpoint"),
        "no template": ({"data": data, "model": str(mute)}, ModelError, "chat template .* it has none"),
        "agents": ({"data": data, "overrides": ["sqlbench.trained_agents=reader"]}, TrainingError, "Nothing to train"),
        "turns": (
            {"data": data, "overrides": ["sqlbench.trained_agents='check|^rewrite'", "sqlbench.max_turns=1"]},
            TrainingError,
            "Nothing to train with 1 turn",
        ),
        "no check": (
            {"data": data, "overrides": ["sqlbench.trained_agents=check", "sqlbench.check=False"]},
            TrainingError,
            "trained_agents=check. .*: write, rewrite",
        ),
        "no rewrite": (
            {"data": data, "overrides": ["sqlbench.trained_agents=rewrite", "sqlbench.repair=resample"]},
            TrainingError,
            "trained_agents=rewrite. .*: write, check",
        ),
        "regex": (
            {"data": data, "overrides": ["sqlbench.trained_agents='('"]},
            TrainingError,
            "Not a regular expression",
        ),
        "bracket": (
            {"data": data, "overrides": ["sqlbench.trained_agents='['"]},
            TrainingError,
            "Not a regular expression",
        ),
        "number": ({"data": data, "overrides": ["sqlbench.trained_agents=1"]}, TrainingError, "Nothing to train"),
        "batch": ({"data": data, "overrides": ["data.train_batch_size=9999"]}, TrainingError, "one batch of 9999"),
        "samples": ({"data": data, "overrides": ["data.train_max_samples=3"]}, TrainingError, "train_max_samples=3"),
        "epochs": (
            {"data": data, "overrides": ["trainer.total_epochs=1", "trainer.total_training_steps=9999"]},
            TrainingError,
            "Too many steps .*: 9999",
        ),
        "no saving": (
            {"data": data, "overrides": ["trainer.save_freq=null"]},
            TrainingError,
            "No policy would be saved",
        ),
        "async": (
            {"data": data, "overrides": ["trainer.v1.trainer_mode=separate_async"]},
            TrainingError,
            "synchronous",
        ),
        "reward": (
            {"data": data, "overrides": ["custom_reward_function.path=mine.py"]},
            TrainingError,
            "custom_reward_function.path: mine.py .* sqlbench.reward=module:attribute",
        ),
        "new reward": (
            {"data": data, "overrides": ["reward.custom_reward_function.path=mine.py"]},
            TrainingError,
            "sqlbench.reward=module:attribute",
        ),
        "lora": (
            {"data": data, "overrides": ["actor_rollout_ref.model.lora.rank=8"]},
            TrainingError,
            "only Megatron reads it.. Give actor_rollout_ref.model.lora_rank",
        ),
        "adapter": (
            {"data": data, "overrides": ["actor_rollout_ref.model.lora_adapter_path=mine"]},
            TrainingError,
            "starts from whole weights.. Merge the adapter",
        ),
        "rank": ({"data": data, "overrides": ["actor_rollout_ref.model.lora_rank=-1"]}, TrainingError, "lora_rank: -1"),
        "no policy": ({"data": data, "overrides": ["trainer.save_freq=-1"]}, TrainingError, "No policy would be saved"),
        "finished": ({"data": data, "run": "finished"}, RunError, "is already finished"),
        "own agent": (
            {"data": data, "overrides": ["sqlbench.agent=nowhere:Agent"]},
            PluginError,
            "no module 'nowhere'",
        ),
        "own trainer": ({"data": data, "overrides": ["sqlbench.trainer=json:loads"]}, PluginError, "without fit"),
        "recipe": ({"data": data, "recipe": "speed"}, TrainingError, "Unknown recipe: speed. Give one of: .*seed"),
        "rows": (
            {"data": data, "overrides": ["sqlbench.sample_rows=-1"]},
            TrainingError,
            "sample_rows: -1 .* equal to 0",
        ),
        "no turn": ({"data": data, "overrides": ["sqlbench.max_turns=0"]}, TrainingError, "max_turns: 0 .* equal to 1"),
        "no time": ({"data": data, "overrides": ["sqlbench.query_timeout=0"]}, TrainingError, "query_timeout: 0 "),
        "repetition": (
            {"data": data, "overrides": ["sqlbench.stop_repetition=1"]},
            TrainingError,
            "at least 2, or null",
        ),
        "tokens": (
            {
                "data": data,
                "overrides": [
                    "actor_rollout_ref.actor.use_dynamic_bsz=true",
                    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=767",
                ],
            },
            TrainingError,
            "ppo_max_token_len_per_gpu is less than one row of 768 tokens: 767",
        ),
        "log-prob tokens": (
            {
                "data": data,
                "overrides": [
                    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true",
                    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=767",
                ],
            },
            TrainingError,
            "log_prob_max_token_len_per_gpu is less than one row of 768 tokens: 767",
        ),
        "switch": (
            {
                "profile": "gpu",
                "data": data,
                "overrides": ["actor_rollout_ref.model.enable_gradient_checkpointing=maybe"],
            },
            TrainingError,
            "maybe. Give true or false",
        ),
        "length": (
            {"profile": "gpu", "data": data, "overrides": ["data.max_response_length=long"]},
            TrainingError,
            "data.max_response_length: long",
        ),
        "model length": (
            {"profile": "gpu", "data": data, "overrides": ["actor_rollout_ref.rollout.max_model_len=long"]},
            TrainingError,
            "max_model_len: long. Give a whole number",
        ),
        "credit": (
            {"data": data, "overrides": ["sqlbench.reward=math:sqrt", "sqlbench.credit=transition"]},
            TrainingError,
            "not by math:sqrt",
        ),
        "change": (
            {"data": data, "overrides": ["sqlbench.reward=math:sqrt", "sqlbench.credit=change"]},
            TrainingError,
            "not by math:sqrt",
        ),
        "credit name": ({"data": data, "overrides": ["sqlbench.credit=changes"]}, TrainingError, "rollout, transition"),
        "control": (
            {"data": data, "control": "coins"},
            TrainingError,
            "Unknown sqlbench.control: coins. Choose coin or",
        ),
        "permuted": (
            {"data": data, "control": "permuted", "overrides": ["sqlbench.credit=published"]},
            TrainingError,
            "sqlbench.credit=published does not compare",
        ),
        "nodes": (
            {"data": data, "overrides": ["trainer.nnodes=2"]},
            TrainingError,
            r"trainer.nnodes=2 needs a Ray cluster. Name one with ray_kwargs\.ray_init\.address=",
        ),
        "workers": (
            {"data": data, "overrides": ["actor_rollout_ref.rollout.agent.num_workers=two"]},
            TrainingError,
            "num_workers: two. Give a whole number",
        ),
        "resampling": (
            {"data": data, "overrides": ["sqlbench.agent=resampling", "sqlbench.trained_agents=rewrite"]},
            TrainingError,
            "Nothing to train",
        ),
    }


STATE = ["data", "finished"]  # of this machine: a dry run says it, or leaves it
ALWAYS = ["profile", "model", "half model", "no template", "agents", "turns", "regex", "bracket", "number", "batch"]
ALWAYS += [
    "samples",
    "epochs",
    "no check",
    "no rewrite",
    "own agent",
    "own trainer",
    "credit",
    "change",
    "credit name",
    "control",
    "permuted",
    "nodes",
    "workers",
    "resampling",
]
ALWAYS += ["recipe", "rows", "no turn", "no time", "repetition", "tokens", "log-prob tokens", "switch", "length"]
ALWAYS += ["model length", "no policy", "no saving", "async", "reward", "new reward", "lora", "adapter", "rank"]


@pytest.mark.parametrize(
    ("case", "dry_run"), [(c, d) for c in ALWAYS for d in (False, True)] + [(c, False) for c in STATE]
)
def test_what_cannot_work_is_refused_before_anything_starts(
    case: str, dry_run: bool, tmp_path: Path, pocket: DataSet, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, error, text = refusals(tmp_path, pocket)[case]
    with pytest.raises(error, match=text):
        train(**{"profile": "laptop", "run": "r", "results": tmp_path / "results", "dry_run": dry_run, **arguments})
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("trainer.nnodez=2", "trainer.nnodes?"),
        ("actor_rollout_ref.actor.lr=1", "actor_rollout_ref.actor.optim.lr or"),
        ("actor_rollout_ref.rolout.n=4", "actor_rollout_ref.rollout.n or"),
        ("sqlbench.max_turn=2", "sqlbench.max_turns?"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(override: str, meant: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=re.escape(f"Unknown key: {override.split('=')[0]}. Did you mean {meant}")):
        composed("laptop", tmp_path, override)


def test_advantage_of_a_rollout_goes_to_all_its_transitions() -> None:
    """Group of rewards 1, 0, 0: advantages (r - mean) / std, the same on every row of a rollout."""
    from tensordict import TensorDict
    from verl import DataProto
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

    keys = ["a_0_0", "a_0_1", "a_1_0", "a_2_0", "a_2_1", "a_2_2"]
    reward = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    scores = torch.zeros(6, 3)
    scores[range(6), mask.sum(1) - 1] = torch.tensor(reward)
    data = DataProto(batch=TensorDict({"token_level_rewards": scores, "response_mask": mask}, 6))
    data.non_tensor_batch["uid"] = np.array(["a"] * 6, dtype=object)
    result = compute_advantage_for_multi_trajectories(data, keys, "grpo", num_repeat=3)
    deviation = np.std([1, 0, 0], ddof=1)
    expected = torch.tensor([[2 / 3 / deviation]] * 2 + [[-1 / 3 / deviation]] * 4) * mask
    assert torch.allclose(result.batch["advantages"], expected.float(), atol=1e-4)


def actor_config(tokens: int) -> Any:
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_mini_batch_size=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=0.2,
        clip_ratio_low=0.2,
        clip_ratio_high=0.3,
    )
    config.global_batch_info.update(dp_size=1, batch_num_tokens=tokens, global_batch_size=None, loss_scale_factor=None)
    return config


def test_per_rollout_mean_weighs_rollouts_alike_and_token_mean_tokens() -> None:
    """Rollout a has rows of 3 and 1 tokens and advantage 1, rollout b one row of 2 tokens and advantage -2."""
    from sqlbench_train.loss import per_rollout_mean, positive_only, row_weights, token_mean

    lengths, advantage = [3, 1, 2], torch.tensor([1.0, 1.0, -2.0])
    mask = (torch.arange(3) < torch.tensor(lengths).unsqueeze(1)).float()
    kept = list(zip("aab", lengths, strict=True))
    weights = row_weights("per_rollout_mean", kept, kept)
    assert weights == pytest.approx([6 / (2 * 4), 6 / (2 * 4), 6 / (2 * 2)])
    log_prob = torch.full((3, 3), -1.0, requires_grad=True)

    def batch(rows: list[int]) -> dict[str, Any]:
        return {
            "old_log_prob": torch.full((len(rows), 3), -1.0),
            "log_prob": log_prob[rows],
            "advantages": advantage[rows].unsqueeze(1) * mask[rows],
            "response_mask": mask[rows],
            "config": actor_config(6),
        }

    def weight(rows: list[int]) -> torch.Tensor:
        return torch.tensor(weights)[rows].unsqueeze(1) * mask[rows]

    whole, metrics = per_rollout_mean(rollout_is_weights=weight([0, 1, 2]), **batch([0, 1, 2]))
    assert float(whole) == pytest.approx(-(1.0 + -2.0) / 2) and metrics["actor/rollout_probs_gap"] == 0
    assert row_weights("positive_only", kept, kept) == weights
    alone, _ = positive_only(rollout_is_weights=weight([0, 1, 2]), **batch([0, 1, 2]))
    assert float(alone) == pytest.approx(-1.0 / 2)  # rollout b still counts as one of two
    split = sum(per_rollout_mean(rollout_is_weights=weight(r), **batch(r))[0] for r in ([0], [1, 2]))
    assert float(split) == pytest.approx(float(whole))
    assert float(token_mean(**batch([0, 1, 2]))[0]) == pytest.approx(-(4 * 1.0 + 2 * -2.0) / 6)
    shifted = batch([0, 1, 2]) | {"old_log_prob": torch.full((3, 3), -1.1)}
    assert token_mean(**shifted)[1]["actor/rollout_probs_gap"] == pytest.approx(np.exp(-1) - np.exp(-1.1), rel=1e-4)


def test_losses_are_registered_with_verl_by_name() -> None:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    import sqlbench_train.loss as loss

    assert get_policy_loss_fn("per_rollout_mean") is loss.per_rollout_mean
    assert get_policy_loss_fn("positive_only") is loss.positive_only
    assert get_policy_loss_fn("token_mean") is loss.token_mean


def test_trained_agents_is_searched_in_the_sub_agents_name() -> None:
    from sqlbench_train.agent_loop import trained_transitions

    names = ["write", "check", "rewrite"]
    calls = [Transition(agent=a, turn=1, messages=[], completion=Completion(text="")) for a in names]
    record = Trajectory(task_key="k", task_id="t", db_id="d", question="q", gold="g", transitions=calls)
    for expression, expected in (("write", ["write", "rewrite"]), ("write|rewrite|check", names), ("^re", ["rewrite"])):
        assert [t.agent for t in trained_transitions(record, expression)] == expected


def rollout_limits(prompt: int, response: int, both: int | None) -> Any:
    rollout = SimpleNamespace(prompt_length=prompt, response_length=response, max_model_len=both)
    return SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=rollout))


@pytest.mark.parametrize(
    ("tokens", "response", "more", "stopped", "expected"),
    [
        ([5, 6, 7], 3, 99, "", "length"),
        ([5, 6, 2], 3, 99, "", "stop"),
        ([5, 6, 7], 4, 99, "", "stop"),
        ([5, 6, 7], 4, 99, "repetition", "length"),
        ([5, 6, 7], 9, 3, "", "length"),
        ([5, 6, 7], 3, None, "", "length"),
    ],
)
def test_an_answer_that_no_token_ended_is_cut(
    tokens: list[int], response: int, more: int | None, stopped: str, expected: str
) -> None:
    """2 is nano's end of sequence; there is room for `response` tokens, and for `more` after the prompt."""
    from transformers import AutoTokenizer

    from sqlbench.models.local import encode_chat
    from sqlbench_train.agent_loop import SqlAgentLoop, _ServerModel

    class Server:
        async def generate(self, **_: Any) -> Any:
            return SimpleNamespace(token_ids=tokens, log_probs=[-1.0] * 3, extra_fields={}, stop_reason=stopped)

    tokenizer, message = AutoTokenizer.from_pretrained(NANO_PATH), Message(role="user", content="How many?")
    size = len(encode_chat(tokenizer, [message.model_dump()]))
    config = rollout_limits(size, response, None if more is None else size + more)
    loop = SqlAgentLoop(SimpleNamespace(config=config), Server(), tokenizer, SimpleNamespace(config={}))
    answer = asyncio.run(_ServerModel(loop, {}, "nano", None).complete([message]))
    assert answer.finish_reason == expected and answer.response_tokens == 3

    config.actor_rollout_ref.rollout.prompt_length = size - 1
    with pytest.raises(
        PromptTooLongError, match=f"Prompt too long: {size} tokens, and data.max_prompt_length is {size - 1}"
    ):
        asyncio.run(_ServerModel(loop, {}, "nano", None).complete([message]))


def test_vllm_is_told_to_end_an_answer_that_repeats_itself() -> None:
    from sqlbench_train.agent_loop import stop_repetition

    known = {"min_pattern_size": 2, "max_pattern_size": 64, "min_count": 8}
    assert stop_repetition(8) == {"repetition_detection": known} and stop_repetition(None) == {}


def test_every_call_of_a_rollout_has_a_seed_of_its_own_that_a_repeated_run_gives_again() -> None:
    from transformers import AutoTokenizer

    from sqlbench_train.agent_loop import SqlAgentLoop, _ServerModel

    class Server:
        async def generate(self, sampling_params: dict[str, Any], **_: Any) -> Any:
            sent.append(sampling_params)
            return SimpleNamespace(token_ids=[2], log_probs=[-1.0], extra_fields={}, stop_reason="")

    config = rollout_limits(640, 96, 768)
    tokenizer = AutoTokenizer.from_pretrained(NANO_PATH)
    loop = SqlAgentLoop(SimpleNamespace(config=config), Server(), tokenizer, SimpleNamespace(config={}))
    sent: list[dict[str, Any]] = []

    async def three_calls(seed: int | None) -> None:
        model = _ServerModel(loop, {"temperature": 1.0}, "nano", seed)
        for _ in range(3):
            await model.complete([Message(role="user", content="How many?")])

    for seed in (1, 2, 1, None):
        asyncio.run(three_calls(seed))
    seeds = [sampling.get("seed") for sampling in sent]
    assert len(set(seeds[:6])) == 6 and seeds[6:9] == seeds[:3] and seeds[9:] == [None] * 3
    assert {sampling["temperature"] for sampling in sent} == {1.0}


@pytest.mark.parametrize(("temperature", "noted"), [(None, None), (1.0, None), (1.5, 1.5)])
def test_an_answer_at_another_temperature_than_the_trainings_is_on_record_and_not_trained_on(
    temperature: float | None, noted: float | None
) -> None:
    from transformers import AutoTokenizer

    from sqlbench_train.agent_loop import SqlAgentLoop, _ServerModel, trained_transitions

    class Server:
        async def generate(self, sampling_params: dict[str, Any], **_: Any) -> Any:
            sent.append(sampling_params["temperature"])
            return SimpleNamespace(token_ids=[2], log_probs=[-1.0], extra_fields={}, stop_reason="")

    sent: list[float] = []
    tokenizer = AutoTokenizer.from_pretrained(NANO_PATH)
    config = rollout_limits(640, 96, 768)
    loop = SqlAgentLoop(SimpleNamespace(config=config), Server(), tokenizer, SimpleNamespace(config={}))
    model = _ServerModel(loop, {"temperature": 1.0}, "nano", None)
    answer = asyncio.run(model.complete([Message(role="user", content="How many?")], temperature=temperature))
    assert sent == [noted or 1.0] and answer.temperature == noted
    calls = [Transition(agent="rewrite", turn=2, messages=[], completion=answer)]
    record = Trajectory(task_key="k", task_id="t", db_id="d", question="q", gold="g", transitions=calls, reward=1.0)
    rows = loop._outputs(record, [1.0], {}, "write")
    assert len(rows) == len(trained_transitions(record, "write")) == (noted is None)


def test_agent_loop_engine_and_auto_tokenizer_give_the_same_ids() -> None:
    from transformers import AutoTokenizer
    from verl.utils.tokenizer import hf_tokenizer

    from sqlbench.models.local import encode_chat
    from sqlbench_train.agent_loop import SqlAgentLoop, _ServerModel
    from verl_cpu.engine import LocalEngine

    tokenizer = hf_tokenizer(str(NANO_PATH))
    config = rollout_limits(640, 96, 768)
    sent: list[list[int]] = []

    class Server:
        async def generate(self, request_id: str, prompt_ids: list[int], sampling_params: dict) -> Any:
            sent.append(prompt_ids)
            return SimpleNamespace(token_ids=[5, 2], log_probs=[-1.0, -0.5], extra_fields={}, stop_reason="stop")

    loop = SqlAgentLoop(SimpleNamespace(config=config), Server(), tokenizer, SimpleNamespace(config={}))
    model = _ServerModel(loop, {}, "nano", seed=1)
    messages = [
        Message(role="system", content="write SQLite"),
        Message(
            role="user", content="How many singers named O'Néil are older than 1234?\n singer: singer_id, name_x, age"
        ),
    ]
    answer = asyncio.run(model.complete(messages))
    plain = [m.model_dump() for m in messages]
    engine = LocalEngine(NANO_PATH)
    auto = AutoTokenizer.from_pretrained(NANO_PATH)
    raw = auto.backend_tokenizer.from_file(str(NANO_PATH / "tokenizer.json"))
    text = auto.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
    assert sent[0] == encode_chat(engine.tokenizer, plain) == encode_chat(auto, plain) == raw.encode(text).ids
    assert answer.prompt_ids == sent[0] and answer.response_ids == [5, 2] and answer.logprobs == [-1.0, -0.5]
    assert len(tokenizer) == engine.model.config.vocab_size


def test_step_metrics_leave_failed_rollouts_out_and_count_them(tmp_path: Path) -> None:
    def record(reward: float | None, error: str | None = None, step: int = 3, reason: str = "") -> Trajectory:
        call = Completion(text="", prompt_tokens=100, response_tokens=10, finish_reason="length" if reward else "stop")
        return Trajectory(
            task_key="k",
            task_id="t",
            db_id="d",
            question="q",
            gold="g",
            step=step,
            reward=reward,
            reason=reason,
            error=error,
            transitions=[Transition(agent="write", turn=1, messages=[], completion=call)],
        )

    path = tmp_path / "trajectories.jsonl"
    long = "model: PromptTooLongError: a prompt has 9 tokens"
    failed = [record(None, "model: X: y"), record(None, long)]
    rows = [record(1.0), record(0.0), record(0.0, reason="overlong"), *failed, record(1.0, step=4)]
    path.write_text("")
    reader = TrajectoryReader(path)
    path.write_text("".join(r.model_dump_json() + "\n" for r in rows) + '{"torn')
    metrics = step_metrics(reader.step(3, False), "")
    assert metrics["rollouts"] == 5 and metrics["failed_rollouts"] == 2 and metrics["overlong_rollouts"] == 1
    assert metrics["ex"] == pytest.approx(1 / 3)
    assert metrics["prompt_tokens"] == 100 and metrics["truncated_share"] == pytest.approx(1 / 3)
    assert step_metrics(reader.step(4, False), "")["rollouts"] == 1


def test_step_metrics_tell_of_repetitions_and_of_the_check() -> None:
    """Three rewrites, two of which repeat; wrong queries are called so two times of three, right ones once of two."""
    verdicts = [(1, 0), (1, 0), (0, 0), (1, 1), (0, 1)]  # called incorrect, match
    executions = [Execution(turn=i, sql=f"SELECT {i}", status="ok", match=m) for i, (_, m) in enumerate(verdicts, 1)]
    said = ["THE QUERY IS CORRECT", "THE QUERY IS INCORRECT"]
    calls = [("check", i, said[wrong], None) for i, (wrong, _) in enumerate(verdicts, 1)]
    calls += [("rewrite", 2, "SELECT 2", None), ("rewrite", 6, "SELECT  3;", None), ("rewrite", 6, "SELECT 5", 1.5)]
    record = Trajectory(
        task_key="k", task_id="t", db_id="d", question="q", gold="g", reward=0.0, executions=executions,
        transitions=[
            Transition(
                agent=agent, turn=turn, messages=[],
                completion=Completion(text=text, prompt_tokens=2, response_tokens=1, temperature=temperature),
            )
            for agent, turn, text, temperature in calls
        ],
    )  # fmt: skip
    metrics = step_metrics([record], "")
    assert metrics["repeated_share"] == pytest.approx(2 / 3) and metrics["other_temperature"] == 1
    assert metrics["check_balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    unknown = record.model_copy(update={"executions": [e.model_copy(update={"match": None}) for e in executions]})
    assert "check_balanced_accuracy" not in step_metrics([unknown], "")


def test_metrics_of_a_repeated_step_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [(1, {"a": 1}), (2, {"a": 2, "b": 1}), (2, {"a": 3})]
    path.write_text("".join(json.dumps({"step": s, "data": d}) + "\n" for s, d in lines) + '{"step": 3, "da')
    rows = read_rows(path)
    assert rows == {1: {"a": 1}, 2: {"a": 3, "b": 1}}
    write_rows(path, {1: rows[1]})
    assert read_rows(path) == {1: {"a": 1}}


def test_the_newest_policy_of_a_run_that_goes_on_is_that_of_its_newest_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"config": {"sqlbench": {"model": "none"}}, "model_files": null}')
    for step in (2, 10):
        saved = tmp_path / f"checkpoints/global_step_{step}/actor/huggingface"
        saved.mkdir(parents=True)
        (saved / "model.safetensors").write_text(f"step {step}")
        (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").write_text(str(step))
        assert (latest_checkpoint(tmp_path) / "model.safetensors").read_text() == f"step {step}"


def test_an_earlier_attempt_is_ended_and_who_looks_at_its_files_is_not(tmp_path: Path) -> None:
    config, wait = tmp_path / "verl.yaml", "import time; time.sleep(600)"
    reader = subprocess.Popen([sys.executable, "-c", wait, config])
    earlier = subprocess.Popen([sys.executable, "-c", wait, "-m", processes.WORKER, config])
    try:
        processes.end_earlier(config)
        earlier.wait(200)
        assert reader.poll() is None
    finally:
        reader.kill()
        reader.wait()


def test_two_trainings_may_clear_the_same_abandoned_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one has just removed it: it is listed, and gone."""
    monkeypatch.setattr(processes, "_temporary", lambda: tmp_path)
    (tmp_path / f"{processes.RAY_FOLDER}999999999-gone").symlink_to(tmp_path / "nowhere")
    processes._clear_abandoned()


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["Traceback", "a.b.SomeError: why", "more"], "SomeError: why"),
        (
            ["\x1b[33m(raylet)\x1b[0m Raylet is terminated. Why", "    [2026] its log"],
            "(raylet) Raylet is terminated. Why",
        ),
        (
            ["RPC error: InvalidAuthToken: missing or incorrect", "ConnectionError: Failed to connect to h:1"],
            "the Ray cluster did not take the token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN as on its nodes",
        ),
        (["only this"], "only this"),
        ([], "no output"),
    ],
)
def test_the_reason_of_a_failure_is_read_off_the_end_of_the_log(
    lines: list[str], expected: str, tmp_path: Path
) -> None:
    (tmp_path / "log").write_text("\n".join(lines))
    assert processes.reason(tmp_path / "log", 1) == expected


def test_a_step_is_described_in_one_line() -> None:
    assert describe(0, {"sqlbench/val_ex": 0.5}) == "step   0  validation EX 50.0%"
    same, other = {"sqlbench/val_ex": 0.5, "sqlbench/val_reward": 0.5}, {"sqlbench/ex": 0.5, "sqlbench/reward": 0.75}
    assert describe(1, same | other) == "step   1  EX 50.0%  reward 0.750  validation EX 50.0%"


def test_a_trainer_of_ones_own_gets_the_run_and_leaves_its_summary(
    tmp_path: Path, pocket: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(OWN_TRAINER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    overrides = ["sqlbench.trainer=own:Trainer", "sqlbench.validation_tasks=3"]
    folder = RunFolder(train("laptop", "r", pocket.root, results=tmp_path / "results", overrides=overrides))
    assert folder.summary() == {"steps": 40, "tasks": sum(t.scorable for t in pocket.load("train")), "validation": 3}
    assert folder.config()["config"]["sqlbench"]["trainer"] == "own:Trainer"


def test_a_ray_that_says_it_was_too_slow_ends_the_process_so_that_it_is_started_again() -> None:
    from verl_cpu.forkserver import RAY_LATE, exit_if_ray_is_late

    with pytest.raises(SystemExit) as ended, exit_if_ray_is_late():
        raise Exception("The current node timed out during startup. This could happen because ...")
    assert ended.value.code == RAY_LATE
    with pytest.raises(Exception, match="another"), exit_if_ray_is_late():
        raise Exception("another")


def test_forkserver_stub_stands_for_the_process_that_was_forked(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text("import os, sys; print('hello', sys.argv[1], os.environ['WORD']); sys.exit(3)")
    server = tmp_path / "server.py"
    server.write_text(
        "import os, socket, sys, time\n"
        "from verl_cpu import forkserver\n"
        "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()\n"
        "driver = forkserver._fork()\n"
        "if driver == 0: forkserver._leave(lambda: sys.stdin.read())\n"
        "sys.exit(forkserver._serve(s, driver, {'IMPORTED': 'too'}, sys.argv[2]))\n"
    )
    address, python = tmp_path / "fork", tmp_path / "python"
    client = Path(verl_cpu.__file__).with_name("forkserver_stub.py")
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {client} {address} "$@"\n')
    python.chmod(0o700)
    process = subprocess.Popen([sys.executable, server, address, python], stdin=subprocess.PIPE)
    try:
        import time

        while not address.exists():
            time.sleep(0.05)
        with socket.socket(socket.AF_UNIX) as killed:  # before it could ask for anything
            killed.connect(str(address))

        def run(*arguments: object) -> tuple[str, int]:
            done = subprocess.run(
                [sys.executable, "-S", "-E", client, address, *arguments],
                env={"WORD": "there"},
                capture_output=True,
                text=True,
                timeout=60,
            )
            return done.stdout, done.returncode

        assert run(script, "you") == ("hello you there\n", 3)
        # A process of multiprocessing, started from a fork: a fork of the server too, with its pipes and its status.
        work = tmp_path / "work.py"
        work.write_text(
            "import os, sys\n"
            "def answer(pipe):\n"
            "    pipe.send((os.environ['IMPORTED'], os.environ['WORD'], os.getppid())); sys.exit(5)\n"
        )
        script.write_text(
            f"import multiprocessing, sys; sys.path.insert(0, {str(tmp_path)!r}); import work\n"
            "if __name__ == '__main__':\n"
            "    spawn = multiprocessing.get_context('spawn'); ours, theirs = spawn.Pipe()\n"
            "    child = spawn.Process(target=work.answer, args=(theirs,)); child.start()\n"
            "    print(*ours.recv()[:2]); child.join(); sys.exit(child.exitcode)\n"
        )
        assert run(script) == ("too there\n", 5)
    finally:
        process.communicate(timeout=200)
    assert process.returncode == 0
    # The server is gone: the same request is answered by Python itself.
    script.write_text("import os, sys; print('hello', sys.argv[1], os.environ.get('IMPORTED')); sys.exit(3)")
    assert run(script, "you") == ("hello you None\n", 3)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("fault", ["an import that fails", "no CUDA in a fork"])
def test_a_training_on_a_gpu_that_cannot_be_forked_starts_plainly(fault: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (tmp_path / "config.yaml").write_text(
        "{trainer: {device: cuda}, ray_kwargs: {ray_init: {address: local}},\n"
        f" actor_rollout_ref: {{model: {{path: {tmp_path}}}, rollout: {{name: local}}}}}}\n"
    )
    (tmp_path / "own.py").write_text(
        "import os, sys\n"
        "if 'VERL_PLAIN_START' in os.environ:\n"
        "    print('plain', os.environ.get('RAY_JOB_ID'), os.environ.get('RAY_RAYLET_PID')); sys.exit(7)\n"
        + ("raise RuntimeError('not today')\n" if fault.startswith("an import") else "")
    )
    done = subprocess.run(
        [sys.executable, "-m", "verl_cpu.forkserver", tmp_path / "config.yaml", str(os.getpid()), tmp_path, "own"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 7, done.stderr
    assert "plain None None" in done.stdout and ("not today" in done.stderr) == fault.startswith("an import")


def test_every_training_of_a_machine_has_a_job_number_of_its_own() -> None:
    code = (
        "import os, ray; from verl_cpu import forkserver\n"
        "forkserver._number_job(); ray.init(address='local', num_cpus=1, include_dashboard=False)\n"
        "job = ray.remote(lambda: ray.get_runtime_context().get_job_id())\n"
        "print(ray.JobID.from_int(os.getpid()).hex(), ray.get(job.remote()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    own, seen = done.stdout.split()[-2:]
    assert own == seen, done.stderr


def test_a_training_samples_with_prompts_of_ones_own_and_refuses_what_is_none(pocket: DataSet, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from sqlbench_train.agent_loop import SqlAgentLoop
    from sqlbench_train.preflight import check

    class Server:
        async def generate(self, **_: Any) -> Any:
            extra = {"min_global_steps": 1, "max_global_steps": 1}
            return SimpleNamespace(token_ids=[2], log_probs=[-1.0], extra_fields=extra, stop_reason="")

    file, folder = tmp_path / "mine's.toml", tmp_path / "r"
    file.write_text('family = "nano"\n[write]\nsystem = "write briefly"\n')
    folder.mkdir()
    config = composed("laptop", tmp_path, f'sqlbench.prompts="{file}"', f"sqlbench.data={pocket.root}")
    loop = SqlAgentLoop(
        SimpleNamespace(config=config), Server(), AutoTokenizer.from_pretrained(NANO_PATH), SimpleNamespace(config={})
    )
    task = pocket.load("train")[0]
    row = {"extra_info": {"task": task.model_dump_json(), "validation": False}, "global_steps": 1, "session_id": 0}
    assert asyncio.run(loop.run({}, **row))
    (record,) = RunFolder(folder).trajectories()
    assert record.transitions[0].messages[0].content == "write briefly"
    check(PROFILES["laptop"], config)
    file.write_text("[write]\nsistem = 'x'\n")
    with pytest.raises(ModelError, match=r"Not a prompt component: write\.sistem"):
        check(PROFILES["laptop"], config)
    with pytest.raises(ModelError, match="Cannot read prompts from"):
        train("laptop", "r", pocket.root, results=tmp_path, prompts="none.toml", dry_run=True)
