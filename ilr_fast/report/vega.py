"""Figures as Vega-Lite specifications with their data inside: curves with bands, stacked bars, dots with intervals.

Vega-Lite draws them in the page (bundle.py) and, through vl-convert, as PDF, SVG or PNG without a browser (figures.py).
Names are data in it, never part of an expression. Colours are ranks in the theme's palette (theme.py), kept the same
in all figures by `labels`, the full list of names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Any

from ilr_fast.report import theme
from ilr_fast.report.series import Series, placed, points_of, short
from ilr_fast.report.texts import Unit

Spec = dict[str, Any]
HEIGHT = 200
FORMATS: Mapping[Unit, str] = {"percent": ".1%", "plain": ".4~g", "count": ".3~s", "seconds": ".3~g", "gib": ".3~g"}
AXES: Mapping[Unit, Spec] = {"percent": {"format": ".0%"}, "count": {"format": "~s"}}
BARS = 60
COLOURS = len(theme.LIGHT)


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of the page. `columns` names the fields of its data for the CSV; `legend`: the names in its legend."""

    title: str
    note: str
    spec: Spec
    columns: Mapping[str, str]
    legend: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Axis:
    """The vertical axis: what it shows, and its ends where they are fixed, so that figures can be compared."""

    title: str
    unit: Unit
    high: float | None = None
    log: bool = False


def curves(title: str, note: str, axis: Axis, series: Sequence[Series], labels: Sequence[str]) -> Figure | None:
    """Curves over steps; None where no number exists."""
    found = [s for s in series if s.exists]
    if not found:
        return None
    places = placed([x for s in found for column in s.columns for x, _ in column], points_of(len(found)))
    rows = [{"series": s.label, "id": f"c{i}", **row} for i, s in enumerate(found) for row in s.rows(places)]
    x = {"field": "x", "type": "quantitative", "title": "step", "axis": _steps(rows), "scale": {"nice": False}}
    y = _value(axis, rows)
    shown = list(dict.fromkeys(s.label for s in found))
    colour = _colour(shown, labels)
    base = {"x": x, "color": colour, "detail": {"field": "id"}}
    layers: list[Spec] = []
    if any(row["low"] is not None for row in rows):
        opacity = 0.18 if len(found) <= 4 else 0.07  # many bands over one another hide the lines
        layers.append(_layer({"type": "area", "opacity": opacity}, base, y={**y, "field": "low"}, y2={"field": "high"}))
    if any(row["raw"] is not None and row["raw"] != row["y"] for row in rows):
        layers.append(_layer({"type": "line", "strokeWidth": 1, "opacity": 0.3}, base, y={**y, "field": "raw"}))
    dashed = _dashes(found, colour)
    layers.append(_layer({"type": "line", "strokeWidth": 2}, base, y=y, **dashed))
    values = Counter(row["id"] for row in rows if row["y"] is not None)
    if any(s.sparse for s in found) or min(values.values()) == 1:
        layers.append(_layer({"type": "point", "filled": True, "size": 36, "opacity": 1}, base, y=y))
    spec = _framed(rows, [*layers, _pointer(x, axis.unit, found)])
    columns = {"series": "series", "x": "step", "y": "value", "low": "low", "high": "high", "raw": "raw"}
    return Figure(title, note, spec, columns, shown)


