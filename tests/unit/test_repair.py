"""The bandit scores as its formula says, finds what works, remembers it, and is paid what the rollout is worth."""

from __future__ import annotations

import asyncio
import importlib.util
import sqlite3
from argparse import Namespace

import numpy as np
import pytest

from sqlbench.agent import repair as repairing
from sqlbench.agent.prompts import STRATEGIES
from sqlbench.agent.repair import (
    ATTEMPT_COST,
    POTENTIAL,
    BanditContext,
    FixedRepair,
    LinUCBRepair,
    features,
    lessons,
    shaped,
)
from sqlbench.agent.trajectory import Completion, Execution, Trajectory, Transition
from sqlbench.data.tasks import DataSet, Task, write_split
from sqlbench.database.error_classes import ERROR_CLASSES
from sqlbench.errors import DataError, ModelError

COLUMN = "no such column: nam"


def some_situations(n: int, seed: int = 0) -> list[BanditContext]:
    rng = np.random.default_rng(seed)
    return [
        BanditContext(
            error_class=str(rng.choice(list(POTENTIAL))),
            attempt=int(rng.integers(1, 5)),
            previous_strategy=str(rng.choice(["generate", *STRATEGIES])),
            error_changed=bool(rng.integers(2)),
            repeats=int(rng.integers(3)),
        )
        for _ in range(n)
    ]


def run_of(*outcomes: tuple[str, str | None, int], strategies: tuple[str | None, ...] = (), **fields) -> Trajectory:
    """A rollout whose executions had these (status, error, rows)."""
    followed = [None, *strategies, *[None] * len(outcomes)]
    return Trajectory(
        task_key="k", task_id="1", db_id="d", question="q", gold="g",
        transitions=[
            Transition(
                agent="rewrite" if i else "write", turn=i + 1, messages=[], completion=Completion(text=f"q{i}"),
                strategy=followed[i],
            )
            for i in range(len(outcomes))
        ],
        executions=[
            Execution(turn=i + 1, sql=f"q{i}", status=status, error=error, n_rows=rows)
            for i, (status, error, rows) in enumerate(outcomes)
        ],
        **fields,
    )  # fmt: skip


