"""Results of rollouts: the one place where they are counted, scored and compared.

`Rollouts.of` turns trajectories into three tables in one pass: only the rows of a trajectory stay in memory. An
evaluation's summary, a step's metrics, the tables of an ablation and the views are all computed from them.

Failed rollouts (something outside the policy broke) and rollouts without a verdict are counted and left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from pydantic import Field

from sqlbench.agent.prompts import parse_verdict
from sqlbench.agent.repair import repeated
from sqlbench.agent.trajectory import Completion, Execution, Record, Trajectory
from sqlbench.clauses import LEVELS, component_match
from sqlbench.data.tasks import Task
from sqlbench.database.error_classes import error_class
from sqlbench.errors import DataError
from sqlbench.samples import Samples, result_of
from sqlbench.stats import bootstrap, clustered, mcnemar, paired_bootstrap, wilson
from sqlbench.usage import Usage

TEXTS = ("task_key", "task_id", "db_id", "dialect", "hardness", "question", "gold", "pred", "reason", "error")
ROLLOUT = dict.fromkeys(TEXTS, object)
ROLLOUT |= {"sample": int, "reward": float, "correct": float, "failed": bool, "turns": int, "seconds": float}
CALL = {"rollout": int, "agent": object, "turn": int, "prompt": float, "response": float, "cut": bool}
CALL |= {"temperature": float, "flaw": object, "sent": object, "says": object, "repeats": bool}
CALL |= {"seconds": float, "cached": bool}
QUERY = {"rollout": int, "turn": int, "sql": object, "ran": bool, "problem": object, "match": float, "result": object}
QUERY |= {"stands": int}


class Rollouts(NamedTuple):
    """Rollouts as tables; `rollout` in the other two is the row of the first."""

    rollouts: pd.DataFrame
    """Fields of `Trajectory`; `correct` is 1, 0 or NaN; `task` tells apart the copies of a task in a split."""
    calls: pd.DataFrame
    """Model calls: tokens, `flaw` and `sent` in words, what a check `says`, whether a rewrite `repeats` a query."""
    queries: pd.DataFrame
    """Executed queries: class of a `problem`, digest of the `result`, row of the query that `stands` after the turn."""

    @classmethod
    def of(cls, trajectories: Iterable[Trajectory]) -> Rollouts:
        """Build the tables from trajectories, reading each once."""
        rows: list[tuple] = []
        calls: list[tuple] = []
        queries: list[tuple] = []
        for number, t in enumerate(trajectories):
            rows.append(tuple(getattr(t, name) for name in ROLLOUT))
            for x, again in zip(t.transitions, repeated(t.transitions, t.executions), strict=True):
                done, says = x.completion, parse_verdict(x.completion.text) if x.agent == "check" else None
                tokens = done.prompt_tokens, done.response_tokens, done.finish_reason == "length"
                about = done.temperature, done.flaw, _sent(done), says, again, done.seconds, done.cached
                calls.append((number, x.agent, x.turn, *tokens, *about))
            first, last = len(queries), len(queries) + len(t.executions) - 1
            answer = max((i for i, e in enumerate(t.executions, first) if e.sql == t.pred), default=last)
            for i, e in enumerate(t.executions, first):
                fields = e.turn, e.sql, e.status == "ok", _problem(e), e.match, result_of(e)
                queries.append((number, *fields, answer if i == last else i))
        frame = _table(rows, ROLLOUT)
        nth = frame.groupby(["task_key", "sample"]).cumcount()  # a split may hold a task twice
        frame["task"] = [f"{key} {n}" if n else key for key, n in zip(frame["task_key"], nth, strict=True)]
        return cls(frame, _table(calls, CALL), _table(queries, QUERY))


def _table(rows: Sequence[tuple], columns: Mapping[str, type]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(columns), dtype=object).astype(columns)


def _sent(completion: Completion) -> str | None:
    fields = completion.sent
    return None if fields is None else ", ".join(f"{k}={v!r}" for k, v in sorted(fields.items()))


def _problem(execution: Execution) -> str | None:
    if execution.status == "error":
        return error_class(execution.error or execution.status)
    return None if execution.status == "ok" else execution.status


def mean(values: pd.Series) -> float | None:
    """Return the mean of the known values, independent of their order; None where there are none."""
    numbers = values.dropna()
    return math.fsum(numbers) / len(numbers) if len(numbers) else None


def balanced_accuracy(said: pd.Series, right: pd.Series) -> float | None:
    """Return the mean of a check's accuracies on right and on wrong queries; None unless it saw both."""
    kinds = (said == right).groupby(right).mean()
    return float(kinds.mean()) if len(kinds) == 2 else None


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names of groups, levels of hardness from the easiest."""
    return sorted(names, key=lambda name: (LEVELS.index(name) if name in LEVELS else len(LEVELS), name))


class Score(Record):
    """Execution match over some rollouts."""

    n: int
    """Scored rollouts."""
    correct: int
    ex: float | None
    """Share of the scored rollouts that are correct; None where there are none."""
    low: float | None
    """Lower end of the 95% interval: Wilson's; with several rollouts per task, a bootstrap over tasks."""
    high: float | None

    @classmethod
    def of(cls, right: pd.Series, task: pd.Series | pd.Index) -> Score:
        """Score rollouts: 1 is right, 0 wrong, NaN has no verdict.

        Args:
            right: outcome of each rollout.
            task: task of each rollout; rollouts of one task are not independent.
        """
        tasks = right.groupby(task).mean().dropna()
        n, correct = int(right.count()), int(right.sum())
        if not n:
            return cls(n=0, correct=0, ex=None, low=None, high=None)
        low, high = wilson(correct, n) if len(tasks) == n else bootstrap(sorted(tasks))
        return cls(n=n, correct=correct, ex=correct / n, low=low, high=high)

    @property
    def percent(self) -> float:
        """The share in percent; NaN where there is none."""
        return 100 * self.correct / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The interval in percent."""
        return (math.nan, math.nan) if self.low is None or self.high is None else (100 * self.low, 100 * self.high)

    @property
    def interval_text(self) -> str:
        """The interval as tables show it."""
        return "{:.1f} to {:.1f}".format(*self.interval)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.percent:.1f}% (95% {low:.1f}% to {high:.1f}%, n={self.n})" if self.n else "-"


class Tokens(Record):
    """Token counts of model calls, per transition."""

    calls: int
    prompt: float | None
    """Mean prompt tokens; None where the model does not count them."""
    response: float | None
    cut: int
    """Answers cut at the token limit."""

    @classmethod
    def of(cls, calls: pd.DataFrame) -> Tokens:
        """Count the tokens of some calls."""
        return cls(
            calls=len(calls), prompt=mean(calls["prompt"]), response=mean(calls["response"]), cut=calls["cut"].sum()
        )


class Summary(Record):
    """Results of an evaluation."""

    model: str
    data: str
    split: str
    rollouts: int
    """All rollouts: scored, failed, and those whose task could not be scored after all."""
    score: Score
    score_with_failed: Score | None = None
    """The same with failed rollouts counted as wrong."""
    samples: Samples | None = None
    """Estimates from several rollouts per task."""
    reward: float | None = None
    """Mean reward, of the rollouts that have one; the same as `Score.ex` where the reward is execution match."""
    by_hardness: dict[str, Score]
    by_database: dict[str, Score]
    over_databases: tuple[float, float] | None = None
    """95% interval of `Score.ex` over databases instead of tasks; None for fewer than two."""
    over_constructs: tuple[float, float] | None = None
    """The same over query constructs, where the data set names them."""
    by_phrasing: dict[str, Score]
    failed: int
    """Rollouts in which the model or the database broke; not part of the score."""
    failures: dict[str, int]
    """Failed rollouts by place and type of error."""
    unscorable: int
    """Tasks left out because no verdict on them can be trusted."""
    turns: float | None
    """Mean over the rollouts that did not fail, like the next two."""
    transitions: float | None
    rollout_seconds: float | None
    tokens: dict[str, Tokens]
    """Token counts by sub-agent, and under ``all``."""
    flaws: dict[str, int] = Field({})
    """Empty and cut answers by their flaw, including those of failed rollouts."""
    sent: dict[str, int] = Field({})
    """Answers of an endpoint by the request fields that it accepted."""
    reasons: dict[str, int]
    """Verdicts by reason code."""
    query_errors: dict[str, int]
    """Executed statements that failed, by class of error."""
    components: dict[str, float]
    """Mean match of each query component with the gold query."""
    metrics: dict[str, dict[str, float]] = Field({}, exclude_if=lambda value: not value)
    """Means of the further scores requested (`sqlbench.metrics`), by hardness and under ``all``."""
    seconds: float
    """Wall-clock time of the session that finished the run."""
    usage: Usage | None = None
    """Tokens, seconds and cost of the model calls; None in a run of an earlier version."""

    def text(self) -> str:
        """Write the headline for the command line."""
        ex = f"EX {self.score}"
        if self.failed and self.score_with_failed is not None:
            ex += f", with failed rollouts as wrong {self.score_with_failed}"
        for what, interval in (("databases", self.over_databases), ("constructs", self.over_constructs)):
            ex += "" if interval is None else f", {interval[0]:.1%} to {interval[1]:.1%} over {what}"
        if self.reward is not None and self.reward != self.score.ex:
            ex += f", mean reward {self.reward:.3f}"
        levels = ", ".join(f"{k} {v.ex:.1%}" for k, v in self.by_hardness.items() if v.ex is not None)
        calls = self.tokens["all"]
        return (
            f"{self.model} on {self.split}: {ex}; {self.failed} failed, {self.unscorable} unscorable"
            f"{''.join(f'; {_answers(count)} {flaw}' for flaw, count in self.flaws.items())}\n"
            f"by hardness: {levels or '-'}\n"
            f"{''.join(f'{name}: {_levels(values)}' for name, values in self.metrics.items())}"
            f"per rollout: {_number(self.transitions)} transitions, {_number(self.turns)} turns; "
            f"per transition: {_number(calls.prompt)} prompt and {_number(calls.response)} response tokens"
            + "".join(f"\nsent to the endpoint: {fields} ({_answers(count)})" for fields, count in self.sent.items())
            + (self.samples.text() if self.samples else "")
            + (f"\n{self.usage.text()}" if self.usage else "")
        )


def _levels(values: dict[str, float]) -> str:
    by = ", ".join(f"{level} {values[level]:.1%}" for level in in_order(values.keys() - {"all"}))
    return f"{values['all']:.1%}{f' ({by})' if by else ''}\n" if values else "-\n"


def _answers(count: int) -> str:
    return f"{count} answer{'s' * (count != 1)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def summarise(
    found: Rollouts,
    tasks: Sequence[Task] = (),
    *,
    model: str = "",
    data: str = "",
    split: str = "",
    samples: Samples | None = None,
    metrics: dict[str, dict[str, float]] | None = None,
    seconds: float = 0.0,
    prices: Path | None = None,
) -> Summary:
    """Summarise rollouts; `tasks` adds the phrasing families and the count of unscorable tasks."""
    labels = {task.key: (task.phrasing, task.kind) for task in tasks}
    kinds = [labels.get(key, ("", "")) for key in found.rollouts["task_key"]]
    frame = found.rollouts.assign(phrasing=[phrasing for phrasing, _ in kinds], construct=[kind for _, kind in kinds])
    good, failed = frame[~frame["failed"]], frame[frame["failed"]]
    scored = good[good["correct"].notna()]
    calls = found.calls[found.calls["rollout"].isin(good.index)]
    queries = found.queries[found.queries["rollout"].isin(good.index)]
    pairs = zip(scored["gold"], scored["pred"].fillna(""), scored["dialect"], strict=True)
    parts = pd.DataFrame([component_match(*pair) for pair in pairs])
    return Summary(
        model=model,
        data=data,
        split=split,
        rollouts=len(frame),
        score=Score.of(scored["correct"], scored["task"]),
        score_with_failed=Score.of(frame["correct"].mask(frame["failed"], 0.0), frame["task"]),
        samples=samples,
        reward=mean(good["reward"]),
        by_hardness=_scores(scored, "hardness"),
        by_database=_scores(scored, "db_id"),
        by_phrasing=_scores(scored, "phrasing"),
        over_databases=clustered(scored["correct"], scored["db_id"]),
        over_constructs=clustered(scored["correct"], scored["construct"]),
        failed=len(failed),
        failures=_tally(": ".join(error.split(": ", 2)[:2]) for error in failed["error"]),
        unscorable=len(good) - len(scored) + sum(not task.scorable for task in tasks),
        turns=mean(good["turns"]),
        transitions=len(calls) / len(good) if len(good) else None,
        rollout_seconds=mean(good["seconds"]),
        tokens={"all": Tokens.of(calls)} | {str(k): Tokens.of(v) for k, v in calls.groupby("agent", sort=False)},
        flaws=_tally(filter(None, found.calls["flaw"])),
        sent=_tally(found.calls["sent"].dropna()),
        reasons=_tally(good["reason"]),
        query_errors=_tally(queries["problem"].dropna()),
        components={name: mean(parts[name]) for name in sorted(parts)},
        metrics=metrics or {},
        seconds=seconds,
        usage=Usage.of(found, model, prices),
    )


def _scores(scored: pd.DataFrame, column: str) -> dict[str, Score]:
    groups = {name: Score.of(rows["correct"], rows["task"]) for name, rows in scored.groupby(column) if name}
    return {name: groups[name] for name in in_order(groups)}


def _tally(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items(), key=lambda pair: (-pair[1], pair[0])))


@dataclass(frozen=True)
class Difference:
    """A paired comparison over the same tasks."""

    points: float
    """Accuracy of the second minus the first, in percentage points."""
    low: float
    high: float
    """95% interval of `points`, by paired bootstrap over the tasks."""
    p: float
    """Two-sided exact McNemar test."""
    gained: int
    """Tasks on which the second is better."""
    lost: int

    def __str__(self) -> str:
        counts = f"{self.gained} gained, {self.lost} lost"
        return f"{self.points:+.1f} points ({self.interval_text}; McNemar p {self.p_text}; {counts})"

    def sentence(self, first: str, second: str) -> str:
        """Say which of the two is more accurate, and whether that is more than noise at the 5% level of the test.

        Args:
            first: phrase for the first evaluation after "accuracy": "before training", "with 1 turn".
            second: the same for the second one.
        """
        if self.gained == self.lost == 0:
            return f"The same tasks are right {second} as {first}."
        size = f"(95% CI {self.interval_text}; McNemar p {self.p_text})"
        if not round(self.points, 1):
            return f"Accuracy {second} is the same as {first} {size}."
        way = "higher" if self.points > 0 else "lower"
        more = "more than noise" if self.p < 0.05 else "not more than noise"
        return f"Accuracy {second} is {way} than {first} by {abs(self.points):.1f} points {size}; that is {more}."

    @property
    def interval_text(self) -> str:
        """The interval as tables show it."""
        return f"{self.low:+.1f} to {self.high:+.1f}"

    @property
    def p_text(self) -> str:
        """The p-value as tables show it."""
        return "< 0.001" if self.p < 0.001 else f"{self.p:.3f}"


def difference(first: pd.Series, second: pd.Series) -> Difference:
    """Compare two evaluations task by task; a task without a verdict in one of them is left out.

    Args:
        first: outcome in [0, 1] by task, the mean where a task has several rollouts.
        second: the same for the other evaluation.

    Raises:
        DataError: they are not over the same tasks.
    """
    if not first.index.equals(second.index):
        raise DataError(
            f"Not comparable task by task: {len(first)} and {len(second)} tasks. Choose evaluations of the same tasks."
        )
    both = first.notna() & second.notna()
    a, b = first[both], second[both]
    if a.empty:
        return Difference(0.0, 0.0, 0.0, 1.0, 0, 0)
    low, high = paired_bootstrap(a, b)
    points = 100 * (b - a).sum() / len(a)
    return Difference(points, 100 * low, 100 * high, mcnemar(a, b), int((b > a).sum()), int((b < a).sum()))
