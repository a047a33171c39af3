"""Questions with their gold query: constructs (what is asked) crossed with phrasing families (how it is said).

A construct draws the slots of its query (``constructs.toml``) and the parts of a sentence from a domain with rows; a
frame of the family joins the parts (`pocket.phrasing`). `draw` is deterministic in the state of its random generator.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from pocket.domains import Domain, read_toml
from pocket.phrasing import EVERYDAY, FAMILIES, FRAMES, OPERATIONS, Filler, QuestionBuilder, Skip, literal, plural, say

_EVERYDAY_FRAME = 0.98
"""Probability that families other than A use a frame of A: there are too many frames to learn each of them from a few
hundred rollouts."""
_PLURAL_ONLY = re.compile(r"\b(that (have|are|do|cost|weigh|stand)|which|who|their|coming|[a-z]+ers)\b")
"""Words that cannot describe a single row."""


@dataclass(frozen=True)
class Question:
    """A question with its gold query, not yet executed."""

    text: str
    sql: str
    construct: str
    keys: str = ""
    """A query whose rows must all differ, or ties would decide the order; '' for a query without order."""


Slots = dict[str, Any]
"""Values that fill a gold query; the sentence's slots are put into the scope."""


@dataclass(frozen=True)
class Construct:
    """One kind of query, as ``constructs.toml`` describes it."""

    name: str
    weight: int
    level: int
    form: str
    sql: str
    keys: str
    build: Callable[[QuestionBuilder], Slots]


# ---- one table ------------------------------------------------------------------------------------------------------


def _count(s: QuestionBuilder) -> Slots:
    t = s.entity()
    s.about(t)
    return {"t": t}


def _count_where(s: QuestionBuilder) -> Slots:
    t = s.entity()
    phrase, where, _ = s.condition(t)
    s.about(t, phrase)
    return {"t": t, "where": where}


def _select(s: QuestionBuilder) -> Slots:
    t = s.entity()
    return {"t": t, "cols": ", ".join(s.shown(t, counts=(1, 1, 2, 2, 3)))}


def _select_where(s: QuestionBuilder) -> Slots:
    t = s.entity()
    cols = s.shown(t, counts=(1, 1, 1, 2))
    phrase, where, column = s.condition(t, kinds="ncciirryd")
    if column in cols and " = " in where:
        raise Skip
    s.about(t, phrase)
    if s.domain.field(t, column).kind == "name":
        s.form = "one"
        s.put(S=s.slots["s"])
    return {"t": t, "cols": ", ".join(cols), "where": where}


def _negation(s: QuestionBuilder) -> Slots:
    t = s.entity()
    column = s.column(t, "c", nulls=False)
    value = s.value(t, column)
    cols = s.shown(t, counts=(1, 1, 2))
    if column in cols:
        raise Skip
    s.about(t, s.text(t, column, value, "is_not"))
    return {"t": t, "cols": ", ".join(cols), "column": column, "value": literal(value)}


def _two(s: QuestionBuilder, joint: str) -> Slots:
    """Draw two conditions that some row meets; slot ``S`` says them, ``cols`` and ``COLS`` name another column."""
    t = s.entity()
    row = s.rng.randrange(len(s.domain.rows[t]))
    phrase, first, column = s.condition(t, row=row)
    also, second, other = s.condition(t, avoid=column, row=row)
    shown = s.shown(t)[0]
    if shown in (column, other):
        raise Skip
    s.about(t, f"{phrase} {joint} {also}")
    return {"t": t, "shown": shown, "first": first, "second": second}


def _between(s: QuestionBuilder) -> Slots:
    t = s.entity()
    column = s.column(t, "iryd")
    low, high = sorted((s.value(t, column), s.value(t, column)))
    if low == high:
        raise Skip
    s.about(t, s.between(t, column, low, high))
    return {"t": t, "shown": s.shown(t, "nc")[0], "column": column, "low": literal(low), "high": literal(high)}


