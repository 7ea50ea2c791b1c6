"""What `ilr-fast bench curve` counts: seconds to a goal on a curve, and how many times sooner one side is there.

- A curve is **at a goal** at the first evaluation whose mean with the two before it is at least the goal: one alone
  moves by two points and more with the answers asked and with the last update.
- **Times sooner**: a seed's seconds of training to the goal, TRL's over ours; of the seeds that had the card alone the
  geometric mean, with its 95% interval (Student's t on logarithms).
- A side that never comes to the goal counts with the seconds of all its steps, less than it needs. Where it is ours,
  the target is missed.
- Beside it: the same of the mean curve (accuracy and seconds of each step, means over the seeds that had the card
  alone); how many times as fast a step is, all steps of a seed together; and accuracy at equal steps, seed by seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import exp, log
from statistics import mean
from typing import Any

from ilr_benchmarks.common import row

from ilr_fast.statistics import mean_interval

GOALS = (0.5, 0.6, 0.7)
GOAL, TARGET = 0.7, 2.0  # ours must be there in half of TRL's time
AVERAGED = 3  # evaluations
OURS, THEIRS = "ilr-fast", "TRL"
Point = Sequence[float]  # step, samples, seconds, accuracy


def reached(curve: Sequence[Point]) -> dict[str, float | None]:
    """Training seconds and steps until the curve is at each goal; None where it never is."""
    told: dict[str, float | None] = {}
    for goal in GOALS:
        point = first_at(curve, goal)
        told |= {f"seconds_to_{goal:.0%}": point and point[2], f"steps_to_{goal:.0%}": point and point[0]}
    return told


def first_at(curve: Sequence[Point], goal: float) -> Point | None:
    """The first point whose accuracy has, with those before it, AVERAGED in all, a mean of at least the goal."""
    windows = (curve[end - AVERAGED : end] for end in range(AVERAGED, len(curve) + 1))
    return next((window[-1] for window in windows if mean(point[3] for point in window) >= goal), None)


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[list[float]]:
    """Points whose every number is the mean over the curves, at the steps that all of them have."""
    steps = sorted(set.intersection(*({point[0] for point in curve} for curve in curves))) if curves else []
    at = [[next(point for point in curve if point[0] == step) for curve in curves] for step in steps]
    return [[mean(numbers) for numbers in zip(*points, strict=True)] for points in at]


def compared(found: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row that compares the seeds which both sides ran, judged by those that had the card alone; none without one."""
    trained = [r for r in found if r["curve"] and r["curve"][-1][2] > 0]  # the others ended before their first step
    sides = [{r["seed"]: r for r in trained if r["variant"] == side} for side in (OURS, THEIRS)]
    both = [(sides[0][seed], sides[1][seed]) for seed in sorted(sides[0].keys() & sides[1].keys())]
    if not both:
        return
    alone = [pair for pair in both if not any(side["beside_others"] for side in pair)]
    means = [mean_curve([pair[i]["curve"] for pair in alone]) for i in (0, 1)]
    points = [first_at(curve, GOAL) for curve in means]
    steps = [mean_curve([pair[i]["curve"] for pair in both]) for i in (0, 1)]
    sooner = _times([tuple(map(_seconds, pair)) for pair in alone])
    yield row(
        f"{OURS} against {THEIRS}", f"{len(both)} seeds, {len(alone)} of them with the card alone", [],
        status="compared", seeds=[ours["seed"] for ours, _ in alone],
        seconds_to_goal=[tuple(_reached(side) for side in pair) for pair in alone],
        times_faster=sooner[0], times_faster_ci95=sooner[1],
        mean_curve_seconds_to_goal=[point and point[2] for point in points],
        mean_curve_times_faster=points[1][2] / points[0][2] if points[0] and points[1] else None,
        **_steps(alone), **_at_equal_steps(both), accuracy_by_step=_table(steps),
        target=f"{GOAL:.0%} ≥ {TARGET:g}× sooner, geometric mean over seeds", met=_met(alone, sooner[0]),
    )  # fmt: skip


def _met(alone: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], times: float | None) -> bool | None:
    behind = any(_reached(ours) is None for ours, _ in alone)
    return None if times is None else times >= TARGET and not behind


def _reached(found: Mapping[str, Any]) -> float | None:
    point = first_at(found["curve"], GOAL)
    return point and point[2]


def _seconds(found: Mapping[str, Any]) -> float:
    """To the goal, or of all steps where it is never reached."""
    return _reached(found) or found["curve"][-1][2]


def _times(pairs: Sequence[tuple[float, ...]]) -> tuple[float | None, tuple[float, float] | None]:
    """The geometric mean of theirs over ours, and its interval where there are three pairs or more."""
    logs = [log(theirs / ours) for ours, theirs in pairs]
    low_high = mean_interval(logs) if len(logs) > 2 else None
    return exp(mean(logs)) if logs else None, low_high and (exp(low_high[0]), exp(low_high[1]))


def _steps(alone: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Any]:
    """How many times as fast a step is, by the seconds at the last evaluation that a seed's sides have both."""
    ends = []
    for pair in alone:
        seconds = [{point[0]: point[2] for point in side["curve"]} for side in pair]
        last = max(seconds[0].keys() & seconds[1].keys(), default=0)
        ends += [(seconds[0][last], seconds[1][last])] if last else []
    times, interval = _times(ends)
    return {"step_times_faster": times, "step_times_faster_ci95": interval}


def _at_equal_steps(both: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Any]:
    """Ours less theirs, the mean over the evaluations that both sides of a seed have, and its interval over seeds."""
    differences = []
    for pair in both:
        accuracy = [{point[0]: point[3] for point in side["curve"]} for side in pair]
        steps = accuracy[0].keys() & accuracy[1].keys()
        differences += [mean(accuracy[0][step] - accuracy[1][step] for step in steps)] if steps else []
    return {"accuracy_difference": mean(differences) if differences else None,
            "accuracy_difference_ci95": mean_interval(differences) if len(differences) > 2 else None}  # fmt: skip


def _table(means: Sequence[Sequence[Point]]) -> list[list[float]]:
    """[step, ours, theirs] of two mean curves where both have a point."""
    ours, theirs = ({point[0]: point[3] for point in curve} for curve in means)
    return [[step, ours[step], theirs[step]] for step in sorted(ours.keys() & theirs.keys())]
