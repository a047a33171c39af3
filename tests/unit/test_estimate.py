"""Parameter counts agree with the published ones, and bytes follow from them as the formulas say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from pocket import NANO_PATH
from sqlbench.profiles import PROFILES
from sqlbench.runs import flat
from sqlbench_train.compose import changes, compose
from sqlbench_train.estimate import LEFT_OUT, SAVINGS, SHAPES, Shape, estimate

QWEN_0_5B, QWEN_1_5B, QWEN_3B = (f"Qwen/Qwen2.5-Coder-{size}-Instruct" for size in ("0.5B", "1.5B", "3B"))
LLAMA_1B, LLAMA_3B = "meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-3B-Instruct"
FAST, OFF = ([f"{key}={value}" for key in SAVINGS] for value in ("false", "true"))


def shape(model: str) -> Shape:
    found = Shape.of(model)
    assert found is not None
    return found


def composed(*overrides: str, model: str = QWEN_3B, recipe: str | None = None) -> Any:
    place = {"run": "r", "folder": Path("r"), "data": Path("data")}
    return compose(PROFILES["gpu"], **place, model=model, overrides=[*overrides], recipe=recipe)


@pytest.mark.parametrize(
    ("model", "all_of_them", "without_embedding"),
    [
        (QWEN_0_5B, 0.49, 0.36),
        (LLAMA_1B, 1.24, 0.97),
        (LLAMA_3B, 3.21, 2.82),
        (QWEN_1_5B, 1.54, 1.31),
        (QWEN_3B, 3.09, 2.77),
    ],
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
    found = estimate(composed(recipe="seed"), 436)
    assert found is not None
    p, tokens = 3_085_938_688, 4 * (4096 + 2048)
    assert (found.update["weights"], found.update["gradients"], found.update["Adam"]) == (4 * p, 4 * p, 8 * p)
    # one layer is there as a whole, with its dense mask, and of the others their inputs
    layer = tokens * (24 * 2048 + 8 * 11008) + 2 * tokens**2
    assert found.update["longest micro-batch"] == tokens * 2 * 2048 * 36 + layer + 6 * 151936 * tokens
    assert found.rollout == {"weights": 2 * p, "KV cache": pytest.approx(0.8 * 80e9 - 2 * p)}
    assert found.kv_tokens == int((64e9 - 2 * p) // 36864)  # 36 layers x 2 heads x 128 x (key, value) x 2 bytes
    assert found.host == {"weights": 4 * p, "Adam": 8 * p, "saving": 6 * p}
    # steps 256 and 436 are saved and both are kept; 56k rollouts of training, 15 validations of 500
    assert found.disk["2 checkpoints"] == 2 * 16 * p
    rollouts, prompt = 436 * 32 * 4 + 15 * 500, 2048 + 2048 + 1500
    assert found.disk["trajectories, at most"] == rollouts * 6 * (3 * prompt + 35 * 320)
    text = "\n".join(found.lines())
    assert "3.09B" in text and LEFT_OUT in text


MEASURED = [
    (QWEN_0_5B, 23.80, FAST),
    (
        QWEN_1_5B,
        30.81,
        [
            *FAST,
            "data.max_response_length=64",
            "actor_rollout_ref.rollout.gpu_memory_utilization=0.35",
            "actor_rollout_ref.model.use_fused_kernels=false",
            "actor_rollout_ref.model.enable_gradient_checkpointing=true",
        ],
    ),
]
"""Model, ``actor/perf/max_memory_allocated_gb`` of a training on an H200 (verl counts 2^30 bytes) and its settings."""


@pytest.mark.parametrize(("model", "gibibytes", "settings"), MEASURED)
def test_the_updates_peak_is_the_one_measured(model: str, gibibytes: float, settings: list[str]) -> None:
    found = estimate(composed(*settings, model=model), 1)
    assert found is not None
    assert found.update_peak == pytest.approx(gibibytes * 2**30, rel=0.1)


def test_the_optimizers_step_is_the_peak_where_micro_batches_are_short() -> None:
    """At the 1.5B's first step, whose micro-batches ran before there were moments: 28.8 GB."""
    found = estimate(composed("actor_rollout_ref.actor.ppo_max_token_len_per_gpu=512", model=QWEN_1_5B), 1)
    assert found is not None
    assert found.update_peak == 20 * found.parameters == pytest.approx(28.8 * 2**30, rel=0.01)


