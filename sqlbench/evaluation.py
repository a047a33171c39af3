"""Run a split through the agent and summarise what came out.

Rollouts are written as they finish; a run that was interrupted goes on where it stopped, by the content of its tasks
and not by row number. Failed rollouts and tasks that cannot be scored are counted and left out of the accuracy; an
evaluation that is repeated runs its failed rollouts again, a finished one too. Where every rollout fails (a dead
endpoint), the evaluation stops instead of failing a thousand times. Of a rollout only a few numbers stay in memory.

Of several rollouts a task, each sample draws from a seed of its own, so that an interrupted run ends with the same
rollouts as one that was not. Sample 0 is the rollout that an evaluation with one rollout a task makes.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypeVar

from pydantic import Field
from tqdm.auto import tqdm

from sqlbench.agent.prompts import Prompts, prompts_for
from sqlbench.agent.trajectory import Record, Trajectory
from sqlbench.config import EvalConfig, RolloutConfig, takes
from sqlbench.data.tasks import Task, headline_split, open_dataset
from sqlbench.database.engine import cached_database
from sqlbench.errors import DataError, ModelError, RunError
from sqlbench.interfaces import Agent, Dataset, Model, Reward, is_plugin, load_plugin
from sqlbench.models import open_model
from sqlbench.reward import score
from sqlbench.rollout import failed_rollout, rollout
from sqlbench.runs import TRAJECTORIES, RunFolder, run_path
from sqlbench.samples import Samples, Verdict, estimate_samples
from sqlbench.sqltree import HARDNESS, component_match, error_class
from sqlbench.statistics import bootstrap, wilson

STOP_AFTER = 8
"""So many rollouts failing one after another in the same words end an evaluation, three times as many in any words."""


class Score(Record):
    """Execution match over some rollouts."""

    n: int
    """Scored rollouts."""
    correct: int
    ex: float | None
    """Share of the scored rollouts; None where there are none."""
    low: float | None
    """Lower end of the 95% interval: Wilson's; with several rollouts a task, a bootstrap over tasks."""
    high: float | None


class Tokens(Record):
    """Model calls, per transition."""

    calls: int
    prompt: float | None
    """Mean prompt tokens; None where the model does not count them."""
    response: float | None
    cut: int
    """Answers cut at the token limit."""


class Summary(Record):
    """What an evaluation found."""

    model: str
    data: str
    split: str
    rollouts: int
    """All rollouts: scored, failed, and those whose task could not be scored after all."""
    score: Score
    score_with_failed: Score | None = None
    """The same with failed rollouts counted as wrong."""
    samples: Samples | None = None
    """What several rollouts a task give together."""
    reward: float | None = None
    """Mean reward, of the rollouts that have one; the same as `Score.ex` where the reward is execution match."""
    by_hardness: dict[str, Score]
    by_database: dict[str, Score]
    by_phrasing: dict[str, Score]
    failed: int
    """Rollouts in which the model or the database broke; not part of the score."""
    failures: dict[str, int]
    """Failed rollouts by place and type of error."""
    unscorable: int
    """Tasks left out because no verdict on them can be trusted."""
    turns: float | None
    """Mean over the rollouts that did not fail, as the next two."""
    transitions: float | None
    rollout_seconds: float | None
    tokens: dict[str, Tokens]
    """By sub-agent, and ``all``."""
    flaws: dict[str, int] = Field({})
    """Empty and cut answers by what happened, those of failed rollouts included."""
    sent: dict[str, int] = Field({})
    """Answers of an endpoint by the request fields that it accepted."""
    reasons: dict[str, int]
    """Verdicts by reason code."""
    query_errors: dict[str, int]
    """Executed statements that failed, by class of error."""
    components: dict[str, float]
    """Mean match of each query component with the gold query."""
    seconds: float
    """Wall-clock time of the session that finished the run."""

    def text(self) -> str:
        """The headline, for the command line."""
        ex = f"EX {_percent(self.score)}"
        if self.failed and self.score_with_failed is not None:
            ex += f", with failed rollouts as wrong {_percent(self.score_with_failed)}"
        if self.reward is not None and self.reward != self.score.ex:
            ex += f", mean reward {self.reward:.3f}"
        levels = ", ".join(f"{k} {v.ex:.1%}" for k, v in self.by_hardness.items() if v.ex is not None)
        calls = self.tokens["all"]
        return (
            f"{self.model} on {self.split}: {ex}; {self.failed} failed, {self.unscorable} unscorable"
            f"{''.join(f'; {_answers(count)} {flaw}' for flaw, count in self.flaws.items())}\n"
            f"by hardness: {levels or '-'}\n"
            f"per rollout: {_number(self.transitions)} transitions, {_number(self.turns)} turns; "
            f"per transition: {_number(calls.prompt)} prompt and {_number(calls.response)} response tokens"
            + "".join(f"\nsent to the endpoint: {fields} ({_answers(count)})" for fields, count in self.sent.items())
            + (self.samples.text() if self.samples else "")
        )


