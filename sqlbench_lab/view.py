"""One rollout as HTML that is complete, escaped, and legible without a kernel, without style sheets and in print.

The macros of ``templates/view.html`` write it and escape every value. At most `SHOWN_ROWS` rows of a result are shown,
those that differ first. Jupyter removes scripts and style sheets from a stored notebook that it does not trust, so the
essential parts (sides abreast, marks, alignment, colours of SQL) are in elements and inline styles.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from scipy.optimize import linear_sum_assignment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from sqlbench.agent.prompts import parse_verdict
from sqlbench.agent.trajectory import Completion, Execution, Trajectory, Transition
from sqlbench.database.types import QueryResult
from sqlbench.sql_analysis import dialect_of, statements
from sqlbench.table_match import ResultTable, near

SHOWN_ROWS = 100
OUTCOMES = {"right": "✓", "wrong": "✗", "failed": "!", "not scored": "?"}

# ---- SQL


def pretty(sql: str, dialect: str = "sqlite") -> str:
    """Lay a query out over lines; text that is not exactly one parsable statement stays as it is."""
    trees = statements(sql, dialect)
    return trees[0].sql(dialect=dialect_of(dialect), pretty=True) if len(trees) == 1 and trees[0] else sql


_WORD = re.compile(r"""'(?:''|[^'])*'|"(?:""|[^"])*"|\d+\.\d+|\w+|\s+|[<>!=|]+|.""", re.DOTALL)


KEYWORDS = re.compile(
    r"(?i)(all|and|as|asc|between|by|case|cast|cross|desc|distinct|else|end|except|exists|from|full|group|having|in"
    r"|inner|intersect|into|is|join|left|like|limit|not|null|offset|on|or|order|outer|over|partition|right|select|then"
    r"|union|using|values|when|where|with)"
)
COLOURS = {"keyword": "#0550ae", "string": "#0a6640", "number": "#8250df"}
MARKS = (
    Markup('<mark style="background-color: #cfe6f5; color: #111; text-decoration: none">{}</mark>'),
    Markup('<b style="background-color: #ffd9a8; color: #111">{}</b>'),
)
"""Marks of the tokens that only gold has, and of those that only the prediction has."""
DIFF_TOKENS = 1000
"""Maximum number of tokens compared; longer texts have no marks and colours, as difflib can take cubic time."""


def sql_html(sql: str) -> Markup:
    """Colour the keywords, strings and numbers of a query."""
    words = _WORD.findall(sql)
    return Markup.escape(sql) if len(words) > DIFF_TOKENS else Markup("").join(map(_coloured, words))


def _coloured(word: str) -> Markup:
    kind = (
        "string"
        if word[0] == "'" != word
        else "number"
        if word[0].isdigit()
        else "keyword" * bool(KEYWORDS.fullmatch(word))
    )
    return Markup('<span style="color: {}">{}</span>').format(COLOURS[kind], word) if kind else Markup.escape(word)


def token_diff(gold: str, pred: str) -> tuple[Markup, Markup]:
    """Colour both queries, and mark the tokens that only gold or only the prediction has by `MARKS`.

    White space and the case of words do not count; text in single quotes counts as written.
    """
    sides = [_WORD.findall(text) for text in (gold, pred)]
    places = [[i for i, word in enumerate(words) if not word.isspace()] for words in sides]
    keys = [
        [words[i] if words[i].startswith("'") else words[i].lower() for i in indices]
        for words, indices in zip(sides, places, strict=True)
    ]
    if max(map(len, keys)) > DIFF_TOKENS:
        return Markup.escape(gold), Markup.escape(pred)
    marked: tuple[set[int], set[int]] = (set(), set())
    for kind, low, high, start, end in SequenceMatcher(None, keys[0], keys[1]).get_opcodes():
        if kind != "equal":
            marked[0].update(places[0][low:high])
            marked[1].update(places[1][start:end])
    left, right = (
        Markup("").join(mark.format(word) if i in odd else _coloured(word) for i, word in enumerate(words))
        for mark, words, odd in zip(MARKS, sides, marked, strict=True)
    )
    return left, right


