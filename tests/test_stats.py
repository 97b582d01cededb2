"""Intervals against statsmodels, scipy, closed forms and simulation."""

import numpy as np
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
    corrected_rate,
    difference,
    mean,
    pooled_share,
    rate,
    repeats,
    share,
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


def test_repeats_take_the_wider_interval() -> None:
    assert repeats([(0, 16)] * 5) == rate(0, 80)  # repeats that agree do not make a rate certain
    assert repeats([(3, 16)]) == rate(3, 16)
    counts = [(0, 16), (16, 16), (8, 16)]
    over = DescrStatsW([0, 1, 0.5]).tconfint_mean()
    assert over[0] < 0
    number = repeats(counts)  # far wider than Wilson's of 24 in 48, and cut to [0, 1]
    assert (number.value, number.n, number.low, number.high) == (0.5, 48, 0.0, 1.0)
    wilson = rate(48, 96)  # here wider than Student's, whose half is 4.3 · (1/32) / √3
    assert DescrStatsW([15 / 32, 0.5, 17 / 32]).tconfint_mean()[0] > wilson.low
    assert repeats([(15, 32), (16, 32), (17, 32)]) == wilson
    with pytest.raises(DertaError, match="check what was counted"):
        repeats([])


def test_difference_equals_scipy_bootstrap_without_clusters() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.beta(3, 2, 80), rng.beta(2, 3, 80)
    number = difference(a, b, range(80))
    theirs = scipy_stats.bootstrap((100 * (a - b),), np.mean, n_resamples=20_000, method="percentile", rng=3)
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


def test_difference_covers_the_truth() -> None:
    """Clusters of unequal size with a shared effect: the interval holds the true difference about 95 times of 100."""
    rng, covered, trials = np.random.default_rng(5), 0, 300
    for _ in range(trials):
        sizes = rng.integers(1, 6, 60)
        clusters = np.repeat(np.arange(60), sizes)
        effect = np.repeat(rng.normal(0, 0.2, 60), sizes)
        a, b = 0.3 + effect + rng.normal(0, 0.1, clusters.size), rng.normal(0, 0.1, clusters.size)
        number = difference(a, b, clusters.tolist(), resamples=500)
        covered += number.low <= 30 <= number.high
    assert 0.90 <= covered / trials <= 0.98


@pytest.mark.parametrize(("a", "b", "clusters"), [([], [], []), ([1, 0], [1], ["x", "y"]), ([1, 0], [1, 0], ["x"])])
def test_difference_refuses_what_is_not_paired(a: list, b: list, clusters: list) -> None:
    with pytest.raises(DertaError):
        difference(a, b, clusters)


def test_auc_is_the_share_of_pairs_in_order() -> None:
    """0.9 beats three of the others; 0.4 beats one, ties with one and loses to one: 4.5 of 6 pairs."""
    assert auc([0.9, 0.4, 0.4, 0.1, 0.8], [True, True, False, False, False]) == pytest.approx(4.5 / 6)


def test_clustered_share_of_single_rows_is_the_binomial_interval() -> None:
    """A cluster a row: near the exact interval. The same rows ten times over change nothing."""
    right = np.arange(200) < 130
    number = clustered_share(right, range(200))
    exact = proportion_confint(130, 200, method="beta")
    assert (number.value, number.n, number.unit) == (0.65, 200, "rate")
    assert (number.low, number.high) == pytest.approx(exact, abs=0.01)
    copied = clustered_share(np.repeat(right, 10), np.repeat(np.arange(200), 10).tolist())
    assert (copied.value, copied.low, copied.high) == pytest.approx((number.value, number.low, number.high))


def test_pooled_share_takes_the_wider_interval() -> None:
    crafts = [craft for craft in range(4) for _ in range(5)]
    two_of_four = [craft < 2 for craft in crafts]
    number = pooled_share(two_of_four, crafts)
    # all or none of four crafts are drawn from the two that fell with a chance of 1/16 each: above 2.5 %
    assert (number.value, number.n, number.low, number.high) == (0.5, 20, 0.0, 1.0)
    assert pooled_share([True] * 20, crafts) == share([True] * 20)  # no craft differs: Wilson's is wider
    assert pooled_share(two_of_four, list(range(20))) == share(two_of_four)


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


@pytest.mark.parametrize("counts", [(5, 4, 3, 3), (0, 0, 3, 3), (5, 10, 5, 10)])
def test_judge_error_refuses_useless_judges(counts: tuple[int, int, int, int]) -> None:
    with pytest.raises(DertaError):
        JudgeError(*counts)