def stacked(title: str, note: str, axis: Axis, series: Sequence[Series]) -> Figure | None:
    """Bars over steps, the series on top of one another; many steps are drawn as means of neighbours."""
    found = [s for s in series if any(y for column in s.columns for _, y in column)]
    if not found:
        return None
    steps = sorted({x for s in found for column in s.columns for x, _ in column})
    places = placed(steps, BARS)
    middles = sorted(set(places.values()))
    half = 0.46 * (steps[-1] - steps[0] + 1) / len(middles)
    rows, base = [], dict.fromkeys(middles, 0.0)
    for s in found:
        for x in middles:
            values = [y or 0.0 for column in s.columns for step, y in column if places[step] == x]
            height = sum(values) / len(values) if values else 0.0
            rows.append({"series": s.label, "x": x, "y": short(height), "left": x - half, "right": x + half,
                         "from": short(base[x]), "to": short(base[x] + height)})  # fmt: skip
            base[x] += height
    labels = [s.label for s in found]
    place = {"type": "quantitative", "title": "step", "scale": {"nice": False, "zero": False}, "axis": _steps(rows)}
    encoding = {
        "x": {"field": "left", **place},
        "x2": {"field": "right"},
        "y": {**_value(axis, [{"y": high} for high in base.values()]), "field": "from"},
        "y2": {"field": "to"},
        "color": _colour(labels, labels, "square"),
        "tooltip": [{"field": "x", "title": "step"}, {"field": "series", "title": "phase"},
                    {"field": "y", "title": axis.title, "format": FORMATS[axis.unit]}],
    }  # fmt: skip
    return Figure(title, note, _framed(rows, [{"mark": "rect", "encoding": encoding}]),
                  {"series": "phase", "x": "step", "y": axis.title}, labels)  # fmt: skip


def dots(
    title: str, note: str, axis: Axis, rows: Sequence[Mapping[str, Any]], *, across: str, names: Sequence[str],
    labels: Sequence[str], joined: bool = False, upright: bool = True, numeric: bool = False, diagonal: bool = False,
) -> Figure | None:  # fmt: skip
    """Dots with intervals: rows hold {name, series, y, low, high, n}; None without rows.

    `across`: the title of the axis of names, whose order is `names`. `joined`: a line joins a series' dots. Not
    `upright`: names stand below one another, values go to the right. `numeric`: names are numbers on a scale of their
    own. `diagonal`: a line where both are equal.
    """
    if not rows:
        return None
    several = len({row["series"] for row in rows}) > 1
    place: Spec = {"field": "name", "title": across or None, "type": "nominal", "sort": list(names),
                   "axis": {"labelAngle": 0, "grid": False, "labelLimit": 170,
                            **({} if upright else {"labelPadding": 10})}}  # a point at 0 stands on the axis, fmt: skip
    if numeric:
        place |= {"type": "quantitative", "sort": None, "scale": {"zero": False, "padding": 12}}
    value = _value(axis, rows)
    shown = list(dict.fromkeys(row["series"] for row in rows))
    base: Spec = {
        ("x" if upright else "y"): place,
        "color": _colour(shown, labels, "circle"),
        "tooltip": [{"field": "series", "title": "of"}, {"field": "name", "title": across or "method"},
                    {"field": "y", "title": axis.title, "format": FORMATS[axis.unit]},
                    {"field": "low", "title": "from", "format": FORMATS[axis.unit]},
                    {"field": "high", "title": "to", "format": FORMATS[axis.unit]}, {"field": "n"}],
    }  # fmt: skip
    if several and not numeric:
        base["xOffset" if upright else "yOffset"] = {"field": "series", "sort": shown}
    along, end = ("y", "y2") if upright else ("x", "x2")
    layers = [_layer({"type": "rule", "strokeWidth": 2, "opacity": 0.6}, base,
                     **{along: {**value, "field": "low"}, end: {"field": "high"}})]  # fmt: skip
    if joined:
        layers.append(_layer({"type": "line", "strokeWidth": 1.5, "opacity": 0.7}, base, **{along: value}))
    layers.append(_layer({"type": "point", "filled": True, "size": 55, "opacity": 1}, base, **{along: value}))
    if diagonal:
        values = [float(row["name"]) for row in rows]
        ends = [{"name": v, "y": v} for v in (min(values), max(values))]
        layers.append({"data": {"values": ends}, "mark": {"type": "line", "strokeDash": [3, 3], "opacity": 0.5},
                       "encoding": {"x": place, "y": value}})  # fmt: skip
    spec = _framed(list(rows), layers, height=HEIGHT if upright else {"step": 22 if several else 30})
    columns = {"series": "series", "name": across or "name", "y": "value", "low": "low", "high": "high", "n": "n"}
    return Figure(title, note, spec, columns, shown)


