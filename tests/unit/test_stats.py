"""Intervals and tests against values worked out by hand or from their definition."""

from __future__ import annotations

from math import comb

import pytest
from scipy.stats import binom

from sqlbench.stats import bootstrap, clustered, mcnemar, paired_bootstrap, wilson


def test_wilson_by_its_formula():
    p, n, z = 0.3, 40, 1.959963984540054
    centre, half = (p + z * z / (2 * n)), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low, high = wilson(12, 40)
    assert low == pytest.approx((centre - half) / (1 + z * z / n))
    assert high == pytest.approx((centre + half) / (1 + z * z / n))


def test_wilson_stays_within_0_and_1():
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-12)
    assert wilson(10, 10)[1] == pytest.approx(1)
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("better", "worse"), [(9, 1), (5, 5), (1, 0), (0, 0)])
def test_mcnemar_is_the_sign_test_of_the_changed_tasks(better, worse):
    a = [0] * better + [1] * worse + [1, 0] * 10
    b = [1] * better + [0] * worse + [1, 0] * 10
    n, k = better + worse, min(better, worse)
    want = min(1.0, 2 * sum(comb(n, i) for i in range(k + 1)) / 2**n)
    assert mcnemar(a, b) == pytest.approx(want)


def test_bootstrap_is_paired_and_repeats():
    a = [0, 1] * 100
    b = [1 if i % 10 == 0 else x for i, x in enumerate(a)]  # only ever better: 20 of 200 tasks
    low, high = paired_bootstrap(a, b)
    assert 0.05 < low < 0.1 < high < 0.15
    assert paired_bootstrap(a, b) == (low, high)
    assert paired_bootstrap(b, a) == pytest.approx((-high, -low), abs=0.01)
    assert paired_bootstrap(a, a) == (0.0, 0.0)


def test_the_bootstrap_interval_leaves_out_a_fortieth_on_each_side():
    """Resampled, the mean of 2,000 differences, half of them 1, is a binomial share; at 90% it would be 963 to 1037."""
    low, high = paired_bootstrap([0] * 2000, [0, 1] * 1000)
    assert (2000 * low, 2000 * high) == pytest.approx(binom.interval(0.95, 2000, 0.5), abs=3)
    assert binom.interval(0.90, 2000, 0.5) == (963, 1037) and binom.interval(0.95, 2000, 0.5) == (956, 1044)


def test_tasks_that_succeed_and_fail_together_count_once():
    """Where all tasks of a schema have one outcome, 4 schemas of 100 tasks say no more than 4 tasks do."""
    values, schemas = [1] * 200 + [0] * 200, [f"s{i // 100}" for i in range(400)]
    assert clustered(values, schemas) == (0.0, 1.0)  # all four drawn alike: 1 in 16, more than a fortieth a side
    assert clustered(values, schemas) == clustered([1, 1, 0, 0], ["s0", "s1", "s2", "s3"])
    alone = clustered(values, [str(i) for i in range(400)])  # every task its own schema
    assert alone == pytest.approx(bootstrap(values), abs=0.01)
    assert clustered([1, 0, 0], ["one"] * 3) is None and clustered([], []) is None


def test_a_large_cluster_weighs_by_its_tasks():
    low, high = clustered([1] * 90 + [0] * 10, ["large"] * 90 + ["small"] * 10)
    assert (low, high) == (0.0, 1.0)
    assert clustered([1] * 90 + [1] * 10, ["large"] * 90 + ["small"] * 10) == (1.0, 1.0)


@pytest.mark.parametrize("test", [mcnemar, paired_bootstrap])
def test_sides_of_different_length_are_refused(test):
    with pytest.raises(ValueError, match="Unpaired outcomes: 2 and 1"):
        test([1, 0], [1])
