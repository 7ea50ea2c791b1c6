"""The figure of an ablation: learning curves, and the final accuracies with their intervals, for each agent.

    draw(json.loads(Path("runs/largest-ablation/ablation.json").read_text()), Path("ablation.png"))

Left: accuracy of the agent's own first answers in training (what it samples alone, at the training temperature), mean
over seeds, with a band from the lowest to the highest seed. Right: held-out accuracy, greedy and alone, with the 95%
interval over questions and seeds, cut at 0 and 100; the dashed line is the base model, and says so. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Told apart with any colour vision (Okabe and Ito); cooperation ratios share one hue.
COLOURS = {
    "base": "#555555", "grpo": "#000000", "grpo_peer": "#56B4E9", "grpo_third": "#999999", "ilr": "#0072B2",
    "ilr_di": "#D55E00", "ilr_pc": "#009E73", "ilr_neither": "#CC79A7",
}  # fmt: skip
OTHER = "#E69F00"
FIRST = ("accuracy.single", "accuracy.sharing")  # an agent's own first answer, alone or in a dialogue
CURVES = ("grpo", "grpo_third", "grpo_peer", "ilr_pc", "ilr_di", "ilr")


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(found: Mapping[str, Any], path: Path, benchmark: str = "test") -> Path:
    """Writes the figure (PNG or SVG by the path's ending) of what `ablation.json` holds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in found["rows"] if row["benchmark"] == benchmark and row["mode"] == "single"]
    agents = list(dict.fromkeys(row["agent"] for row in rows))
    figure = Figure(figsize=(9.5, 3.4 * max(1, len(agents))), layout="constrained", dpi=140)
    FigureCanvasAgg(figure)
    axes = figure.subplots(max(1, len(agents)), 2, squeeze=False)
    for (left, right), agent in zip(axes, agents, strict=True):
        _draw_curves(left, [curve for curve in found["curves"] if curve["agent"] == agent], agent)
        _draw_results(right, [row for row in rows if row["agent"] == agent], agent)
    figure.savefig(path)
    return path


def curves(runs: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[list[float]]]:
    """Steps that all runs have, and each run's accuracy of first answers there."""
    lines = []
    for run in runs:
        values: list[float | None] = next((run[key] for key in FIRST if run.get(key)), [])
        lines.append({step: v for step, v in zip(run["steps"], values, strict=False) if v is not None})
    steps = sorted(set.intersection(*map(set, lines))) if lines else []
    return steps, [[line[step] for step in steps] for line in lines]


def _draw_curves(axis: Any, found: Sequence[Mapping[str, Any]], agent: str) -> None:
    for method in CURVES:
        steps, lines = curves([run for run in found if run["method"] == method])
        if not steps:
            continue
        means = [100 * sum(values) / len(values) for values in zip(*lines, strict=True)]
        axis.plot(steps, means, color=COLOURS[method], label=method, marker="o", markersize=3)
        if len(lines) > 1:
            lows, highs = ([100 * f(values) for values in zip(*lines, strict=True)] for f in (min, max))
            axis.fill_between(steps, lows, highs, color=COLOURS[method], alpha=0.12, linewidth=0)
    axis.set(title=f"{agent}: first answers in training", xlabel="step", ylabel="right, %")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    if axis.lines:
        axis.legend(frameon=False, fontsize=8)


def _draw_results(axis: Any, rows: Sequence[Mapping[str, Any]], agent: str) -> None:
    shown = [row for row in rows if row["method"] != "base"][::-1]
    for place, row in enumerate(shown):
        colour, value = COLOURS.get(row["method"], OTHER), 100 * row["accuracy"]
        low, high = (min(100.0, max(0.0, 100 * end)) for end in row["ci95"] or (row["accuracy"],) * 2)
        axis.errorbar(value, place, xerr=[[max(0, value - low)], [max(0, high - value)]], color=colour, marker="o",
                      capsize=3)  # fmt: skip
        axis.plot([100 * v for v in row["accuracy_by_seed"].values()], [place + 0.18] * len(row["accuracy_by_seed"]),
                  ".", color=colour, alpha=0.5)  # fmt: skip
    axis.set_yticks(range(len(shown)), [row["method"] for row in shown])
    axis.set_ylim(-0.6, len(shown) - 0.3)
    for row in rows:
        if row["method"] == "base":
            _draw_base(axis, 100 * row["accuracy"])
    axis.set(title=f"{agent}: held out, alone", xlabel="right, %, with 95% interval")
    axis.grid(alpha=0.25, axis="x")


def _draw_base(axis: Any, value: float) -> None:
    """The base model's line with its name at the top, on the side where there is room."""
    axis.axvline(value, color=COLOURS["base"], linestyle="--", linewidth=1)
    on_the_left = value > sum(axis.get_xlim()) / 2
    axis.annotate("base", (value, 1), xycoords=("data", "axes fraction"), xytext=(-3 if on_the_left else 3, -3),
                  textcoords="offset points", ha="right" if on_the_left else "left", va="top", fontsize=8,
                  color=COLOURS["base"])  # fmt: skip