@pytest.fixture(scope="module")
def benchmark(repo):
    spec = importlib.util.spec_from_file_location("repair_benchmark", repo / "benchmarks" / "repair.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- the bandit


def closed_form(seen: list[tuple[list[float], float]], x: list[float], alpha: float) -> float:
    """Li et al. 2010: A = I + sum of x x', theta = A^-1 sum of r x, score = x theta + alpha sqrt(x A^-1 x)."""
    a, b = np.eye(len(x)), np.zeros(len(x))
    for row, reward in seen:
        a += np.outer(row, row)
        b += reward * np.asarray(row)
    inverse = np.linalg.inv(a)
    return float(np.dot(x, inverse @ b) + alpha * np.sqrt(np.dot(x, inverse @ x)))


def test_scores_are_those_of_the_closed_formula_for_seen_and_unseen_strategies():
    policy, alpha = LinUCBRepair(alpha=0.7), 0.7
    seen: dict[str, list[tuple[list[float], float]]] = {name: [] for name in STRATEGIES}
    for i, situation in enumerate(some_situations(60)):
        strategy, reward = STRATEGIES[i % 5], float(np.sin(i))  # the last four are never tried
        policy.learn(situation, strategy, reward)
        seen[strategy].append((features(situation), reward))
    for situation in some_situations(10, seed=1):
        expected = {name: closed_form(seen[name], features(situation), alpha) for name in STRATEGIES}
        assert policy.scores(situation) == pytest.approx(expected, abs=1e-9)


def test_before_any_lesson_all_strategies_score_the_same_and_the_seed_decides():
    situation = some_situations(1)[0]
    scores = LinUCBRepair(alpha=0.5).scores(situation)
    x = features(situation)
    assert list(scores) == list(STRATEGIES)
    assert list(scores.values()) == pytest.approx([0.5 * float(np.sqrt(np.dot(x, x)))] * len(STRATEGIES))
    assert len({LinUCBRepair(seed=seed).choose(situation) for seed in range(40)}) > 3
    assert LinUCBRepair(seed=3).choose(situation) == LinUCBRepair(seed=3).choose(situation)


def test_features_tell_every_field_apart_and_stay_in_zero_to_one():
    base = BanditContext(error_class="none", attempt=1)
    others = [
        base.model_copy(update=change)
        for change in (
            {"error_class": "syntax"}, {"attempt": 2}, {"previous_strategy": "fix_table"}, {"error_changed": True},
            {"repeats": 1},
        )
    ]  # fmt: skip
    assert len({tuple(features(s)) for s in [base, *others]}) == 6
    assert all(0 <= number <= 1 for s in some_situations(50) for number in features(s))


def test_a_saved_policy_goes_on_as_the_one_that_was_saved(tmp_path):
    policy = LinUCBRepair(alpha=0.3, seed=7)
    for situation in some_situations(40):
        policy.learn(situation, policy.choose(situation), float(len(situation.error_class) % 3))
    policy.save(tmp_path / "bandit.json")
    loaded = LinUCBRepair.load(tmp_path / "bandit.json")
    ahead = some_situations(60, seed=2)
    assert loaded.scores(ahead[0]) == pytest.approx(policy.scores(ahead[0]))
    for situation in ahead:  # and they learn on alike
        choice = policy.choose(situation)
        assert loaded.choose(situation) == choice
        policy.learn(situation, choice, 0.1 * situation.attempt)
        loaded.learn(situation, choice, 0.1 * situation.attempt)
    assert loaded.lessons == policy.lessons and len(loaded.lessons) == 100
    assert [p.name for p in tmp_path.iterdir()] == ["bandit.json"]


@pytest.mark.parametrize("text", ["", "{", '{"alpha": 1}', '{"alpha":-1,"seed":0,"choices":0,"lessons":[]}', None])
def test_a_missing_or_damaged_state_is_one_line(tmp_path, text):
    path = tmp_path / "bandit.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=r"Cannot read the repair state .*. Delete it to start over") as error:
        LinUCBRepair.load(path)
    assert "\n" not in str(error.value)


def test_what_is_no_strategy_is_refused():
    with pytest.raises(ValueError, match="Unknown repair strategy: generate"):
        LinUCBRepair().learn(some_situations(1)[0], "generate", 1.0)
    with pytest.raises(ValueError, match="Unknown repair strategy: fix"):
        FixedRepair("fix")


def test_the_policies_it_is_compared_with(benchmark):
    situation = some_situations(1)[0]
    assert {FixedRepair("fix_table").choose(situation) for _ in range(5)} == {"fix_table"}
    draws = [benchmark.RandomRepair(1).choose(situation) for _ in range(3)]
    assert len(set(draws)) == 1
    policy = benchmark.RandomRepair(1)
    assert {policy.choose(situation) for _ in range(200)} == set(STRATEGIES)


# ---- situations, rewards, metrics


def test_every_way_to_fail_has_a_potential():
    assert set(ERROR_CLASSES) | {"too_large", "rejected", "empty", "none"} == set(POTENTIAL)
    assert all(0 <= value <= 0.5 for value in POTENTIAL.values())


def situations(record: Trajectory) -> list[BanditContext]:
    """Where a rollout stood after each of its queries."""
    done = record.executions
    return [repairing.situation(record.transitions, done[: i + 1]) for i in range(len(done))]


def test_situations_of_a_rollout():
    record = run_of(
        ("error", COLUMN, 0), ("error", "no such column: age", 0), ("ok", None, 0), ("ok", None, 4),
        ("timeout", "no result within 5 s", 0),
        strategies=("fix_column", "rewrite_full", "relax_filter", "rewrite_cte"),
    )  # fmt: skip
    found = [(s.error_class, s.attempt, s.previous_strategy, s.error_changed, s.repeats) for s in situations(record)]
    assert found == [
        ("no_such_column", 1, "generate", False, 0),
        ("no_such_column", 2, "fix_column", True, 1),
        ("empty", 3, "rewrite_full", True, 0),
        ("none", 4, "relax_filter", True, 0),
        ("timeout", 5, "rewrite_cte", True, 0),
    ]


def test_the_same_failure_again_and_again_is_counted():
    found = situations(run_of(*[("error", COLUMN, 0)] * 4))
    assert [(s.error_changed, s.repeats) for s in found] == [(False, 0), (False, 1), (False, 2), (False, 3)]


@pytest.mark.parametrize("solved", [0.0, 1.0])
def test_shaped_rewards_add_up_to_success_minus_cost_whatever_happened_between(solved):
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 5, 5, 5):
        classes = [str(name) for name in rng.choice(list(POTENTIAL), n)]
        rewards = shaped(classes, solved)
        assert len(rewards) == n
        assert sum(rewards) == pytest.approx(solved - n * ATTEMPT_COST)


