"""Measures the cost of verl and Ray: a training step of the laptop profile against a bare loop over the same work.

    python benchmarks/training.py --out DIR [--data data/pocket] [--parameters N ...] [--steps N] [key=value ...]

First a real `sqlbench_train.launch.train` of a few steps; then, in this process, a loop without verl or Ray over the
same tasks with the same sampling engine, agent, seeds, advantage, clipped loss, micro-batches and optimizer. Both are
split into rollout, log-prob, update, weight sync, and orchestration, which is the rest of the time from one step's end
to the next. The first step (it compares probabilities) and the last (it saves) are run and left out. CPU seconds are
those of the whole process tree for verl, also by process, and of this process for the bare loop. The share of equal
rollouts, token by token, shows whether both did the same work; floating-point sums make later steps drift apart.

``--parameters 0`` is nano; a larger number is nano widened to about that many, which answers as nano does, so that
only the arithmetic grows. The time to the first step is that from calling `train` to the step's beginning, without the
validation before it. Writes ``training.json`` and ``training.md``. The wall times mean something on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import threading
import time
from pathlib import Path

import psutil

from pocket import NANO_PATH
from sqlbench.profiles import PROFILES
from sqlbench.runs import METRICS
from sqlbench_train.launch import train
from sqlbench_train.metrics import read_rows

PARTS = {
    "rollout": "timing_s/gen",
    "log-prob": "timing_s/old_log_prob",
    "update": "timing_s/update_actor",
    "weight sync": "timing_s/update_weights",
}
ORCHESTRATION = "orchestration"


# ---- verl


class Meter(threading.Thread):
    """Follows the CPU time of this process and all below it; records it when a step is logged."""

    def __init__(self, metrics: Path) -> None:
        super().__init__(daemon=True)
        self.metrics, self.ended = metrics, threading.Event()
        self.used: dict[tuple[int, float], tuple[str, float]] = {}
        self.marks: dict[int, tuple[float, dict[str, float]]] = {}

    def run(self) -> None:
        """Poll ten times per second until `ended` is set."""
        size, this = 0, psutil.Process()
        while not self.ended.wait(0.1):
            grown = self.metrics.stat().st_size if self.metrics.is_file() else 0
            for process in (this, *this.children(recursive=True)):
                try:
                    times, name = process.cpu_times(), self._role(process.cmdline())
                    self.used[process.pid, process.create_time()] = name, times.user + times.system
                except psutil.Error:  # it ended; its last value stays
                    continue
            if grown != size:
                size, total = grown, dict.fromkeys(("other", *(role for role, _ in self.used.values())), 0.0)
                for role, seconds in self.used.values():
                    total[role] += seconds
                total["other"] -= time.thread_time()  # the cost of polling
                for step in read_rows(self.metrics):
                    self.marks.setdefault(step, (time.perf_counter(), dict(total)))

    @staticmethod
    def _role(command: list[str]) -> str:
        if not command:
            return "other"
        if command[0].startswith("ray::"):
            return command[0].removeprefix("ray::").split(".")[0]
        roles = {"verl_cpu.forkserver": "driver", "raylet": "raylet", "gcs_server": "gcs_server"}
        return next((role for text, role in roles.items() if any(part.endswith(text) for part in command)), "other")


def measure_verl(data: Path, model: Path, results: Path, steps: int, overrides: list[str]) -> tuple[Path, dict]:
    """Train; return the run folder, and means over the measured steps."""
    folder = results / "laptop/speed"
    meter = Meter(folder / METRICS)
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    meter.start()
    fixed = ["trainer.val_before_train=false", "trainer.test_freq=-1", f"trainer.save_freq={steps + 2}"]
    fixed.append(f"trainer.total_training_steps={steps + 2}")
    try:
        train("laptop", "speed", data, str(model), [*fixed, *overrides], results=results)
    finally:
        meter.ended.set()
        meter.join()
    rows = read_rows(folder / METRICS)
    (begun, cpu_begun), (ended, cpu_ended) = meter.marks[1], meter.marks[steps + 1]
    seconds = (ended - begun) / steps
    parts = {p: sum(rows[s].get(name, 0.0) for s in range(2, steps + 2)) / steps for p, name in PARTS.items()}
    parts[ORCHESTRATION] = seconds - sum(parts.values())
    by_process = {role: (cpu_ended[role] - cpu_begun.get(role, 0.0)) / steps for role in cpu_ended}
    return folder, {
        "seconds": seconds,
        "cpu_seconds": sum(by_process.values()),
        "parts": parts,
        "cpu_by_process": dict(sorted(by_process.items(), key=lambda pair: -pair[1])),
        "start_seconds": begun - rows[1]["timing_s/step"] - start,
        "start_cpu_seconds": sum(cpu_begun.values()),
    }


# ---- models


def widened(parameters: int, out: Path) -> Path:
    """Write nano with more heads, wider layers and the same answers: new weights add nothing until they are trained."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pocket.nano import Recipe, build_model, save_checkpoint

    nano, tokenizer = (kind.from_pretrained(NANO_PATH) for kind in (AutoModelForCausalLM, AutoTokenizer))
    old = nano.config
    layer = old.num_hidden_layers * 12  # times the width's square: about what a layer of nano's shape has
    width = next(w for w in range(old.hidden_size, 10**6, 64) if layer * w**2 + w * old.vocab_size >= 0.9 * parameters)
    heads = width // old.head_dim
    torch.manual_seed(0)
    wide = build_model(Recipe(width=width, hidden=3 * width, heads=heads, kv_heads=heads // 2), tokenizer)
    before, scale = nano.state_dict(), (old.hidden_size / width) ** 0.5
    for name, tensor in wide.state_dict().items():
        if name == "lm_head.weight":  # tied to the embedding
            continue
        if any(part in name for part in ("embed_tokens", "o_proj", "down_proj")):
            tensor.zero_()
        is_norm = name.endswith(("layernorm.weight", "model.norm.weight"))
        tensor[tuple(slice(n) for n in before[name].shape)] = before[name] * (scale if is_norm else 1.0)
    save_checkpoint(wide, tokenizer, out, {"widened_to": width})
    return out


# ---- output


def table(results: list[dict]) -> str:
    """Format all results as Markdown."""
    lines = []
    for result in results:
        verl, bare = result["verl"], result["bare"]
        lines += [f"\n### {result['parameters']:,} parameters\n", "| a step | verl, s | bare, s | ratio |"]
        lines.append("|---|---|---|---|")
        for name in (*PARTS, ORCHESTRATION):
            lines.append(f"| {name} | {verl['parts'][name]:.2f} | {bare['parts'].get(name, 0.0):.2f} | |")
        for label, key in (("**all**", "seconds"), ("**CPU**", "cpu_seconds")):
            lines.append(f"| {label} | {verl[key]:.2f} | {bare[key]:.2f} | {verl[key] / bare[key]:.2f} |")
        cpu = ", ".join(f"{role} {seconds:.2f}" for role, seconds in verl["cpu_by_process"].items() if seconds >= 0.005)
        same = ", ".join(f"{100 * share:.0f}%" for share in bare["same_rollouts"])
        lines.append(f"\nCPU seconds by process: {cpu}. Same rollouts, step by step: {same}.")
        lines.append(
            f"From the start to the first step: {verl['start_seconds']:.1f} s, {verl['start_cpu_seconds']:.1f} CPU s."
        )
    return "\n".join(lines).strip()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results and the run folders")
    parser.add_argument("--data", type=Path, default=Path("data/pocket"))
    parser.add_argument("--parameters", type=int, nargs="+", default=[0, 5_000_000], help="0 is nano")
    parser.add_argument("--steps", type=int, default=8, help="measured steps")
    parser.add_argument("overrides", nargs="*", help="key=value for the training's configuration")
    options = parser.parse_intermixed_args()

    os.environ.update(PROFILES["laptop"].environment)
    results = []
    for parameters in options.parameters:
        place = options.out / f"p{parameters}"
        model = widened(parameters, place / "model") if parameters else NANO_PATH
        folder, verl = measure_verl(options.data, model, place, options.steps, options.overrides)
        from bare_loop import measure_bare  # verl and torch, after the training that is measured with its imports

        bare = measure_bare(folder, options.steps)
        results.append({"parameters": count(model), "steps": options.steps, "verl": verl, "bare": bare})
    (options.out / "training.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "training.md").write_text(table(results) + "\n")
    print(table(results))


def count(model: Path) -> int:
    """Count the parameters of a checkpoint."""
    from transformers import AutoModelForCausalLM

    return sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters())


if __name__ == "__main__":
    main()
