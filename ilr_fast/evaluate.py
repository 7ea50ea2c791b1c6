"""Accuracy on questions: each agent alone (`single`), or several agents in a debate or Idea3. Right answers only.

One answer a question is greedy; several are sampled at `temperature`. An answer that failed (the prompt did not fit,
the verifier broke) counts as wrong and in `failed`, so that methods are compared on the same questions. In debate and
Idea3 every agent's last answer counts, and the instructions are neutral *(ours)*.

    found = evaluate_agents(seats, questions, grader, config=config, modes=["single"], benchmark="test", method="ilr")
    record(run, found)          # results.json and evaluations/ilr_test_single.jsonl

The outcomes by question stay on disk, so that two methods can be compared on the same questions (statistics.py).
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ilr_fast.config import Config
from ilr_fast.durable import disk_errors, write_text
from ilr_fast.errors import UserError, nearest
from ilr_fast.protocols import load_protocol
from ilr_fast.protocols.templates import Prompts, load_prompts
from ilr_fast.rewards import Grader, make_grader
from ilr_fast.rollout import DialogueJob, Seat, run_dialogues
from ilr_fast.runfolder import write_results
from ilr_fast.statistics import accuracy_interval
from ilr_fast.transcripts import read_jsonl
from ilr_fast.types import Dialogue, Grade, Message, Question

MODES = ("single", "debate", "idea3")


class Phases(Protocol):
    """Shows progress (progress.Progress)."""

    def phase(self, name: str, total: int | None = None) -> AbstractContextManager[Callable[..., None]]:
        """Yields what is called when a part is done."""
        ...


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results rows (a run's keys, with `examples`, `failed`, `temperature`, `outcomes`), and outcomes by file name.

    An outcome is one agent's answers to one question: {"agent", "question", "correct", "answers", "tokens", "texts"},
    the last four with one entry a sample.
    """

    rows: Sequence[Mapping[str, Any]]
    per_question: Mapping[str, Sequence[Mapping[str, Any]]]

    def __add__(self, other: Evaluation) -> Evaluation:
        merged = {name: list(found) for name, found in self.per_question.items()}
        for name, found in other.per_question.items():
            merged[name] = [*merged.get(name, ()), *found]
        return Evaluation([*self.rows, *other.rows], merged)

    def correct(self, agent: str, mode: str = "single") -> dict[str, list[bool]]:
        """Right or wrong by question id, of the first row that fits (for statistics.paired_difference)."""
        row = next(r for r in self.rows if r["agent"] == agent and r["mode"] == mode)
        return {o["question"]: o["correct"] for o in self.per_question[row["outcomes"]] if o["agent"] == agent}


def evaluate_agents(
    seats: Mapping[str, Seat],
    questions: Sequence[Question],
    grader: Grader,
    *,
    config: Config,
    benchmark: str,
    method: str | Mapping[str, str],
    modes: Sequence[str] = ("single",),
    samples: int = 1,
    temperature: float | None = None,
    examples: Sequence[Message] = (),
    example_count: int | None = None,
    seed: int = 0,
    checkpoint: str | None | Mapping[str, str | None] = None,
    progress: Phases | None = None,
) -> Evaluation:
    """Asks every question `samples` times in every mode.

    Args:
        seats: the agents by name; in `single` each is alone, in the other modes they talk.
        grader: judges the last answer of each agent.
        config: prompts, limits of turns and rounds of the debate; its rollout temperature is not used.
        temperature: where samples > 1; None: `config.evaluate.temperature`. One sample is greedy.
        examples: messages before the question; `example_count`: how many worked examples, for a few-shot base's row.
        method, checkpoint: what was measured, for the rows; by agent where agents differ.
    Raises UserError for an unknown mode, no questions, or a mode that needs peers with a single agent.
    """
    _check(seats, questions, modes, benchmark)
    heat = 0.0 if samples == 1 else (config.evaluate.temperature if temperature is None else temperature)
    facts = {"benchmark": benchmark, "samples": samples, "seed": seed, "temperature": heat, "examples": example_count}
    methods = method if isinstance(method, Mapping) else dict.fromkeys(seats, method)
    checkpoints = checkpoint if isinstance(checkpoint, Mapping) else dict.fromkeys(seats, checkpoint)
    named = f"base, {example_count} examples," if example_count else ", ".join(dict.fromkeys(methods.values()))
    found = Evaluation([], {})
    for mode in modes:
        teams = [{name: seat} for name, seat in seats.items()] if mode == "single" else [seats]
        for team in teams:
            jobs = [DialogueJob(question, sample, {}, seed) for question in questions for sample in range(samples)]
            who = next(iter(team)) if mode == "single" else mode
            with progress.phase(f"{named} on {benchmark}: {who}", len(jobs)) if progress else nullcontext() as advance:
                dialogues = asyncio.run(
                    run_dialogues(
                        jobs, load_protocol(mode, config), team, config.rollout,
                        examples=examples, temperature=heat, on_done=advance,
                    )
                )  # fmt: skip
            grades = _grade(dialogues, tuple(team), grader)
            for name in team:
                about = {"method": methods[name], "checkpoint": checkpoints[name], "mode": mode, **facts}
                found += _summary(dialogues, grades[name], name, about)
    return found


