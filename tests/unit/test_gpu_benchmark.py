"""What is known of trainings on a GPU without one: they compose, their models load, their numbers are summed up."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pocket import NANO_PATH
from pocket.nano import train_nano
from sqlbench.data.tasks import DataSet
from sqlbench.errors import ModelError, TrainingError
from sqlbench.models.checkpoint import checkpoint_family
from sqlbench.profiles import PROFILES
from sqlbench_train.estimate import Shape
from sqlbench_train.launch import train
from verl_cpu.engine import GenerationRequest, LocalEngine


@pytest.fixture(autouse=True)
def scripts(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))


@pytest.mark.parametrize("name", ["local", "vllm-nano", "vllm-random", "vllm-model", "grown"])
def test_every_measurement_is_a_valid_training_on_cuda(name: str, tmp_path: Path) -> None:
    import gpu
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    from sqlbench_train.compose import compose

    options = argparse.Namespace(device="cuda", steps=None, overrides=["trainer.project_name=mine"])
    profile, overrides = gpu.settings(name, options)
    config = compose(
        PROFILES[profile], run="r", folder=tmp_path, data=tmp_path, model=str(NANO_PATH), overrides=overrides
    )
    validate_config(config, use_reference_policy=False, use_critic=False)
    section = config.actor_rollout_ref
    omega_conf_to_dataclass(section.actor), omega_conf_to_dataclass(section.rollout)
    assert config.trainer.device == "cuda" and config.trainer.project_name == "mine"
    longest = section.rollout.max_model_len  # None: what the model allows
    assert longest is None or config.data.max_prompt_length + config.data.max_response_length <= longest
    assert section.model.override_config.attn_implementation == "sdpa"  # the GPU set has no flash-attn
    if profile == "laptop":
        assert section.rollout.engine_kwargs.local.device == "cuda"
    else:
        assert (config.data.train_batch_size, section.rollout.n) == (32, 4)
    assert set(gpu.MEASUREMENTS) == {"local", "vllm-nano", "vllm-random", "vllm-model", "grown"}


def test_a_random_checkpoint_has_its_shape_and_text_for_every_token(tmp_path: Path) -> None:
    import gpu

    folder = tmp_path / "random"
    gpu.random_checkpoint(folder, gpu.TINY_SHAPE)
    engine = LocalEngine(folder)
    assert Shape.of(str(folder)).parameters == sum(p.numel() for p in engine.model.parameters())
    assert len(engine.tokenizer) == engine.model.config.vocab_size == 4096
    assert all(engine.tokenizer.decode([i]) for i in range(4096))
    assert len(engine.tokenizer("how many singers are from 'France'?")["input_ids"]) < 30
    assert checkpoint_family(folder) == "chat"
    answer = engine.generate([GenerationRequest((5, 6, 7), 8, 1.0, seed=1)])[0]
    assert answer.finish_reason == "length" and max(answer.token_ids) < 4096


def test_the_real_shape_is_that_of_the_published_model() -> None:
    import gpu

    assert 1.54e9 < Shape(**gpu.SHAPE, head_dim=128).parameters < 1.55e9


def test_a_recorded_run_is_summed_up(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu

    recorded = tmp_path / "sqlbench/assets/nano"  # the policy's folder, as the run's configuration names it
    recorded.parent.mkdir(parents=True)
    recorded.symlink_to(NANO_PATH)
    monkeypatch.chdir(tmp_path)
    run = repo / "results/laptop/reproduce/cells/t3_c2048_write-rewrite/train"
    found = gpu.summary(run)
    assert found["steps"] == 38 and found["batch"] == "16 x 8"
    assert found["parameters"] == Shape.of(str(NANO_PATH)).parameters
    assert sum(found["parts"].values()) == pytest.approx(found["seconds"])
    assert all(seconds >= 0 for seconds in found["parts"].values())
    ended = json.loads((run / "summary.json").read_text())
    assert (found["validation"][0], found["validation"][-1]) == (ended["val_ex_first"], ended["val_ex_last"])
    # The rollout's rate, from what is known of a step: 128 rollouts with some 3.5 answers of some 25 tokens.
    assert found["sampled_tokens_per_second"] * found["parts"]["rollout"] == pytest.approx(128 * 3.5 * 25, rel=0.25)
    rest = {"what": "nano", "gpu": "none", "config": "config.json", "gpu_peak_gb": None, "startup_seconds": 12.0}
    text = gpu.table([found | rest | {"published": gpu.published("vllm-random")}])
    lines = text.splitlines()
    times = f"{120.5 / found['seconds']:.1f} times as long"
    assert f"published: 120.5 s a step on one GPU of unknown kind with prompts of 850 tokens, {times}" in text
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert f"| {found['seconds']:.2f} |" in lines[2]


def test_a_tiny_random_checkpoint_takes_the_tokenizer_of_a_large_model(tmp_path: Path) -> None:
    import gpu

    gpu.random_checkpoint(tmp_path / "large", gpu.TINY_SHAPE | {"vocab_size": 6000})
    gpu.random_checkpoint(tmp_path / "tiny", gpu.TINY_SHAPE, tmp_path / "large")
    assert Shape.of(str(tmp_path / "tiny")).vocab_size == 6000


TRAINING = """
import json, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
run, steps = sys.argv[1:]
for step in range(1, int(steps) + 1):
    with open(run + "/metrics.jsonl", "a") as file:
        print(json.dumps({"step": step, "data": {"timing_s/step": 1.0}}), file=file)
