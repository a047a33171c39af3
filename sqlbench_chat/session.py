"""Chat session without widgets: ask, judge, evolve, measure. The view and the notebook both use it.

A session belongs to one folder, which holds the state of the repair bandit, the feedback and the prompt generations.
The bandit learns from an answer once: immediately if its last query failed, else from the user's verdict.
"""

from __future__ import annotations

import asyncio
import fcntl
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from markupsafe import Markup

from sqlbench.agent.graph import SelfCorrectingAgent
from sqlbench.agent.prompts import prompts_for
from sqlbench.agent.repair import BanditContext, LinUCBRepair, RepairPolicy, failure_class, shaped
from sqlbench.agent.trajectory import Message, Trajectory
from sqlbench.config import RolloutConfig
from sqlbench.data.tasks import Task
from sqlbench.database.engine import cached_database
from sqlbench.database.types import Limits, QueryResult
from sqlbench.errors import RunError, SqlbenchError
from sqlbench.interfaces import Agent, Database, Model
from sqlbench.rollout import RolloutContext, rollout, run_agent
from sqlbench.text import clean
from sqlbench_chat.builtin import BuiltIn
from sqlbench_chat.connection import BUDGETS, EXAMPLES, LARGE, Connection, Example, model_examples
from sqlbench_chat.generations import Evolution
from sqlbench_chat.turn import HTML, LiveTranscript, Turn

MAX_ATTEMPTS = 5
LEAST_SCHEMA = 100
"""Schema size in characters, or tokens, below which a prompt is not shortened further."""
_TOO_LONG = re.compile(r"PromptTooLongError|context[ _](length|window)|maximum context|too many tokens", re.IGNORECASE)
_OPTION = re.compile(r" [A-Z][^.]*(--[a-z]|_truncate)[^.]*\.")
"""Pattern of a sentence that advises options, which the page does not have."""


@dataclass
class ChatTurn:
    """A turn with the state that exists only while its session is open."""

    turn: Turn
    context: RolloutContext | None = None
    """The rollout that answered it."""
    choices: list[tuple[BanditContext, str]] = field(default_factory=list)
    """Repair strategies that were followed, each with the situation in which it was chosen."""
    result: QueryResult | None = None
    """All rows of the final query."""
    learned: bool = False


@dataclass
class _Watched:
    """A repair policy that records its choices and shows them in the transcript."""

    policy: RepairPolicy
    transcript: LiveTranscript
    choices: list[tuple[BanditContext, str]]

    def choose(self, situation: BanditContext) -> str:
        name = self.policy.choose(situation)
        self.choices.append((situation, name))
        self.transcript.strategy(name)
        return name


