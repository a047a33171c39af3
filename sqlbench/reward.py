"""Execution match: comparison of the predicted query's answer with the gold query's.

The *reference mode* (``strict=False``) gives the verdicts of the evaluator that Spider papers report: split operators
are joined, every DISTINCT of the first statement is dropped unless `keep_distinct`, "order by" anywhere in the gold
text makes row order matter, columns may come in any order, two empty answers are equal. Three things differ on purpose:
statements run read-only, they end at a deadline, and they end at a size limit.

The *strict mode* (the default, and what training uses) closes the holes a policy could learn to use; each is a named
option of `Strictness`. A gold query that cannot be scored gives ``match=None``, never 0.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from sqlparse import tokens as T
from sqlparse.engine import FilterStack
from sqlparse.lexer import tokenize

from sqlbench.database.engine import in_thread
from sqlbench.database.types import NO_STATEMENT, Limits, QueryResult
from sqlbench.interfaces import Database
from sqlbench.table_match import ResultTable, SearchLimit, near, rows_sort_alike, same_bag, same_list

if TYPE_CHECKING:
    from sqlbench.data.tasks import Task
    from sqlbench.rollout import RolloutContext


@dataclass(frozen=True, eq=False)
class Strictness:
    """The deviations of the strict mode. `STRICT` has all of them, `REFERENCE` none.

    Two objects are two modes, even with equal options: gold answers are kept per object, whose hash is fast.
    """

    one_statement: bool = True
    """Rejection of text after the first ``;``, which the reference ignores (``gold; anything`` scores 1)."""
    keep_inner_distinct: bool = True
    """DISTINCT dropped only from ``SELECT DISTINCT`` of the outermost query; the reference also drops it inside
    ``COUNT(DISTINCT x)`` and in subqueries, where it decides the value."""
    real_empty: bool = True
    """Score of two answers without rows only for a real query over the subject of gold
    (`sqlbench.sql_analysis.same_subject`) with as many columns; in the reference any DELETE or comment scores."""
    outer_order: bool = True
    """Row order required only if the gold statement itself, not a subquery of it, ends in ORDER BY."""
    float_tolerance: bool = True
    """Equality of numbers within 1e-9 of their size: sums differ in the last bits with row order."""
    ties: bool = True
    """Any order of rows that tie under gold's ORDER BY, any of which may fill the places up to LIMIT."""
    any_number_type: bool = True
    """Equality of 1 and 1.0 in every table; the reference's first comparison rejects some of them."""


STRICT = Strictness()
REFERENCE = Strictness(False, False, False, False, False, False, False)

GOLD_ROWS = 1_000_000
"""Most rows of a gold answer that is scored."""


@dataclass(slots=True)
class Verdict:
    """Outcome of scoring one prediction."""

    match: int | None
    """1 or 0; None where the gold query itself cannot be scored."""
    reason: str
    """``equal``; wrong: ``rows_differ``, ``columns_differ``, ``order_differs``, ``empty_unrelated``; did not run:
    ``pred_error``, ``pred_timeout``, ``pred_rejected``, ``too_large``; not scored: ``gold_error``, ``gold_timeout``,
    ``gold_rejected``, ``gold_too_large``, ``no_database``."""
    pred_error: str | None = None
    ms: float = 0.0


def score(
    gold: str,
    pred: str,
    database: Database | Sequence[Database],
    *,
    strict: bool | Strictness = True,
    keep_distinct: bool = False,
    limits: Limits | None = None,
) -> Verdict:
    """Judge one prediction; over several databases (a test suite) it has to match on each.

    Gold answers are kept per process by content of the database, gold text and mode.
    """
    start = time.perf_counter()
    rules = strict if isinstance(strict, Strictness) else STRICT if strict else REFERENCE
    if not isinstance(database, Sequence):
        verdict = _score(gold, pred, database, rules, keep_distinct, limits or database.limits)
    else:
        verdict = Verdict(None, "no_database", "no database to score on")
        for one in database:
            verdict = _score(gold, pred, one, rules, keep_distinct, limits or one.limits)
            if verdict.match != 1:
                break
    verdict.ms = (time.perf_counter() - start) * 1000
    return verdict


async def score_async(gold: str, pred: str, database: Database, *, strict: bool = True) -> Verdict:
    """Judge one prediction as `score` does, in a database thread, so that the event loop is not blocked."""
    return await in_thread(lambda: score(gold, pred, database, strict=strict))


async def execution_match(task: Task, context: RolloutContext) -> int | None:
    """Return 1 where the final query of a rollout gives gold's result, else 0: the built-in reward."""
    return (await score_async(task.gold, context.sql or "", context.database, strict=context.config.strict)).match


def runs(task: Task, context: RolloutContext) -> float:
    """Return 1 where the final query of a rollout ran, else 0: a control that does not look at the question."""
    return float(next((e.answered for e in reversed(context.executions) if e.sql == context.sql), False))