@takes(EvalConfig, "data", "split", "model", "run")
def evaluate(settings: EvalConfig) -> Summary:
    """Run one split of a data set and leave the run folder ``<results>/<profile>/<run>``.

    Works in scripts and notebooks alike. Interrupting loses nothing: call it again with the same arguments. The same
    call on a finished run with failed rollouts runs these again. `model` may be a model object, and `prompts` edited
    `Prompts`.

    Raises:
        DataError: no such data set or split.
        ModelError: no such model, it cannot be reached, or it cannot sample as asked.
        PluginError: a ``module:attribute`` cannot be loaded.
        RunError: the run folder cannot be written, is in use, finished, or belongs to other settings.
    """
    folder = RunFolder(run_path(settings.results, settings.profile, settings.run))
    dataset, split, samples = open_dataset(settings.data), settings.split, settings.samples
    tasks = dataset.load(headline_split(dataset) if split == "headline" else split)
    chosen = [task for task in tasks if task.scorable][: settings.limit]
    if not chosen:
        raise DataError(f"split '{split}' of {settings.data} has no scorable task")
    model, prompts = settings.model, settings.prompts
    name = model if isinstance(model, str) else model.name
    if isinstance(model, str):
        how = {name: getattr(settings, name) for name in ("temperature", "max_tokens", "timeout")}
        model = open_model(model, **how)
    if not isinstance(prompts, Prompts):
        prompts = prompts_for(prompts or model.family)
    shape = set(RolloutConfig.model_fields)
    config = {
        "kind": "eval",
        **settings.model_dump(exclude={*shape, "model", "prompts"}),
        "data": _name(settings.data),
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
        left = _not_yet_run(chosen, samples, folder)
        work = dataset, models, prompts, settings, *parts
        run_sync(lambda: _run(left, work, folder, concurrency, samples * len(chosen)))
        summary = summarise(
            folder.trajectories(),
            tasks,
            model=name,
            data=_name(settings.data),
            split=split,
            seconds=time.perf_counter() - started,
        )
        if samples > 1:
            found = estimate_samples(folder.trajectories(), samples, _verdicts(dataset, settings))
            summary = summary.model_copy(update={"samples": found})
        folder.finish(summary)
    return summary


def summarise(
    trajectories: Iterable[Trajectory],
    tasks: Sequence[Task] = (),
    *,
    model: str = "",
    data: str = "",
    split: str = "",
    seconds: float = 0.0,
) -> Summary:
    """The summary of some rollouts; `tasks` adds the phrasing families and the count of unscorable tasks."""
    phrasing = {task.key: task.phrasing for task in tasks}
    rows: list[_Row] = []
    lost: list[_Row] = []
    calls: dict[str, list[_Call]] = defaultdict(list)
    parts: dict[str, list[float]] = defaultdict(list)
    failures, reasons, query_errors = Counter[str](), Counter[str](), Counter[str]()
    flaws, sent = Counter[str](), Counter[str]()
    for t in trajectories:
        for done in (x.completion for x in t.transitions):
            flaws.update([done.flaw] if done.flaw else [])
            sent.update([] if done.sent is None else [", ".join(f"{k}={v!r}" for k, v in sorted(done.sent.items()))])
        if t.failed:
            failures[_failure_class(t.error or "")] += 1
            lost.append(_Row(None, False, t.task_key, t.sample, t.hardness, t.db_id, "", 0, 0, 0.0))
            continue
        rows.append(
            _Row(
                t.reward,
                t.correct,
                t.task_key,
                t.sample,
                t.hardness,
                t.db_id,
                phrasing.get(t.task_key, ""),
                t.turns,
                len(t.transitions),
                t.seconds,
            )
        )
        reasons[t.reason] += 1
        for x in t.transitions:
            done = x.completion
            call = _Call(done.prompt_tokens, done.response_tokens, done.finish_reason == "length")
            calls["all"].append(call)
            calls[x.agent].append(call)
        for e in t.executions:
            if e.status != "ok":
                query_errors[error_class(e.error or e.status) if e.status == "error" else e.status] += 1
        if t.correct is not None:
            for name, value in component_match(t.gold, t.pred or "").items():
                parts[name].append(value)
    scored, failed = [row for row in rows if row.correct is not None], failures.total()
    return Summary(
        model=model,
        data=data,
        split=split,
        rollouts=len(rows) + failed,
        score=_score(scored),
        score_with_failed=_score([*scored, *lost]),
        reward=_mean([row.reward for row in rows]),
        by_hardness=_scores(scored, lambda row: row.hardness, HARDNESS),
        by_database=_scores(scored, lambda row: row.db_id),
        by_phrasing=_scores(scored, lambda row: row.phrasing),
        failed=failed,
        failures=_tally(failures),
        unscorable=len(rows) - len(scored) + sum(not task.scorable for task in tasks),
        turns=_mean([row.turns for row in rows]),
        transitions=_mean([row.transitions for row in rows]),
        rollout_seconds=_mean([row.seconds for row in rows]),
        tokens={"all": _tokens([])} | {agent: _tokens(some) for agent, some in calls.items()},
        flaws=_tally(flaws),
        sent=_tally(sent),
        reasons=_tally(reasons),
        query_errors=_tally(query_errors),
        components={name: _mean(values) for name, values in sorted(parts.items())},
        seconds=seconds,
    )


class _Row(NamedTuple):
    """What a summary needs of a rollout."""

    reward: float | None
    correct: bool | None
    task: str
    sample: int
    hardness: str
    db_id: str
    phrasing: str
    turns: int
    transitions: int
    seconds: float


class _Call(NamedTuple):
    prompt: int | None
    response: int | None
    cut: bool


Result = TypeVar("Result")


def run_sync(work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """What a coroutine returns, also where an event loop runs already (Jupyter): it then gets a thread of its own."""
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
                raise ModelError(
                    f"stopped: {count} rollouts in a row failed with: {record.error} (what is done is kept; the same "
                    "command goes on from there)"
                )

    with tqdm(total=total, initial=total - len(left), desc="rollouts", unit="rollout", mininterval=0.5) as bar:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(left))):
                    group.create_task(worker())
        except BaseExceptionGroup as problems:
            raise problems.exceptions[0] from None
    if len(recent) == total and all(recent):  # fewer than it takes to stop, and none that could be scored
        raise ModelError(
            f"stopped: all {total} rollouts failed, the last with: {recent[-1]} (what is done is kept; the same "
            "command goes on from there)"
        )


