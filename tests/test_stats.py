"""Intervals against statsmodels, scipy, closed forms, enumeration and simulation."""

import math
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

from derta_lib.errors import DertaError
from derta_lib.results import Number
from derta_lib.stats import (
    JudgeError,
    auc,
    clustered_share,
    combine,
    corrected_rate,
    cumulative,
    difference,
    mean,
    pooled_share,
    rate,
    repeats,
    share,
    share_within,
)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 50), (1, 50), (25, 50), (50, 50), (333, 1000)])
def test_rate_equals_statsmodels(k: int, n: int) -> None:
    number = rate(k, n)
    assert number.value == k / n
    assert number.n == n
    assert (number.low, number.high) == pytest.approx(proportion_confint(k, n, method="wilson"), abs=1e-9)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_rate_of_nothing_is_an_error(k: int, n: int) -> None:
    with pytest.raises(DertaError, match="check what was counted"):
        rate(k, n)


def test_mean_equals_statsmodels() -> None:
    x = np.random.default_rng(1).normal(3, 2, 17)
    number = mean(x, "tokens")
    assert number.value == pytest.approx(x.mean())
    assert (number.low, number.high) == pytest.approx(DescrStatsW(x).tconfint_mean())
    assert mean([4.0], "tokens") == Number(4.0, "tokens", 1)
    with pytest.raises(DertaError):
        mean([])
    with pytest.raises(DertaError):
        mean([1.0, float("nan")])


@pytest.mark.parametrize("missing", [None, float("nan"), 0.5])
def test_an_outcome_is_true_or_false(missing: float | None) -> None:
    for one in (lambda: share([missing, True]), lambda: pooled_share([missing, True], ["q", "r"])):
        with pytest.raises(DertaError, match="An outcome is True or False; leave unscored rows"):
            one()
    assert share(pd.Series([True, False], dtype="boolean")) == rate(1, 2)
    with pytest.raises(DertaError, match="n = 0"):
        share([])


def wilson(p: float, effective: float, clusters: int) -> tuple[float, float]:
    """statsmodels' interval with Student's quantile in the place of the normal one."""
    alpha = 2 * scipy_stats.norm.sf(scipy_stats.t.ppf(0.975, clusters - 1))
    return proportion_confint(p * effective, effective, alpha=alpha, method="wilson")


def test_repeats_count_as_many_trials_as_their_spread_leaves() -> None:
    """With as many trials in each, the rate's variance is that of the mean of the repeats' rates."""
    number = repeats([(3, 20), (9, 20), (5, 20), (12, 20)])
    assert (number.value, number.n) == (29 / 80, 80)
    effective = number.value * (1 - number.value) / (np.var([3 / 20, 9 / 20, 5 / 20, 12 / 20], ddof=1) / 4)
    assert 4 < effective < 80
    assert (number.low, number.high) == pytest.approx(wilson(29 / 80, effective, 4))
    alike = repeats([(8, 16)] * 5)  # no spread: all trials count, and no more than all
    assert (alike.low, alike.high) == pytest.approx(wilson(0.5, 80, 5))
    certain = repeats([(16, 16)] * 5)  # nothing varies, so nothing tells how alike the trials of one repeat are
    assert certain == replace(rate(5, 5), n=80)
    with pytest.raises(DertaError, match="check what was counted"):
        repeats([])


def test_one_repeat_says_nothing_of_others() -> None:
    assert repeats([(3, 16)]) == Number(3 / 16, "rate", 16)
    assert pooled_share([True, False, True], ["one craft"] * 3) == Number(2 / 3, "rate", 3)


@cache
def bounds(k: tuple[int, ...], n: int) -> tuple[float, float]:
    number = repeats([(each, n) for each in k])
    return number.low, number.high


@pytest.mark.parametrize(("clusters", "n"), [(5, 16), (12, 5), (16, 5)])
def test_clusters_cover_the_truth(clusters: int, n: int) -> None:
    """Beta-binomial clusters: seeds of 16 crafts, and crafts under five attacks."""
    rng = np.random.default_rng(7)
    for p, icc in product((0.05, 0.1, 0.3), (0.1, 0.3, 0.7)):
        spread = 1 / icc - 1
        k = rng.binomial(n, rng.beta(p * spread, (1 - p) * spread, (2000, clusters)))
        found = [bounds(tuple(sorted(row)), n) for row in k.tolist()]
        assert np.mean([low <= p <= high for low, high in found]) >= 0.9, (p, icc)


