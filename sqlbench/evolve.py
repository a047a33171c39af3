"""Prompts that get better with use: GEPA over the named prompt components, fed by failures and the user's remarks.

Every few queries one cycle of GEPA reflects on what failed, rewrites a component of the prompts and tries it. A rewrite
becomes the next generation only if it answers more held-out questions than the prompts in use; held-out questions are
never reflected on. Two limits: a user's "right" is held-out gold unchecked, and with few held-out
questions one lucky answer can decide. GEPA keeps its candidates and their Pareto front in a folder, from which a
killed cycle resumes, and so does the next cycle while the held-out questions stay the same.

A folder holds ``feedback.jsonl`` and, for each set of prompts that evolution started from, ``history.jsonl``, GEPA's
``run-*`` and, while a cycle is under way, ``cycle.json``.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from sqlbench.agent.prompts import CORRECT, INCORRECT, Prompts
from sqlbench.agent.repair import RepairPolicy
from sqlbench.agent.trajectory import Message, Record, Trajectory
from sqlbench.config import RolloutConfig
from sqlbench.data.tasks import Task
from sqlbench.errors import DataError, ModelError, RunError, SqlbenchError
from sqlbench.evaluation import run_sync
from sqlbench.interfaces import Agent, Database, Model
from sqlbench.models import open_model
from sqlbench.rollout import rollout
from sqlbench.runs import append_line, read_jsonl, write_whole
from sqlbench.text import Text

TRAIN, HELD_OUT, MIN_HELD_OUT = 20, 20, 3
"""Failures that a cycle reflects on, and held-out questions, at most; held-out questions at least."""
PROPOSALS = 3
"""Rewrites that a cycle tries."""
CONCURRENCY = 8
STOPPED = "Prompt evolution stopped"
RETRY = "Fix this and try again; it resumes from there."
REFLECTION = """\
An agent answers questions about databases with SQL. This is the part `{name}` of its prompts:
```
<curr_param>
```

This is how it went with that part, and what is known about the right answers:

<side_info>

