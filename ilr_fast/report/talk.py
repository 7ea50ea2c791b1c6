"""The page's parts about what was said: cooperation and competition, calibration, and the dialogues to browse."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import reduce
from operator import add
from typing import Any

from ilr_fast.report.arms import Arm, titles
from ilr_fast.report.bundle import packed
from ilr_fast.report.content import Content
from ilr_fast.report.dialogue_data import dialogue_data
from ilr_fast.report.interaction import interaction_table
from ilr_fast.report.keep import LONGEST
from ilr_fast.report.survey import Survey
from ilr_fast.report.tables import flip_table
from ilr_fast.report.talk_figures import calibration_figure, calibration_note, stance_figures
from ilr_fast.report.vega import Figure

SPOKEN_BYTES = 3_200_000  # of the page, for dialogues
Numbers = Callable[[Iterable[Figure]], list[dict[str, Any]]]
ANSWERS = ("right", "wrong")
CHANGES = ("mended by a peer", "spoiled by a peer", "mended alone", "spoiled alone", "kept right", "kept wrong")


def interaction_part(content: Content, numbered: Numbers) -> list[dict[str, Any]]:
    """For each arm: a table of its runs, and figures over the dialogues of all of them."""
    parts = []
    for arm, title in zip(content.arms, titles(content.arms), strict=True):
        table = interaction_table(arm.runs, content.surveys, content.facts)
        stances = reduce(add, (survey.stances for survey in _surveys(content, arm)))
        if table:
            parts.append({"title": title, "table": table, "figures": numbered(stance_figures(stances))})
    return parts


def calibration_part(content: Content, numbered: Numbers) -> dict[str, Any] | None:
    """Calibrated rewards by raw ones for each arm; None where there are no dialogues."""
    figures, notes = [], []
    for arm, title in zip(content.arms, titles(content.arms), strict=True):
        tally = reduce(add, (survey.calibration for survey in _surveys(content, arm)))
        note = calibration_note(tally) if len(arm.agents) > 1 else ""
        if note:
            figures.append(calibration_figure(tally, content.agents, f" · {title}" if title else ""))
            notes.append(f"{title}: {note}" if title else note)
    return {"figures": numbered(f for f in figures if f), "notes": notes} if notes else None


def dialogue_part(content: Content) -> dict[str, Any] | None:
    """The table of flips, what can be filtered by, and which dialogues are kept; None without dialogues."""
    if not any(survey.dialogues for survey in content.surveys.values()):
        return None
    kept = [t for survey in content.surveys.values() for t in survey.kept]
    turns = [turn for t in kept for turns in t.agents.values() for turn in turns]
    choices = {
        "run": [run.name for run in content.runs] if len(content.runs) > 1 else [],
        "agent": dict.fromkeys(agent for t in kept for agent in t.agents),
        "stage": dict.fromkeys(turn.stage for turn in turns),
        "mode": dict.fromkeys(turn.interaction for turn in turns),
        "answer": ANSWERS,
        "change": CHANGES,
    }
    flips = flip_table([(title, reduce(add, (survey.flips for survey in _surveys(content, arm))))
                        for arm, title in zip(content.arms, titles(content.arms), strict=True)])  # fmt: skip
    return {
        "flips": asdict(flips) if flips else None,
        "filters": [{"name": name, "options": list(options)} for name, options in choices.items() if options],
        "kept": _kept(content),
    }


def spoken(content: Content) -> str:
    """The kept dialogues, packed; where they are more than SPOKEN_BYTES, the last of every run are left out."""
    share, colours = 1.0, {agent: i for i, agent in enumerate(content.agents)}
    while True:
        dialogues = []
        for number, run in enumerate(content.runs):
            kept = content.surveys[run.name].kept
            dialogues += dialogue_data(number, kept[: round(len(kept) * share)], colours)
        text = packed({"runs": [run.name for run in content.runs], "dialogues": dialogues})
        if len(text) <= SPOKEN_BYTES or not dialogues:
            return text
        share *= 0.95 * SPOKEN_BYTES / len(text)


def _kept(content: Content) -> str:
    """The rule by which dialogues are kept, and how many there are of each kind."""
    surveys = list(content.surveys.values())
    seen: dict[str, int] = {}
    for survey in surveys:
        for kind, count in survey.seen.items():
            seen[kind] = seen.get(kind, 0) + count
    unread = [f"{run.name}: every dialogue of {len(s.steps)} of {s.steps_there} steps, spread evenly"
              for run, s in zip(content.runs, surveys, strict=True) if len(s.steps) < s.steps_there]
    there = ", ".join(f"{count:,} {kind}" for kind, count in sorted(seen.items(), key=lambda item: -item[1]))
    return (
        f"Kept to browse: of each kind and each tenth of a run the {content.quota} with the smallest hash of (step, "
        f"question, sample), the same at every report. There are {there}; each counts once, as the rarest kind that "
        f"fits. Texts of more than {LONGEST:,} characters are cut in the middle. ilr-fast show prints every dialogue."
        + (" Read were " + "; ".join(unread) + "." if unread else "")
    )


def _surveys(content: Content, arm: Arm) -> list[Survey]:
    return [content.surveys[run.name] for run in arm.runs]
