"""What a chat does, without any widget: ask, judge, evolve, measure. The view and the notebook both run this.

One session belongs to one folder, which holds the state of the repair bandit, the feedback and the generations of the
prompt. The bandit learns from an answer once: at once where its last query failed, else from the user's verdict.
"""

from __future__ import annotations

import asyncio
import fcntl
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from markupsafe import Markup

from sqlbench.agent.graph import SelfCorrectingAgent
from sqlbench.agent.prompts import extract_sql, parse_verdict, prompts_for
from sqlbench.agent.repair import GENERATE, LinUCBRepair, RepairPolicy, Situation, failure_class, shaped
from sqlbench.agent.trajectory import Execution, Trajectory, Transition
from sqlbench.config import RolloutConfig
from sqlbench.connection import BUDGETS, LARGE, Connection, Example, connect
from sqlbench.data.tasks import Task, open_dataset
from sqlbench.database.engine import cached_database
from sqlbench.errors import DataError, RunError, SqlbenchError
from sqlbench.generations import Evolution, Feedback
from sqlbench.interfaces import Agent, Database, Model
from sqlbench.rollout import RolloutContext, rollout, run_agent
from sqlbench.text import clean
from sqlbench.widgets import view

HTML: Any = view.TEMPLATES.get_template("chat.html").module
WRITING, RUNNING = "writing ...", "running ..."
MAX_ATTEMPTS = 5
LEVELS = ("easy", "medium", "hard")
PER_LEVEL = 5
"""Benchmark questions of each level."""


@dataclass
class Attempt:
    """One query on its way."""

    turn: int
    strategy: str = GENERATE
    text: str = ""
    """The model's answer as far as it has come."""
    execution: Execution | None = None
    review: str = ""
    doing: str = WRITING
    repeats: bool = False
    """An earlier query again, which was not executed once more."""

    @property
    def sql(self) -> str:
        """The query as far as it has come."""
        return extract_sql(self.text)

    @property
    def approved(self) -> bool:
        """Whether the review calls it correct."""
        return parse_verdict(self.review)


class Transcript:
    """Watches one answer being made and shows it as HTML, complete at every moment.

    Args:
        question: what was asked.
        database: its name.
        changed: called after every event.
    """

    def __init__(self, question: str, database: str, changed: Callable[[], None] = lambda: None) -> None:
        self.question, self.database, self.changed = question, database, changed
        self.attempts: list[Attempt] = []
        self.conclusion = ""
        self.answer: Execution | None = None

    def _attempt(self, turn: int, **news: object) -> None:
        if turn > len(self.attempts):
            self.attempts.append(Attempt(turn))
        for name, value in news.items():
            setattr(self.attempts[turn - 1], name, value)
        self.changed()

    def strategy(self, name: str) -> None:
        """The next query follows this strategy."""
        self._attempt(len(self.attempts) + 1, strategy=name)

    def text(self, agent: str, turn: int, piece: str) -> None:
        """A piece of a model's answer."""
        if agent == "check":
            self._attempt(turn, doing="reviewing ...")
        else:
            here = self.attempts[turn - 1] if turn <= len(self.attempts) else Attempt(turn)
            over = here.doing == RUNNING  # what was there is over: the query is asked for once more
            self._attempt(turn, text=piece if over else here.text + piece, doing=WRITING)

    def transition(self, transition: Transition) -> None:
        """A model call is over."""
        text = transition.completion.text
        if transition.agent == "check":
            self._attempt(transition.turn, review=text.strip(), doing="")
        else:
            self._attempt(transition.turn, text=text, doing=RUNNING)

    def execution(self, execution: Execution, execution_text: str) -> None:
        """A query was executed."""
        self._attempt(execution.turn, execution=execution, doing="")

    def conclude(self, text: str, answer: Execution | None = None) -> None:
        """How it ended, and with which query."""
        self.conclusion, self.answer = text, answer
        for attempt in self.attempts:
            attempt.doing = ""
        self.changed()

    @property
    def found(self) -> Execution | None:
        """What is shown as the result: of the last query where something broke after it."""
        return self.answer or (self.attempts[-1].execution if self.attempts and self.conclusion else None)

    def html(self) -> Markup:
        """Every attempt, and at the end the rows that were found."""
        return HTML.transcript(self)


@dataclass
class Exchange:
    """A question and what came of it."""

    question: str
    connection: Connection
    generation: int
    """Of the prompt that answered."""
    context: RolloutContext | None = None
    """The rollout that answered it; None before that."""
    verdict: Literal["right", "wrong"] | None = None
    remark: str = ""
    choices: list[tuple[Situation, str]] = field(default_factory=list)
    """The repair strategies that were followed, each with the situation it was chosen in."""
    learned: bool = False

    @property
    def history(self) -> list[tuple[str, str]]:
        """Every query for this question so far, with the text of its result."""
        return list(self.context.history) if self.context is not None else []

    @property
    def answer(self) -> tuple[str, str] | None:
        """The query that stands, with the text of its result: not the last one where a rewrite went back to another."""
        done = self.history[::-1]
        final = self.context.sql if self.context is not None else None
        return next((pair for pair in done if pair[0] == final), done[0] if done else None)

    def feedback(self) -> Feedback | None:
        """What prompt evolution reads of it; None where there was no query."""
        if self.answer is None:
            return None
        sql, result = self.answer
        return Feedback(
            question=self.question,
            db=self.connection.name,
            sql=sql,
            execution=result,
            verdict=self.verdict,
            remark=self.remark,
            generation=self.generation,
        )


