"""What the dialogues on disk say: how often later turns mended or spoiled the first answer, and a few to read.

Everything is taken from the newest steps whose dialogues are still there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ilr_fast.transcripts import Spoken, Transcript


@dataclass(frozen=True, slots=True)
class Change:
    """One agent's first answers against its last ones, over `n` dialogues."""

    agent: str
    n: int
    both_right: int
    mended: int
    spoiled: int
    both_wrong: int


@dataclass(frozen=True, slots=True)
class Example:
    """A dialogue and why it is shown."""

    title: str
    transcript: Transcript


def changes(transcripts: Sequence[Transcript]) -> list[Change]:
    """By agent; empty where nobody speaks more than once."""
    counts: dict[str, dict[tuple[bool, bool], int]] = {}
    for transcript in transcripts:
        for agent in transcript.agents:
            pair = _first_and_last(transcript, agent)
            if pair is not None:
                by_pair = counts.setdefault(agent, {})
                by_pair[pair] = by_pair.get(pair, 0) + 1
    return [
        Change(agent, sum(c.values()), c.get((True, True), 0), c.get((False, True), 0), c.get((True, False), 0),
               c.get((False, False), 0))
        for agent, c in counts.items()
    ]  # fmt: skip


def examples(transcripts: Sequence[Transcript]) -> list[Example]:
    """At most one dialogue of each kind, none twice; the first dialogue where no kind is found."""
    kinds: list[tuple[str, Callable[[Transcript], bool]]] = [
        ("A wrong first answer, mended in the last turn", lambda t: (False, True) in _pairs(t)),
        ("The agents disagree", lambda t: len({s.correct for s in _firsts(t) if s.correct is not None}) == 2),
        ("All answers right", lambda t: bool(_graded(t)) and all(s.correct for s in _graded(t))),
        ("A right first answer, spoiled in the last turn", lambda t: (True, False) in _pairs(t)),
    ]
    chosen: list[Example] = []
    whole = [t for t in transcripts if t.error is None and t.agents]
    for title, wanted in kinds:
        found = next((t for t in whole if wanted(t) and all(t is not e.transcript for e in chosen)), None)
        if found is not None:
            chosen.append(Example(title, found))
    return chosen or [Example("A dialogue", t) for t in whole[:1]]


def _first_and_last(transcript: Transcript, agent: str) -> tuple[bool, bool] | None:
    first, last = transcript.first(agent), transcript.last(agent)
    if first is None or last is None or first is last or first.correct is None or last.correct is None:
        return None
    return bool(first.correct), bool(last.correct)


def _pairs(transcript: Transcript) -> set[tuple[bool, bool] | None]:
    return {_first_and_last(transcript, agent) for agent in transcript.agents}


def _firsts(transcript: Transcript) -> list[Spoken]:
    return [turns[0] for turns in transcript.agents.values() if turns]


def _graded(transcript: Transcript) -> list[Spoken]:
    return [s for turns in transcript.agents.values() for s in turns if s.correct is not None]