class _Kept:
    """A database that keeps its full results, because a transcript has only the first rows."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.results: dict[str, QueryResult] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)

    def execute(self, sql: str, limits: Limits | None = None) -> QueryResult:
        self.results[sql] = result = self._database.execute(sql, limits)
        return result


class ChatSession:
    """The agent with its learned state.

    Args:
        model: model that writes the queries.
        folder: folder of the learned state.
        builtin: databases whose questions have known answers.
        reflection: the endpoint for prompt evolution, as ``openai:NAME``, or None.
        every: number of questions between two evolutions.
        agent: agent that answers; the self-correcting one by default.
        prompts: family or TOML file to start from, if not the model's own.

    Raises:
        DataError: the state in the folder cannot be read.
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
        self.reflection, self.every, self.start = reflection, every, prompts
        self.agent = agent or SelfCorrectingAgent()
        self.config = RolloutConfig(
            max_turns=MAX_ATTEMPTS, **BUDGETS.get(model.family, {"table_info_truncate": LARGE})
        ).decided(model.family)
        self._databases: dict[str, Database] = {}
        self.refresh()

    def move_to(self, folder: Path) -> None:
        """Switch to another folder and its state.

        Raises:
            DataError: the state in the folder cannot be read.
            RunError: the folder cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"Cannot write {folder}: {error.strerror}. Make it writable and try again.") from error
        self.folder = folder
        self.refresh()

    def refresh(self) -> None:
        """Read the state in the folder, including lessons of other pages of the chat."""
        self.bandit, trial = self._bandit(), self._bandit()
        self.evolution = Evolution(
            self.folder,
            prompts_for(self.start or self.model.family),
            self.reflection,
            self.every,
            model=self.model.name,  # a separate instance: this one may be answering a question meanwhile
            database=self._database,
            tasks=self.builtin.tasks() if self.builtin else (),
            config=self.config,
            repair=trial,  # for the same reason
            agent=self.agent,
        )

    def _bandit(self) -> LinUCBRepair:
        return LinUCBRepair.load(self._saved) if self._saved.is_file() else LinUCBRepair()

    @property
    def _saved(self) -> Path:
        return self.folder / "bandit.json"

    def _database(self, name: str) -> Database:
        if name not in self._databases and self.builtin is not None and name in self.builtin.names:
            self._databases[name] = cached_database(self.builtin.data.database(name))
        return self._databases[name]

    def foreign(self, connection: Connection) -> bool:
        """Return whether the model was never trained for databases like this one."""
        names = self.builtin.names if self.builtin else ()
        return self.model.family == "nano" and connection.name not in names

    async def examples(self, connection: Connection) -> list[Example]:
        """Return questions that this model has just answered with rows.

        The nano policy answers the connection's examples, and those answered right are kept. Any other model writes its
        own questions, each with its query.
        """
        if not connection.schema.tables:
            return []
        if self.model.family != "nano":
            return await model_examples(connection, self.model)
        config = self.config.model_copy(update={"max_turns": 1})

        async def answered(example: Example) -> bool:
            task = Task(
                task_id="", db_id=connection.name, question=example.question, gold=example.sql, split="", scorable=False
            )
            done = await rollout(
                task, connection.database, self.model, self.evolution.prompts, config, agent=self.agent
            )
            return bool(done.correct) and done.executions[-1].n_rows > 0

        right = await asyncio.gather(*map(answered, connection.examples))
        return [example for example, fine in zip(connection.examples, right, strict=True) if fine][:EXAMPLES]

    async def ask(self, turn: Turn, connection: Connection, changed: Callable[[], None] = lambda: None) -> ChatTurn:
        """Answer the question of a turn; a failure is recorded in the turn.

        Args:
            turn: turn to fill in as events happen.
            connection: the database.
            changed: called after every event.
        """
        started, evolution = time.perf_counter(), self.evolution
        self._databases[connection.name] = connection.database
        turn.model, turn.generation = self.model.name, evolution.generation
        chat_turn, transcript, config = ChatTurn(turn), LiveTranscript(turn, changed), self.config
        policy, database = _Watched(self.bandit, transcript, chat_turn.choices), _Kept(connection.database)
        task = Task(task_id="", db_id=connection.name, question=turn.question, gold="", split="")
        while True:
            prompts, earlier = evolution.prompts, turn.earlier
            context = await run_agent(
                task, database, self.model, prompts, config, policy, transcript, earlier, agent=self.agent
            )
            budget = "table_info_truncate" if config.schema_tokens is None else "schema_tokens"
            less = getattr(config, budget) // 2
            if context.transitions or less < LEAST_SCHEMA or not _TOO_LONG.search(context.error or ""):
                break
            config = config.model_copy(update={budget: less})  # less of the schema may fit
            turn.attempts.clear()
            chat_turn.choices.clear()
        chat_turn.context = context
        executions, seconds = context.executions, time.perf_counter() - started
        final = next((e for e in executions[::-1] if e.sql == context.sql), executions[-1] if executions else None)
        turn.sql = final.sql if final else ""
        chat_turn.result = database.results.get(turn.sql)
        text, error = f"{len(executions)} attempt{'s' * (len(executions) != 1)}, {seconds:.1f} s", ""
        if context.error is not None:
            text, error = f"stopped; {text}", self._explain(context.error)
        else:
            for attempt in turn.attempts[len(executions) :]:
                attempt.repeats = True
            if final is None or not final.answered:
                self._learn(chat_turn, 0.0)
                text, error = f"gave up; {text}", "None of the queries ran. Put the question in other words."
        feedback = turn.feedback()
        if feedback and feedback.key not in {f.key for f in evolution.store.all()}:
            evolution.record(feedback)
        transcript.conclude(text, error)
        return chat_turn

    def _explain(self, error: str) -> str:
        """Explain the failure of a rollout in words that fit the page."""
        if _TOO_LONG.search(error):
            return (
                f"The question and this database's schema are more than {self.model.name} can read at once. "
                "Use a model with a longer context, or connect a smaller database."
            )
        return re.sub(r"^(\w+): \w+: ", r"The \1 failed: ", _OPTION.sub("", clean(error)))

    def judge(self, turn: Turn, right: bool, remark: str = "", chat_turn: ChatTurn | None = None) -> None:
        """Record the user's verdict on an answer, for the bandit and for prompt evolution.

        Args:
            turn: turn with the answer.
            right: the verdict.
            remark: the user's objection to a wrong answer.
            chat_turn: state of the turn in the open session; the bandit learns only from this.

        Raises:
            SqlbenchError: the verdict cannot be stored.
        """
        before = turn.verdict, turn.remark
        turn.verdict, turn.remark = "right" if right else "wrong", clean(remark).strip()
        try:
            if chat_turn is not None:
                self._learn(chat_turn, float(right))
            if feedback := turn.feedback():
                self.evolution.record(feedback)
        except SqlbenchError:
            turn.verdict, turn.remark = before  # so that it can be given again
            raise

    def _learn(self, chat_turn: ChatTurn, solved: float) -> None:
        context = chat_turn.context
        if chat_turn.learned or context is None or context.error is not None or not chat_turn.choices:
            return
        classes = [failure_class(e) for e in context.executions]
        if context.transitions[0].strategy:  # a retry: the first query, too, followed a choice
            classes = [chat_turn.choices[0][0].error_class, *classes]
        if len(chat_turn.choices) == len(classes):  # the last rewrite repeated an earlier query, so nothing changed
            classes.append(classes[-1])
        try:
            lock = open(self.folder / ".bandit.lock", "a")  # noqa: SIM115
        except OSError as error:
            raise RunError(f"Cannot write {self.folder}: {error.strerror}. Make it writable and try again.") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            bandit = self._bandit()  # including lessons of other pages of the chat
            bandit.choices = max(bandit.choices, self.bandit.choices)
            for (situation, strategy), reward in zip(chat_turn.choices, shaped(classes, solved)[1:], strict=True):
                bandit.learn(situation, strategy, reward)
            bandit.save(self._saved)
        self.bandit, chat_turn.learned = bandit, True

    def learned_html(self) -> Markup:
        """Render the bandit's lessons: count and mean reward by failure class and strategy."""
        rewards: dict[tuple[str, str], list[float]] = defaultdict(list)
        for lesson in self.bandit.lessons:
            rewards[lesson.situation.error_class, lesson.strategy].append(lesson.reward)
        rows = [
            ["none (it ran)" if kind == "none" else kind, *key, len(values), f"{mean(values):+.2f}"]
            for (kind, *key), values in sorted(rewards.items())
        ]
        return HTML.lessons(rows)

    async def summarise(self, turn: Turn) -> str:
        """Put an answer into words, from the rows that the prompts show.

        Raises:
            ModelError: the model cannot be reached.
        """
        _, rows = next(pair for pair in turn.history[::-1] if pair[0] == turn.sql)
        prompt = (
            f"Question: {turn.question}\n\nQuery:\n{turn.sql}\n\nIts result:\n{rows}\n\n"
            "Answer the question in one or two plain sentences, from this result alone."
        )
        answer = await self.model.complete([Message(role="user", content=prompt)])
        return clean(answer.text.rpartition("</think>")[2]).strip()

    async def benchmark(
        self, connection: Connection, tasks: Sequence[Task], scored: Callable[[list[Trajectory]], None]
    ) -> None:
        """Score questions with known answers, several at a time; the bandit chooses but does not learn.

        Args:
            scored: called with all rollouts so far after each rollout.
        """
        arguments = connection.database, self.model, self.evolution.prompts, self.config, self.bandit
        gate, done = asyncio.Semaphore(8), []

        async def score(task: Task) -> None:
            async with gate:
                done.append(await rollout(task, *arguments, agent=self.agent))
            scored(done)

        async with asyncio.TaskGroup() as group:  # cancelling it cancels the rollouts too
            for task in tasks:
                group.create_task(score(task))
