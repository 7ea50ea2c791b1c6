"""Content → report.html: one Jinja template that escapes every text, the figures and dialogues packed beside it.

Only our own style sheet and scripts are markup; a model's text never is. The page's policy (Content-Security-Policy)
lets these scripts run and no other, and lets nothing be loaded.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from hashlib import sha256
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from ilr_fast import __version__
from ilr_fast.report import theme
from ilr_fast.report.arms import Arm, titles
from ilr_fast.report.bundle import MISSING, library, packed
from ilr_fast.report.content import Content
from ilr_fast.report.curves import learning_figures, machine_figures, training_figures
from ilr_fast.report.overview import Table, benchmark_tables, mode_tables
from ilr_fast.report.result_figures import accuracy_figures, ratio_figures
from ilr_fast.report.series import FEW, FEWEST, SMOOTH_FROM
from ilr_fast.report.status import status
from ilr_fast.report.tables import differing_table, failures, result_table, setup
from ilr_fast.report.talk import calibration_part, dialogue_part, interaction_part, spoken
from ilr_fast.report.tiles import tiles
from ilr_fast.report.vega import Figure

SECTIONS = {
    "results": "results", "learning": "learning", "training": "training", "machine": "mismatch and time",
    "interaction": "cooperation", "calibration": "calibration", "dialogues": "dialogues", "failures": "failures",
    "setup": "setup",
}  # fmt: skip
SCRIPTS = ("figures.js", "dialogues.js")


class Numbered:
    """The page's figures in order; the template places them by number, or none where nothing can draw them."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []

    def __call__(self, figures: Iterable[Figure]) -> list[dict[str, Any]]:
        """What the template needs of figures, which are added."""
        placed = []
        for figure in figures:
            placed.append({"number": len(self.figures), "title": figure.title, "note": figure.note})
            self.figures.append(figure)
        return placed if library() else []

    def packed(self) -> str:
        """All figures with the themes, for the page's script."""
        figures = [{"title": f.title, "spec": f.spec, "columns": f.columns, "legend": f.legend} for f in self.figures]
        return packed({"figures": figures, "config": {"light": theme.config(), "dark": theme.config(dark=True)}})


def render_page(content: Content) -> tuple[str, list[Figure]]:
    """The whole page as text, and its figures."""
    numbered, runs, arms = Numbered(), content.runs, content.arms
    parts: dict[str, Any] = {
        "results": _results(content, numbered),
        "learning": numbered(learning_figures(arms)),
        "training": numbered(training_figures(arms)),
        "machine": numbered(machine_figures(arms)),
        "interaction": interaction_part(content, numbered),
        "calibration": calibration_part(content, numbered),
        "dialogues": dialogue_part(content),
        "failures": [row for run in runs for row in failures(run)],
        "setup": {"differing": _plain(differing_table(arms)), "runs": [setup(run) for run in runs]},
    }
    scripts = [Markup(_file(name)) for name in SCRIPTS]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(_file("page.html")).render(
        title=_title(content),
        style=Markup(_palette() + _file("style.css")),
        policy=_policy(scripts),
        sections=[(part, name) for part, name in SECTIONS.items() if parts[part]],
        runs=[{"name": r.name, "finished": r.is_finished, "status": status(r)} for r in runs],
        arms=[_arm(arm, title) for arm, title in zip(arms, titles(arms), strict=True)],
        tiles=tiles(content),
        bands=_bands(content),
        version=__version__,
        licences=_file("licences.txt"),
        library=Markup(library()),
        missing=MISSING,
        figures=Markup(numbered.packed()),
        spoken=Markup(spoken(content)),
        scripts=scripts,
        **parts,
    )
    return page, numbered.figures


def _results(content: Content, numbered: Numbered) -> dict[str, Any]:
    groups, agents, with_arm = content.groups, content.agents, len(content.arms) > 1
    return {
        "figures": numbered([*accuracy_figures(groups, agents, with_arm=with_arm), *ratio_figures(groups, agents)]),
        "benchmarks": _plains(benchmark_tables(groups, with_arm=with_arm)),
        "modes": _plains(mode_tables(groups, with_arm=with_arm)),
        "groups": _plains([result_table(g, with_arm=with_arm) for g in groups if g.mode == "single"]),
        "talked": _plains([result_table(g, with_arm=with_arm) for g in groups if g.mode != "single"]),
    }


def _title(content: Content) -> str:
    """The arms by name; of many, the folder that holds them."""
    parents = {run.path.resolve().parent.name for run in content.runs}
    if len(content.arms) <= 4:
        return " · ".join(dict.fromkeys(arm.label for arm in content.arms))
    return f"{len(content.runs)} runs" + (f" of {parents.pop()}" if len(parents) == 1 else "")


def _arm(arm: Arm, title: str) -> dict[str, Any]:
    """An arm's runs in a line, for pages of many."""
    seeds = ", ".join(str(run.seed) for run in arm.runs if run.seed is not None)
    seeds = seeds and f"{'seeds' if ',' in seeds else 'seed'} {seeds}"
    done = sorted({run.steps_done for run in arm.runs})
    steps = f"{done[0]} steps" if len(done) == 1 else f"{done[0]} to {done[-1]} steps"
    runs = f"{len(arm.runs)} runs" if len(arm.runs) > 1 else "1 run"
    text = " · ".join(t for t in (runs, seeds, steps, ", ".join(arm.agents)) if t)
    return {"name": title or arm.label, "finished": all(run.is_finished for run in arm.runs), "status": text}


def _bands(content: Content) -> str:
    several = any(len(arm.runs) > 1 for arm in content.arms)
    many = max((len(run.metrics) for run in content.runs), default=0)
    texts = [
        "Runs that differ in their seed alone are one curve: their mean, with its 95% interval (Student's t) as the "
        f"band, of up to {FEW} runs the lowest and the highest." if several else "",
        f"From {SMOOTH_FROM} steps on curves are running means over a 25th of the run; pale: the values themselves."
        if many >= SMOOTH_FROM else "",
        "Of a long run each point is the mean of neighbouring steps." if many > FEWEST else "",
        "metrics.jsonl holds every step.",
    ]  # fmt: skip
    return " ".join(text for text in texts if text)


def _palette() -> str:
    """The colours of names as CSS, for the light and the dark page."""
    colours = zip(theme.LIGHT, theme.DARK, strict=True)
    return ":root { " + " ".join(f"--s{i}: light-dark({a}, {b});" for i, (a, b) in enumerate(colours)) + " }\n"


def _policy(scripts: Sequence[str]) -> str:
    """These scripts alone, Vega's compiled expressions, our styles; images made here; nothing from anywhere."""
    hashes = " ".join(f"'sha256-{b64encode(sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return f"default-src 'none'; script-src {hashes} 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:"


def _plain(table: Table | None) -> dict[str, Any] | None:
    return None if table is None else asdict(table)


def _plains(tables: Sequence[Table]) -> list[dict[str, Any]]:
    return [asdict(table) for table in tables]


def _file(name: str) -> str:
    return (files("ilr_fast.report") / name).read_text(encoding="utf-8")
