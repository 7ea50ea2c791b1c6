"""`ilr-fast report RUN --figures DIR`: every figure of the page as PDF and CSV for a paper, without a browser."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ilr_fast.errors import UserError
from ilr_fast.report import theme
from ilr_fast.report.vega import Figure

WIDTH = 340  # points: a column and a half of a two-column paper, half a page of a wide one


def export(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Writes NAME.pdf and NAME.csv for each figure, NAME from its title; returns the PDFs' paths.

    Raises UserError where vl-convert-python is not installed.
    """
    try:
        import vl_convert
    except ImportError:
        raise UserError("figures are drawn by a package that is not installed", "--figures",
                        "pip install vl-convert-python") from None
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for figure, name in zip(figures, names(figures), strict=True):
        path = folder / f"{name}.pdf"
        path.write_bytes(vl_convert.vegalite_to_pdf({**figure.spec, "width": WIDTH, "config": _config(figure)}))
        _write_csv(figure, path.with_suffix(".csv"))
        paths.append(path)
    return paths


def names(figures: Sequence[Figure]) -> list[str]:
    """Each figure's title as a file's name; with its note, then a number, where others have the same title."""
    titles = Counter(figure.title for figure in figures)
    found: list[str] = []
    for figure in figures:
        text = figure.title if titles[figure.title] == 1 else f"{figure.title} {figure.note.partition(',')[0]}"
        name = re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:80] or "figure"
        number = 2
        while (unique := name if number == 2 and name not in found else f"{name}-{number}") in found:
            number += 1
        found.append(unique)
    return found


def _config(figure: Figure) -> dict:
    config = theme.config()
    longest = max((min(len(name), 30) for name in figure.legend), default=1)
    columns = max(1, int((WIDTH - 50) / (6.6 * longest + 38)))
    return {**config, "background": None, "legend": {**config["legend"], "columns": columns}}


def _write_csv(figure: Figure, path: Path) -> None:
    """The columns that hold anything, as the page's CSV has them."""
    rows = figure.spec["data"]["values"]
    keys = [key for key in figure.columns if any(row.get(key) is not None for row in rows)]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(figure.columns[key] for key in keys)
        writer.writerows([row.get(key) for key in keys] for row in rows)
