"""The rollout of `sqlbench.rollout` as an agent loop of verl: one output per transition of a trained sub-agent.

Guarantees: the trainer gets exactly the tokens and log-probabilities that were sampled. The reward is on the last
output of a rollout, and verl gives its advantage to all of them. A failed rollout hands over nothing (its group
continues without it) but is recorded with all others in ``trajectories.jsonl``. An answer sampled at a temperature
other than the training's does not come from the trained policy: it is recorded and not handed over.

`SqlAgentLoopManager` and its worker differ from verl's own only in cost: a group of rollouts is handed over at once,
not rollout by rollout, without the columns that nobody reads, and prompts go to a local server in batches.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
import torch
import transfer_queue as tq
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from sqlbench.agent.prompts import prompts_for
from sqlbench.agent.trajectory import Completion, Message, Trajectory, Transition
from sqlbench.config import RolloutConfig
from sqlbench.data.tasks import Task, open_dataset
from sqlbench.database.engine import cached_database
from sqlbench.errors import ModelError, PromptTooLongError, SqlbenchError
from sqlbench.interfaces import load_plugin
from sqlbench.models.local import encode_chat
from sqlbench.rollout import failed_rollout, rollout
from sqlbench.runs import TRAJECTORIES, append_line
from sqlbench_train.credit import OWN_REWARDS, group_and_key, judged, permuted, rewards, situations
from verl_cpu.client import LocalClient
from verl_cpu.engine import EngineError

PATTERN = {"min_pattern_size": 2, "max_pattern_size": 64}
"""Length in tokens of a pattern whose repetition ends an answer; not 1, because a number may repeat a digit."""


def stable_number(*parts: object) -> int:
    """Hash the parts to a number in [0, 2**63)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def stop_repetition(copies: int | None) -> dict[str, Any]:
    """Return sampling parameters by which vLLM ends an answer after this many copies of the same tokens."""
    return {"repetition_detection": {**PATTERN, "min_count": copies}} if copies else {}


class SqlAgentLoop(AgentLoopBase):
    """Runs one rollout of one task. Settings come from the section ``sqlbench`` of the training configuration."""

    def __init__(self, trainer_config: Any, server_manager: Any, tokenizer: Any, data_config: Any, **_: Any) -> None:
        # verl makes one object per rollout. The base class would build a tokenizer helper for continued prompts in
        # each, with a warning; a prompt here is never continued.
        self.config = trainer_config.config
        self.rollout_config = self.config.actor_rollout_ref.rollout
        self.template_options = dict(data_config.config.get("apply_chat_template_kwargs", {}))
        self.server_manager, self.tokenizer = server_manager, tokenizer

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> list[AgentLoopOutput]:
        """Run the rollout, record it, and return the transitions to train on."""
        settings = self.config.sqlbench
        info = row["extra_info"]
        task = Task.model_validate_json(info["task"])
        validation = bool(info["validation"])
        seed = stable_number(settings.seed, int(row["global_steps"]), validation, task.key, int(row["session_id"]))
        sampling = dict(sampling_params)
        if self.rollout_config.name == "vllm":
            sampling |= stop_repetition(settings.stop_repetition)
        model = _ServerModel(self, sampling, settings.family, seed if settings.seed_sampling else None)
        limits = RolloutConfig.of(settings)
        try:
            database = cached_database(_dataset(settings.data).database(task.db_id), limits.limits)
        except SqlbenchError as error:
            record = failed_rollout(task, "database", error)
        else:
            parts = {kind: _part(kind, settings[kind]) for kind in ("agent", "reward")}
            prompts = _prompts(settings.prompts or settings.family)
            record = await rollout(task, database, model, prompts, limits, **parts)
        record = record.model_copy(
            update={"step": int(row["global_steps"]), "validation": validation, "sample": int(row["session_id"])}
        )
        credit, has_reward = "rollout" if validation else settings.credit, record.reward is not None
        if has_reward and credit in OWN_REWARDS:
            record = await judged(record, database, settings.strict)
        append_line(Path(settings.run_folder) / TRAJECTORIES, record)
        if record.failed or record.reward is None:
            return []
        earned: list[float | None] = [record.reward] * len(record.transitions)
        if settings.control == "coin" and not validation:
            earned = [float(stable_number(seed, "reward") % 2)] * len(record.transitions)
        elif credit in OWN_REWARDS:
            earned = rewards(record, credit)
        began = situations(record) if credit == "change" else None
        return self._outputs(record, earned, model.extra, settings.trained_agents, began)

    def _outputs(
        self,
        record: Trajectory,
        earned: Sequence[float | None],
        extra: dict[str, Any],
        trained: str,
        began: list[str] | None = None,
    ) -> list[AgentLoopOutput]:
        began = began or [""] * len(record.transitions)
        return [
            AgentLoopOutput(
                prompt_ids=t.completion.prompt_ids or [],
                response_ids=t.completion.response_ids or [],
                response_mask=[1] * len(t.completion.response_ids or []),
                response_logprobs=t.completion.logprobs,
                num_turns=record.turns,
                metrics={"generate_sequences": t.completion.seconds, "num_preempted": -1},
                reward_score=reward,
                extra_fields={
                    **extra,
                    "turn_scores": [],
                    "tool_rewards": [],
                    "reward_extra_info": {"ex": reward},
                    "agent": t.agent,
                    "situation": situation,
                },
            )
            for t, reward, situation in zip(record.transitions, earned, began, strict=True)
            if _is_trained(t, trained) and reward is not None
        ]