def test_difference_equals_scipy_bootstrap_without_clusters() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.beta(3, 2, 80), rng.beta(2, 3, 80)
    number = difference(a, b, range(80))
    tail = scipy_stats.norm.cdf(-np.sqrt(80 / 79) * scipy_stats.t.ppf(0.975, 79))  # Hesterberg (2015), section 5.3
    theirs = scipy_stats.bootstrap(
        (100 * (a - b),), np.mean, n_resamples=20_000, confidence_level=1 - 2 * tail, method="percentile", rng=3
    )
    assert number.unit == "points"
    assert number.value == pytest.approx(100 * (a.mean() - b.mean()))
    assert number.low == pytest.approx(theirs.confidence_interval.low, abs=0.3)
    assert number.high == pytest.approx(theirs.confidence_interval.high, abs=0.3)
    assert difference(a, b, range(80)) == number  # seeded


def test_difference_sees_clusters() -> None:
    """Ten copies of each pair in one cluster carry no more information than the pairs themselves."""
    rng = np.random.default_rng(4)
    a, b = rng.random(60) < 0.6, rng.random(60) < 0.5
    single = difference(a, b, range(60))
    copied = difference(np.repeat(a, 10), np.repeat(b, 10), [f"q{i}" for i in np.repeat(range(60), 10)])
    naive = difference(np.repeat(a, 10), np.repeat(b, 10), range(600))
    assert (copied.low, copied.high) == pytest.approx((single.low, single.high), abs=1e-9)
    assert naive.high - naive.low < 0.5 * (copied.high - copied.low)
    assert difference([1, 1], [0, 0], ["q", "q"]).low is None


def test_difference_covers_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters of unequal size with a shared effect: the interval holds the true difference about 95 times of 100."""
    monkeypatch.setattr("derta_lib.stats.RESAMPLES", 500)
    rng, covered, trials = np.random.default_rng(5), 0, 300
    for _ in range(trials):
        sizes = rng.integers(1, 6, 60)
        clusters = np.repeat(np.arange(60), sizes)
        effect = np.repeat(rng.normal(0, 0.2, 60), sizes)
        a, b = 0.3 + effect + rng.normal(0, 0.1, clusters.size), rng.normal(0, 0.1, clusters.size)
        number = difference(a, b, clusters.tolist())
        covered += number.low <= 30 <= number.high
    assert 0.90 <= covered / trials <= 0.98


@pytest.mark.parametrize(("clusters", "least"), [(2, 0.93), (4, 0.93), (8, 0.92), (16, 0.92)])
def test_difference_covers_the_truth_with_few_clusters(
    clusters: int, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outcomes of 0 and 1, true 80 and 30 % of the time; plain percentiles cover far less with few clusters."""
    monkeypatch.setattr("derta_lib.stats.RESAMPLES", 1000)
    rng, covered, trials = np.random.default_rng(6), 0, 400
    for _ in range(trials):
        number = difference(rng.random(clusters) < 0.8, rng.random(clusters) < 0.3, range(clusters))
        covered += number.low <= 50 <= number.high
    assert covered / trials >= least


def test_a_difference_by_groups_counts_all_alike() -> None:
    """Eight questions under an attack that differs by 100 points, two of them under one that does not: 50, not 80."""
    clusters, groups = [*range(8), 0, 1], ["x"] * 8 + ["y"] * 2
    number = difference([1] * 10, [0] * 8 + [1] * 2, clusters, groups)
    assert (number.value, number.n) == (50, 10)
    assert difference([1] * 10, [0] * 8 + [1] * 2, clusters).value == 80