def test_progress_pays_at_once_and_falling_back_costs():
    up, down, same = (shaped([before, after, "none"], 0.0)[1] for before, after in
                      [("syntax", "none"), ("none", "syntax"), ("type", "type")])  # fmt: skip
    assert down < same < up
    for before in POTENTIAL:  # from anywhere, solving pays more than any failure and giving up less
        fails = [shaped([before, after, "none"], 0.0)[1] for after in POTENTIAL]
        assert shaped([before, "none"], 1.0)[1] > max(fails) and shaped([before, "none"], 0.0)[1] <= min(fails)


def test_a_failed_rollout_teaches_nothing_and_a_wrong_one_does(benchmark):
    outcomes = [("error", COLUMN, 0), ("ok", None, 3)]
    failed = run_of(*outcomes, strategies=("fix_column",), error="model: gone")
    assert benchmark.shaped_rewards(failed) == []
    wrong = run_of(*outcomes, strategies=("fix_column",), reward=0.0)
    (lesson,) = lessons(wrong.transitions, wrong.executions, 0.0)
    assert lesson.strategy == "fix_column" and lesson.situation == situations(wrong)[0]
    assert lesson.reward == pytest.approx(-POTENTIAL["no_such_column"] - ATTEMPT_COST)
    assert lesson.reward == benchmark.shaped_rewards(wrong)[1]
    # A rewrite that only repeats is not executed: an attempt that changed nothing, and the end.
    calls = [*wrong.transitions, wrong.transitions[-1].model_copy(update={"turn": 3, "strategy": "rewrite_cte"})]
    _, repetition = lessons(calls, wrong.executions, 0.0)
    assert (repetition.strategy, repetition.situation.attempt) == ("rewrite_cte", 2)
    assert repetition.reward == pytest.approx(-POTENTIAL["none"] - ATTEMPT_COST)
    plain = run_of(*outcomes, reward=0.0)
    assert lessons(plain.transitions, plain.executions, 0.0) == []


def test_metrics_count_success_attempts_and_choices_by_failure(benchmark):
    bad, good = ("error", COLUMN, 0), ("ok", None, 1)
    metrics = benchmark.repair_metrics(
        [
            run_of(good, reward=1.0),
            run_of(bad, good, strategies=("fix_column",), reward=1.0),
            run_of(bad, good, strategies=("fix_column",), reward=0.0),
            run_of(bad, bad, good, strategies=("fix_table", "rewrite_full"), reward=0.0),
            run_of(bad, error="model: gone"),
        ]
    )
    assert (metrics.rollouts, metrics.solved, metrics.attempts) == (4, 2, 2.0)
    lost = -POTENTIAL["no_such_column"] - ATTEMPT_COST
    assert list(metrics.choices) == ["no_such_column"]
    assert metrics.choices["no_such_column"] == {
        "rewrite_full": (1, pytest.approx(lost)),
        "fix_column": (2, pytest.approx(lost + 0.5)),
        "fix_table": (1, pytest.approx(-ATTEMPT_COST)),
    }
    assert benchmark.repair_metrics([]).attempts is None


