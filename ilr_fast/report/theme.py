"""The look of figures in a light and a dark page, as Vega-Lite config.

The colours are Okabe and Ito's (2008, Color Universal Design), which people with any colour vision tell apart; the
yellow, too pale for lines on white, is replaced by grey, and the dark page has lighter ones of the same hues.
"""

from __future__ import annotations

from typing import Any

LIGHT = ("#0072b2", "#d55e00", "#009e73", "#a8528a", "#b8860b", "#3a9fd6", "#6b6b63", "#7a4a1e")
DARK = ("#58a6e6", "#f0884a", "#2fbf93", "#d78bbd", "#e0b040", "#8fd0f5", "#b3b3a8", "#c49a6c")
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif'


def config(dark: bool = False) -> dict[str, Any]:
    """Vega-Lite's `config` for one of the two pages."""
    text, soft, line, card = ("#f0f0ea", "#b5b4aa", "#33332f", "#1a1a18") if dark else (
        "#14140f", "#5c5b54", "#e6e5de", "#ffffff")  # fmt: skip
    return {
        "background": card,
        "font": FONT,
        "padding": {"left": 2, "right": 8, "top": 4, "bottom": 2},
        "view": {"stroke": None},
        "range": {"category": list(DARK if dark else LIGHT)},
        "axis": {
            "labelColor": soft, "titleColor": soft, "gridColor": line, "domainColor": line, "tickColor": line,
            "labelFontSize": 11, "titleFontSize": 11.5, "titleFontWeight": "normal", "titlePadding": 8,
            "labelPadding": 4, "tickSize": 4, "labelOverlap": True, "labelFlush": False,
        },
        "axisY": {"domain": False, "ticks": False},
        "legend": {
            "orient": "top", "labelColor": text, "labelFontSize": 11.5, "symbolStrokeWidth": 3,
            "labelLimit": 210, "columnPadding": 14, "rowPadding": 2, "offset": 6, "title": None,
        },
        "rule": {"color": soft},
        "line": {"strokeCap": "round", "strokeJoin": "round", "color": soft},
    }  # fmt: skip
