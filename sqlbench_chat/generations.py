"""Generations of the chat's prompts: feedback on its answers, and a cycle of GEPA over it every few queries.

A cycle reflects on the newest failures and remarks. A rewrite becomes the next generation if it answers more of the
questions with known answers (of the data set, or marked right). If the data set has too few of these, the rejected
queries decide too: a query counts there if it runs and gives another result, and `Evolution.outcome` says so. A query
marked right is gold, unchecked. A killed cycle resumes. The next one reuses its run while the same questions decide.

A folder holds ``feedback.jsonl`` and one subfolder per set of initial prompts. The subfolder holds ``history.jsonl``,
GEPA's ``run-*`` and, during a cycle, ``cycle.json``.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from sqlbench.agent.prompts import Prompts
from sqlbench.agent.repair import RepairPolicy
from sqlbench.agent.trajectory import Record
from sqlbench.config import RolloutConfig
from sqlbench.data.tasks import Task
from sqlbench.errors import DataError, ModelError, RunError, SqlbenchError
from sqlbench.interfaces import Agent, Database, Model
from sqlbench.models import open_model
from sqlbench.runs import append_line, read_jsonl, write_whole
from sqlbench.text import Text
from sqlbench_train.evolve import Example, Trial, digest, improve, open_reflection

TRAIN, HELD_OUT = 20, 20
"""Maximum number of failures to reflect on, and of questions with known answers that decide, per cycle."""
MIN_HELD_OUT = 3
"""Number of questions of the data set below which failures decide too."""
PROPOSALS = 3
"""Number of rewrites that a cycle tries."""


class Feedback(Record):
    """One query and its outcome; recorded again when the user judges it or adds a remark."""

    question: Text
    db: str
    sql: Text
    execution: Text = ""
    """The result as the prompts show it; ``error: ...`` if the query failed."""
    verdict: Literal["right", "wrong"] | None = None
    remark: Text = ""
    generation: int = 0
    """Generation of the prompts that wrote the query."""

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Key that all records of the same query share."""
        return self.db, self.question, self.sql, self.generation

    @property
    def failed(self) -> bool:
        """Return whether the query failed or the user objected to it."""
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
        """Return the last record of every query, in the order of first records."""
        return list({f.key: f for f in _read(self.path, Feedback)}.values())


class Generation(Record):
    """One accepted set of prompts."""

    number: int
    components: dict[str, str]
    parent: int | None = None
    """Number of the generation that it replaced."""
    score: float | None = None
    """Share of right answers to the questions with known answers; None if there are none."""
    baseline: float | None = None
    """The parent's score on the same questions."""
    held_out: int = 0
    """Number of these questions."""


class _Step(Record):
    """One line of the history: an event, and the generation in use from then on."""

    current: int = 0
    seen: int = 0
    """Number of feedback records already consumed by earlier cycles."""
    outcome: str = ""
    generation: Generation | None = None
    run: str = ""
    held_out: str = ""
    """Digest of the examples that decide."""
    proposals: int = 0
    """Rewrites tried in the run so far."""


class _Cycle(Record):
    """Inputs of one cycle, kept so that it can resume after a crash."""

    after: int
    """Length of the history when the cycle started; a longer history means the cycle was recorded."""
    step: _Step
    train: list[Example]
    held_out: list[Example]
    """The examples that decide."""


