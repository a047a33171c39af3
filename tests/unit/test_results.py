"""Rollouts as tables, and what is computed from them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pandas as pd
import pytest

from sqlbench.agent.trajectory import Completion, Execution, Trajectory, Transition
from sqlbench.errors import DataError
from sqlbench.results import Rollouts, Score, difference, summarise


def rollout(task: str, reward: float | None, sample: int = 0) -> Trajectory:
    answer = Completion(text="SELECT 1", prompt_ids=list(range(1000)), prompt_tokens=1000, response_tokens=3)
    return Trajectory(
        task_key=task, task_id=task, db_id="d", question="?", gold="SELECT 1", pred="SELECT 1", sample=sample,
        transitions=[Transition(agent="write", turn=1, messages=[], completion=answer)],
        executions=[Execution(turn=1, sql="SELECT 1", status="ok", columns=["1"], rows=[[1]], n_rows=1)],
        reward=reward, error="model: ModelError: gone" if reward is None else None,
    )  # fmt: skip


def test_no_whole_rollout_stays_in_memory() -> None:
    seen: list[weakref.ref] = []

    def read() -> Iterator[Trajectory]:
        for number in range(50):
            made = [rollout(str(number), float(number % 2))]
            seen.append(weakref.ref(made[0]))
            assert sum(ref() is not None for ref in seen) <= 2, "the last one and this one"
            yield made.pop()

    assert summarise(Rollouts.of(read())).score.n == 50


def test_no_rollouts_and_failed_ones_only_can_be_summed_up() -> None:
    for some in ([], [rollout("a", None)]):
        summary = summarise(Rollouts.of(some))
        assert (summary.score.n, summary.score.ex, summary.turns, summary.components) == (0, None, None, {})
        assert summary.failed == len(some) and summary.text().startswith(" on : EX -")


def test_a_task_that_a_split_has_twice_is_two_tasks() -> None:
    found = Rollouts.of([rollout("a", 1.0, sample) for sample in (0, 1, 0, 1)] + [rollout("b", 0.0)])
    assert found.rollouts["task"].nunique() == 3


def test_intervals_are_over_tasks_where_tasks_have_several_rollouts() -> None:
    right = pd.Series([1.0, 1.0, 0.0, 0.0, float("nan")])
    alone, two = Score.of(right, right.index), Score.of(right, pd.Series(["a", "a", "b", "b", "b"]))
    assert (alone.n, alone.ex, two.n, two.ex) == (4, 0.5, 4, 0.5)
    assert alone.interval_text == "15.0 to 85.0" and two.interval_text == "0.0 to 100.0"


def test_differences_are_paired_by_task_and_count_tasks() -> None:
    tasks = list("abcd")
    first, second = pd.Series([0.0, 0.5, 1.0, float("nan")], tasks), pd.Series([1.0, 1.0, 0.75, 1.0], tasks)
    found = difference(first, second)
    assert (found.gained, found.lost, found.p) == (2, 1, 1.0)
    assert found.points == pytest.approx(100 * (1 + 0.5 - 0.25) / 3)
    with pytest.raises(DataError, match="Not comparable task by task: 4 and 3 tasks"):
        difference(first, second[:3])
