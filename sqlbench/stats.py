"""Intervals and tests between evaluations over the same tasks, through statsmodels and scipy.

Outcomes are one number per task (1 right, 0 wrong; the mean of several rollouts), in the same order on both sides of a
paired comparison.
"""

from __future__ import annotations

from collections.abc import Sequence


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Compute the 95% Wilson score interval of a proportion; (0, 1) if n is 0."""
    if n == 0:
        return 0.0, 1.0
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(successes, n, alpha=0.05, method="wilson")
    return float(low), float(high)


def paired_bootstrap(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Compute the 95% interval of the mean difference ``b - a``, by resampling tasks from a fixed seed."""
    _check(a, b)
    return bootstrap([y - x for x, y in zip(a, b, strict=True)])


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Compute the 95% interval of the mean of one number per task, by resampling tasks from a fixed seed."""
    import numpy as np
    from scipy import stats

    if min(values) == max(values):  # nothing to resample
        return float(values[0]), float(values[0])
    interval = stats.bootstrap(
        (np.asarray(values, dtype=float),),
        np.mean,
        confidence_level=0.95,
        n_resamples=5000,
        method="percentile",
        rng=np.random.default_rng(0),
        batch=500,
    ).confidence_interval
    return float(interval.low), float(interval.high)


def clustered(values: Sequence[float], clusters: Sequence[str]) -> tuple[float, float] | None:
    """Compute the 95% interval of the mean, by resampling whole clusters of tasks from a fixed seed.

    Tasks on one schema, or of one construct, succeed and fail together. This interval says what to expect of other
    schemas or constructs, where `bootstrap` says what to expect of other tasks on the same ones.

    Returns:
        None for fewer than two clusters.
    """
    import numpy as np

    names, place = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    if len(names) < 2:
        return None
    sums, counts = np.bincount(place, weights=values), np.bincount(place)
    drawn = np.random.default_rng(0).integers(len(names), size=(5000, len(names)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), (2.5, 97.5))
    return float(low), float(high)


def mcnemar(a: Sequence[float], b: Sequence[float]) -> float:
    """Compute the two-sided p-value of McNemar's exact test that as many tasks get better as worse."""
    from statsmodels.stats.contingency_tables import mcnemar as test

    _check(a, b)
    better, worse = (sum(sign * (y - x) > 0 for x, y in zip(a, b, strict=True)) for sign in (1, -1))
    return float(test([[0, better], [worse, 0]], exact=True).pvalue)


def _check(a: Sequence[float], b: Sequence[float]) -> None:
    if len(a) != len(b) or not len(a):
        raise ValueError(f"Unpaired outcomes: {len(a)} and {len(b)}. Give the same tasks on both sides.")
