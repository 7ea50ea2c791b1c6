"""`ilr-fast report RUN …`: report.html, self-contained: curves, tables, dialogues; the tables in the terminal too.

A run may be unfinished, hold a single agent, or have no evaluation yet. Several runs stand side by side, those that
differ in their seed alone as one; the page is then written into the first run's folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ilr_fast.durable import disk_errors, write_text
from ilr_fast.report.bundle import MISSING, library
from ilr_fast.report.content import read_content
from ilr_fast.report.export import export
from ilr_fast.report.page import render_page
from ilr_fast.report.runs import read_runs
from ilr_fast.report.terminal import print_content


def report(
    runs: Sequence[Path], *, out: Path | None = None, figures: Path | None = None, console: Console | None = None
) -> Path:
    """Writes the page of one run or several and prints their tables. Returns the page's path.

    `runs`: run folders, or folders that hold some. `out`: the file to write; by default report.html in the first one.
    `figures`: a folder for every figure as PDF and CSV. `console`: where the tables go. Raises UserError for a folder
    that is no run, the same run twice, and a place that can't be written.
    """
    content = read_content(read_runs(runs))
    path = out or runs[0] / "report.html"
    page, drawn = render_page(content)
    with disk_errors(path, "free some space, or give the page another place"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page)
    if figures is not None:
        with disk_errors(figures, "free some space, or give the figures another folder"):
            export(drawn, figures)
    console = console or Console()
    print_content(console, content)
    if not library():
        console.print(MISSING, style="yellow", highlight=False)
    if figures is not None:
        console.print(f"figures: {figures} (PDF, CSV)", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {path}", highlight=False, markup=False, soft_wrap=True)
    return path
