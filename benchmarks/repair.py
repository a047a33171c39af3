"""Measures whether LinUCB learns which repair strategy to use: against random choice and every fixed strategy.

    python benchmarks/repair.py simulate --out DIR [--episodes N] [--seeds S]
    python benchmarks/repair.py tasks --out DIR --data DATA_SET [--split S] [--model nano] [--limit N]

*simulate* needs no model: each class of failure has one right strategy, which solves the task with a known
probability; the table says how often each policy knows it in the last quarter of the episodes. *tasks* runs the real
agent with a real model, one rollout after another for each policy, since the bandit learns between them; all policies
get the same tasks in the same order. An interrupted run resumes when it is started again. Rollouts and
the bandit's state are in DIR, and the table as JSON and Markdown.

Success has 95% Wilson intervals, differences have bootstrap intervals over tasks (seeds in the simulator). The best
fixed strategy is chosen in hindsight among eight on the very tasks it is shown for: no policy could have known it, and
its number is the best of eight.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

from tqdm.auto import tqdm

from sqlbench.agent.prompts import STRATEGIES, prompts_for
from sqlbench.agent.repair import (
    POTENTIAL,
    BanditContext,
    FixedRepair,
    LinUCBRepair,
    RepairPolicy,
    failure_class,
    lessons,
    shaped,
)
from sqlbench.agent.trajectory import Record, Trajectory
from sqlbench.config import RolloutConfig
from sqlbench.data.tasks import DataSet, Task
from sqlbench.database.engine import cached_database
from sqlbench.errors import DataError, ModelError, SqlbenchError
from sqlbench.interfaces import Model
from sqlbench.models import open_model
from sqlbench.rollout import rollout
from sqlbench.runs import TRAJECTORIES, RunFolder
from sqlbench.stats import paired_bootstrap, wilson

ATTEMPTS = 5
STOP_AFTER = 5
"""Number of failed rollouts of one policy in a row that ends the benchmark: the model is gone."""


# ---- baselines and metrics of repair


class RandomRepair:
    """Chooses every strategy with the same probability."""

    def __init__(self, seed: int = 0) -> None:
        self._random = Random(seed)

    def choose(self, situation: BanditContext) -> str:
        """Return the next draw."""
        return self._random.choice(STRATEGIES)


def shaped_rewards(trajectory: Trajectory) -> list[float]:
    """Return the reward of each attempt of a rollout; none if the rollout has no reward (failed is not wrong)."""
    if trajectory.reward is None:
        return []
    return shaped([failure_class(e) for e in trajectory.executions], trajectory.reward)


class RepairMetrics(Record):
    """Metrics of repair over some rollouts; those without a reward are left out."""

    rollouts: int
    solved: int
    attempts: float | None
    """Mean number of queries."""
    choices: dict[str, dict[str, tuple[int, float]]]
    """Number of choices and their mean reward, by failure class and strategy."""


def repair_metrics(trajectories: Iterable[Trajectory]) -> RepairMetrics:
    """Compute the metrics of some rollouts."""
    scored = [(t, t.reward) for t in trajectories if t.reward is not None]
    rewards: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for t, solved in scored:
        for lesson in lessons(t.transitions, t.executions, solved):
            rewards[lesson.situation.error_class][lesson.strategy].append(lesson.reward)
    return RepairMetrics(
        rollouts=len(scored),
        solved=sum(solved == 1 for _, solved in scored),
        attempts=mean(len(t.executions) for t, _ in scored) if scored else None,
        choices={
            name: {s: (len(by[s]), mean(by[s])) for s in STRATEGIES if s in by}
            for name in POTENTIAL
            if (by := rewards.get(name))
        },
    )


def cumulative_regret(returns: Sequence[float], fixed: Mapping[str, Sequence[float]]) -> tuple[str, list[float]]:
    """Return the fixed strategy that is best in hindsight, and the cumulative regret against it by rollout.

    Args:
        returns: the sum of rewards of each rollout, in order.
        fixed: the same for each strategy alone, over the same tasks in the same order.
    """
    best = max(fixed, key=lambda name: sum(fixed[name]))
    return best, list(accumulate(b - a for a, b in zip(returns, fixed[best], strict=True)))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(row[k]) for k in rows[0]] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(out: Path, name: str, result: dict[str, Any], text: str) -> None:
    """Write and print a result."""
    (out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


# ---- simulator


RIGHT = {
    "syntax": "fix_syntax",
    "no_such_table": "fix_table",
    "no_such_column": "fix_column",
    "function": "change_dialect",
    "aggregation": "add_groupby",
    "type": "rewrite_cte",
    "empty": "relax_filter",
    "none": "rewrite_full",
}
SOLVES, LUCK, STAYS = 0.7, 0.1, 0.5
"""Probability that the right strategy and that any other one solves a task, and that a failure stays in its class."""


class Oracle:
    """Knows the answers."""

    def choose(self, situation: BanditContext) -> str:
        """Return the right strategy."""
        return RIGHT[situation.error_class]


def episode(policy: RepairPolicy, world: Random) -> tuple[float, int, list[tuple[str, bool]]]:
    """Simulate one task whose first query failed; the policy learns from it if it can.

    Returns:
        The return, the number of attempts, and for each choice the failure class and whether the choice was right.
    """
    now = BanditContext(error_class=world.choice(list(RIGHT)), attempt=1)
    classes, choices, solved = [now.error_class], list[tuple[BanditContext, str]](), False
    while not solved and now.attempt < ATTEMPTS:
        strategy = policy.choose(now)
        choices.append((now, strategy))
        solved = world.random() < (SOLVES if strategy == RIGHT[now.error_class] else LUCK)
        after = now.error_class if world.random() < STAYS else world.choice(list(RIGHT))
        same = after == now.error_class
        now = BanditContext(
            error_class=after,
            attempt=now.attempt + 1,
            previous_strategy=strategy,
            error_changed=not same,
            repeats=now.repeats + 1 if same else 0,
        )
        classes.append(after)
    rewards = shaped(classes, float(solved))
    if isinstance(policy, LinUCBRepair):
        for (situation, strategy), reward in zip(choices, rewards[1:], strict=True):
            policy.learn(situation, strategy, reward)
    return sum(rewards), now.attempt, [(s.error_class, x == RIGHT[s.error_class]) for s, x in choices]


def simulate(out: Path, episodes: int, seeds: int, alpha: float) -> dict[str, Any]:
    """Run every policy in the simulator and write ``simulator.json`` and ``simulator.md``."""
    policies: dict[str, Callable[[int], RepairPolicy]] = {
        "linucb": lambda seed: LinUCBRepair(alpha, seed),
        "random": RandomRepair,
        **{name: lambda seed, name=name: FixedRepair(name) for name in STRATEGIES},
        "oracle": lambda seed: Oracle(),
    }
    returns: dict[str, list[float]] = {}  # per policy, mean over the seeds of each episode's return
    last: dict[str, list[float]] = {}  # per policy and seed, mean return of the last quarter
    right: dict[str, dict[str, list[bool]]] = {}
    for name, make in tqdm(policies.items(), desc="policies"):
        runs, by_class = [], defaultdict(list)
        for seed in range(seeds):
            policy, world = make(seed), Random(f"world {seed}")
            run = [episode(policy, world) for _ in range(episodes)]
            runs.append([r for r, _, _ in run])
            for error_class, hit in (x for _, _, hits in run[-(episodes // 4) :] for x in hits):
                by_class[error_class].append(hit)
        returns[name] = [mean(column) for column in zip(*runs, strict=True)]
        last[name] = [mean(run[-(episodes // 4) :]) for run in runs]
        right[name] = {c: by_class[c] for c in RIGHT if by_class[c]}
    best, regret = cumulative_regret(returns["linucb"], {s: returns[s] for s in STRATEGIES})
    _, missed = cumulative_regret(returns["linucb"], {"oracle": returns["oracle"]})
    rows = []
    for name in dict.fromkeys(("linucb", "random", "rewrite_full", best, "oracle")):
        low, high = paired_bootstrap(last[best], last[name])
        hits = [hit for group in right[name].values() for hit in group]
        rows.append(
            {
                "policy": name + (" (best fixed)" if name == best else ""),
                "return, last quarter": f"{mean(last[name]):.3f}",
                "against the best fixed": f"{mean(last[name]) - mean(last[best]):+.3f} ({low:+.3f} to {high:+.3f})",
                "right choices": f"{mean(hits):.1%}",
                "in the worst class": f"{min(mean(group) for group in right[name].values()):.1%}",
            }
        )
    result = {
        "episodes": episodes,
        "seeds": seeds,
        "alpha": alpha,
        "solves": SOLVES,
        "luck": LUCK,
        "stays": STAYS,
        "rows": rows,
        "right_choices": {name: {c: mean(hits) for c, hits in group.items()} for name, group in right.items()},
        "best_fixed": best,
        "regret": regret,
        "regret_against_oracle": missed,
    }
    text = (
        f"# Repair strategies in the simulator\n\n{episodes} episodes, {seeds} seeds, alpha {alpha}\n\n{table(rows)}\n"
        f"LinUCB's cumulative regret against {best}: {regret[-1]:+.1f}; against the oracle {missed[-1]:+.1f}, of which "
        f"{missed[len(missed) // 2]:+.1f} in the first half\n"
    )
    write(out, "simulator", result, text)
    return result


# ---- real tasks


async def run_policy(
    name: str,
    policy: RepairPolicy | None,
    folder: RunFolder,
    tasks: Sequence[Task],
    dataset: DataSet,
    model: Model,
    bar: tqdm,
) -> None:
    """Run the tasks that this policy has no good rollout of yet, one after the other."""
    done = {t.task_key for t in folder.trajectories() if not t.failed}
    bar.update(sum(task.key in done for task in tasks))
    prompts, config, failed = prompts_for(model.family), RolloutConfig(max_turns=ATTEMPTS), 0
    for task in tasks:
        if task.key in done:
            continue
        database = cached_database(dataset.database(task.db_id))
        record = await rollout(task, database, model, prompts, config, policy)
        if isinstance(policy, LinUCBRepair) and record.reward is not None:
            for lesson in lessons(record.transitions, record.executions, record.reward):
                policy.learn(lesson.situation, lesson.strategy, lesson.reward)
            policy.save(folder.root / "bandit.json")
        folder.append(TRAJECTORIES, record)
        bar.update()
        failed = failed + 1 if record.failed else 0
        if failed == STOP_AFTER:
            raise ModelError(f"stopped: {failed} rollouts with {name} failed in a row, the last with: {record.error}")


async def run_tasks(options: argparse.Namespace, model: Model, dataset: DataSet, tasks: Sequence[Task]) -> None:
    """Let all policies run at the same time, each in a run folder of its own."""
    out: Path = options.out
    state = out / "linucb" / "bandit.json"
    policies: dict[str, RepairPolicy | None] = {
        "linucb": LinUCBRepair.load(state) if state.is_file() else LinUCBRepair(options.alpha, options.seed),
        "random": RandomRepair(options.seed),
        **{name: FixedRepair(name) for name in STRATEGIES},
        "without repair": None,
    }
    config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in ("out", "command")}
    config["weights"] = weights(model)
    folders = {name: RunFolder(out / name.replace(" ", "_")) for name in policies}
    try:
        for name, folder in folders.items():
            folder.open({**config, "policy": name})
        with tqdm(total=len(policies) * len(tasks), desc="rollouts", unit="rollout", mininterval=0.5) as bar:
            async with asyncio.TaskGroup() as group:
                for name, policy in policies.items():
                    group.create_task(run_policy(name, policy, folders[name], tasks, dataset, model, bar))
    except ExceptionGroup as problems:
        raise problems.exceptions[0] from None
    finally:
        for folder in folders.values():
            folder.close()


def weights(model: Model) -> str | None:
    """Return the checksum of a model in this process, so that a run is never continued with other weights."""
    if model.name.startswith("openai:"):
        return None
    from sqlbench.models.local import LocalChatModel

    return model.batched.engine.checksum() if isinstance(model, LocalChatModel) else None


def compare(out: Path, tasks: Sequence[Task], asked: dict[str, Any]) -> dict[str, Any]:
    """Compare what is in the run folders and write ``tasks.json`` and ``tasks.md``."""
    names = ["linucb", "random", *STRATEGIES, "without repair"]
    runs: dict[str, dict[str, Trajectory]] = {
        name: {t.task_key: t for t in RunFolder(out / name.replace(" ", "_")).trajectories() if t.reward is not None}
        for name in names
    }
    keys = [task.key for task in tasks if all(task.key in run for run in runs.values())]
    if not keys:
        raise DataError(f"no task has a scored rollout of every policy in {out}; see the errors in its run folders")
    rewritten = [k for k in keys if any(len(run[k].executions) > 1 for run in runs.values())]
    returns = {name: [sum(shaped_rewards(run[k])) for k in keys] for name, run in runs.items()}
    fixed = {name: returns[name] for name in STRATEGIES}
    best, regret = cumulative_regret(returns["linucb"], fixed)
    rows = []
    for name in dict.fromkeys(("linucb", "random", "rewrite_full", best, "without repair")):
        solved = [runs[name][k].reward or 0.0 for k in keys]
        rewards = [runs[name][k].reward or 0.0 for k in rewritten]
        difference = [b - a for a, b in zip(returns[best], returns[name], strict=True)]
        low, high = paired_bootstrap(returns[best], returns[name])
        rows.append(
            {
                "policy": name + (" (best fixed)" if name == best else ""),
                "success": _share(solved),
                "where something was rewritten": _share(rewards),
                "attempts": f"{mean(len(runs[name][k].executions) for k in keys):.2f}",
                "return": f"{mean(returns[name]):.3f}",
                "return against the best fixed": f"{mean(difference):+.3f} ({low:+.3f} to {high:+.3f})",
            }
        )
    metrics = {name: repair_metrics(runs[name][k] for k in keys).model_dump() for name in names}
    choices: dict[str, dict[str, tuple[int, float]]] = metrics["linucb"]["choices"]
    chosen = [{"failure": c, **{s: _choice(by_choice.get(s)) for s in STRATEGIES}} for c, by_choice in choices.items()]
    result = {**asked, "tasks": len(keys), "rewritten": len(rewritten), "rows": rows, "metrics": metrics,
              "best_fixed": best, "regret": regret}  # fmt: skip
    text = (
        f"# Repair strategies on tasks\n\n{asked['model']} on {asked['split']} of {asked['data']}: {len(keys)} tasks "
        f"({len(rewritten)} where something was rewritten), at most {ATTEMPTS} attempts, alpha {asked['alpha']}, "
        f"seed {asked['seed']}\n\n{table(rows)}\n"
        f"LinUCB's cumulative regret against {best}: {regret[-1]:+.2f}\n"
    )
    if chosen:
        text += f"\nWhat LinUCB chose, as times (mean reward):\n\n{table(chosen)}"
    write(out, "tasks", result, text)
    return result


def _share(solved: Sequence[float]) -> str:
    n, right = len(solved), sum(x == 1 for x in solved)
    low, high = wilson(right, n)
    return f"{right / n:.1%} ({low:.1%} to {high:.1%}, n={n})" if n else "-"


def _choice(choice: tuple[int, float] | None) -> str:
    return f"{choice[0]} ({choice[1]:+.2f})" if choice else "-"


def positive(text: str) -> int:
    """Parse a number of at least 1 from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of at least 1")
    return int(text)


