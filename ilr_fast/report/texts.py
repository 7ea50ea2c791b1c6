"""Numbers as people write them, in the page and in the terminal.

>>> number(0.4237, "percent"), number(15300, "count"), number(2e-6, "plain"), number(None)
('42.4%', '15.3k', '2e-06', '–')
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ilr_fast.statistics import Interval, PairedDifference

Unit = Literal["percent", "plain", "count", "seconds", "gib"]


def number(value: float | None, unit: Unit = "plain") -> str:
    """A number for a label or a table; an en dash for one that does not exist."""
    if value is None or value != value:
        return "–"
    if unit == "percent":
        return f"{100 * value:.1f}%"
    if unit == "count" and abs(value) >= 1000:
        scaled, suffix = (value / 1e6, "M") if abs(value) >= 1e6 else (value / 1e3, "k")
        return f"{scaled:.3g}{suffix}"
    if unit == "seconds" and value >= 100:
        return duration(value)
    return f"{value:.3g}" + {"seconds": " s", "gib": " GiB"}.get(unit, "")


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 9 min 41 s, 1 h 20 min."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−")


def signed(value: float | None) -> str:
    """A plain number with its sign, two decimals."""
    return "–" if value is None else f"{value:+.2f}".replace("-", "−")


def interval_text(interval: Interval | None) -> str:
    """A 95% interval in percent."""
    return "–" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def difference_text(difference: PairedDifference | None) -> str:
    """A difference in percentage points with its interval; "none" where the interval holds 0."""
    if difference is None:
        return "–"
    low, high = difference.ci95
    what = "none" if difference.verdict == "none" else points(difference.difference)
    return f"{what} ({points(low)} to {points(high)})"


def difference_class(difference: PairedDifference | None) -> str:
    """`better`, `worse` or `none`; empty for a difference that does not exist."""
    return "" if difference is None else difference.verdict


def questions_text(questions: int, samples: int, seeds: int) -> str:
    """How many questions, answers to each, and seeds.

    >>> questions_text(300, 1, 1), questions_text(300, 4, 3)
    ('300', '300 × 4, 3 seeds')
    """
    answers = f" × {samples}" if samples > 1 else ""
    return f"{questions}{answers}" + (f", {seeds} seeds" if seeds > 1 else "")


def listed(names: Sequence[str]) -> str:
    """A few names as text, many by their number.

    >>> listed(["a", "b"]), listed(list("abcdef"))
    ('a, b', 'a, b, c, and 3 more')
    """
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])}, and {len(names) - 3} more"
