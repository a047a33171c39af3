"""Trains and measures baselines and controls for RL beside GRPO, with equal numbers of rollouts.

    python benchmarks/baselines.py --out DIR [--data DATA_SET] [--model POLICY] [--seeds N] [--turns N]
        [--only ARM ...]

Every arm starts from one policy, nano by default, and all but ``dynamic`` see at most ``steps x 16 x 8`` rollouts, or
the tasks of as many steps:

- ``dynamic``: the profile's defaults; ``grpo``: uniform sampling, as in all arms below, so that the numbers of rollouts
  are equal; ``success-rate``: with other tasks per step (`sqlbench_train.sampling`); ``positive_only``, ``token_mean``
  and ``transition``: with another loss, or credit.
- ``permuted``: rewards of each task's rollouts, shuffled among them; ``runs``: a reward for queries that run.
- ``sft``: the gold queries of the training split, as many answers as GRPO sees rollouts.
- ``rejection``: rollouts of that policy on as many training tasks as GRPO sees, of which the right ones are imitated.

Each policy is measured greedily on the headline split and on unseen schemas in the wording of pretraining, and by
eight samples at temperature 1 (``--samples``, first seed only): avg@8, pass@8, a majority vote and the first query that
runs. Samples of ``before`` show the policy without training at as many calls. Everything is written below DIR as it
is measured, and the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd

from sqlbench.errors import SqlbenchError
from sqlbench.evaluation import evaluate
from sqlbench.results import Summary
from sqlbench.runs import RunFolder
from sqlbench_lab.tables import write_table
from sqlbench_train.launch import train
from sqlbench_train.sft import sft

TASKS, GROUP = 16, 8
"""Tasks per step, and rollouts per task, of the laptop profile."""
LEARNED = "dev_unseen_pretrain"
UNIFORM = "sqlbench.sampling=uniform"
ARMS: dict[str, tuple[str, ...]] = {
    "before": (),
    "grpo": (UNIFORM,),
    "dynamic": (),
    "success-rate": ("sqlbench.sampling=success-rate",),
    "positive_only": ("actor_rollout_ref.actor.policy_loss.loss_mode=positive_only", UNIFORM),
    "token_mean": ("actor_rollout_ref.actor.policy_loss.loss_mode=token_mean", UNIFORM),
    "transition": ("sqlbench.credit=transition", UNIFORM),
    "permuted": ("sqlbench.control=permuted", UNIFORM),
    "runs": ("sqlbench.reward=runs", UNIFORM),
    "sft": (),
    "rejection": (),
}


class Bench:
    """Runs the arms with one set of options."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out

    def policy(self, arm: str, seed: int) -> str:
        """Train an arm unless that is done, and return its policy."""
        options = self.options
        run = f"{arm}-s{seed}"
        root = self.out / "laptop" / run
        if arm == "before":
            return str(options.model)
        if RunFolder(root).finished:
            return str(root)
        rollouts = options.steps * TASKS * GROUP
        if arm == "sft":
            place = {"steps": rollouts // 32, "batch_size": 32, "seed": seed, "results": self.out}
            return str(sft(options.data, run, model=options.model, lr=options.sft_lr, **place))
        if arm == "rejection":
            source = f"{run}-rollouts"
            if not RunFolder(self.out / "laptop" / source).finished:
                self.evaluate(
                    source,
                    options.model,
                    "train",
                    samples=GROUP,
                    temperature=1.0,
                    seed=seed,
                    limit=options.steps * TASKS,
                )
            place = {"source": self.out / "laptop" / source, "steps": rollouts // 32, "seed": seed, "results": self.out}
            return str(sft(options.data, run, model=options.model, lr=options.sft_lr, **place))
        steps = [f"trainer.total_training_steps={options.steps}", f"sqlbench.max_turns={options.turns}"]
        quiet = ["trainer.test_freq=-1", "trainer.val_before_train=False", f"sqlbench.seed={seed}"]
        return str(
            train(
                "laptop", run, options.data, options.model, [*steps, *quiet, *ARMS[arm], *options.set], results=self.out
            )
        )

    def evaluate(self, run: str, model: str, split: str, **settings: Any) -> Summary:
        """Evaluate a policy, or read the summary if that is done."""
        root = self.out / "laptop" / run
        if RunFolder(root).finished:
            return Summary(**RunFolder(root).summary())
        return evaluate(
            self.options.data, split, model, run, results=self.out, max_turns=self.options.turns, **settings
        )

    def measure(self, arm: str, seed: int) -> dict[str, Any]:
        """Measure everything about one policy."""
        model = self.policy(arm, seed)
        run = f"{arm}-s{seed}"
        headline = self.evaluate(f"{run}-headline", model, "headline")
        result: dict[str, Any] = {"arm": arm, "seed": seed, "ex": headline.score.ex}
        result["trained_wording"] = mean(s.ex or 0.0 for name, s in headline.by_phrasing.items() if name in "BC")
        result["other_wording"] = mean(s.ex or 0.0 for name, s in headline.by_phrasing.items() if name not in "BC")
        result["pretrained_wording"] = self.evaluate(f"{run}-learned", model, LEARNED).score.ex
        rows = [row["data"] for row in RunFolder(self.out / "laptop" / run).metrics()] if arm != "before" else []
        steps = [row for row in rows if "sqlbench/seconds" in row]
        if steps:
            sampled = [row.get("sqlbench/tasks_sampled", TASKS) * GROUP for row in steps]
            result |= {"rollouts": sum(sampled), "seconds": sum(row["sqlbench/seconds"] for row in steps)}
            result["zero_variance"] = mean(row["sqlbench/zero_variance_groups"] for row in steps)
        if seed == 1 and self.options.samples:
            several = self.evaluate(f"{run}-samples", model, "headline", samples=GROUP, temperature=1.0)
            assert several.samples is not None
            result |= {name: estimate.value for name, estimate in several.samples.by_turn[-1].items()}
        return result


def table(found: list[dict[str, Any]]) -> pd.DataFrame:
    """Return one row per arm: means over the seeds, and the EX of each seed."""
    rows = []
    before = next((one["ex"] for one in found if one["arm"] == "before"), None)
    for arm in ARMS:
        runs = [one for one in found if one["arm"] == arm]
        if not runs:
            continue

        def average(name: str, runs: list[dict[str, Any]] = runs) -> float | None:
            values = [one[name] for one in runs if one.get(name) is not None]
            return mean(values) if values else None

        row: dict[str, Any] = {"Arm": arm, "Seeds": len(runs)}
        row["Headline EX (%)"] = percent(average("ex"))
        row["By seed"] = " / ".join(percent(one["ex"]) for one in runs)
        for name, title in (
            ("trained_wording", "Wording of training (%)"),
            ("other_wording", "Wording never trained (%)"),
            ("pretrained_wording", "Wording of pretraining (%)"),
            *((f"{kind}@{GROUP}", f"{kind}@{GROUP} (%)") for kind in ("avg", "pass", "majority", "best")),
            ("zero_variance", "Zero-variance groups (%)"),
        ):
            row[title] = percent(average(name))
        rollouts, seconds, ex = average("rollouts"), average("seconds"), average("ex")
        gain = 100 * (ex - before) if ex is not None and before is not None else None
        row["Rollouts"] = "" if rollouts is None else f"{rollouts:.0f}"
        row["Points per 1,000 rollouts"] = "" if not rollouts or gain is None else f"{1000 * gain / rollouts:.2f}"
        row["Points per minute"] = "" if not seconds or gain is None else f"{60 * gain / seconds:.2f}"
        rows.append(row)
    return pd.DataFrame(rows)


def percent(share: float | None) -> str:
    """Format a share as percent; empty if it was not measured."""
    return "" if share is None else f"{100 * share:.1f}"


def main() -> None:
    """Run what is missing, and write the table after each policy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--data", type=Path, default=Path("data/pocket"))
    parser.add_argument("--model", default="nano", help="policy that every arm starts from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--sft-lr", type=float, default=2e-4)
    parser.add_argument("--samples", action="store_true", help="measure eight samples per task too")
    parser.add_argument("--set", nargs="*", default=[], help="key=value for every training")
    options = parser.parse_args()
    bench = Bench(options)
    file = options.out / "baselines.json"
    for seed in options.seeds:
        for arm in options.only:
            if arm == "before" and seed != options.seeds[0]:
                continue
            try:
                one = bench.measure(arm, seed)
            except SqlbenchError as error:
                sys.exit(f"error: {arm}, seed {seed}: {error}")
            results = json.loads(file.read_text()) if file.is_file() else []
            results = [row for row in results if (row["arm"], row["seed"]) != (arm, seed)] + [one]
            file.write_text(json.dumps(results, indent=1) + "\n")
            write_table(table(results), options.out, "baselines")
            print(one, flush=True)


if __name__ == "__main__":
    main()
