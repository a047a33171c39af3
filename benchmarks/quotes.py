"""Writes the numbers of README and docs from the stored results, so that a page quotes nothing else.

python benchmarks/quotes.py     fills the tables between `<!-- table:NAME -->` and `<!-- /table:NAME -->`, and prints
the sentences with numbers that a page should hold and does not.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gpu_report
import pandas as pd

from sqlbench.results import difference
from sqlbench.runs import read_jsonl
from sqlbench_lab.tables import CellResult, EvalStats, load_results

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "results"
GRID = RESULTS / "laptop/reproduce"
MAIN = "t3_c2048_write-rewrite"
SPLITS = {
    "dev_seen_pretrain": "seen schemas, wording of pretraining",
    "dev_seen_train": "seen schemas, wording of RL training",
    "dev_seen_never": "seen schemas, wording never shown",
    "dev_unseen_pretrain": "unseen schemas, wording of pretraining",
    "dev_unseen_train": "unseen schemas, wording of RL training",
    "dev_unseen_never": "unseen schemas, wording never shown",
}
REWARD_ROWS = {
    "reference's steps": "the reference's steps",
    "bare SQLite, gold and prediction": "bare SQLite, gold and prediction",
    "bare SQLite, prediction alone": "bare SQLite, prediction alone",
    "ours, reference mode, cold gold": "sqlbench, reference mode, gold not seen before",
    "ours, reference mode, warm gold": "sqlbench, reference mode, gold in the cache",
    "ours, strict mode, cold gold": "sqlbench, strict mode, gold not seen before",
    "ours, strict mode, warm gold": "sqlbench, strict mode, gold in the cache",
}


def cells(folder: Path) -> dict[str, CellResult]:
    """Return the finished cells of a grid by name."""
    return {result.cell.name: result for result in load_results(folder)}


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Write a Markdown table."""
    names = list(head)
    lines = [names, ["---"] * len(names), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def change(name: str, before: EvalStats, after: EvalStats) -> list[str]:
    """Write one row of a paired comparison."""
    gain = difference(before.right, after.right)
    scores = [f"{side.score.percent:.1f}% ({side.score.interval_text})" for side in (before, after)]
    return [name, str(after.score.n), *scores, f"{gain.points:+.1f} ({gain.interval_text})", gain.p_text]


def seeds() -> list[CellResult]:
    """Return the seeds of the main cell."""
    grid = cells(GRID)
    return [grid[MAIN], grid[f"{MAIN}_seed2"], grid[f"{MAIN}_seed3"]]


def gpu_runs() -> list[gpu_report.Run]:
    """Return the GPU runs that the results page lists."""
    listed = (RESULTS / "gpu/README.md").read_text(encoding="utf-8")
    return [run for run in gpu_report.read_runs(RESULTS / "gpu") if f"| `{run.name}` |" in listed]


def demo() -> CellResult:
    """Return the main cell of the demo."""
    return cells(RESULTS / "laptop/demo")[MAIN]


def sampling() -> pd.DataFrame:
    """Return the trainings of one turn over three seeds, and the policy before them."""
    return pd.DataFrame(json.loads((RESULTS / "laptop/baselines/sampling.json").read_text()))


def permuted() -> list[float]:
    """Return the accuracy of each control whose rewards were permuted within their tasks, in percent."""
    stored = json.loads((RESULTS / "laptop/baselines/explored.json").read_text())
    return [100 * row["headline"] for row in stored if any("control=permuted" in o for o in row.get("overrides", []))]


def summary_table() -> str:
    """Write the gains of GRPO, one row per stored experiment."""
    runs = sampling()
    start = 100 * runs[runs["arm"] == "before"]["ex"].item()
    arms = {arm: 100 * rows["ex"] for arm, rows in runs.groupby("arm")} | {"permuted": pd.Series(permuted())}
    names = {
        "dynamic": "nano, laptop, one turn, 40 steps, 3 seeds",
        "dynamic-120": "the same, 120 steps, 3 seeds",
        "grpo": "the same, 40 steps with uniform sampling, 3 seeds",
        "permuted": "control: rewards permuted within each task, uniform sampling, 2 seeds",
    }
    rows = []
    for arm, name in names.items():
        ex = arms[arm]
        spread = f"{ex.min():.1f} to {ex.max():.1f}% by seed"
        rows.append([name, "800 of pocket", f"{start:.1f}%", f"{ex.mean():.1f}%", f"{ex.mean() - start:+.1f}", spread])
    main = demo()
    before, after = (f"{side.score.percent:.1f}%" for side in (main.initial, main.final))
    tasks, gain, spread = f"{main.final.score.n} of pocket", f"{main.gain.points:+.1f}", main.gain.interval_text
    rows.append(["`make demo`: nano, three turns, 40 steps, 1 seed", tasks, before, after, gain, f"{spread} (95%)"])
    gpu = gpu_report.accuracy_table([run for run in gpu_runs() if run.name == "coder-0.5b"]).iloc[0]
    before, after = (str(gpu[name]).split(" ")[0] for name in ("EX before", "EX after"))
    tasks, (gain, spread) = f"{gpu['tasks']} of Spider dev", str(gpu["gain"]).split(" ", 1)
    name = f"{gpu['model']}, one H200, {gpu['steps']} steps, 1 seed"
    rows.append([name, tasks, before, after, gain, f"{spread.strip('()')} (95%)"])
    return table(["policy", "tasks", "EX before", "EX after", "gain", "spread"], rows)


def laptop_table() -> str:
    """Write the headline of every seed, the control and the splits."""
    grid = cells(GRID)
    rows = [change(f"**headline**, seed {i}", r.initial, r.final) for i, r in enumerate(seeds(), 1)]
    control = grid[f"{MAIN}_random-reward"]
    rows.append(change("headline, random rewards", control.initial, control.final))
    stored = pd.read_csv(GRID / "tables/before_after.csv").set_index("Split")
    for split, name in SPLITS.items():
        row = stored.loc[split]
        scores = [f"{row[f'Acc ({side})']:.1f}% ({row[f'95% CI ({side})']})" for side in ("Initial", "Final")]
        gain = f"{row['Gain']:+.1f} ({row['95% CI (Gain)']})"
        rows.append([name, str(row["Tasks"]), *scores, gain, str(row["McNemar p"])])
    return table(["split", "tasks", "before", "after", "gain", "McNemar p"], rows)


def ablation_table() -> str:
    """Write accuracy by context, turns and trained sub-agents."""
    rows = []
    for r in load_results(GRID):
        twin = r.cell.turns == 1 and "check" in r.cell.agents  # the same training as its neighbour
        if r.cell.seed == 1 and not r.cell.control and not twin:
            calls = [f"{side.transitions:.2f}" for side in (r.initial, r.final)]
            after = r.final.score
            rows.append(
                [
                    f"{r.cell.context:,} characters",
                    r.cell.turns,
                    f"<code>{r.cell.agents.replace('|', '&#124;')}</code>",
                    f"{r.initial.score.percent:.1f}",
                    f"{after.percent:.1f} ({after.interval_text})",
                    calls[0] if calls[0] == calls[1] else " → ".join(calls),
                ]
            )
    return table(["context", "max turns", "trained", "EX before", "EX after", "transitions"], rows)


def reward_table() -> str:
    """Write the cost of a verdict."""
    stored = (RESULTS / "laptop/speed/reward.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in stored.splitlines() if line.startswith("|")}
    lines = [[name, *(part.strip() for part in rows[key].split("|")[2:5])] for key, name in REWARD_ROWS.items()]
    return table(["CPU time per pair", "ms", "of bare execution", "of the prediction alone"], lines)


def tables() -> dict[str, str]:
    """Return all tables by name."""
    cpu = {"summary": summary_table(), "laptop": laptop_table(), "ablation": ablation_table(), "reward": reward_table()}
    return cpu | gpu_report.tables_of(gpu_runs())


def minutes(run: Path, steps: int) -> float:
    """Return the minutes that the first steps of a training took, without validation."""
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if 1 <= row["step"] <= steps]
    assert len(rows) == steps
    return sum(row["data"]["timing_s/step"] for row in rows) / 60


def sentences() -> dict[str, list[str]]:
    """Return, by page, the pieces of prose that quote numbers, with the numbers of the stored files."""
    laptop, shipped, grid = seeds(), demo(), cells(GRID)
    single = difference(cells(RESULTS / "laptop/demo")["t1_c2048_write-rewrite"].final.right, shipped.final.right)
    gains = statistics.fmean(result.gain.points for result in laptop)
    after = ", ".join(f"{result.final.score.percent:.1f}" for result in laptop)
    runs = sampling()
    arms_ex, seconds = 100 * runs.groupby("arm")["ex"].mean(), runs[runs["arm"] == "dynamic"]["seconds"]
    rollouts = runs.groupby("arm")["rollouts"].mean()
    chinook = json.loads((RESULTS / "laptop/chinook/summary.json").read_text())["score"]
    loop = pd.read_csv(RESULTS / "laptop/demo/tables/self_correction.csv").iloc[0]
    fixed, broken = str(loop["Fixed / broken"]).split(" / ")
    one, three = grid["t1_c2048_write-rewrite"], laptop[0]
    turns = difference(one.final.right, three.final.right)
    correction = (RESULTS / "laptop/self_correction/README.md").read_text()
    arms = {
        row[0]: row for row in ([c.strip() for c in line.split("|")[1:-1]] for line in correction.splitlines()) if row
    }
    base, both = arms["baseline"], arms["warm-up and credit"]
    tasks = {
        row[0]: row[1].split(" ")[0]
        for row in (
            [c.strip() for c in line.split("|")[1:-1]]
            for line in (RESULTS / "laptop/repair/tasks.md").read_text().splitlines()
            if line.startswith("| ")
        )
    }
    simulator = re.search(r"\| linucb \|.*?\|.*?\| ([\d.]+)% \|", (RESULTS / "laptop/repair/simulator.md").read_text())
    assert simulator is not None
    step = RESULTS / "laptop/repair_step"
    found = {cell["cell"]: cell for cell in json.loads((step / "cells.json").read_text())}
    pairs = {(pair["cell"], pair["against"]): pair for pair in json.loads((step / "pairs.json").read_text())}
    warm = "warm-up-dynamic-120-s1"
    loop3, free3 = f"{warm}-self-correcting-3", f"{warm}-self-correcting-3-no-check"
    gained, equal = found[loop3], pairs[free3, f"{warm}-resampling-4"]
    saved = [found[name]["calls"] - found[f"{name}-no-check"]["calls"] for name in found if f"{name}-no-check" in found]
    gpu = RESULTS / "gpu"
    local = re.search(r"\| frozen.*?\| ([\d.]+) \|", (RESULTS / "laptop/speed/local_model.md").read_text())
    throughput = re.search(
        r"warm gold: (\d+) pairs/s with 1 process, (\d+) with 2", (RESULTS / "laptop/speed/reward.md").read_text()
    )
    assert local is not None and throughput is not None
    return {
        "README.md": [
            f"40 steps take {seconds.mean() / 60:.1f} minutes on two CPU cores",
            f"60 steps of a 0.5B take {minutes(gpu / 'coder-0.5b', 60):.1f} minutes on one H200",
            f"{rollouts['dynamic'] / rollouts['grpo']:.1f} times the rollouts",
        ],
        "docs/results.md": [
            f"{arms_ex['before']:.1f}% before, {arms_ex['grpo']:.1f}% with uniform and {arms_ex['dynamic']:.1f}% with "
            "dynamic sampling",
            f"Over 120 steps dynamic sampling arrives at {arms_ex['dynamic-120']:.1f}%",
            f"{chinook['correct']} of {chinook['n']}",
            f"{three.initial.score.percent:.1f}% before, {after}% after: {gains:+.1f} points on average",
            f"falls to {grid[f'{MAIN}_random-reward'].final.score.percent:.1f}%",
            f"{turns.points:+.1f} points ({turns.interval_text})",
            f"{shipped.initial.score.percent:.1f}% before and {shipped.final.score.percent:.1f}% after "
            f"({shipped.gain.interval_text} points)",
            f"three turns are worth {single.points:+.1f} points ({single.interval_text}), "
            f"at {loop['Calls per rollout']} model calls",
            f"rejects {loop['Check: recall, ran (%)']}% of the wrong queries that ran",
            f"{loop['Gain']:+.1f} points to the first query ({loop['95% CI (Gain)']}; {fixed} queries fixed, "
            f"{broken} broken)",
            f"from {base[3]} to {both[3]}%, and one turn from {base[2]} to {both[2]}%",
            f"three turns beat one by {100 * (gained['last'] - gained['first']):.1f} points "
            f"({100 * gained['gain_low']:+.1f} to {100 * gained['gain_high']:+.1f})",
            f"the same accuracy with {min(saved):.1f} to {max(saved):.1f} calls fewer per rollout",
            f"({equal['points']:+.1f}, {equal['low']:+.1f} to {equal['high']:+.1f}), not better",
            f"picks the right strategy {float(simulator[1]):.0f}% of the time",
            f"{tasks['linucb']} with the bandit, {tasks['random']} with random choice, {tasks['rewrite_full']} with "
            f"always rewriting and {tasks['without repair']} without repair",
        ],
        "docs/bring-your-own.md": [f"{float(local[1]):.1f} s per rollout"],
        "docs/reward.md": [
            f"{int(throughput[1]):,} pairs per second with one process and {int(throughput[2]):,} with two"
        ],
    }


def main() -> None:
    """Fill the tables of all pages and print missing sentences."""
    contents, wanted = tables(), sentences()
    for path in [REPO / "README.md", RESULTS / "gpu/README.md", *sorted((REPO / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        if (filled := gpu_report.fill(text, contents)) != text:
            path.write_text(filled, encoding="utf-8")
            print(f"filled {path.relative_to(REPO)}")
        for sentence in wanted.get(str(path.relative_to(REPO)), []):
            if sentence not in " ".join(text.split()):
                print(f"{path.relative_to(REPO)} should say: {sentence}")


if __name__ == "__main__":
    main()
