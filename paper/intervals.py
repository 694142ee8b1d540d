"""Intervals of differences and of ratios: of pairs of the same samples, and by bootstrap."""
import math

import numpy as np

Z = 1.959964     # of a normal distribution, 95% lie within
FEW_PAIRS = 25   # with fewer pairs that disagree, an interval is exact, not a normal approximation
NUM_RESAMPLES, SEED = 2000, 0  # of a bootstrap


def paired_difference(a, b):
    """Returns the accuracy of a less that of b and its 95% interval, (difference, [low, high]).

    Pairs that agree say nothing about the difference, so the interval is narrower than that of two
    separate accuracies. It is:

    - where fewer than FEW_PAIRS samples disagree: `exact_difference`, of all draws the lowest and
      the highest end. It leaves out zero only if the exact McNemar test has p below 0.05.
    - under one draw: Wald's with half a pair added to each of the four kinds (Agresti and Min,
      2005).
    - under several draws: by a bootstrap over samples and draws, `over_draws`.

    Args:
        a, b: bool [n], which of the same samples were right; or bool [draws, n], under each of
            several draws. Where the other has one draw or none, it counts for all.
    """
    a, b = np.broadcast_arrays(np.atleast_2d(a), np.atleast_2d(b))
    difference = a.astype(int) - b
    if difference.any(axis=0).sum() < FEW_PAIRS:
        lows, highs = zip(*map(exact_difference, difference))
        return float(difference.mean()), [min(lows), max(highs)]
    if len(difference) > 1:
        return over_draws(difference)
    n, total, disagree = difference.size, int(difference.sum()), int(np.abs(difference).sum())
    centre = total / (n + 2)
    half = Z * ((disagree + 1) - total ** 2 / (n + 2)) ** 0.5 / (n + 2)
    return total / n, [max(-1., centre - half), min(1., centre + half)]


def exact_difference(difference):
    """Returns a 95% interval of a mean difference, (low, high), that holds for few pairs, too.

    Args:
        difference: of pairs, integers [n]: 1, 0 or -1.

    The difference is pi * (2 theta - 1): pi the share of pairs that disagree, theta the share of
    1 among these. The ends combine the ends of their exact intervals. As in the exact McNemar test,
    the sign depends on theta alone (Fay and Lumbard, 2021, combine the two less cautiously).
    """
    disagree = int(np.abs(difference).sum())
    pi = exact_share(disagree, len(difference))
    theta = exact_share(int((difference == 1).sum()), disagree) if disagree else (0., 1.)
    gains = [2 * share - 1 for share in theta]
    return min(pi_end * gains[0] for pi_end in pi), max(pi_end * gains[1] for pi_end in pi)


def exact_share(k, n):
    """Returns the exact 95% interval (low, high) of a share of k in n (Clopper and Pearson)."""
    low = _solve(lambda p: _at_most(k - 1, n, p) - 0.975) if k else 0.
    high = _solve(lambda p: _at_most(k, n, p) - 0.025) if k < n else 1.
    return low, high


def _at_most(k, n, p):
    """Returns the probability of at most k in n, each with probability p, 0 < p < 1."""
    ways = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)]
    return sum(math.exp(way + i * math.log(p) + (n - i) * math.log1p(-p))
               for i, way in enumerate(ways))


def _solve(falling):
    """Returns where a falling function of p, 0 < p < 1, is zero."""
    low, high = 0., 1.
    for _ in range(50):
        p = (low + high) / 2
        low, high = (p, high) if falling(p) > 0 else (low, p)
    return (low + high) / 2


def over_draws(values):
    """Returns the mean of values [draws, n] and its 95% interval by bootstrap, (mean, [low, high]).

    Draws and samples are resampled, each with replacement: both are part of the uncertainty (the
    pigeonhole bootstrap; Owen, 2007).
    """
    rng, (draws, n) = np.random.default_rng(SEED), values.shape
    means = [values[rng.integers(0, draws, draws)].mean(axis=0)[rng.integers(0, n, n)].mean()
             for _ in range(NUM_RESAMPLES)]
    return float(values.mean()), np.percentile(means, [2.5, 97.5]).tolist()


def excess(a, b):
    """Returns how much larger a is than b on average, and its 95% interval by bootstrap.

    Args:
        a, b: mean sizes of the same batches [batches], of as many images each. They are resampled
            in pairs. The images of a batch share their norms, so single images would not do.

    Returns:
        (mean(a) / mean(b) - 1, [low, high])
    """
    return bootstrap(lambda chosen: a[chosen].mean() / b[chosen].mean() - 1, len(a))


def bootstrap(statistic, n):
    """Returns a statistic of n samples and its 95% interval by bootstrap, (value, [low, high]).

    Args:
        statistic: f(indices [n] of samples) -> a number.
    """
    rng = np.random.default_rng(SEED)
    values = [statistic(rng.integers(0, n, n)) for _ in range(NUM_RESAMPLES)]
    return float(statistic(np.arange(n))), np.percentile(values, [2.5, 97.5]).tolist()
