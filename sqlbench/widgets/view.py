"""One rollout as HTML that is complete, escaped, and legible without a kernel, without style sheets and in print.

Text of models and databases enters HTML through `Markup.format` or `Markup.join` and nowhere else: both escape it. What
colour says is also said by an element (``del``, ``ins``, ``mark``, ``u``), because GitHub drops style sheets. Long
parts are folded, never cut; of a result at most `SHOWN_ROWS` rows are shown, those that differ first.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from scipy.optimize import linear_sum_assignment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from sqlbench.agent.prompts import parse_verdict
from sqlbench.agent.trajectory import Completion, Execution, Trajectory, Transition
from sqlbench.comparison import Answer, near
from sqlbench.database.types import QueryResult
from sqlbench.sqltree import statements

SHOWN_ROWS = 100
REASONS = {
    "equal": "the result is gold's result",
    "rows_differ": "same columns, other rows",
    "columns_differ": "another number of columns",
    "order_differs": "gold's rows in another order",
    "empty_unrelated": "empty like gold's result, but about something else",
    "overlong": "an answer made the next prompt longer than allowed",
    "pred_error": "the database refused the query",
    "pred_timeout": "the query ran out of time",
    "pred_rejected": "not one read-only statement",
    "too_large": "the result is too large",
    "gold_error": "the database refused the gold query",
    "gold_timeout": "the gold query ran out of time",
    "gold_rejected": "the gold query is not one read-only statement",
    "gold_too_large": "the gold result is too large",
    "no_database": "no database to score on",
    "no_gold": "no gold query to compare with",
}
"""What each reason code of `sqlbench.reward.Verdict` means."""
OUTCOMES = {"right": "✓", "wrong": "✗", "failed": "!", "not scored": "?"}

# Okabe-Ito blue is gold, vermillion is the prediction; dark text on the light marks in every theme.
STYLE = Markup("""<style>
div.sqlbench {font-size: 13px; line-height: 1.45; color: var(--jp-content-font-color1, inherit); max-width: 1250px}
div.sqlbench pre {margin: 2px 0; padding: 5px 8px; font: 12px/1.45 monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; word-break: normal; background: var(--jp-layout-color2, #f4f4f4); color: inherit; border: 0}
div.sqlbench table {border-collapse: collapse; font-size: 12px; margin: 2px 0; table-layout: auto}
div.sqlbench th, div.sqlbench td {padding: 2px 8px; border: 1px solid #bbb; text-align: left !important;
  white-space: pre-wrap; overflow-wrap: break-word; word-break: normal; max-width: 420px; vertical-align: top}
div.sqlbench td.number {text-align: right !important; font-variant-numeric: tabular-nums}
div.sqlbench .scroll {max-height: 340px; overflow: auto}
div.sqlbench .pair {display: flex; flex-wrap: wrap; gap: 16px}
div.sqlbench .pair > div {flex: 1 1 320px; min-width: 0}
div.sqlbench h4 {margin: 12px 0 3px; font-size: 13px; font-weight: bold}
div.sqlbench ol {margin: 0; padding-left: 22px}
div.sqlbench li {margin-bottom: 7px}
div.sqlbench summary {cursor: pointer; color: var(--jp-content-font-color2, #555)}
div.sqlbench small, div.sqlbench i {color: var(--jp-content-font-color2, #555)}
div.sqlbench mark, div.sqlbench del, div.sqlbench ins {color: #111; border-radius: 2px}
div.sqlbench mark {background: #ffd9a8; font-weight: bold}
div.sqlbench del {background: #cfe6f5; text-decoration: underline dashed #0072b2}
div.sqlbench ins {background: #ffd9a8; text-decoration: none; font-weight: bold}
div.sqlbench .cards {display: grid; grid-template-columns: repeat(auto-fill, minmax(215px, 1fr)); gap: 8px}
div.sqlbench .card {border: 1px solid #bbb; border-radius: 4px; padding: 5px 9px; min-width: 0}
div.sqlbench .card.this {border: 2px solid #0072b2}
div.sqlbench .verdict {border: 1px solid; border-radius: 3px; padding: 1px 7px; font-weight: bold}
@media print {div.sqlbench .scroll {max-height: none}}
</style>""")


def page(*parts: Markup) -> Markup:
    """Parts with the style they need; displayed alone it is a whole view."""
    return Markup('{}<div class="sqlbench">{}</div>').format(STYLE, Markup("").join(parts))


def table(columns: Sequence[Any], rows: Iterable[Sequence[Any]]) -> Markup:
    """An HTML table; cells are escaped unless they are `Markup`, numbers are set to the right."""
    head = Markup("").join(Markup("<th>{}</th>").format(column) for column in columns)
    body = Markup("").join(Markup("<tr>{}</tr>").format(Markup("").join(map(_cell, row))) for row in rows)
    return Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(head, body)


def _cell(value: Any) -> Markup:
    number = isinstance(value, int | float)
    return Markup("<td{}>{}</td>").format(Markup(' class="number"') if number else "", value)


def folded(title: str, body: Markup) -> Markup:
    """Something long behind its title."""
    return Markup("<details><summary>{}</summary>{}</details>").format(title, body)


# ---- SQL


def pretty(sql: str) -> str:
    """One query laid out over lines; text that is not exactly one parsable statement stays as it is."""
    trees = statements(sql)
    return trees[0].sql(dialect="sqlite", pretty=True) if len(trees) == 1 and trees[0] else sql


_WORD = re.compile(r"""'(?:''|[^'])*'|"(?:""|[^"])*"|\d+\.\d+|\w+|\s+|[<>!=|]+|.""", re.DOTALL)


DIFF_TOKENS = 1000
"""Longer texts are shown without marks: difflib can take the cube of their length."""


def token_diff(gold: str, pred: str) -> tuple[Markup, Markup]:
    """Both texts, with tokens that only gold has in ``del`` and those that only the prediction has in ``ins``.

    White space and the case of words do not count; text in single quotes counts as written.
    """
    sides = [_WORD.findall(text) for text in (gold, pred)]
    places = [[i for i, word in enumerate(words) if not word.isspace()] for words in sides]
    keys = [
        [words[i] if words[i].startswith("'") else words[i].lower() for i in some]
        for words, some in zip(sides, places, strict=True)
    ]
    if max(map(len, keys)) > DIFF_TOKENS:
        return Markup.escape(gold), Markup.escape(pred)
    marked: tuple[set[int], set[int]] = (set(), set())
    for kind, low, high, start, end in SequenceMatcher(None, keys[0], keys[1]).get_opcodes():
        if kind != "equal":
            marked[0].update(places[0][low:high])
            marked[1].update(places[1][start:end])
    left, right = (
        Markup("").join(Markup(f"<{tag}>{{}}</{tag}>").format(w) if i in odd else w for i, w in enumerate(words))
        for tag, words, odd in zip(("del", "ins"), sides, marked, strict=True)
    )
    return left, right


# ---- results

Cells = set[tuple[int, int]]


def differing(gold: list[tuple], pred: list[tuple], ordered: bool) -> tuple[Cells, Cells, list[tuple]]:
    """Cells (row, column) without a counterpart, in either table, and which rows stand side by side.

    Columns are paired by the values they share. Rows are paired by place where order matters, else equal rows first and
    then those with the most equal cells. The last item lists (gold row, pred row), None for no partner; those that
    differ come first unless order matters.
    """
    if rounded := near(Answer(gold), Answer(pred)):
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
        odd = [{row for row, _ in some} for some in marks]
        pairs.sort(key=lambda pair: not (pair[0] in odd[0] or pair[1] in odd[1]))
    return *marks, pairs


def _matched(scores: list[list[int]]) -> list[tuple[int, int]]:
    """The pairing of a matrix's rows with its columns that scores most, along the diagonal where scores are equal."""
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
    left = sorted(i for some in waiting.values() for i in some)
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
    """Both results beside each other; cells without a counterpart are marked unless the verdict is that they agree."""
    none: QueryResult = QueryResult("missing")
    both = [result or none for result in (gold, pred)]
    marks: tuple[Cells, Cells] = (set(), set())
    orders: list[list] = [list(range(len(result.rows))) for result in both]
    if all(result.ok for result in both) and not right:
        *found, pairs = differing(both[0].rows, both[1].rows, ordered)
        marks = found[0], found[1]
        orders = [[pair[side] for pair in pairs if pair[side] is not None] for side in (0, 1)]
    panes = [
        Markup("<div><h4>{}</h4>{}</div>").format(title, _result(result, cells, order))
        for title, result, cells, order in zip(("Gold result", "Predicted result"), both, marks, orders, strict=True)
    ]
    return Markup('<div class="pair">{}</div>').format(Markup("").join(panes))


def _result(result: QueryResult, marks: Cells, order: list[int]) -> Markup:
    if result.status == "missing":
        return Markup("<i>not at hand: the database of this run is not on this machine</i>")
    if not result.rows and not result.ok:
        return Markup("<i>{}</i><pre>{}</pre>").format(result.status, result.error or "")
    count, odd = len(result.rows), len({row for row, _ in marks})
    note = f"{count} row{'s' * (count != 1)}" + f", {odd} differ{'s' * (odd == 1)}" * (odd > 0)
    note += f"; {result.error}" if result.error else ""
    if count > SHOWN_ROWS:
        note += f"; {SHOWN_ROWS} are shown" + (", those that differ first" if marks else "")
    rows = [
        [Markup("<small>{}</small>").format(row + 1)]
        + [
            Markup("<mark>{}</mark>").format(value_text(value)) if (row, column) in marks else value_text(value)
            for column, value in enumerate(result.rows[row])
        ]
        for row in order[:SHOWN_ROWS]
    ]
    return Markup('<small>{}</small><div class="scroll">{}</div>').format(note, table(["#", *result.columns], rows))


def value_text(value: Any) -> Any:
    """A database value as a cell shows it: NULL apart from text, bytes as hexadecimal digits."""
    if value is None:
        return Markup("<i>NULL</i>")
    return f"x'{bytes(value).hex()}'" if isinstance(value, bytes | memoryview) else value


# ---- the rollout


def response_html(completion: Completion, tokenizer: Path | None) -> Markup:
    """What a model answered; tokens it was not sure of are shaded by their probability, those below 50% underlined."""
    if not completion.logprobs or not completion.response_ids:
        return Markup("<pre>{}</pre>").format(completion.text)
    pieces = _pieces(completion, tokenizer)
    parts = []
    for piece, logprob in zip(pieces or [f"#{n} " for n in completion.response_ids], completion.logprobs, strict=True):
        p = math.exp(min(logprob, 0.0))
        if p < 0.99:
            shade = f"background: rgba(0,114,178,{0.1 + 0.5 * (1 - p):.2f})"
            tag = "u" if p < 0.5 else "span"
            piece = Markup(f'<{tag} style="{shade}" title="p {p:.3f}, log {logprob:.2f}">{{}}</{tag}>').format(piece)
        parts.append(piece)
    text = Markup("") if pieces else Markup("<pre>{}</pre>").format(completion.text)
    return Markup("<pre>{}</pre>{}").format(Markup("").join(parts), text)


def _pieces(completion: Completion, tokenizer: Path | None) -> list[str]:
    """The text of each sampled token; nothing where the tokenizer at hand is not the one that they came from."""
    if tokenizer is None:
        return []
    stream, known = DecodeStream(skip_special_tokens=False), _tokenizer(tokenizer)
    pieces = [stream.step(known, number) or "" for number in completion.response_ids or []]
    return pieces if completion.text.strip() in "".join(pieces) else []


@lru_cache(4)
def _tokenizer(file: Path) -> Tokenizer:
    return Tokenizer.from_file(str(file))


def timeline_html(trajectory: Trajectory, tokenizer: Path | None = None) -> Markup:
    """Every model call with its prompt and every execution, in the order in which they happened."""
    steps: list[Transition | Execution] = [*trajectory.transitions, *trajectory.executions]
    steps.sort(key=lambda s: (s.turn, 1 if isinstance(s, Execution) else 2 * (s.agent == "check")))
    asked = {s.turn: s.completion.text.strip() for s in trajectory.transitions if s.agent != "check"}
    items = [_execution(s, asked.get(s.turn)) if isinstance(s, Execution) else _transition(s, tokenizer) for s in steps]
    shaded = any(t.completion.logprobs for t in trajectory.transitions)
    legend = (
        "shaded tokens: the darker, the less likely; unshaded 99% and above; underlined below 50%" if shaded else ""
    )
    return Markup("<small>{}</small><ol>{}</ol>").format(
        legend, Markup("").join(Markup("<li>{}</li>").format(item) for item in items)
    )


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
    messages = Markup("").join(Markup("<b>{}</b><pre>{}</pre>").format(m.role, m.content) for m in step.messages)
    title = f"prompt ({sum(len(m.content) for m in step.messages)} characters)"
    return Markup("<b>{}</b> <small>{}</small>{}{}").format(
        step.agent, ", ".join(notes), response_html(completion, tokenizer), folded(title, messages)
    )


def _execution(step: Execution, asked: str | None) -> Markup:
    sql = Markup("<pre>{}</pre>").format(pretty(step.sql)) if step.sql.strip() != asked else Markup("")
    if step.status != "ok":
        body = Markup(" <small>{}</small><pre>{}</pre>").format(step.status, step.error or "")
    else:
        known = f", the first {len(step.rows)} stored" if step.n_rows > len(step.rows) else ""
        title = f"{step.n_rows} row{'s' * (step.n_rows != 1)}{known}"
        body = folded(title, table(step.columns, [[value_text(v) for v in row] for row in step.rows]))
    return Markup("<b>execute</b>{}{}").format(sql, body)


def queries_html(trajectory: Trajectory) -> Markup:
    """Gold beside predicted query, laid out alike, with the tokens that differ marked."""
    if trajectory.pred is None:
        return Markup("<h4>Gold</h4><pre>{}</pre>").format(pretty(trajectory.gold))
    gold, pred = token_diff(pretty(trajectory.gold), pretty(trajectory.pred))
    legend = Markup("<del>only in gold</del> <ins>only in the prediction</ins>")
    return Markup(
        '<div class="pair"><div><h4>Gold</h4><pre>{}</pre></div><div><h4>Predicted</h4><pre>{}</pre></div></div>'
        "<small>{}</small>"
    ).format(gold, pred, legend if "<del>" in gold or "<ins>" in pred else "the same tokens")


def outcome(correct: bool | None, error: str | None) -> str:
    """``right``, ``wrong``, ``failed`` (something outside the policy broke) or ``not scored``."""
    if error is not None:
        return "failed"
    return "not scored" if correct is None else "right" if correct else "wrong"


def head_html(trajectory: Trajectory, notes: Iterable[str] = ()) -> Markup:
    """Question, verdict and reason of a rollout."""
    result = outcome(trajectory.correct, trajectory.error)
    words = [trajectory.db_id, trajectory.hardness, trajectory.split, trajectory.task_id, *notes]
    reason = f"{trajectory.reason}: {REASONS.get(trajectory.reason, '')}" if trajectory.reason else ""
    return Markup(
        '<h4 style="font-size: 15px">{}</h4><span class="verdict">{} {}</span> {} <small>{}</small>{}'
    ).format(
        trajectory.question,
        OUTCOMES[result],
        result,
        reason,
        " · ".join(w for w in words if w),
        Markup("<pre>{}</pre>").format(trajectory.error) if trajectory.error else "",
    )
