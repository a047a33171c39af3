"""Questions with their gold query: constructs (what is asked) crossed with phrasing families (how it is said).

A construct builds the query and the parts of a sentence from a domain with rows; a frame of the family joins the parts
(`pocket.phrasing`). `draw` is deterministic in the state of its random generator.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from pocket.domains import Domain
from pocket.phrasing import EVERYDAY, FAMILIES, FRAMES, OPERATIONS, Filler, Scope, Skip, literal, plural, say

_EVERYDAY_FRAME = 0.98
"""How often families other than A use a frame of A: there are too many frames to learn each of them from a few hundred
rollouts."""
_PLURAL_ONLY = re.compile(r"\b(that (have|are|do|cost|weigh|stand)|which|who|their|coming|[a-z]+ers)\b")
"""Words that a row in the singular cannot be described by."""


@dataclass(frozen=True)
class Draft:
    """A question with its gold query, before anything was executed."""

    question: str
    sql: str
    construct: str
    keys: str = ""
    """A query whose rows must all differ, or ties would decide the order; '' where there is no order."""


Builder = Callable[[Scope], str]


@dataclass(frozen=True)
class Construct:
    """One kind of query: how often it is drawn, the curriculum level at which it comes in, and its form of sentence."""

    name: str
    weight: int
    level: int
    form: str
    build: Builder


CONSTRUCTS: dict[str, Construct] = {}


def _construct(weight: int, level: int, form: str) -> Callable[[Builder], Builder]:
    def register(build: Builder) -> Builder:
        name = build.__name__.strip("_")
        CONSTRUCTS[name] = Construct(name, weight, level, form, build)
        return build

    return register


# ---- one table ------------------------------------------------------------------------------------------------------


@_construct(2, 0, "count")
def _count(s: Scope) -> str:
    t = s.entity()
    s.about(t)
    return f"SELECT count(*) FROM {t}"


@_construct(5, 1, "count")
def _count_where(s: Scope) -> str:
    t = s.entity()
    said, where, _ = s.condition(t)
    s.about(t, said)
    return f"SELECT count(*) FROM {t} WHERE {where}"


@_construct(5, 0, "every")
def _select(s: Scope) -> str:
    t = s.entity()
    return f"SELECT {', '.join(s.shown(t, counts=(1, 1, 2, 2, 3)))} FROM {t}"


@_construct(8, 1, "list")
def _select_where(s: Scope) -> str:
    t = s.entity()
    cols = s.shown(t, counts=(1, 1, 1, 2))
    said, where, column = s.condition(t, kinds="ncciirryd")
    if column in cols and " = " in where:
        raise Skip
    s.about(t, said)
    if s.domain.field(t, column).kind == "name":
        s.form = "one"
        s.put(S=s.slots["s"])
    return f"SELECT {', '.join(cols)} FROM {t} WHERE {where}"


@_construct(2, 1, "list")
def _negation(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "c", nulls=False)
    value = s.value(t, column)
    cols = s.shown(t, counts=(1, 1, 2))
    if column in cols:
        raise Skip
    s.about(t, s.text(t, column, value, "is_not"))
    return f"SELECT {', '.join(cols)} FROM {t} WHERE {column} != {literal(value)}"


def _two(s: Scope, joint: str) -> tuple[str, str, str, str]:
    """Two conditions that some row meets; slot ``S`` says them, slots ``cols`` and ``COLS`` name another column."""
    t = s.entity()
    row = s.rng.randrange(len(s.domain.rows[t]))
    said, first, column = s.condition(t, row=row)
    also, second, other = s.condition(t, avoid=column, row=row)
    shown = s.shown(t)[0]
    if shown in (column, other):
        raise Skip
    s.about(t, f"{said} {joint} {also}")
    return t, shown, first, second


@_construct(4, 1, "list")
def _where_and(s: Scope) -> str:
    t, shown, first, second = _two(s, "and")
    return f"SELECT {shown} FROM {t} WHERE {first} AND {second}"


@_construct(3, 1, "list")
def _where_or(s: Scope) -> str:
    t, shown, first, second = _two(s, "or")
    return f"SELECT {shown} FROM {t} WHERE {first} OR {second}"


@_construct(2, 1, "count")
def _count_and(s: Scope) -> str:
    t, _, first, second = _two(s, "and")
    return f"SELECT count(*) FROM {t} WHERE {first} AND {second}"


@_construct(3, 1, "list")
def _between(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "iryd")
    low, high = sorted((s.value(t, column), s.value(t, column)))
    if low == high:
        raise Skip
    s.about(t, s.between(t, column, low, high))
    return f"SELECT {s.shown(t, 'nc')[0]} FROM {t} WHERE {column} BETWEEN {literal(low)} AND {literal(high)}"


@_construct(2, 1, "list")
def _contains(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "n")
    word = s.rng.choice(str(s.value(t, column)).split())
    s.about(t, s.said_of(t, column, "contains", word))
    return f"SELECT {s.shown(t, 'nciy')[0]} FROM {t} WHERE {column} LIKE {literal('%' + word + '%')}"


@_construct(2, 1, "list")
def _prefix(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "n")
    word = str(s.value(t, column)).split()[0]
    s.about(t, s.said_of(t, column, "prefix", word))
    return f"SELECT {s.shown(t, 'nciy')[0]} FROM {t} WHERE {column} LIKE {literal(word + '%')}"


@_construct(2, 1, "list")
def _missing(s: Scope) -> str:
    t = s.entity()
    names = [f.name for f in s.domain.tables[t] if f.nullable]
    if not names:
        raise Skip
    column = s.rng.choice(names)
    s.about(t, s.said_of(t, column, "missing"))
    shown = s.shown(t, "nc")[0]
    if shown == column:
        raise Skip
    return f"SELECT {shown} FROM {t} WHERE {column} IS NULL"


@_construct(4, 0, "value")
def _aggregate(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "ir")
    s.about(t)
    return f"SELECT {s.aggregate(t, column)}({column}) FROM {t}"


@_construct(3, 1, "value")
def _aggregate_two(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "ir")
    first = s.aggregate(t, column)
    second = s.rng.choice([a for a in ("avg", "max", "min") if a != first])
    s.about(t)
    s.put(value=f"{s.word(first)} and {s.word(second)} {s.noun(t, column)}")
    return f"SELECT {first}({column}), {second}({column}) FROM {t}"


@_construct(4, 1, "value")
def _aggregate_where(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "ir")
    said, where, used = s.condition(t)
    if used == column:
        raise Skip
    s.about(t, said)
    return f"SELECT {s.aggregate(t, column)}({column}) FROM {t} WHERE {where}"


@_construct(3, 0, "distinct")
def _distinct(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "cy", nulls=False)
    s.put(N=plural(column))
    return f"SELECT DISTINCT {column} FROM {t}"


@_construct(3, 1, "count_distinct")
def _count_distinct(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "cy")
    s.put(N=plural(column))
    return f"SELECT count(DISTINCT {column}) FROM {t}"


@_construct(4, 1, "order")
def _order(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "iryn", nulls=False)
    cols = s.shown(t, "nc", (1, 1, 2))
    s.keys = f"SELECT {column} FROM {t}"
    s.about(t)
    return f"SELECT {', '.join(cols)} FROM {t} ORDER BY {column} {s.ordering(t, column)}"


@_construct(2, 2, "order")
def _where_order(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "iryn", nulls=False)
    shown = s.shown(t, "nc")[0]
    said, where, used = s.condition(t)
    if used in (column, shown):
        raise Skip
    s.about(t, said)
    s.keys = f"SELECT {column} FROM {t} WHERE {where}"
    return f"SELECT {shown} FROM {t} WHERE {where} ORDER BY {column} {s.ordering(t, column)}"


@_construct(4, 1, "one")
def _superlative(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "iry", nulls=False)
    cols = s.shown(t, "nc", (1, 1, 2))
    way = s.best(t, column)
    s.keys = f"SELECT {column} FROM {t} ORDER BY {column} {way} LIMIT 2"
    return f"SELECT {', '.join(cols)} FROM {t} ORDER BY {column} {way} LIMIT 1"


@_construct(3, 1, "top")
def _top_k(s: Scope) -> str:
    t = s.entity()
    column, k = s.column(t, "iry", nulls=False), s.rng.choice((2, 3, 3, 4, 5))
    shown = s.label(t)
    way = s.best(t, column, str(k))
    s.keys = f"SELECT {column} FROM {t} ORDER BY {column} {way} LIMIT {k + 1}"
    return f"SELECT {shown} FROM {t} ORDER BY {column} {way} LIMIT {k}"


@_construct(4, 1, "group_count")
def _group_count(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "cy", nulls=False)
    s.put(n=say(column), N=plural(column))
    return f"SELECT {column}, count(*) FROM {t} GROUP BY {column}"


@_construct(4, 1, "group_value")
def _group_aggregate(s: Scope) -> str:
    t = s.entity()
    column, number = s.column(t, "c", nulls=False), s.column(t, "ir")
    s.put(n=say(column), N=plural(column))
    return f"SELECT {column}, {s.aggregate(t, number)}({number}) FROM {t} GROUP BY {column}"


@_construct(2, 2, "group_order")
def _group_order(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "c", nulls=False)
    s.put(n=say(column), N=plural(column))
    s.keys = f"SELECT count(*) FROM {t} GROUP BY {column}"
    return f"SELECT {column}, count(*) FROM {t} GROUP BY {column} ORDER BY count(*) {s.ordering('', '')}"


def _threshold(s: Scope, table: str, column: str) -> tuple[str, str]:
    sizes = sorted(set(Counter(s.domain.values(table, column)).values()))
    operator, k = s.rng.choice((">=", ">", "<")), max(2, s.rng.choice(sizes))
    word = s.word(f"count.{OPERATIONS[operator]}")
    return word.format(v=k) if "{v}" in word else f"{word} {k}", f"{operator} {k}"


@_construct(3, 1, "having")
def _having(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "c", nulls=False)
    said, having = _threshold(s, t, column)
    s.put(N=plural(column), op=said)
    return f"SELECT {column} FROM {t} GROUP BY {column} HAVING count(*) {having}"


@_construct(3, 1, "most_common")
def _most_common(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "c", nulls=False)
    s.put(n=say(column))
    way = s.quantity_of()
    s.keys = f"SELECT count(*) FROM {t} GROUP BY {column} ORDER BY count(*) {way} LIMIT 2"
    return f"SELECT {column} FROM {t} GROUP BY {column} ORDER BY count(*) {way} LIMIT 1"


@_construct(3, 1, "list")
def _above_average(s: Scope) -> str:
    t = s.entity()
    column, operator = s.column(t, "ir"), s.rng.choice("><")
    shown = s.shown(t, "nc")[0]
    s.about(t, s.above(t, column, operator))
    return f"SELECT {shown} FROM {t} WHERE {column} {operator} (SELECT avg({column}) FROM {t})"


@_construct(2, 2, "count")
def _count_above_average(s: Scope) -> str:
    t = s.entity()
    column, operator = s.column(t, "ir"), s.rng.choice("><")
    s.about(t, s.above(t, column, operator))
    return f"SELECT count(*) FROM {t} WHERE {column} {operator} (SELECT avg({column}) FROM {t})"


_COMBINE: dict[str, Callable[[set, set, set], set]] = {
    "INTERSECT": lambda _, above, below: above & below,
    "EXCEPT": lambda every, above, _: every - above,
    "UNION": lambda _, above, below: above | below,
}


def _telling_cuts(s: Scope, table: str, column: str, number: str, operation: str) -> list[tuple]:
    """Pairs of numbers that make a gold query which its halves and its neighbours differ from; few do."""
    pair = [[f.name for f in s.domain.tables[table]].index(name) for name in (number, column)]
    rows: list[tuple[Any, Any]] = [(row[pair[0]], row[pair[1]]) for row in s.domain.rows[table]]
    every, rows = {text for _, text in rows}, [row for row in rows if row[0] is not None]
    values = sorted({value for value, _ in rows})
    combine, pairs = _COMBINE[operation], []
    for j, high in enumerate(values[:-1]):
        above, from_high = ({text for v, text in rows if v > least} for least in (high, values[max(0, j - 1)]))
        for i, low in enumerate(values[1:j], 1):
            below, to_low = ({text for v, text in rows if v < most} for most in (low, values[i + 1]))
            wrong = [(from_high, below), (every, below)]
            wrong += [(above, to_low), (above, every)] if operation != "EXCEPT" else []
            result = combine(every, above, below)
            if result and result not in (above, below, *(combine(every, *other) for other in wrong)):
                pairs.append((low, high))
    return pairs


def _cut(s: Scope, operation: str) -> tuple[str, str, int | float, int | float]:
    """The start of a query for a text, its number column, and two numbers to part its rows by."""
    t = s.entity()
    column, number = s.column(t, "c", nulls=False), s.column(t, "iry")
    low, high = sorted(s.rng.sample(s.domain.values(t, number), 2))
    if s.telling:
        pairs = _telling_cuts(s, t, column, number, operation)
        low, high = s.rng.choice(pairs) if pairs else (low, low)
    if low == high:
        raise Skip
    s.put(N=plural(column), cond=s.number(t, number, ">", high), cond2=s.number(t, number, "<", low))
    return f"SELECT {column} FROM {t}", number, low, high


@_construct(2, 2, "intersect")
def _intersect(s: Scope) -> str:
    select, number, low, high = _cut(s, "INTERSECT")
    return f"{select} WHERE {number} > {high} INTERSECT {select} WHERE {number} < {low}"


@_construct(2, 2, "except")
def _except(s: Scope) -> str:
    select, number, _, high = _cut(s, "EXCEPT")
    return f"{select} EXCEPT {select} WHERE {number} > {high}"


@_construct(2, 2, "union")
def _union(s: Scope) -> str:
    select, number, low, high = _cut(s, "UNION")
    return f"{select} WHERE {number} > {high} UNION {select} WHERE {number} < {low}"


# ---- several tables -------------------------------------------------------------------------------------------------


def _named_rows(s: Scope, table: str) -> tuple[str, str]:
    """Rows of a table picked by a text ("stadiums in Paris", "the stadium named X"), and the condition."""
    column = s.column(table, "nc")
    value = s.value(table, column)
    said = s.text(table, column, value)
    if s.domain.field(table, column).kind == "name":
        return f"the {say(table)} {said}", f"{column} = {literal(value)}"
    return f"{plural(table)} {said}", f"{column} = {literal(value)}"


@_construct(3, 1, "list")
def _not_in(s: Scope) -> str:
    child, column, parent, key = s.link(needs_id=False)
    s.about(parent, s.word("lacking").format(T=plural(child), t=say(child)))
    return f"SELECT {s.label(parent)} FROM {parent} WHERE {key} NOT IN (SELECT {column} FROM {child})"


@_construct(2, 2, "count")
def _count_not_in(s: Scope) -> str:
    child, column, parent, key = s.link(needs_id=False)
    s.about(parent, s.word("lacking").format(T=plural(child), t=say(child)))
    return f"SELECT count(*) FROM {parent} WHERE {key} NOT IN (SELECT {column} FROM {child})"


@_construct(3, 2, "list")
def _in_subquery(s: Scope) -> str:
    child, column, parent, key = s.link()
    said, where, _ = s.condition(child)
    s.about(parent, s.word("owning").format(T=f"{plural(child)} {said}"))
    return f"SELECT {s.label(parent)} FROM {parent} WHERE {key} IN (SELECT {column} FROM {child} WHERE {where})"


def _joined(child: str, column: str, parent: str, key: str) -> str:
    return f"{child} AS T1 JOIN {parent} AS T2 ON T1.{column} = T2.{key}"


@_construct(4, 2, "join")
def _join(s: Scope) -> str:
    child, column, parent, key = s.link()
    a, b = s.column(child, "nciryd"), s.column(parent, "nciryd")
    s.put(a=s.noun(child, a), b=s.noun(parent, b))
    return f"SELECT T1.{a}, T2.{b} FROM {_joined(child, column, parent, key)}"


@_construct(4, 2, "list")
def _join_where(s: Scope) -> str:
    child, column, parent, key = s.link()
    a = s.shown(child, "nciryd")[0]
    rows, where = _named_rows(s, parent)
    s.about(child, f"{s.relation(child, column)} {rows}")
    return f"SELECT T1.{a} FROM {_joined(child, column, parent, key)} WHERE T2.{where}"


@_construct(3, 2, "count")
def _join_count(s: Scope) -> str:
    child, column, parent, key = s.link()
    rows, where = _named_rows(s, parent)
    s.about(child, f"{s.relation(child, column)} {rows}")
    return f"SELECT count(*) FROM {_joined(child, column, parent, key)} WHERE T2.{where}"


@_construct(3, 2, "join_parent")
def _join_parent(s: Scope) -> str:
    child, column, parent, key = s.link()
    b = s.shown(parent, "nciryd")[0]
    s.put(b=s.noun(parent, b))
    said, where, _ = s.condition(child, "T1.")
    s.about(child, said)
    return f"SELECT T2.{b} FROM {_joined(child, column, parent, key)} WHERE {where}"


@_construct(2, 2, "one")
def _join_superlative(s: Scope) -> str:
    child, column, parent, key = s.link()
    b, number = s.shown(parent, "nc")[0], s.column(child, "iry", nulls=False)
    way = s.best(child, number)
    s.put(S=f"{say(parent)} {s.rng.choice(('of', 'that has', 'with'))} the {s.slots['S']}")
    s.keys = f"SELECT {number} FROM {child} ORDER BY {number} {way} LIMIT 2"
    return f"SELECT T2.{b} FROM {_joined(child, column, parent, key)} ORDER BY T1.{number} {way} LIMIT 1"


@_construct(3, 2, "join_group")
def _join_group(s: Scope) -> str:
    child, column, parent, key = s.link(needs_id=False)
    return f"SELECT T2.{s.label(parent)}, count(*) FROM {_joined(child, column, parent, key)} GROUP BY T1.{column}"


@_construct(3, 2, "one")
def _join_most(s: Scope) -> str:
    child, column, parent, key = s.link(needs_id=False)
    b = s.label(parent) if s.rng.random() < 0.7 else s.shown(parent, "ciry")[0]
    way = s.quantity_of(0.75)
    s.put(S=f"{say(parent)} {s.rng.choice(('with', 'with', 'that has'))} {s.slots['most']} {plural(child)}")
    s.keys = f"SELECT count(*) FROM {child} GROUP BY {column} ORDER BY count(*) {way} LIMIT 2"
    return (
        f"SELECT T2.{b} FROM {_joined(child, column, parent, key)} GROUP BY T1.{column} ORDER BY count(*) {way} LIMIT 1"
    )


@_construct(3, 2, "list")
def _join_having(s: Scope) -> str:
    child, column, parent, key = s.link(needs_id=False)
    said, having = _threshold(s, child, column)
    s.about(parent, s.word("count").format(op=said, C=plural(child)))
    label = s.label(parent)
    return f"SELECT T2.{label} FROM {_joined(child, column, parent, key)} GROUP BY T1.{column} HAVING count(*) {having}"


@_construct(3, 2, "join_value")
def _join_aggregate(s: Scope) -> str:
    child, column, parent, key = s.link()
    number, shown = s.column(child, "ir"), s.label(parent)
    value = f"{s.aggregate(child, number)}(T1.{number})"
    return f"SELECT T2.{shown}, {value} FROM {_joined(child, column, parent, key)} GROUP BY T1.{column}"


@_construct(3, 2, "list")
def _join_three(s: Scope) -> str:
    links = s.domain.links()
    pairs = [(x, y) for x in links for y in links if x[0] == y[0] and x[2] != y[2]]
    if not pairs:
        raise Skip
    (child, first, left, left_key), (_, second, right, right_key) = s.rng.choice(pairs)
    b = s.shown(left, "nc")[0]
    rows, where = _named_rows(s, right)
    s.about(left, f"{s.rng.choice(('with', 'that have'))} {plural(child)} {s.relation(child, second)} {rows}")
    return (
        f"SELECT T2.{b} FROM {child} AS T1 JOIN {left} AS T2 ON T1.{first} = T2.{left_key} "
        f"JOIN {right} AS T3 ON T1.{second} = T3.{right_key} WHERE T3.{where}"
    )


# ---- drawing --------------------------------------------------------------------------------------------------------

_PICKED = ("ask", "tell", "for", "of", "all", "each", "distinct", "amount")
WEIGHTS = {c.name: c.weight for c in CONSTRUCTS.values()}
_BY_LEVEL = [[c for c in CONSTRUCTS.values() if c.level <= level] for level in range(3)]
_ASKING = ("What", "How", "Which", "Do you", "Could you")


def _sentence(scope: Scope, frame: str) -> str:
    """A frame with its slots filled, its first letter and its last mark as they should be."""
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
) -> Draft:
    """Draw one question on a filled domain.

    Args:
        construct: its name; by default one is drawn by weight among those up to the level.
        everyday: how often families other than A use a word of A; every question of theirs has a frame or a word (an
            opening is not enough) that no earlier family has.
        filler: makes idle words; where given, the sentence is disturbed by them (for pretraining).
        late: disturb it more: operation words and small words are sometimes replaced by idle ones.
        telling: choose the numbers of set operations so that the result tells the query from similar ones.

    Raises:
        Skip: the construct given does not fit the domain (after 200 attempts).
    """
    pool = _BY_LEVEL[level]
    weights = [c.weight for c in pool]
    earlier = FAMILIES[: FAMILIES.index(family)]
    for _ in range(200):
        kind = CONSTRUCTS[construct] if construct else rng.choices(pool, weights)[0]
        scope = Scope(domain, rng, family, everyday, filler, late, telling)
        try:
            sql = kind.build(scope)
        except Skip:
            continue
        frames = FRAMES[scope.form or kind.form]
        frame = rng.choice(frames["A" if rng.random() < _EVERYDAY_FRAME else family])
        if "{s}" in frame and _PLURAL_ONLY.search(scope.slots["s"]):
            continue
        new = family == "A" or all(frame not in frames[f] for f in earlier)
        text = _sentence(scope, frame)
        if new or scope.own_words_in(text):
            return Draft(text, sql, kind.name, scope.keys)
    raise Skip
