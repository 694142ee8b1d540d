"""Intervals: SciPy's where it has them, else how often they hold the truth."""
import numpy as np
import pytest
from scipy import stats

from eval import wilson_interval
from paper.intervals import (FEW_PAIRS, bootstrap, exact_difference, exact_share, excess,
                             over_draws, paired_difference)


@pytest.mark.parametrize('k, n', [(0, 50), (50, 50), (3, 50), (1, 1), (24, 3000), (1700, 3000)])
def test_intervals_of_a_share_are_scipys(k, n):
    for method, ours in (('wilson', wilson_interval), ('exact', exact_share)):
        theirs = stats.binomtest(k, n).proportion_ci(method=method)
        assert ours(k, n) == pytest.approx(tuple(theirs), abs=1e-6), method


def pairs(only_a, only_b, n):
    """Returns two bool [n]: so many right in the first alone, and in the second alone."""
    i = np.arange(n)
    return i < only_a, (i >= only_a) & (i < only_a + only_b)


def test_few_pairs_differ_only_if_the_exact_mcnemar_test_says_so():
    """The test is the binomial test of the pairs that disagree (McNemar, 1947)."""
    for disagree in range(FEW_PAIRS):
        for only_a in range(disagree + 1):
            value, (low, high) = paired_difference(*pairs(only_a, disagree - only_a, 100))
            assert low <= value <= high and value == (2 * only_a - disagree) / 100
            p = stats.binomtest(only_a, disagree).pvalue if disagree else 1
            assert (low > 0 or high < 0) == (p < 0.05)
    five, six = (paired_difference(*pairs(k, 0, 100))[1][0] for k in (5, 6))
    assert five < 0 < six


def test_intervals_of_few_pairs_hold_the_truth():
    """All outcomes of 50 pairs, at many true shares: 95% of them at least, weighted."""
    outcomes = [(a, b) for a in range(FEW_PAIRS) for b in range(FEW_PAIRS - a)]
    ends = np.array([exact_difference(np.repeat([1, -1, 0], [a, b, 50 - a - b]))
                     for a, b in outcomes])
    counts = np.array([(a, b, 50 - a - b) for a, b in outcomes])
    for p in (0.01, 0.05, 0.1, 0.15):
        for q in (0, p / 3, p):
            weights = stats.multinomial.pmf(counts, 50, [p, q, 1 - p - q])
            held = (ends[:, 0] <= p - q) & (p - q <= ends[:, 1])
            assert weights[held].sum() >= 0.95 * weights.sum()


def test_intervals_of_many_pairs_are_those_of_scipys_paired_t_test():
    rng = np.random.default_rng(0)
    for p in (0.02, 0.1, 0.4):
        a, b = rng.random((2, 3000)) < [[0.5], [0.5 + p]]
        theirs = stats.ttest_rel(a.astype(float), b.astype(float)).confidence_interval()
        value, interval = paired_difference(a, b)
        assert value == pytest.approx(a.mean() - b.mean())
        assert interval == pytest.approx([theirs.low, theirs.high], abs=5e-4)


def test_paired_differences_cover_the_truth_and_use_the_pairs():
    """Of 2,000 draws of 200 pairs, the 95% interval holds the true difference in 93 to 98%."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        kind = rng.choice(4, 200, p=[0.5, 0.12, 0.06, 0.32])  # both right, a, b, none
        value, (low, high) = paired_difference(kind <= 1, (kind == 0) | (kind == 2))
        assert low < value < high
        covered += low <= 0.06 <= high
    assert 0.93 <= covered / 2000 <= 0.98
    a = np.arange(1000) < 600
    value, (low, high) = paired_difference(a, np.roll(a, 5))  # agree but for five and five
    assert value == 0 and high - low < 0.025
    assert paired_difference(a, ~a)[1] == pytest.approx([0.139, 0.260], abs=2e-3)


def test_bootstraps_are_scipys():
    rng = np.random.default_rng(0)
    b = rng.uniform(1, 2, 46)
    a = 1.63 * b + rng.normal(0, 0.1, 46)
    options = {'method': 'percentile', 'n_resamples': 9999, 'vectorized': True, 'rng': 0}
    theirs = stats.bootstrap((a,), np.mean, **options).confidence_interval
    value, interval = bootstrap(lambda chosen: a[chosen].mean(), len(a))
    assert value == pytest.approx(a.mean()) and interval == pytest.approx(theirs, rel=0.01)

    def ratio(a, b, axis):
        return a.mean(axis=axis) / b.mean(axis=axis) - 1
    theirs = stats.bootstrap((a, b), ratio, paired=True, **options).confidence_interval
    value, interval = excess(a, b)
    assert value == pytest.approx(a.mean() / b.mean() - 1)
    assert interval == pytest.approx(theirs, abs=2e-3) and interval[0] < value < interval[1]


def test_an_interval_over_draws_holds_the_truth_where_one_over_images_does_not():
    """Five draws, each of which makes all images easier or harder by some 5 points."""
    rng = np.random.default_rng(0)
    with_draws = without = 0
    for _ in range(50):
        right = rng.random((5, 600)) < 0.6 + rng.normal(0, 0.05, (5, 1))
        value, (low, high) = paired_difference(right, np.zeros(600, bool))
        assert value == pytest.approx(right.mean())
        with_draws += low <= 0.6 <= high
        low, high = paired_difference(right[0], np.zeros(600, bool))[1]
        without += low <= 0.6 <= high
    assert with_draws >= 43 > 35 > without


def test_draws_that_agree_add_nothing():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 1000)) < [[0.5], [0.6]]
    alone = paired_difference(a, b)
    assert over_draws(np.tile(a.astype(int) - b, (5, 1)))[1] == pytest.approx(alone[1], abs=4e-3)
    few = pairs(3, 1, 100)
    assert paired_difference(np.tile(few[0], (5, 1)), few[1]) == paired_difference(*few)
    other = np.stack([few[0], few[1]])  # 3 to 1, and none: both are within the interval
    low, high = paired_difference(other, few[1])[1]
    assert low <= paired_difference(*few)[1][0] and high >= paired_difference(*few)[1][1]