def _like(s: QuestionBuilder, operation: str) -> Slots:
    t = s.entity()
    column = s.column(t, "n")
    words = str(s.value(t, column)).split()
    word, front = (s.rng.choice(words), "%") if operation == "contains" else (words[0], "")
    s.about(t, s.said_of(t, column, operation, word))
    return {"t": t, "shown": s.shown(t, "nciy")[0], "column": column, "pattern": literal(f"{front}{word}%")}


def _missing(s: QuestionBuilder) -> Slots:
    t = s.entity()
    names = [f.name for f in s.domain.tables[t] if f.nullable]
    if not names:
        raise Skip
    column = s.rng.choice(names)
    s.about(t, s.said_of(t, column, "missing"))
    shown = s.shown(t, "nc")[0]
    if shown == column:
        raise Skip
    return {"t": t, "shown": shown, "column": column}


def _aggregate(s: QuestionBuilder, filtered: bool = False) -> Slots:
    t = s.entity()
    column = s.column(t, "ir")
    phrase, where, used = s.condition(t) if filtered else ("", "", "")
    if used == column:
        raise Skip
    s.about(t, phrase)
    return {"t": t, "column": column, "function": s.aggregate(t, column), "where": where}


def _aggregate_two(s: QuestionBuilder) -> Slots:
    t = s.entity()
    column = s.column(t, "ir")
    first = s.aggregate(t, column)
    second = s.rng.choice([a for a in ("avg", "max", "min") if a != first])
    s.about(t)
    s.put(value=f"{s.word(first)} and {s.word(second)} {s.noun(t, column)}")
    return {"t": t, "column": column, "function": first, "second": second}


def _distinct(s: QuestionBuilder, nulls: bool = False) -> Slots:
    t = s.entity()
    column = s.column(t, "cy", nulls)
    s.put(N=plural(column))
    return {"t": t, "column": column}


def _order(s: QuestionBuilder, counts: list[int], filtered: bool = False) -> Slots:
    t = s.entity()
    column = s.column(t, "iryn", nulls=False)
    cols = s.shown(t, "nc", counts)
    phrase, where, used = s.condition(t) if filtered else ("", "", "")
    if used in (column, *cols):
        raise Skip
    s.about(t, phrase)
    return {"t": t, "cols": ", ".join(cols), "column": column, "where": where, "way": s.ordering(t, column)}


def _superlative(s: QuestionBuilder) -> Slots:
    t = s.entity()
    column = s.column(t, "iry", nulls=False)
    cols = s.shown(t, "nc", (1, 1, 2))
    return {"t": t, "cols": ", ".join(cols), "column": column, "way": s.best(t, column)}


def _top_k(s: QuestionBuilder) -> Slots:
    t = s.entity()
    column, k = s.column(t, "iry", nulls=False), s.rng.choice((2, 3, 3, 4, 5))
    return {"t": t, "shown": s.label(t), "column": column, "way": s.best(t, column, str(k)), "k": k, "more": k + 1}


def _grouped(s: QuestionBuilder, kinds: str = "c") -> Slots:
    """Choose a table and the column that its rows are grouped by; slots ``n`` and ``N`` name it."""
    t = s.entity()
    column = s.column(t, kinds, nulls=False)
    s.put(n=say(column), N=plural(column))
    return {"t": t, "column": column}


def _group_count(s: QuestionBuilder) -> Slots:
    return _grouped(s, "cy")


def _group_aggregate(s: QuestionBuilder) -> Slots:
    group = _grouped(s)
    number = s.column(group["t"], "ir")
    return group | {"number": number, "function": s.aggregate(group["t"], number)}


def _group_order(s: QuestionBuilder) -> Slots:
    return _grouped(s) | {"way": s.ordering("", "")}


