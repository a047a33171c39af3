"""Clauses of a query, counted and compared after Spider's evaluation script: hardness, component and exact match.

They describe queries and do not decide a verdict. A query without a tree (`sqlbench.sql_analysis.parse`) has
hardness ``extra`` and no components.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from sqlglot import exp

from sqlbench.sql_analysis import has_aggregate, parse, positive, subqueries, units

HARDNESS = ("easy", "medium", "hard", "extra")
LEVELS = (*HARDNESS, "simple", "moderate", "challenging")
"""Spider's levels, then BIRD's, each from the easiest."""


def hardness(sql: str, dialect: str = "sqlite") -> str:
    """Classify a query as one of `HARDNESS`, by Spider's published rules.

    The first SELECT of a set operation counts. Its components are WHERE, GROUP BY, ORDER BY, LIMIT, each join, each
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
    likes = sum(isinstance(positive(unit), (exp.Like, exp.ILike)) for unit in conditions)
    clauses = sum(clause is not None for clause in (where, group, order, select.args.get("limit")))
    nested = set_operation + sum(len(subqueries(unit)) for unit in conditions)
    aggregates = (
        sum(has_aggregate(column) for column in select.expressions)
        + sum(isinstance(unit, exp.Not) for unit in where_units)  # the script counts NOT where it means aggregates
        + (sum(len(_aggregates(term)) for term in order.expressions) if order else 0)
        + sum(isinstance(unit, exp.Not) for unit in having_units)
        + max(0, len(having_units) - 1)  # and the connectives of HAVING
    )
    keys = group.expressions if group else []
    others = (aggregates > 1) + (len(select.expressions) > 1) + (len(where_units) > 1) + (len(keys) > 1)
    return clauses + len(joins) + ors + likes, nested, others


def _ors(condition: exp.Expression | None) -> int:
    if isinstance(condition, exp.Paren):
        return _ors(condition.this)
    if isinstance(condition, exp.Connector):
        return isinstance(condition, exp.Or) + _ors(condition.left) + _ors(condition.right)
    return 0


def _aggregates(node: exp.Expression) -> list[exp.Expression]:
    return list(node.find_all(exp.AggFunc))


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
    """Tell whether a node is a text in double quotes on the right of a comparison, as in many gold queries."""
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
    """Normalise a node: no qualifiers, no case, sides of an equality in a fixed order, a placeholder per query."""

    def plain(part: exp.Expression) -> exp.Expression:
        if isinstance(part, (exp.Select, exp.SetOperation)):
            return exp.Var(this="query")
        if isinstance(part, exp.Column):
            return exp.Var(this=part.name.lower())
        return part

    if isinstance(node, exp.EQ):
        return " = ".join(sorted((_text(node.left), _text(node.right))))
    return node.copy().transform(plain).sql("sqlite").lower().replace('"', "'")
