"""The one way to parse a query with sqlglot, and the order and subject that the reward's strict mode reads from a tree.

Nothing here decides a verdict of the reference mode. The security boundary is the database, not the tree.
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


def dialect_of(name: str) -> str:
    """Return sqlglot's name of a database's dialect."""
    return "postgres" if name == "postgresql" else name


# ---- the one way to a tree

MAX_CHARS, MAX_STEPS, MAX_DEPTH = 10_000, 5_000, 100
"""Bounds of a text that is parsed: its length, the parser's steps over tokens, and the depth of the tree.

Spider's 8,034 gold queries take at most 577 characters, 160 steps and a depth of 21.
"""
MAX_HEX = 1000
"""Most digits of a hexadecimal number: sqlglot writes it in decimal, which Python refuses from 4,300 digits on."""

logging.getLogger("sqlglot").setLevel(logging.ERROR)  # its warnings are about queries of models and users


class _TooManySteps(Exception):
    """The parser was stopped."""


@cache
def _parser(dialect: str) -> Any:
    """Return a subclass of sqlglot's parser that stops after `MAX_STEPS`.

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


def units(condition: exp.Expression | None) -> list[exp.Expression]:
    """Split a condition at AND and OR."""
    if condition is None:
        return []
    if isinstance(condition, exp.Paren):
        return units(condition.this)
    if isinstance(condition, exp.Connector):
        return units(condition.left) + units(condition.right)
    return [condition]


def positive(unit: exp.Expression) -> exp.Expression:
    """Return a condition without its NOT."""
    return unit.this if isinstance(unit, exp.Not) else unit


def subqueries(unit: exp.Expression) -> list[exp.Expression]:
    """Find the outermost queries inside a condition."""
    queries, stack = [], [unit]
    while stack:
        node = stack.pop()
        if isinstance(node, (exp.Select, exp.SetOperation)):
            queries.append(node)
        else:
            stack += node.iter_expressions()
    return queries


def has_aggregate(node: exp.Expression) -> bool:
    """Tell whether an expression holds an aggregate."""
    return node.find(exp.AggFunc) is not None


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
    """True if a condition has no column or compares a term with itself, or LIMIT or OFFSET may leave no row."""


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
    unit = positive(unit)
    if unit.find(exp.Column) is None and not subqueries(unit) and not has_aggregate(unit):
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
