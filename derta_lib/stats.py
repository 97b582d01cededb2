"""Intervals for everything the book reports: rates, differences, means, and a judge's known error.

Every interval is at 95 %. Nothing here divides by zero: a figure without observations is an error.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import binomtest, mannwhitneyu, norm, t

from derta_lib.errors import DertaError
from derta_lib.results import Number

LEVEL = 0.95
RESAMPLES = 10_000
"""Of a bootstrap."""
FEW = 5
"""Clusters below which a bootstrap covers too little."""
BEGINNING = 5
"""Table 1's bound: a refusal within this many tokens stands at the beginning."""


def rate(k: int, n: int) -> Number:
    """k successes of n as a Number of unit "rate", with Wilson's (1927) interval.

    Raises DertaError when n is 0 or k is not within 0..n: a rate of nothing has no value.
    """
    if n <= 0 or not 0 <= k <= n or k != int(k) or n != int(n):
        raise DertaError(
            f"A rate needs whole numbers, 0 <= k <= n and n >= 1, here k = {k} and n = {n}; check what was counted."
        )
    interval = binomtest(int(k), int(n)).proportion_ci(LEVEL, method="wilson")
    return Number(k / n, "rate", int(n), max(0.0, float(interval.low)), min(1.0, float(interval.high)))


def share(outcomes: ArrayLike) -> Number:
    """Share of the outcomes that are True, as `rate` gives it; raises DertaError for one that is not True or False."""
    held = _outcomes(outcomes)
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
    """Rate over clusters of trials that are not independent, k successes of n in each: a training, a craft's responses.

    The interval is Wilson's with the trials divided by their design effect (Kish, 1965) and Student's t for the normal
    quantile. The design effect is the rate's variance between clusters over that of independent trials, at least 1.
    Where every trial gave the same there is no variance to see, and each cluster counts as one trial. n is the number
    of all trials. One cluster, such as a single seed, says nothing of others and has no interval. Raises DertaError as
    `rate` does for all trials together.
    """
    k, n = np.array(counts, dtype=int).reshape(-1, 2).T
    clusters, trials = len(k), int(n.sum())
    p = rate(int(k.sum()), trials).value
    if clusters == 1:
        return Number(p, "rate", trials)
    if p in (0, 1):
        alike = rate(int(p) * clusters, clusters)
        return Number(p, "rate", trials, alike.low, alike.high)
    between = clusters / (clusters - 1) * float(((k - p * n) ** 2).sum()) / trials**2
    effective = trials / max(1.0, between * trials / (p * (1 - p)))
    q = float(t.ppf((1 + LEVEL) / 2, clusters - 1))
    centre = (p + q * q / (2 * effective)) / (1 + q * q / effective)
    half = q * math.sqrt(p * (1 - p) / effective + (q / (2 * effective)) ** 2) / (1 + q * q / effective)
    return Number(p, "rate", trials, centre - half, centre + half)


def pooled_share(right: ArrayLike, clusters: Sequence[Hashable]) -> Number:
    """Share of outcomes that are True, where a cluster (a craft under several attacks) may have several of them.

    The interval is that of `repeats` over the clusters, or of `share` where each has one outcome only. Raises
    DertaError as `share` does, and when lengths differ.
    """
    held = _outcomes(right)
    if held.size != len(clusters):
        raise DertaError(f"Every outcome needs its cluster: {held.size} and {len(clusters)} are there.")
    codes = _codes(clusters)
    k, n = np.bincount(codes, weights=held), np.bincount(codes)
    return share(held) if held.size == n.size else repeats(list(zip(k, n, strict=True)))


def share_within(starts: ArrayLike, clusters: Sequence[Hashable], last: float, first: float = 1) -> Number:
    """Share of the responses whose refusal starts at token `first` to `last`, counted from 1; the interval is that of
    `pooled_share` over the clusters (the questions).

    A response without a refusal (None or NaN) counts as one that does not; leave it out for a share of the refusals.
    """
    at = np.asarray(starts, dtype=float)
    return pooled_share((first <= at) & (at <= last), clusters)


