"""Choice of the repair strategy for the next rewrite, and learning from its outcome.

A rollout with repair describes its state (`BanditContext`) to a `RepairPolicy` before each rewrite. `LinUCBRepair`
learns from finished rollouts which strategy suits which situation; `FixedRepair` always follows one. The same seed,
choices and lessons give the same next choice, even in another process: the lessons are saved as plain JSON, and loading
learns them again.

Rewards are shaped by a potential (Ng, Harada, Russell: Policy invariance under reward transformations, ICML 1999): an
attempt gets the potential of its outcome minus that of the outcome before. Start and end have potential 0, so
the rewards of a rollout add up to its success minus the cost of its attempts for any potentials, and no policy
gains by being bad first. The bandit looks one attempt ahead; the closer a potential is to the reward that can still be
won, the less the bandit misses. Potentials are not negative: a rollout that ends in failure falls back to 0.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Protocol

from pydantic import ValidationError

from sqlbench.agent.prompts import STRATEGIES, extract_sql
from sqlbench.agent.trajectory import Execution, Record, Transition
from sqlbench.database.error_classes import error_class
from sqlbench.errors import DataError
from sqlbench.text import clean

GENERATE = "generate"
"""Strategy of the first query of a rollout."""
ATTEMPT_COST = 0.05
POTENTIAL = {
    "rejected": 0.0,
    "syntax": 0.0,
    "other": 0.1,
    "no_such_table": 0.1,
    "no_such_column": 0.2,
    "function": 0.2,
    "ambiguous_column": 0.3,
    "aggregation": 0.3,
    "type": 0.3,
    "timeout": 0.3,
    "too_large": 0.3,
    "empty": 0.4,
    "none": 0.5,
}
"""Progress of a query that is not right yet, by class of failure, in the order in which a database finds mistakes.

The classes are `sqlbench.database.error_classes.ERROR_CLASSES`, the statuses of a query that was stopped, ``empty`` (it
ran and gave no rows) and ``none`` (it ran and gave rows).
"""


class BanditContext(Record):
    """Bandit context: the state of a rollout just before a rewrite."""

    error_class: str
    """Failure class of the last query, a key of `POTENTIAL`."""
    attempt: int
    """Queries so far."""
    previous_strategy: str = GENERATE
    error_changed: bool = False
    """True if the database's reply to the previous query was different."""
    repeats: int = 0
    """Number of queries just before the last one that failed in the same class."""


class BanditObservation(Record):
    """One bandit observation: context, strategy, reward."""

    situation: BanditContext
    strategy: str
    reward: float


class RepairPolicy(Protocol):
    """Chooses the strategy of each rewrite."""

    def choose(self, situation: BanditContext) -> str:
        """Return one of `sqlbench.agent.prompts.STRATEGIES`."""
        ...


class FixedRepair:
    """Always follows the same strategy."""

    def __init__(self, strategy: str) -> None:
        _check(strategy)
        self.strategy = strategy

    def choose(self, situation: BanditContext) -> str:
        """Return the strategy."""
        return self.strategy


