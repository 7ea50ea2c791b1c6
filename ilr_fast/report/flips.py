"""First answers against last ones: what the talk between them mended and spoiled, and whether a peer can have done it.

A wrong first answer that ends right is *mended*; *by a peer* where some peer had given a right answer in an earlier
stage than the last one. The reverse is *spoiled*, by a peer where one had been wrong. Whether the agent followed the
peer no count can show; that a peer had said so is what is counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from ilr_fast.transcripts import Transcript

Flip = Literal["kept right", "mended by a peer", "mended alone", "spoiled by a peer", "spoiled alone", "kept wrong"]


def flip(transcript: Transcript, agent: str) -> Flip | None:
    """What became of the agent's first answer; None where it spoke only once, or an answer has no verdict."""
    turns = transcript.agents[agent]
    if len(turns) < 2 or turns[0].correct is None or turns[-1].correct is None:
        return None
    if turns[0].correct == turns[-1].correct:
        return "kept right" if turns[0].correct else "kept wrong"
    peers = [said for name, others in transcript.agents.items() if name != agent for said in others[: len(turns) - 1]]
    by_peer = any(said.correct == turns[-1].correct for said in peers)
    if turns[-1].correct:
        return "mended by a peer" if by_peer else "mended alone"
    return "spoiled by a peer" if by_peer else "spoiled alone"


@dataclass(slots=True)
class FlipTally:
    """How often each flip came, by agent."""

    counts: dict[str, Counter[Flip]] = field(default_factory=dict)

    def add(self, transcript: Transcript) -> None:
        """Counts one dialogue."""
        for agent in transcript.agents:
            what = flip(transcript, agent)
            if what is not None:
                self.counts.setdefault(agent, Counter())[what] += 1

    def __add__(self, other: FlipTally) -> FlipTally:
        agents = dict.fromkeys([*self.counts, *other.counts])
        none: Counter[Flip] = Counter()
        return FlipTally({a: self.counts.get(a, none) + other.counts.get(a, none) for a in agents})
