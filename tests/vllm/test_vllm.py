"""vLLM's CPU build behind verl's own vLLM replica: the engine, the agent loop and the calls of the GPU profile.

`make test-vllm` runs this in an environment of its own; it is skipped everywhere else.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import torch

from pocket import NANO_PATH
from sqlbench.data.tasks import DataSet
from sqlbench.evaluation import evaluate
from sqlbench.runs import RunFolder
from sqlbench_train.launch import train
from sqlbench_train.metrics import read_rows

pytest.importorskip("vllm", reason="vLLM is not installed here; run 'make test-vllm'")
pytestmark = pytest.mark.timeout(1800)

STEPS = 3
TOLERANCE = 1e-4
"""Of a token's probability: float32 on both sides, in kernels that add in another order."""
SETTINGS = [
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.router_config_path=null",  # verl's own
    "actor_rollout_ref.rollout.enforce_eager=True",
    "+actor_rollout_ref.rollout.enable_sleep_mode=False",  # the CPU build has none
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.actor.optim.lr=1e-3",  # so that every step changes probabilities by far more than the tolerance
    "data.train_batch_size=4",
    "sqlbench.validation_tasks=4",
    f"trainer.total_training_steps={STEPS}",
    "trainer.save_freq=1",
    "trainer.test_freq=1",
    f"trainer.max_actor_ckpt_to_keep={STEPS}",
]


@pytest.fixture(scope="module")
def run(pocket: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of a few steps through vLLM."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"KVCACHE_SPACE": "1", "OMP_THREADS_BIND": "nobind"}.items():
            patch.setenv(f"VLLM_CPU_{name}", value)
        return train("laptop", "run", pocket.root, results=tmp_path_factory.mktemp("results"), overrides=SETTINGS)


@torch.no_grad()
def largest_gap(checkpoint: Path, run: Path, step: int) -> float:
    """Largest difference between the probabilities that the engine sampled with and those of a checkpoint."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    records = [r for r in RunFolder(run).trajectories() if r.step == step and not r.validation]
    gaps = []
    for call in [t.completion for r in records for t in r.transitions][::3]:
        start, sampled = len(call.prompt_ids), torch.tensor(call.response_ids)
        logits = model(torch.tensor([call.prompt_ids + call.response_ids])).logits[0, start - 1 : -1]
        wanted = logits.softmax(-1).gather(1, sampled.unsqueeze(1)).squeeze(1)
        gaps.append(float((wanted - torch.tensor(call.logprobs).exp()).abs().max()))
    assert len(gaps) > 4
    return max(gaps)


def test_every_step_samples_from_the_weights_of_the_step_before(run: Path) -> None:
    saved = [NANO_PATH] + [run / f"checkpoints/global_step_{s}/actor/huggingface" for s in range(1, STEPS)]
    for step in range(1, STEPS + 1):
        gaps = [largest_gap(checkpoint, run, step) for checkpoint in saved]
        assert gaps[step - 1] < TOLERANCE, gaps
        assert min(gap for i, gap in enumerate(gaps) if i != step - 1) > 100 * TOLERANCE, gaps


def test_rollout_and_trainer_probabilities_agree(run: Path) -> None:
    rows = read_rows(run / "metrics.jsonl")
    assert all(rows[step]["training/rollout_probs_diff_max"] < TOLERANCE for step in range(1, STEPS + 1))
    assert all(rows[step]["sqlbench/failed_rollouts"] == 0 for step in range(1, STEPS + 1))


def test_the_trained_policy_is_served_and_evaluated_through_vllm(
    run: Path, pocket: DataSet, tmp_path: Path, monkeypatch
) -> None:
    split, limit = "dev_unseen_pretrain", 12
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    address = f"http://127.0.0.1:{port}/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    command = [sys.executable, "-c", "from sqlbench.cli import main; main()", "serve", "--port", port]
    with subprocess.Popen([*command, "--model", str(run)], stdout=subprocess.DEVNULL) as server:
        try:
            while server.poll() is None:
                with suppress(httpx.HTTPError):
                    if httpx.get(f"{address}/models", trust_env=False).is_success:
                        break
                time.sleep(1)
            options = {"results": tmp_path, "limit": limit, "prompts": "nano", "max_tokens": 128}
            evaluate(pocket.root, split, "openai:run", "served", **options)
        finally:
            server.send_signal(signal.SIGINT)
    evaluate(pocket.root, split, str(run), "here", **options)
    predictions = [
        {t.task_key: (t.error, t.pred) for t in RunFolder(tmp_path / "laptop" / name).trajectories()}
        for name in ("served", "here")
    ]
    # Near ties between two tokens may fall differently in other kernels.
    same = sum(predictions[0][key] == value for key, value in predictions[1].items())
    assert len(predictions[0]) == len(predictions[1]) == limit and same >= limit - 1
