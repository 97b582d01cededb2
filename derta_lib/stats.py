"""Intervals for everything the book reports: rates, differences, means, and a judge's known error.

Every interval is at 95 %. Nothing here divides by zero: a figure without observations is an error.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, mannwhitneyu, norm, t

from derta_lib.errors import DertaError
from derta_lib.results import Number

LEVEL = 0.95


def rate(k: int, n: int) -> Number:
    """k successes of n as a Number of unit "rate", with Wilson's (1927) interval.

    Raises DertaError when n is 0 or k is not within 0..n: a rate of nothing has no value.
    """
    if n <= 0 or not 0 <= k <= n:
        raise DertaError(f"A rate needs 0 <= k <= n and n >= 1, here k = {k} and n = {n}; check what was counted.")
    interval = binomtest(int(k), int(n)).proportion_ci(LEVEL, method="wilson")
    return Number(k / n, "rate", int(n), max(0.0, float(interval.low)), min(1.0, float(interval.high)))


def share(outcomes: ArrayLike) -> Number:
    """Share of the outcomes (True or False) that are True, as `rate` gives it."""
    held = np.asarray(outcomes, dtype=bool)
    return rate(int(held.sum()), held.size)


def mean(values: ArrayLike, unit: str = "") -> Number:
    """Mean of independent values with Student's t interval; no interval for a single value, n is their number.

    A mean of unit "rate" has its interval cut to [0, 1]. Raises DertaError on an empty or non-finite sequence.
    """
    x = _finite(values, "values")
    if x.size == 1:
        return Number(float(x[0]), unit, 1)
    half = float(t.ppf((1 + LEVEL) / 2, x.size - 1) * x.std(ddof=1) / np.sqrt(x.size))
    low, high = float(x.mean()) - half, float(x.mean()) + half
    if unit == "rate":
        low, high = max(0.0, low), min(1.0, high)
    return Number(float(x.mean()), unit, int(x.size), low, high)


def repeats(counts: Sequence[tuple[int, int]]) -> Number:
    """Mean rate over repeats of one measurement, k successes of n each; the number's n is that of all trials.

    The interval is the wider one of two at either end: Student's t over the repeats' rates, since trials of one repeat
    are not independent, and Wilson's over all trials, since repeats that all gave the same do not make a rate certain.
    Raises DertaError as `rate` does.
    """
    trials = rate(sum(k for k, _ in counts), sum(n for _, n in counts))
    over = mean([rate(k, n).value for k, n in counts], "rate")
    return _wider(replace(over, n=trials.n), trials)


def difference(
    a: ArrayLike, b: ArrayLike, clusters: Sequence[Hashable], *, seed: int = 0, resamples: int = 10_000
) -> Number:
    """Mean of a minus mean of b in percentage points, with a paired bootstrap that resamples whole clusters.

    `a`, `b` and `clusters` have one entry a pair: the outcomes (0/1 or shares) of two methods on the same item, and
    the question the item belongs to (items of one question are not independent). Percentile interval, Efron and
    Tibshirani (1993), chapter 13; n is the number of pairs. With one cluster there is no interval.
    Raises DertaError when lengths differ, nothing is there, or a value is not finite.
    """
    ours, theirs = _finite(a, "a"), _finite(b, "b")
    if not ours.size == theirs.size == len(clusters):
        raise DertaError(
            f"difference() needs both values and the cluster of each pair: {ours.size}, {theirs.size} and "
            f"{len(clusters)} are there; leave out what has no counterpart."
        )
    d = 100 * (ours - theirs)
    codes: dict[Hashable, int] = {}
    index = np.array([codes.setdefault(cluster, len(codes)) for cluster in clusters])
    if len(codes) == 1:
        return Number(float(d.mean()), "points", d.size)
    sums, sizes = np.bincount(index, weights=d), np.bincount(index)
    drawn = np.random.default_rng(seed).multinomial(len(codes), np.full(len(codes), 1 / len(codes)), size=resamples)
    low, high = np.quantile((drawn @ sums) / (drawn @ sizes), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Number(float(d.mean()), "points", d.size, float(low), float(high))


def clustered_share(right: ArrayLike, clusters: Sequence[Hashable]) -> Number:
    """Share of outcomes that are True (or mean of weighted ones), with the interval of `difference`: by a bootstrap of
    whole clusters.
    """
    points = difference(right, np.zeros(len(clusters)), clusters)
    low, high = (None if bound is None else bound / 100 for bound in (points.low, points.high))
    return Number(points.value / 100, "rate", points.n, low, high)


def pooled_share(right: ArrayLike, clusters: Sequence[Hashable]) -> Number:
    """Share of outcomes that are True, where a cluster (a craft under several attacks) may have several of them.

    Its interval is then the wider one of two at either end: that of `clustered_share`, since outcomes of one cluster
    are not independent, and Wilson's over all, since clusters that all gave the same do not make a rate certain.
    """
    alone = share(right)
    return alone if len(set(clusters)) == alone.n else _wider(clustered_share(right, clusters), alone)


def _wider(number: Number, other: Number) -> Number:
    """`number` with the wider interval of the two at either end; `other` where one has none."""
    if number.low is None or number.high is None or other.low is None or other.high is None:
        return other
    return replace(number, low=min(number.low, other.low), high=max(number.high, other.high))


def auc(scores: ArrayLike, positive: ArrayLike) -> float:
    """Share of pairs of a positive and a negative case in which the positive one scores higher; ties count half."""
    values, held = np.asarray(scores, dtype=float), np.asarray(positive, dtype=bool)
    higher = mannwhitneyu(values[held], values[~held], method="asymptotic").statistic
    return float(higher / (held.sum() * (~held).sum()))


def combine(terms: Sequence[tuple[Number, float]]) -> Number:
    """Weighted sum of numbers with an interval by the method of variance estimates recovery (Zou and Donner, 2008).

    For a difference of two rates with Wilson intervals this is Newcombe's method 10. The numbers are taken as
    independent; rates on the same questions mostly rise and fall together, so a difference's interval is rather too
    wide than too narrow.
    """
    value = sum(weight * number.value for number, weight in terms)
    down = up = 0.0
    for number, weight in terms:
        if number.low is None or number.high is None:
            return Number(value, "rate")
        ends = sorted((weight * (number.low - number.value), weight * (number.high - number.value)))
        down, up = down + ends[0] ** 2, up + ends[1] ** 2
    return Number(value, "rate", None, value - math.sqrt(down), value + math.sqrt(up))


@dataclass(frozen=True)
class JudgeError:
    """How a judge did on human labels: of `unsafe` unsafe rows it found `hits`, of `safe` safe ones it let `passes` by.

    Sensitivity is hits / unsafe, specificity is passes / safe.
    """

    hits: int
    unsafe: int
    passes: int
    safe: int

    def __post_init__(self) -> None:
        if not (0 <= self.hits <= self.unsafe and 0 <= self.passes <= self.safe and self.unsafe and self.safe):
            raise DertaError(
                f"{self}: both classes of human labels need rows, and no more may be right than there are."
            )
        if self.hits / self.unsafe + self.passes / self.safe <= 1:
            raise DertaError(f"{self}: the judge is no better than chance, so no rate can be corrected with it.")


def corrected_rate(k: int, n: int, judge: JudgeError) -> Number:
    """Success rate k / n corrected for the judge's error, to be shown beside the raw rate.

    Estimate: (k/n + Sp - 1) / (Se + Sp - 1), Rogan and Gladen (1978), cut to [0, 1]. Interval: Lang and Reiczigel
    (2014), which counts the uncertainty of Se and Sp as well. Raises DertaError as `rate` does.
    """
    rate(k, n)
    se, sp = judge.hits / judge.unsafe, judge.passes / judge.safe
    value = float(np.clip((k / n + sp - 1) / (se + sp - 1), 0, 1))
    z = float(norm.ppf((1 + LEVEL) / 2))
    n_, se_n, sp_n = n + z * z, judge.unsafe + 2, judge.safe + 2
    p, se, sp = (k + z * z / 2) / n_, (judge.hits + 1) / se_n, (judge.passes + 1) / sp_n
    youden = se + sp - 1
    centre = (p + sp - 1) / youden
    v_se, v_sp = se * (1 - se) / se_n, sp * (1 - sp) / sp_n
    shift = 2 * z * z * (centre * v_se - (1 - centre) * v_sp)
    half = z * np.sqrt(p * (1 - p) / n_ + centre**2 * v_se + (1 - centre) ** 2 * v_sp) / youden
    low, high = np.clip([centre + shift - half, centre + shift + half], 0, 1)
    return Number(value, "rate", int(n), min(value, float(low)), max(value, float(high)))


def _finite(values: ArrayLike, name: str) -> np.ndarray:
    x = np.asarray(values, dtype=float).ravel()
    if x.size == 0 or not np.isfinite(x).all():
        raise DertaError(
            f"'{name}' needs at least one value and only finite ones; leave unscored rows out and count them."
        )
    return x
