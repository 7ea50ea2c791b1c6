"""Curves that were made in several places as one file of rows, and their means over seeds as a table.

    python -m ilr_benchmarks.curve_summary FOLDER… --out DIR        # joins their curve.json and curve_plain.json
    python -m ilr_benchmarks.curve_summary benchmarks/results --against "plain, bfloat16"

The table: share of right samples while training in parts of a run, mean over seeds with its 95% interval (Student's t);
with `--against` differences to that variant, seed by seed. A seed whose run was cut off counts where it came to.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ilr_benchmarks.curve_rule import compared

from ilr_fast.statistics import mean_interval

PARTS = ((0, 10), (10, 30), (30, 50), (50, 70), (70, 120), (0, 70), (0, 120))  # steps
ENDS = (70, 120)
NAMES = ("curve", "curve_plain")
Row = dict[str, Any]
Measure = Callable[[Mapping[str, Any]], float | None]


def join(folders: Sequence[Path], name: str) -> Row | None:
    """One result of the folders' files; of a variant's seed the last row stays, rows that compare are made anew."""
    files = [file for folder in folders for file in sorted(folder.rglob(f"{name}.json"))]
    results = [json.loads(file.read_text()) for file in files]
    if not results:
        return None
    rows = {(title(row), row["seed"]): row for result in results for row in result["rows"] if row.get("curve")}
    ordered = sorted(rows.values(), key=lambda row: (title(row), row["seed"]))
    plain = [row for row in ordered if not row.get("keys")]
    return {**results[-1], "rows": [*map(_rounded, ordered), *(compared(plain) if name == "curve" else ())]}


def title(row: Mapping[str, Any]) -> str:
    """The variant, with what it was run with beside the benchmark's own settings."""
    more = row.get("keys") or ([row["aggregation"]] if row.get("aggregation", "dapo") != "dapo" else [])
    return ", ".join([row["variant"], *more])


def share(row: Mapping[str, Any], part: tuple[int, int]) -> float | None:
    """Per cent of right samples in some steps; None where the run did not come to their end."""
    logged = len(row["sampled"])
    each = max(1, round(row["curve"][-1][0] / logged)) if row["variant"] == "TRL" and logged else 1
    first, last = (step // each for step in part)
    return 100 * statistics.mean(row["sampled"][first:last]) if logged >= last else None


def held_out(row: Mapping[str, Any], steps: int) -> float | None:
    """Per cent of right held-out answers, the mean of the evaluations at every tenth of so many steps."""
    points = {point[0]: point[-1] for point in row["curve"]}
    wanted = range(10, steps + 1, 10)
    return 100 * statistics.mean(points[step] for step in wanted) if all(step in points for step in wanted) else None


def table(rows: Sequence[Mapping[str, Any]], against: str | None = None) -> Iterator[str]:
    """Lines of Markdown: a variant each, its seeds' means, or how they differ from those of the variant `against`."""
    by_title: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("sampled"):
            by_title.setdefault(title(row), {})[row["seed"]] = row
    heads = [*(f"steps {a + 1} to {b}" for a, b in PARTS), *(f"held out, to {steps}" for steps in ENDS)]
    yield f"| | seeds | {' | '.join(heads)} |"
    yield "| :--- | ---: |" + " ---: |" * len(heads)
    measures = [*(_share_of(part) for part in PARTS), *(_held_out_to(steps) for steps in ENDS)]
    base = by_title.get(against or "", {})
    for name, seeds in by_title.items():
        cells = []
        for measure in measures:
            values = [(measure(row), measure(base[seed]) if against else 0.0)
                      for seed, row in seeds.items() if not against or seed in base]  # fmt: skip
            cells.append(_cell([a - b for a, b in values if a is not None and b is not None], signed=bool(against)))
        if name != against:
            yield f"| {name} | {len(seeds)} | " + " | ".join(cells) + " |"


def _share_of(part: tuple[int, int]) -> Measure:
    return lambda row: share(row, part)


def _held_out_to(steps: int) -> Measure:
    return lambda row: held_out(row, steps)


def _cell(values: Sequence[float], *, signed: bool) -> str:
    if len(values) < 3:
        return "–"
    low, high = mean_interval(values)
    form = "+.1f" if signed else ".1f"
    return f"{statistics.mean(values):{form}} ({low:{form}} to {high:{form}}), {len(values)}"


def _rounded(row: Row) -> Row:
    """Shares and lengths with the digits that they have."""
    return {**row, **{key: [round(x, 4) for x in row[key]] for key in ("sampled", "tokens") if key in row},
            "curve": [[*point[:-1], round(point[-1], 4)] for point in row["curve"]]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Learning curves of several places: one file, one table")
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--against", help="a variant, as the table calls it")
    parser.add_argument("--out", type=Path, help="folder for the joined files")
    options = parser.parse_args()
    rows = []
    for name in NAMES:
        if (found := join(options.folders, name)) is None:
            continue
        rows += found["rows"]
        if options.out:
            (options.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(table(rows, options.against)))


if __name__ == "__main__":
    main()
