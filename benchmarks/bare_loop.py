"""The work of a laptop training's steps without verl and Ray, for the comparison in `benchmarks/training.py`.

One process and one loop over the tasks that a run has had, with the same engine, agent, seeds, advantage, clipped loss,
micro-batches and optimizer.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from sqlbench.agent.prompts import prompts_for
from sqlbench.agent.trajectory import Completion, Message, Trajectory
from sqlbench.config import RolloutConfig
from sqlbench.data.tasks import DataSet
from sqlbench.database.engine import cached_database
from sqlbench.models.local import completion, encode_chat
from sqlbench.rollout import rollout
from sqlbench.runs import TRAJECTORIES, RunFolder, read_trajectories
from sqlbench_train.agent_loop import stable_number, trained_transitions
from verl_cpu.batching import BatchedEngine
from verl_cpu.engine import GenerationRequest, LocalEngine


class Clock:
    """Wall and CPU seconds by part of a step."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of a block."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall[name] += time.perf_counter() - wall
        self.cpu[name] += time.process_time() - cpu


class Policy:
    """The engine in this process as the model of one rollout, with the seeds that the agent loop gives."""

    family = "nano"
    name = "policy"

    def __init__(self, batched: Any, rollout: dict, seed: int) -> None:
        self.batched, self.rollout, self.seed, self.calls = batched, rollout, seed, 0

    async def complete(self, messages: list[Message], on_text: object = None) -> Completion:
        """Answer one prompt."""
        tokenizer, section = self.batched.engine.tokenizer, self.rollout
        ids = encode_chat(tokenizer, [m.model_dump() for m in messages])
        seed = stable_number(self.seed, self.calls)
        self.calls += 1
        sampling = (section["temperature"], section["top_p"], section["top_k"], seed)
        request = GenerationRequest(tuple(ids), section["response_length"], *sampling)
        return completion(tokenizer, ids, await self.batched.generate(request), 0.0)


def measure_bare(folder: Path, steps: int) -> dict[str, Any]:
    """Repeat a run's first steps without verl; return means over all but the first."""
    config = RunFolder(folder).config()["config"]
    section = config["actor_rollout_ref"]
    optim = section["actor"]["optim"]
    batches: dict[int, list[Trajectory]] = defaultdict(list)
    for record in read_trajectories(folder / TRAJECTORIES):
        batches[record.step or 0].append(record)
    engine = LocalEngine(section["model"]["path"], max_model_len=section["rollout"]["max_model_len"])
    batched = BatchedEngine(engine, section["rollout"]["max_num_seqs"])
    policy = AutoModelForCausalLM.from_pretrained(section["model"]["path"], dtype=torch.float32)
    optimizer = torch.optim.AdamW(policy.parameters(), optim["lr"], optim["betas"], weight_decay=optim["weight_decay"])
    clock, same = Clock(), []
    with asyncio.Runner() as runner:
        for step in range(1, steps + 2):
            if step == 2:
                clock, begun, cpu_begun = Clock(), time.perf_counter(), time.process_time()
            with clock.part("rollout"):
                records = runner.run(rollouts(config, batches[step], batched))
            rows = trained_rows(records, config["sqlbench"]["trained_agents"])
            with clock.part("update"):
                update(policy, optimizer, rows, trained_tokens(records, config["sqlbench"]["trained_agents"]), section)
            with clock.part("weight sync"):
                engine.load(policy.named_parameters())
            same.append(agreement(records, batches[step]))
    seconds, cpu = (time.perf_counter() - begun) / steps, (time.process_time() - cpu_begun) / steps
    parts = {name: wall / steps for name, wall in clock.wall.items()}
    cpu_parts = {name: used / steps for name, used in clock.cpu.items()}
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "parts": parts | {"orchestration": seconds - sum(parts.values())},
        "cpu_parts": cpu_parts | {"orchestration": cpu - sum(cpu_parts.values())},
        "same_rollouts": same,
    }


async def rollouts(config: dict, batch: list[Trajectory], batched: Any) -> list[Trajectory]:
    """Sample the rollouts of one step again."""
    settings, dataset = config["sqlbench"], DataSet(config["sqlbench"]["data"])
    tasks = {task.key: task for task in dataset.load("train")}
    limits = RolloutConfig(**{k: settings[k] for k in ("max_turns", "table_info_truncate", "execution_truncate")})
    prompts = prompts_for(settings["family"])

    async def one(wanted: Trajectory) -> Trajectory:
        seed = stable_number(settings["seed"], wanted.step, False, wanted.task_key, wanted.sample)
        model = Policy(batched, config["actor_rollout_ref"]["rollout"], seed)
        task = tasks[wanted.task_key]
        return await rollout(task, cached_database(dataset.database(task.db_id)), model, prompts, limits)

    return await asyncio.gather(*map(one, batch))


def agreement(ours: list[Trajectory], theirs: list[Trajectory]) -> float:
    """Return the share of rollouts that consist of the same tokens."""
    pairs = zip(ours, theirs, strict=True)
    ids = [[[t.completion.response_ids for t in record.transitions] for record in pair] for pair in pairs]
    return sum(a == b for a, b in ids) / len(ids)


def trained_rows(records: list[Trajectory], trained: str) -> list[tuple[Completion, float]]:
    """Return the trained answers of groups that can teach something, each with its rollout's advantage."""
    groups: dict[str, list[Trajectory]] = defaultdict(list)
    for record in records:
        if record.reward is not None:
            groups[record.task_key].append(record)
    rows = []
    for group in groups.values():
        rewards = torch.tensor([record.reward for record in group])
        if len(set(rewards.tolist())) < 2:
            continue
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for record, advantage in zip(group, advantages.tolist(), strict=True):
            rows += [(t.completion, advantage) for t in trained_transitions(record, trained)]
    return sorted(rows, key=lambda row: len(row[0].prompt_ids or ()) + len(row[0].response_ids or ()))


def trained_tokens(records: list[Trajectory], trained: str) -> int:
    """Count the sampled tokens of all trained answers, also without advantage: the loss is a mean over them."""
    scored = [record for record in records if record.reward is not None]
    return sum(len(t.completion.response_ids or ()) for record in scored for t in trained_transitions(record, trained))


def update(policy: Any, optimizer: Any, rows: list[tuple[Completion, float]], total: int, section: dict) -> None:
    """Take one step on the clipped loss with equal token weights: a mean over `total` tokens."""
    actor, size = section["actor"], section["actor"]["ppo_micro_batch_size_per_gpu"]
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        texts = [torch.tensor([*(c.prompt_ids or ()), *(c.response_ids or ())]) for c, _ in chunk]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        answers = torch.zeros(len(chunk), ids.shape[1] - 1, dtype=torch.bool)
        for i, (c, _) in enumerate(chunk):
            answers[i, len(c.prompt_ids or ()) - 1 : len(texts[i]) - 1] = True
        hidden = policy.model(ids[:, :-1], use_cache=False).last_hidden_state[answers]
        logits = policy.lm_head(hidden) / section["rollout"]["temperature"]
        now = torch.log_softmax(logits, -1).gather(1, ids[:, 1:][answers][:, None])[:, 0]
        then = torch.tensor([p for c, _ in chunk for p in c.logprobs or ()])
        advantage = torch.tensor([a for c, a in chunk for _ in c.response_ids or ()])
        ratio = (now - then).exp()
        clipped = ratio.clamp(1 - actor["clip_ratio_low"], 1 + actor["clip_ratio_high"])
        (-torch.min(ratio * advantage, clipped * advantage).sum() / total).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), actor["optim"]["clip_grad"])
    optimizer.step()
    optimizer.zero_grad()