Write a better version of the part. Turn what went wrong into rules that also help with other questions and other
databases, heed every remark of the user, and keep what works. {keep}Answer with the whole new
part between two lines of ```."""


class Feedback(Record):
    """One query of the user's and its outcome; recorded again when the user says more about it."""

    question: Text
    db: str
    sql: Text
    execution: Text = ""
    """The result as the prompts show it; ``error: ...`` where the query failed."""
    verdict: Literal["right", "wrong"] | None = None
    remark: Text = ""
    generation: int = 0
    """Generation of the prompts that wrote the query."""

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Return the key by which two records are the same query."""
        return self.db, self.question, self.sql, self.generation

    @property
    def failed(self) -> bool:
        """Tell whether there is something to learn from it."""
        unhappy = bool(self.remark.strip()) or self.execution.startswith("error")
        return self.verdict == "wrong" or (self.verdict is None and unhappy)


class FeedbackStore:
    """An append-only file of feedback; a torn last line is dropped."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, feedback: Feedback) -> None:
        """Add one record."""
        append_line(self.path, feedback)

    def all(self) -> list[Feedback]:
        """Return every query once, in order, as it was recorded last."""
        return list({f.key: f for f in _read(self.path, Feedback)}.values())


class Generation(Record):
    """One accepted set of prompts."""

    number: int
    components: dict[str, str]
    parent: int | None = None
    """The generation that it replaced."""
    score: float | None = None
    """Share of the held-out questions answered right; None for the prompts that evolution started from."""
    baseline: float | None = None
    """The parent's score on the same questions."""
    held_out: int = 0
    """Number of these questions."""


class _Example(Record):
    question: str
    db: str
    gold: str | None = None
    rejected: str = ""
    remark: str = ""


class _Step(Record):
    """One line of the history: an event, and the generation in use from then on."""

    current: int = 0
    seen: int = 0
    """Number of feedback records already consumed by earlier cycles."""
    outcome: str = ""
    generation: Generation | None = None
    run: str = ""
    held_out: str = ""
    proposals: int = 0
    """Rewrites tried in the run so far."""


class _Cycle(Record):
    """Inputs of one cycle, kept so that it can resume after a crash."""

    after: int
    """Length of the history when the cycle started; a longer history means the cycle was recorded."""
    step: _Step
    train: list[_Example]
    held_out: list[_Example]


class Evolution:
    """The prompts in use and their history.

    Args:
        folder: where everything is kept; one process at a time evolves.
        prompts: what to start from. Another start in the same folder has a history of its own.
        reflection: the endpoint that rewrites prompts, as ``openai:NAME``, or None.
        every: queries between two cycles.
        model: answers the questions while candidates are tried: a name, or an object that nothing else uses meanwhile;
            by default the reflecting endpoint.
        database: gives the open database of a name in feedback or tasks, or raises a `KeyError` or `SqlbenchError`.
        tasks: questions with gold. For a database without any, the user's questions marked right are held out instead.
        config: of the rollouts.
        repair: chooses the strategy of rewrites in the rollouts.
        agent: whose rollouts they are; the self-correcting one by default.
        seed: decides which questions are held out.
    """

    def __init__(
        self,
        folder: str | Path,
        prompts: Prompts,
        reflection: str | None,
        every: int = 4,
        *,
        model: str | Model | None = None,
        database: Callable[[str], Database],
        tasks: Sequence[Task] = (),
        config: RolloutConfig | None = None,
        repair: RepairPolicy | None = None,
        agent: Agent | None = None,
        seed: int = 0,
    ) -> None:
        self.every, self.seed, self.start, self.reflection = every, seed, prompts, reflection or ""
        self.model, self.database = model or self.reflection, database
        self.config, self.repair, self.agent = config or RolloutConfig(), repair, agent
        self.tasks = {(t.db_id, t.question): t.gold for t in tasks if t.scorable}
        self.store = FeedbackStore(Path(folder) / "feedback.jsonl")
        self.folder = Path(folder) / f"{prompts.family}-{_digest(*sorted(prompts.components.items()))}"
        self._steps: list[_Step] = _read(self.folder / "history.jsonl", _Step)
        if not self._steps:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RunError(f"Cannot write {self.folder}: {error.strerror}. Choose another folder.") from error
            with self._locked(wait=True):  # other pages of the chat may be opening, too
                self._steps = _read(self.folder / "history.jsonl", _Step)
                if not self._steps:
                    first = Generation(number=0, components=prompts.components)
                    self._add(_Step(seen=len(self.store.all()), generation=first))

    @property
    def history(self) -> list[Generation]:
        """Return every generation, those that were rolled back included."""
        return [step.generation for step in self._steps if step.generation is not None]

    @property
    def generation(self) -> int:
        """Return the number of the generation in use."""
        return self._steps[-1].current

    @property
    def prompts(self) -> Prompts:
        """Return the prompts in use."""
        return Prompts(family=self.start.family, components=self.history[self.generation].components)

    @property
    def outcome(self) -> str:
        """Describe the result of the last cycle or rollback in one line."""
        return self._steps[-1].outcome

    @property
    def progress(self) -> tuple[int, int]:
        """Return the queries since the last cycle, and how many make the next one due."""
        return len(self.store.all()) - self._steps[-1].seen, self.every

    @property
    def due(self) -> bool:
        """Tell whether it is time for `evolve`."""
        return self.progress[0] >= self.every and self.unavailable is None

    @property
    def unavailable(self) -> str | None:
        """Explain in one line why evolution cannot run; None if it can."""
        if not self.reflection.startswith("openai:"):
            what = f"'{self.reflection}' is not one" if self.reflection else "none was given"
            return (
                f"prompt evolution is off: it takes a capable model behind an OpenAI-compatible endpoint, and {what}; "
                "name one as openai:NAME, with OPENAI_BASE_URL or OPENAI_API_KEY set"
            )
        if find_spec("gepa") is None:
            return "prompt evolution is off: gepa is not installed; pip install 'sqlbench[agent]'"
        try:
            open_model(self.reflection)
        except ModelError as error:
            return f"prompt evolution is off: {error}"
        asked = self.store.all()
        if asked and (found := len(self._examples(asked)[1])) < MIN_HELD_OUT:
            return (
                f"prompt evolution waits: new prompts are tried on at least {MIN_HELD_OUT} questions whose answers "
                f"were marked right, and there are {found}"
            )
        return None

    def record(self, feedback: Feedback) -> None:
        """Keep the outcome of a query; recorded again, it counts once."""
        self.store.append(feedback)

    def rollback(self, generation: int) -> None:
        """Use another generation again; the next cycle starts from there.

        Raises:
            DataError: the generation does not exist.
            RunError: a cycle is running.
        """
        if not 0 <= generation < len(self.history):
            raise DataError(f"Unknown generation: {generation}. Choose one from 0 to {len(self.history) - 1}.")
        with self._locked():
            self._pending.unlink(missing_ok=True)
            outcome = f"rolled back from generation {self.generation} to {generation}"
            self._add(self._next(current=generation, outcome=outcome, held_out=""))

    def evolve(self) -> Generation | None:
        """Run one cycle, or resume the interrupted one, and return the new generation, or None with an `outcome`.

        Raises:
            ModelError: evolution is unavailable, or an endpoint broke; call again to resume.
            RunError: another process is evolving, or the folder cannot be written.
        """
        if reason := self.unavailable:
            raise ModelError(reason)
        with self._locked():
            self._steps = _read(self.folder / "history.jsonl", _Step)
            cycle = self._cycle()
            if not cycle.train:
                self._add(self._next(seen=cycle.step.seen, outcome="nothing has failed, so nothing was tried"))
                return None
            write_whole(self._pending, [cycle.model_dump_json()])
            try:
                step = self._run(cycle)
            except OSError as error:
                raise RunError(
                    f"Cannot write {self.folder}: {error.strerror}. Free some space and try again."
                ) from error
            self._add(step)
            self._pending.unlink()
            return step.generation

    def _cycle(self) -> _Cycle:
        if self._pending.is_file():
            with suppress(ValidationError):  # of another version: start over
                cycle = _Cycle.model_validate_json(self._pending.read_bytes())
                if cycle.after == len(self._steps) and self._open({x.db for x in (*cycle.train, *cycle.held_out)}):
                    return cycle
        asked = self.store.all()
        train, held_out = self._examples(asked)
        last, digest = self._steps[-1], _digest(*held_out)
        # GEPA's candidates survive while they are measured on the same questions.
        same = last.held_out == digest
        run, tried = (last.run, last.proposals) if same else (f"run-{len(self._steps):03d}-{digest}", 0)
        step = self._next(seen=len(asked), run=run, held_out=digest, proposals=tried + PROPOSALS)
        return _Cycle(after=len(self._steps), step=step, train=train, held_out=held_out)

    def _run(self, cycle: _Cycle) -> _Step:
        import gepa
        from gepa.utils.stop_condition import MaxCandidateProposalsStopper

        folder = self.folder / cycle.step.run
        folder.mkdir(parents=True, exist_ok=True)
        adapter: Any = _Adapter(self, folder)
        selector: Any = _component
        try:
            # GEPA's own logger would take over the standard output of the process.
            with open(folder / "log.txt", "a", encoding="utf-8") as log:
                result: Any = gepa.optimize(
                    seed_candidate=self.prompts.components,
                    trainset=cycle.train,
                    valset=cycle.held_out,
                    adapter=adapter,
                    candidate_selection_strategy="pareto",
                    reflection_minibatch_size=min(3, len(cycle.train)),
                    module_selector=selector,
                    stop_callbacks=MaxCandidateProposalsStopper(cycle.step.proposals),
                    run_dir=str(folder),
                    logger=SimpleNamespace(log=partial(print, file=log, flush=True)),
                    track_best_outputs=False,
                    seed=self.seed,
                )
        except _ReflectionFailed as stop:
            raise ModelError(f"{STOPPED}: {str(stop.__cause__).rstrip('.')}. {RETRY}") from stop
        scores, best, n = result.val_aggregate_scores, result.best_idx, len(cycle.held_out)
        before, after = scores[result.candidates.index(self.prompts.components)], scores[best]
        if after <= before:
            why = "".join(f"; refused: {reason}" for reason in adapter.refused)
            outcome = f"no rewrite answered more than {before:.1%} of {n} held-out questions{why}"
            return cycle.step.model_copy(update={"outcome": outcome})
        number = len(self.history)
        made = Generation(
            number=number,
            components=result.candidates[best],
            parent=self.generation,
            score=after,
            baseline=before,
            held_out=n,
        )
        outcome = f"generation {number}: {before:.1%} -> {after:.1%} of {n} held-out questions"
        return cycle.step.model_copy(update={"current": number, "outcome": outcome, "generation": made})

    def _examples(self, asked: list[Feedback]) -> tuple[list[_Example], list[_Example]]:
        """Split the feedback into examples to reflect on and examples to hold out."""
        usable = {db for db in {f.db for f in asked} if self._open({db})}
        known = [f for f in asked if f.db in usable]
        right = {(f.db, f.question): f.sql for f in known if f.verdict == "right"}
        train: dict[tuple[str, str], _Example] = {}
        for f in known:
            if f.failed:
                key = (f.db, f.question)
                remarks = [train[key].remark] if key in train else []
                remark = "\n".join(filter(None, [*remarks, f.remark.strip()]))
                gold = self.tasks.get(key) or right.get(key)
                train[key] = _Example(question=f.question, db=f.db, gold=gold, rejected=f.sql, remark=remark)
        with_tasks = {db for db, _ in self.tasks}
        gold_of = self.tasks | {key: sql for key, sql in right.items() if key[0] not in with_tasks}
        held_out = [
            _Example(question=key[1], db=key[0], gold=sql)
            for key, sql in gold_of.items()
            if key[0] in usable and key not in train
        ]
        held_out.sort(key=lambda x: _digest(self.seed, x.db, x.question))
        return list(train.values())[-TRAIN:], held_out[:HELD_OUT]

    def _open(self, names: set[str]) -> bool:
        try:
            return all(self.database(name) for name in names)
        except (KeyError, SqlbenchError):
            return False

    @property
    def _pending(self) -> Path:
        return self.folder / "cycle.json"

    def _next(self, **changes: Any) -> _Step:
        return self._steps[-1].model_copy(update={"generation": None, **changes})

    def _add(self, step: _Step) -> None:
        append_line(self.folder / "history.jsonl", step)
        self._steps.append(step)

    @contextmanager
    def _locked(self, wait: bool = False) -> Iterator[None]:
        try:
            lock = open(self.folder / ".lock", "a")  # noqa: SIM115
        except OSError as error:
            raise RunError(f"Cannot write {self.folder}: {error.strerror}. Make it writable and try again.") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError as error:
                raise RunError(f"Prompts are evolving already: {self.folder}. Wait for that to end.") from error
            yield


class _Trace(NamedTuple):
    example: _Example
    trajectory: Trajectory
    score: float


class _ReflectionFailed(BaseException):
    """GEPA skips a rewrite whose reflection raises an Exception; a dead endpoint must end the cycle instead."""


class _Unfit(Exception):
    """A rewrite cannot be adopted; the message says why."""


class _Adapter:
    """Lets GEPA run and read the agent: see ``gepa.core.adapter``."""

    def __init__(self, evolution: Evolution, folder: Path) -> None:
        self.evolution, self.folder = evolution, folder
        self.model = open_model(evolution.model) if isinstance(evolution.model, str) else evolution.model
        self.reflection = open_model(evolution.reflection, temperature=1.0, max_tokens=4096)
        self.refused: list[str] = []

    def evaluate(self, batch: list[_Example], candidate: dict[str, str], capture_traces: bool = False) -> Any:
        from gepa.core.adapter import EvaluationBatch

        if not capture_traces and (self.folder / "gepa_state.bin").is_file():
            # A resumed GEPA scores the first candidate once more, then takes all scores from its saved state.
            return EvaluationBatch([""] * len(batch), [0.0] * len(batch))
        prompts = Prompts(family=self.evolution.start.family, components=candidate)
        traces = run_sync(lambda: self._rollouts(batch, prompts))
        return EvaluationBatch([t.trajectory.pred or "" for t in traces], [t.score for t in traces], traces)

    async def _rollouts(self, batch: list[_Example], prompts: Prompts) -> list[_Trace]:
        places = asyncio.Semaphore(CONCURRENCY)

        async def one(x: _Example) -> _Trace:
            fields = {"question": x.question, "gold": x.gold or x.rejected, "split": "feedback"}
            task = Task(task_id="", db_id=x.db, scorable=bool(x.gold), **fields)  # a rejected query need not run
            database, config = self.evolution.database(x.db), self.evolution.config
            async with places:
                done = await rollout(
                    task, database, self.model, prompts, config, self.evolution.repair, agent=self.evolution.agent
                )
            if done.error is not None:  # not the candidate's fault, so no score
                raise ModelError(f"{STOPPED}: {done.error.rstrip('.')}. {RETRY}")
            if x.gold:
                return _Trace(x, done, done.reward or 0.0)
            # Without gold: it runs, and gives another answer than the one that was rejected.
            return _Trace(x, done, float(done.executions[-1].status == "ok" and done.reward != 1))

        return await asyncio.gather(*map(one, batch))

    def make_reflective_dataset(
        self, candidate: dict[str, str], eval_batch: Any, components_to_update: list[str]
    ) -> dict[str, list[dict[str, Any]]]:
        records = [_reflective(trace) for trace in eval_batch.trajectories]
        return {name: records for name in components_to_update}

    def propose_new_texts(
        self,
        candidate: dict[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: list[str],
    ) -> dict[str, str]:
        from gepa.strategies.instruction_proposal import InstructionProposalSignature

        texts = {}
        for name in components_to_update:
            old, needed = candidate[name], needs(self.evolution.start.components[name])
            keep = f"Keep {', '.join(needed)} in it, letter for letter: a program needs them. " if needed else ""
            asked = {
                "current_instruction_doc": old,
                "dataset_with_feedback": reflective_dataset[name],
                "prompt_template": REFLECTION.replace("{name}", name).replace("{keep}", keep),
            }
            try:
                new = InstructionProposalSignature.run(self._reflect, asked)["new_instruction"].strip()
                if not new:
                    raise _Unfit("is empty")
                if missing := [text for text in needed if text not in new]:
                    raise _Unfit(f"without {', '.join(missing)}")
            except _Unfit as reason:
                self.refused.append(f"a rewrite of {name} {reason}")
            else:  # components are put together as they are, so the white space around them counts
                texts[name] = old[: len(old) - len(old.lstrip())] + new + old[len(old.rstrip()) :]
        return texts

    def _reflect(self, prompt: Any) -> str:
        try:
            answer = run_sync(lambda: self.reflection.complete([Message(role="user", content=prompt)]))
        except Exception as error:
            raise _ReflectionFailed from error
        text = answer.text.split("</think>", 1)[-1]  # the thoughts before it are not part of the answer
        if answer.finish_reason == "length" or text.count("```") % 2:
            raise _Unfit("was cut")
        if re.search(r"</?think\b", text):
            raise _Unfit("holds the model's thoughts")
        return text


