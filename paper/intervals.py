"""Intervals of differences and of ratios: of pairs of the same samples, and by bootstrap."""
import numpy as np


def paired_difference(a, b, z=1.959964):
    """Returns the accuracy of a less that of b and its 95% interval, (difference, [low, high]).

    Args:
        a, b: bool [n], which of the same samples were right. Pairs that agree say nothing about the
            difference, so the interval is narrower than that of two separate accuracies.

    Wald's interval with half a pair added to each of the four kinds (Agresti and Min, 2005). It is
    approximate where few pairs disagree: five against none are just beyond zero, though their exact
    p is 0.06.
    """
    n, only_a, only_b = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    centre = (only_a - only_b) / (n + 2)
    half = z * ((only_a + only_b + 1) - (only_a - only_b) ** 2 / (n + 2)) ** 0.5 / (n + 2)
    return (only_a - only_b) / n, [max(-1., centre - half), min(1., centre + half)]


def excess(a, b, num_resamples=2000, seed=0):
    """Returns how much larger a is than b on average, and its 95% interval by bootstrap.

    Args:
        a, b: sizes of the same samples [n]. They are resampled in pairs.

    Returns:
        (mean(a) / mean(b) - 1, [low, high])
    """
    return bootstrap(lambda chosen: a[chosen].mean() / b[chosen].mean() - 1, len(a), num_resamples,
                     seed)


def bootstrap(statistic, n, num_resamples=2000, seed=0):
    """Returns a statistic of n samples and its 95% interval by bootstrap, (value, [low, high]).

    Args:
        statistic: f(indices [n] of samples) -> a number.
    """
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, n, n)) for _ in range(num_resamples)]
    return float(statistic(np.arange(n))), np.percentile(values, [2.5, 97.5]).tolist()