def _score(gold: str, pred: str, database: Database, rules: Strictness, keep_distinct: bool, limits: Limits) -> Verdict:
    answer = _gold_answer(gold, database, rules, keep_distinct, limits)
    if answer.problem:
        return Verdict(None, answer.problem, answer.result.error)
    statement = prepare(pred, rules, keep_distinct)
    if statement is None:
        return Verdict(0, "pred_rejected", NO_STATEMENT)
    result = _run(database, statement, answer.pred_limits)
    if result.status != "ok":
        if result.error == NO_STATEMENT and not rules.real_empty:
            result = QueryResult("ok")
        elif result.status == "too_large" and len(result.rows) > len(answer.result.rows):
            result.status = "ok"  # one row more than gold decides it
        else:
            reason = "too_large" if result.status == "too_large" else f"pred_{result.status}"
            return Verdict(0, reason, result.error)
    try:
        reason = answer.compare(result, pred)
    except SearchLimit:
        return Verdict(0, "too_large", "too many column orders to compare")
    return Verdict(int(reason == "equal"), reason)


def _run(database: Database, sql: str, limits: Limits) -> QueryResult:
    """Run a statement on the content that the gold answer belongs to, where the database can tell."""
    return getattr(database, "execute_unchecked", database.execute)(sql, limits)


def _with_rows(limits: Limits, rows: int) -> Limits:
    return Limits(limits.seconds, rows, limits.result_bytes)


class _Gold:
    """One gold query's answer on one database, with values derived for comparisons."""

    def __init__(self, gold: str, database: Database, rules: Strictness, keep_distinct: bool, limits: Limits) -> None:
        self.gold, self.database, self.rules, self.limits = gold, database, rules, limits
        self.statement = prepare(gold, rules, keep_distinct)
        if self.statement is None:
            self.result = QueryResult("rejected", error=NO_STATEMENT)
        else:
            self.result = _run(database, self.statement, _with_rows(limits, max(GOLD_ROWS, limits.rows)))
            if self.result.error == NO_STATEMENT and not rules.real_empty:
                self.result = QueryResult("ok")
        self.problem = None if self.result.ok else f"gold_{self.result.status}"
        self.answer = ResultTable(self.result.rows)
        self.pred_limits = _with_rows(limits, len(self.result.rows) + 1)
        self.cells = 50 + len(self.result.rows) * len(self.result.columns)

    @cached_property
    def ordered(self) -> bool:
        """Tell whether the order of rows matters."""
        text = (self.statement or "").lower()
        if self.rules.outer_order and "order" in text:
            from sqlbench.sql_analysis import outer_order

            order = outer_order(self.statement or "", self.database.dialect)
            if order is not None:
                return order
        return "order by" in text

    def compare(self, result: QueryResult, pred: str) -> str:
        """Return the reason code for a prediction's answer."""
        gold_rows, pred_rows = self.result.rows, result.rows
        if not gold_rows and not pred_rows:
            return "equal" if not self.rules.real_empty or self._is_real(result, pred) else "empty_unrelated"
        if self.rules.any_number_type and gold_rows == pred_rows:
            return "equal"
        if len(result.columns) != len(self.result.columns):
            return "columns_differ"
        if len(gold_rows) != len(pred_rows):
            return "rows_differ"
        pairs = [(self.answer, ResultTable(pred_rows))]
        same = same_list if self.ordered else same_bag
        if same(*pairs[0]):
            if self.rules.any_number_type or self._sort_alike(pred_rows):
                return "equal"
            return "rows_differ"
        if self.rules.float_tolerance and (rounded := near(*pairs[0])):
            if same(*rounded):
                return "equal"
            pairs.append(rounded)
        if self.ordered and self.rules.ties and self._matches_with_ties(pred_rows):
            return "equal"
        return "order_differs" if self.ordered and any(same_bag(*pair) for pair in pairs) else "rows_differ"

    def _is_real(self, result: QueryResult, pred: str) -> bool:
        from sqlbench.sql_analysis import same_subject

        same_width = len(result.columns) == len(self.result.columns)
        return same_width and (pred == self.gold or same_subject(self.gold, pred, self.database.dialect))

    def _sort_alike(self, pred_rows: list[tuple]) -> bool:
        """Compare as the reference first does, but only where that can differ from equality: numbers of two types."""
        if self.answer.width == 1 or not (self.answer.has_whole_floats or ResultTable(pred_rows).has_whole_floats):
            return True
        return rows_sort_alike(self.result.rows, pred_rows, self.ordered)

    def _matches_with_ties(self, pred_rows: list[tuple]) -> bool:
        if self._blocks is None:
            return False
        gold, pred = self._blocks, ResultTable(pred_rows, self._places)
        if same_bag(gold, pred):
            return True
        rounded = near(gold, pred) if self.rules.float_tolerance else None
        return rounded is not None and same_bag(*rounded)

    @cached_property
    def _places(self) -> list[int]:
        """Return the block of each place of the gold answer; set with `_blocks`."""
        return []

    @cached_property
    def _blocks(self) -> ResultTable | None:
        """Return every row possible in the gold answer, labelled with its block of ties; None without any ties."""
        from sqlbench.sql_analysis import with_order_keys

        keyed = with_order_keys(self.statement or "", self.result.columns, self.database.dialect)
        if keyed is None:
            return None
        full = _run(self.database, keyed.sql, _with_rows(self.limits, GOLD_ROWS))
        width, size = len(self.result.columns), len(self.result.rows)
        rows = [row[:width] for row in full.rows]
        if not full.ok or rows[keyed.offset : keyed.offset + size] != self.result.rows:
            return None
        labels: list[int] = []
        last, number = None, -1
        for row in full.rows:
            key = tuple([row[k] for k in keyed.keys])
            number += key != last or number < 0
            labels.append(number)
            last = key
        self._places = labels[keyed.offset : keyed.offset + size]
        wanted = set(self._places)
        labelled = [(row, label) for row, label in zip(rows, labels, strict=True) if label in wanted]
        if len(wanted) == len(labelled):  # every row alone in its block
            return None
        return ResultTable([row for row, _ in labelled], [label for _, label in labelled])


