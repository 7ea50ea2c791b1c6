"""Intervals for accuracies and their differences. Pure numpy, seeded, no scipy; rank correlation is in difficulty.py.

- One answer a question: Wilson's score interval (Wilson 1927, J. Am. Stat. Assoc. 22), which stays inside 0 to 1 and
  does not shrink to nothing at 0 or n right answers.
- Several answers a question: the answers to one question are not independent, so questions are resampled, not answers
  (percentile bootstrap).
- Two methods on the same questions, one answer each: with b questions that only the first got right, c only the second,
  the Laplace-adjusted Wald interval of Bonett and Price (2012, J. Educ. Behav. Stat. 37), which Fagerland, Lydersen and
  Laake (2014, Stat. Med. 33) recommend: p₁ = (b+1)/(n+2), p₂ = (c+1)/(n+2),
  p₁ − p₂ ± z·√((p₁ + p₂ − (p₁ − p₂)²)/(n+2)). Several answers: bootstrap over the questions' differences.
- Several runs (seeds): seeds are resampled, and questions within each (statistics_runs.py).

>>> wilson(77, 200)
(0.32033309726923215, 0.45400132779753916)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

Z95 = 1.959963984540054  # the normal distribution's 97.5% point
# Student's 97.5% points by degrees of freedom; beyond them the normal's and the first term of its expansion, to 0.01.
_T95 = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Accuracy of the first method minus the second's on the `n` questions both answered, with its 95% interval."""

    n: int
    difference: float
    ci95: Interval

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `none` where the interval holds 0: then no difference was seen."""
        return "better" if self.ci95[0] > 0 else "worse" if self.ci95[1] < 0 else "none"


def wilson(correct: int, n: int, z: float = Z95) -> Interval | None:
    """Wilson's score interval of `correct` out of `n` independent answers; None where n is 0."""
    assert 0 <= correct <= n
    if n == 0:
        return None
    share, shrink = correct / n, 1 + z * z / n
    center = (share + z * z / (2 * n)) / shrink
    half = z / shrink * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if correct == 0 else max(0.0, center - half)  # exact at the ends, where rounding leaves 1e-17
    high = 1.0 if correct == n else min(1.0, center + half)
    return low, high


def bootstrap_mean(values_Q: Sequence[float], *, seed: int = 0, resamples: int = 10_000) -> Interval | None:
    """Percentile bootstrap interval (95%) of the mean over questions; None of nothing.

    `values_Q` holds one number a question, such as its share of right answers. The same seed gives the same interval.
    """
    values = np.asarray(values_Q, dtype=np.float64)
    if len(values) == 0:
        return None
    random = np.random.default_rng(seed)
    means = np.empty(resamples)
    rows = max(1, 4_000_000 // len(values))  # resamples drawn at once: 32 MB of indices
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        means[start:stop] = values[random.integers(len(values), size=(stop - start, len(values)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def accuracy_interval(correct_QS: Sequence[Sequence[bool]], *, seed: int = 0) -> Interval | None:
    """95% interval of the accuracy: Wilson for one answer a question, bootstrap over questions for several.

    Where all questions have the same share of right answers the bootstrap has no width, and Wilson's interval over as
    many questions stands in for it. None without questions.
    """
    if all(len(answers) == 1 for answers in correct_QS):
        return wilson(sum(bool(answers[0]) for answers in correct_QS), len(correct_QS))
    shares = [sum(answers) / len(answers) for answers in correct_QS if answers]
    if len(set(shares)) == 1:
        return wilson(round(sum(shares)), len(shares))
    return bootstrap_mean(shares, seed=seed)


def paired_difference(
    first: Mapping[str, Sequence[bool]], second: Mapping[str, Sequence[bool]], *, seed: int = 0
) -> PairedDifference | None:
    """The difference in accuracy of two methods on the questions (by id) that both have answers to; None without any.

    A value holds a question's answers: right or wrong. With one answer each the interval is Bonett and Price's, else a
    bootstrap over the questions' differences.
    """
    shared = sorted(q for q in first.keys() & second.keys() if first[q] and second[q])
    if not shared:
        return None
    differences = [sum(first[q]) / len(first[q]) - sum(second[q]) / len(second[q]) for q in shared]
    mean = sum(differences) / len(differences)
    if all(len(first[q]) == len(second[q]) == 1 for q in shared) or len(set(differences)) == 1:
        return PairedDifference(len(shared), mean, _bonett_price(differences))
    interval = bootstrap_mean(differences, seed=seed)
    assert interval is not None
    return PairedDifference(len(shared), mean, interval)


def mean_interval(values: Sequence[float]) -> Interval:
    """95% interval of the mean of independent runs: Student's t; of two values alone their range, as t says nothing."""
    assert len(values) > 1
    mean = sum(values) / len(values)
    if len(values) == 2:
        return min(values), max(values)
    error = sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    half = _T95.get(len(values) - 1, Z95 + 2.5 / (len(values) - 1)) * error
    return mean - half, mean + half


def _bonett_price(differences_Q: Sequence[float]) -> Interval:
    """From one of −1, 0, 1 a question (or, where all are the same share, that many questions' worth)."""
    n = len(differences_Q)
    only_first = (sum(max(d, 0.0) for d in differences_Q) + 1) / (n + 2)
    only_second = (sum(max(-d, 0.0) for d in differences_Q) + 1) / (n + 2)
    center = only_first - only_second
    half = Z95 * sqrt((only_first + only_second - center**2) / (n + 2))
    return max(-1.0, center - half), min(1.0, center + half)
