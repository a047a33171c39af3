"""Measures trainings on a GPU: the time of a step, its parts, and the GPU memory that it uses.

    python benchmarks/gpu.py --out DIR [--part a b c] [--data data/pocket] [--model FOLDER] [--steps N] [--minutes M]
                             [key=value ...]

Every measurement is one ``sqlbench train``. It leaves ``DIR/<measurement>.json``, a line in ``DIR/gpu.md``, and below
``DIR/runs`` its run folder with the exact configuration. In this order:

- ``b``: *vllm-random*, the GPU profile on a model of Qwen2.5-Coder-1.5B's shape, at the seed experiment's batch and
  with answers as long as those that it published. The weights are random, so speed is all that it measures: answers
  end at a fixed length, rewards are coins, and no group is left out of the update.
- ``b``: *vllm-model*, the GPU profile on the checkpoint of ``--model``; left out without it.
- ``a``: *local*, the laptop profile on the GPU: nano and our own engine.
- ``b``: *vllm-nano*, the GPU profile on nano.
- ``c``: *grown*, a nano of 15M parameters, trained from scratch on the GPU for ``--pretrain`` minutes and then improved
  by GRPO; accuracy is that of the trainer's own validation, before the first step and after the last.

``--minutes`` bounds all of it: when they are over, the running training is interrupted, and its steps so far count.
A measurement that has its JSON is not made again, so the same command resumes with the next one.

The times leave out the first step (it compares probabilities) and the last step of a training that ended by itself
(it saves). The GPU's peak is that of all processes on it; vLLM takes a fixed share whatever it needs, so the trainer's
own peak stands beside it. Nothing is downloaded. ``--device cpu`` rehearses it all on tiny models, ``b`` only where
vLLM's CPU build is installed.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import itertools
import json
import os
import shutil
import signal
import statistics
import string
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pocket import NANO_PATH
from pocket.nano import Recipe, train_nano
from sqlbench.errors import SqlbenchError, TrainingError
from sqlbench.models.checkpoint import check_checkpoint
from sqlbench.runs import CONFIG, METRICS, RunFolder, run_path
from sqlbench_lab.sweep import SMALLEST
from sqlbench_lab.tables import SEED_FIGURES
from sqlbench_train.estimate import SHAPES, Shape
from sqlbench_train.metrics import read_rows

GROWN = Recipe(width=384, layers=8, heads=12, kv_heads=6, hidden=1152, batch_tokens=8192)
SHAPE = SHAPES["Qwen/Qwen2.5-Coder-1.5B-Instruct"]
TINY_SHAPE = SHAPE | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 4096,
}  # fmt: skip
CONTEXT = 32768
STOP_SECONDS = 20
"""Time for an interrupted training to end in; it is interrupted that much before the time is over."""
PARTS = {
    "rollout": "timing_s/gen",
    "log-prob": "timing_s/old_log_prob",
    "update": "timing_s/update_actor",
    "weight sync": "timing_s/update_weights",
}

SPEED_ONLY = ("trainer.val_before_train=false", "trainer.test_freq=-1")
ROLLOUT = "actor_rollout_ref.rollout"
VLLM_ON_CPU = (
    f"{ROLLOUT}.name=vllm",
    f"{ROLLOUT}.router_config_path=null",
    f"{ROLLOUT}.enforce_eager=true",
    f"+{ROLLOUT}.enable_sleep_mode=false",
)


@dataclass(frozen=True)
class Measurement:
    """One training that is measured."""

    part: str
    what: str
    profile: str
    steps: int
    overrides: tuple[str, ...] = ()


MEASUREMENTS = {
    "vllm-random": Measurement(
        "b",
        "random weights of Qwen2.5-Coder-1.5B's shape, vLLM (speed only)",
        "gpu",
        7,
        (
            *SPEED_ONLY,
            "data.max_response_length=64",  # the published mean response of this model grew from 38 to 63 tokens
            f"{ROLLOUT}.ignore_eos=true",
            "sqlbench.control=coin",
            "sqlbench.stop_repetition=null",
            "sqlbench.drop_useless_groups=false",
            "actor_rollout_ref.actor.checkpoint.save_contents=[hf_model]",
        ),
    ),
    "vllm-model": Measurement("b", "the checkpoint of --model, vLLM", "gpu", 12, SPEED_ONLY),
    "local": Measurement("a", "nano, our own engine", "laptop", 7, SPEED_ONLY),
    "vllm-nano": Measurement(
        "b",
        "nano, vLLM",
        "gpu",
        7,
        (
            *SPEED_ONLY,
            "data.max_prompt_length=640",
            "data.max_response_length=128",
            f"{ROLLOUT}.max_model_len=768",
        ),
    ),
    "grown": Measurement("c", "a larger nano, trained here, our own engine", "laptop", 40),
}
"""Measurements in the order in which they are made: the most valuable one first."""
PUBLISHED = {"vllm-random": "qwen-1.5b"}
"""Row of the seed experiment whose time per step is shown beside a measurement."""


# ---- models


def policy(name: str, options: argparse.Namespace, minutes: float) -> Path:
    """Return the checkpoint to start from; make it if it is missing. Its note ``sqlbench.json`` is written last."""
    if name in ("local", "vllm-nano"):
        return NANO_PATH
    if name == "vllm-model":
        return check_checkpoint(str(options.model))
    small, folder = options.device == "cpu", options.out / "models" / f"{name}-{options.device}"
    if not (folder / "sqlbench.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        if name == "grown":
            recipe = Recipe() if small else GROWN
            train_nano(folder, min(options.pretrain, minutes / 2), threads=1, recipe=recipe, device=options.device)
        else:
            shape = TINY_SHAPE if small else SHAPE
            random_checkpoint(folder, shape, options.tokenizer or options.model, options.device)
    return folder


def random_checkpoint(out: Path, shape: dict[str, Any], tokenizer: Path | None = None, device: str = "cpu") -> None:
    """Write a checkpoint with random weights, and the tokenizer of another folder or nano's, filled up."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    out.mkdir(parents=True)
    for file in (tokenizer or NANO_PATH).iterdir():
        if "token" in file.name or file.name in ("chat_template.jinja", "vocab.json", "merges.txt"):
            shutil.copy(file, out)
    if tokenizer is None:
        fill_vocabulary(out, shape["vocab_size"])
    loaded = AutoTokenizer.from_pretrained(out)
    config = AutoConfig.for_model(
        **shape
        | {"vocab_size": max(shape["vocab_size"], len(loaded))},  # a tiny shape with the tokenizer of a large one
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6,
        bos_token_id=None,
        eos_token_id=loaded.eos_token_id,
        pad_token_id=loaded.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):  # drawing 1.5 billion numbers takes a CPU a minute
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(out)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()  # vLLM counts what is free
    note = {"family": "chat", "weights": "random", "tokenizer": str(tokenizer or "nano's, filled up")}
    (out / "sqlbench.json").write_text(json.dumps(note, indent=1) + "\n")


