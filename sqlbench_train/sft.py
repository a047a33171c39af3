"""Supervised fine-tuning of a policy: the baseline beside RL, and the warm-up before it.

It imitates answers that are right, from one of two sources: the gold queries of a split, or rollouts that a run has on
record. The second is rejection sampling: evaluate the policy on the training split with several samples per task, then
imitate the answers that were right. Both are trajectories, so the prompts are those of the agent, rewrites included.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sqlbench.agent.prompts import Prompts, extract_sql, prompts_for
from sqlbench.agent.trajectory import Completion, Message, Trajectory
from sqlbench.config import RolloutConfig, SchemaConfig, takes
from sqlbench.data.tasks import Task, open_dataset
from sqlbench.database.engine import cached_database
from sqlbench.errors import DataError
from sqlbench.evaluation import run_sync
from sqlbench.interfaces import Dataset
from sqlbench.models import policy_folder, trained_with
from sqlbench.models.checkpoint import check_checkpoint, checkpoint_family
from sqlbench.models.local import encode_chat
from sqlbench.models.policy import copy_tokenizer
from sqlbench.rollout import rollout
from sqlbench.runs import METRICS, RunFolder, read_trajectories, run_path
from sqlbench_train.settings import SftConfig

SAVE_EVERY = 100
"""Optimizer steps between two states on disk, from which an interrupted run resumes."""

Row = tuple[list[int], list[int]]
"""Token ids of a prompt and of the answer to imitate, end-of-sequence token included."""


@takes(SftConfig, "data", "run")
def sft(settings: SftConfig) -> Path:
    """Fine-tune a policy on right answers and return the run folder, whose ``policy`` is the new checkpoint.

    The same call resumes an interrupted run.

    Raises:
        DataError: there is nothing to imitate.
        ModelError: the policy cannot be loaded.
        RunError: the run folder cannot be used.
    """
    source, split = settings.source, settings.split
    start = check_checkpoint(policy_folder(settings.model))
    dataset = open_dataset(settings.data)
    tasks = [task for task in dataset.load(split) if task.scorable]
    folder = RunFolder(run_path(settings.results, settings.profile, settings.run))
    prompted = set(SchemaConfig.model_fields)
    family = checkpoint_family(start)
    decided = settings.decided(family, trained=trained_with(settings.model))
    shape = RolloutConfig(max_turns=1, **decided.model_dump(include=prompted))
    config = {
        "kind": "sft",
        **settings.model_dump(mode="json", exclude=prompted),
        "rollout": shape.model_dump(),
    }
    with folder.open(config, overwrite=settings.overwrite):
        if source is None:
            prompts = prompts_for(family)
            rollouts: Iterable[Trajectory] = run_sync(lambda: _gold_rollouts(dataset, tasks, prompts, shape))
        else:
            wanted = {task.key for task in tasks}
            rollouts = (t for t in read_trajectories(source) if t.task_key in wanted)
        answers = right_answers(rollouts)
        if not answers:
            raise DataError(f"No right answer to imitate in {source or split}. Choose another --source or --split.")
        how = settings.model_dump(include={"steps", "batch_size", "lr", "seed"})
        loss = _fit(folder, start, answers, **how)
        folder.finish({"steps": settings.steps, "answers": len(answers), "loss": loss, "policy": "policy"})
    return folder.root


def right_answers(rollouts: Iterable[Trajectory]) -> list[tuple[list[Message], str]]:
    """Return each different prompt and answer that wrote the final query of a right rollout."""
    answers: dict[str, tuple[list[Message], str]] = {}
    for record in rollouts:
        if not record.correct or not record.pred:
            continue
        for t in reversed(record.transitions):
            if t.agent != "check" and extract_sql(t.completion.text) == record.pred:
                answers.setdefault(f"{t.messages!r} {t.completion.text}", (t.messages, t.completion.text))
                break
    return list(answers.values())


class _Gold:
    """A model that answers with a task's gold query."""

    name = "gold"

    def __init__(self, family: str, sql: str) -> None:
        self.family, self.text = family, sql if family == "nano" else f"```sql\n{sql}\n```"

    async def complete(self, messages: list[Message], on_text: Callable[[str], None] | None = None) -> Completion:
        return Completion(text=self.text)


async def _gold_rollouts(
    dataset: Dataset, tasks: list[Task], prompts: Prompts, config: RolloutConfig
) -> list[Trajectory]:
    return [
        await rollout(
            task,
            cached_database(dataset.database(task.db_id), config.limits),
            _Gold(prompts.family, task.gold),
            prompts,
            config,
        )
        for task in tqdm(tasks, desc="gold queries", unit="task", mininterval=0.5)
    ]


def answer_loss(model: Any, rows: list[Row]) -> Any:
    """Return the mean cross-entropy of the answers' tokens, given their prompts."""
    import torch

    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), -100)
    attention = torch.zeros(len(rows), length, dtype=torch.long)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : end] = torch.tensor(answer)
        attention[i, :end] = 1
    device = model.device
    logits = model(ids.to(device), attention_mask=attention.to(device), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(device))


def _fit(
    folder: RunFolder,
    start: Path,
    answers: list[tuple[list[Message], str]],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> float:
    """Train, write the policy, and return the mean loss of the last 20 steps."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start)
    rows: list[Row] = []
    for messages, text in answers:
        answer = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append((encode_chat(tokenizer, [m.model_dump() for m in messages]), answer))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    state, done = folder.root / "checkpoints/sft.pt", 0
    if state.is_file():
        saved = torch.load(state, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    logged = [row for row in folder.metrics() if row["step"] <= done]
    folder.rewrite(METRICS, logged)
    losses = [row["data"]["sft/loss"] for row in logged]
    model.train()
    with tqdm(total=steps, initial=done, desc="sft", unit="step", mininterval=0.5) as bar:
        for step in range(done + 1, steps + 1):
            optimizer.zero_grad()
            loss = answer_loss(model, [rows[i] for i in batch(len(rows), batch_size, step, seed)])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            folder.append(METRICS, {"step": step, "data": {"sft/loss": losses[-1]}})
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
            if step % SAVE_EVERY == 0:
                state.parent.mkdir(exist_ok=True)
                snapshot = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(snapshot, state.with_suffix(".new"))
                os.replace(state.with_suffix(".new"), state)
    policy = folder.root / "policy"
    shutil.rmtree(policy, ignore_errors=True)
    model.save_pretrained(policy)
    copy_tokenizer(start, policy)
    shutil.rmtree(state.parent, ignore_errors=True)
    last = losses[-20:]
    return sum(last) / len(last)


def batch(rows: int, size: int, step: int, seed: int) -> list[int]:
    """Return the rows that a step trains on: each epoch has every row once, in its own order.

    Args:
        rows: number of rows.
        size: number of rows per batch.
        step: number of the step, from 1.
        seed: seed of the orders.
    """
    chosen: list[int] = []
    for position in range((step - 1) * size, step * size):
        epoch, place = divmod(position, rows)
        chosen.append(_order(rows, seed, epoch)[place])
    return chosen


@lru_cache(maxsize=2)
def _order(rows: int, seed: int, epoch: int) -> list[int]:
    order = list(range(rows))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order