@pytest.mark.parametrize("clusters", [2, 3, 4])
def test_few_clusters_of_several_outcomes_cover_the_truth(clusters: int) -> None:
    """A craft's three outcomes rise and fall together; of two to four crafts a bootstrap covers 82 to 90 %."""
    rng, covered, trials, crafts = np.random.default_rng(8), 0, 1000, np.repeat(np.arange(clusters), 3)
    true = 100 * (np.clip(rng.beta(2, 2, 10**6) - 0.25, 0, 1).mean() - 0.5)
    for _ in range(trials):
        chances = np.repeat(rng.beta(2, 2, (2, clusters)), 3, axis=1) - [[0.25], [0]]
        a, b = rng.random((2, crafts.size)) < np.clip(chances, 0, 1)
        number = difference(a, b, crafts.tolist())
        covered += number.low <= true <= number.high
    assert covered / trials >= 0.93


def test_few_clusters_by_hand() -> None:
    """Four clusters of one pair each: Student's t on −100, 0, −100 and 0, cut to what a difference can be."""
    apart = np.array([-100.0, 0.0, -100.0, 0.0])
    number = difference([0, 1, 0, 1], [1, 1, 1, 1], range(4))
    low, high = scipy_stats.t.interval(0.95, 3, apart.mean(), scipy_stats.sem(apart))
    assert (number.low, number.high) == (max(-100, low), pytest.approx(high))
    three = clustered_share([1, 0, 1, 1, 0, 0], [0, 0, 1, 1, 2, 2])  # 1/2, 1 and 0
    assert (three.low, three.high) == (0, 1)