def _threshold(s: QuestionBuilder, table: str, column: str) -> tuple[str, str]:
    sizes = sorted(set(Counter(s.domain.values(table, column)).values()))
    operator, k = s.rng.choice((">=", ">", "<")), max(2, s.rng.choice(sizes))
    word = s.word(f"count.{OPERATIONS[operator]}")
    return word.format(v=k) if "{v}" in word else f"{word} {k}", f"{operator} {k}"


def _having(s: QuestionBuilder) -> Slots:
    group = _grouped(s)
    phrase, having = _threshold(s, group["t"], group["column"])
    s.put(op=phrase)
    return group | {"having": having}


def _most_common(s: QuestionBuilder) -> Slots:
    return _grouped(s) | {"way": s.quantity_of()}


def _above_average(s: QuestionBuilder, show: bool = True) -> Slots:
    t = s.entity()
    column, operator = s.column(t, "ir"), s.rng.choice("><")
    shown = s.shown(t, "nc")[0] if show else ""
    s.about(t, s.above(t, column, operator))
    return {"t": t, "shown": shown, "column": column, "operator": operator}


_COMBINE: dict[str, Callable[[set, set, set], set]] = {
    "INTERSECT": lambda _, above, below: above & below,
    "EXCEPT": lambda every, above, _: every - above,
    "UNION": lambda _, above, below: above | below,
}


def _telling_cuts(s: QuestionBuilder, table: str, column: str, number: str, operation: str) -> list[tuple]:
    """Find pairs of numbers whose gold query gives another result than its halves and its neighbours; few do."""
    pair = [[f.name for f in s.domain.tables[table]].index(name) for name in (number, column)]
    rows: list[tuple[Any, Any]] = [(row[pair[0]], row[pair[1]]) for row in s.domain.rows[table]]
    every, rows = {text for _, text in rows}, [row for row in rows if row[0] is not None]
    values = sorted({value for value, _ in rows})
    combine, pairs = _COMBINE[operation], []
    for j, high in enumerate(values[:-1]):
        above, from_high = ({text for v, text in rows if v > bound} for bound in (high, values[max(0, j - 1)]))
        for i, low in enumerate(values[1:j], 1):
            below, to_low = ({text for v, text in rows if v < bound} for bound in (low, values[i + 1]))
            wrong = [(from_high, below), (every, below)]
            wrong += [(above, to_low), (above, every)] if operation != "EXCEPT" else []
            result = combine(every, above, below)
            if result and result not in (above, below, *(combine(every, *other) for other in wrong)):
                pairs.append((low, high))
    return pairs


def _cut(s: QuestionBuilder, operation: str) -> Slots:
    """Choose a text and a number column of a table, and two numbers that divide its rows."""
    t = s.entity()
    column, number = s.column(t, "c", nulls=False), s.column(t, "iry")
    low, high = sorted(s.rng.sample(s.domain.values(t, number), 2))
    if s.telling:
        pairs = _telling_cuts(s, t, column, number, operation)
        low, high = s.rng.choice(pairs) if pairs else (low, low)
    if low == high:
        raise Skip
    s.put(N=plural(column), cond=s.number(t, number, ">", high), cond2=s.number(t, number, "<", low))
    return {"t": t, "column": column, "number": number, "low": low, "high": high}


# ---- several tables -------------------------------------------------------------------------------------------------


def _named_rows(s: QuestionBuilder, table: str) -> tuple[str, str]:
    """Pick rows of a table by a text ("stadiums in Paris", "the stadium named X"), with the condition."""
    column = s.column(table, "nc")
    value = s.value(table, column)
    phrase = s.text(table, column, value)
    if s.domain.field(table, column).kind == "name":
        return f"the {say(table)} {phrase}", f"{column} = {literal(value)}"
    return f"{plural(table)} {phrase}", f"{column} = {literal(value)}"


