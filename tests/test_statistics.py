"""Intervals against published values, hand-worked cases and their own coverage."""

from __future__ import annotations

import random

import pytest

from ilr_fast.statistics import accuracy_interval, bootstrap_mean, paired_difference, wilson


def by_question(answers):
    return {str(i): [a] for i, a in enumerate(answers)}


def test_wilson_matches_published_values():
    # Newcombe (1998), Stat. Med. 17, 857-872, table I: 81/263, 15/148, 0/20, 1/29 by method 3.
    for correct, n, low, high in [
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)
    ]:
        assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_at_the_ends():
    assert wilson(0, 0) is None
    assert wilson(0, 7)[0] == 0.0 and wilson(7, 7)[1] == 1.0
    assert wilson(7, 7)[0] == pytest.approx(1 - wilson(0, 7)[1])


def test_bootstrap_is_seeded_and_close_to_the_normal_interval():
    values = [i % 5 / 4 for i in range(500)]
    low, high = bootstrap_mean(values, seed=3)
    assert (low, high) == bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)
    half = 1.96 * (0.125 / 500) ** 0.5  # the variance of 0, ¼, ½, ¾, 1 is 1/8
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.003)
    assert bootstrap_mean([]) is None


def test_several_answers_resample_questions_not_answers():
    """16 equal answers a question say no more than one: the interval must not be 4 times narrower."""
    once = [[i % 2 == 0] for i in range(100)]
    often = [[i % 2 == 0] * 16 for i in range(100)]
    low1, high1 = accuracy_interval(once)
    low16, high16 = accuracy_interval(often)
    assert high16 - low16 == pytest.approx(high1 - low1, rel=0.1)


def test_no_width_is_never_claimed():
    assert accuracy_interval([[False] * 4] * 30) == wilson(0, 30)
    assert accuracy_interval([]) is None
    same = {str(i): [True, False] for i in range(30)}
    low, high = paired_difference(same, same).ci95
    assert low < 0 < high


def test_paired_difference_by_hand():
    # n = 18, b = 6, c = 2: p1 = 7/20, p2 = 3/20, difference 0.2, variance (0.5 - 0.04)/20 = 0.023.
    first = by_question([True] * 6 + [False] * 2 + [True] * 10)
    second = by_question([False] * 6 + [True] * 2 + [True] * 10)
    result = paired_difference(first, second)
    assert (result.n, result.difference) == (18, pytest.approx(4 / 18))
    half = 1.959964 * 0.023**0.5
    assert result.ci95 == pytest.approx((0.2 - half, 0.2 + half), abs=1e-6)
    assert result.verdict != "better"
    swapped = paired_difference(second, first)
    assert swapped.ci95 == pytest.approx((-result.ci95[1], -result.ci95[0]))


def test_paired_difference_uses_shared_questions_only():
    first, second = by_question([True] * 40), by_question([False] * 30)
    result = paired_difference(first, second | {"other": [True]})
    assert result.n == 30 and result.difference == 1.0 and result.verdict == "better"
    assert paired_difference(first, {"other": [True]}) is None
    assert paired_difference(first, {"0": []}) is None


def test_paired_interval_covers_and_is_narrower_than_unpaired():
    draw, covered, trials = random.Random(0), 0, 400
    for _ in range(trials):
        first, second = [], []
        for _ in range(200):
            easy = draw.random() < 0.5
            first.append(easy or draw.random() < 0.2)
            second.append(easy and draw.random() > 0.1)
        low, high = paired_difference(by_question(first), by_question(second)).ci95
        covered += low <= 0.6 - 0.45 <= high
    assert 0.92 <= covered / trials <= 0.98
    one, two = wilson(sum(first), 200), wilson(sum(second), 200)
    assert high - low < 0.8 * ((one[1] - one[0]) ** 2 + (two[1] - two[0]) ** 2) ** 0.5


def test_paired_bootstrap_for_several_answers():
    first = {str(i): [True, i % 3 > 0] for i in range(90)}
    second = {str(i): [True, i % 3 > 1] for i in range(90)}
    result = paired_difference(first, second, seed=1)
    assert result.difference == pytest.approx(1 / 6)
    assert result.verdict == "better" and result.ci95[0] < 1 / 6 < result.ci95[1]