def test_clusters_that_are_all_alike_leave_room_for_others() -> None:
    """Had one cluster in five another outcome, sixteen alike would come once in 40 draws: 1 − 0.8^16 ≈ 0.97."""
    others = next(p for p in np.arange(0, 1, 1e-5) if (1 - p) ** 16 <= 0.025)
    gained = difference(np.ones(16), np.zeros(16), range(16))
    assert (gained.low, gained.high) == (pytest.approx(100 - 200 * others, abs=0.01), 100)
    still = difference(np.ones(32), np.ones(32), np.arange(32) // 2)
    assert (still.low, still.high) == (pytest.approx(-100 * others, abs=0.01), pytest.approx(100 * others, abs=0.01))
    share = clustered_share(np.ones(16), range(16))
    assert (share.low, share.high) == (pytest.approx(1 - others, abs=1e-4), 1)


@pytest.mark.parametrize(("a", "b", "clusters"), [([], [], []), ([1, 0], [1], ["x", "y"]), ([1, 0], [1, 0], ["x"])])
def test_difference_refuses_what_is_not_paired(a: list, b: list, clusters: list) -> None:
    with pytest.raises(DertaError):
        difference(a, b, clusters)


def test_auc_is_the_share_of_pairs_in_order() -> None:
    """0.9 beats three of the others; 0.4 beats one, ties with one and loses to one: 4.5 of 6 pairs."""
    assert auc([0.9, 0.4, 0.4, 0.1, 0.8], [True, True, False, False, False]) == pytest.approx(4.5 / 6)


@pytest.mark.parametrize(
    ("scores", "positive", "said"),
    [
        ([0.1, 0.9], [True, True], "2 of 2 are positive"),
        ([0.1, 0.9], [False, False], "0 of 2 are positive"),
        ([], [], "at least one value"),
        ([0.1, float("nan")], [True, False], "only finite ones"),
        ([0.1, 0.9], [True, None], "True or False"),
    ],
)
def test_an_auc_needs_cases_of_both_kinds(scores: list, positive: list, said: str) -> None:
    with pytest.raises(DertaError, match=said):
        auc(scores, positive)


def test_nothing_cannot_be_combined() -> None:
    with pytest.raises(DertaError, match="at least one number"):
        combine([])


def test_clustered_share_of_single_rows_is_the_binomial_interval() -> None:
    """A cluster a row: near the exact interval. The same rows ten times over change nothing."""
    right = np.arange(200) < 130
    number = clustered_share(right, range(200))
    exact = proportion_confint(130, 200, method="beta")
    assert (number.value, number.n, number.unit) == (0.65, 200, "rate")
    assert (number.low, number.high) == pytest.approx(exact, abs=0.01)
    copied = clustered_share(np.repeat(right, 10), np.repeat(np.arange(200), 10).tolist())
    assert (copied.value, copied.low, copied.high) == pytest.approx((number.value, number.low, number.high))


def test_a_mean_of_shares_equals_all_resamples_of_questions() -> None:
    """Four questions under three attacks, some unanswered: each of the 4⁴ resamples counted out by hand."""
    told = {
        "a": {0: 1, 1: 0, 2: 1, 3: 1},
        "b": {0: 0, 1: 0, 2: 1},
        "c": {0: 1, 1: 0, 3: 1},
    }
    rows = [(unsafe, question, attack) for attack, answers in told.items() for question, unsafe in answers.items()]

    def average(drawn: tuple[int, ...]) -> float:
        asked = [[answers[question] for question in drawn if question in answers] for answers in told.values()]
        return float(np.mean([np.mean(answers) for answers in asked if answers]))

    tail = scipy_stats.norm.cdf(-np.sqrt(4 / 3) * scipy_stats.t.ppf(0.975, 3))
    low, high = np.quantile([average(drawn) for drawn in product(range(4), repeat=4)], [tail, 1 - tail])
    number = clustered_share(*map(list, zip(*rows, strict=True)))
    assert (number.value, number.n) == (pytest.approx(average((0, 1, 2, 3))), 10)
    assert (number.low, number.high) == pytest.approx((low, high), abs=0.01)  # 10,000 draws reach nearly all of them


def test_a_mean_of_shares_of_nothing_but_successes_is_whole() -> None:
    """However many questions an attack has: a resample with more rows of one is no larger."""
    groups = ["a"] * 20 + ["b"] * 5
    number = clustered_share([True] * 25, [*range(20), *range(5)], groups)
    assert (number.value, number.high) == (1, 1)
    assert number.low**20 == pytest.approx(0.025)  # the chance of 20 alike, were no more of them so


def test_pooled_share_is_repeats_over_the_clusters() -> None:
    crafts = ["b", "a", "b", "c", "a", "b"]
    assert pooled_share([True, False, True, True, True, False], crafts) == repeats([(2, 3), (1, 2), (1, 1)])
    alone = [True, False, False]
    assert pooled_share(alone, ["a", "b", "c"]) == share(alone)  # a cluster an outcome: they are independent
    with pytest.raises(DertaError, match="Every outcome needs its cluster: 3 and 2"):
        pooled_share(alone, ["a", "b"])


def test_positions_by_hand() -> None:
    found, crafts = [1, 3, 5, 6, 31, None, float("nan")], list("abcdefg")
    assert share_within(found, crafts, 5) == rate(3, 7)
    assert share_within(found[:5], crafts[:5], 30, first=6) == rate(1, 5)
    assert share_within(pd.Series([40, 8, None], dtype="Int64"), crafts[:3], math.inf, first=31) == rate(1, 3)
    curve = cumulative(found, crafts, range(1, 7)).set_index("position")
    assert curve.share.tolist() == pytest.approx([1 / 7, 1 / 7, 2 / 7, 2 / 7, 3 / 7, 4 / 7])
    assert (curve.low < curve.share).all()
    assert (curve.share < curve.high).all()
    two = share_within(found[:6], ["q", "q", "q", "r", "r", "r"], 5)
    assert two == repeats([(3, 3), (0, 3)])  # responses to one question are not independent
    with pytest.raises(DertaError, match="n = 0"):
        share_within([], [], 5)


def test_corrected_rate_by_hand() -> None:
    """30 % found by a judge with sensitivity 0.8 and specificity 0.9: (0.3 - 0.1) / (0.8 - 0.1) = 2/7."""
    number = corrected_rate(30, 100, JudgeError(80, 100, 90, 100))
    assert number.value == pytest.approx(2 / 7)
    assert number.low < 2 / 7 < number.high
    assert corrected_rate(0, 50, JudgeError(80, 100, 90, 100)).value == 0
    assert corrected_rate(50, 50, JudgeError(80, 100, 90, 100)).value == 1


def test_corrected_rate_with_a_perfect_judge_is_the_rate() -> None:
    perfect, plain = corrected_rate(20, 50, JudgeError(10**7, 10**7, 10**7, 10**7)), rate(20, 50)
    assert perfect.value == pytest.approx(plain.value)
    # Agresti and Coull's interval has Wilson's centre and is slightly wider
    assert perfect.low == pytest.approx(plain.low, abs=0.005)
    assert perfect.high == pytest.approx(plain.high, abs=0.005)


@pytest.mark.parametrize("truth", [0.05, 0.3, 0.8])
def test_corrected_rate_covers_the_truth(truth: float) -> None:
    rng, covered, trials = np.random.default_rng(6), 0, 2000
    for _ in range(trials):
        k = rng.binomial(100, truth * 0.85 + (1 - truth) * 0.08)
        judge = JudgeError(int(rng.binomial(120, 0.85)), 120, int(rng.binomial(150, 0.92)), 150)
        number = corrected_rate(int(k), 100, judge)
        covered += number.low <= truth <= number.high
    assert 0.93 <= covered / trials <= 0.99


@pytest.mark.parametrize("counts", [(5, 4, 3, 3), (0, 0, 3, 3), (5, 10, 5, 10), (1, 1, 100, 1000)])
def test_judge_error_refuses_useless_judges(counts: tuple[int, int, int, int]) -> None:
    with pytest.raises(DertaError):
        JudgeError(*counts)


def test_a_correction_that_leaves_nothing_keeps_the_raw_interval() -> None:
    """No success in 50 where the judge flags 19 % of safe responses: Lang and Reiczigel's interval is below zero."""
    judge, plain = JudgeError(80, 100, 81, 100), rate(0, 50)
    number = corrected_rate(0, 50, judge)
    assert (number.value, number.low, number.high) == (0, plain.low, plain.high)
    number = corrected_rate(50, 50, judge)
    assert (number.value, number.low, number.high) == (1, rate(50, 50).low, 1)


def test_a_cluster_without_a_name_is_one_as_well() -> None:
    named, unnamed = (difference([1, 0, 1], [0, 0, 0], [1, 2, last]) for last in (3, None))
    assert named == unnamed
    assert pooled_share([True, False, True], ["a", "a", None]) == pooled_share([True, False, True], ["a", "a", "b"])
    with pytest.raises(DertaError, match="whole numbers"):
        rate(1.5, 3)  # type: ignore[arg-type]


def test_a_mean_of_rates_has_an_interval_of_rates() -> None:
    """Student's t would reach from -0.99 to 1.59."""
    rates = mean([0.0, 0.0, 0.9], "rate")
    assert (rates.low, rates.high) == (0, 1)
    plain = mean([0.0, 0.0, 0.9])
    assert (plain.low, plain.high) == pytest.approx((-0.99, 1.59), abs=0.01)


def test_with_many_labels_a_corrected_rate_varies_by_the_delta_method() -> None:
    """The slopes of Rogan and Gladen's estimate are taken by differences; each share adds its own variance."""

    def estimate(p: float, se: float, sp: float) -> float:
        return (p + sp - 1) / (se + sp - 1)

    shares, counts, variance = np.array([0.3, 0.8, 0.9]), (10**7, 2 * 10**7, 5 * 10**6), 0.0
    for step, share_, count in zip(1e-6 * np.eye(3), shares, counts, strict=True):
        slope = (estimate(*(shares + step)) - estimate(*(shares - step))) / 2e-6
        variance += slope**2 * share_ * (1 - share_) / count
    half = scipy_stats.norm.ppf(0.975) * math.sqrt(variance)
    number = corrected_rate(3 * 10**6, 10**7, JudgeError(16 * 10**6, 2 * 10**7, 45 * 10**5, 5 * 10**6))
    assert (number.value - number.low, number.high - number.value) == pytest.approx((half, half), rel=2e-3)


def test_a_corrected_interval_with_few_labels_by_hand() -> None:
    """Lang and Reiczigel (2014): 0.30740 of 103.84, Se' = 81/102, Sp' = 91/102; 0.29078 - 0.00156 -+ 0.14730."""
    number = corrected_rate(30, 100, JudgeError(80, 100, 90, 100))
    assert (number.low, number.high) == pytest.approx((0.14192, 0.43652), abs=2e-5)