def evaluate_base(
    seats: Mapping[str, Seat],
    questions: Sequence[Question],
    grader: Grader,
    *,
    train_questions: Sequence[Question],
    config: Config,
    benchmark: str,
    progress: Phases | None = None,
    **options: Any,
) -> Evaluation:
    """The models before training: with the run's own prompt (`base`), and with worked examples (`base_few_shot`).

    The numbers of worked examples are `evaluate.few_shot`. `options` go to `evaluate_agents`. Of the few-shot rows the
    best of each agent has `best` set: the maximum on these very questions, which flatters the base and never us.
    """
    prompts = load_prompts(config.prompts.file, config.reward.name)
    common: dict[str, Any] = {"config": config, "benchmark": benchmark, "progress": progress, **options}
    shown = few_shot_examples(train_questions, config.prompts.examples, config.seed, prompts)
    found = evaluate_agents(seats, questions, grader, method="base", examples=shown, **common)
    for count in config.evaluate.few_shot:
        shown = few_shot_examples(train_questions, count, config.seed, prompts)
        found += evaluate_agents(
            seats, questions, grader, method="base_few_shot", examples=shown, example_count=count, **common
        )
    return Evaluation(_with_best(found.rows), found.per_question)


def open_grader(config: Config) -> Grader:
    """The grader of a config, with its verifier processes."""
    reward = config.reward
    return make_grader(
        reward.name, format_weight=reward.format_weight, time_limit=reward.time_limit, workers=reward.workers
    )


def few_shot_examples(questions: Sequence[Question], count: int, seed: int, prompts: Prompts) -> list[Message]:
    """`count` training questions as worked examples, drawn by seed; fewer are the first of more.

    Raises UserError where there are not so many questions.
    """
    if count > len(questions):
        raise UserError(f"{count} worked examples, but only {len(questions)} training questions",
                        "prompts.examples, evaluate.few_shot", f"use at most {len(questions)}")
    order = random.Random(f"worked examples {seed}").sample(range(len(questions)), len(questions))
    return prompts.worked([questions[i] for i in order[:count]])


def record(folder: Path, found: Evaluation) -> None:
    """Writes the outcomes to evaluations/ and the rows to results.json; agents that were not measured keep theirs."""
    with disk_errors(folder, "free some space and evaluate again"):
        (folder / "evaluations").mkdir(parents=True, exist_ok=True)
        for name, outcomes in found.per_question.items():
            measured = {o["agent"] for o in outcomes}
            kept = [row for row in read_jsonl(folder / name) if row.get("agent") not in measured]
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in [*kept, *outcomes]]
            write_text(folder / name, "".join(lines))
    write_results(folder, found.rows)


def method_of(config: Config) -> str:
    """What a run's trained agents are called in results (ILR.md, section 5)."""
    if config.method is not None:
        return config.method
    if config.protocol == "single":
        return "grpo"
    calibrated = config.credit.calibrate != "none"
    learning = sum(agent.train != "none" for agent in config.agents.values())
    if config.interaction == "none" and not calibrated and learning == 1 < len(config.agents):
        return "grpo_peer"
    prefix = "ilr" if config.protocol == "idea3" else re.sub(r"\W+", "_", config.protocol.rsplit(":", 1)[-1])
    ratios = {"cooperation": 1.0, "competition": 0.0, "ratio": config.cooperation_ratio}
    if config.interaction in ratios:
        return f"{prefix}_ratio_{ratios[config.interaction]:g}" + ("" if calibrated else "_uncalibrated")
    parts = {("dynamic", True): "", ("dynamic", False): "_di", ("none", True): "_pc", ("none", False): "_neither"}
    return prefix + parts[config.interaction, calibrated]