def _framed(rows: Sequence[Mapping[str, Any]], layers: Sequence[Spec], height: Any = HEIGHT) -> Spec:
    return {"width": "container", "height": height, "autosize": {"type": "fit-x", "contains": "padding"},
            "data": {"values": list(rows)}, "layer": list(layers)}  # fmt: skip


def _layer(mark: Spec, base: Spec, **encoding: Any) -> Spec:
    return {"mark": mark, "encoding": {**base, **encoding}}


def _dashes(series: Sequence[Series], colour: Spec) -> Spec:
    """Dashes for a second number of the same thing; else for names beyond the palette, whose colours come again."""
    if any(s.dashed for s in series):
        second = {"field": "id", "oneOf": [f"c{i}" for i, s in enumerate(series) if s.dashed]}
        return {"strokeDash": {"condition": {"test": second, "value": [5, 3]}, "value": [1, 0]}}
    domain = colour["scale"]["domain"]
    if len(domain) <= COLOURS:
        return {}
    dashes = [[1, 0] if i < COLOURS else [5, 3] for i in range(len(domain))]
    return {"strokeDash": {**colour, "scale": {"domain": domain, "range": dashes}}}


def _value(axis: Axis, rows: Sequence[Mapping[str, Any]]) -> Spec:
    """The encoding of values: from 0 where 0 is near, shares always; logarithmic where asked for and data is wide."""
    values = [v for row in rows for key in ("y", "low", "high", "raw") if (v := row.get(key)) is not None]
    low, high = min(values), max(values)
    ticks: Spec = {"tickCount": 5, **AXES.get(axis.unit, {})}
    scale: Spec = {"zero": 0 <= low < 0.6 * high or axis.unit in ("count", "seconds", "gib")}
    if axis.log and low > 0 and high > 10 * low:
        scale, ticks = {"type": "log"}, {"values": log_ticks(low, high), "format": ".0e"}
    elif axis.high is not None or axis.unit == "percent":
        scale = {"domain": [0, axis.high or min(1.0, max(0.1, high * 1.05))], "clamp": True}
    return {"field": "y", "type": "quantitative", "title": axis.title, "scale": scale, "axis": ticks}


def _steps(rows: Sequence[Mapping[str, Any]]) -> Spec:
    """The axis of steps, which are whole numbers: few are named one by one, as ticks could stand between them."""
    steps = sorted({row["x"] for row in rows})
    return {"grid": False, "tickMinStep": 1} | ({"values": steps} if len(steps) <= 6 else {})


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around [low, high]; their double and fivefold too where there are few.

    >>> log_ticks(2e-6, 5e-5)
    [2e-06, 5e-06, 1e-05, 2e-05, 5e-05]
    """
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    ticks = [float(f"{factor}e{power}") for power in powers for factor in factors]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001] or ticks


def _colour(shown: Sequence[str], labels: Sequence[str], symbol: str = "stroke") -> Spec:
    """The same colour for a name in every figure; a legend where there is a choice."""
    size = {"circle": 55, "square": 90}.get(symbol, 140)
    legend = {"values": list(shown), "title": None, "symbolType": symbol, "symbolSize": size, "symbolOpacity": 1}
    domain = list(dict.fromkeys([*labels, *shown]))
    legend_or_none = legend if len(shown) > 1 else None
    return {"field": "series", "type": "nominal", "scale": {"domain": domain}, "legend": legend_or_none}


def _pointer(x: Spec, unit: Unit, series: Sequence[Series]) -> Spec:
    """A line at the step under the pointer, which tells the values of all curves there."""
    several = [{"field": f"c{i}", "title": s.label, "format": FORMATS[unit]} for i, s in enumerate(series)]
    shown = {"condition": {"param": "at", "empty": False, "value": 0.45}, "value": 0}
    return {
        "transform": [{"pivot": "id", "value": "y", "groupby": ["x"]}],
        "params": [{"name": "at", "select": {"type": "point", "fields": ["x"], "nearest": True, "on": "pointerover",
                                             "clear": "pointerout"}}],
        "mark": {"type": "rule"},
        "encoding": {"x": x, "opacity": shown, "tooltip": [{"field": "x", "title": "step"}, *several]},
    }  # fmt: skip