def _link(s: QuestionBuilder, needs_id: bool = True) -> tuple[str, str, Slots]:
    """Choose a table and the one that it refers to; return slots for both."""
    child, column, parent, key = s.link(needs_id)
    joined = f"{child} AS T1 JOIN {parent} AS T2 ON T1.{column} = T2.{key}"
    return child, parent, {"child": child, "column": column, "parent": parent, "key": key, "joined": joined}


def _not_in(s: QuestionBuilder, show: bool = True) -> Slots:
    child, parent, link = _link(s, needs_id=False)
    s.about(parent, s.word("lacking").format(T=plural(child), t=say(child)))
    return link | {"label": s.label(parent) if show else ""}


def _in_subquery(s: QuestionBuilder) -> Slots:
    child, parent, link = _link(s)
    phrase, where, _ = s.condition(child)
    s.about(parent, s.word("owning").format(T=f"{plural(child)} {phrase}"))
    return link | {"label": s.label(parent), "where": where}


def _join(s: QuestionBuilder) -> Slots:
    child, parent, link = _link(s)
    a, b = s.column(child, "nciryd"), s.column(parent, "nciryd")
    s.put(a=s.noun(child, a), b=s.noun(parent, b))
    return link | {"a": a, "b": b}


def _join_where(s: QuestionBuilder, show: bool = True) -> Slots:
    child, parent, link = _link(s)
    a = s.shown(child)[0] if show else ""
    rows, where = _named_rows(s, parent)
    s.about(child, f"{s.relation(child, link['column'])} {rows}")
    return link | {"a": a, "where": where}


def _join_parent(s: QuestionBuilder) -> Slots:
    child, parent, link = _link(s)
    b = s.shown(parent)[0]
    s.put(b=s.noun(parent, b))
    phrase, where, _ = s.condition(child, "T1.")
    s.about(child, phrase)
    return link | {"b": b, "where": where}


def _join_superlative(s: QuestionBuilder) -> Slots:
    child, parent, link = _link(s)
    b, number = s.shown(parent, "nc")[0], s.column(child, "iry", nulls=False)
    way = s.best(child, number)
    s.put(S=f"{say(parent)} {s.rng.choice(('of', 'that has', 'with'))} the {s.slots['S']}")
    return link | {"b": b, "number": number, "way": way}


def _join_group(s: QuestionBuilder) -> Slots:
    _, parent, link = _link(s, needs_id=False)
    return link | {"label": s.label(parent)}


def _join_most(s: QuestionBuilder) -> Slots:
    child, parent, link = _link(s, needs_id=False)
    b = s.label(parent) if s.rng.random() < 0.7 else s.shown(parent, "ciry")[0]
    way = s.quantity_of(0.75)
    s.put(S=f"{say(parent)} {s.rng.choice(('with', 'with', 'that has'))} {s.slots['most']} {plural(child)}")
    return link | {"b": b, "way": way}


def _join_having(s: QuestionBuilder) -> Slots:
    child, parent, link = _link(s, needs_id=False)
    phrase, having = _threshold(s, child, link["column"])
    s.about(parent, s.word("count").format(op=phrase, C=plural(child)))
    return link | {"label": s.label(parent), "having": having}


def _join_aggregate(s: QuestionBuilder) -> Slots:
    child, parent, link = _link(s)
    number, label = s.column(child, "ir"), s.label(parent)
    return link | {"label": label, "number": number, "function": s.aggregate(child, number)}


def _join_three(s: QuestionBuilder) -> Slots:
    links = s.domain.links()
    pairs = [(x, y) for x in links for y in links if x[0] == y[0] and x[2] != y[2]]
    if not pairs:
        raise Skip
    (child, first, left, left_key), (_, second, right, right_key) = s.rng.choice(pairs)
    b = s.shown(left, "nc")[0]
    rows, where = _named_rows(s, right)
    s.about(left, f"{s.rng.choice(('with', 'that have'))} {plural(child)} {s.relation(child, second)} {rows}")
    joined = f"{child} AS T1 JOIN {left} AS T2 ON T1.{first} = T2.{left_key}"
    return {"joined": joined, "b": b, "other": right, "second": second, "other_key": right_key, "where": where}


