"""How far a run is, in one line; for the page and the terminal."""

from __future__ import annotations

from ilr_fast.report.runs import Run, dig
from ilr_fast.report.texts import duration, number


def status(run: Run) -> str:
    """How far the run is, how long its steps took, who takes part."""
    seconds = [s for row in run.metrics if (s := dig(row, "seconds", "total")) is not None]
    tokens = [t for row in run.metrics if (t := dig(row, "tokens", "generated")) is not None]
    planned = f" of {run.steps_planned}" if run.steps_planned else ""
    texts = [
        f"{run.steps_done}{planned} steps" if run.metrics else "no step yet",
        duration(sum(seconds)) if seconds else "",
        f"{number(sum(tokens), 'count')} tokens generated" if tokens else "",
        ", ".join(run.agents),
        str(run.environment.get("device") or ""),
    ]
    return " · ".join(t for t in texts if t)
