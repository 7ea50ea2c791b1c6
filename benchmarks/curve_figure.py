"""Draws `curve.json`: held-out accuracy over steps and seconds of training, ours and TRL's, seeds and means.

Seconds are drawn of runs that had the card alone, steps of all that came to their end.

    ilr-fast bench figures            # docs/figures/curve.png too, where there is a curve.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ilr_benchmarks.common import RESULTS, short
from ilr_benchmarks.curve import GOAL, OURS, THEIRS
from ilr_benchmarks.figures import BLUE, FOLDER, GREY, RED, require_matplotlib

NAME = "curve"
COLOURS = {OURS: BLUE, THEIRS: RED}


def draw_curves(out: Path | None, quick: bool) -> list[Path]:
    """Draws from the JSON in `out` (default: benchmarks/results) into `out` (default: docs/figures); the files."""
    suffix = "_quick" if quick else ""
    path = (out or RESULTS) / f"{NAME}{suffix}.json"
    if not path.exists():
        return []
    require_matplotlib()
    folder = out or (RESULTS if quick else FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    return [_draw(json.loads(path.read_text()), folder / f"{NAME}{suffix}.png")]


def mean_curve(curves: Sequence[Sequence[Sequence[float]]]) -> list[tuple[float, float, float]]:
    """(step, seconds, accuracy), means over the curves, at the steps that all of them have."""
    steps = sorted(set.intersection(*({p[0] for p in curve} for curve in curves))) if curves else []
    found = []
    for step in steps:
        points = [next(p for p in curve if p[0] == step) for curve in curves]
        found.append((step, *(sum(p[i] for p in points) / len(points) for i in (2, 3))))
    return found


def _draw(result: Mapping[str, Any], file: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.9), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.08, right=0.97, top=0.9, bottom=0.2, wspace=0.08)
    for side, colour in COLOURS.items():
        rows = [row for row in result["rows"] if row["variant"] == side and row.get("curve") and not row.get("keys")]
        last = max((row["curve"][-1][0] for row in rows), default=0)
        rows = [row for row in rows if row["curve"][-1][0] == last]
        for panel, at in zip(panels, (0, 2), strict=True):
            curves = [row["curve"] for row in rows if at == 0 or not row.get("beside_others")]
            mean = mean_curve(curves)
            for curve in curves:
                panel.plot([p[at] for p in curve], [100 * p[3] for p in curve], color=colour, alpha=0.25, linewidth=0.8)
            if mean:
                panel.plot([m[at // 2] for m in mean], [100 * m[2] for m in mean], color=colour, linewidth=2,
                           label=f"{side}, {len(curves)} seeds")  # fmt: skip
    for panel, words in zip(panels, ("steps of 256 samples", "seconds of training"), strict=True):
        panel.axhline(100 * GOAL, color=GREY, linewidth=0.8, linestyle=":")
        panel.set_xlabel(words)
        panel.set_xlim(left=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#eeeeee")
    panels[0].set_ylabel("held-out sums right, %")
    for panel in panels:
        panel.legend(loc="lower right", frameon=False)
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("trl", "vllm", "torch")
                         if result["versions"].get(name))  # fmt: skip
    told = f"{result['device']}, {versions}, commit {short(result['commit'])}, {str(result['date'])[:10]}"
    figure.text(0.08, 0.02, told, fontsize=7, color=GREY)
    figure.savefig(file)
    return file
