"""Draws time and memory of the LM head over V, N and D beside the limit, from the JSON of `lm_head_sweep`.

    ilr-fast bench figures            # docs/figures/lm_head_time.png, lm_head_memory.png; needs matplotlib, no GPU

Three panels share their unit and scale; the fourth place says what the lines are and what they were measured with. The
colours are told apart with any colour vision, and every line has its name at its end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from math import log10
from pathlib import Path
from typing import Any

from ilr_benchmarks.common import HERE, RESULTS, short
from ilr_benchmarks.lm_head_sweep import AXES, FORWARD, LEAN, LIMIT, ONE, OURS, PLAIN

from ilr_fast.errors import UserError

NAME = "lm_head_sweep"
FOLDER = HERE.parent / "docs" / "figures" if (HERE.parent / "pyproject.toml").exists() else Path("docs/figures")
BLUE, SKY, GREY, RED, GREEN, PINK = "#0072B2", "#56B4E9", "#555555", "#D55E00", "#009E73", "#CC79A7"
WORDS = {"V": "vocabulary V", "N": "rows N", "D": "hidden size D"}
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy")
LEAST_GIB = 1e-3  # what takes less is drawn here


@dataclass(frozen=True)
class Line:
    """A variant of the JSON, the name at its end, and how it is drawn; `peer`: at single sizes, named on the left."""

    variant: str
    name: str
    colour: str
    style: str = "-"
    marker: str = ""
    peer: bool = False


PEERS = (
    Line("Liger", "Liger", RED, ":", "^", peer=True),
    Line("cut-cross-entropy", "CCE", GREEN, ":", "s", peer=True),
    Line(PLAIN, "PyTorch", PINK, ":", "D", peer=True),
)
TIME = (
    Line(LIMIT, "limit", GREY, "--"),
    Line(ONE, "limit, fwd", GREY, "--"),
    Line(OURS, "ours", BLUE, "-", "o"),
    Line(FORWARD, "ours, fwd", SKY, "-", "o"),
    *PEERS,
)
MEMORY = (
    Line(LIMIT, "logits", GREY, "--"),
    Line(OURS, "ours", BLUE, "-", "o"),
    Line(LEAN, "chunked", BLUE, "-", "v"),
    Line(FORWARD, "ours, fwd", SKY, "-", "o"),
    *PEERS,
)
TIME_NOTE = """ours: loss and both gradients
ours, fwd: log-probs and entropies
limit: the same three (fwd: one)
matrix products alone, by cuBLAS
CCE: cut-cross-entropy"""
MEMORY_NOTE = """peak beyond inputs and gradients
ours: loss and both gradients
chunked: the same, 2,048 rows at once
ours, fwd: log-probs and entropies
logits: all of them once, in bfloat16"""


def require_matplotlib() -> None:
    """Raises UserError before anything is measured that could not be drawn."""
    if find_spec("matplotlib") is None:
        remedy = "pip install 'ilr-fast[bench]' (a checkout: pip install -e '.[bench]'), or measure with --no-figures"
        raise UserError("the figures need matplotlib, which is not installed", "bench", remedy)


def draw_results(out: Path | None, quick: bool) -> list[Path]:
    """Draws from the JSON in `out` (default: benchmarks/results) into `out` (default: docs/figures); returns the files.

    Figures of a quick run stay beside its JSON. Raises UserError where there is none to draw."""
    suffix = "_quick" if quick else ""
    path = (out or RESULTS) / f"{NAME}{suffix}.json"
    try:
        result = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError("there are no results to draw", str(path), f"ilr-fast bench {NAME} measures them") from None
    except ValueError as problem:
        raise UserError(f"no JSON: {problem}", str(path), f"ilr-fast bench {NAME} writes it again") from None
    return draw(result, out or (RESULTS if quick else FOLDER), suffix)


def draw(result: Mapping[str, Any], folder: Path, suffix: str = "") -> list[Path]:
    """lm_head_time.png and lm_head_memory.png in `folder`, from the object that the JSON holds."""
    require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"lm_head_{kind}{suffix}.png" for kind in ("time", "memory")]
    _figure(result, TIME, "ms", "time, ms", TIME_NOTE, files[0])
    _figure(result, MEMORY, "extra_gib", "extra memory, GiB", MEMORY_NOTE, files[1])
    return files


def points(rows: Sequence[Mapping[str, Any]], axis: str, variant: str, field: str) -> list[tuple[int, float]]:
    """(size, value) of a variant over an axis, by size; a variant that was wrong or did not fit is not there."""
    on_axis = [row for row in rows if axis in row.get("axes", ()) and row["variant"] == variant]
    return sorted((row[axis], row[field]) for row in on_axis if row["ms"] is not None and row[field] is not None)


def apart(values: Sequence[float], least: float) -> list[float]:
    """The values moved as little as pushing allows until neighbours are `least` apart; the order stays."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    placed = [values[i] for i in order]
    for _ in range(200):
        for i in range(len(placed) - 1):
            short = least - (placed[i + 1] - placed[i])
            if short > 1e-9:
                placed[i], placed[i + 1] = placed[i] - short / 2, placed[i + 1] + short / 2
    return [place for _, place in sorted(zip(order, placed, strict=True))]