def test_regret_is_against_the_fixed_strategy_that_is_best_over_all(benchmark):
    fixed = {"fix_table": [1.0, 0.0, 0.0], "fix_column": [0.0, 1.0, 1.0]}
    assert benchmark.cumulative_regret([0.0, 0.0, 1.0], fixed) == ("fix_column", [0.0, 1.0, 1.0])


# ---- the benchmark


def test_in_the_simulator_linucb_finds_the_right_strategy_of_every_class(benchmark, tmp_path):
    result = benchmark.simulate(tmp_path, episodes=480, seeds=2, alpha=0.5)
    assert min(result["right_choices"]["linucb"].values()) > 0.6  # chance is 1/9
    assert result["regret"][-1] < -50  # far above every fixed strategy
    missed = result["regret_against_oracle"]
    assert missed[-1] - missed[240] < 0.5 * missed[240]  # most of what it misses, it misses while it learns
    assert "| linucb |" in (tmp_path / "simulator.md").read_text() and (tmp_path / "simulator.json").is_file()


class Fixer:
    """A model whose rewrites are right only where they are told to fix a column; it may break after some calls."""

    name, family = "openai:fixer", "chat"

    def __init__(self, calls: int = 10**6) -> None:
        self.calls = calls

    async def complete(self, messages) -> Completion:
        self.calls -= 1
        if self.calls < 0:
            raise ModelError("endpoint gone")
        prompt = messages[1].content
        if messages[0].content.startswith("You review"):
            return Completion(text="THE QUERY IS CORRECT")
        return Completion(text="SELECT name FROM t" if "check every column name" in prompt else "SELECT nam FROM t")


@pytest.fixture
def small(tmp_path):
    root = tmp_path / "data"
    (root / "database" / "d").mkdir(parents=True)
    (root / "dataset.json").write_text('{"headline": "dev"}')
    with sqlite3.connect(root / "database" / "d" / "d.sqlite") as connection:
        connection.execute("CREATE TABLE t (name TEXT)")
        connection.execute("INSERT INTO t VALUES ('Ann')")
    tasks = [
        Task(task_id=str(i), db_id="d", question=f"Who {i}?", gold="SELECT name FROM t", split="dev") for i in range(12)
    ]
    write_split(root, "dev", tasks)
    return DataSet(root), tasks


def test_the_benchmark_goes_on_after_an_interruption_and_finds_what_works(benchmark, small, tmp_path, capsys):
    dataset, tasks = small
    out = tmp_path / "out"
    options = Namespace(
        out=out, command="tasks", data=dataset.root, split="dev", model="x", limit=None, seed=0, alpha=0.5
    )
    with pytest.raises(ModelError, match=r"rollouts with .* failed in a row, the last with: model: ModelError"):
        asyncio.run(benchmark.run_tasks(options, Fixer(calls=150), dataset, tasks))
    before = len(LinUCBRepair.load(out / "linucb" / "bandit.json").lessons)
    asyncio.run(benchmark.run_tasks(options, Fixer(), dataset, tasks))
    policy = LinUCBRepair.load(out / "linucb" / "bandit.json")
    assert 0 < before < len(policy.lessons)
    result = benchmark.compare(out, tasks, {"model": "x", "data": "d", "split": "dev", "alpha": 0.5, "seed": 0})
    assert (result["tasks"], result["rewritten"], result["best_fixed"]) == (12, 12, "fix_column")
    metrics = result["metrics"]
    assert metrics["fix_column"]["solved"] == 12 and metrics["fix_column"]["attempts"] == 2
    # Here the same query comes again and again, so any other strategy ends with it, and so does none.
    assert metrics["rewrite_full"]["solved"] == 0 and metrics["rewrite_full"]["attempts"] == 1
    assert metrics["without repair"]["solved"] == 0 and metrics["without repair"]["attempts"] == 1
    assert metrics["linucb"]["solved"] >= 6 > metrics["random"]["solved"]
    assert max(metrics["linucb"]["choices"]["no_such_column"].items(), key=lambda x: x[1][0])[0] == "fix_column"
    assert "| no_such_column |" in capsys.readouterr().out
    asyncio.run(benchmark.run_tasks(options, Fixer(calls=0), dataset, tasks))  # nothing is left to run