@dataclass
class _Watched:
    """A repair policy whose choices are seen and kept."""

    policy: RepairPolicy
    transcript: Transcript
    choices: list[tuple[Situation, str]]

    def choose(self, situation: Situation) -> str:
        name = self.policy.choose(situation)
        self.choices.append((situation, name))
        self.transcript.strategy(name)
        return name


class ChatSession:
    """The agent with what it has learned so far.

    Args:
        model: who writes the queries.
        folder: where everything learned is kept.
        builtin: databases whose questions have known answers.
        reflection: the endpoint for prompt evolution, as ``openai:NAME``, or None.
        every: questions between two evolutions.
        agent: who answers; the self-correcting one by default.
        prompts: family or TOML file to start from, if not the model's own.

    Raises:
        DataError: what is kept in the folder cannot be read.
        RunError: the folder cannot be written.
    """

    def __init__(
        self,
        model: Model,
        folder: Path | str,
        builtin: BuiltIn | None = None,
        reflection: str | None = None,
        every: int = 4,
        agent: Agent | None = None,
        prompts: str | None = None,
    ) -> None:
        self.model, self.folder, self.builtin = model, Path(folder), builtin
        self.agent = agent or SelfCorrectingAgent()
        self.config = RolloutConfig(
            max_turns=MAX_ATTEMPTS, **BUDGETS.get(model.family, {"table_info_truncate": LARGE})
        ).decided(model.family)
        self._databases: dict[str, Database] = {}
        self._saved = self.folder / "bandit.json"
        self.bandit, trial = self._bandit(), self._bandit()
        self.evolution = Evolution(
            self.folder,
            prompts_for(prompts or model.family),
            reflection,
            every,
            model=model.name,  # one of its own: this one may be answering a question meanwhile
            database=self._database,
            tasks=builtin.tasks() if builtin else (),
            config=self.config,
            repair=trial,  # for the same reason
            agent=self.agent,
        )

    def _bandit(self) -> LinUCBRepair:
        return LinUCBRepair.load(self._saved) if self._saved.is_file() else LinUCBRepair()

    def _database(self, name: str) -> Database:
        if name not in self._databases and self.builtin is not None and name in self.builtin.names:
            self._databases[name] = cached_database(self.builtin.data.database(name))
        return self._databases[name]

    async def ask(
        self,
        question: str,
        connection: Connection,
        transcript: Transcript,
        earlier: Sequence[tuple[str, str]] = (),
    ) -> Exchange:
        """Answer a question; what breaks stands in the exchange's state and in the transcript.

        Args:
            question: in words.
            connection: the database.
            transcript: is told of everything as it happens.
            earlier: queries that did not answer it, each with the text of its result: another way is tried.
        """
        started, evolution = time.perf_counter(), self.evolution
        self._databases[connection.name] = connection.database
        question = clean(question)
        exchange = Exchange(question, connection, evolution.generation)
        policy, database = _Watched(self.bandit, transcript, exchange.choices), connection.database
        task = Task(task_id="", db_id=connection.name, question=question, gold="", split="")
        prompts, config, agent = evolution.prompts, self.config, self.agent
        context = await run_agent(task, database, self.model, prompts, config, policy, transcript, earlier, agent=agent)
        exchange.context = context
        executions, seconds = context.executions, time.perf_counter() - started
        text = f"{len(executions)} attempt{'s' * (len(executions) != 1)}, {seconds:.1f} s"
        answer = None
        if context.error is not None:
            text = f"stopped: {context.error}"
        else:
            answer = next(execution for execution in executions[::-1] if execution.sql == context.sql)
            for attempt in transcript.attempts[len(executions) :]:
                attempt.repeats = True
            if not answer.answered:
                self._learn(exchange, 0.0)
                text = f"gave up, the last query did not run; {text}"
        feedback = exchange.feedback()
        if feedback and feedback.key not in {f.key for f in evolution.store.all()}:
            evolution.record(feedback)
        transcript.conclude(text, answer)
        return exchange

    def judge(self, exchange: Exchange, right: bool, remark: str = "") -> None:
        """Take in the user's verdict on an answer: the bandit learns from it, prompt evolution reads it.

        Raises:
            SqlbenchError: it cannot be kept.
        """
        exchange.verdict, exchange.remark = "right" if right else "wrong", clean(remark).strip()
        try:
            self._learn(exchange, float(right))
            if feedback := exchange.feedback():
                self.evolution.record(feedback)
        except SqlbenchError:
            exchange.verdict = None  # it can be given again
            raise

    def _learn(self, exchange: Exchange, solved: float) -> None:
        context = exchange.context
        if exchange.learned or context is None or context.error is not None or not exchange.choices:
            return
        classes = [failure_class(e) for e in context.executions]
        if context.transitions[0].strategy:  # the first query, too, followed a choice: it was a retry
            classes = [exchange.choices[0][0].error_class, *classes]
        if len(exchange.choices) == len(classes):  # the last rewrite only repeated: it changed nothing
            classes.append(classes[-1])
        try:
            lock = open(self.folder / ".bandit.lock", "a")  # noqa: SIM115
        except OSError as error:
            raise RunError(f"Cannot write {self.folder}: {error.strerror}. Make it writable and try again.") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            bandit = self._bandit()  # with what other pages of the chat learned meanwhile
            bandit.choices = max(bandit.choices, self.bandit.choices)
            for (situation, strategy), reward in zip(exchange.choices, shaped(classes, solved)[1:], strict=True):
                bandit.learn(situation, strategy, reward)
            bandit.save(self._saved)
        self.bandit, exchange.learned = bandit, True

    def learned_html(self) -> Markup:
        """What the bandit has learned: by failure class and strategy, how often and with which mean reward."""
        rewards: dict[tuple[str, str], list[float]] = defaultdict(list)
        for lesson in self.bandit.lessons:
            rewards[lesson.situation.error_class, lesson.strategy].append(lesson.reward)
        rows = [
            ["none (it ran)" if kind == "none" else kind, *key, len(some), f"{mean(some):+.2f}"]
            for (kind, *key), some in sorted(rewards.items())
        ]
        return HTML.lessons(rows)

    async def benchmark(
        self, connection: Connection, tasks: Sequence[Task], scored: Callable[[list[Trajectory]], None]
    ) -> None:
        """Answer questions with known answers, some at a time; the bandit chooses but does not learn.

        Args:
            scored: called with all rollouts so far whenever one is over.
        """
        arguments = connection.database, self.model, self.evolution.prompts, self.config, self.bandit
        gate, done = asyncio.Semaphore(8), []

        async def score(task: Task) -> None:
            async with gate:
                done.append(await rollout(task, *arguments, agent=self.agent))
            scored(done)

        await asyncio.gather(*map(score, tasks))


