"""`ilr-fast show RUN`: dialogues as a person reads them, one after the other.

Who was told what under which instruction, what each said, and what it earned: reward → calibrated reward → advantage.

    ilr-fast show runs/quickstart --step 3 --question largest-17
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from unicodedata import category

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

from ilr_fast.errors import UserError, nearest
from ilr_fast.report.runs import read_run
from ilr_fast.transcripts import Spoken, Transcript, read_steps, read_transcripts

COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")
STANCE = {"cooperation": "green", "competition": "red"}


def show(run: Path, *, step: int | None = None, question: str | None = None, console: Console | None = None) -> None:
    """Prints the dialogues of a step (None: the newest), all of them or one question's.

    Raises UserError for a folder that is no run, a step without dialogues (lists those there are), and a question that
    was not asked in that step (names the nearest, or the steps that asked it).
    """
    read_run(run)
    step = _step(run, step)
    transcripts = read_transcripts(run, step)
    if question is not None:
        transcripts = _of_question(run, step, transcripts, question)
    console = console or Console()
    for transcript in transcripts:
        console.print(_dialogue(transcript))
    if not transcripts:
        console.print(f"step {step} has no graded dialogues; {run / 'failures.jsonl'} says why", markup=False)


def _step(run: Path, step: int | None) -> int:
    steps = read_steps(run)
    if not steps:
        raise UserError("no dialogues yet", str(run), "wait for the first step to be done")
    if step is None:
        return steps[-1]
    if step not in steps:
        raise UserError(f"no dialogues of step {step}", str(run), f"it has steps {ranges(steps)}")
    return step


def _of_question(run: Path, step: int, transcripts: Sequence[Transcript], question: str) -> list[Transcript]:
    found = [t for t in transcripts if t.question_id == question]
    if found:
        return found
    elsewhere = [s for s in read_steps(run) if any(t.question_id == question for t in read_transcripts(run, s))]
    remedy = f"it was asked in step {ranges(elsewhere)}" if elsewhere else nearest(
        question, {t.question_id for t in transcripts})
    raise UserError(f"no question {question!r} in step {step}", str(run), remedy)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short.

    >>> ranges([1, 2, 3, 7, 9, 10])
    '1-3, 7, 9-10'
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def _dialogue(transcript: Transcript) -> RenderableType:
    title = Text.assemble(
        (f" {clean(transcript.question_id)} ", "bold"),
        (f"step {transcript.step} · dialogue {transcript.sample + 1} · {transcript.protocol} ", "dim"),
    )
    parts: list[RenderableType] = [Rule(title, align="left"), _text(transcript.question, style="bold")]
    parts.append(_text(f"expected answer: {transcript.expected}", style="dim"))
    if transcript.error:
        parts.append(_text(f"broken off: {transcript.error}", style="red"))
    for stage, agent, number, turn in _in_order(transcript):
        parts.append(_turn(stage, agent, COLOURS[number % len(COLOURS)], turn))
    return Group(*parts, Text())


def _in_order(transcript: Transcript) -> list[tuple[str, str, int, Spoken]]:
    """(stage, agent, the agent's number, turn), stage by stage; a stage that comes again is numbered."""
    found = []
    for number, (agent, turns) in enumerate(transcript.agents.items()):
        seen: Counter[str] = Counter()
        for place, turn in enumerate(turns):
            seen[turn.stage] += 1
            stage = turn.stage if seen[turn.stage] == 1 else f"{turn.stage} {seen[turn.stage]}"
            found.append((place, stage, agent, number, turn))
    return [(stage, agent, number, turn) for _, stage, agent, number, turn in sorted(found, key=lambda f: (f[0], f[3]))]


def _turn(stage: str, agent: str, colour: str, turn: Spoken) -> RenderableType:
    verdict = {True: (" · right", "green"), False: (" · wrong", "red"), None: ("", "")}[turn.correct]
    head = Text.assemble(
        (agent, f"bold {colour}"), f" · {stage} · ", (turn.interaction, STANCE.get(turn.interaction, "dim")), verdict)
    told = Padding(_text(turn.message, style="dim"), (0, 0, 0, 2))
    said = _text(turn.text) if turn.text.strip() else Text("(nothing)", style="dim")
    return Panel(Group(told, said, _text(turn.numbers, style="italic dim")), title=head, title_align="left",
                 border_style=colour, padding=(0, 1))  # fmt: skip


def _text(text: str, style: str = "") -> Text:
    return Text(clean(text.strip()), style=style)


def clean(text: str) -> str:
    """Shows control and formatting characters, which could be commands to the terminal, as a blob."""
    hidden = ("Cc", "Cf")
    return "".join("\N{REPLACEMENT CHARACTER}" if c not in "\n\t" and category(c) in hidden else c for c in text)