@pytest.mark.parametrize(
    ("model", "gigabytes", "expected"),
    [
        (QWEN_0_5B, 80, (False, False, False)),
        (QWEN_1_5B, 80, (False, False, False)),
        (QWEN_3B, 80, (True, False, True)),
        (QWEN_3B, 141, (False, False, False)),
        (QWEN_1_5B, 32, (True, False, True)),
        (QWEN_1_5B, 12, (True, True, True)),
        ("somebody/model-7B", 141, (True, True, True)),
    ],
)
def test_only_what_the_card_needs_is_offloaded_and_recomputed(
    model: str, gigabytes: int, expected: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moments, the weights, the layers; the rest of the configuration is decided before it."""
    monkeypatch.setattr("sqlbench_train.compose.gpu_bytes", lambda: int(gigabytes * 1e9))
    config = composed(model=model)
    assert tuple(OmegaConf.select(config, key) for key in SAVINGS) == expected
    given = composed(*(f"{key}={not value}" for key, value in zip(SAVINGS, expected, strict=True)), model=model)
    assert tuple(OmegaConf.select(given, key) for key in SAVINGS) == tuple(not value for value in expected)
    left = {key for key, value in flat(OmegaConf.to_container(config)).items() if value == "auto"}
    assert not left & flat(changes("gpu")).keys() - {"trainer.resume_mode"}


def test_old_log_probabilities_are_left_out_with_one_optimizer_step_a_batch_only() -> None:
    def bypass(mini: int) -> bool:
        config = composed(f"actor_rollout_ref.actor.ppo_mini_batch_size={mini}")
        return config.algorithm.rollout_correction.bypass_mode

    assert [bypass(mini) for mini in (32, 24, 16)] == [True, True, False]


def test_a_card_that_is_too_small_is_warned_of_in_one_line() -> None:
    config = composed(*(f"{key}=false" for key in SAVINGS))
    small, large = (estimate(config, 1, size) for size in (80e9, 141e9))
    assert small is not None and large is not None and large.warning() is None
    assert (text := small.warning()) is not None and "\n" not in text
    assert "GPUs of 80.0 GB: it takes about 77.0 GB for rollouts and 96.5 GB for the update" in text
    assert all(f"{key}=true" in text for key in SAVINGS)
    nothing_left = estimate(composed(*(f"{key}=true" for key in SAVINGS)), 1, 20e9)
    assert nothing_left is not None and "=true" not in (nothing_left.warning() or "=true")


def test_bytes_follow_the_configuration() -> None:
    p = 3_085_938_688
    two = estimate(composed("trainer.nnodes=2", "actor_rollout_ref.rollout.tensor_model_parallel_size=2", *OFF), 436)
    assert two is not None
    assert two.update["Adam"] == 4 * p and two.host["Adam"] == 4 * p and two.rollout["weights"] == p
    stays = estimate(composed(*FAST), 436)
    assert stays is not None
    tokens = 8192
    layers = 36 * (tokens * (24 * 2048 + 8 * 11008) + 2 * tokens**2)
    assert stays.update["longest micro-batch"] == layers + 24 * 512 * 151936
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


def test_lora_counts_the_adapters_that_peft_makes_and_trains_nothing_else() -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(NANO_PATH))
        model = get_peft_model(plain, LoraConfig(r=4, target_modules="all-linear"))
    made = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape(str(NANO_PATH)).adapters(4) == made
    whole, lora = (estimate(composed(*FAST, *extra), 1) for extra in ((), ("actor_rollout_ref.model.lora_rank=16",)))
    assert whole is not None and lora is not None
    p, a = whole.parameters, lora.parameters
    assert a == shape(QWEN_3B).adapters(16) == 29_933_568
    assert (lora.update["weights"], lora.update["gradients"], lora.update["Adam"]) == (4 * (p + a), 4 * a, 8 * a)
    assert lora.update_peak < whole.update_peak and lora.disk["1 checkpoints"] == 8 * (p + a) + 8 * a
