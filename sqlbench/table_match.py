"""Exact comparison of two result tables, without trying column orders one by one.

Columns may come in any order and column names do not matter. Rows are compared as a list or as a multiset, the latter
optionally within blocks of rows that tie. The search fixes one column after the other and keeps
only orders whose row prefixes still agree, so equal-looking columns cost about rows x columns². `SearchLimit` is
raised after `MAX_CELLS` looked-at cells, which only tables built to defeat the search reach.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from math import isclose, nan

MAX_CELLS = 20_000_000
FLOAT_TOLERANCE = 1e-9
"""Relative difference under which two numbers are one value, in strict mode."""


class SearchLimit(Exception):
    """The search for a column order was given up."""


class ResultTable:
    """A result table with values derived for comparisons, computed once (a gold answer is compared many times)."""

    def __init__(self, rows: list[tuple], labels: Sequence[int] | None = None) -> None:
        self.rows = rows
        self.width = len(rows[0]) if rows else 0
        self.labels = labels
        """Block of each row where rows may only change places within blocks."""

    @cached_property
    def bag(self) -> Counter:
        """Count each row (with its label)."""
        return Counter(self.rows if self.labels is None else zip(self.labels, self.rows, strict=True))

    @cached_property
    def columns(self) -> list[tuple]:
        """Return the table by columns."""
        return list(zip(*self.rows, strict=True))

    @cached_property
    def column_bag(self) -> Counter:
        """Count each whole column as a sequence."""
        return Counter(self.columns)

    @cached_property
    def signatures(self) -> list[frozenset]:
        """Count the values of each column; interchangeable columns have equal signatures."""
        return [frozenset(Counter(column).items()) for column in self.columns]

    @cached_property
    def has_whole_floats(self) -> bool:
        """Tell whether any cell is a float that equals an integer."""
        return self.has_floats and any(c.is_integer() for c in chain.from_iterable(self.rows) if type(c) is float)

    @cached_property
    def has_floats(self) -> bool:
        """Tell whether any cell is a float."""
        return float in set(map(type, chain.from_iterable(self.rows)))


def _within(part: Counter, whole: Counter, equal: bool) -> bool:
    """Tell whether one multiset is contained in another; `equal` promises that they have the same size."""
    if equal:
        return dict.__eq__(part, whole)  # Counter compares in Python
    return all([count <= whole.get(item, 0) for item, count in part.items()])


def same_list(gold: ResultTable, pred: ResultTable) -> bool:
    """Tell whether a column order makes the row lists equal: exactly if the columns are equal as multisets."""
    if gold.rows == pred.rows:
        return True
    if len(gold.rows) != len(pred.rows) or gold.width != pred.width or gold.width == 1:
        return False
    return _within(pred.column_bag, gold.column_bag, True)


def same_bag(gold: ResultTable, pred: ResultTable) -> bool:
    """Tell whether a column order makes every row of `pred` (with its label) one of `gold`, counting repetitions.

    With equally many rows that is equality of multisets; `gold` may also hold more rows than `pred`.
    """
    if gold.width != pred.width or len(gold.rows) < len(pred.rows):
        return False
    if not pred.rows or (gold.labels is None and gold.rows == pred.rows):
        return True
    if _within(pred.bag, gold.bag, len(gold.rows) == len(pred.rows)):
        return True
    return gold.width > 1 and _search(gold, pred)


def _search(gold: ResultTable, pred: ResultTable) -> bool:
    width, n = gold.width, len(pred.rows)
    equal = len(gold.rows) == n
    if equal:
        if not _within(Counter(pred.signatures), Counter(gold.signatures), True):
            return False
        fits = [[j for j in range(width) if pred.signatures[j] == s] for s in gold.signatures]
        if all(len(fit) == 1 for fit in fits):  # the values alone tell the columns apart
            swapped = ResultTable(list(zip(*[pred.columns[fit[0]] for fit in fits], strict=True)), pred.labels)
            return _within(swapped.bag, gold.bag, True)
    else:
        fits = [list(range(width)) for _ in range(width)]
    # Few candidates first, then many different values: the sooner a prefix tells rows apart, the fewer orders remain.
    order = sorted(range(width), key=lambda c: (len(fits[c]), -len(set(gold.columns[c]))))
    levels: list[tuple[dict, Counter, list[int]]] = []
    cells = 0

    def level(depth: int, ids: list[int]) -> tuple[dict, Counter, list[int]]:
        """Number the different row prefixes of gold after `depth` + 1 columns, equally on every path."""
        if depth == len(levels):
            numbers: dict = {}
            prefix = [
                numbers.setdefault(pair, len(numbers)) for pair in zip(ids, gold.columns[order[depth]], strict=True)
            ]
            levels.append((numbers, Counter(prefix), prefix))
        return levels[depth]

    interchangeable: dict[tuple[int, int], bool] = {}

    def swappable(i: int, j: int) -> bool:
        """Tell whether exchanging two columns of pred keeps the multiset of rows, so that trying one is enough."""
        if (i, j) not in interchangeable:
            labels = pred.labels or [0] * n
            bag = pred.bag if pred.labels else Counter(zip(labels, pred.rows, strict=True))
            swap = list(range(width))
            swap[i], swap[j] = j, i
            interchangeable[i, j] = all(
                bag.get((label, tuple([row[k] for k in swap])), 0) == count for (label, row), count in bag.items()
            )
        return interchangeable[i, j]

    def extend(depth: int, gold_ids: list[int], pred_ids: list[int], used: set[int]) -> bool:
        nonlocal cells
        if depth == width:
            return True
        numbers, counts, prefix = level(depth, gold_ids)
        failed: list[int] = []
        for j in fits[order[depth]]:
            if j in used or any(swappable(i, j) for i in failed):
                continue
            cells += n
            if cells > MAX_CELLS:
                raise SearchLimit
            try:
                ids = [numbers[pair] for pair in zip(pred_ids, pred.columns[j], strict=True)]
            except KeyError:
                continue
            if _within(Counter(ids), counts, equal):
                if extend(depth + 1, prefix, ids, used | {j}):
                    return True
                failed.append(j)
        return False

    return extend(0, list(gold.labels or [0] * len(gold.rows)), list(pred.labels or [0] * n), set())


def near(gold: ResultTable, pred: ResultTable) -> tuple[ResultTable, ResultTable] | None:
    """Make numbers equal that differ by less than `FLOAT_TOLERANCE`, in both tables; None if none do.

    Two integers are never made equal: nothing rounds them.
    """
    if not (gold.has_floats or pred.has_floats):
        return None
    cells = chain.from_iterable(chain(gold.rows, pred.rows))
    stand_in: dict[float, float] = {}
    last = first = nan
    for number in sorted({cell for cell in cells if isinstance(cell, (int, float)) and cell == cell}):
        if isclose(number, last, rel_tol=FLOAT_TOLERANCE) and float in (type(number), type(last)):
            stand_in[number] = first
        else:
            first = number
        last = number
    if not stand_in:
        return None
    left, right = ([tuple([stand_in.get(cell, cell) for cell in row]) for row in t.rows] for t in (gold, pred))
    return ResultTable(left, gold.labels), ResultTable(right, pred.labels)


def rows_sort_alike(gold: list[tuple], pred: list[tuple], ordered: bool) -> bool:
    """Compare as the reference evaluator first does: rows with their cells sorted as text have to agree.

    It rejects some equal tables, such as (1, 10) against (1.0, 10), because 1 and 1.0 sort differently as text.
    """
    left, right = ([tuple(sorted(row, key=lambda cell: f"{cell}{type(cell)}")) for row in t] for t in (gold, pred))
    return left == right if ordered else set(left) == set(right)