def _samplers(model: Model, samples: int, seed: int | None) -> list[Model]:
    """The model of each sample; a model that cannot be seeded draws as it does by itself.

    Raises:
        ModelError: samples at temperature 0, or a seed for a model without any.
    """
    own = getattr(model, "seeded", None)
    if seed is not None and own is None:
        raise ModelError(f"Cannot seed {model.name}: only a local model's samples repeat. Leave out --seed.")
    if samples == 1:
        return [model if seed is None or own is None else own(seed)]
    if getattr(model, "request", {}).get("temperature", getattr(model, "temperature", None)) == 0:
        raise ModelError(
            f"Cannot draw {samples} samples at temperature 0: all are alike. Give a --temperature above 0."
        )
    if own is None:
        return [model] * samples
    base = getattr(model, "seed", 0) if seed is None else seed
    return [own(base), *(own(Random(f"{base} {sample}").getrandbits(63)) for sample in range(1, samples))]


def _verdicts(dataset: Dataset, config: RolloutConfig) -> Verdict:
    """Judge queries as the rollouts' answers were, each once."""

    @cache
    def judge(db_id: str, gold: str, sql: str) -> bool | None:
        match = score(gold, sql, cached_database(dataset.database(db_id), config.limits), strict=config.strict).match
        return None if match is None else match == 1

    return lambda record, sql: judge(record.db_id, record.gold, sql)


