"""Measures the cost of a rollout beside the model: our graph against a plain LangGraph agent of the usual form.

    python benchmarks/rollout.py --out DIR [--data data/pocket] [--rollouts N] [--repeat R] [--profile]

Needs SQLAlchemy (``pip install SQLAlchemy``), for the plain agent (`benchmarks/plain_agent.py`). The model answers at
once, with the gold query and then with the verdict that it is correct: over HTTP, from an OpenAI-compatible server in a
process of its own, or in the process. Every rollout writes, executes, checks and is scored. Ours runs on one event loop
with 1, 16 and 64 rollouts in flight, the plain agent on one thread, 16 threads, and 16 processes.

Rates are rollouts per second, of wall time and of the client's CPU time (all its threads and processes; the server is
not counted): the median of the repetitions, each of which runs all forms. Wall time means something on an idle
machine. ``--profile`` prints where the time of ours goes, as cProfile sees it. Writes ``rollout.json`` and
``rollout.md``.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import multiprocessing
import os
import pstats
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from plain_agent import FORMS, OVER_HTTP, plain_chunk, reply, serve

from sqlbench.agent.prompts import prompts_for
from sqlbench.agent.trajectory import Completion, Message
from sqlbench.config import RolloutConfig
from sqlbench.data.tasks import DataSet, Task
from sqlbench.database.engine import cached_database

MANY = 16


# ---- ours


class Scripted:
    """The model in the process."""

    name, family = "at-once", "chat"

    def __init__(self, data: Path) -> None:
        self.data = data

    async def complete(self, messages: list[Message], on_text: object = None) -> Completion:
        """Answer one prompt."""
        return Completion(text=reply(self.data, "\n".join(m.content for m in messages)))


async def our_rollouts(data: Path, tasks: list[Task], form: str, in_flight: int) -> int:
    """Run all tasks; return how many were right."""
    from sqlbench.models.chat import EndpointChatModel
    from sqlbench.rollout import rollout

    dataset = DataSet(data)
    model = EndpointChatModel("at-once") if form == OVER_HTTP else Scripted(data)
    prompts, config, waiting, right = prompts_for("chat"), RolloutConfig(), iter(tasks), 0

    async def worker() -> None:
        nonlocal right
        for task in waiting:
            record = await rollout(task, cached_database(dataset.database(task.db_id)), model, prompts, config)
            assert record.error is None, record.error
            right += record.reward == 1.0

    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return right


# ---- measuring

Measure = Callable[[list[Task]], tuple[int, float]]


def ours(data: Path, form: str, in_flight: int, tasks: list[Task]) -> tuple[int, float]:
    """Run all tasks; return the number of right rollouts and the CPU seconds."""
    start = time.process_time()
    right = asyncio.run(our_rollouts(data, tasks, form, in_flight))
    return right, time.process_time() - start


def plain(data: Path, form: str, pool: Executor | None, tasks: list[Task]) -> tuple[int, float]:
    """Do the same with the plain agent, in one thread or in a pool."""
    if pool is None:
        return plain_chunk(data, form, tasks)
    start = time.process_time()
    chunks = [tasks[i::MANY] for i in range(MANY)]
    results = list(pool.map(partial(plain_chunk, data, form), chunks))
    client = time.process_time() - start  # threads measure the whole process, each for all of them
    cpu = client if isinstance(pool, ThreadPoolExecutor) else client + sum(seconds for _, seconds in results)
    return sum(right for right, _ in results), cpu


def compare(works: dict[str, Measure], tasks: list[Task], repeat: int) -> dict[str, dict[str, float]]:
    """Measure the rates of all works; each is done once, on some tasks, before it is timed."""
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for work in works.values():
        work(tasks[: max(2 * MANY, len(tasks) // 4)])
    for _ in range(repeat):
        for name, work in works.items():
            start = time.perf_counter()
            right, cpu = work(tasks)
            assert right == len(tasks), f"{name}: {right} of {len(tasks)} rollouts are right"
            rates[name].append((len(tasks) / (time.perf_counter() - start), len(tasks) / cpu))
    columns = ("per_second", "per_cpu_second")
    return {n: {c: statistics.median(r[i] for r in rs) for i, c in enumerate(columns)} for n, rs in rates.items()}


def table(rates: dict[str, dict[str, float]]) -> str:
    """Format the rates and their ratios as Markdown."""
    lines = ["| | rollouts/s | rollouts/CPU-s | CPU ms a rollout |", "|---|---|---|---|"]
    for name, rate in rates.items():
        cpu = rate["per_cpu_second"]
        lines.append(f"| {name} | {rate['per_second']:.0f} | {cpu:.0f} | {1000 / cpu:.2f} |")
    lines.append("")
    for us, them in ((0, 0), (1, 0), (1, 1)):
        best = [
            max(r["per_cpu_second"] for name, r in rates.items() if name.startswith(f"{who}, {FORMS[form]}"))
            for who, form in (("ours", us), ("plain", them))
        ]
        lines.append(f"- best of ours {FORMS[us]} / of plain {FORMS[them]}, per CPU second: {best[0] / best[1]:.1f}")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--data", type=Path, default=Path("data/pocket"))
    parser.add_argument("--rollouts", type=int, default=480)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print where the time of ours goes instead")
    options = parser.parse_args()

    data = options.data.absolute()
    every = [task for task in DataSet(data).load("train") if task.scorable]
    tasks = [every[i * len(every) // options.rollouts] for i in range(options.rollouts)]
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        here, there = spawn.Pipe()
        server = spawn.Process(target=serve, args=(data, there), daemon=True)
        server.start()
        there.close()  # so that a server that cannot start is not waited for
        stack.callback(server.terminate)
        os.environ.update(OPENAI_BASE_URL=f"http://127.0.0.1:{here.recv()}/v1", OPENAI_API_KEY="none")
        if options.profile:
            for form in FORMS:
                ours(data, form, MANY, tasks)
                with cProfile.Profile() as profile:
                    ours(data, form, MANY, tasks)
                print(f"\n{form}: {len(tasks)} rollouts, {MANY} in flight")
                pstats.Stats(profile).sort_stats("tottime").print_stats(30)
            return
        forking = multiprocessing.get_context("forkserver")
        forking.set_forkserver_preload(["langchain_openai", "langgraph.graph", "sqlalchemy", "sqlbench.rollout"])
        threads = stack.enter_context(ThreadPoolExecutor(MANY))
        processes = stack.enter_context(ProcessPoolExecutor(MANY, mp_context=forking))
        works: dict[str, Measure] = {}
        for form in FORMS:
            for in_flight in (1, MANY, 64):
                works[f"ours, {form}, {in_flight} in flight"] = partial(ours, data, form, in_flight)
            works[f"plain, {form}, 1 thread"] = partial(plain, data, form, None)
            works[f"plain, {form}, {MANY} threads"] = partial(plain, data, form, threads)
            works[f"plain, {form}, {MANY} processes"] = partial(plain, data, form, processes)
        rates = compare(works, tasks, options.repeat)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "rollout.json").write_text(json.dumps({"rollouts": len(tasks), "rates": rates}, indent=1) + "\n")
    (options.out / "rollout.md").write_text(table(rates) + "\n")
    print(table(rates))


if __name__ == "__main__":
    main()