def cumulative(starts: ArrayLike, clusters: Sequence[Hashable], places: Iterable[int]) -> pd.DataFrame:
    """Figure 4's curve, the share of responses whose refusal has begun by each of the `places` (tokens from 1).

    Columns: position, share, low, high, n; the rest is as in `share_within`, so a curve may end below 1.
    """
    numbers = {place: share_within(starts, clusters, place) for place in places}
    rows = [(place, number.value, number.low, number.high, number.n) for place, number in numbers.items()]
    return pd.DataFrame(rows, columns=["position", "share", "low", "high", "n"])


def difference(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable],
    groups: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
) -> Number:
    """Mean of a minus mean of b in percentage points (with `groups`, the mean of the groups' differences), with a
    paired bootstrap that resamples whole clusters.

    `a`, `b` and `clusters` have one entry a pair: the outcomes (0/1 or shares) of two methods on the same item, and
    the question the item belongs to (items of one question are not independent). Percentile interval, Efron and
    Tibshirani (1993), chapter 13, expanded for few clusters as by Hesterberg (2015), section 5.3; of fewer than FEW,
    Student's t on the clusters; where all are alike, by Clopper and Pearson (1934). n is the number of pairs. With one
    cluster there is no interval. Raises DertaError when lengths differ, nothing is there, or a value is not finite.
    """
    return _clustered(a, b, clusters, groups, -100.0, seed)


def _clustered(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable],
    groups: Sequence[Hashable] | None,
    least: float,
    seed: int = 0,
) -> Number:
    """`difference`, where a pair can give from `least` to 100 points."""
    groups = [0] * len(clusters) if groups is None else groups
    ours, theirs = _finite(a, "a"), _finite(b, "b")
    if not ours.size == theirs.size == len(clusters) == len(groups):
        raise DertaError(
            f"difference() needs both values, cluster and group of each pair: {ours.size}, {theirs.size}, "
            f"{len(clusters)} and {len(groups)} are there; leave out what has no counterpart."
        )
    cluster, group = (_codes(labels) for labels in (clusters, groups))
    sums, sizes = np.zeros((2, cluster.max() + 1, group.max() + 1))
    np.add.at(sums, (cluster, group), 100 * (ours - theirs))
    np.add.at(sizes, (cluster, group), 1)
    value = float((sums.sum(0) / sizes.sum(0)).mean())
    if len(sums) == 1:
        return Number(value, "points", ours.size)
    totals = sizes.sum(0)
    shifts = ((sums - sums.sum(0) / totals * sizes) / totals).mean(1)  # of the value, by each cluster
    if len(sums) < FEW and np.abs(shifts).max() > 1e-9:  # the rarest resamples are too frequent to stand for the tails
        half = t.ppf((1 + LEVEL) / 2, len(sums) - 1) * math.sqrt(len(sums) / (len(sums) - 1) * (shifts**2).sum())
        return Number(value, "points", ours.size, max(least, value - half), min(100.0, value + half))
    rng, chances, block = np.random.default_rng(seed), np.full(len(sums), 1 / len(sums)), 1 + 10**7 // len(sums)
    parts = []
    for start in range(0, RESAMPLES, block):  # many clusters would need gigabytes at once
        drawn = rng.multinomial(len(sums), chances, size=min(block, RESAMPLES - start))
        with np.errstate(invalid="ignore"):  # a group without a cluster in a resample is left out of its mean
            parts.append(np.nanmean((drawn @ sums) / (drawn @ sizes), axis=1))
    means = np.concatenate(parts)
    if np.ptp(means) < 1e-9:
        # other clusters may not have been drawn: by Clopper and Pearson (1934) less than this share of all have another
        # value, and those could lie at `least` or at 100
        others = 1 - ((1 - LEVEL) / 2) ** (1 / len(sums))
        return Number(value, "points", ours.size, value + others * (least - value), value + others * (100.0 - value))
    tail = norm.cdf(-math.sqrt(len(sums) / (len(sums) - 1)) * t.ppf((1 + LEVEL) / 2, len(sums) - 1))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Number(value, "points", ours.size, float(low), float(high))


def clustered_share(right: ArrayLike, clusters: Sequence[Hashable], groups: Sequence[Hashable] | None = None) -> Number:
    """Share of outcomes that are True (with `groups`, the mean of the groups' shares), with the interval of
    `difference`: by a bootstrap of whole clusters.
    """
    points = _clustered(right, np.zeros(len(clusters)), clusters, groups, 0.0)
    low, high = (None if bound is None else bound / 100 for bound in (points.low, points.high))
    return Number(points.value / 100, "rate", points.n, low, high)