def _not_yet_run(tasks: list[Task], samples: int, folder: RunFolder) -> list[tuple[Task, int]]:
    """The samples of tasks without a good rollout in the folder; failed rollouts are taken out of it.

    All tasks come once before one comes again: what breaks one task's rollouts does not look like a dead model.

    Raises:
        RunError: it has rollouts of tasks that are not among these.
    """
    have: Counter[tuple[str, int]] = Counter()
    failed = 0
    for t in folder.trajectories():
        failed += t.failed
        have[t.task_key, t.sample] += not t.failed
    if strange := {key for key, _ in +have} - {task.key for task in tasks}:
        raise RunError(
            f"the run {folder.root} has rollouts of {len(strange)} tasks that the split does not have, so the data set "
            "was changed; choose another name, or ask to overwrite it"
        )
    if failed:
        folder.rewrite(TRAJECTORIES, (t for t in folder.trajectories() if not t.failed))
    left = []
    for sample in range(samples):
        for task in tasks:
            if have[task.key, sample]:
                have[task.key, sample] -= 1
            else:
                left.append((task, sample))
    return left


def _weights(model: Model) -> str | None:
    """Checksum of a model in this process, so that a run is never continued with other weights."""
    if model.name.startswith("openai:"):
        return None
    from sqlbench.models.local import LocalChatModel

    return model.batched.engine.checksum() if isinstance(model, LocalChatModel) else None


def _name(data: str | Path) -> str:
    """Name a data set as it is written to disk: a path relative where it lies below the working directory."""
    if is_plugin(data):
        return str(data)
    full = Path(data).resolve()
    return os.path.relpath(full) if full.is_relative_to(Path.cwd()) else str(full)


def _score(scored: Sequence[_Row]) -> Score:
    n, correct = len(scored), sum(row.correct is True for row in scored)
    if not n:
        return Score(n=0, correct=0, ex=None, low=None, high=None)
    if any(row.sample for row in scored):  # rollouts of one task are not independent
        tasks: dict[str, list[bool]] = defaultdict(list)
        for row in scored:
            tasks[row.task].append(row.correct is True)
        low, high = bootstrap(sorted(sum(some) / len(some) for some in tasks.values()))
    else:
        low, high = wilson(correct, n)
    return Score(n=n, correct=correct, ex=correct / n, low=low, high=high)


def _scores(scored: Sequence[_Row], group: Callable[[_Row], str], order: Sequence[str] = ()) -> dict[str, Score]:
    groups: dict[str, list[_Row]] = defaultdict(list)
    for t in scored:
        if name := group(t):
            groups[name].append(t)
    names = [*(n for n in order if n in groups), *sorted(n for n in groups if n not in order)]
    return {name: _score(groups[name]) for name in names}


def _tokens(calls: Sequence[_Call]) -> Tokens:
    return Tokens(
        calls=len(calls),
        prompt=_mean([call.prompt for call in calls]),
        response=_mean([call.response for call in calls]),
        cut=sum(call.cut for call in calls),
    )


def _percent(score: Score) -> str:
    if score.ex is None or score.low is None or score.high is None:
        return "-"
    return f"{score.ex:.1%} (95% {score.low:.1%} to {score.high:.1%}, n={score.n})"


def _failure_class(error: str) -> str:
    return ": ".join(error.split(": ", 2)[:2])


def _tally(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def _mean(values: Sequence[float | int | None]) -> float | None:
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known else None  # exact, so the order of the rollouts does not matter


def _answers(count: int) -> str:
    return f"{count} answer{'s' * (count != 1)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
