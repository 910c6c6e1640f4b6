"""Paired comparisons against numbers made by hand, all sign patterns, and all resamples."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from bptt_study.report import paired_tests

INF = np.inf


def test_differences_are_of_the_same_seed_in_any_order():
    first = pd.Series([1.0, 2.0, 3.0], index=[5, 6, 7])
    second = pd.Series([0.5, 5.0, 1.0], index=[7, 5, 6])
    assert paired_tests.differences(first, second).to_dict() == {5: -4.0, 6: 1.0, 7: 2.5}
    for other in (second.drop(7), pd.concat([second, second])):
        with pytest.raises(ValueError, match="seeds"):
            paired_tests.differences(first, other)


@pytest.mark.parametrize("bad", [np.nan, INF, -INF])
def test_a_diverged_seed_is_the_worst_and_two_are_alike(bad):
    first, second = pd.Series([bad, bad, 1.0, 4.0]), pd.Series([bad, 1.0, bad, 1.0])
    assert paired_tests.differences(first, second).tolist() == [0, INF, -INF, 3]
    assert paired_tests.differences(first, second, worst=-INF).tolist() == [0, -INF, INF, 3]
    found = paired_tests.compare(first, second)
    assert (found["n"], found["diverged_first"], found["diverged_second"]) == (4, 2, 2)


def test_interval_is_that_of_all_resamples(rng):
    sample = rng.normal(size=6)
    medians = np.median(np.array(list(product(sample, repeat=6))), axis=1)
    middle, low, high = paired_tests.interval(sample)
    assert middle == np.median(sample)
    for value, share in ((low, 0.025), (high, 0.975)):  # three standard errors of 5000 draws
        around = np.quantile(medians, (share - 0.0067, share + 0.0067), method="nearest")
        assert around[0] <= value <= around[1]
    assert paired_tests.interval(sample) == (middle, low, high)


def test_lost_seeds_stretch_the_interval_and_cannot_hide():
    assert paired_tests.interval(np.array([INF, INF, INF, 1.0])) == (INF, 1.0, INF)
    middle, low, high = paired_tests.interval(np.array([-INF, INF, 0.5, 0.5]))
    assert (middle, low, high) == (0.5, -INF, INF)
    assert paired_tests.interval(np.array([-INF, INF]))[0] == 0


@pytest.mark.parametrize(
    "sample",
    [[0.3, -0.1, 0.8, 1.2, -0.5, 2.0], [1.0, 1.0, -1.0, 2.0, 2.0], [INF, INF, -0.5, 1.0, 0.0]],
    ids=["distinct", "tied", "lost"],
)
def test_signed_rank_counts_all_signs(sample):
    """p = share of the 2^n sign patterns with a rank sum as far from its middle, or farther."""
    d = np.clip(np.array([x for x in sample if x != 0]), -9, 9)
    ranks = pd.Series(abs(d)).rank().to_numpy()
    signs = np.array(list(product([0, 1], repeat=len(d))))
    away = abs(signs @ ranks - ranks.sum() / 2)
    expected = np.mean(away >= abs((d > 0) @ ranks - ranks.sum() / 2) - 1e-9)
    assert paired_tests.signed_rank(np.array(sample)) == pytest.approx(expected, rel=1e-12)


def test_signed_rank_at_its_ends():
    assert paired_tests.signed_rank(np.zeros(5)) == 1
    assert paired_tests.signed_rank(np.arange(1.0, 11)) == pytest.approx(2 / 2**10)
    assert paired_tests.signed_rank(-np.arange(1.0, 13)) == pytest.approx(2 / 2**12)


def test_holm_by_hand():
    """4·0.01, 3·0.02 = 0.06, 2·0.03 = 0.06, 1·0.04 raised to it; and not Bonferroni's."""
    np.testing.assert_allclose(
        paired_tests.holm(np.array([0.04, 0.01, 0.03, 0.02])), [0.06, 0.04, 0.06, 0.06]
    )
    np.testing.assert_allclose(paired_tests.holm(np.array([0.6, 0.5])), [1, 1])
    np.testing.assert_allclose(paired_tests.holm(np.array([0.001, 0.4, 0.01])), [0.003, 0.4, 0.02])


@pytest.mark.parametrize(
    ("numbers", "word"),
    [
        ((-0.03, -0.05, -0.01, 0.01), "better"),
        ((0.03, 0.01, 0.05, 0.01), "worse"),
        ((-0.03, -0.05, -0.01, 0.06), "undecided"),
        ((-0.015, -0.03, -0.01, 0.01), "undecided"),
        ((0.005, -0.01, 0.015, 0.001), "alike"),
        ((0.0, -0.01, 0.025, 0.9), "undecided"),
        ((INF, 0.01, INF, 0.01), "worse"),
    ],
)
def test_the_verdict_follows_from_the_numbers(numbers, word):
    assert paired_tests.verdict(*numbers, least=0.02, larger_is_better=False) == word
    swapped = {"better": "worse", "worse": "better"}
    assert paired_tests.verdict(*numbers, least=0.02, larger_is_better=True) == swapped.get(
        word, word
    )


def test_a_family_is_corrected_as_a_whole():
    seeds = range(10)
    near, far = pd.Series(np.linspace(1, 2, 10), seeds), pd.Series(np.linspace(2, 3.5, 10), seeds)
    rows = [
        paired_tests.compare(near, far),
        paired_tests.compare(near, near),
        paired_tests.compare(far, near),
    ]
    one = paired_tests.family(
        pd.DataFrame([paired_tests.compare(near[:1], near[:1])]).assign(
            least=0.1, larger_is_better=False
        )
    )
    assert one["verdict"].tolist() == ["undecided"]  # it has no interval
    table = paired_tests.family(
        pd.DataFrame(rows).assign(least=0.1, larger_is_better=[False, False, True])
    )
    assert table["verdict"].tolist() == ["better", "alike", "better"]
    np.testing.assert_allclose(table["p"], [2 / 2**10, 1, 2 / 2**10])
    np.testing.assert_allclose(table["p_holm"], [6 / 2**10, 1, 6 / 2**10])
    assert table["difference"].tolist() == pytest.approx([-1.25, 0, 1.25])
