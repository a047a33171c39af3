"""Properties of a query from sqlglot's tree: Spider hardness, component match, subject; and classes of errors.

Nothing here decides a verdict of the reference mode. The security boundary is the database, not the tree. A query
without a tree (`parse`) has hardness ``extra`` and no components.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import sqlglot
from sqlglot import exp
from sqlglot.dialects.dialect import Dialect
from sqlglot.tokens import TokenType

HARDNESS = ("easy", "medium", "hard", "extra")
LEVELS = (*HARDNESS, "simple", "moderate", "challenging")
"""Spider's levels, then BIRD's, each from the easiest."""


def dialect_of(name: str) -> str:
    """Return sqlglot's name of a database's dialect."""
    return "postgres" if name == "postgresql" else name


# ---- the one way to a tree

MAX_CHARS, MAX_STEPS, MAX_DEPTH = 10_000, 5_000, 100
"""Bounds of a text that is parsed: its length, the parser's steps over tokens, and the depth of the tree.

Spider's 8,034 gold queries take at most 577 characters, 160 steps and a depth of 21.
"""
MAX_HEX = 1000
"""Digits of a hexadecimal number: sqlglot writes it in decimal, and Python refuses that from 4,300 digits on."""

logging.getLogger("sqlglot").setLevel(logging.ERROR)  # its warnings are about queries of models and users


class _TooManySteps(Exception):
    """The parser was stopped."""


@cache
def _parser(dialect: str) -> Any:
    """Make a class of sqlglot's parser that stops after `MAX_STEPS`.

    sqlglot backtracks to another rule if one does not fit, and the steps double with every join without ON.
    Every rule moves over tokens through the one method that counts here, so the bound holds for all of them.
    """

    class Parser(Dialect.get_or_raise(dialect).parser_class):  # type: ignore[misc]
        steps = 0

        def _advance(self, times: int = 1) -> None:
            self.steps += 1
            if self.steps > MAX_STEPS:
                raise _TooManySteps
            super()._advance(times)

    return Parser


def statements(sql: str, dialect: str = "sqlite") -> list[exp.Expression | None]:
    """Parse the statements of a text; empty if it cannot be parsed within the bounds above.

    For any text this ends within a fraction of a second, and no tree is too deep to be walked recursively.
    """
    if len(sql) > MAX_CHARS:
        return []
    try:
        read = Dialect.get_or_raise(dialect_of(dialect))
        tokens = read.tokenize(sql)
        kinds = Counter(token.token_type for token in tokens)
        # These two take quadratic time without parser steps: each copies or types the tree before it.
        if kinds[TokenType.PIPE_GT] or kinds[TokenType.L_BRACKET] > MAX_DEPTH:
            return []
        if any(len(t.text) > MAX_HEX for t in tokens if t.token_type == TokenType.HEX_STRING):
            return []
        trees = _parser(dialect_of(dialect))(dialect=read).parse(tokens, sql)
    except (sqlglot.errors.SqlglotError, RecursionError, _TooManySteps):
        return []
    return [] if any(tree is not None and _is_deep(tree) for tree in trees) else trees


def _is_deep(tree: exp.Expression) -> bool:
    level = [tree]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in node.iter_expressions()]
        if not level:
            return False
    return True


@lru_cache(maxsize=256)
def parse(sql: str, dialect: str = "sqlite") -> exp.Query | None:
    """Parse one query into a tree shared between callers (copy it before changing it); None if that fails."""
    trees = statements(sql, dialect)
    return trees[0] if trees and isinstance(trees[0], exp.Query) else None


# ---- hardness: the counting rules of Spider's published evaluation script


def hardness(sql: str, dialect: str = "sqlite") -> str:
    """Classify a query as one of `HARDNESS`, by Spider's published rules.

    Of a set operation the first SELECT counts. Its components are WHERE, GROUP BY, ORDER BY, LIMIT, each join, each
    OR and each LIKE; nested are set operations and subqueries that a condition compares with; others are more than one
    aggregate, more than one output column, more than one condition and more than one group column.
    """
    tree = parse(sql, dialect)
    if tree is None:
        return "extra"
    first: exp.Expression = tree
    while isinstance(first, (exp.SetOperation, exp.Subquery)):
        first = first.this
    components, nested, others = _counts(first, isinstance(tree, exp.SetOperation))
    if components <= 1 and others == 0 and nested == 0:
        return "easy"
    if nested == 0 and ((others <= 2 and components <= 1) or (components <= 2 and others < 2)):
        return "medium"
    if (
        (nested == 0 and others > 2 and components <= 2)
        or (nested == 0 and 2 < components <= 3 and others <= 2)
        or (nested <= 1 and components <= 1 and others == 0)
    ):
        return "hard"
    return "extra"


def _counts(select: exp.Expression, set_operation: bool) -> tuple[int, int, int]:
    joins = select.args.get("joins") or []
    where, group, having, order = (select.args.get(k) for k in ("where", "group", "having", "order"))
    where_units, having_units = units(where and where.this), units(having and having.this)
    join_units = [unit for join in joins for unit in units(join.args.get("on"))]
    conditions = join_units + where_units + having_units
    ors = sum(_ors(part) for part in [where and where.this, having and having.this, *(j.args.get("on") for j in joins)])
    likes = sum(isinstance(_positive(unit), (exp.Like, exp.ILike)) for unit in conditions)
    clauses = sum(clause is not None for clause in (where, group, order, select.args.get("limit")))
    nested = set_operation + sum(len(_subqueries(unit)) for unit in conditions)
    aggregates = (
        sum(_has_aggregate(column) for column in select.expressions)
        + sum(isinstance(unit, exp.Not) for unit in where_units)  # the script counts NOT where it means aggregates
        + (sum(len(_aggregates(term)) for term in order.expressions) if order else 0)
        + sum(isinstance(unit, exp.Not) for unit in having_units)
        + max(0, len(having_units) - 1)  # and the connectives of HAVING
    )
    keys = group.expressions if group else []
    others = (aggregates > 1) + (len(select.expressions) > 1) + (len(where_units) > 1) + (len(keys) > 1)
    return clauses + len(joins) + ors + likes, nested, others


def units(condition: exp.Expression | None) -> list[exp.Expression]:
    """Split a condition at AND and OR."""
    if condition is None:
        return []
    if isinstance(condition, exp.Paren):
        return units(condition.this)
    if isinstance(condition, exp.Connector):
        return units(condition.left) + units(condition.right)
    return [condition]


def _ors(condition: exp.Expression | None) -> int:
    if isinstance(condition, exp.Paren):
        return _ors(condition.this)
    if isinstance(condition, exp.Connector):
        return isinstance(condition, exp.Or) + _ors(condition.left) + _ors(condition.right)
    return 0


def _positive(unit: exp.Expression) -> exp.Expression:
    return unit.this if isinstance(unit, exp.Not) else unit


def _subqueries(unit: exp.Expression) -> list[exp.Expression]:
    """Find the outermost queries inside a condition."""
    found, stack = [], [unit]
    while stack:
        node = stack.pop()
        if isinstance(node, (exp.Select, exp.SetOperation)):
            found.append(node)
        else:
            stack += node.iter_expressions()
    return found


def _aggregates(node: exp.Expression) -> list[exp.Expression]:
    return list(node.find_all(exp.AggFunc))


def _has_aggregate(node: exp.Expression) -> bool:
    return node.find(exp.AggFunc) is not None


# ---- component match


def component_match(gold: str, pred: str, dialect: str = "sqlite") -> dict[str, float]:
    """Compute F1 between the clauses of two queries: ``select, where, group, order, joins, set``, over all SELECTs.

    A clause that neither query has is left out. Names are compared without case, table qualifiers and aliases; literals
    count. It is a description for summaries: two queries with equal answers need not have equal clauses.
    """
    left, right = _components(gold, dialect), _components(pred, dialect)
    scores = {}
    for name in left:
        g, p = left[name], right[name]
        if g or p:
            scores[name] = 2 * (g & p).total() / (g.total() + p.total())
    return scores


def exact_match(gold: str, pred: str, dialect: str = "sqlite") -> bool:
    """Tell whether two queries have the same tables and, as sets, the same clauses, after Spider's exact set match.

    As there, values, LIMIT's number, DISTINCT and join conditions do not count, nor do case and aliases. Two things
    differ from Spider's script: a column is compared by its name alone, without its table or foreign keys, and the
    clauses of nested queries are pooled with those of the query around them.
    """
    left, right = _without_values(gold, dialect), _without_values(pred, dialect)
    return left is not None and left == right


@lru_cache(maxsize=4096)
def _without_values(sql: str, dialect: str) -> dict[str, Counter] | None:
    tree = parse(sql, dialect)
    if tree is None:
        return None
    tree = tree.copy()
    for node in list(tree.walk()):
        if isinstance(node, exp.Select):
            node.set("distinct", None)
        elif isinstance(node, exp.Join):
            node.set("on", None)
        elif isinstance(node, exp.Distinct) and len(node.expressions) == 1:
            node.replace(node.expressions[0])
        elif isinstance(node, (exp.Literal, exp.Boolean)) or _is_quoted_value(node):
            node.replace(exp.Var(this="value"))
    tables = Counter(table.name.lower() for table in tree.find_all(exp.Table))
    return _components_of(tree) | {"tables": tables}


def _is_quoted_value(node: exp.Expression) -> bool:
    """Tell whether this is a text in double quotes, as many gold queries have it, on the right of a comparison."""
    compared = (exp.EQ, exp.NEQ, exp.GT, exp.GTE, exp.LT, exp.LTE, exp.Like, exp.In, exp.Between)
    return (
        isinstance(node, exp.Column)
        and not node.table
        and isinstance(node.this, exp.Identifier)
        and node.this.quoted
        and isinstance(node.parent, compared)
        and node.arg_key != "this"
    )


@lru_cache(maxsize=4096)
def _components(sql: str, dialect: str) -> dict[str, Counter]:
    return _components_of(parse(sql, dialect))


def _components_of(tree: exp.Query | None) -> dict[str, Counter]:
    parts: dict[str, Counter] = {k: Counter() for k in ("select", "where", "group", "order", "joins", "set")}
    for node in tree.walk() if tree is not None else ():
        if isinstance(node, exp.Select):
            parts["select"].update(_text(column.unalias()) for column in node.expressions)
            if node.args.get("distinct"):
                parts["select"]["distinct"] += 1
            for clause in ("where", "having"):
                if condition := node.args.get(clause):
                    parts["where" if clause == "where" else "group"].update(_text(u) for u in units(condition.this))
            if group := node.args.get("group"):
                parts["group"].update(_text(key) for key in group.expressions)
            joins = node.args.get("joins") or []
            for join in joins:
                parts["joins"].update(_text(unit) for unit in units(join.args.get("on")))
            sources = [node.args.get("from_"), *joins]
            if joins:
                parts["joins"].update(s.this.name.lower() for s in sources if s and isinstance(s.this, exp.Table))
        if isinstance(node, exp.SetOperation):
            parts["set"][type(node).__name__.lower()] += 1
        if isinstance(node, exp.Query):
            if order := node.args.get("order"):
                parts["order"].update(_text(term) for term in order.expressions)
            if limit := node.args.get("limit"):
                parts["order"][f"limit {_text(limit.expression)}" if limit.expression else "limit"] += 1
    return parts


def _text(node: exp.Expression) -> str:
    """Normalise a node: no qualifiers, no case, sides of a symmetric comparison in one order, queries as a mark."""

    def plain(part: exp.Expression) -> exp.Expression:
        if isinstance(part, (exp.Select, exp.SetOperation)):
            return exp.Var(this="query")
        if isinstance(part, exp.Column):
            return exp.Var(this=part.name.lower())
        return part

    if isinstance(node, exp.EQ):
        return " = ".join(sorted((_text(node.left), _text(node.right))))
    return node.copy().transform(plain).sql("sqlite").lower().replace('"', "'")


# ---- order and subject, for the strict mode of the reward


def outer_order(sql: str, dialect: str = "sqlite") -> bool | None:
    """Tell whether the statement itself, not a subquery, ends in ORDER BY; None if it cannot be parsed."""
    tree = parse(sql, dialect)
    return None if tree is None else tree.args.get("order") is not None


@dataclass(frozen=True)
class Keyed:
    """A query without its LIMIT whose rows also carry the order terms."""

    sql: str
    keys: tuple[int, ...]
    """Positions of the order terms in a row."""
    offset: int


def with_order_keys(sql: str, columns: tuple[str, ...], dialect: str = "sqlite") -> Keyed | None:
    """Add the order terms of a query as columns, to see which rows tie; None if that cannot be written."""
    tree = parse(sql, dialect)
    if tree is None or tree.args.get("order") is None:
        return None
    tree = tree.copy()
    offset = tree.args.get("offset")
    if offset is not None and not offset.expression.is_int:
        return None
    names = [name.lower() for name in columns]
    extra = isinstance(tree, exp.Select) and not tree.args.get("distinct")
    plain = extra and len(tree.expressions) == len(columns)
    aliases = [e.alias.lower() for e in tree.expressions] if plain else names
    texts = [e.unalias() for e in tree.expressions] if plain else []
    keys, width = [], len(columns)
    for term in tree.args["order"].expressions:
        value = term.this if isinstance(term, exp.Ordered) else term
        if value.is_int:
            keys.append(int(value.name) - 1)
        elif isinstance(value, exp.Column) and not value.table and value.name.lower() in aliases:
            keys.append(aliases.index(value.name.lower()))
        elif value in texts:
            keys.append(texts.index(value))
        elif extra:
            tree.append("expressions", value.copy())
            keys.append(width)
            width += 1
        else:
            return None
    tree.set("limit", None)
    tree.set("offset", None)
    return Keyed(tree.sql(dialect_of(dialect)), tuple(keys), int(offset.expression.name) if offset else 0)


@dataclass(frozen=True)
class Subject:
    """Tables, columns and values of a query: enough to tell a real one from one that is empty by construction."""

    tables: frozenset[str]
    columns: frozenset[str]
    """Columns in conditions."""
    values: frozenset[str]
    """Literals of the conditions; quoted names count, since SQLite reads unknown ones as text."""
    constant: bool
    """Whether a condition has no column or compares a thing with itself, or a LIMIT or OFFSET may leave nothing."""


@lru_cache(maxsize=4096)
def subject(sql: str, dialect: str = "sqlite") -> Subject | None:
    """Return the subject of a query; None if it cannot be parsed."""
    tree = parse(sql, dialect)
    if tree is None:
        return None
    defined = {cte.alias.lower() for cte in tree.find_all(exp.CTE)}
    conditions = [node.this for node in tree.find_all(exp.Where, exp.Having)]
    conditions += [on for join in tree.find_all(exp.Join) if (on := join.args.get("on"))]
    columns, values = set(), set()
    for condition in conditions:
        for node in condition.find_all(exp.Column, exp.Literal):
            if isinstance(node.parent, (exp.Limit, exp.Offset)):
                continue
            if isinstance(node, exp.Literal) or (node.this.args.get("quoted") and not node.table):
                values.add(_value(node))
            else:
                columns.add(node.name.lower())
    return Subject(
        tables=frozenset(t.name.lower() for t in tree.find_all(exp.Table) if t.name.lower() not in defined),
        columns=frozenset(columns),
        values=frozenset(values),
        constant=any(_is_constant(unit) for condition in conditions for unit in units(condition))
        or any(not re.fullmatch(r"[1-9]\d*", limit.expression.sql()) for limit in tree.find_all(exp.Limit))
        or tree.find(exp.Offset) is not None,
    )


def _value(node: exp.Expression) -> str:
    """Normalise a literal so that ``>= 2`` is ``> 1`` and ``LIKE '%x%'`` is ``= 'x'``."""
    text = node.name.lower().strip("%_ ")
    try:
        number = float(text)
    except ValueError:
        return text
    upper = isinstance(node.parent, exp.LTE) or node.arg_key == "high"
    lower = isinstance(node.parent, exp.GTE) or node.arg_key == "low"
    return repr(number + (upper - lower) * number.is_integer())


def _is_constant(unit: exp.Expression) -> bool:
    unit = _positive(unit)
    if unit.find(exp.Column) is None and not _subqueries(unit) and not _has_aggregate(unit):
        return True
    return isinstance(unit, exp.Binary) and unit.left == unit.right


def same_subject(gold: str, pred: str, dialect: str = "sqlite") -> bool:
    """Tell whether `pred` is a real query with the subject of `gold`.

    It reads the same tables, compares with the same literals, filters by at least one of the same columns wherever gold
    filters, and nothing in it is empty by construction (a constant condition, LIMIT 0, OFFSET).
    """
    left, right = subject(gold, dialect), subject(pred, dialect)
    if left is None or right is None or right.constant:
        return False
    if (left.tables, left.values) != (right.tables, right.values):
        return False
    return not left.columns or bool(left.columns & right.columns)


# ---- classes of error messages

ERROR_CLASSES = (
    "no_such_column",
    "no_such_table",
    "syntax",
    "ambiguous_column",
    "type",
    "function",
    "aggregation",
    "timeout",
    "other",
)
_PATTERNS = [
    (name, re.compile(pattern, re.IGNORECASE))
    for name, pattern in (
        ("timeout", r"no result within|timeout|timed out|interrupted"),
        ("ambiguous_column", r"ambiguous (column|reference)|column reference .* is ambiguous"),
        (
            "aggregation",
            r"misuse of (aggregate|window)|must appear in the group by|aggregate functions? (are|calls)|"
            r"a group by clause is required|having clause on a non-aggregate|group by terms|"
            r"window functions? are not allowed|aggregate function calls cannot|"
            r"cannot contain aggregates",
        ),
        (
            "function",
            r"no such function|wrong number of arguments|function .* does not exist|user-defined function|"
            r"function .* is not unique|not a(n aggregate| window)? function",
        ),
        (
            "no_such_column",
            r"no such column|column .* does not exist|referenced column|cannot join using column|unknown column|"
            r"has no column|invalid reference to from-clause entry",
        ),
        (
            "no_such_table",
            r"no such table|(relation|table with name) .* does not exist|referenced table|no such view|"
            r"missing from-clause entry|unknown table|no tables specified",
        ),
        (
            "type",
            r"datatype mismatch|operator does not exist|invalid input syntax|cannot be matched|cannot cast|"
            r"types? .* and .* cannot|must be type|out of range|division by zero|sub-select returns|"
            r"row value misused|subquery must return|same number of (result )?columns|cannot be cast|"
            r"in an equality|type .* does not exist|no function matches|could not (convert|determine|identify)",
        ),
        (
            "syntax",
            r"syntax error|incomplete input|unrecognized token|parser stack|expression tree|should come after|"
            r"unterminated|at or near",
        ),
    )
]


def error_class(message: str) -> str:
    """Classify a database's error message of SQLite, PostgreSQL or DuckDB as one of `ERROR_CLASSES`."""
    told = re.sub(r'".*"', '""', message, flags=re.DOTALL)[:1000]  # without the query's own words, which may be many
    return next((name for name, pattern in _PATTERNS if pattern.search(told)), "other")