def _figure(
    result: Mapping[str, Any], lines: Sequence[Line], field: str, unit: str, note: str, file: Path
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8.2), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, gridspec_kw={"wspace": 0.5, "hspace": 0.32})
    figure.subplots_adjust(left=0.09, right=0.88, top=0.95, bottom=0.08)
    values = [y for line in lines for axis in AXES for _, y in points(result["rows"], axis, line.variant, field)]
    low = max(min(values), LEAST_GIB) if values else 1
    for panel, axis in zip(panels.flat, AXES, strict=False):
        panel.set_yscale("log")
        panel.set_ylim(low / 1.5, max([low, *values]) * 2)
        _panel(panel, result["rows"], axis, lines, field)
    for panel in panels[:, 0]:
        panel.set_ylabel(unit, fontsize=14)
    _notes(panels[1, 1], result, note)
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    """As 64 colours: a third of the size."""
    from PIL import Image

    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)


def _panel(panel: Any, rows: Sequence[Mapping[str, Any]], axis: str, lines: Sequence[Line], field: str) -> None:
    ends: dict[bool, list[tuple[Line, int, float]]] = {False: [], True: []}
    sizes = sorted({row[axis] for row in rows if axis in row.get("axes", ())})
    for line in lines:
        found = [(x, max(y, LEAST_GIB)) for x, y in points(rows, axis, line.variant, field)]
        if found:
            look = {"color": line.colour, "linestyle": line.style, "marker": line.marker or None}
            panel.plot(*zip(*found, strict=True), **look, linewidth=2.2, markersize=7, clip_on=False)
            ends[line.peer].append((line, *found[0 if line.peer else -1]))
    held = {name: next(row[name] for row in rows if axis in row.get("axes", ())) for name in "NDV" if name != axis}
    panel.set_title(", ".join(f"{name} = {size:,}" for name, size in held.items()), fontsize=13)
    panel.set_xlabel(WORDS[axis], fontsize=14)
    panel.set_xscale("log")
    panel.set_xticks(ticks := _ticks(sizes), [_short(size) for size in ticks])
    panel.yaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    panel.set_xlim(sizes[0] / (sizes[-1] / sizes[0]) ** 0.45, sizes[-1] * 1.08)
    _label(panel, ends[False], right=True)
    _label(panel, ends[True], right=False)
    panel.tick_params(labelsize=12)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _label(panel: Any, ends: Sequence[tuple[Line, int, float]], right: bool) -> None:
    """Names at the ends of lines, pushed apart where they would lie on one another."""
    from matplotlib.patheffects import withStroke

    low, high = (log10(bound) for bound in panel.get_ylim())
    left, end = (log10(bound) for bound in panel.get_xlim())
    gap = 10 ** ((end - left) * 0.035)
    places = apart([log10(y) for _, _, y in ends], (high - low) * 0.066)
    for (line, x, y), place in zip(ends, places, strict=True):
        panel.annotate(
            line.name, (x, y), (x * gap if right else x / gap, 10**place), color=line.colour, fontsize=13,
            ha="left" if right else "right", va="center", annotation_clip=False,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip


def _notes(panel: Any, result: Mapping[str, Any], note: str) -> None:
    versions = result["versions"]
    named = [f"{name} {versions[name]}" for name in PACKAGES if name in versions]
    dtype = next((row["shape"].split()[-1] for row in result["rows"]), "")
    made = f"{dtype}, commit {short(result['commit'])}, {result['date'][:10]}"
    text = "\n".join([note, "", result["device"], f"driver {result['driver'] or 'none'}", *named, made])
    panel.axis("off")
    panel.text(-0.12, 1.0, text, fontsize=12, va="top", linespacing=1.3, transform=panel.transAxes)


def _ticks(sizes: Sequence[int]) -> list[int]:
    """The sizes, from the largest down, without those too near to the last one taken to be read."""
    taken = [sizes[-1]]
    for size in reversed(sizes[:-1]):
        if taken[-1] / size >= (sizes[-1] / sizes[0]) ** 0.15:
            taken.append(size)
    return taken


def _short(size: int) -> str:
    return f"{size / 1000:.0f}k" if size >= 1000 else str(size)