# ---- results

Cells = set[tuple[int, int]]


def differing(gold: list[tuple], pred: list[tuple], ordered: bool) -> tuple[Cells, Cells, list[tuple]]:
    """Return the cells (row, column) without a counterpart in either table, and the pairs of rows side by side.

    Columns are paired by the values they share. Rows are paired by place if order matters, else equal rows first and
    then those with the most equal cells. The last item lists (gold row, pred row), None for no partner. Pairs that
    differ come first unless order matters.
    """
    if rounded := near(ResultTable(gold), ResultTable(pred)):
        gold, pred = rounded[0].rows, rounded[1].rows
    bags = [[Counter(column) for column in zip(*rows, strict=True)] for rows in (gold, pred)]
    columns = _matched([[(a & b).total() for b in bags[1]] for a in bags[0]])
    left, right = ([[row[c[side]] for c in columns] for row in rows] for side, rows in enumerate((gold, pred)))
    pairs = _pair_rows(left, right, ordered)
    marks: tuple[Cells, Cells] = (set(), set())
    for i, j in pairs:
        same = [] if None in (i, j) else [c for c in columns if gold[i][c[0]] == pred[j][c[1]]]
        for side, row in ((0, i), (1, j)):
            if row is not None:
                marks[side].update((row, c) for c in set(range(len(bags[side]))) - {c[side] for c in same})
    if not ordered:
        odd = [{row for row, _ in cells} for cells in marks]
        pairs.sort(key=lambda pair: not (pair[0] in odd[0] or pair[1] in odd[1]))
    return *marks, pairs


def _matched(scores: list[list[int]]) -> list[tuple[int, int]]:
    """Pair a matrix's rows with its columns for the highest total score, along the diagonal if scores are equal."""
    if not scores or not scores[0]:
        return []
    away = np.abs(np.subtract.outer(np.arange(len(scores)), np.arange(len(scores[0]))))
    pairs = linear_sum_assignment(np.array(scores) - 1e-6 * away, maximize=True)
    return list(zip(*(side.tolist() for side in pairs), strict=True))


def _pair_rows(gold: list[list], pred: list[list], ordered: bool) -> list[tuple]:
    if ordered:
        return list(zip_longest(range(len(gold)), range(len(pred))))
    waiting: dict[tuple, list[int]] = {}
    for i in reversed(range(len(gold))):
        waiting.setdefault(tuple(gold[i]), []).append(i)
    equal = [(waiting[tuple(row)].pop(), j) for j, row in enumerate(pred) if waiting.get(tuple(row))]
    left = sorted(i for indices in waiting.values() for i in indices)
    right = sorted(set(range(len(pred))) - {j for _, j in equal})
    likeness = [
        [sum(a == b for a, b in zip(gold[i], pred[j], strict=True)) for j in right[:SHOWN_ROWS]]
        for i in left[:SHOWN_ROWS]
    ]
    alike: list[tuple] = [(left[i], right[j]) for i, j in _matched(likeness)]
    taken, used = {i for i, _ in alike}, {j for _, j in alike}
    alone: list[tuple] = [(i, None) for i in left if i not in taken]
    alone += [(None, j) for j in right if j not in used]
    return alike + alone + sorted(equal)


def results_html(gold: QueryResult | None, pred: QueryResult | None, right: bool, ordered: bool) -> Markup:
    """Render both results side by side; cells without a counterpart are marked unless the verdict is right."""
    none: QueryResult = QueryResult("missing")
    both = [result or none for result in (gold, pred)]
    marks: tuple[Cells, Cells] = (set(), set())
    orders: list[list] = [list(range(len(result.rows))) for result in both]
    if all(result.ok for result in both) and not right:
        *cells, pairs = differing(both[0].rows, both[1].rows, ordered)
        marks = cells[0], cells[1]
        orders = [[pair[side] for pair in pairs if pair[side] is not None] for side in (0, 1)]
    panes = list(zip(("Gold result", "Predicted result"), both, marks, orders, strict=True))
    return HTML.results(panes, SHOWN_ROWS)