def main() -> None:
    """Run one of the two comparisons."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    simulator = commands.add_parser("simulate", help="the simulator with known answers")
    simulator.add_argument("--episodes", type=positive, default=1000)
    simulator.add_argument("--seeds", type=positive, default=10)
    real = commands.add_parser("tasks", help="the agent on the tasks of a data set")
    real.add_argument("--data", type=Path, required=True)
    real.add_argument("--split", help="default: the data set's headline split")
    real.add_argument("--model", default="nano")
    real.add_argument("--limit", type=positive, help="only so many tasks")
    real.add_argument("--seed", type=int, default=0, help="order of the tasks, and the policies' own")
    for command in (simulator, real):
        command.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
        command.add_argument("--alpha", type=float, default=0.5, help="LinUCB's exploration")
    options = parser.parse_args()
    if options.alpha < 0:
        parser.error(f"--alpha must not be negative, got {options.alpha}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        if options.command == "simulate":
            simulate(options.out, options.episodes, options.seeds, options.alpha)
            return
        dataset = DataSet(options.data)
        options.split = options.split or json.loads((dataset.root / "dataset.json").read_text()).get(
            "headline", "headline"
        )
        tasks = [task for task in dataset.load(options.split) if task.scorable]
        Random(f"order {options.seed}").shuffle(tasks)  # databases mixed, as far as --limit goes
        tasks = list({task.key: task for task in tasks}.values())[: options.limit]
        model = open_model(options.model)
        asyncio.run(run_tasks(options, model, dataset, tasks))
        compare(options.out, tasks, {**vars(options), "out": None, "data": str(options.data)})
    except (SqlbenchError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted. Run the same command again to resume.")


if __name__ == "__main__":
    main()