_dataset, _part, _prompts = cache(open_dataset), cache(load_plugin), cache(prompts_for)
"""Loaders that return one object per process."""


def trained_transitions(record: Trajectory, trained: str, credit: str = "rollout") -> list[Transition]:
    """Return the transitions whose sub-agent the regular expression `trained` finds (``write`` finds ``rewrite`` too).

    Those sampled at another temperature than the training's, or without a reward of their own, are left out.
    """
    earned = rewards(record, credit) if credit == "change" else [0.0] * len(record.transitions)
    return [
        t
        for t, reward in zip(record.transitions, earned, strict=True)
        if _is_trained(t, trained) and reward is not None
    ]


def _is_trained(transition: Transition, trained: str) -> bool:
    return bool(re.search(trained, transition.agent)) and transition.completion.temperature is None


class _ServerModel:
    """verl's rollout server as a `sqlbench.interfaces.Model` for one rollout."""

    def __init__(self, loop: SqlAgentLoop, sampling: dict[str, Any], family: str, seed: int | None) -> None:
        self.name = "policy"
        self.family = family
        self.extra: dict[str, Any] = {}
        self._loop, self._sampling, self._seed, self._calls = loop, sampling, seed, 0

    def count_tokens(self, text: str) -> int:
        return len(self._loop.tokenizer.encode(text, add_special_tokens=False))

    async def complete(
        self, messages: list[Message], on_text: object = None, temperature: float | None = None
    ) -> Completion:  # nobody watches, so `on_text` is ignored
        start = time.perf_counter()
        loop, tokenizer = self._loop, self._loop.tokenizer
        ids = encode_chat(tokenizer, [m.model_dump() for m in messages], **loop.template_options)
        limits = loop.rollout_config
        room = limits.prompt_length
        if len(ids) > room:
            raise PromptTooLongError(
                f"Prompt too long: {len(ids)} tokens, and data.max_prompt_length is {room}. Raise it, or truncate more."
            )
        default = self._sampling.get("temperature")
        other = None if temperature == default else temperature
        sampling = self._sampling | ({} if other is None else {"temperature": other})
        if self._seed is not None:
            sampling["seed"] = stable_number(self._seed, self._calls)
        self._calls += 1
        try:
            answer = await loop.server_manager.generate(
                request_id=uuid4().hex, prompt_ids=ids, sampling_params=sampling
            )
        except EngineError as error:
            raise ModelError(str(error)) from error
        length = min(limits.response_length, (limits.max_model_len or room + limits.response_length) - len(ids))
        tokens = answer.token_ids[:length]
        cut = answer.stop_reason == "repetition" or (len(tokens) >= length and tokens[-1] != tokenizer.eos_token_id)
        if not tokens or answer.log_probs is None:
            raise ModelError(
                f"No tokens or log-probabilities from the rollout server: {answer.stop_reason}. See its log."
            )
        self.extra = dict(answer.extra_fields)
        return Completion(
            text=tokenizer.decode(tokens, skip_special_tokens=True),
            prompt_ids=ids,
            response_ids=tokens,
            logprobs=[float(p) for p in answer.log_probs[:length]],
            prompt_tokens=len(ids),
            response_tokens=len(tokens),
            finish_reason="length" if cut else "stop",
            seconds=time.perf_counter() - start,
            temperature=other,
        )


