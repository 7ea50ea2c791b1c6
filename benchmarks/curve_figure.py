"""Draws `curve.json`: held-out accuracy over steps and seconds of training, ours and TRL's, seeds and means.

Seconds are drawn of runs that had the card alone, steps of all that came to their end; means are those of the seeds
that both sides have.

    ilr-fast bench figures            # docs/results/sums_gpu.png too, where there is a curve.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ilr_benchmarks.common import RESULTS, short
from ilr_benchmarks.curve_rule import GOAL, OURS, THEIRS, first_at, mean_curve
from ilr_benchmarks.figures import BLUE, FOLDER, GREY, RED, require_matplotlib

NAME = "curve"
COLOURS = {OURS: BLUE, THEIRS: RED}


def draw_curves(out: Path | None, quick: bool) -> list[Path]:
    """Draws from the JSON in `out` (default: benchmarks/results) into `out` (default: docs/results); the files."""
    suffix = "_quick" if quick else ""
    path = (out or RESULTS) / f"{NAME}{suffix}.json"
    if not path.exists():
        return []
    require_matplotlib()
    file = (out or RESULTS) / f"{NAME}{suffix}.png" if out or quick else FOLDER.parent / "results" / "sums_gpu.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    return [_draw(json.loads(path.read_text()), file)]


def _whole(rows: Sequence[Mapping[str, Any]], side: str) -> list[Mapping[str, Any]]:
    """The runs of a side that came to their end."""
    ran = [row for row in rows if row["variant"] == side and row.get("curve") and not row.get("keys")]
    last = max((row["curve"][-1][0] for row in ran), default=0)
    return [row for row in ran if row["curve"][-1][0] == last]


def _draw(result: Mapping[str, Any], file: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.3), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.08, right=0.97, top=0.84, bottom=0.19, wspace=0.08)
    whole = {side: _whole(result["rows"], side) for side in COLOURS}
    for side, colour in COLOURS.items():
        for panel, at in zip(panels, (0, 2), strict=True):
            drawn = {name: {row["seed"]: row["curve"] for row in rows if at == 0 or not row.get("beside_others")}
                     for name, rows in whole.items()}  # fmt: skip
            both = set.intersection(*map(set, drawn.values())) or set(drawn[side])
            curves = [drawn[side][seed] for seed in sorted(both)]
            mean = mean_curve(curves)
            for curve in drawn[side].values():
                panel.plot([p[at] for p in curve], [100 * p[3] for p in curve], color=colour, alpha=0.3, linewidth=0.8)
            if mean:
                panel.plot([p[at] for p in mean], [100 * p[3] for p in mean], color=colour, linewidth=2,
                           label=f"{side}, mean of {len(curves)} seeds")  # fmt: skip
            if mean and (point := first_at(mean, GOAL)):
                panel.plot(point[at], 100 * point[3], "o", color=colour, markersize=6)
    for panel, words in zip(panels, ("over steps of 256 samples", "over seconds of training"), strict=True):
        panel.axhline(100 * GOAL, color=GREY, linewidth=0.8, linestyle=":")
        panel.set_title(words, fontsize=10, loc="left")
        panel.set_xlabel(words.removeprefix("over "))
        panel.set_xlim(left=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#eeeeee")
    panels[0].set_ylabel("held-out sums right, %")
    panels[0].text(0.99, 100 * GOAL - 1.8, f"goal, {GOAL:.0%}", color=GREY, fontsize=7, ha="right",
                   transform=panels[0].get_yaxis_transform())  # fmt: skip
    figure.suptitle("SmolLM2-135M learns sums of 1 to 50 by GRPO, one GPU; thin: seeds, dots: the mean is at the goal",
                    x=0.08, ha="left", fontsize=11)  # fmt: skip
    for panel in panels:
        panel.legend(loc="lower right", frameon=False)
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("trl", "vllm", "torch")
                         if result["versions"].get(name))  # fmt: skip
    told = f"{result['device']}, {versions}, commit {short(result['commit'])}, {str(result['date'])[:10]}"
    figure.text(0.08, 0.02, told, fontsize=7, color=GREY)
    figure.savefig(file)
    return file
