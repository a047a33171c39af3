"""Writes down what a real training samples and trains on, through two of verl's own registration points.

`Buffer` is where the trainer takes its rows from; the policy losses are what the actor calls for each micro-batch. Both
do what they always do. Used by naming this module in `OVERRIDES`, with the folder to write to in the environment.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transfer_queue as tq
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, register_policy_loss
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

import sqlbench_train.loss  # noqa: F401 (the losses that are wrapped here)
import verl_cpu.fsdp_engine  # noqa: F401 (the profile's engine)
from sqlbench.agent.trajectory import Trajectory
from sqlbench_train.agent_loop import trained_transitions

FOLDER = "SQLBENCH_TEST_RECORD"
OVERRIDES = (
    "trainer.v1.sampler.custom_sampler.path=pkg://recorder",
    "trainer.v1.sampler.custom_sampler.name=Buffer",
    "actor_rollout_ref.model.external_lib=recorder",
)
FIELDS = ["prompts", "responses", "input_ids", "response_mask", "loss_mask", "rollout_log_probs", "rm_scores"]


class Buffer(ReplayBuffer):
    """verl's buffer; the rows of each step are in ``sampled-STEP``."""

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> Any:
        batch, metrics = super().sample(global_steps, partition_id, batch_size)
        if partition_id == "train":
            data = tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=FIELDS)
            rows = {field: [row.tolist() for row in data[field].unbind()] for field in FIELDS}
            torch.save(rows | {"keys": list(batch.keys)}, Path(os.environ[FOLDER]) / f"sampled-{global_steps}")
        return batch, metrics


def _recorded(loss: Any) -> Any:
    calls = itertools.count()

    def call(**given: Any) -> Any:
        tensors = {name: value.detach() for name, value in given.items() if isinstance(value, torch.Tensor)}
        torch.save(tensors, Path(os.environ[FOLDER]) / f"loss-{os.environ['RANK']}-{next(calls)}")
        return loss(**given)

    return call


if FOLDER in os.environ:  # in the trainer's processes, not in those of the tests
    for _name in ("token_mean", "per_rollout_mean"):
        register_policy_loss(_name)(_recorded(POLICY_LOSS_REGISTRY[_name]))


def on_record(records: list[Trajectory], step: int, trained: str, credit: str = "rollout") -> Counter:
    """The rows that the rollouts of a step should give: sample, number, prompt, response, log-probabilities."""
    return Counter(
        (
            record.sample,
            number,
            tuple(t.completion.prompt_ids or ()),
            tuple(t.completion.response_ids or ()),
            tuple(torch.tensor(t.completion.logprobs).tolist()),
        )
        for record in records
        if record.step == step and not record.validation and not record.failed
        for number, t in enumerate(trained_transitions(record, trained, credit))
    )


def handed_over(rows: dict[str, Any]) -> Counter:
    """The same of the rows that the trainer took from the buffer."""
    parts = zip(rows["keys"], rows["prompts"], rows["responses"], rows["rollout_log_probs"], strict=True)
    return Counter(
        (*sample_and_number(key), tuple(prompt), tuple(response), tuple(log_probs))
        for key, prompt, response, log_probs in parts
    )


def sample_and_number(key: str) -> tuple[int, int]:
    """Rollout and transition of a row: ``task_sample_number``, or with another credit ``task_agent_both_0``."""
    _, *middle, last = key.split("_")
    return divmod(int(middle[1]), 1000) if len(middle) == 2 else (int(middle[0]), int(last))
