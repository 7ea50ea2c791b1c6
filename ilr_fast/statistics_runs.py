"""Intervals over questions and seeds: two methods, each trained once for every seed, on the same questions.

A hierarchical bootstrap (Davison and Hinkley 1997, section 3.8): seeds are drawn with replacement, and within each
drawn seed its questions, both methods' answers to a question together. Where all seeds answer the same questions
(`crossed`) one draw of questions serves all seeds of a resample. Resampling S seeds shows (S − 1)/S of the variance
between them, so their deviations are widened by √(S/(S − 1)). With S = 1 the interval is over questions alone, and
says nothing of another seed.

Of three seeds the interval is still too narrow where runs differ much: in the simulation of
tests/test_statistics_runs.py it holds the truth in about 9 of 10 cases, not in 19 of 20. A difference whose interval
holds 0 is called `none`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ilr_fast.statistics import Interval, PairedDifference, accuracy_interval, paired_difference

Outcomes = Mapping[str, Sequence[bool]]  # a question's answers, right or wrong, by its id
RESAMPLES = 4000


def difference_over_runs(
    first: Mapping[int, Outcomes], second: Mapping[int, Outcomes], *, crossed: bool, seed: int = 0
) -> PairedDifference | None:
    """Accuracy of the first method minus the second's, over the seeds and questions that both have; None without any.

    `crossed`: the questions are the same for all seeds. `n` counts questions over all seeds.
    """
    seeds = sorted(s for s in first.keys() & second.keys() if first[s].keys() & second[s].keys())
    if not seeds:
        return None
    if len(seeds) == 1:
        return paired_difference(first[seeds[0]], second[seeds[0]], seed=seed)
    values = []
    for s in seeds:
        shared = sorted(first[s].keys() & second[s].keys())
        values.append(np.array([_share(first[s][q]) - _share(second[s][q]) for q in shared]))
    mean = float(np.mean([v.mean() for v in values]))
    one = paired_difference(first[seeds[0]], second[seeds[0]], seed=seed)
    assert one is not None
    interval = one.ci95 if _is_constant(values) else bootstrap_runs(values, crossed=crossed, seed=seed)
    return PairedDifference(sum(map(len, values)), mean, interval)


def accuracy_over_runs(runs: Mapping[int, Outcomes], *, crossed: bool, seed: int = 0) -> tuple[float, Interval | None]:
    """The mean accuracy of the runs, and its 95% interval over questions and seeds."""
    values = [np.array([_share(answers) for _, answers in sorted(runs[s].items())]) for s in sorted(runs) if runs[s]]
    mean = float(np.mean([v.mean() for v in values]))
    if len(values) == 1 or _is_constant(values):
        outcomes = next(runs[s] for s in sorted(runs) if runs[s])
        return mean, accuracy_interval(list(outcomes.values()), seed=seed)
    low, high = bootstrap_runs(values, crossed=crossed, seed=seed)
    return mean, (max(0.0, low), min(1.0, high))  # what widens the seeds' deviations knows no bounds


def bootstrap_runs(
    values_SQ: Sequence[NDArray[np.float64]], *, crossed: bool, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """95% percentile interval of the mean over S ≥ 2 runs of the mean over each one's questions.

    With `crossed` all runs have the same questions in the same order.
    """
    count = len(values_SQ)
    assert count > 1 and all(len(v) for v in values_SQ)
    crossed = crossed and len({len(v) for v in values_SQ}) == 1
    random = np.random.default_rng(seed)
    own_S = np.array([v.mean() for v in values_SQ])
    wide_S = own_S.mean() + (own_S - own_S.mean()) * np.sqrt(count / (count - 1))
    total_B = np.zeros(resamples)
    drawn_BQ = random.integers(len(values_SQ[0]), size=(resamples, len(values_SQ[0]))) if crossed else None
    for _ in range(count):
        chosen_B = random.integers(count, size=resamples)
        for s, value in enumerate(values_SQ):
            rows = np.flatnonzero(chosen_B == s)
            picked = random.integers(len(value), size=(len(rows), len(value))) if drawn_BQ is None else drawn_BQ[rows]
            total_B[rows] += wide_S[s] + value[picked].mean(axis=1) - own_S[s]
    low, high = np.quantile(total_B / count, (0.025, 0.975))
    return float(low), float(high)


def _is_constant(values_SQ: Sequence[NDArray[np.float64]]) -> bool:
    """Whether all numbers are the same: a bootstrap has no width then, and one run's interval says more."""
    return np.ptp(np.concatenate(values_SQ)) == 0


def _share(answers: Sequence[bool]) -> float:
    return sum(answers) / len(answers)
