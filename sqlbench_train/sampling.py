"""Choice of the tasks that a step trains on, by the setting ``sqlbench.sampling``.

A task whose rollouts all have the same reward teaches nothing; any other task divides. Three ways to choose tasks:

- ``uniform``: the next ones of the shuffled data.
- ``dynamic``: those, and then further ones until the batch is full of tasks that divide, but never more than
  ``sqlbench.most_sampled`` batches. This is DAPO's dynamic sampling (arXiv 2503.14476) with a bound.
- ``success-rate``: the next ones, without the tasks whose last rollouts were all right or all wrong, except for one
  time in `SECOND_LOOK`. It changes nothing before a task comes for the second time.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import transfer_queue as tq
from transfer_queue import KVBatchMeta

from sqlbench.agent.trajectory import Trajectory

SECOND_LOOK = 4
LEAST_SHARE = 1 / 8
"""Smallest share of tasks that divide, as assumed by the second round of sampling."""


def task_of(key: str) -> str:
    """Return the task of a row, or of a group of rows, from verl's key."""
    return key.split("_", 1)[0]


def of_task(key: str) -> str:
    """Return the group of a row within its task, even where credit by change compares rows of all tasks."""
    return key.rsplit("_", 2)[0]


def scores(batch: KVBatchMeta) -> dict[str, float]:
    """Return the reward of each row."""
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["rm_scores"])
    return {key: float(score.sum()) for key, score in zip(batch.keys, data["rm_scores"].unbind(), strict=True)}


def dividing_groups(rewards: Mapping[str, float], group_of: Callable[[str], str] = of_task) -> set[str]:
    """Return the groups whose rewards differ, given the reward of each row; a group of one row never does."""
    by_group: dict[str, set[float]] = defaultdict(set)
    for key, reward in rewards.items():
        by_group[group_of(key)].add(reward)
    return {group for group, values in by_group.items() if len(values) > 1}


def further(size: int, dividing: int, asked: int, most: int) -> int:
    """Return the number of further tasks to sample to fill a batch with tasks that divide.

    Args:
        size: tasks per batch.
        dividing: tasks that divide so far.
        asked: tasks sampled so far.
        most: maximum number of tasks that a step samples.
    """
    share = max(dividing / asked, LEAST_SHARE)
    return max(0, min(math.ceil((size - dividing) / share), most - asked))


def choose(size: int, tasks: Iterable[str], dividing: set[str]) -> set[str]:
    """Choose `size` tasks, those that divide first."""
    return set(sorted(tasks, key=lambda task: task not in dividing)[:size])


class TaskSampler:
    """verl's replay buffer, which samples further tasks where the setting says so."""

    def __init__(self, buffer: Any, submit: Callable[[int], Any], most: float) -> None:
        """Wrap a buffer.

        Args:
            buffer: verl's buffer.
            submit: function that starts the rollouts of a number of further tasks.
            most: maximum number of batches of tasks per step; 1 is uniform sampling.
        """
        self.buffer, self.submit, self.most = buffer, submit, most
        self.tasks: list[str] = []
        """The tasks of this step, in the order in which their rollouts were started."""

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict]:
        """Wait for a batch; its ``rows`` are in verl's form."""
        batch, metrics = self.buffer.sample(global_steps, partition_id, batch_size)
        if partition_id == "val" or self.most <= 1:
            return batch, metrics
        keys, tags, sampled = list(batch.keys), list(batch.tags), batch_size
        dividing = {task_of(group) for group in dividing_groups(scores(batch))}
        while more := further(batch_size, len(dividing), sampled, int(self.most * batch_size)):
            self.submit(more)
            extra, _ = self.buffer.sample(global_steps, partition_id, more)
            sampled += more
            keys, tags = keys + extra.keys, tags + extra.tags
            dividing |= {task_of(group) for group in dividing_groups(scores(extra))}
        metrics |= {"sqlbench/tasks_sampled": sampled, "sqlbench/tasks_dividing": len(dividing)}
        scored = {task_of(key) for key in keys}
        chosen = choose(batch_size, [task for task in self.tasks if task in scored], dividing)
        if surplus := [key for key in keys if task_of(key) not in chosen]:
            tq.kv_clear(keys=surplus, partition_id=partition_id)
        rows = [(key, tag) for key, tag in zip(keys, tags, strict=True) if task_of(key) in chosen]
        return KVBatchMeta(
            partition_id=partition_id,
            keys=[key for key, _ in rows],
            tags=[tag for _, tag in rows],
            extra_info=batch.extra_info,
        ), metrics


class SuccessRates:
    """The mean reward of each task's rollouts in the last step that sampled it."""

    def __init__(self, records: Iterable[Trajectory], seed: int) -> None:
        """Start from the rollouts on record of a resumed run."""
        self.rates: dict[str, float] = {}
        self.seed = seed
        self.learn(records)

    def learn(self, records: Iterable[Trajectory]) -> None:
        """Update the rates from the rollouts of one or more steps."""
        rewards: dict[tuple[int, str], list[float]] = defaultdict(list)
        for record in records:
            if record.reward is not None and not record.validation:
                rewards[record.step or 0, record.task_key].append(record.reward)
        for (_, task), values in sorted(rewards.items()):
            self.rates[task] = sum(values) / len(values)

    def wanted(self, task: str, step: int) -> bool:
        """Return whether a task may teach something, or gets its second look."""
        rate = self.rates.get(task)
        return rate is None or 0 < rate < 1 or random.Random(f"{self.seed} {step} {task}").random() < 1 / SECOND_LOOK