def _check(seats: Mapping[str, Seat], questions: Sequence[Question], modes: Sequence[str], benchmark: str) -> None:
    for mode in modes:
        if mode not in MODES:
            raise UserError(f"unknown mode {mode!r}", "--mode, evaluate.modes", nearest(mode, MODES))
        if mode != "single" and len(seats) < 2:
            raise UserError(f"{mode} needs peers, and there is one agent", "--mode, evaluate.modes",
                            "name another model, or use single")
    if not questions:
        raise UserError("no questions", benchmark, "give a benchmark that has some")


def _grade(dialogues: Sequence[Dialogue], names: Sequence[str], grader: Grader) -> dict[str, list[Grade]]:
    """By agent, the grade of its last answer in each dialogue; a dialogue that broke off is wrong."""
    whole = [(i, name) for name in names for i, d in enumerate(dialogues) if d.error is None]
    texts = [(dialogues[i].question, dialogues[i].turns[name][-1].generation.text) for i, name in whole]
    graded = dict(zip(whole, grader.grade_many(texts), strict=True))
    return {
        name: [graded.get((i, name)) or Grade(None, False, False, error=d.error) for i, d in enumerate(dialogues)]
        for name in names
    }


def _summary(
    dialogues: Sequence[Dialogue], grades: Sequence[Grade], name: str, facts: Mapping[str, Any]
) -> Evaluation:
    examples = f"_{facts['examples']}" if facts["examples"] is not None else ""
    times = f"_x{facts['samples']}" if facts["samples"] > 1 else ""
    file = f"evaluations/{_slug(facts['method'])}{examples}_{_slug(facts['benchmark'])}_{facts['mode']}{times}.jsonl"
    outcomes = _outcomes(name, dialogues, grades)
    failed = sum(grade.reward is None for grade in grades)
    row = {"agent": name, **facts, **_counts(outcomes, facts["seed"]), "failed": failed, "outcomes": file}
    return Evaluation([row], {file: outcomes})


def _outcomes(name: str, dialogues: Sequence[Dialogue], grades: Sequence[Grade]) -> list[dict[str, Any]]:
    """One record a question, its samples in order."""
    by_question: dict[str, dict[str, Any]] = {}
    for dialogue, grade in zip(dialogues, grades, strict=True):
        question = dialogue.question.id
        lists: dict[str, Any] = {"correct": [], "answers": [], "tokens": [], "texts": []}
        outcome = by_question.setdefault(question, {"agent": name, "question": question, **lists})
        turns = dialogue.turns.get(name, ())
        outcome["correct"].append(grade.correct)
        outcome["answers"].append(grade.answer)
        outcome["tokens"].append(sum(len(turn.generation.tokens) for turn in turns))
        outcome["texts"].append(turns[-1].generation.text if turns else "")
    return list(by_question.values())


def _counts(outcomes: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """n questions, right answers over all samples, accuracy with its interval, tokens of a whole answer."""
    answers = [correct for outcome in outcomes for correct in outcome["correct"]]
    tokens = [count for outcome in outcomes for count in outcome["tokens"]]
    return {
        "n": len(outcomes),
        "correct": sum(answers),
        "accuracy": sum(answers) / len(answers),
        "ci95": accuracy_interval([outcome["correct"] for outcome in outcomes], seed=seed),
        "tokens_mean": sum(tokens) / len(tokens),
    }


def _with_best(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    best: dict[tuple, float] = {}
    for row in rows:
        if row["method"] == "base_few_shot":
            key = row["agent"], row["mode"]
            best[key] = max(best.get(key, 0.0), row["accuracy"])
    return [
        {**row, "best": row["accuracy"] == best[row["agent"], row["mode"]]}
        if row["method"] == "base_few_shot" else dict(row)
        for row in rows
    ]  # fmt: skip


def _slug(name: str) -> str:
    """A benchmark's or method's name as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", Path(name).stem if name.endswith(".jsonl") else name).strip("-.") or "questions"
