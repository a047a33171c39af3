"""Measures the wall and CPU seconds of a rollout with a checkpoint in this process.

    python benchmarks/local_model.py --model MODEL --out DIR [--data data/spider] [--split dev_500] [--rollouts N]

MODEL is a folder or a Hugging Face name. Two evaluations of three turns, on the first N tasks, with the same prompts:
``plain`` in float32 with every batch computed afresh, ``frozen`` as ``sqlbench eval`` runs such a model (bfloat16 where
the CPU has it, keys and values of earlier prompts kept). OMP_NUM_THREADS sets the threads. CPU seconds mean
something on a busy machine too. Writes ``local_model.json``, after each form; the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from sqlbench.evaluation import evaluate
from sqlbench.models import open_model, policy_folder
from sqlbench.models.local import LocalChatModel
from verl_cpu.engine import LocalEngine


def measure(model: LocalChatModel, data: Path, split: str, rollouts: int) -> dict[str, float | None]:
    """Measure seconds per rollout, calls, tokens, and right answers."""
    with TemporaryDirectory() as results:
        started, cpu = time.perf_counter(), time.process_time()
        summary = evaluate(data, split, model, "run", results=results, limit=rollouts)
        return {
            "seconds": round((time.perf_counter() - started) / rollouts, 2),
            "cpu_seconds": round((time.process_time() - cpu) / rollouts, 2),
            "calls": summary.transitions,
            "prompt_tokens": summary.tokens["all"].prompt,
            "response_tokens": summary.tokens["all"].response,
            "correct": summary.score.correct,
            "failed": summary.failed,
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--data", type=Path, default=Path("data/spider"))
    parser.add_argument("--split", default="dev_500")
    parser.add_argument("--rollouts", type=int, default=16)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "local_model.json"
    results = json.loads(file.read_text()) if file.is_file() else {"rollouts": options.rollouts, "model": options.model}
    for form in ("frozen", "plain"):
        if form in results:
            continue
        model = open_model(options.model)
        assert isinstance(model, LocalChatModel)
        if form == "plain":
            model.batched.engine = LocalEngine(policy_folder(options.model), threads=0, max_model_len=8192)
        measured = measure(model, options.data, options.split, options.rollouts)
        load = [round(x, 1) for x in os.getloadavg()]
        results[form] = measured | {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "load": load}
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(form, results[form], flush=True)


if __name__ == "__main__":
    main()
