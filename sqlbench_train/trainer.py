"""verl's synchronous trainer with rollouts of several transitions, failed rollouts and no-signal groups handled.

Registered with verl as trainer mode ``sqlbench``. Differences from mode ``sync``:

- A batch of tasks makes as many optimizer steps as ``train_batch_size / ppo_mini_batch_size`` says, however many
  transitions its rollouts have. (verl counts rows, so a second transition would mean a second step.)
- Rows of groups that cannot teach anything are left out of the update: a group whose rollouts all have the same reward
  (their advantage is 0) and a group with one rollout left (its advantage would be its reward). Both are counted, and
  the loss stays a mean over the whole batch. A step without a group that divides has gradient 0; weight decay and the
  momentum of earlier steps still act.
- Every step logs the loss's mean of the advantages, ``sqlbench/advantage_bias``. Unless it is 0, all tokens are pushed
  up or down, right or wrong.
- The choice of the tasks that a step trains on is a setting (`sqlbench_train.sampling`).
- Failed rollouts are counted, and above a configured share the run stops, before it trains on the rest.
- A training aborts when one of its Ray actors dies. verl would wait forever for a worker killed by the OOM killer.
- Every step logs metrics of its rollouts in ``trajectories.jsonl``.
- Rollout and trainer probabilities are compared by verl's own check at the first step and at each ``test_freq``-th.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer

from sqlbench.agent.trajectory import Trajectory
from sqlbench.data.tasks import Task
from sqlbench.errors import TrainingError
from sqlbench.runs import TRAJECTORIES, read_trajectories
from sqlbench_train.agent_loop import trained_transitions
from sqlbench_train.credit import balanced, group_of
from sqlbench_train.loss import Row, row_weights
from sqlbench_train.metrics import TrajectoryReader, step_metrics
from sqlbench_train.sampling import SuccessRates, TaskSampler, dividing_groups, scores

POLL_SECONDS = 0.05
WATCH_SECONDS = 3
MISSED_SECONDS = 45
"""Time within which Ray, and so the watch, notices that a node is gone."""


@contextmanager
def changed(section: Any, **values: Any) -> Iterator[None]:
    """Set keys of a config section for the duration of a block."""
    before = {key: section[key] for key in values}
    section.update(values)
    try:
        yield
    finally:
        section.update(before)


@register_trainer("sqlbench")
class SqlTrainer(PPOTrainerSync):
    """verl's synchronous trainer, with the differences that the module lists."""

    def __init__(self, config: Any) -> None:
        config.trainer.v1.trainer_mode = "sync"  # verl decides about buffering by this name
        super().__init__(config)
        self.settings = config.sqlbench
        buffer: Any = self.replay_buffer
        buffer.poll_interval = POLL_SECONDS
        most_batches = self.settings.most_sampled if self.settings.sampling == "dynamic" else 1
        self.replay_buffer: Any = TaskSampler(buffer, self._add_prompts_to_generate, most_batches)
        folder = Path(self.settings.run_folder)
        self.reader = TrajectoryReader(folder / TRAJECTORIES)
        records = read_trajectories(folder) if self.settings.sampling == "success-rate" else ()
        self.rates = SuccessRates(records, self.settings.seed)

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        check_room(
            ray._private.state.available_resources_per_node().values(),
            self.config.trainer.nnodes,
            self.config.trainer.n_gpus_per_node,
            self.resource_pool_manager.max_colocate_count,
        )

    def fit(self, agent_loop_manager: Any) -> None:  # noqa: D102
        ended = threading.Event()
        threading.Thread(target=_watch_actors, args=(ended,), daemon=True).start()
        try:
            super().fit(agent_loop_manager)
        except TrainingError:
            raise
        except Exception:
            if self.config.trainer.nnodes > 1:  # a lost node breaks connections before Ray misses its processes
                time.sleep(MISSED_SECONDS)
            raise
        finally:
            ended.set()

    # -- tasks

    def prepare_step(self) -> dict:  # noqa: D102
        self.replay_buffer.tasks = []
        return super().prepare_step()

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        self.replay_buffer.tasks += list(batch["uid"])
        return super()._submit_batch_to_rollout(batch)

    def _fetch_one_gen_batch(self) -> TensorDict:
        batch = super()._fetch_one_gen_batch()
        if self.settings.sampling == "success-rate":
            for _ in range(len(self.train_dataset)):
                task = Task.model_validate_json(batch["extra_info"][0]["task"])
                if self.rates.wanted(task.key, self.global_steps):
                    break
                batch = super()._fetch_one_gen_batch()
        return batch

    # -- counting and stopping

    def _rollouts(self, validation: bool) -> list[Trajectory]:
        """Return this step's rollouts on record; stop the run where too many failed or are missing."""
        rollout = self.config.actor_rollout_ref.rollout
        if validation:
            expected = len(self.val_dataset) * rollout.val_kwargs.n
        else:
            expected = len(self.replay_buffer.tasks) * rollout.n
        rollouts = self.reader.step(self.global_steps, validation)
        errors = [t.error for t in rollouts if t.failed]
        failed = len(errors) + max(0, expected - len(rollouts))
        if failed > self.settings.max_failed_share * expected:
            raise TrainingError(
                f"{failed} of {expected} rollouts of step {self.global_steps} failed, more than the "
                f"share of {self.settings.max_failed_share} allowed by sqlbench.max_failed_share. "
                f"First error: {errors[0] if errors else 'not on record, see the log'}"
            )
        agents = {transition.agent for t in rollouts if t.reward is not None for transition in t.transitions}
        if agents and not validation and not any(re.search(self.settings.trained_agents, name) for name in agents):
            raise TrainingError(
                f"Nothing to train (step {self.global_steps}): sqlbench.trained_agents={self.settings.trained_agents}. "
                f"Name one of the sub-agents {', '.join(sorted(agents))}."
            )
        return rollouts

    def _validate(self) -> dict[str, float]:
        try:
            metrics = super()._validate()
        except Exception:
            self._rollouts(validation=True)
            raise
        return metrics | step_metrics(self._rollouts(validation=True), "sqlbench/val_")

    def _step_once(self, metrics: dict, timing_raw: dict, sample_batch_size: int) -> Any:
        try:
            return super()._step_once(metrics, timing_raw, sample_batch_size)
        except RuntimeError:
            self._rollouts(validation=False)
            raise

    def _compute_metrics(self, batch: Any, metrics: dict, timing_raw: dict, global_steps: int, epoch: int) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps, epoch)
        rollouts = self.reader.step(global_steps, False)
        self.rates.learn(rollouts)
        metrics.update(step_metrics(rollouts, "sqlbench/"))
        which = self.settings.trained_agents, self.settings.credit
        trained = [len(trained_transitions(t, *which)) for t in rollouts if t.reward is not None]
        metrics["sqlbench/rows"] = sum(trained)
        metrics["sqlbench/transitions"] = sum(trained) / max(1, len(trained))
        metrics["sqlbench/rows_padding"] = sum(bool(tag.get("is_padding")) for tag in batch.tags)
        metrics["sqlbench/rows_updated"] = len(batch.tags) - metrics["sqlbench/rows_padding"]
        step, gen, update = (timing_raw.get(name, 0.0) for name in ("step", "gen", "update_actor"))
        metrics["sqlbench/seconds"] = step
        metrics["sqlbench/rollout_percent"] = 100 * gen / step
        metrics["sqlbench/update_percent"] = 100 * update / step
        metrics["sqlbench/other_percent"] = 100 * (step - gen - update) / step

    # -- rows

    def _balance_batch(self, batch: Any, metrics: dict, **options: Any) -> Any:
        tasks = {t.task_key for t in self._rollouts(validation=False)}
        self._batch_rows = _rows(batch)
        rewards = scores(batch)
        rollouts: dict[str, set[str]] = defaultdict(set)
        if checks := balanced(rewards):
            self._put_scores(batch, checks)
            rewards |= checks
        for key in rewards:
            rollouts[group_of(key)].add(key.rsplit("_", 1)[0])
        useful = dividing_groups(rewards, group_of)  # so no group with one rollout left
        # Number of tasks, including those with no rollout left; with another credit, of their sub-agents.
        count = max(1, min(len(tasks), self.config.data.train_batch_size), len(rollouts))
        metrics["sqlbench/groups"] = count
        metrics["sqlbench/zero_variance_groups"] = 1 - len(useful) / count
        if self.settings.drop_useless_groups:
            # verl needs rows: if no group divides, the largest stays, whose advantage is 0.
            wanted = useful or [max(rollouts, key=lambda group: len(rollouts[group]))]
            keep = [i for i, key in enumerate(batch.keys) if group_of(key) in wanted]
            if dropped := [key for key in batch.keys if group_of(key) not in wanted]:
                tq.kv_clear(keys=dropped, partition_id=batch.partition_id)
            batch = KVBatchMeta(
                partition_id=batch.partition_id,
                keys=[batch.keys[i] for i in keep],
                tags=[batch.tags[i] for i in keep],
                extra_info=batch.extra_info,
            )
        # A rollout alone in its group would have its reward as advantage.
        if alone := [key for key in batch.keys if len(rollouts[group_of(key)]) == 1]:
            self._put_scores(batch, dict.fromkeys(alone, 0.0))
        batch = super()._balance_batch(batch, metrics=metrics, **options)
        self._sort_by_length(batch)
        return batch

    @staticmethod
    def _put_scores(batch: Any, rewards: dict[str, float]) -> None:
        """Replace the rewards of rows; a reward is on the last token."""
        lengths = {key: tag["response_len"] for key, tag in zip(batch.keys, batch.tags, strict=True)}
        rows = [torch.tensor([0.0] * (lengths[key] - 1) + [reward]) for key, reward in rewards.items()]
        fields = TensorDict({"rm_scores": torch.nested.as_nested_tensor(rows, layout=torch.jagged)}, len(rows))
        tq.kv_batch_put(keys=[*rewards], partition_id=batch.partition_id, fields=fields)

    def _sort_by_length(self, batch: Any) -> None:
        """Group rows of similar length in micro-batches (less padding), with all lengths in every mini-batch."""
        ranks, parts = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1, self._optimizer_steps()
        size, order = len(batch.keys) // ranks, []
        for start in range(0, len(batch.keys), size):
            chunk = sorted(range(start, start + size), key=lambda i: batch.tags[i]["seq_len"])
            order += [i for part in range(parts) for i in chunk[part::parts]]
        batch.reorder(order)

    def _optimizer_steps(self) -> int:
        return max(1, self.config.data.train_batch_size // self.config.actor_rollout_ref.actor.ppo_mini_batch_size)

    def _get_required_batch_multiple(self, dp_size: int) -> int:
        actor = self.config.actor_rollout_ref.actor
        micro_batch = 1 if actor.use_dynamic_bsz else actor.ppo_micro_batch_size_per_gpu
        return dp_size * self._optimizer_steps() * micro_batch

    def _update_actor(self, batch: Any, metrics: dict) -> Any:
        section = self.config.actor_rollout_ref
        rows = len(batch.keys) // self._optimizer_steps()
        with changed(section.actor, ppo_mini_batch_size=rows), changed(section.rollout, n=1):
            batch = super()._update_actor(batch, metrics)
        if "actor/entropy_loss" in metrics:
            metrics["actor/entropy"] = metrics.pop("actor/entropy_loss")
        return batch

    # -- loss and checks

    def _compute_old_log_prob(self, batch: Any, metrics: dict) -> Any:
        frequency = self.config.trainer.test_freq
        # Chosen by the step alone: a compared step trains on the trainer's probabilities, and so must the resumed one.
        check = self.global_steps == 1 or (frequency > 0 and self.global_steps % frequency == 0)
        correction = self.config.algorithm.rollout_correction
        if not check or not correction.bypass_mode:
            return super()._compute_old_log_prob(batch, metrics)
        with changed(correction, bypass_mode=False):
            return super()._compute_old_log_prob(batch, metrics)

    def _compute_advantage(self, batch: Any, metrics: dict) -> Any:
        batch = super()._compute_advantage(batch, metrics)
        real, rows = [not tag.get("is_padding") for tag in batch.tags], _rows(batch)
        trained = [row for row, is_real in zip(rows, real, strict=True) if is_real]
        loss_mode = self.config.actor_rollout_ref.actor.policy_loss.loss_mode
        weight = iter(row_weights(loss_mode, trained, self._batch_rows))
        weights = [
            torch.full((n,), next(weight) if is_real else 0.0) for (_, n), is_real in zip(rows, real, strict=True)
        ]
        # verl has weights of its own where algorithm.rollout_correction asks for them.
        corrected = "rollout_is_weights" in batch.fields
        fields = ["advantages", "rollout_is_weights"] if corrected else ["advantages"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        pushes = [float((w * a).sum()) for w, a in zip(weights, data["advantages"].unbind(), strict=True)]
        metrics["sqlbench/advantage_bias"] = sum(pushes) / sum(n for _, n in trained)
        if corrected:
            weights = [w * c for w, c in zip(weights, data["rollout_is_weights"].unbind(), strict=True)]
        field = torch.nested.as_nested_tensor(weights, layout=torch.jagged)
        return tq.kv_batch_put(
            keys=batch.keys,
            partition_id=batch.partition_id,
            fields=TensorDict({"rollout_is_weights": field}, batch_size=len(weights)),
        )


def check_room(free: Iterable[Mapping[str, float]], nodes: int, ranks: int, cpus: int) -> None:
    """Refuse a cluster that cannot hold the training now: Ray would wait forever, and verl counts GPUs only.

    Args:
        free: unused resources of each node.
        nodes: nodes of the training; several fit on one that is large enough.
        ranks: ranks, and so GPUs, per node.
        cpus: CPUs that verl asks for beside each GPU.

    Raises:
        TrainingError: there is not enough room.
    """
    fitting = sum(int(min(node.get("GPU", 0) / ranks, node.get("CPU", 0) / (ranks * cpus))) for node in free)
    if fitting < nodes:
        raise TrainingError(
            f"The Ray cluster has room for {fitting} of {nodes} nodes with {ranks} GPU(s) and {ranks * cpus} CPUs each "
            "(whatever --num-gpus and --num-cpus of 'ray start' say). Add nodes, or lower trainer.nnodes or "
            "trainer.n_gpus_per_node."
        )


def _rows(batch: Any) -> list[Row]:
    """Return the rollout and the number of sampled tokens of each row, padding included."""
    return [(key.rsplit("_", 1)[0], tag["response_len"]) for key, tag in zip(batch.keys, batch.tags, strict=True)]


def _watch_actors(ended: threading.Event) -> None:
    """End this process if an actor of the training dies before the event is set."""
    ours = {ray.get_runtime_context().namespace, "transfer_queue"}

    def alive() -> set[str]:
        return {a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] in ours}

    actors = alive()
    why = "a node may be lost, or the memory used up" if len(ray.nodes()) > 1 else "the memory may have been used up"
    while not ended.wait(WATCH_SECONDS):
        if (gone := ", ".join(sorted(actors - alive()))) and not ended.is_set():
            print(f"TrainingError: a process of the training is gone ({gone}); {why}.", flush=True)
            os._exit(1)
