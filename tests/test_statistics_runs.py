"""Intervals over questions and seeds: worked cases, and how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest

from ilr_fast.statistics import paired_difference, wilson
from ilr_fast.statistics_runs import accuracy_over_runs, bootstrap_runs, difference_over_runs


def outcomes(answers):
    return {str(i): [bool(a)] for i, a in enumerate(answers)}


def draws(seeds, questions, lift, between, rng):
    """Two methods' answers by seed: the second is right on half of the questions, the first on `lift` more, which
    varies between seeds by `between`."""
    first, second = {}, {}
    for s in range(seeds):
        own = lift + rng.normal(0, between)
        easy = rng.random(questions) < 0.5
        second[s] = outcomes(easy)
        first[s] = outcomes(easy | (rng.random(questions) < 2 * max(0.0, own)))
    return first, second


def test_one_seed_is_the_paired_difference():
    first, second = {5: outcomes([1, 1, 0, 1] * 20)}, {5: outcomes([1, 0, 0, 1] * 20)}
    assert difference_over_runs(first, second, crossed=False) == paired_difference(first[5], second[5])


def test_mean_of_seeds_and_only_what_both_have():
    first = {1: outcomes([1, 1, 1, 1]), 2: outcomes([0, 0, 1, 1]), 3: outcomes([1])}
    second = {1: outcomes([0, 0, 0, 0]), 2: outcomes([0, 0, 1, 1, 0])}
    found = difference_over_runs(first, second, crossed=False)
    assert (found.n, found.difference) == (8, 0.5)
    assert difference_over_runs(first, {9: outcomes([1])}, crossed=False) is None


def test_within_the_interval_is_none():
    rng = np.random.default_rng(0)
    first, second = draws(3, 300, 0.3, 0.01, rng)
    assert difference_over_runs(first, second, crossed=False).verdict == "better"
    assert difference_over_runs(second, first, crossed=False).verdict == "worse"
    noisy, other = draws(3, 300, 0.02, 0.2, rng)
    assert difference_over_runs(noisy, other, crossed=False).verdict == "none"


def test_seeds_widen_the_interval_and_their_spread_is_not_understated():
    """With runs that differ and questions that do not, the bootstrap's variance is s²/S, not (S−1)/S of it."""
    values = [np.full(200, v) for v in (0.1, 0.2, 0.3, 0.5, 0.6, 0.9)]
    low, high = bootstrap_runs(values, crossed=False, resamples=20_000)
    s = np.std([0.1, 0.2, 0.3, 0.5, 0.6, 0.9], ddof=1) / 6**0.5
    assert (high - low) / 2 == pytest.approx(1.96 * s, rel=0.06)


def test_crossed_questions_do_not_average_out():
    """The same hard questions for all seeds: three runs of 100 questions say as much of questions as one."""
    value = (np.arange(100) < 50).astype(float)
    nested = np.diff(bootstrap_runs([value] * 3, crossed=False))[0]
    crossed = np.diff(bootstrap_runs([value] * 3, crossed=True))[0]
    assert crossed == pytest.approx(2 * 1.96 * 0.05, rel=0.08)
    assert nested == pytest.approx(crossed / 3**0.5, rel=0.08)


@pytest.mark.parametrize(
    ("seeds", "between", "least", "most"), [(3, 0.05, 0.82, 0.96), (3, 0.0, 0.93, 1.0), (10, 0.05, 0.9, 0.99)]
)
def test_coverage(seeds, between, least, most):
    rng, held, trials = np.random.default_rng(1), 0, 200
    for trial in range(trials):
        deviations = rng.normal(0, between, seeds)
        shares = [[0.1 - d / 2, 0.7, 0.2 + d / 2] for d in deviations.clip(-0.19, 0.19)]
        values = [rng.choice([-1.0, 0.0, 1.0], 150, p=p) for p in shares]
        low, high = bootstrap_runs(values, crossed=False, seed=trial, resamples=600)
        held += low <= 0.1 <= high
    assert least <= held / trials <= most, held / trials


def test_accuracy_over_runs():
    mean, interval = accuracy_over_runs({1: outcomes([1, 0]), 2: outcomes([1, 1])}, crossed=False)
    assert mean == 0.75 and interval[0] < 0.75 <= interval[1]
    mean, interval = accuracy_over_runs({1: outcomes([1, 0]), 2: {}}, crossed=False)
    assert mean == 0.5 and interval[0] < 0.5 < interval[1]


def test_runs_that_are_all_alike_have_the_interval_of_one():
    none_right, all_right = ({s: outcomes([answer] * 20) for s in (1, 2)} for answer in (0, 1))
    assert accuracy_over_runs(none_right, crossed=True) == (0.0, wilson(0, 20))
    same = difference_over_runs(all_right, all_right, crossed=True)
    assert same.ci95 == paired_difference(all_right[1], all_right[1]).ci95 and same.verdict == "none"
