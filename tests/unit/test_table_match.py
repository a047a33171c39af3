"""The fast table comparison gives what its brute-force definition gives, and does not blow up where that would."""

from __future__ import annotations

from collections import Counter
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqlbench.table_match import ResultTable, near, rows_sort_alike, same_bag, same_list

CELLS = st.sampled_from([0, 1, 2, "a", "b", None])


@st.composite
def table_pairs(draw, cells=CELLS, max_rows=5, max_width=5):
    """Two tables; the second is often the first with its rows and columns moved and perhaps one cell changed."""
    width = draw(st.integers(1, max_width))
    rows = st.lists(st.tuples(*[cells] * width), min_size=1, max_size=max_rows)
    gold = draw(rows)
    kind = draw(st.sampled_from(["other", "moved", "changed"]))
    if kind == "other":
        return gold, draw(rows)
    order = draw(st.permutations(range(width)))
    pred = [tuple(row[k] for k in order) for row in draw(st.permutations(gold))]
    if kind == "changed":
        i, j = draw(st.integers(0, len(pred) - 1)), draw(st.integers(0, width - 1))
        pred[i] = (*pred[i][:j], draw(cells), *pred[i][j + 1 :])
    return gold, pred


def orders(gold, pred):
    """`pred` in every order of its columns."""
    if len(gold[0]) != len(pred[0]):
        return
    for order in permutations(range(len(gold[0]))):
        yield [tuple(row[k] for k in order) for row in pred]


@settings(max_examples=400, deadline=None)
@given(table_pairs())
def test_bag_comparison_is_its_definition(pair):
    gold, pred = pair
    want = len(gold) == len(pred) and any(Counter(gold) == Counter(table) for table in orders(gold, pred))
    assert (len(gold) == len(pred) and same_bag(ResultTable(gold), ResultTable(pred))) == want


@settings(max_examples=250, deadline=None)
@given(table_pairs())
def test_list_comparison_is_its_definition(pair):
    gold, pred = pair
    assert same_list(ResultTable(gold), ResultTable(pred)) == any(gold == table for table in orders(gold, pred))


@settings(max_examples=400, deadline=None)
@given(table_pairs(cells=st.integers(0, 1), max_rows=8))
def test_containment_of_a_smaller_answer_is_its_definition(pair):
    gold, pred = pair
    want = any(Counter(table) <= Counter(gold) for table in orders(gold, pred))
    assert same_bag(ResultTable(gold), ResultTable(pred)) == want


@settings(max_examples=250, deadline=None)
@given(table_pairs(cells=st.integers(0, 1)), st.randoms(use_true_random=False))
def test_rows_stay_within_their_block(pair, random):
    gold, pred = pair
    blocks = [random.randrange(2) for _ in range(max(len(gold), len(pred)))]
    left, right = (list(zip(blocks, table, strict=False)) for table in (gold, pred))
    want = len(gold) == len(pred) and any(
        Counter(left) == Counter(zip(blocks, table, strict=False)) for table in orders(gold, pred)
    )
    got = len(gold) == len(pred) and same_bag(
        ResultTable(gold, [b for b, _ in left]), ResultTable(pred, [b for b, _ in right])
    )
    assert got == want


def parity_rows(width: int, odd: int) -> list[tuple]:
    """All 0/1 rows of one parity: any `width` - 1 columns look the same for both parities."""
    return [row for row in product((0, 1), repeat=width) if sum(row) % 2 == odd]


SHUFFLED = [tuple((row * step) % 1009 for step in range(1, 13)) for row in range(1, 1001)]
HARD = {
    "2 rows, 12 columns, equal": ([(0,) * 6 + (1,) * 6, (1,) * 6 + (0,) * 6], lambda r: [x[::-1] for x in r], True),
    "2 rows, 12 columns, different": (
        [(0, 1) * 6, (1, 0) * 6], lambda r: [(0,) * 6 + (1,) * 6, (0,) * 6 + (1,) * 6], False,
    ),
    "1000 rows, 12 columns of the same values": (SHUFFLED, lambda r: [x[::-1] for x in reversed(r)], True),
    "1000 rows, one row wrong": (SHUFFLED, lambda r: [*[x[::-1] for x in r[2:]], r[1][::-1], r[0]], False),
    "1000 rows, 12 constant columns": ([(7,) * 12] * 1000, lambda r: [(7,) * 12] * 999 + [(7,) * 11 + (8,)], False),
    "all even against all odd": (parity_rows(10, 0), lambda r: parity_rows(10, 1), False),
}  # fmt: skip


@pytest.mark.timeout(120)  # milliseconds, or an age
@pytest.mark.parametrize("name", HARD)
def test_no_blow_up(name):
    gold, change, want = HARD[name]
    pred = change(gold)
    assert same_bag(ResultTable(gold), ResultTable(pred)) == want


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        (0.1 + 0.2, 0.3, True),
        (1e20, 1e20 + 1e5, True),
        (1.0, 1.000001, False),
        (1.0, 1 + 5e-9, False),
        (1.0, 1 + 5e-10, True),
        (0.0, 1e-12, False),
        (100, 100.0, True),
        (float("inf"), 5.0, False),
        (float("inf"), 1e308, False),
    ],
)
def test_numbers_equal_within_tolerance(left, right, equal):
    gold, pred = ResultTable([(left, "x")]), ResultTable([(right, "x")])
    rounded = near(gold, pred)
    assert (same_bag(gold, pred) or (rounded is not None and same_bag(*rounded))) == equal


def test_the_references_first_look_is_fooled_by_number_types():
    assert (1, 10) == (1.0, 10)
    assert not rows_sort_alike([(1, 10)], [(1.0, 10)], ordered=False)