# ---- gold answers, kept per process

_CACHED_CELLS = 5_000_000
_cache: OrderedDict[tuple, _Gold] = OrderedDict()
_cache_lock = threading.Lock()
_cached_cells = 0


def _gold_answer(gold: str, database: Database, rules: Strictness, keep_distinct: bool, limits: Limits) -> _Gold:
    global _cached_cells
    key = (database.refresh(), gold, rules, keep_distinct)
    answer = _cache.get(key)
    if answer is not None and (answer.limits is limits or answer.limits == limits):
        return answer
    answer = _Gold(gold, database, rules, keep_distinct, limits)
    if answer.problem == "gold_timeout":  # perhaps only this time
        return answer
    with _cache_lock:
        if replaced := _cache.pop(key, None):
            _cached_cells -= replaced.cells
        _cache[key] = answer
        _cached_cells += answer.cells
        while _cached_cells > _CACHED_CELLS:
            _cached_cells -= _cache.popitem(last=False)[1].cells
    return answer


def clear_gold_cache() -> None:
    """Forget all gold answers of this process."""
    global _cached_cells
    with _cache_lock:
        _cache.clear()
        _cached_cells = 0


# ---- text

LONG_TEXT = 10_000
_CURRENT_YEAR = re.compile(r"YEAR\s*\(\s*CURDATE\s*\(\s*\)\s*\)\s*", re.IGNORECASE)
_GO = re.compile(r"\bgo\b")
"""Word at which sqlparse ends a statement too."""


def prepare(sql: str, rules: Strictness = STRICT, keep_distinct: bool = False) -> str | None:
    """Return the statement to run for a query; None if the reference finds no statement at all.

    A text of more than `LONG_TEXT` characters is run unchanged: sqlparse can take time quadratic in its length.
    """
    if len(sql) > LONG_TEXT:
        return sql
    sql = sql.replace("> =", ">=").replace("< =", "<=").replace("! =", "!=")
    text = sql.lower()
    if not (rules.one_statement or keep_distinct):
        if not text.strip():
            return None
        if ";" in text.rstrip()[:-1] or ("go" in text and _GO.search(text)):
            first = next(FilterStack().run(sql), None)
            if first is None:
                return None
            sql = str(first)
    if not keep_distinct and "distinct" in text:
        sql = _drop_distinct(sql, rules.keep_inner_distinct)
    return _CURRENT_YEAR.sub("2020", sql) if "curdate" in text else sql


_WORDS = re.compile(r"'(?:''|[^'])*'|\"(?:\"\"|[^\"])*\"|\w+|\s+|.", re.DOTALL)
_DISTINCT = re.compile(r"('(?:''|[^'])*'|\"(?:\"\"|[^\"])*\")|\bdistinct\b", re.IGNORECASE)
_ODD = ("\\", "--", "/*", "#", "$", "`", "[", "@", "{")
"""Marks without which the two patterns find the same words in a text as sqlparse's lexer, many times faster."""


def _tokens(sql: str) -> list[tuple[bool, str]]:
    """Split a text into tokens, each with whether it is space or a comment; joined, the tokens are the text."""
    if any(odd in sql for odd in _ODD):
        return [(kind in T.Whitespace or kind in T.Comment, value) for kind, value in tokenize(sql)]
    return [(value.isspace(), value) for value in _WORDS.findall(sql)]


def _drop_distinct(sql: str, keep_inner: bool) -> str:
    """Remove the DISTINCT tokens of a text: all of them, or only those of the outermost SELECTs."""
    if not keep_inner and not any(odd in sql for odd in _ODD):
        return _DISTINCT.sub(lambda found: found[1] or "", sql)
    tokens = _tokens(sql)
    if not keep_inner:
        return "".join([value for _, value in tokens if value.lower() != "distinct"])
    parts, depth, before = [], 0, ""
    for i, (space, value) in enumerate(tokens):
        word = value.lower()
        if word == "distinct" and depth == 0 and before == "select":
            following = next((v.lower() for skip, v in tokens[i + 1 :] if not skip), "")
            if following != "on":  # PostgreSQL's DISTINCT ON differs
                continue
        depth += (value == "(") - (value == ")")
        if not space:
            before = word
        parts.append(value)
    return "".join(parts)