def value_text(value: Any) -> Any:
    """Format a database value for a cell: NULL distinct from text, bytes as hexadecimal digits."""
    if value is None:
        return Markup("<i>NULL</i>")
    return f"x'{bytes(value).hex()}'" if isinstance(value, bytes | memoryview) else value


# ---- the rollout


def response_html(completion: Completion, tokenizer: Path | None, sql: bool = True) -> Markup:
    """Render a model's answer; uncertain tokens are shaded by their probability, those below 50% underlined.

    Without probabilities the answer is coloured if it is `sql`.
    """
    text = (sql_html if sql else Markup.escape)(completion.text)
    if not completion.logprobs or not completion.response_ids:
        return HTML.response([], text)
    pieces = _pieces(completion, tokenizer)
    texts = pieces or [f"#{n} " for n in completion.response_ids]
    tokens = [(text, math.exp(min(p, 0.0)), p) for text, p in zip(texts, completion.logprobs, strict=True)]
    return HTML.response(tokens, None if pieces else text)


def _pieces(completion: Completion, tokenizer: Path | None) -> list[str]:
    """Return the text of each sampled token; empty if the tokenizer is not the one that produced the tokens."""
    if tokenizer is None:
        return []
    stream, decoder = DecodeStream(skip_special_tokens=False), _tokenizer(tokenizer)
    pieces = [stream.step(decoder, number) or "" for number in completion.response_ids or []]
    return pieces if completion.text.strip() in "".join(pieces) else []


@lru_cache(4)
def _tokenizer(file: Path) -> Tokenizer:
    return Tokenizer.from_file(str(file))


def timeline_html(trajectory: Trajectory, tokenizer: Path | None = None) -> Markup:
    """Render every model call with its prompt and every execution, in chronological order."""
    steps: list[Transition | Execution] = [*trajectory.transitions, *trajectory.executions]
    steps.sort(key=lambda s: (s.turn, 1 if isinstance(s, Execution) else 2 * (s.agent == "check")))
    answers = {s.turn: s.completion.text.strip() for s in trajectory.transitions if s.agent != "check"}
    items = [
        HTML.execution(s, answers.get(s.turn), trajectory.dialect)
        if isinstance(s, Execution)
        else _transition(s, tokenizer)
        for s in steps
    ]
    return HTML.timeline(items, any(t.completion.logprobs for t in trajectory.transitions))


def _transition(step: Transition, tokenizer: Path | None) -> Markup:
    completion = step.completion
    notes = [f"turn {step.turn}"]
    if completion.prompt_tokens is not None:
        notes.append(f"{completion.prompt_tokens} + {completion.response_tokens} tokens")
    if step.strategy:
        notes.append(f"strategy: {step.strategy}")
    if completion.flaw:
        notes.append(completion.flaw)
    if step.agent == "check":
        notes.append("verdict: correct" if parse_verdict(completion.text) else "verdict: not correct")
    return HTML.transition(step, notes, response_html(completion, tokenizer, sql=step.agent != "check"))


def outcome(correct: bool | None, error: str | None) -> str:
    """Return ``right``, ``wrong``, ``failed`` (something outside the policy broke) or ``not scored``."""
    if error is not None:
        return "failed"
    return "not scored" if correct is None else "right" if correct else "wrong"


# ---- templates

TEMPLATES = Environment(
    loader=PackageLoader("sqlbench_lab"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["shown"] = value_text
TEMPLATES.globals |= {
    "OUTCOMES": OUTCOMES,
    "outcome": outcome,
    "pretty": pretty,
    "sql_html": sql_html,
    "token_diff": token_diff,
    "MARKS": MARKS,
}
HTML: Any = TEMPLATES.get_template("view.html").module
page, box, table, folded = HTML.page, HTML.box, HTML.table, HTML.folded
