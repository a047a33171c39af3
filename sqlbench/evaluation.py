"""Evaluation: runs a split through the agent and writes the outcome to a run folder.

Rollouts are written as they finish. An interrupted run resumes where it stopped, by the content of its tasks and not
by row number. Failed rollouts and tasks that cannot be scored are counted and left out of the accuracy. A repeated
evaluation reruns its failed rollouts, even if it was finished. Where every rollout fails (a dead endpoint), the
evaluation stops instead of failing a thousand times. Only a few numbers per rollout stay in memory.

With several rollouts per task, each sample draws from a seed of its own, so that an interrupted run ends with the same
rollouts as an undisturbed one. Sample 0 is the rollout that an evaluation with one rollout per task makes.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from tqdm.auto import tqdm

from sqlbench.agent.prompts import Prompts, prompts_for
from sqlbench.config import EvalConfig, RolloutConfig, takes
from sqlbench.data.tasks import Task, headline_split, open_dataset
from sqlbench.database.engine import cached_database
from sqlbench.errors import DataError, ModelError, RunError
from sqlbench.interfaces import Agent, Dataset, Model, Reward, is_plugin, load_plugin
from sqlbench.metrics import measure_rollouts
from sqlbench.models import open_model, trained_with
from sqlbench.results import Rollouts, Summary, summarise
from sqlbench.rollout import failed_rollout, rollout
from sqlbench.runs import TRAJECTORIES, RunFolder, run_path
from sqlbench.samples import estimate_samples, judge
from sqlbench.usage import read_prices

STOP_AFTER = 8
"""Consecutive failures with the same message that stop an evaluation; with any messages three times as many."""


@takes(EvalConfig, "data", "split", "model", "run")
def evaluate(settings: EvalConfig) -> Summary:
    """Run one split of a data set and write the run folder ``<results>/<profile>/<run>``.

    Works in scripts and notebooks alike. Interrupting loses nothing: call it again with the same arguments. The same
    call on a finished run with failed rollouts runs those again. `model` may be a model object, and `prompts` may be
    edited `Prompts`.

    Raises:
        DataError: the data set or split does not exist.
        ModelError: the model does not exist, cannot be reached, or cannot sample as asked.
        PluginError: a ``module:attribute`` cannot be loaded.
        RunError: the run folder cannot be written, is in use, finished, or belongs to other settings.
    """
    folder = RunFolder(run_path(settings.results, settings.profile, settings.run))
    dataset, split, samples = open_dataset(settings.data), settings.split, settings.samples
    tasks = dataset.load(headline_split(dataset) if split == "headline" else split)
    chosen = [task for task in tasks if task.scorable][: settings.limit]
    if not chosen:
        raise DataError(f"No scorable task in the split: {split} of {settings.data}. Choose another split.")
    if settings.prices:
        read_prices(settings.prices)  # refuse now, not after hours
    model, prompts = settings.model, settings.prompts
    name = model if isinstance(model, str) else model.name
    if isinstance(model, str):
        how = {name: getattr(settings, name) for name in ("temperature", "max_tokens", "timeout", "cache")}
        model = open_model(model, **how)
    if not isinstance(prompts, Prompts):
        prompts = prompts_for(prompts or model.family)
    settings = settings.decided(prompts.family, settings.agent, trained_with(name))
    shape = set(RolloutConfig.model_fields)
    config = {
        "kind": "eval",
        **settings.model_dump(exclude={*shape, "model", "prompts"}),
        "data": dataset_name(settings.data),
        "model": name,
        "weights": _weights(model),
        "request": getattr(model, "request", {}),
        "rollout": settings.model_dump(include=shape),
        "prompts": prompts.components,
        "family": prompts.family,
    }
    models = _samplers(model, samples, settings.seed)
    parts = load_plugin("agent", settings.agent), load_plugin("reward", settings.reward)
    concurrency = settings.concurrency or (16 if name.startswith("openai:") else 128)
    started = time.perf_counter()
    with folder.open(config, overwrite=settings.overwrite):
        remaining = _not_yet_run(chosen, samples, folder)
        work = dataset, models, prompts, settings, *parts
        run_sync(lambda: _run(remaining, work, folder, concurrency, samples * len(chosen)))
        tables = Rollouts.of(folder.trajectories())
        scored = tables.rollouts[tables.rollouts["correct"].notna()]
        summary = summarise(
            tables,
            tasks,
            model=name,
            data=dataset_name(settings.data),
            split=split,
            samples=estimate_samples(tables, samples, judge(dataset, settings)) if samples > 1 else None,
            metrics=measure_rollouts(settings.metrics, scored, dataset, settings) if settings.metrics else {},
            seconds=time.perf_counter() - started,
            prices=settings.prices,
        )
        folder.finish(summary)
    return summary


Result = TypeVar("Result")


def run_sync(work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Run a coroutine and return its result; inside a running event loop (Jupyter), use a separate thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work())
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def tracked() -> Result:
        task = asyncio.current_task()
        assert task is not None
        running.append((asyncio.get_running_loop(), task))
        return await work()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(asyncio.run, tracked())
        try:
            return future.result()
        except KeyboardInterrupt:
            for loop, task in running:
                loop.call_soon_threadsafe(task.cancel)
            raise


async def _run(
    left: list[tuple[Task, int]],
    work: tuple[Dataset, list[Model], Prompts, RolloutConfig, Agent, Reward],
    folder: RunFolder,
    concurrency: int,
    total: int,
) -> None:
    dataset, models, prompts, config, agent, reward = work
    queue = iter(left)
    recent: deque[str] = deque(maxlen=3 * STOP_AFTER)
    scored: list[bool] = []

    async def worker() -> None:
        for task, sample in queue:
            try:
                database = cached_database(dataset.database(task.db_id), config.limits)
            except Exception as error:
                record = failed_rollout(task, "database", error)
            else:
                record = await rollout(task, database, models[sample], prompts, config, agent=agent, reward=reward)
            folder.append(TRAJECTORIES, record.model_copy(update={"sample": sample}))
            recent.append(record.error or "")
            if record.correct is not None:
                scored.append(record.correct)
                bar.set_postfix(EX=f"{sum(scored) / len(scored):.1%}", refresh=False)
            bar.update()
            alike = len(recent) >= STOP_AFTER and len(set(list(recent)[-STOP_AFTER:])) == 1
            if record.failed and (alike or (len(recent) == recent.maxlen and all(recent))):
                count = STOP_AFTER if alike else recent.maxlen
                raise ModelError(f"Evaluation stopped: {count} rollouts in a row failed with: {_stop(recent[-1])}")

    with tqdm(total=total, initial=total - len(left), desc="rollouts", unit="rollout", mininterval=0.5) as bar:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(left))):
                    group.create_task(worker())
        except BaseExceptionGroup as problems:
            raise problems.exceptions[0] from None
    if len(recent) == total and all(recent):  # too few for the check above, and none could be scored
        raise ModelError(f"Evaluation stopped: all {total} rollouts failed, the last with: {_stop(recent[-1])}")


def _stop(error: str) -> str:
    return f"{error.rstrip('.')}. Fix this and rerun the command; finished work is kept."


def _samplers(model: Model, samples: int, seed: int | None) -> list[Model]:
    """Return the model of each sample; a model that cannot be seeded is used as it is.

    Raises:
        ModelError: samples at temperature 0, or a seed for a model that cannot be seeded.
    """
    seeded = getattr(model, "seeded", None)
    if seed is not None and seeded is None:
        raise ModelError(f"Cannot seed {model.name}: only a local model's samples repeat. Leave out --seed.")
    if samples == 1:
        return [model if seed is None or seeded is None else seeded(seed)]
    if getattr(model, "request", {}).get("temperature", getattr(model, "temperature", None)) == 0:
        raise ModelError(
            f"Cannot draw {samples} samples at temperature 0: all are alike. Give a --temperature above 0."
        )
    if seeded is None:
        numbered = getattr(model, "numbered", lambda _: model)  # an endpoint's cache tells samples apart
        return [numbered(sample) for sample in range(samples)]
    base = getattr(model, "seed", 0) if seed is None else seed
    return [seeded(base), *(seeded(Random(f"{base} {sample}").getrandbits(63)) for sample in range(1, samples))]


def _not_yet_run(tasks: list[Task], samples: int, folder: RunFolder) -> list[tuple[Task, int]]:
    """Return the samples of tasks without a good rollout in the folder, and remove its failed rollouts.

    Every task comes once before any task repeats, so that one broken task does not look like a dead model.

    Raises:
        RunError: the folder has rollouts of other tasks.
    """
    have: Counter[tuple[str, int]] = Counter()
    failed = 0
    for t in folder.trajectories():
        failed += t.failed
        have[t.task_key, t.sample] += not t.failed
    if strange := {key for key, _ in +have} - {task.key for task in tasks}:
        raise RunError(
            f"Data set changed since the run began: {folder.root} has rollouts of {len(strange)} tasks that the split "
            "does not have. Choose another --run, or pass --overwrite."
        )
    if failed:
        folder.rewrite(TRAJECTORIES, (t for t in folder.trajectories() if not t.failed))
    remaining = []
    for sample in range(samples):
        for task in tasks:
            if have[task.key, sample]:
                have[task.key, sample] -= 1
            else:
                remaining.append((task, sample))
    return remaining


def _weights(model: Model) -> str | None:
    """Compute the checksum of a model in this process, so that a run never continues with other weights."""
    if model.name.startswith("openai:"):
        return None
    from sqlbench.models.local import LocalChatModel

    return model.batched.engine.checksum() if isinstance(model, LocalChatModel) else None


def dataset_name(data: str | Path) -> str:
    """Return the name of a data set as stored on disk: its path, relative below the working directory."""
    if is_plugin(data):
        return str(data)
    full = Path(data).resolve()
    return os.path.relpath(full) if full.is_relative_to(Path.cwd()) else str(full)
