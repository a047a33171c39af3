"""Mutation test of a gold query: makes small changes to it, and finds those that leave its result the same.

A task whose gold gives the same rows with its comparison flipped rewards a policy that flipped it. Mutants are made
on sqlglot's tree of the gold query and compared by the reward itself, in strict mode, except that an outer DISTINCT
counts. A column is replaced by one of the same table and kind (number or text).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from sqlglot import exp

from sqlbench.database.types import Limits, Schema
from sqlbench.interfaces import Database
from sqlbench.reward import score
from sqlbench.sql_analysis import dialect_of, parse

MUTATIONS = {
    "comparison": "a comparison is negated or turned round",
    "boundary": "a comparison with a number gains or loses equality",
    "order": "ORDER BY goes the other way",
    "distinct": "DISTINCT is lost, or put into a count",
    "aggregate": "another aggregate function",
    "column": "another column is selected, compared, grouped or ordered by",
    "join": "another column is joined on",
    "condition": "a condition, or one side of AND and OR, is lost",
    "connective": "AND and OR change places",
    "compound": "one half of a set operation alone, or another set operation",
}
MAX_MUTANTS = 150
"""Most mutants of one gold query, in the order in which its tree is walked."""
_ALTERNATIVES = 8
_SECONDS = 2.0

_FLIPPED = {exp.GT: exp.LT, exp.LT: exp.GT, exp.GTE: exp.LTE, exp.LTE: exp.GTE, exp.EQ: exp.NEQ, exp.NEQ: exp.EQ}
_EQUALITY = {exp.GT: exp.GTE, exp.GTE: exp.GT, exp.LT: exp.LTE, exp.LTE: exp.LT}
_AGGREGATES = (exp.Avg, exp.Max, exp.Min, exp.Sum)
_SETS = (exp.Union, exp.Intersect, exp.Except)
Change = tuple[str, exp.Expression, exp.Expression]


def mutants(sql: str, schema: Schema) -> Iterator[tuple[str, str]]:
    """Yield named mutants of a query (`MUTATIONS`), each once; none if sqlglot cannot parse it."""
    tree = parse(sql, schema.dialect)
    if tree is None:
        return
    root = exp.Paren(this=tree.copy())  # so that the query itself can be replaced like any part of it
    # By default the generator copies the tree each time, which is half of the work.
    seen = {root.this.sql(dialect=dialect_of(schema.dialect), copy=False)}
    for name, node, new in islice(_changes(root, schema), 10 * MAX_MUTANTS):
        node.replace(new)
        text = root.this.sql(dialect=dialect_of(schema.dialect), copy=False)
        new.replace(node)
        if text not in seen and len(seen) <= MAX_MUTANTS:
            seen.add(text)
            yield name, text


def unchanged_by(gold: str, database: Database) -> Iterator[str]:
    """Yield the names of the mutations that do not change a gold query's result, one for each such mutant."""
    limits = Limits(seconds=_SECONDS)
    for name, mutant in mutants(gold, database.schema()):
        if score(gold, mutant, database, keep_distinct=True, limits=limits).match == 1:
            yield name


def _changes(root: exp.Expression, schema: Schema) -> Iterator[Change]:
    """Yield replacements of nodes; the caller makes and undoes each before it takes the next."""
    for node in list(root.walk()):
        yield from ((name, node, new) for name, new in _of_node(node))
        if isinstance(node, exp.Column):
            name = "join" if _within(node, exp.Join) else "column"
            yield from ((name, node, new) for new in _other_columns(node, schema))


def _within(node: exp.Expression, kind: type[exp.Expression]) -> bool:
    """Tell whether a node is in a clause of this kind in its own SELECT."""
    ancestor = node.find_ancestor(kind, exp.Select)
    return isinstance(ancestor, kind)


def _of_node(node: exp.Expression) -> Iterator[tuple[str, exp.Expression]]:
    kind, joined = type(node), _within(node, exp.Join)
    if kind in _FLIPPED and not joined:
        yield "comparison", _FLIPPED[kind](this=node.this.copy(), expression=node.expression.copy())
    if kind in _EQUALITY and isinstance(node.expression, exp.Literal):
        yield "boundary", _EQUALITY[kind](this=node.this.copy(), expression=node.expression.copy())
    if isinstance(node, (exp.Between, exp.Like, exp.In, exp.Is)) and not isinstance(node.parent, exp.Not):
        yield "comparison", exp.Not(this=node.copy())
    if isinstance(node, exp.Not):
        yield "comparison", node.this.copy()
    if isinstance(node, exp.Order):
        yield "order", _turned(node)
    if isinstance(node, exp.Select) and node.args.get("distinct"):
        yield "distinct", _without(node, "distinct")
    if isinstance(node, exp.Count) and isinstance(node.this, exp.Distinct) and len(node.this.expressions) == 1:
        yield "distinct", exp.Count(this=node.this.expressions[0].copy())
    elif isinstance(node, exp.Count) and isinstance(node.this, exp.Column):
        yield "distinct", exp.Count(this=exp.Distinct(expressions=[node.this.copy()]))
    if kind in _AGGREGATES:
        yield from (("aggregate", other(this=node.this.copy())) for other in _AGGREGATES if other is not kind)
    if isinstance(node, exp.Select):
        yield from (("condition", _without(node, part)) for part in ("where", "having") if node.args.get(part))
    if isinstance(node, exp.Connector) and not joined:
        yield from (("condition", side.copy()) for side in (node.left, node.right))
        other = exp.Or if isinstance(node, exp.And) else exp.And
        yield "connective", other(this=node.left.copy(), expression=node.right.copy())
    if isinstance(node, exp.SetOperation):
        yield from (("compound", half.copy()) for half in (node.left, node.right))
        yield from (("compound", other(**node.copy().args)) for other in _SETS if other is not kind)


def _turned(order: exp.Expression) -> exp.Expression:
    new = order.copy()
    for key in new.expressions:
        key.set("desc", not key.args.get("desc"))
        key.set("nulls_first", None)
    return new


def _without(node: exp.Expression, part: str) -> exp.Expression:
    new = node.copy()
    new.set(part, None)
    return new


def _other_columns(node: exp.Expression, schema: Schema) -> Iterator[exp.Expression]:
    select = node.find_ancestor(exp.Select)
    if select is None:
        return
    used = {t.alias_or_name.lower(): t.name.lower() for t in select.find_all(exp.Table) if t.parent_select is select}
    wanted = [used[node.table.lower()]] if node.table.lower() in used else list(used.values())
    for table in (t for name in wanted for t in schema.tables if t.name.lower() == name):
        column = next((c for c in table.columns if c.name.lower() == node.name.lower()), None)
        if column:
            others = (c for c in table.columns if c is not column and _is_text(c.type) == _is_text(column.type))
            for other in islice(others, _ALTERNATIVES):
                yield exp.column(other.name, table=node.args.get("table"), quoted=not other.name.isidentifier())
            return


def _is_text(declared: str) -> bool:
    return any(word in declared for word in ("CHAR", "TEXT", "CLOB", "DATE", "TIME")) or not declared