class LinUCBRepair:
    """LinUCB with one linear model per strategy (Li et al., WWW 2010), from mabwiser.

    Args:
        alpha: width of the confidence bound, in rewards; 0 never explores.
        seed: decides between strategies of equal score.
    """

    def __init__(self, alpha: float = 0.5, seed: int = 0) -> None:
        from mabwiser.mab import MAB, LearningPolicy

        self.alpha, self.seed, self.choices = alpha, seed, 0
        self.lessons: list[BanditObservation] = []
        # mabwiser takes l2_lambda * I for the *inverse* of an unseen arm's matrix too: only 1 makes its score right.
        self._bandit = MAB(list(STRATEGIES), LearningPolicy.LinUCB(alpha=alpha, l2_lambda=1.0))
        # It cannot predict before a first lesson; a lesson with all features 0 changes nothing.
        self._bandit.fit([STRATEGIES[0]], [0.0], [[0.0] * len(features(BanditContext(error_class="none", attempt=1)))])

    def scores(self, situation: BanditContext) -> dict[str, float]:
        """Return the upper confidence bound of each strategy's reward."""
        return dict(self._bandit.predict_expectations([features(situation)]))

    def choose(self, situation: BanditContext) -> str:
        """Return the strategy with the highest score."""
        scores = self.scores(situation)
        best = max(scores.values())
        # Loading sums in another order than learning did, so scores that differ only by rounding count as equal.
        tied = [name for name, score in scores.items() if math.isclose(score, best, abs_tol=1e-9)]
        self.choices += 1
        return Random(f"{self.seed} {self.choices}").choice(tied)

    def learn(self, situation: BanditContext, strategy: str, reward: float) -> None:
        """Learn the reward of a strategy in a situation."""
        self._learn([BanditObservation(situation=situation, strategy=strategy, reward=reward)])

    def _learn(self, lessons: Sequence[BanditObservation]) -> None:
        for lesson in lessons:
            _check(lesson.strategy)
        self.lessons.extend(lessons)
        if lessons:
            contexts = [features(lesson.situation) for lesson in lessons]
            self._bandit.partial_fit([x.strategy for x in lessons], [x.reward for x in lessons], contexts)

    def save(self, path: str | Path) -> None:
        """Write the state; replace the old file only when the new one is complete."""
        state = _State(alpha=self.alpha, seed=self.seed, choices=self.choices, lessons=self.lessons)
        new = Path(path).with_name(f".{Path(path).name}.new")
        try:
            new.write_text(state.model_dump_json() + "\n", encoding="utf-8")
            os.replace(new, path)
        except OSError as error:
            raise DataError(
                f"Cannot write the repair state {path}: {error.strerror}. Choose another folder."
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> LinUCBRepair:
        """Load a saved policy.

        Raises:
            DataError: the file is missing or damaged.
        """
        try:
            state = _State.model_validate_json(Path(path).read_text(encoding="utf-8"))
            policy = cls(state.alpha, state.seed)
            policy._learn(state.lessons)
        except (OSError, ValueError) as error:
            first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise DataError(f"Cannot read the repair state {path}: {first}. Delete it to start over.") from error
        policy.choices = state.choices
        return policy


class _State(Record):
    alpha: float
    seed: int
    choices: int
    lessons: list[BanditObservation]


def features(situation: BanditContext) -> list[float]:
    """Encode a situation for LinUCB, each number in [0, 1] over the usual five attempts."""
    return [
        *(float(situation.error_class == name) for name in POTENTIAL),
        *(float(situation.previous_strategy == name) for name in (GENERATE, *STRATEGIES)),
        situation.attempt / 5,
        float(situation.error_changed),
        situation.repeats / 5,
    ]


def failure_class(execution: Execution) -> str:
    """Classify how an execution failed, as a key of `POTENTIAL`."""
    if execution.status == "ok":
        return "none" if execution.n_rows else "empty"
    return error_class(execution.error or "") if execution.status == "error" else execution.status


def situation(transitions: Sequence[Transition], executions: Sequence[Execution]) -> BanditContext:
    """Describe the state of a rollout after the last of these executions."""
    classes = [failure_class(e) for e in executions]
    last, others = classes[-1], classes[-2::-1]
    followed = {t.turn: t.strategy or GENERATE for t in transitions if t.agent != "check"}
    return BanditContext(
        error_class=last,
        attempt=len(executions),
        previous_strategy=followed[executions[-1].turn],
        error_changed=bool(others) and (last, executions[-1].error) != (others[0], executions[-2].error),
        repeats=next((i for i, name in enumerate(others) if name != last), len(others)),
    )


def shaped(classes: Sequence[str], solved: float) -> list[float]:
    """Return the reward of each attempt.

    Args:
        classes: failure class of each query; the last one does not count, because the rollout ends there.
        solved: 1 where the last query was right, else 0.
    """
    potentials = [0.0, *(POTENTIAL[name] for name in classes[:-1]), 0.0]
    rewards = [after - before - ATTEMPT_COST for before, after in pairwise(potentials)]
    return [*rewards[:-1], rewards[-1] + solved]


def lessons(
    transitions: Sequence[Transition], executions: Sequence[Execution], solved: float
) -> list[BanditObservation]:
    """Return the lessons of a finished rollout, one for each rewrite that followed a strategy.

    A rollout that ended because a rewrite only repeated queries made an attempt that changed nothing.

    Args:
        transitions, executions: those of the rollout.
        solved: 1 where the last query was right, else 0.
    """
    followed = {t.turn: t.strategy for t in transitions if t.strategy}
    if executions and max(followed, default=0) > len(executions):
        executions = [*executions, executions[-1].model_copy(update={"turn": len(executions) + 1})]
    rewards = shaped([failure_class(e) for e in executions], solved)
    return [
        BanditObservation(situation=situation(transitions, executions[:i]), strategy=followed[i + 1], reward=rewards[i])
        for i in range(1, len(executions))
        if i + 1 in followed
    ]


def normal(sql: str) -> str:
    """Normalise a query for comparison: ignore white space and closing semicolons."""
    return " ".join(clean(sql).split()).rstrip("; ")


def repeated(transitions: Sequence[Transition], executions: Sequence[Execution]) -> list[bool]:
    """Tell for each transition whether it is a query that repeats an earlier one of its rollout."""
    queries = [(e.turn, normal(e.sql)) for e in executions]
    return [
        t.agent != "check" and normal(extract_sql(t.completion.text)) in {sql for turn, sql in queries if turn < t.turn}
        for t in transitions
    ]


def _check(strategy: str) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"Unknown repair strategy: {strategy}. Choose one of: {', '.join(STRATEGIES)}.")