# ---- drawing --------------------------------------------------------------------------------------------------------


def _read_constructs() -> dict[str, Construct]:
    constructs = {}
    for name, options in read_toml("constructs.toml").items():
        build = globals()[f"_{options.pop('draw', name)}"]
        fields = {key: options.pop(key, "") for key in ("weight", "level", "form", "sql", "keys")}
        constructs[name] = Construct(name, **fields, build=partial(build, **options))
    return constructs


CONSTRUCTS = _read_constructs()
_PICKED = ("ask", "tell", "for", "of", "all", "each", "distinct", "amount")
WEIGHTS = {c.name: c.weight for c in CONSTRUCTS.values()}
_BY_LEVEL = [[c for c in CONSTRUCTS.values() if c.level <= level] for level in range(3)]
_ASKING = ("What", "How", "Which", "Do you", "Could you")


def _sentence(scope: QuestionBuilder, frame: str) -> str:
    """Fill the slots of a frame, with a capital first letter and a closing mark."""
    slots = scope.slots
    slots |= {name: scope.word(name) for name in _PICKED if f"{{{name}}}" in frame}
    if "ask" in slots:
        many = scope.n_shown > 1 or re.search(r"\{(COLS|N)\}", frame)
        slots["ask"] = slots["ask"].format(be="are" if many else "is")
    if "{ask1}" in frame:
        slots["ask1"] = scope.word("ask").format(be="is")
    frame = scope.disturb(frame)
    for name in ("ask", "ask1", "tell"):
        if name in slots and not frame.startswith(f"{{{name}}}") and not slots[name].startswith("I "):
            slots[name] = slots[name][0].lower() + slots[name][1:]
    text = frame.format_map(slots)
    text = text[0].upper() + text[1:]
    mark = "?" if text.startswith(_ASKING) or re.search(r"\b(what (is|are)|how many)\b", text) else "."
    return text if "? " in text else text.rstrip("?.") + mark


def draw(
    domain: Domain,
    rng: Random,
    family: str,
    construct: str | None = None,
    level: int = 2,
    everyday: float = EVERYDAY,
    filler: Filler | None = None,
    late: bool = False,
    telling: bool = False,
) -> Question:
    """Draw one question on a filled domain.

    Args:
        construct: name of the construct; by default one is drawn by weight among those up to the level.
        everyday: probability that families other than A use a word of A; each of their questions has a frame or a word
            (an opening is not enough) that no earlier family has.
        filler: function that makes idle words; if given, they disturb the sentence (for pretraining).
        late: disturb the sentence more: operation words and small words are sometimes replaced by idle ones.
        telling: choose the numbers of set operations so that the result tells the query from similar ones.

    Raises:
        Skip: the construct given does not fit the domain (after 200 attempts).
    """
    pool = _BY_LEVEL[level]
    weights = [c.weight for c in pool]
    earlier = FAMILIES[: FAMILIES.index(family)]
    for _ in range(200):
        kind = CONSTRUCTS[construct] if construct else rng.choices(pool, weights)[0]
        scope = QuestionBuilder(domain, rng, family, everyday, filler, late, telling)
        try:
            slots = kind.build(scope)
        except Skip:
            continue
        frames = FRAMES[scope.form or kind.form]
        frame = rng.choice(frames["A" if rng.random() < _EVERYDAY_FRAME else family])
        if "{s}" in frame and _PLURAL_ONLY.search(scope.slots["s"]):
            continue
        new = family == "A" or all(frame not in frames[f] for f in earlier)
        text = _sentence(scope, frame)
        if new or scope.own_words_in(text):
            return Question(text, kind.sql.format(**slots), kind.name, kind.keys.format(**slots))
    raise Skip
