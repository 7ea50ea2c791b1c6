"""The figures of what was said: cooperation against competition by difficulty, and calibration's effect on rewards."""

from __future__ import annotations

from typing import Any

from ilr_fast.report.calibration import CalibrationTally
from ilr_fast.report.stances import StanceTally
from ilr_fast.report.vega import Axis, Figure, dots
from ilr_fast.statistics import wilson

STANCES = ("cooperation", "competition", "neutral")


def stance_figures(tally: StanceTally, suffix: str = "") -> list[Figure]:
    """For each agent: right first and last answers by difficulty and stance, and the share of cooperation."""
    figures = []
    for agent in dict.fromkeys(key[0] for key in tally.n):
        for which in ("first", "last"):
            rows = [_share(bin_, stance, tally.right[agent, stance, bin_, which], tally.n[agent, stance, bin_, which])
                    for bin_ in tally.bins for stance in STANCES if tally.n[agent, stance, bin_, which]]
            figures.append(dots(f"Right {which} answers · {agent}{suffix}", "by difficulty and stance",
                                Axis("right answers", "percent", high=1.0), rows, across="difficulty", names=tally.bins,
                                labels=STANCES))  # fmt: skip
        rows = []
        for bin_ in tally.bins:
            counts = {stance: tally.n[agent, stance, bin_, "first"] for stance in STANCES}
            if sum(counts.values()) and not counts["neutral"]:
                rows.append(_share(bin_, agent, counts["cooperation"], sum(counts.values())))
        figures.append(dots(f"Share of cooperation by difficulty · {agent}{suffix}", "of all dialogues",
                            Axis("cooperation", "percent", high=1.0), rows, across="difficulty", names=tally.bins,
                            labels=[agent], joined=True))  # fmt: skip
    return [figure for figure in figures if figure]


def calibration_figure(tally: CalibrationTally, agents: list[str], suffix: str = "") -> Figure | None:
    """Mean calibrated reward by raw reward, with the middle 80% of turns; the dotted line is "unchanged"."""
    if tally.is_off():
        return None
    rows = [{"name": raw, "series": agent, "y": round(mean, 3), "low": low, "high": high, "n": turns}
            for agent in agents for raw, turns, mean, low, high in tally.by_reward(agent)]  # fmt: skip
    return dots(f"Calibrated by raw reward{suffix}", "mean, and the middle 80% of turns",
                Axis("calibrated reward", "plain"), rows, across="raw reward", names=[], labels=agents, joined=True,
                numeric=True, diagonal=True)  # fmt: skip


def calibration_note(tally: CalibrationTally) -> str:
    """How far the run's groups let calibration change anything."""
    groups = tally.groups.total()
    if not groups:
        return ""
    if tally.is_off():
        return "Calibration was off: every calibrated reward is the raw one."
    two, more = (f"{100 * tally.groups[key] / groups:.0f}%" for key in ("two", "more"))
    return (f"Of {groups:,} groups, {more} hold three or more different rewards. {two} hold two: there, calibration "
            "does not change standardized advantages. The others hold one: no gradient.")


def _share(name: str, series: str, right: int, n: int) -> dict[str, Any]:
    low, high = wilson(right, n) or (None, None)
    return {"name": name, "series": series, "y": right / n, "low": low, "high": high, "n": n}
