"""Causes of wrong answers: one for each, from the results and the syntax trees of gold and prediction.

Results count before trees, because equal rows in another order say more than any two texts. Of several differences
the one that entails the others is named: tables, joins, aggregates, columns, then conditions, order and DISTINCT. A
cause describes a verdict and does not decide it. It compares two texts, so an equivalent form beside a real mistake
can hide that mistake. Failed rollouts have no cause, because the policy did not cause them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cache
from itertools import islice, product
from pathlib import Path

import pandas as pd
from sqlglot import exp

from sqlbench.agent.trajectory import OVERLONG, Trajectory
from sqlbench.data.tasks import open_dataset
from sqlbench.database.engine import cached_database
from sqlbench.database.error_classes import error_class
from sqlbench.database.types import NO_STATEMENT, QueryResult
from sqlbench.errors import SqlbenchError
from sqlbench.interfaces import Database
from sqlbench.reward import REFERENCE, STRICT, Strictness, prepare
from sqlbench.runs import read_trajectories
from sqlbench.sql_analysis import parse, units
from sqlbench.table_match import ResultTable, SearchLimit, same_bag
from sqlbench_lab.rollouts import RunFacts

NO_SQL, DID_NOT_RUN, TOO_LONG, UNREADABLE = "no SQL", "did not run", "prompt too long", "not parsed"
TABLE, JOIN, AGGREGATE, COLUMN = "wrong table", "wrong join", "wrong aggregate or grouping", "wrong column"
EXTRA, MISSING, SET, CONDITION = "extra column", "missing column", "wrong set operation", "wrong condition"
SPELLING, ORDER, DISTINCT, OTHER = "value spelled differently", "wrong order or limit", "DISTINCT", "other difference"
MOST_COLUMNS, MOST_PROJECTIONS = 100, 100
"""Maximum number of columns of a result searched for another, and of column choices tried."""
MOST_CHARS = 200
"""Maximum number of characters of a value compared in their spelling."""


def cause(
    gold: str,
    pred: str | None,
    gold_result: QueryResult | None = None,
    pred_result: QueryResult | None = None,
    dialect: str = "sqlite",
) -> str:
    """Name the cause of a wrong answer, in bounded time for any text (`sqlbench.sql_analysis.statements`).

    Args:
        gold: the right query.
        pred: the wrong query.
        gold_result: complete result of `gold`; None if unknown.
        pred_result: complete result of `pred`; None if unknown.
        dialect: dialect of the database.
    """
    if not re.search(r"\bselect\b|\bvalues\s{0,9}\(", pred or "", re.IGNORECASE):
        return NO_SQL
    if pred_result is not None and not pred_result.ok:
        failed = error_class(pred_result.error or "") if pred_result.status == "error" else pred_result.status
        return f"{DID_NOT_RUN}: {failed.replace('_', ' ')}"
    seen = gold_result is not None and gold_result.ok and pred_result is not None
    if seen and (shown := _by_results(gold_result.rows, pred_result.rows)):  # type: ignore[union-attr]
        return shown
    trees = parse(gold, dialect), parse(pred or "", dialect)
    if trees[0] is None or trees[1] is None:
        return UNREADABLE
    a, b = (_Facts.of(tree) for tree in trees if tree is not None)
    if seen and set(gold_result.rows) == set(pred_result.rows) and a.distinct != b.distinct:  # type: ignore[union-attr]
        return DISTINCT
    return _by_trees(a, b)


def _by_results(gold: list[tuple], pred: list[tuple]) -> str | None:
    """Name the cause if the rows alone show it."""
    if not gold or not pred:
        return None
    wide = len(gold[0]), len(pred[0])
    if wide[0] != wide[1]:
        contained = _within(gold, pred) if wide[0] < wide[1] else _within(pred, gold)
        return None if not contained else EXTRA if wide[0] < wide[1] else MISSING
    if len(gold) != len(pred):
        return None
    try:
        if same_bag(ResultTable(gold), ResultTable(pred)):
            return ORDER
        folded = [[tuple(_folded(value) for value in row) for row in rows] for rows in (gold, pred)]
        return SPELLING if same_bag(ResultTable(folded[0]), ResultTable(folded[1])) else None
    except SearchLimit:
        return None


def _within(narrow: list[tuple], wide: list[tuple]) -> bool:
    """Return whether some columns of one result are the other result, in any order of rows and columns."""
    if len(narrow) != len(wide) or len(wide[0]) > MOST_COLUMNS:
        return False
    want, have = ([Counter(column) for column in zip(*rows, strict=True)] for rows in (narrow, wide))
    places = [[j for j, column in enumerate(have) if column == wanted] for wanted in want]
    bag = Counter(narrow)
    choices = islice(product(*places), MOST_PROJECTIONS)
    return any(len(set(c)) == len(c) and Counter(tuple(row[j] for j in c) for row in wide) == bag for c in choices)


def _folded(value: object) -> object:
    """Reduce a text to its letters and digits, without case and accents."""
    if not isinstance(value, str):
        return value
    plain = unicodedata.normalize("NFKD", value[:MOST_CHARS]).casefold()
    return "".join(c for c in plain if c.isalnum()) or value


@dataclass
class _Facts:
    """Tables, columns and operations of a query over all its SELECTs, without aliases and case."""

    tables: set[str] = field(default_factory=set)
    columns: set[tuple[str, str]] = field(default_factory=set)
    """Table ('' if unclear) and name; columns of join conditions are left out."""
    joins: Counter = field(default_factory=Counter)
    aggregates: Counter = field(default_factory=Counter)
    groups: set[str] = field(default_factory=set)
    outputs: int = 0
    """Number of expressions of the first SELECT."""
    selected: set[str] = field(default_factory=set)
    """Columns in the expressions of the first SELECT."""
    sets: Counter = field(default_factory=Counter)
    conditions: Counter = field(default_factory=Counter)
    masked: Counter = field(default_factory=Counter)
    """The conditions with a mark for each value."""
    values: Counter = field(default_factory=Counter)
    order: list[str] = field(default_factory=list)
    distinct: Counter = field(default_factory=Counter)

    @classmethod
    def of(cls, tree: exp.Expression) -> _Facts:
        facts = cls()
        defined = {cte.alias.lower() for cte in tree.find_all(exp.CTE)}
        names: dict[str, str] = {}
        for table in tree.find_all(exp.Table):
            name, alias = table.name.lower(), table.alias_or_name.lower()
            if name not in defined:
                facts.tables.add(name)
                names[alias] = name if names.get(alias, name) == name else ""
        first: exp.Expression = tree
        while isinstance(first, (exp.SetOperation, exp.Subquery)):
            first = first.this
        if isinstance(first, exp.Select):
            facts.outputs = len(first.expressions)
            columns = (column for part in first.expressions for column in part.find_all(exp.Column))
            facts.selected.update(column.name.lower() for column in columns)
        joined: set[int] = set()
        for node in tree.walk():
            if isinstance(node, exp.Select):
                facts._select(node, joined)
            elif isinstance(node, exp.SetOperation):
                facts.sets[f"{node.key} {bool(node.args.get('distinct'))}"] += 1
            elif isinstance(node, exp.AggFunc):
                facts.aggregates[node.key] += 1
                facts.distinct[node.key] += isinstance(node.this, exp.Distinct)
            if isinstance(node, exp.Query):
                for clause in ("order", "limit", "offset"):
                    if part := node.args.get(clause):
                        facts.order += [_key(term) for term in part.expressions or [part.expression]]
        for node in tree.find_all(exp.Column):
            if id(node) not in joined and not _is_value(node):
                facts.columns.add((names.get(node.table.lower(), "") or _only_table(node, defined), node.name.lower()))
        return facts

    def _select(self, select: exp.Select, joined: set[int]) -> None:
        self.distinct["select"] += select.args.get("distinct") is not None
        if group := select.args.get("group"):
            self.groups.update(_key(key) for key in group.expressions)
        joins = select.args.get("joins") or []
        clauses = [select.args.get("where"), select.args.get("having")]
        conditions = [clause.this for clause in clauses if clause] + [j.args["on"] for j in joins if j.args.get("on")]
        for join in joins:
            self.joins[join.side.lower()] += bool(join.side)
            self.joins.update(f"{name.name.lower()} = {name.name.lower()}" for name in join.args.get("using") or [])
        for condition in conditions:
            self.masked["or"] += sum(1 for _ in condition.find_all(exp.Or))
            for unit in units(condition):
                if pair := _joined(unit):
                    self.joins[" = ".join(sorted(column.name.lower() for column in pair))] += 1
                    joined.update(id(column) for column in pair)
                else:
                    self.conditions[_key(unit)] += 1
                    self.masked[_key(unit, "?")] += 1
                    self.values.update(_values(unit))


def _by_trees(a: _Facts, b: _Facts) -> str:
    bare = any(not table for table, _ in a.columns | b.columns)
    columns = [{name if bare else f"{table}.{name}" for table, name in facts.columns} for facts in (a, b)]
    if a.tables - b.tables and b.tables - a.tables:
        return TABLE
    if a.tables != b.tables or a.joins != b.joins:
        return JOIN
    if a.aggregates != b.aggregates:
        return AGGREGATE
    if any(left - right and right - left for left, right in (columns, (a.selected, b.selected))):
        return COLUMN
    if a.outputs != b.outputs:
        return EXTRA if a.outputs < b.outputs else MISSING
    if a.sets != b.sets:
        return SET
    if a.groups != b.groups:
        return AGGREGATE
    if a.masked != b.masked:
        return CONDITION
    if a.conditions != b.conditions:
        return SPELLING if _alike(a.values, b.values) else CONDITION
    if a.order != b.order:
        return ORDER
    if a.distinct != b.distinct:
        return DISTINCT
    return COLUMN if a.selected != b.selected else OTHER


def _joined(unit: exp.Expression) -> tuple[exp.Column, exp.Column] | None:
    """Return the columns that a condition joins: both sides of an equation, or of IN with a subquery."""
    left, right = unit.this, unit.args.get("expression")
    if isinstance(unit, exp.In) and (query := unit.args.get("query")):
        query = query.unnest()
        right = query.expressions[0].unalias() if isinstance(query, exp.Select) and query.expressions else None
    elif not isinstance(unit, exp.EQ):
        return None
    both = isinstance(left, exp.Column) and isinstance(right, exp.Column)
    return (left, right) if both and not _is_value(left) and not _is_value(right) else None


def _is_value(node: exp.Expression) -> bool:
    """Return whether a node is a literal, or a quoted name without a table.

    SQLite reads a quoted name as text if it is not the name of a column.
    """
    if isinstance(node, exp.Column):
        return bool(node.this.args.get("quoted")) and not node.table
    return isinstance(node, exp.Literal)


def _only_table(column: exp.Column, defined: set[str]) -> str:
    """Return the table of an unqualified column if its SELECT reads no other table; else an empty text."""
    select = column.find_ancestor(exp.Select)
    source = select.args.get("from_") if select is not None and not column.table else None
    if source is None or not isinstance(source.this, exp.Table) or select.args.get("joins"):
        return ""
    name = source.this.name.lower()
    return "" if name in defined else name


_MIRRORED = {exp.GT: exp.LT, exp.GTE: exp.LTE}


def _key(node: exp.Expression, value: str | None = None) -> str:
    """Write an expression in a normal form. A subquery becomes a mark, because its SELECTs are counted separately.

    Args:
        value: replacement for each value, if given.
    """
    if isinstance(node, (exp.Query, exp.Subquery)):
        return "query"
    if _is_value(node):
        return value or _text(node)
    if isinstance(node, exp.Column):
        return node.name.lower()
    if isinstance(node, exp.Paren):
        return _key(node.this, value)
    parts = [_key(part, value) for part in node.iter_expressions()]
    name: type[exp.Expression] = type(node)
    if isinstance(node, (exp.EQ, exp.NEQ)):
        parts.sort()
    elif name in _MIRRORED:
        name, parts = _MIRRORED[name], parts[::-1]
    flags = [k for k, v in node.args.items() if v is True and k in ("desc", "distinct")]
    plain = node.this.lower() if isinstance(node.this, str) else ""
    return f"{name.key}({', '.join([plain, *flags, *parts])})"


def _text(node: exp.Expression) -> str:
    if isinstance(node, exp.Literal) and not node.is_string:
        try:
            return repr(float(node.name))
        except ValueError:
            return node.name
    return repr(node.name)


def _values(unit: exp.Expression) -> Iterator[str]:
    for node in unit.find_all(exp.Literal, exp.Column):
        if _is_value(node):
            yield node.name


def _alike(a: Counter, b: Counter) -> bool:
    """Return whether values differ only in spelling: case, accents, marks, a letter or two."""
    left, right = (sorted((one - other).elements()) for one, other in ((a, b), (b, a)))
    return len(left) == len(right) and all(_spelled(x, y) for x, y in zip(left, right, strict=True))


def _spelled(x: str, y: str) -> bool:
    x, y = str(_folded(x)), str(_folded(y))
    if x.isdigit() or y.isdigit():
        return x == y
    return x == y or SequenceMatcher(None, x, y, autojunk=False).ratio() >= 0.8


# ---- the wrong rollouts of a run


def mistakes(folder: Path | str, data: Path | str | None = None) -> pd.DataFrame:
    """Tabulate the wrong rollouts of a run with their causes, those of the most frequent cause first.

    Gold and prediction run again if the run's database is on this machine; else the trees alone decide.

    Args:
        folder: run folder.
        data: data set folder, if not the one that the run's config names.
    """
    facts, causes = RunFacts.of(Path(folder)), dict[tuple, str]()
    root, rules = data or facts.data, STRICT if facts.strict else REFERENCE

    @cache
    def database(name: str) -> Database | None:
        try:
            return cached_database(open_dataset(root).database(name)) if root else None
        except SqlbenchError:
            return None

    rows = []
    for t in read_trajectories(folder):
        if t.correct is False:
            key = t.db_id, t.gold, t.pred, t.reason == OVERLONG
            if key not in causes:
                causes[key] = TOO_LONG if key[-1] else _cause_of(t, database(t.db_id), rules)
            rows.append((causes[key], t.task_id, t.question, t.gold, t.pred or ""))
    frame = pd.DataFrame(rows, columns=["cause", "task", "question", "gold", "pred"])
    ranks = {name: n for n, (name, _) in enumerate(Counter(frame["cause"]).most_common())}
    return frame.sort_values("cause", key=lambda names: names.map(ranks), kind="stable", ignore_index=True)


def _cause_of(t: Trajectory, database: Database | None, rules: Strictness) -> str:
    ran = next((e for e in reversed(t.executions) if e.sql == t.pred), None)
    if ran is not None and ran.status != "ok":  # a failed query is not tried again
        return cause(t.gold, t.pred, None, QueryResult(ran.status, error=ran.error))
    if database is None:
        return cause(t.gold, t.pred)
    texts = (prepare(sql or "", rules) for sql in (t.gold, t.pred))
    gold, pred = (database.execute(x) if x else QueryResult("rejected", error=NO_STATEMENT) for x in texts)
    return cause(t.gold, t.pred, gold, pred, database.dialect)


def cause_table(found: pd.DataFrame) -> pd.DataFrame:
    """Count wrong rollouts by cause, with one example of each.

    Args:
        found: table from `mistakes`.
    """
    groups = found.groupby("cause", sort=False)
    table = groups[["question", "gold", "pred"]].first()
    table.insert(0, "rollouts", groups.size())
    return table.rename(columns={"question": "example", "pred": "predicted"}).reset_index()


def cause_changes(
    pairs: Mapping[str, Sequence[Path | str]], data: Path | str | None = None, most: int = 6
) -> pd.DataFrame:
    """Count the causes before and after each training, the most frequent ones before it.

    Args:
        pairs: runs before and after, by training.
        data: as for `mistakes`.
        most: maximum number of causes per training.
    """
    tables = []
    for name, runs in pairs.items():
        before, after = (mistakes(folder, data)["cause"].value_counts() for folder in runs)
        table = (
            pd.DataFrame({"before": before, "after": after}).fillna(0).astype(int).rename_axis("cause").reset_index()
        )
        table.insert(0, "Training", name)
        tables.append(table.sort_values(["before", "cause"], ascending=[False, True]).head(most))
    return pd.concat(tables, ignore_index=True)