def fill_vocabulary(folder: Path, size: int) -> None:
    """Add words of four letters, so that every id stands for some text."""
    path, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    words = ("\u0120" + "".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
    new = (word for word in words if word not in vocabulary)
    vocabulary |= {next(new): number for number in range(len(vocabulary), size)}
    path.write_text(json.dumps(content, ensure_ascii=False))
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": CONTEXT}, indent=1))


# ---- measuring


class Memory(threading.Thread):
    """Follows the GPU memory that all processes use."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ended, self.peak = threading.Event(), 0

    def run(self) -> None:
        """Poll five times per second until `ended` is set."""
        import torch

        while not self.ended.wait(0.2):
            free, total = torch.cuda.mem_get_info(0)
            self.peak = max(self.peak, total - free)


def settings(name: str, options: argparse.Namespace) -> tuple[str, list[str]]:
    """Return the profile and overrides of a measurement."""
    one = MEASUREMENTS[name]
    steps = options.steps or one.steps
    every = [f"trainer.{key}={steps}" for key in ("total_training_steps", "save_freq", "test_freq")]
    chosen = [f"trainer.device={options.device}", *every, *one.overrides]
    if options.device == "cuda":
        return one.profile, [*chosen, *options.overrides]
    return "laptop", [*chosen, *SMALLEST, *(VLLM_ON_CPU if one.profile == "gpu" else ()), *options.overrides]


def log_of(name: str, options: argparse.Namespace) -> Path:
    """Return the file for the output of a measurement's training."""
    return options.out / "logs" / f"{name}.log"


def follow(command: list[str], run: Path, deadline: float, log: Path) -> float | None:
    """Run a training until it ends or the time is over; return the seconds to its first metrics, None without any.

    Raises:
        TrainingError: it failed by itself.
    """
    started, first = time.monotonic(), None
    before = (run / METRICS).stat().st_mtime_ns if (run / METRICS).is_file() else 0
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and time.monotonic() < deadline - STOP_SECONDS:
                time.sleep(0.5)
                metrics = run / METRICS
                if (
                    first is None
                    and metrics.is_file()
                    and metrics.stat().st_size
                    and metrics.stat().st_mtime_ns != before
                ):
                    first = time.monotonic() - started
        finally:
            stopped = process.poll() is None
            if stopped:  # it ends what it has started, and its run folder holds all steps that it made
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    if process.returncode and not stopped:
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
        raise TrainingError(last[0].removeprefix("error: "))
    return first


def measure(name: str, options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Train until the time is over at the latest, and summarize.

    Raises:
        SqlbenchError: it cannot be trained, or made no second step in its time.
    """
    import torch

    model = policy(name, options, (deadline - time.monotonic()) / 60)
    (profile, overrides), memory, runs = settings(name, options), Memory(), options.out / "runs"
    command = [sys.executable, "-m", "sqlbench", "train", "--profile", profile, "--run", name, "--overwrite"]
    command += ["--data", str(options.data), "--model", str(model), "--results", str(runs), *overrides]
    run, log = run_path(runs, profile, name), log_of(name, options)
    log.parent.mkdir(exist_ok=True)
    if options.device == "cuda":
        memory.start()
    try:
        first = follow(command, run, deadline, log)
    finally:
        memory.ended.set()
    if first is None or not measured(run):
        raise TrainingError(f"the training ended before a step could be measured; give it more --minutes (see {log})")
    packages = [p for p in ("torch", "transformers", "verl", "vllm") if importlib.util.find_spec(p)]
    record = {
        "measurement": name,
        "what": MEASUREMENTS[name].what,
        "gpu": torch.cuda.get_device_name(0) if options.device == "cuda" else "no GPU: a rehearsal on tiny models",
        "versions": {package: version(package) for package in packages},
        "config": str((run / CONFIG).relative_to(options.out)),
        "overrides": overrides,
        **summary(run),
        "gpu_peak_gb": memory.peak / 1e9 if options.device == "cuda" else None,
        "published": published(name),
    }
    rows = read_rows(run / METRICS)
    record["startup_seconds"] = first - rows[min(rows)].get("timing_s/step", 0.0)
    if name == "grown":
        record["pretraining"] = json.loads((model / "sqlbench.json").read_text())["measured"]
    return record


def published(name: str) -> dict[str, float] | None:
    """Return seconds per step and prompt tokens of the seed experiment's row for a measurement; None without one."""
    if name not in PUBLISHED:
        return None
    with SEED_FIGURES.open(newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["row"] == PUBLISHED[name])
    return {"seconds": float(row["Time/Step (s)"]), "prompt_tokens": float(row["Prompt Length"])}


def measured(run: Path) -> list[dict[str, float]]:
    """Return the metrics of a run's steps without the first, and the last if the training ended by itself."""
    rows, folder = read_rows(run / METRICS), RunFolder(run)
    steps = [s for s in sorted(rows) if s > 1 and not (folder.finished and s == max(rows))]
    return [rows[step] for step in steps if "timing_s/step" in rows[step]]


def summary(run: Path) -> dict[str, Any]:
    """Summarize the metrics of a run's `measured` steps."""
    config, rows, middle = RunFolder(run).config()["config"], read_rows(run / METRICS), measured(run)

    def mean(key: str) -> float:
        return sum(row.get(key, 0.0) for row in middle) / len(middle)

    sampled = 0.0
    for row in middle:
        answers = (row["sqlbench/rollouts"] - row["sqlbench/failed_rollouts"]) * row["sqlbench/all_transitions"]
        sampled += answers * row["sqlbench/response_tokens"] / len(middle)
    shape, seconds = Shape.of(config["sqlbench"]["model"]), mean("timing_s/step")
    parts = {part: mean(key) for part, key in PARTS.items()}
    gaps = [row["training/rollout_probs_diff_max"] for row in rows.values() if "training/rollout_probs_diff_max" in row]
    return {
        "model": config["sqlbench"]["model"],
        "parameters": shape.parameters if shape else None,
        "batch": f"{config['data']['train_batch_size']} x {config['actor_rollout_ref']['rollout']['n']}",
        "steps": len(middle),
        "seconds": seconds,
        "median_seconds": statistics.median(row["timing_s/step"] for row in middle),
        "parts": parts | {"other": seconds - sum(parts.values())},
        "prompt_tokens": mean("sqlbench/prompt_tokens"),
        "response_tokens": mean("sqlbench/response_tokens"),
        "transitions": mean("sqlbench/transitions"),
        "rows": mean("sqlbench/rows"),
        "rows_updated": mean("sqlbench/rows_updated"),
        "cut_answers": mean("sqlbench/truncated_share"),
        "zero_variance_groups": mean("sqlbench/zero_variance_groups"),
        "failed_rollouts": sum(row["sqlbench/failed_rollouts"] for row in middle),
        "sampled_tokens_per_second": sampled / parts["rollout"],
        "updated_tokens_per_second": mean("perf/total_num_tokens") / parts["update"],
        "trainer_peak_gb": max(row["actor/perf/max_memory_allocated_gb"] for row in middle),
        "largest_probability_gap": max(gaps, default=None),
        "validation": [row["sqlbench/val_ex"] for _, row in sorted(rows.items()) if "sqlbench/val_ex" in row],
    }


# ---- output


def records(out: Path) -> list[dict[str, Any]]:
    """Return all results so far, in the order of the measurements."""
    files = [out / f"{name}.json" for name in MEASUREMENTS]
    return [json.loads(file.read_text()) for file in files if file.is_file()]


def table(made: list[dict[str, Any]]) -> str:
    """Format all results as Markdown."""
    head = ["trained", "parameters", "batch", "a step, s", "median", *(f"{part}, %" for part in (*PARTS, "other"))]
    head += ["rows updated", "no variance", "answers cut", "prompt", "response", "transitions"]
    head += ["sampled tokens/s", "updated tokens/s", "GPU, GB", "trainer, GB", "start, s"]
    lines, notes = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"], []
    for r in made:
        cells = [
            r["what"],
            f"{r['parameters'] or 0:,}",
            r["batch"],
            f"{r['seconds']:.2f}",
            f"{r['median_seconds']:.2f}",
        ]
        cells += [f"{100 * seconds / r['seconds']:.0f}" for seconds in r["parts"].values()]
        cells += [f"{r['rows_updated']:.0f} of {r['rows']:.0f}", f"{100 * r['zero_variance_groups']:.0f}%"]
        cells += [f"{100 * r['cut_answers']:.1f}%", f"{r['prompt_tokens']:.0f}", f"{r['response_tokens']:.0f}"]
        cells += [f"{r['transitions']:.2f}", f"{r['sampled_tokens_per_second']:,.0f}"]
        cells += [f"{r['updated_tokens_per_second']:,.0f}", f"{r['gpu_peak_gb']:.1f}" if r["gpu_peak_gb"] else ""]
        cells += [f"{r['trainer_peak_gb']:.1f}", f"{r['startup_seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
        note = f"- {r['what']}: {r['gpu']}, {r['steps']} steps measured, configuration in `{r['config']}`"
        checked = [f"{100 * share:.1f}%" for share in r["validation"]]
        note += f"; validation {' → '.join(checked)}" if checked else ""
        if other := r["published"]:
            note += f"; published: {other['seconds']:.1f} s a step on one GPU of unknown kind with prompts of "
            note += f"{other['prompt_tokens']:.0f} tokens, {other['seconds'] / r['seconds']:.1f} times as long"
        notes.append(f"{note}.")
    return "\n".join([*lines, "", *notes])


def main() -> None:
    """Measure and print; report a failure in one line and run the rest."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results, models and run folders")
    parser.add_argument("--part", nargs="+", choices="abc", default="abc")
    parser.add_argument("--data", type=Path, default=Path("data/pocket"))
    parser.add_argument("--model", type=Path, help="a checkpoint folder that is trained too")
    parser.add_argument("--tokenizer", type=Path, help="checkpoint folder whose tokenizer the random model gets")
    parser.add_argument("--steps", type=int, help="steps of each training, 3 or more")
    parser.add_argument("--minutes", type=float, default=30.0, help="for everything")
    parser.add_argument("--pretrain", type=float, default=10.0, help="minutes of the larger nano before GRPO")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("overrides", nargs="*", help="key=value for the configuration of every training")
    options = parser.parse_intermixed_args()
    deadline = time.monotonic() + 60 * options.minutes

    import torch

    if options.steps is not None and options.steps < 3:
        parser.error(f"--steps {options.steps}: the first and the last are not measured, so give 3 or more")
    for folder in filter(None, (options.model, options.tokenizer)):
        if not (folder / "tokenizer.json").is_file():
            parser.error(f"{folder} has no tokenizer.json; name the folder of a checkpoint")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU with CUDA on this machine; rehearse with --device cpu")
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
    if options.device == "cpu":
        os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
    options.out = options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = [name for name, one in MEASUREMENTS.items() if one.part in options.part]
    if options.model is None and "vllm-model" in wanted:
        wanted.remove("vllm-model")
    failed = False
    for name in wanted:
        result = options.out / f"{name}.json"
        if result.is_file():
            print(f"{name}: measured before, in {result}", flush=True)
            continue
        results = records(options.out)
        start = max((record["startup_seconds"] for record in results), default=STOP_SECONDS)
        if deadline - time.monotonic() < start + 2 * STOP_SECONDS:
            print(f"{name}: too little time is left; give the same command again", file=sys.stderr, flush=True)
            failed = True
            continue
        print(f"{name}: training; its output is in {log_of(name, options)}", flush=True)
        try:
            record = measure(name, options, deadline)
        except SqlbenchError as error:
            failed = True
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            continue
        result.write_text(json.dumps(record, indent=1) + "\n")
        text = table(records(options.out))
        (options.out / "gpu.md").write_text(text + "\n")
        print(text, flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
