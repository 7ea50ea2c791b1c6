"""One pass over a run's dialogues, for everything that the report says about them. Memory does not grow with the run.

Files are read one line after the other. Where those of all runs are more than READ_BYTES, every k-th step is read, with
the smallest k that keeps a run below its share; the page says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ilr_fast.report.calibration import CalibrationTally
from ilr_fast.report.flips import FlipTally
from ilr_fast.report.keep import Keeper
from ilr_fast.report.runs import Run, mapping
from ilr_fast.report.stances import StanceTally
from ilr_fast.transcripts import Transcript, read_steps, stream_transcripts

READ_BYTES = 1 << 30  # about six seconds of one core
Answers = dict[str, dict[str, list[int]]]  # agent → question → [right first answers, first answers]


@dataclass(frozen=True, slots=True)
class Survey:
    """What a run's dialogues say. `steps` were read, of `steps_there`; `levels`: the data's, by question."""

    steps: Sequence[int]
    steps_there: int
    dialogues: int
    flips: FlipTally
    stances: StanceTally
    calibration: CalibrationTally
    firsts: Answers
    levels: Mapping[str, int]
    seen: Mapping[str, int]
    kept: Sequence[Transcript]

    def pass_rates(self, agent: str) -> dict[str, float]:
        """The agent's share of right first answers by question."""
        return {question: right / n for question, (right, n) in self.firsts.get(agent, {}).items()}


def survey(
    run: Run, difficulty: Mapping[str, Mapping[str, float]], *, quota: int, most: int = READ_BYTES
) -> Survey:
    """Reads the run's dialogues, at most `most` bytes. `difficulty`: D by agent and question; `quota`: see `Keeper`."""
    there = read_steps(run.path)
    steps = there[:: _stride(run, there, most)]
    flips, stances, calibration = FlipTally(), StanceTally(difficulty), CalibrationTally()
    keeper, dialogues = Keeper(steps, quota), 0
    firsts: Answers = {}
    levels: dict[str, int] = {}
    for step in steps:
        for transcript in stream_transcripts(run.path, step):
            dialogues += 1
            for tally in (flips, stances, calibration, keeper):
                tally.add(transcript)
            _count_firsts(firsts, transcript)
            if transcript.level is not None:
                levels[transcript.question_id] = transcript.level
        calibration.end_step()
    kept = keeper.kept()
    return Survey(steps, len(there), dialogues, flips, stances, calibration, firsts, levels, keeper.seen, kept)


def difficulty_of(facts: Mapping[str, object]) -> dict[str, dict[str, float]]:
    """D by agent and question from interaction.json, without what is no number."""
    return {
        agent: {question: float(d) for question, d in mapping(known).items() if isinstance(d, (int, float))}
        for agent, known in mapping(facts.get("difficulty")).items()
    }


def _stride(run: Run, steps: Sequence[int], most: int) -> int:
    sizes = [(run.path / "dialogues" / f"step_{step:06d}.jsonl").stat().st_size for step in steps]
    return max(1, -(-sum(sizes) // most))


def _count_firsts(firsts: Answers, transcript: Transcript) -> None:
    for agent, turns in transcript.agents.items():
        if turns and turns[0].correct is not None:
            counts = firsts.setdefault(agent, {}).setdefault(transcript.question_id, [0, 0])
            counts[0] += turns[0].correct
            counts[1] += 1