class Evolution:
    """The prompts in use and their history.

    Args:
        folder: folder of all state; only one process at a time evolves.
        prompts: initial prompts. Each set of initial prompts has its own history in the folder.
        reflection: the endpoint that rewrites prompts, as ``openai:NAME``, or None.
        every: number of queries between two cycles.
        model: model that answers questions while candidates are tried: a name, or an object that nothing else uses
            meanwhile; the reflection endpoint by default.
        database: returns the open database of a name in feedback or tasks, or raises a `KeyError` or `SqlbenchError`.
        tasks: questions with gold. For a database without any, the user's questions marked right are held out instead.
        config: settings of the rollouts.
        repair: policy that chooses the strategy of rewrites in the rollouts.
        agent: agent of the rollouts; the self-correcting one by default.
        seed: seed that selects the held-out questions.
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
        self.folder = Path(folder) / f"{prompts.family}-{digest(*sorted(prompts.components.items()))}"
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
        """All generations, including those rolled back."""
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
        """Number of queries since the last cycle, and the number that makes the next one due."""
        return len(self.store.all()) - self._steps[-1].seen, self.every

    @property
    def due(self) -> bool:
        """Return whether a cycle is due and can run."""
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
        return None

    def record(self, feedback: Feedback) -> None:
        """Record the outcome of a query; repeated records of a query count once."""
        self.store.append(feedback)

    def rollback(self, generation: int) -> None:
        """Return to another generation, from which the next cycle starts.

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
        """Run one cycle or resume an interrupted one; return the new generation, or None with an `outcome`.

        Raises:
            ModelError: evolution is unavailable, or an endpoint failed; call again to resume.
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
            with suppress(ValidationError):  # written by another version: start over
                cycle = _Cycle.model_validate_json(self._pending.read_bytes())
                if cycle.after == len(self._steps) and self._open({x.db for x in (*cycle.train, *cycle.held_out)}):
                    return cycle
        records = self.store.all()
        train, deciding = self._examples(records)
        last, now = self._steps[-1], digest(*deciding)
        # GEPA's candidates stay comparable while the same questions decide.
        same = last.held_out == now
        run, tried = (last.run, last.proposals) if same else (f"run-{len(self._steps):03d}-{now}", 0)
        step = self._next(seen=len(records), run=run, held_out=now, proposals=tried + PROPOSALS)
        return _Cycle(after=len(self._steps), step=step, train=train, held_out=deciding)

    def _run(self, cycle: _Cycle) -> _Step:
        model = open_model(self.model) if isinstance(self.model, str) else self.model
        trial = Trial(model, open_reflection(self.reflection), self.database, self.config, self.agent, self.repair)
        now, proposals = self.prompts.components, cycle.step.proposals
        folder, train, deciding = self.folder / cycle.step.run, cycle.train, cycle.held_out
        improvement = improve(folder, self.start, now, train, deciding, trial, proposals=proposals, seed=self.seed)
        has_gold = [x.gold is not None for x in deciding]
        n, rejected = sum(has_gold), len(has_gold) - sum(has_gold)
        right, instead = (
            [sum(s for s, k in zip(scores, has_gold, strict=True) if k == with_gold) for scores in improvement[1:3]]
            for with_gold in (True, False)
        )
        before, after = [right[0] / n, right[1] / n] if n else (None, None)
        held_out = f" of {n} held-out questions" if n else ""
        judged = f"{', and' * bool(n)} on {rejected} rejected queries, where another result counts" * bool(rejected)
        if improvement.components == now:
            why = "".join(f"; refused: {reason}" for reason in improvement.refused)
            better = f" answered more than {before:.1%}{held_out}" if n else " did better"
            return cycle.step.model_copy(update={"outcome": f"no rewrite{better}{judged}{why}"})
        successor = Generation(
            number=len(self.history),
            components=improvement.components,
            parent=self.generation,
            score=after,
            baseline=before,
            held_out=n,
        )
        outcome = f"generation {successor.number}:" + (f" {before:.1%} -> {after:.1%}{held_out}" if n else " judged")
        outcome += f"{judged} ({instead[0]:g} -> {instead[1]:g})" if rejected else ""
        return cycle.step.model_copy(update={"current": successor.number, "outcome": outcome, "generation": successor})

    def _examples(self, asked: list[Feedback]) -> tuple[list[Example], list[Example]]:
        """Split feedback and tasks into examples to reflect on and examples that decide."""
        usable = {db for db in {f.db for f in asked} if self._open({db})}
        records = [f for f in asked if f.db in usable]
        right = {(f.db, f.question): f.sql for f in records if f.verdict == "right"}
        failed: dict[tuple[str, str], Example] = {}
        for f in records:
            if f.failed:
                key = (f.db, f.question)
                remarks = [failed[key].remark] if key in failed else []
                remark = "\n".join(filter(None, [*remarks, f.remark.strip()]))
                gold = self.tasks.get(key) or right.get(key)
                failed[key] = Example(question=f.question, db=f.db, gold=gold, rejected=f.sql, remark=remark)
        with_tasks = {db for db, _ in self.tasks}
        gold_of = self.tasks | {key: sql for key, sql in right.items() if key[0] not in with_tasks}
        held_out = [
            Example(question=key[1], db=key[0], gold=sql)
            for key, sql in gold_of.items()
            if key[0] in usable and key not in failed
        ]
        held_out.sort(key=lambda x: digest(self.seed, x.db, x.question))
        train, held_out = list(failed.values())[-TRAIN:], held_out[:HELD_OUT]
        # Questions marked right are answered right already: alone they could only reject a rewrite.
        enough = sum((x.db, x.question) in self.tasks for x in held_out) >= MIN_HELD_OUT
        return train, held_out if enough else held_out + train

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


def _read(path: Path, kind: type[Any]) -> list[Any]:
    try:
        return [kind.model_validate(row) for row in read_jsonl(path)]
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"Damaged file {path}: {first['loc']}: {first['msg']}. Move it away to start over.") from error