class SqlAgentLoopWorker(AgentLoopWorkerTQ.__ray_metadata__.modified_class):
    """verl's worker, which hands over whole groups."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._groups: dict[str, list[Any]] = defaultdict(list)

    async def _run_agent_loop(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **row: Any) -> None:
        try:
            await super()._run_agent_loop(sampling_params, trajectory, **row)
        except Exception:  # our own fault, not a model's or database's: the group continues without the rollout
            await self._agent_loop_postprocess([], trajectory["validate"], **row)
            raise

    async def _agent_loop_postprocess(self, output: list[AgentLoopOutput], validate: bool, **row: Any) -> None:
        group = self._groups[row["uid"]]
        group.append((row["session_id"], output))
        rollout = self.config.actor_rollout_ref.rollout
        if len(group) < (rollout.val_kwargs.n if validate else rollout.n):
            return
        del self._groups[row["uid"]]
        credit = "rollout" if validate else self.config.sqlbench.credit
        keys, fields, tags = [], [], []
        group.sort(key=lambda pair: pair[0])
        if self.config.sqlbench.control == "permuted" and not validate:
            self._permute([outputs for _, outputs in group if outputs], row)
        for session, outputs in group:
            for index, transition in enumerate(outputs):
                agent, situation = (transition.extra_fields[name] for name in ("agent", "situation"))
                uid, key = group_and_key(row["uid"], session, index, agent, credit, situation)
                keys.append(key)
                fields.append(self._fields(transition, row | {"uid": uid}))
                tags.append(self._tag(transition, row))
        if keys:
            table = list_of_dict_to_tensordict(fields)
            await tq.async_kv_batch_put(keys=keys, fields=table, tags=tags, partition_id="val" if validate else "train")

    def _permute(self, rollouts: list[list[AgentLoopOutput]], row: dict[str, Any]) -> None:
        """Shuffle the rewards of a task's rollouts among them."""
        task = Task.model_validate_json(row["extra_info"]["task"])
        seed = stable_number(self.config.sqlbench.seed, int(row["global_steps"]), task.key, "permuted")
        shuffled = permuted([outputs[0].reward_score for outputs in rollouts], seed)
        for outputs, reward in zip(rollouts, shuffled, strict=True):
            for output in outputs:
                output.reward_score = reward
                output.extra_fields["reward_extra_info"] = {"ex": reward}

    @staticmethod
    def _fields(output: AgentLoopOutput, row: dict[str, Any]) -> dict[str, Any]:
        fields = output.as_dict()
        fields |= {name: row[name] for name in ("uid", "data_source", "reward_model")}
        fields["input_ids"] = torch.cat([fields["prompts"], fields["responses"]])
        fields["position_ids"] = torch.arange(len(fields["input_ids"]))
        fields["loss_mask"] = fields["response_mask"]
        fields["multi_modal_inputs"] = {}
        return fields

    @staticmethod
    def _tag(output: AgentLoopOutput, row: dict[str, Any]) -> dict[str, Any]:
        prompt, response = len(output.prompt_ids), len(output.response_ids)
        return {
            "status": "success",
            "prompt_len": prompt,
            "response_len": response,
            "seq_len": prompt + response,
            "global_steps": row["global_steps"],
            "min_global_steps": output.extra_fields["min_global_steps"],
            "max_global_steps": output.extra_fields["max_global_steps"],
        }


class SqlAgentLoopManager(AgentLoopManagerTQ):
    """verl's manager with our worker, and our client where the rollout servers are local."""

    def __init__(self, config: Any, llm_client: Any, *arguments: Any, **options: Any) -> None:
        if config.actor_rollout_ref.rollout.name == "local":
            llm_client = LocalClient(config, config.trainer.n_gpus_per_node * config.trainer.nnodes)
        super().__init__(config, llm_client, *arguments, **options)
        self.agent_loop_workers_class = ray.remote(SqlAgentLoopWorker)