def needs(component: str) -> list[str]:
    """Return what a rewrite of a component must keep: its fields, and the verdicts that the program looks for."""
    verdicts = [line for line in (CORRECT, INCORRECT) if line in component]
    return [*dict.fromkeys(re.findall(r"\{[a-z]+\}", component)), *verdicts]


def _component(
    state: Any, traces: list[_Trace], scores: list[float], index: int, candidate: dict[str, str]
) -> list[str]:
    """Choose the component to rewrite: those of the failed rollouts take turns, instructions before templates."""
    used = [t for trace in traces if trace.score < 1 for t in trace.trajectory.transitions]
    agents = dict.fromkeys(t.agent for t in used)
    repairs = dict.fromkeys(f"repair.{t.strategy}" for t in used if t.strategy)
    names = [*(f"{a}.system" for a in agents), *repairs, *(f"{a}.user" for a in agents)]
    names = [name for name in names if name in candidate] or list(candidate)
    return [names[state.i % len(names)]]


def _reflective(trace: _Trace) -> dict[str, Any]:
    """Describe one rollout to the reflecting model."""
    x, done = trace.example, trace.trajectory
    said = {f"{t.agent} {t.turn}": t.completion.text for t in done.transitions}
    results = {f"result {e.turn}": e.error or f"{e.n_rows} rows, such as {e.rows[:3]}" for e in done.executions}
    if trace.score >= 1:
        feedback = "The answer is right." if x.gold else "This is not the answer that the user rejected."
    elif x.gold:
        feedback = f"The answer is wrong. A right query is: {x.gold}"
    else:
        feedback = f"The answer is wrong, as was this query, which the user rejected: {x.rejected}"
    if x.remark:
        feedback += f"\nThe user's remark: {x.remark}"
    return {
        "Inputs": done.transitions[0].messages[-1].content,
        "Generated Outputs": said | results,
        "Feedback": feedback,
    }


def _digest(*parts: Any) -> str:
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:8]


def _read(path: Path, kind: type[Any]) -> list[Any]:
    try:
        return [kind.model_validate(row) for row in read_jsonl(path)]
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"Damaged file {path}: {first['loc']}: {first['msg']}. Move it away to start over.") from error
