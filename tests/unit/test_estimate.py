"""Parameter counts agree with the published ones, and bytes follow from them as the formulas say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pocket import NANO_PATH
from sqlbench.estimate import LEFT_OUT, SHAPES, Shape, estimate
from sqlbench.profiles import PROFILES
from sqlbench.training.compose import compose

QWEN_3B, QWEN_1_5B = "Qwen/Qwen2.5-Coder-3B-Instruct", "Qwen/Qwen2.5-Coder-1.5B-Instruct"
LLAMA_1B, LLAMA_3B = "meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-3B-Instruct"


def shape(model: str) -> Shape:
    found = Shape.of(model)
    assert found is not None
    return found


def composed(*overrides: str, model: str = QWEN_3B) -> Any:
    return compose(PROFILES["gpu"], run="r", folder=Path("r"), data=Path("data"), model=model, overrides=[*overrides])


@pytest.mark.parametrize(
    ("model", "all_of_them", "without_embedding"),
    [(LLAMA_1B, 1.24, 0.97), (LLAMA_3B, 3.21, 2.82), (QWEN_1_5B, 1.54, 1.31), (QWEN_3B, 3.09, 2.77)],
)
def test_parameters_are_those_of_the_model_cards(model: str, all_of_them: float, without_embedding: float) -> None:
    found = shape(model)
    assert round(found.parameters / 1e9, 2) == all_of_them
    assert round((found.parameters - found.embedding) / 1e9, 2) == without_embedding


@pytest.mark.parametrize("model", [*SHAPES, str(NANO_PATH)])
def test_parameters_are_those_that_transformers_builds(model: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if Path(model).is_dir():
        config = AutoConfig.from_pretrained(model)
    else:
        values = {**SHAPES[model], "head_dim": shape(model).head_dim}
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    assert shape(model).parameters == sum(p.numel() for p in built.parameters())


def test_a_model_of_unknown_shape_is_not_guessed_at(tmp_path: Path) -> None:
    assert Shape.of("somebody/model-7B") is None and Shape.of(str(tmp_path)) is None
    assert estimate(composed(model="somebody/model-7B"), 436) is None


def test_bytes_of_the_seed_experiment_on_one_gpu() -> None:
    found = estimate(composed(), 436)
    assert found is not None
    p = 3_085_938_688
    assert (found.update["weights"], found.update["gradients"], found.update["Adam"]) == (4 * p, 4 * p, 8 * p)
    # 4 rows of 4096 + 2048 tokens: 2 bytes for each layer's input, 8 for each logit, its log-probability and gradient
    assert found.update["longest micro-batch"] == 24576 * (2 * 2048 * 36 + 8 * 151936)
    assert found.rollout == {"weights": 2 * p, "KV cache": pytest.approx(0.8 * 80e9 - 2 * p)}
    assert found.kv_tokens == int((64e9 - 2 * p) // 36864)  # 36 layers x 2 heads x 128 x (key, value) x 2 bytes
    assert found.host == {"weights": 4 * p, "Adam": 8 * p, "saving": 6 * p}
    # steps 256 and 436 are saved and both are kept; 56k rollouts of training, 15 validations of 500
    assert found.disk["2 checkpoints"] == 2 * 16 * p
    rollouts, prompt = 436 * 32 * 4 + 15 * 500, 2048 + 2048 + 1500
    assert found.disk["trajectories, at most"] == rollouts * 6 * (3 * prompt + 35 * 320)
    text = "\n".join(found.lines())
    assert "3.09B" in text and LEFT_OUT in text


def test_bytes_follow_the_configuration() -> None:
    p = 3_085_938_688
    two = estimate(composed("trainer.nnodes=2", "actor_rollout_ref.rollout.tensor_model_parallel_size=2"), 436)
    assert two is not None
    fused = estimate(composed("actor_rollout_ref.model.use_fused_kernels=true"), 436)
    assert fused is not None and fused.update["longest micro-batch"] == 24576 * 2 * 2048 * 36
    assert two.update["Adam"] == 4 * p and two.host["Adam"] == 4 * p and two.rollout["weights"] == p
    stays = estimate(
        composed(
            "actor_rollout_ref.actor.fsdp_config.param_offload=False",
            "actor_rollout_ref.actor.fsdp_config.optimizer_offload=False",
        ),
        436,
    )
    assert stays is not None
    assert (stays.rollout["trainer's weights"], stays.rollout["Adam"]) == (4 * p, 8 * p)
    assert set(stays.host) == {"saving"}


@pytest.mark.parametrize(
    ("overrides", "steps", "label", "times"),
    [
        (["trainer.save_freq=100"], 436, "5 checkpoints", 5 * 16),
        (["trainer.save_freq=100", "trainer.max_actor_ckpt_to_keep=3"], 436, "3 checkpoints", 3 * 16),
        (["trainer.save_freq=100", "trainer.max_actor_ckpt_to_keep=1"], 436, "2 checkpoints", 2 * 16),
        (["trainer.save_freq=-1"], 436, "0 checkpoints", 0),
        (["actor_rollout_ref.actor.checkpoint.save_contents=[model,extra]"], 100, "1 checkpoints", 4),
    ],
)
def test_disk_follows_what_is_saved_and_kept(overrides: list[str], steps: int, label: str, times: int) -> None:
    found = estimate(composed(*overrides), steps)
    assert found is not None and found.disk[label] == times * found.parameters


def test_the_validation_before_training_counts_where_it_is_the_only_one() -> None:
    some, none = (
        estimate(composed("trainer.test_freq=-1", f"trainer.val_before_train={first}"), 436) for first in (True, False)
    )
    assert some is not None and none is not None
    more = some.disk["trajectories, at most"] - none.disk["trajectories, at most"]
    assert more == 500 * 6 * (3 * (2048 + 2048 + 1500) + 35 * 320)


def test_weights_that_do_not_fit_leave_no_cache() -> None:
    found = estimate(composed(), 436, gpu_bytes=6e9)
    assert found is not None and found.kv_tokens == 0 and found.rollout["KV cache"] == 0
