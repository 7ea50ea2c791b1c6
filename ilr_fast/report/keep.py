"""Which dialogues a page keeps, as a run can have more than any page could hold: the same ones every time.

Every dialogue is of one kind (the rarest that fits it) and of one tenth of the run. Of each kind and tenth the few with
the smallest hash of (step, question, sample) are kept, so that rare kinds and all times of training are there, and no
order or amount of reading changes the choice. Longer texts are cut in the middle.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from ilr_fast.report.flips import flip
from ilr_fast.transcripts import Transcript

TENTHS = 10
KINDS = ("spoiled by a peer", "mended by a peer", "spoiled", "mended", "broken off", "mixed", "all wrong", "all right")
LONGEST = 6_000  # characters of one text


@dataclass(slots=True)
class Keeper:
    """Keeps at most `quota` dialogues of each kind and tenth of the run's `steps`."""

    steps: Sequence[int]
    quota: int
    seen: Counter[str] = field(default_factory=Counter)
    _heaps: dict[tuple[int, str], list[tuple[int, int, Transcript]]] = field(default_factory=dict)

    def add(self, transcript: Transcript) -> None:
        """Keeps the dialogue if it is among the chosen so far."""
        kind = kind_of(transcript)
        self.seen[kind] += 1
        first, last = self.steps[0], self.steps[-1]
        tenth = (transcript.step - first) * TENTHS // (last - first + 1)
        heap = self._heaps.setdefault((tenth, kind), [])
        item = (-_hash(transcript), self.seen.total(), transcript)
        if len(heap) < self.quota:
            heapq.heappush(heap, item)
        elif item[:1] > heap[0][:1]:
            heapq.heapreplace(heap, item)

    def kept(self) -> list[Transcript]:
        """Those kept, the most telling first: the smallest hashes of every kind and tenth, then the next smallest."""
        ranked = [
            (rank, KINDS.index(kind), tenth, transcript)
            for (tenth, kind), heap in self._heaps.items()
            for rank, (_, _, transcript) in enumerate(sorted(heap, key=lambda item: -item[0]))
        ]
        return [transcript for *_, transcript in sorted(ranked, key=lambda r: r[:3])]


def kind_of(transcript: Transcript) -> str:
    """The first of KINDS that fits."""
    if transcript.error is not None:
        return "broken off"
    flips = {flip(transcript, agent) for agent in transcript.agents}
    for what, kind in (("spoiled by a peer", "spoiled by a peer"), ("mended by a peer", "mended by a peer"),
                       ("spoiled alone", "spoiled"), ("mended alone", "mended")):  # fmt: skip
        if what in flips:
            return kind
    verdicts = {said.correct for turns in transcript.agents.values() for said in turns if said.correct is not None}
    return "mixed" if len(verdicts) != 1 else "all right" if True in verdicts else "all wrong"


def cut(text: str, longest: int = LONGEST) -> str:
    """The text, its middle left out where it is longer.

    >>> cut("abcdefghij", 4)
    'ab\\n[… 6 characters left out …]\\nij'
    """
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters left out …]\n{text[-half:]}"


def _hash(transcript: Transcript) -> int:
    key = f"{transcript.step}/{transcript.question_id}/{transcript.sample}"
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big")