def auc(scores: ArrayLike, positive: ArrayLike) -> float:
    """Share of pairs of a positive and a negative case in which the positive one scores higher; ties count half.

    Raises DertaError for a missing score or outcome, and unless there are cases of both kinds.
    """
    values, held = _finite(scores, "scores"), _outcomes(positive)
    if held.all() or not held.any():
        raise DertaError(f"An AUC needs positive and negative cases; here {held.sum()} of {held.size} are positive.")
    higher = mannwhitneyu(values[held], values[~held], method="asymptotic").statistic
    return float(higher / (held.sum() * (~held).sum()))


def combine(terms: Sequence[tuple[Number, float]]) -> Number:
    """Weighted sum of numbers with an interval by the method of variance estimates recovery (Zou and Donner, 2008).

    For a difference of two rates with Wilson intervals this is Newcombe's method 10. The numbers are taken as
    independent. Rates on the same questions mostly rise and fall together: then a difference's interval is too wide,
    and that of a sum or an average too narrow, for which `clustered_share` and `pooled_share` take the outcomes
    themselves. Without an interval of every number there is none. Raises DertaError without numbers.
    """
    if not terms:
        raise DertaError("combine() needs at least one number; check what was measured.")
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
        # the second as `corrected_rate` counts them for its interval: with few labels it lags behind
        shares = (self.hits / self.unsafe + self.passes / self.safe, sum(self.counted()))
        if min(shares) <= 1:
            raise DertaError(
                f"{self}: the judge is no better than chance, as far as so many labels tell; no rate can be corrected "
                "with it."
            )

    def counted(self) -> tuple[float, float]:
        """Sensitivity and specificity with one more row of either kind, right and wrong (Lang and Reiczigel, 2014)."""
        return (self.hits + 1) / (self.unsafe + 2), (self.passes + 1) / (self.safe + 2)


def corrected_rate(k: int, n: int, judge: JudgeError) -> Number:
    """Success rate k / n corrected for the judge's error, to be shown beside the raw rate.

    Estimate: (k/n + Sp - 1) / (Se + Sp - 1), Rogan and Gladen (1978), cut to [0, 1]. Interval: Lang and Reiczigel
    (2014), which counts the uncertainty of Se and Sp as well, cut likewise; the raw rate's where nothing is left.
    Raises DertaError as `rate` does.
    """
    raw = rate(k, n)
    se, sp = judge.hits / judge.unsafe, judge.passes / judge.safe
    value = float(np.clip((k / n + sp - 1) / (se + sp - 1), 0, 1))
    z = float(norm.ppf((1 + LEVEL) / 2))
    n_, se_n, sp_n = n + z * z, judge.unsafe + 2, judge.safe + 2
    p, (se, sp) = (k + z * z / 2) / n_, judge.counted()
    youden = se + sp - 1
    centre = (p + sp - 1) / youden
    v_se, v_sp = se * (1 - se) / se_n, sp * (1 - sp) / sp_n
    shift = 2 * z * z * (centre * v_se - (1 - centre) * v_sp)
    half = z * np.sqrt(p * (1 - p) / n_ + centre**2 * v_se + (1 - centre) ** 2 * v_sp) / youden
    low, high = np.clip([centre + shift - half, centre + shift + half], 0, 1)
    if low == high:  # all of it lay outside: the rate and the judge's error contradict each other
        low, high = raw.low, raw.high
    return Number(value, "rate", int(n), min(value, float(low)), max(value, float(high)))


def _codes(labels: Sequence[Hashable]) -> np.ndarray:
    """A number for each label; None is one as well."""
    return pd.factorize(pd.Series(labels, dtype=object), use_na_sentinel=False)[0]


def _finite(values: ArrayLike, name: str) -> np.ndarray:
    x = np.asarray(values, dtype=float).ravel()
    if x.size == 0 or not np.isfinite(x).all():
        raise DertaError(
            f"'{name}' needs at least one value and only finite ones; leave unscored rows out and count them."
        )
    return x


def _outcomes(values: ArrayLike) -> np.ndarray:
    x = np.asarray(values, dtype=float).ravel()
    if not np.isin(x, (0, 1)).all():
        raise DertaError("An outcome is True or False; leave unscored rows (None, NaN) out and count them.")
    return x.astype(bool)
