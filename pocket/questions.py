"""Questions with their gold query: constructs (what is asked) crossed with phrasing families (how it is said).

A construct builds the query and the slots of a sentence from a domain with rows; a family says the sentence
(`pocket.phrasing`). `draw` is deterministic in the state of its random generator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from pocket.domains import Domain
from pocket.phrasing import COMPARE, EVERYDAY, FAMILIES, LEXICON, Filler, Scope, Skip, literal, plural, say

_EVERYDAY_FRAME = 0.985
"""How often families other than A use a frame of A: there are too many frames to learn each of them from a few hundred
rollouts."""


@dataclass(frozen=True)
class Draft:
    """A question with its gold query, before anything was executed."""

    question: str
    sql: str
    construct: str
    keys: str = ""
    """A query whose rows must all differ for the gold to be unambiguous (ties in an ordering); '' where none is needed."""


Builder = Callable[[Scope], str]


@dataclass(frozen=True)
class Construct:
    """One kind of query: how often it is drawn, the curriculum level at which it comes in, and its frames."""

    name: str
    weight: int
    level: int
    build: Builder
    frames: dict[str, tuple[str, ...]]


CONSTRUCTS: dict[str, Construct] = {}


def _construct(name: str, weight: int, level: int, a: str, b: str, c: str, d: str) -> Callable[[Builder], Builder]:
    """Register a construct; frames of a family are separated by ``|``."""

    def register(build: Builder) -> Builder:
        frames = {k: tuple(v.split(" | ")) for k, v in zip(FAMILIES, (a, b, c, d), strict=True)}
        CONSTRUCTS[name] = Construct(name, weight, level, build, frames)
        return build

    return register


# ---- one table ------------------------------------------------------------------------------------------------------


@_construct("count", 2, 0,
    "How many {T} are there | Count the number of {T} | What is {count} {T} | How many {T} do we have",
    "Tell me {count} {T} | What is {count} {T}",
    "Report {count} {T} | What does {count} {T} come to",
    "Let me know {count} {T} | Get {count} all {T}")
def _count(s: Scope) -> str:
    return f"SELECT count(*) FROM {s.entity()}"


@_construct("count_where", 5, 1,
    "How many {T} are there {cond} | Count the {T} {cond} | What is {count} {T} {cond} | How many {T} exist {cond} | {for} {T} {cond}, {ask} {count} them",
    "Tell me {count} {T} {cond} | How many {T} do you find {cond}",
    "Report {count} {T} {cond} | Work out how many {T} there are {cond}",
    "Counting only {T} {cond}, how many are there | Get {count} {T} {cond}")
def _count_where(s: Scope) -> str:
    t = s.entity()
    s.slots["cond"], where, _ = s.condition(t)
    return f"SELECT count(*) FROM {t} WHERE {where}"


@_construct("select", 5, 0,
    "{ask} the {cols} {all} {T} | {ask} the {cols} of each {t} | {ask} the {cols} of every {t} | {for} all {T}, {ask} the {cols}",
    "{ask} the {cols} {all} {T} | Regarding all {T}, {ask} the {cols}",
    "{ask} {cols} {all} {T} | Going through the {T}, give {cols}",
    "{ask} the {cols} {all} {T} | Of every {t} I need the {cols}")
def _select(s: Scope) -> str:
    t = s.entity()
    return f"SELECT {', '.join(s.shown(t, counts=(1, 1, 2, 2, 3)))} FROM {t}"


@_construct("select_where", 8, 1,
    "{ask} the {cols} {of} {T} {cond} | {for} {T} {cond}, {ask} the {cols} | {ask} {cols} of all {T} {cond}",
    "{ask} the {cols} of the {T} {cond} | Regarding {T} {cond}, {ask} the {cols}",
    "{ask} the {cols} belonging to {T} {cond} | Take the {T} {cond} and give their {cols}",
    "{ask} the {cols} from the {T} {cond} | Looking only at {T} {cond}, what is the {cols}")
def _select_where(s: Scope) -> str:
    t = s.entity()
    cols = s.shown(t, counts=(1, 1, 1, 2))
    s.slots["cond"], where, column = s.condition(t)
    if column in cols and " = " in where:
        raise Skip
    return f"SELECT {', '.join(cols)} FROM {t} WHERE {where}"


@_construct("negation", 2, 1,
    "{ask} the {cols} {of} {T} {not} | {for} {T} {not}, {ask} the {cols}",
    "{ask} the {cols} of the {T} {not} | Regarding {T} {not}, {ask} the {cols}",
    "{ask} the {cols} belonging to {T} {not} | Take the {T} {not} and give their {cols}",
    "{ask} the {cols} from the {T} {not} | Looking only at {T} {not}, what is the {cols}")
def _negation(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "c", nulls=False)
    value = s.value(t, column)
    cols = s.shown(t, counts=(1, 1, 2))
    s.slots["not"] = s.word("is_not").format(c=say(column), v=value)
    return f"SELECT {', '.join(cols)} FROM {t} WHERE {column} != {literal(value)}"


def _two(s: Scope) -> tuple[str, str, str]:
    t = s.entity()
    row = s.rng.randrange(len(s.domain.rows[t]))
    s.slots["cond"], first, column = s.condition(t, row=row)
    s.slots["cond2"], second, _ = s.condition(t, avoid=column, row=row)
    return t, first, second


@_construct("where_and", 4, 1,
    "{ask} the {cols} {of} {T} {cond} and {cond2} | {for} {T} {cond} and {cond2}, {ask} the {cols}",
    "{ask} the {cols} of the {T} {cond} and also {cond2} | Regarding {T} both {cond} and {cond2}, {ask} the {cols}",
    "Take the {T} {cond} as well as {cond2} and give their {cols} | {ask} the {cols} belonging to {T} {cond} as well as {cond2}",
    "Looking only at {T} {cond} and at once {cond2}, what is the {cols} | {ask} the {cols} from {T} {cond} as well as {cond2}")
def _where_and(s: Scope) -> str:
    t, first, second = _two(s)
    return f"SELECT {s.shown(t)[0]} FROM {t} WHERE {first} AND {second}"


@_construct("where_or", 3, 1,
    "{ask} the {cols} {of} {T} {cond} or {cond2} | {for} {T} {cond} or {cond2}, {ask} the {cols}",
    "{ask} the {cols} of the {T} either {cond} or {cond2} | Regarding {T} {cond} or else {cond2}, {ask} the {cols}",
    "Take the {T} {cond} or alternatively {cond2} and give their {cols} | {ask} the {cols} belonging to {T} {cond} or maybe {cond2}",
    "Looking only at {T} either {cond} or {cond2}, what is the {cols} | {ask} the {cols} from {T} {cond} or otherwise {cond2}")
def _where_or(s: Scope) -> str:
    t, first, second = _two(s)
    return f"SELECT {s.shown(t)[0]} FROM {t} WHERE {first} OR {second}"


@_construct("count_and", 2, 1,
    "How many {T} are there {cond} and {cond2} | Count the {T} {cond} and {cond2}",
    "Tell me {count} {T} {cond} and also {cond2} | How many {T} do you find {cond} and also {cond2}",
    "Report {count} {T} {cond} as well as {cond2} | Work out how many {T} there are {cond} as well as {cond2}",
    "Counting only {T} {cond} and at once {cond2}, how many are there | Get {count} {T} {cond} as well as {cond2}")
def _count_and(s: Scope) -> str:
    t, first, second = _two(s)
    return f"SELECT count(*) FROM {t} WHERE {first} AND {second}"


@_construct("between", 3, 1,
    "{ask} the {cols} {of} {T} with {n} between {v} and {w} | {ask} the {cols} {of} {T} whose {n} is between {v} and {w} | {for} {T} with {n} from {v} to {w}, {ask} the {cols}",
    "{ask} the {cols} of {T} having a {n} ranging from {v} to {w} | Regarding {T} where the {n} is from {v} to {w}, {ask} the {cols}",
    "Take the {T} showing {n} in the span {v} to {w} and give their {cols} | {ask} the {cols} belonging to {T} for which {n} lies within {v} and {w}",
    "Looking only at {T} with {n} in the range {v} to {w}, what is the {cols} | {ask} the {cols} from {T} if their {n} lies from {v} up to {w}")
def _between(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "iryd")
    low, high = sorted((s.value(t, column), s.value(t, column)))
    if low == high:
        raise Skip
    s.put(n=say(column), v=str(low), w=str(high))
    return f"SELECT {s.shown(t, 'nc')[0]} FROM {t} WHERE {column} BETWEEN {literal(low)} AND {literal(high)}"


@_construct("contains", 2, 1,
    "{ask} the {cols} {of} {T} whose {n} contains {v} | {ask} the {cols} {of} {T} with {n} containing the word {v}",
    "{ask} the {cols} of {T} having {v} inside the {n} | Regarding {T} where the {n} includes {v}, {ask} the {cols}",
    "Take the {T} for which {n} mentions {v} and give their {cols} | {ask} the {cols} belonging to {T} showing {v} within {n}",
    "Looking only at {T} that mention {v} in the {n}, what is the {cols} | {ask} the {cols} from {T} if their {n} includes {v}")
def _contains(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "n")
    word = s.rng.choice(str(s.value(t, column)).split())
    s.put(n=say(column), v=word)
    return f"SELECT {s.shown(t, 'nciy')[0]} FROM {t} WHERE {column} LIKE {literal('%' + word + '%')}"


@_construct("prefix", 2, 1,
    "{ask} the {cols} {of} {T} whose {n} starts with {v} | {ask} the {cols} {of} {T} with {n} starting with {v}",
    "{ask} the {cols} of {T} having a {n} that begins with {v} | Regarding {T} where the {n} begins with {v}, {ask} the {cols}",
    "Take the {T} for which {n} opens with {v} and give their {cols} | {ask} the {cols} belonging to {T} showing {v} at the front of {n}",
    "Looking only at {T} with {v} at the start of the {n}, what is the {cols} | {ask} the {cols} from {T} if their {n} begins with {v}")
def _prefix(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "n")
    word = str(s.value(t, column)).split()[0]
    s.put(n=say(column), v=word)
    return f"SELECT {s.shown(t, 'nciy')[0]} FROM {t} WHERE {column} LIKE {literal(word + '%')}"


@_construct("missing", 2, 1,
    "{ask} the {cols} {of} {T} whose {n} is missing | {ask} the {cols} {of} {T} with missing {n}",
    "{ask} the {cols} of {T} where the {n} is unknown | Regarding {T} having an unknown {n}, {ask} the {cols}",
    "Take the {T} for which {n} is left blank and give their {cols} | {ask} the {cols} belonging to {T} showing blank {n}",
    "Looking only at {T} with unknown {n}, what is the {cols} | {ask} the {cols} from {T} if their {n} is not recorded")
def _missing(s: Scope) -> str:
    t = s.entity()
    found = [f.name for f in s.domain.tables[t] if f.nullable]
    if not found:
        raise Skip
    column = s.rng.choice(found)
    s.put(n=say(column))
    shown = s.shown(t, "nc")[0]
    if shown == column:
        raise Skip
    return f"SELECT {shown} FROM {t} WHERE {column} IS NULL"


@_construct("aggregate", 4, 0,
    "{ask} the {agg} {n} {all} {T} | {ask} the {agg} {n} across all {T}",
    "{ask} the {agg} {n} {all} {T} | Over the {T}, what is the {agg} {n}",
    "{ask} the {agg} {n} {all} {T} | Work out the {agg} {n} {all} {T}",
    "{ask} the {agg} {n} {all} {T} | What does the {agg} {n} of {T} come to")
def _aggregate(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "ir")
    s.put(n=say(column))
    return f"SELECT {s.aggregate()}({column}) FROM {t}"


@_construct("aggregate_two", 3, 1,
    "{ask} the {agg} and {agg2} {n} {all} {T} | {ask} the {agg} and {agg2} {n} across all {T}",
    "{ask} the {agg} and also the {agg2} {n} {all} {T} | Over the {T}, what is the {agg} and the {agg2} {n}",
    "{ask} the {agg} as well as the {agg2} {n} {all} {T} | Work out the {agg} plus the {agg2} {n} {all} {T}",
    "{ask} the {agg} as well as {agg2} {n} {all} {T} | What does the {agg} and the {agg2} {n} of {T} come to")
def _aggregate_two(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "ir")
    first, second = s.rng.sample(("avg", "max", "min", "sum"), 2)
    s.put(n=say(column), agg=s.word(first), agg2=s.word(second))
    return f"SELECT {first}({column}), {second}({column}) FROM {t}"


@_construct("aggregate_where", 4, 1,
    "{ask} the {agg} {n} {of} {T} {cond} | {for} {T} {cond}, {ask} the {agg} {n}",
    "{ask} the {agg} {n} of the {T} {cond} | Regarding {T} {cond}, {ask} the {agg} {n}",
    "{ask} the {agg} {n} belonging to {T} {cond} | Take the {T} {cond} and work out the {agg} {n}",
    "{ask} the {agg} {n} from the {T} {cond} | Looking only at {T} {cond}, what is the {agg} {n}")
def _aggregate_where(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "ir")
    s.slots["cond"], where, used = s.condition(t)
    if used == column:
        raise Skip
    s.put(n=say(column))
    return f"SELECT {s.aggregate()}({column}) FROM {t} WHERE {where}"


@_construct("distinct", 3, 0,
    "{ask} the {distinct} {N} of {T} | {ask} the {distinct} {N} of all {T}",
    "{ask} the {distinct} {N} to be found for {T} | Which {distinct} {N} occur for {T}",
    "{ask} the {distinct} {N} {all} {T} | Which {distinct} {N} appear among the {T}",
    "{ask} every {distinct} value of {n} from the {T} | Which {distinct} {N} can be met among {T}")
def _distinct(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "cy", nulls=False)
    s.put(n=say(column), N=plural(column))
    return f"SELECT DISTINCT {column} FROM {t}"


@_construct("count_distinct", 3, 1,
    "How many {distinct} {N} are there among {T} | How many {distinct} {N} do the {T} have | {ask} the number of {distinct} {N} of {T}",
    "Tell me {count} {distinct} {N} {all} {T} | How many {distinct} {N} do you find for {T}",
    "Report {count} {distinct} {N} {all} {T} | Work out how many {distinct} {N} appear among the {T}",
    "Get {count} {distinct} {N} from the {T} | Among {T}, what is {count} {distinct} {N}")
def _count_distinct(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "cy")
    s.put(N=plural(column))
    return f"SELECT count(DISTINCT {column}) FROM {t}"


def _ordering(s: Scope, column: str) -> str:
    way = s.rng.choice(("ASC", "DESC"))
    s.put(order=s.word("ascending" if way == "ASC" else "descending").format(n=say(column)))
    return way


@_construct("order", 4, 1,
    "{ask} the {cols} of all {T} {order} | {ask} the {cols} {of} {T} {order} | {for} all {T}, {ask} the {cols} {order}",
    "{ask} the {cols} of our {T} {order} | {ask} the {T} {order}, with the {cols} only",
    "{ask} the {cols} across the {T}, {order} | Go through the {T} {order} and give {cols}",
    "{ask} the {cols} from the {T} {order} | With the {T} {order}, what is the {cols}")
def _order(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "iryn", nulls=False)
    cols = s.shown(t, "nc", (1, 1, 2))
    s.keys = f"SELECT {column} FROM {t}"
    return f"SELECT {', '.join(cols)} FROM {t} ORDER BY {column} {_ordering(s, column)}"


@_construct("where_order", 2, 2,
    "{ask} the {cols} {of} {T} {cond} {order} | {ask} the {cols} {of} {T} {cond}, {order}",
    "{ask} the {cols} of our {T} {cond}, {order} | Regarding {T} {cond}, {ask} the {cols} {order}",
    "Take the {T} {cond} {order} and give their {cols} | {ask} the {cols} belonging to {T} {cond}, {order}",
    "{ask} the {cols} from the {T} {cond}, {order} | With the {T} {order}, what is the {cols} of those {cond}")
def _where_order(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "iryn", nulls=False)
    shown = s.shown(t, "nc")[0]
    s.slots["cond"], where, used = s.condition(t)
    if used == column:
        raise Skip
    s.keys = f"SELECT {column} FROM {t} WHERE {where}"
    return f"SELECT {shown} FROM {t} WHERE {where} ORDER BY {column} {_ordering(s, column)}"


@_construct("superlative", 4, 1,
    "{ask} the {cols} of the {t} with the {best} {n} | {ask} the {cols} of the {t} that has the {best} {n} | {for} the {t} with the {best} {n}, {ask} the {cols}",
    "{ask} the {cols} of the one {t} having the {best} {n} | Where the {n} is the {best}, {ask} the {cols} of that {t}",
    "{ask} the {cols} belonging to the {t} showing the {best} {n} | Take the {t} at the {best} {n} and give its {cols}",
    "{ask} the {cols} from the {t} of {best} {n} | Looking for the {t} with {best} {n}, what is its {cols}")
def _superlative(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "iry", nulls=False)
    cols = s.shown(t, "nc", (1, 1, 2))
    s.put(n=say(column))
    way = s.extreme()
    s.keys = f"SELECT {column} FROM {t} ORDER BY {column} {way} LIMIT 2"
    return f"SELECT {', '.join(cols)} FROM {t} ORDER BY {column} {way} LIMIT 1"


@_construct("top_k", 3, 1,
    "{ask} the {cols} of the {k} {T} with the {best} {n} | {ask} the {cols} {of} {T} with the {k} {best} {n} | {for} the {k} {T} with the {best} {n}, {ask} the {cols}",
    "{ask} the {cols} of the {k} {T} having the {best} {n} | Limited to {k} {T} of {best} {n}, {ask} the {cols}",
    "{ask} the {cols} belonging to the {k} {T} showing the {best} {n} | Take the {k} {T} at the {best} {n} and give their {cols}",
    "{ask} the {cols} from the {k} {T} of {best} {n} | Looking for {k} {T} with {best} {n}, what is their {cols}")
def _top_k(s: Scope) -> str:
    t = s.entity()
    column, k = s.column(t, "iry", nulls=False), s.rng.choice((2, 3, 3, 4, 5))
    shown = s.label(t)
    s.put(n=say(column), k=str(k))
    way = s.extreme()
    s.keys = f"SELECT {column} FROM {t} ORDER BY {column} {way} LIMIT {k + 1}"
    return f"SELECT {shown} FROM {t} ORDER BY {column} {way} LIMIT {k}"


@_construct("group_count", 4, 1,
    "How many {T} are there {each} {n} | {ask} the number of {T} {each} {n} | For each {n}, how many {T} are there | {ask} each {n} and the number of {T}",
    "Tell me {count} {T} {each} {n} | With {T} {each} {n}, what is the count for each",
    "Report {count} {T} {each} {n} | For any given {n}, work out how many {T} there are",
    "Get {count} {T} {each} {n} | Every {n} and how many {T} it has, please")
def _group_count(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "cy", nulls=False)
    s.put(n=say(column))
    return f"SELECT {column}, count(*) FROM {t} GROUP BY {column}"


@_construct("group_aggregate", 4, 1,
    "{ask} the {agg} {n} of {T} {each} {c} | For each {c}, what is the {agg} {n} of {T}",
    "{ask} the {agg} {n} of our {T} {each} {c} | With {T} {each} {c}, what is the {agg} {n} for each",
    "{ask} the {agg} {n} across the {T} {each} {c} | For any given {c}, work out the {agg} {n} of {T}",
    "{ask} the {agg} {n} from the {T} {each} {c} | Every {c} and the {agg} {n} of its {T}, please")
def _group_aggregate(s: Scope) -> str:
    t = s.entity()
    column, number = s.column(t, "c", nulls=False), s.column(t, "ir")
    s.put(c=say(column), n=say(number))
    return f"SELECT {column}, {s.aggregate()}({number}) FROM {t} GROUP BY {column}"


@_construct("group_order", 2, 2,
    "{ask} each {n} and {count} {T} {order} | {ask} {count} {T} {each} {n} {order} | For each {n}, show {count} {T} {order}",
    "Tell me {count} {T} {each} {n}, {order} | {ask} every {n} with {count} {T}, {order}",
    "Report {count} {T} {each} {n}, {order} | For any given {n}, give {count} {T} {order}",
    "Get {count} {T} {each} {n}, {order} | Every {n} and {count} its {T}, {order}, please")
def _group_order(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "c", nulls=False)
    s.put(n=say(column))
    s.keys = f"SELECT count(*) FROM {t} GROUP BY {column}"
    return f"SELECT {column}, count(*) FROM {t} GROUP BY {column} ORDER BY count(*) {_ordering(s, 'number')}"


def _threshold(s: Scope, table: str, column: str) -> str:
    sizes = sorted(set(Counter(s.domain.values(table, column)).values()))
    operator, k = s.rng.choice((">=", ">", "<")), max(2, s.rng.choice(sizes))
    word = s.word(COMPARE[operator])
    if word in LEXICON["gt"]["A"] or word in LEXICON["lt"]["A"]:
        word = "more than" if operator == ">" else "fewer than"
    s.put(op=word, k=str(k))
    return f"{operator} {k}"


@_construct("having", 3, 1,
    "Which {N} have {op} {k} {T} | Find the {N} that have {op} {k} {T} | List each {n} with {op} {k} {T}",
    "Tell me the {N} having {op} {k} {T} | Which {N} occur where {count} {T} is {op} {k}",
    "Report {N} showing {op} {k} {T} | Which {N} appear for {op} {k} {T}",
    "Get every {n} if {count} {T} is {op} {k} | Which {N} come with {op} {k} {T}")
def _having(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "c", nulls=False)
    s.put(n=say(column), N=plural(column))
    return f"SELECT {column} FROM {t} GROUP BY {column} HAVING count(*) {_threshold(s, t, column)}"


@_construct("most_common", 3, 1,
    "Which {n} has {most} {T} | {ask} the {n} with {most} {T} | {ask} the {n} that has {most} {T}",
    "Tell me the {n} having {most} {T} | Where do {most} {T} occur, by {n}",
    "Report the {n} showing {most} {T} | Which {n} appears with {most} {T}",
    "Get the {n} of {most} {T} | Which {n} comes with {most} {T}")
def _most_common(s: Scope) -> str:
    t = s.entity()
    column = s.column(t, "c", nulls=False)
    s.put(n=say(column))
    way = s.quantity_of()
    s.keys = f"SELECT count(*) FROM {t} GROUP BY {column} ORDER BY count(*) {way} LIMIT 2"
    return f"SELECT {column} FROM {t} GROUP BY {column} ORDER BY count(*) {way} LIMIT 1"


@_construct("above_average", 3, 1,
    "{ask} the {cols} {of} {T} with {n} {op} the average | {ask} the {cols} {of} {T} whose {n} is {op} the average {n} | {for} {T} with {n} {op} the average, {ask} the {cols}",
    "{ask} the {cols} of {T} having a {n} {op} the {avg} one | Regarding {T} where the {n} is {op} the {avg} {n}, {ask} the {cols}",
    "Take the {T} showing {n} {op} the {avg} {n} and give their {cols} | {ask} the {cols} belonging to {T} for which {n} is {op} the {avg} one",
    "Looking only at {T} with {n} {op} the {avg} {n}, what is the {cols} | {ask} the {cols} from {T} if their {n} is {op} the {avg} one")
def _above_average(s: Scope) -> str:
    t = s.entity()
    column, operator = s.column(t, "ir"), s.rng.choice("><")
    shown = s.shown(t, "nc")[0]
    s.put(n=say(column), op=s.word(COMPARE[operator]))
    return f"SELECT {shown} FROM {t} WHERE {column} {operator} (SELECT avg({column}) FROM {t})"


@_construct("count_above_average", 2, 2,
    "How many {T} have {n} {op} the average | How many {T} are there with {n} {op} the average {n}",
    "Tell me {count} {T} having a {n} {op} the {avg} one | How many {T} do you find where the {n} is {op} the {avg} {n}",
    "Report {count} {T} showing {n} {op} the {avg} {n} | Work out how many {T} there are for which {n} is {op} the {avg} one",
    "Counting only {T} with {n} {op} the {avg} {n}, how many are there | Get {count} {T} if their {n} is {op} the {avg} one")
def _count_above_average(s: Scope) -> str:
    t = s.entity()
    column, operator = s.column(t, "ir"), s.rng.choice("><")
    s.put(n=say(column), op=s.word(COMPARE[operator]))
    return f"SELECT count(*) FROM {t} WHERE {column} {operator} (SELECT avg({column}) FROM {t})"


def _cut(s: Scope) -> tuple[str, str, str, list]:
    t = s.entity()
    column, number = s.column(t, "c", nulls=False), s.column(t, "iry")
    values = sorted(s.rng.sample(s.domain.values(t, number), 2))
    if values[0] == values[1]:
        raise Skip
    s.put(c=say(column), C=plural(column), n=say(number), v=str(values[0]), w=str(values[1]), op=s.word("gt"), op2=s.word("lt"))
    return t, column, number, values


@_construct("intersect", 2, 2,
    "Which {C} have both {T} with {n} {op} {w} and {T} with {n} {op2} {v} | Find the {C} shared by {T} with {n} {op} {w} and {T} with {n} {op2} {v}",
    "Tell me the {C} common to {T} having a {n} {op} {w} and {T} having a {n} {op2} {v} | Which {C} occur for {T} where the {n} is {op} {w} and also for {T} where the {n} is {op2} {v}",
    "Report {C} held jointly by {T} showing {n} {op} {w} and {T} showing {n} {op2} {v} | Which {C} appear for {T} of {n} {op} {w} as well as for {T} of {n} {op2} {v}",
    "Get every {c} common to {T} if their {n} is {op} {w} and {T} if their {n} is {op2} {v} | Which {C} come with {T} of {n} {op} {w} and at once with {T} of {n} {op2} {v}")
def _intersect(s: Scope) -> str:
    t, column, number, (low, high) = _cut(s)
    select = f"SELECT {column} FROM {t} WHERE {number}"
    return f"{select} > {high} INTERSECT {select} < {low}"


@_construct("except", 2, 2,
    "Which {C} do not have any {t} with {n} {op} {w} | Find the {C} without any {t} with {n} {op} {w}",
    "Tell me the {C} lacking any {t} having a {n} {op} {w} | Which {C} miss any {t} where the {n} is {op} {w}",
    "Report {C} with zero {T} showing {n} {op} {w} | Which {C} appear devoid of {T} of {n} {op} {w}",
    "Get every {c} lacking {T} that show a {n} {op} {w} | Which {C} come with zero {T} of {n} {op} {w}")
def _except(s: Scope) -> str:
    t, column, number, (_, high) = _cut(s)
    return f"SELECT {column} FROM {t} EXCEPT SELECT {column} FROM {t} WHERE {number} > {high}"


@_construct("union", 2, 2,
    "Which {C} have {T} with {n} {op} {w} or {T} with {n} {op2} {v} | Find the {C} of {T} with {n} {op} {w} together with the {C} of {T} with {n} {op2} {v}",
    "Tell me the {C} found for {T} having a {n} {op} {w} or else for {T} having a {n} {op2} {v} | Which {C} occur either for {T} where the {n} is {op} {w} or for {T} where the {n} is {op2} {v}",
    "Report {C} held by {T} showing {n} {op} {w} or alternatively {T} showing {n} {op2} {v} | Which {C} appear for {T} of {n} {op} {w} or maybe for {T} of {n} {op2} {v}",
    "Get every {c} found either with {T} of {n} {op} {w} or {T} of {n} {op2} {v} | Which {C} come with {T} of {n} {op} {w} or otherwise with {T} of {n} {op2} {v}")
def _union(s: Scope) -> str:
    t, column, number, (low, high) = _cut(s)
    select = f"SELECT {column} FROM {t} WHERE {number}"
    return f"{select} > {high} UNION {select} < {low}"


# ---- several tables -------------------------------------------------------------------------------------------------


@_construct("not_in", 3, 1,
    "{ask} the {cols} {of} {P} {lacking} {t} | {for} {P} {lacking} {t}, {ask} the {cols}",
    "{ask} the {cols} of the {P} {lacking} {t} | Regarding {P} {lacking} {t}, {ask} the {cols}",
    "{ask} the {cols} belonging to {P} {lacking} {T} | Take the {P} {lacking} {T} and give their {cols}",
    "{ask} the {cols} from the {P} {lacking} {T} | Looking only at {P} {lacking} {T}, what is the {cols}")
def _not_in(s: Scope) -> str:
    child, column, parent, key = s.link(needs_id=False)
    return f"SELECT {s.label(parent)} FROM {parent} WHERE {key} NOT IN (SELECT {column} FROM {child})"


@_construct("count_not_in", 2, 2,
    "How many {P} are there {lacking} {t} | Count the {P} {lacking} {t}",
    "Tell me {count} {P} {lacking} {t} | How many {P} do you find {lacking} {t}",
    "Report {count} {P} {lacking} {T} | Work out how many {P} there are {lacking} {T}",
    "Counting only {P} {lacking} {T}, how many are there | Get {count} {P} {lacking} {T}")
def _count_not_in(s: Scope) -> str:
    child, column, parent, key = s.link(needs_id=False)
    return f"SELECT count(*) FROM {parent} WHERE {key} NOT IN (SELECT {column} FROM {child})"


@_construct("in_subquery", 3, 2,
    "{ask} the {cols} {of} {P} that have {T} {cond} | {ask} the {cols} {of} {P} having any {t} {cond} | {for} {P} with {T} {cond}, {ask} the {cols}",
    "{ask} the {cols} of the {P} owning some {t} {cond} | Regarding {P} that own {T} {cond}, {ask} the {cols}",
    "{ask} the {cols} belonging to {P} linked to {T} {cond} | Take the {P} tied to any {t} {cond} and give their {cols}",
    "{ask} the {cols} from the {P} that own a {t} {cond} | Looking only at {P} tied to {T} {cond}, what is the {cols}")
def _in_subquery(s: Scope) -> str:
    child, column, parent, key = s.link()
    s.slots["cond"], where, _ = s.condition(child)
    return f"SELECT {s.label(parent)} FROM {parent} WHERE {key} IN (SELECT {column} FROM {child} WHERE {where})"


def _join(child: str, column: str, parent: str, key: str) -> str:
    return f"{child} AS T1 JOIN {parent} AS T2 ON T1.{column} = T2.{key}"


@_construct("join", 4, 2,
    "Show the {a} of each {t} and the {b} of its {p} | What is the {a} of each {t} and the {b} of the corresponding {p} | List the {a} of all {T} together with the {b} of their {p}",
    "Tell me the {a} of every {t} plus the {b} of the {p} it goes with | Regarding all {T}, I would like to see the {a} beside the {b} of their {p}",
    "Report {a} across the {T} next to {b} of the associated {p} | Going through the {T}, give {a} and for the {p} behind it {b}",
    "Let me know the {a} from every {t} along with the {b} of the associated {p} | Of every {t} I need the {a}, and of the {p} it goes with the {b}")
def _join_select(s: Scope) -> str:
    child, column, parent, key = s.link()
    a, b = s.column(child, "nciryd"), s.column(parent, "nciryd")
    s.put(a=say(a), b=say(b))
    return f"SELECT T1.{a}, T2.{b} FROM {_join(child, column, parent, key)}"


@_construct("join_where", 4, 2,
    "{ask} the {a} {of} {T} whose {p} has {b} {v} | {ask} the {a} {of} {T} belonging to the {p} with {b} {v} | {for} {T} of the {p} with {b} {v}, {ask} the {a}",
    "{ask} the {a} of {T} that go with the {p} having {v} as {b} | Regarding {T} of a {p} where the {b} is {v}, {ask} the {a}",
    "{ask} the {a} belonging to {T} tied to the {p} under {b} {v} | Take the {p} for which {b} is {v} and give the {a} of its {T}",
    "{ask} the {a} from {T} that go with the {p} with {v} as the {b} | Looking only at {T} tied to the {p} of {b} {v}, what is the {a}")
def _join_where(s: Scope) -> str:
    child, column, parent, key = s.link()
    a, b = s.column(child, "nciryd"), s.column(parent, "nc")
    value = s.value(parent, b)
    s.put(a=say(a), b=say(b), v=str(value))
    return f"SELECT T1.{a} FROM {_join(child, column, parent, key)} WHERE T2.{b} = {literal(value)}"


@_construct("join_count", 3, 2,
    "How many {T} belong to the {p} with {b} {v} | How many {T} does the {p} with {b} {v} have",
    "Tell me {count} {T} that go with the {p} having {v} as {b} | How many {T} do you find for the {p} where the {b} is {v}",
    "Report {count} {T} tied to the {p} under {b} {v} | Work out how many {T} the {p} has for which {b} is {v}",
    "Counting only {T} of the {p} with {v} as the {b}, how many are there | Get {count} {T} tied to the {p} of {b} {v}")
def _join_count(s: Scope) -> str:
    child, column, parent, key = s.link()
    b = s.column(parent, "nc")
    value = s.value(parent, b)
    s.put(b=say(b), v=str(value))
    return f"SELECT count(*) FROM {_join(child, column, parent, key)} WHERE T2.{b} = {literal(value)}"


@_construct("join_parent", 3, 2,
    "{ask} the {b} of the {p} {of} {T} {cond} | {for} {T} {cond}, {ask} the {b} of their {p}",
    "{ask} the {b} of the {p} that {T} {cond} go with | Regarding {T} {cond}, {ask} the {b} of their {p}",
    "{ask} the {b} of the {p} behind {T} {cond} | Take the {T} {cond} and give the {b} of the associated {p}",
    "{ask} the {b} from the {p} behind {T} {cond} | Looking only at {T} {cond}, what is the {b} of the associated {p}")
def _join_parent(s: Scope) -> str:
    child, column, parent, key = s.link()
    b = s.column(parent, "nciryd")
    s.put(b=say(b))
    s.slots["cond"], where, _ = s.condition(child, "T1.")
    return f"SELECT T2.{b} FROM {_join(child, column, parent, key)} WHERE {where}"


@_construct("join_superlative", 2, 2,
    "{ask} the {b} of the {p} of the {t} with the {best} {n} | {ask} the {b} of the {p} that has the {t} with the {best} {n} | {for} the {t} with the {best} {n}, {ask} the {b} of its {p}",
    "{ask} the {b} of the {p} that the {t} having the {best} {n} goes with | Where the {n} of a {t} is the {best}, {ask} the {b} of its {p}",
    "{ask} the {b} of the {p} behind the {t} showing the {best} {n} | Take the {t} at the {best} {n} and give the {b} of the associated {p}",
    "{ask} the {b} from the {p} behind the {t} of {best} {n} | Looking for the {t} with {best} {n}, what is the {b} of the associated {p}")
def _join_superlative(s: Scope) -> str:
    child, column, parent, key = s.link()
    b, number = s.column(parent, "nc"), s.column(child, "iry", nulls=False)
    s.put(b=say(b), n=say(number))
    way = s.extreme()
    s.keys = f"SELECT {number} FROM {child} ORDER BY {number} {way} LIMIT 2"
    return f"SELECT T2.{b} FROM {_join(child, column, parent, key)} ORDER BY T1.{number} {way} LIMIT 1"


@_construct("join_group", 3, 2,
    "For each {p}, show its {cols} and the number of {T} | Show the {cols} of each {p} and the number of {T} it has | How many {T} does each {p} have? List the {cols} and the number",
    "Tell me the {cols} of every {p} plus {count} {T} it owns | With {T} grouped by {p}, what is the {cols} and the count",
    "Report {cols} across the {P} next to {count} {T} | For any given {p}, give {cols} and work out how many {T} there are",
    "Let me know the {cols} from every {p} along with {count} {T} | Every {p} by {cols} and how many {T} it has, please")
def _join_group(s: Scope) -> str:
    child, column, parent, key = s.link(needs_id=False)
    return f"SELECT T2.{s.label(parent)}, count(*) FROM {_join(child, column, parent, key)} GROUP BY T1.{column}"


@_construct("join_most", 3, 2,
    "{ask} the {b} of the {p} with {most} {T} | {ask} the {b} of the {p} that has {most} {T} | {for} the {p} with {most} {T}, {ask} the {b}",
    "{ask} the {b} of the one {p} having {most} {T} | Where do {most} {T} occur, by {p}? Tell me its {b}",
    "{ask} the {b} belonging to the {p} showing {most} {T} | Take the {p} at {most} {T} and give its {b}",
    "{ask} the {b} from the {p} of {most} {T} | Looking for the {p} with {most} {T}, what is its {b}")
def _join_most(s: Scope) -> str:
    child, column, parent, key = s.link(needs_id=False)
    b = s.label(parent) if s.rng.random() < 0.7 else s.column(parent, "ciry", nulls=False)
    s.put(b=say(b))
    way = s.quantity_of(0.75)
    s.keys = f"SELECT count(*) FROM {child} GROUP BY {column} ORDER BY count(*) {way} LIMIT 2"
    return f"SELECT T2.{b} FROM {_join(child, column, parent, key)} GROUP BY T1.{column} ORDER BY count(*) {way} LIMIT 1"


@_construct("join_having", 3, 2,
    "{ask} the {cols} {of} {P} that have {op} {k} {T} | {ask} the {cols} {of} {P} with {op} {k} {T} | {for} {P} with {op} {k} {T}, {ask} the {cols}",
    "{ask} the {cols} of {P} having {op} {k} {T} | Regarding {P} where {count} {T} is {op} {k}, {ask} the {cols}",
    "{ask} the {cols} belonging to {P} showing {op} {k} {T} | Take the {P} tied to {op} {k} {T} and give their {cols}",
    "{ask} the {cols} from {P} if {count} {T} is {op} {k} | Looking only at {P} that come with {op} {k} {T}, what is the {cols}")
def _join_having(s: Scope) -> str:
    child, column, parent, key = s.link(needs_id=False)
    having = _threshold(s, child, column)
    return f"SELECT T2.{s.label(parent)} FROM {_join(child, column, parent, key)} GROUP BY T1.{column} HAVING count(*) {having}"


@_construct("join_aggregate", 3, 2,
    "For each {p}, show its {cols} and the {agg} {n} of its {T} | Show the {cols} of each {p} and the {agg} {n} of its {T}",
    "Tell me the {cols} of every {p} plus the {agg} {n} of the {T} it owns | With {T} grouped by {p}, what is the {cols} and the {agg} {n}",
    "Report {cols} across the {P} next to the {agg} {n} of their {T} | For any given {p}, give {cols} and work out the {agg} {n} of {T}",
    "Let me know the {cols} from every {p} along with the {agg} {n} of its {T} | Every {p} by {cols} and the {agg} {n} of its {T}, please")
def _join_aggregate(s: Scope) -> str:
    child, column, parent, key = s.link()
    number, shown = s.column(child, "ir"), s.label(parent)
    s.put(n=say(number))
    return f"SELECT T2.{shown}, {s.aggregate()}(T1.{number}) FROM {_join(child, column, parent, key)} GROUP BY T1.{column}"


@_construct("join_three", 3, 2,
    "{ask} the {b} {of} {Q} linked to the {p} with {c} {v} | {ask} the {b} {of} {Q} that have {T} with the {p} with {c} {v} | {for} {Q} of the {p} with {c} {v}, {ask} the {b}",
    "{ask} the {b} of {Q} that go with the {p} having {v} as {c} | Regarding {Q} that share {T} with the {p} where the {c} is {v}, {ask} the {b}",
    "{ask} the {b} belonging to {Q} tied to the {p} under {c} {v} | Take the {p} for which {c} is {v} and give the {b} of associated {Q}",
    "{ask} the {b} from {Q} tied by {T} to the {p} with {v} as the {c} | Looking only at {Q} associated with the {p} of {c} {v}, what is the {b}")
def _join_three(s: Scope) -> str:
    links = s.domain.links()
    pairs = [(x, y) for x in links for y in links if x[0] == y[0] and x[2] != y[2]]
    if not pairs:
        raise Skip
    (child, first, left, left_key), (_, second, right, right_key) = s.rng.choice(pairs)
    b, c = s.column(left, "nc"), s.column(right, "nc")
    value = s.value(right, c)
    s.put(T=plural(child), Q=plural(left), p=say(right), b=say(b), c=say(c), v=str(value))
    return (
        f"SELECT T2.{b} FROM {child} AS T1 JOIN {left} AS T2 ON T1.{first} = T2.{left_key} "
        f"JOIN {right} AS T3 ON T1.{second} = T3.{right_key} WHERE T3.{c} = {literal(value)}"
    )


# ---- drawing --------------------------------------------------------------------------------------------------------

_PICKED = ("ask", "for", "of", "all", "each", "distinct", "lacking", "count", "avg")
WEIGHTS = {c.name: c.weight for c in CONSTRUCTS.values()}
_BY_LEVEL = [[c for c in CONSTRUCTS.values() if c.level <= level] for level in range(3)]


def draw(
    domain: Domain,
    rng: Random,
    family: str,
    construct: str | None = None,
    level: int = 2,
    everyday: float = EVERYDAY,
    filler: Filler | None = None,
    late: bool = False,
) -> Draft:
    """Draw one question on a filled domain.

    Args:
        construct: its name; by default one is drawn by weight among those up to the level.
        everyday: how often families other than A use a word of A; every question of theirs has a frame or a word (an
            opening is not enough) that no earlier family has.
        filler: makes idle words; where given, the sentence is disturbed by them (for pretraining).
        late: disturb it more: operation words and small words are sometimes replaced by idle ones.

    Raises:
        Skip: the construct given does not fit the domain (after 200 attempts).
    """
    pool = _BY_LEVEL[level]
    weights = [c.weight for c in pool]
    for _ in range(200):
        kind = CONSTRUCTS[construct] if construct else rng.choices(pool, weights)[0]
        scope = Scope(domain, rng, family, everyday, filler, late)
        try:
            sql = kind.build(scope)
        except Skip:
            continue
        frame = rng.choice(kind.frames["A" if rng.random() < _EVERYDAY_FRAME else family])
        new = family == "A" or all(frame not in kind.frames[f] for f in FAMILIES[: FAMILIES.index(family)])
        for name in _PICKED:
            if f"{{{name}}}" in frame and name not in scope.slots:
                scope.slots[name] = scope.word(name)
        frame = scope.disturb(frame)
        if "ask" in scope.slots and not frame.startswith("{ask}"):
            ask = scope.slots["ask"]
            scope.slots["ask"] = ask if ask.startswith("I ") else ask[0].lower() + ask[1:]
        text = frame.format_map(scope.slots)
        if not new and not scope.own_words_in(text):
            continue
        text = text[0].upper() + text[1:]
        question = text + ("?" if text.startswith(("What", "How", "Which", "Where do")) and "? " not in text else ".")
        return Draft(question, sql, kind.name, scope.keys)
    raise Skip
