"""Which tasks a step trains on: known numbers, and a real training that samples until its batch is full."""

from collections import defaultdict
from pathlib import Path

import pytest

from sqlbench.agent.trajectory import Trajectory
from sqlbench.data.tasks import DataSet
from sqlbench.runs import RunFolder
from sqlbench_train.launch import train
from sqlbench_train.metrics import read_rows
from sqlbench_train.sampling import SuccessRates, choose, dividing_groups, further

SIZE, ROLLOUTS, MOST = 4, 4, 3


def test_a_group_divides_where_its_rewards_differ() -> None:
    rewards = {"a_0_0": 1.0, "a_0_1": 1.0, "a_1_0": 0.0, "b_0_0": 0.0, "b_1_0": 0.0, "c_0_0": 0.5}
    assert dividing_groups(rewards) == {"a"}
    by_agent = {"a_write_0_0": 1.0, "a_write_1000_0": 1.0, "a_check_1_0": 0.0, "a_check_1001_0": 1.0}
    assert dividing_groups(by_agent) == {"a_check"}


@pytest.mark.parametrize(
    ("dividing", "asked", "expected"),
    [
        (32, 32, 0),  # full
        (16, 32, 32),  # half divide, so as many again
        (0, 32, 96),  # none did: no more than the limit of 4 batches
        (20, 100, 28),  # one of five: 60 are needed, 28 are left
        (20, 128, 0),  # the limit is reached
    ],
)
def test_so_many_further_tasks_are_sampled(dividing: int, asked: int, expected: int) -> None:
    assert further(32, dividing, asked, 128) == expected


def test_tasks_that_divide_are_kept_first_each_in_the_order_of_sampling() -> None:
    assert choose(2, ["a", "b", "c", "d"], {"b", "d"}) == {"b", "d"}
    assert choose(3, ["a", "b", "c", "d"], {"d"}) == {"d", "a", "b"}


def test_tasks_that_were_all_right_or_all_wrong_get_every_fourth_look() -> None:
    def record(task: str, step: int, reward: float, validation: bool = False) -> Trajectory:
        names = {"task_id": task, "db_id": "d", "question": "?", "gold": "SELECT 1", "validation": validation}
        return Trajectory(task_key=task, step=step, reward=reward, **names)

    rates = SuccessRates([record("half", 1, 1.0), record("half", 1, 0.0), record("right", 1, 1.0)], seed=1)
    rates.learn([record("wrong", 2, 1.0), record("wrong", 3, 0.0), record("half", 3, 1.0, validation=True)])
    assert rates.rates == {"half": 0.5, "right": 1.0, "wrong": 0.0}
    steps = range(400)
    assert all(rates.wanted(task, step) for task in ("half", "new") for step in steps)
    for task in ("right", "wrong"):
        assert 60 < sum(rates.wanted(task, step) for step in steps) < 140


def test_a_training_samples_until_its_batch_is_full_of_tasks_that_divide(pocket: DataSet, tmp_path: Path) -> None:
    overrides = [
        f"data.train_batch_size={SIZE}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={SIZE}",
        f"actor_rollout_ref.rollout.n={ROLLOUTS}",
        "trainer.total_training_steps=2",
        "trainer.save_freq=2",
        "trainer.test_freq=-1",
        "trainer.val_before_train=False",
        f"sqlbench.most_sampled={MOST}",
        "sqlbench.validation_tasks=1",
    ]
    run = train("laptop", "dynamic", pocket.root, overrides=overrides, results=tmp_path)
    rewards: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for rollout in RunFolder(run).trajectories():
        assert rollout.reward is not None
        rewards[rollout.step or 0][rollout.task_key].append(rollout.reward)
    rows = read_rows(run / "metrics.jsonl")
    for step in (1, 2):
        dividing = sum(len(set(values)) > 1 for values in rewards[step].values())
        assert rows[step]["sqlbench/tasks_dividing"] == dividing
        assert rows[step]["sqlbench/tasks_sampled"] == len(rewards[step]) <= SIZE * MOST
        assert dividing >= SIZE or len(rewards[step]) == SIZE * MOST
        assert rows[step]["sqlbench/zero_variance_groups"] == pytest.approx(1 - min(dividing, SIZE) / SIZE)
        assert rows[step]["sqlbench/rollouts"] == ROLLOUTS * len(rewards[step])
    assert any(len(tasks) > SIZE for tasks in rewards.values()), "no step sampled a further task"