def benchmark_html(rollouts: Sequence[Trajectory], of: int) -> Markup:
    """Accuracy by level and overall, and every question with its verdict."""
    counted = [t for t in rollouts if t.correct is not None]
    levels = []
    for name in (*LEVELS, "overall"):
        some = [t.correct for t in counted if name in (t.hardness, "overall")]
        if some:
            levels.append([name, f"{sum(map(bool, some))} of {len(some)}", f"{100 * mean(map(bool, some)):.0f}%"])
    order = sorted(rollouts, key=lambda t: (LEVELS.index(t.hardness), t.question))
    rows = [[t.hardness, _verdict(t), t.turns, t.question, t.pred or ""] for t in order]
    return HTML.benchmark(len(rollouts), of, len(rollouts) - len(counted), levels, rows)


def _verdict(rollout: Trajectory) -> str:
    result = view.outcome(rollout.correct, rollout.error)
    return f"{view.OUTCOMES[result]} {rollout.error or result}"


class BuiltIn:
    """The databases of a data set, whose questions have known answers.

    Raises:
        DataError: there is no data set, it is damaged, or none of its questions can be offered.
    """

    def __init__(self, root: Path | str) -> None:
        self.data = open_dataset(root)
        splits = self.data.splits()
        self._tasks: dict[str, dict[str, Task]] = defaultdict(dict)
        for split in [s for s in splits if s != "train"] or splits:
            for task in self.data.load(split):
                if task.scorable and task.hardness in LEVELS:
                    self._tasks[task.db_id][task.key] = task
        if not self._tasks:
            raise DataError(
                f"{root} has no question of the levels {', '.join(LEVELS)}; 'sqlbench data audit' finds levels"
            )
        self.names = sorted(self._tasks)

    def tasks(self) -> list[Task]:
        """All questions."""
        return [task for some in self._tasks.values() for task in some.values()]

    def connect(self, name: str) -> Connection:
        """Open a database; its examples are questions of the data set, of several levels.

        Raises:
            DatabaseError: its file is missing or damaged.
        """
        pools = {
            level: sorted(
                (t for t in self._tasks[name].values() if t.hardness == level), key=lambda t: (t.phrasing, t.key)
            )
            for level in LEVELS
        }
        chosen = [
            pools[level][i : i + 1]
            for i, level in ((0, "easy"), (0, "medium"), (1, "easy"), (1, "medium"), (0, "hard"))
        ]
        examples = tuple(Example(t.question, t.gold) for some in chosen for t in some)
        return replace(connect(self.data.database(name)), examples=examples)

    def benchmark(self, name: str) -> list[Task]:
        """The benchmark of a database: always the same questions of each level."""
        tasks = [self._tasks[name][key] for key in sorted(self._tasks[name])]
        return [t for level in LEVELS for t in [t for t in tasks if t.hardness == level][:PER_LEVEL]]