try:
    time.sleep(600)
except KeyboardInterrupt:
    open(run + "/stopped", "w").close()
"""


def test_when_the_time_is_over_a_training_is_interrupted_and_its_steps_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu

    looks: list[Path] = []

    def clock() -> float:
        """The time; it is over when the training has made its steps."""
        metrics = tmp_path / "metrics.jsonl"
        if metrics.is_file() and metrics.read_text().count("\n") == 4:
            looks.append(metrics)
        return time.monotonic() + (3600 if len(looks) > 1 else 0)

    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep))
    monkeypatch.setattr(gpu, "STOP_SECONDS", 120)
    command = [sys.executable, "-c", TRAINING, str(tmp_path), "4"]
    assert gpu.follow(command, tmp_path, time.monotonic() + 1800, tmp_path / "log") is not None
    assert (tmp_path / "stopped").is_file()
    assert len(gpu.measured(tmp_path)) == 3  # all but the first
    (tmp_path / "summary.json").write_text("{}")
    assert len(gpu.measured(tmp_path)) == 2  # it ended by itself, so its last step saved


def test_a_training_that_fails_is_told_from_one_that_is_interrupted(tmp_path: Path) -> None:
    import gpu

    command = [sys.executable, "-c", "print('error: no vLLM here'); raise SystemExit(1)"]
    with pytest.raises(TrainingError, match=r"^no vLLM here$"):
        gpu.follow(command, tmp_path, time.monotonic() + 600, tmp_path / "log")


def test_what_was_measured_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu

    (tmp_path / "local.json").write_text('{"startup_seconds": 300}')
    arguments = ["gpu.py", "--out", str(tmp_path), "--part", "a", "c", "--device", "cpu", "--minutes", "5"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="True"):
        gpu.main()
    shown = capsys.readouterr()
    assert "local: measured before" in shown.out and "grown: too little time is left" in shown.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_cuda_is_refused_in_one_line(pocket: DataSet, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^This machine cannot run .*1 GPU\(s\) with CUDA: NOT found.*$"):
        train("laptop", "r", pocket.root, overrides=["trainer.device=cuda"], results=tmp_path)
    with pytest.raises(ModelError, match="a CUDA GPU"):
        train_nano(tmp_path / "nano", minutes=0.1, progress=False, device="cuda")
    assert not list(tmp_path.iterdir())


def test_a_profile_is_moved_to_cuda_and_nowhere_else() -> None:
    moved = PROFILES["laptop"].on("cuda")
    assert moved.device == "cuda" and "VERL_PLATFORM" not in moved.environment  # verl finds the GPU itself
    assert moved.environment["VERL_USE_EXTERNAL_MODULES"] == "verl_cpu.platform"  # has our engine
    assert PROFILES["laptop"].on("cpu") is PROFILES["laptop"]
    for profile, device in (("laptop", "cuda:1"), ("gpu", "cpu")):
        with pytest.raises(TrainingError, match=f"Unsupported trainer.device of profile .*: {device}"):
            PROFILES[profile].on(device)
