"""From data to axes: round ticks, padded domains, and numbers as people write them.

>>> nice_ticks(0, 0.83, 4)
[0.0, 0.2, 0.4, 0.6, 0.8]
>>> number(0.4237, "percent"), number(15300, "count"), number(2e-6, "plain")
('42.4%', '15.3k', '2e-06')
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log10
from typing import Literal

Unit = Literal["percent", "plain", "count", "seconds", "gib"]


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten inside [low, high], about so many."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** floor(log10(raw))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(log10(s / raw)))
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def whole_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round whole numbers, for steps."""
    ticks = [t for t in nice_ticks(low, high, about) if t == int(t)]
    return ticks or [float(ceil(low))]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high], thinned to at most six; their double and fivefold too where there are few."""
    powers = list(range(floor(log10(low)), floor(log10(high)) + 1))
    factors = (1, 2, 5) if len(powers) <= 2 else ((1, 3) if len(powers) == 3 else (1,))
    ticks = [float(f"{factor}e{p}") for p in powers[:: max(1, ceil(len(powers) / 6))] for factor in factors]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


def domain(values: Sequence[float], unit: Unit) -> tuple[float, float]:
    """Where a linear axis begins and ends: at 0 where the data is near it, shares inside 0 to 1, never of no width."""
    low, high = min(values), max(values)
    if unit == "percent":
        return 0.0, min(1.0, max(0.1, high * 1.08))
    if 0 <= low < 0.6 * high or unit in ("count", "seconds", "gib"):
        return min(0.0, low), (high * 1.06 if high > 0 else 1.0)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


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


def tick_label(value: float, unit: Unit) -> str:
    """A tick's label: no decimals where a percentage has none."""
    if unit == "percent":
        return f"{100 * value:g}%"
    return number(value, "plain" if unit in ("seconds", "gib") else unit)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 9 min 41 s, 1 h 20 min."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
