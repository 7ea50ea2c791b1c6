"""Dynamic Interaction over a run: measures ability and difficulty where the config asks for them, and keeps them.

`interaction.json` in the run folder holds what was measured, with the step it was measured at, so that a run that goes
on uses the same numbers; nothing is measured where `interaction` is not `dynamic`. Where it goes on with more `steps`,
only the questions that these add are measured. The file also names the agents whose template rewrites earlier turns.

    interactions = Interactions.open(session, start=0)
    interactions.of(question)          # {"gemma": "cooperation", "smollm2": "competition"}
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ilr_fast.ability import ability, cooperation_share, interactions
from ilr_fast.alone import answer_alone
from ilr_fast.data import QuestionStream
from ilr_fast.difficulty import Difficulty, from_levels, from_pass_rates
from ilr_fast.durable import write_text
from ilr_fast.errors import UserError
from ilr_fast.models import cache_folder
from ilr_fast.protocols import load_protocol
from ilr_fast.protocols.templates import load_prompts
from ilr_fast.ranking import self_ranking
from ilr_fast.ranking_cache import RankingCache, data_fingerprint
from ilr_fast.session import Session
from ilr_fast.types import Grade, Interaction, Question


class Interactions:
    """Who cooperates and who competes, by question. Use `open`."""

    def __init__(self, session: Session, found: dict[str, Any]):
        self.session, self.found = session, found
        self._chosen: dict[str, dict[str, Interaction]] = {}

    @classmethod
    def open(cls, session: Session, start: int) -> Interactions:
        """Reads what was measured up to step `start`, or measures it now."""
        path = session.folder.path / "interaction.json"
        found: dict[str, Any] = {}
        if session.config.interaction == "dynamic" and session.ready.protocol.name != "single":
            found = _read(path) if path.exists() else {}
            found = found or {"abilities": [_measure_abilities(session, start)]}
            found["abilities"] = [row for row in found["abilities"] if row["step"] <= start]
            found |= _difficulties(session, found)
        made = cls(session, found)
        made._keep()
        return made

    def of(self, question: Question) -> Mapping[str, Interaction]:
        """Each agent's interaction on a question."""
        if question.id not in self._chosen:
            self._chosen |= self._choose([question.id])
        return self._chosen[question.id]

    def refresh(self, step: int) -> None:
        """Measures ability again where `ability.refresh_every` asks for it, before the dialogues of `step`."""
        every = self.session.config.ability.refresh_every
        due = every is not None and step > 1 and (step - 1) % every == 0
        if self.found and due and self._newest["step"] < step - 1:
            self.found["abilities"].append(_measure_abilities(self.session, step - 1))
            self._chosen = {}
            self._keep()

    @property
    def _newest(self) -> dict[str, Any]:
        return self.found["abilities"][-1]

    def _choose(self, questions: Sequence[str]) -> dict[str, dict[str, Interaction]]:
        config = self.session.config
        measured = {}
        if self.found:
            measured = {"abilities": self._newest["ability"], "difficulties": self.found["difficulty"]}
        mode = "none" if config.interaction == "dynamic" and not measured else config.interaction
        return interactions(mode, questions, self.session.team.names, **measured, ratio=config.cooperation_ratio,
                            seed=config.seed)

    def _keep(self) -> None:
        """Writes what was measured, and the shares of cooperation that follow from it."""
        team = self.session.team
        rewriting = [name for name, seat in team.seats.items() if seat.chat.rewrites_earlier_turns()]
        said: dict[str, Any] = {"template_rewrites": rewriting}
        if self.found:
            chosen = self._choose(list(self.found["difficulty"][team.names[0]]))
            said["cooperation_share"] = {name: cooperation_share(chosen, name) for name in team.names}
        path = self.session.folder.path / "interaction.json"
        write_text(path, json.dumps({**self.found, **said}, indent=1, ensure_ascii=False) + "\n")


def _read(path: Any) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found["abilities"] and found["difficulty"]
        return found
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        remedy = "put a copy back, or start over in another run folder"
        raise UserError(f"can't be read ({error})", str(path), remedy) from None


def _measure_abilities(session: Session, step: int) -> dict[str, Any]:
    """γ of every agent, alone and greedy, from validation questions."""
    questions = list(session.ready.splits["validation"])[: session.config.ability.questions]
    session.team.forget()
    right = {name: sum(grade.correct for (grade,) in _answers(session, name, questions, 1, 0.0, "ability"))
             for name in session.team.names}
    return {
        "step": step,
        "questions": len(questions),
        "accuracy": {name: count / len(questions) for name, count in right.items()},
        "ability": {name: ability(count, len(questions)) for name, count in right.items()},
    }


def _difficulties(session: Session, found: Mapping[str, Any]) -> dict[str, Any]:
    """D of every question that the run will ask, by agent, with what the report says about it; see `interaction.json`.

    What `found` holds stays; the questions that it lacks are measured.
    """
    known = found.get("difficulty", {})
    names = session.team.names
    new = [question for question in _asked(session) if any(question.id not in known.get(name, {}) for name in names)]
    if not new:
        return {}
    measured, rates = _measure_difficulties(session, new)
    values = {name: {**known.get(name, {}), **d.values} for name, d in measured.items()}
    counts = {"unknown_questions": lambda d: len(d.unknown), "invalid_windows": lambda d: d.invalid_windows,
              "windows": lambda d: d.windows}  # fmt: skip
    return {
        "difficulty": values,
        **{key: {name: found.get(key, {}).get(name, 0) + count(d) for name, d in measured.items()}
           for key, count in counts.items()},
        "pass_rate": None if rates is None else {**(found.get("pass_rate") or {}), **rates},
    }


def _measure_difficulties(
    session: Session, questions: Sequence[Question]
) -> tuple[dict[str, Difficulty], dict[str, float] | None]:
    """D by agent, and the pass rates where it comes from those."""
    session.team.forget()
    config, names = session.config.difficulty, session.team.names
    if config.estimator == "level":
        return dict.fromkeys(names, from_levels(questions, config.levels)), None
    if config.estimator == "self_ranking":
        return {name: _rank(session, name, questions) for name in names}, None
    heat = session.config.rollout.temperature
    answers = {name: _answers(session, name, questions, config.samples, heat, "pass rates") for name in names}
    passes = {q.id: sum(g.correct for a in answers.values() for g in a[i]) for i, q in enumerate(questions)}
    rollouts = {q.id: sum(len(a[i]) for a in answers.values()) for i, q in enumerate(questions)}
    return dict.fromkeys(names, from_pass_rates(passes, rollouts)), {q: passes[q] / rollouts[q] for q in passes}


def _asked(session: Session) -> list[Question]:
    """The training questions that the run's steps may ask, each once, in the order of the data."""
    config, train = session.config, session.ready.splits["train"]
    stream = QuestionStream(train, config.seed)
    at_once = config.rollout.questions + config.rollout.refill
    ids = {q.id for step in range(1, config.steps + 1) for q in stream.questions_at(step, at_once)}
    return [question for question in train if question.id in ids]


def _answers(
    session: Session, name: str, questions: Sequence[Question], samples: int, temperature: float, what: str
) -> list[list[Grade]]:
    config = session.config
    with session.progress.phase(f"{what} of {name}", len(questions) * samples) as advance:
        return answer_alone(
            name, session.team.seats[name], questions, session.grader, config.rollout, load_protocol("single", config),
            examples=session.ready.examples, samples=samples, temperature=temperature, seed=config.seed,
            on_done=advance,
        )  # fmt: skip


def _rank(session: Session, name: str, questions: Sequence[Question]) -> Difficulty:
    config = session.config
    agent, estimator = config.agents[name], config.difficulty
    key = {"model": agent.model, "template": agent.chat_template, "prompts": config.prompts.file,
           "data": data_fingerprint(questions), "window": estimator.window, "repeats": estimator.repeats,
           "max_tokens": estimator.max_tokens, "seed": config.seed}  # fmt: skip
    cache = RankingCache.open(cache_folder() / "rankings", key)
    prompts = load_prompts(config.prompts.file, config.reward.name)
    with session.progress.phase(f"ranking by {name}") as advance:
        asked = self_ranking(
            questions, session.team.seats[name], prompts, estimator, seed=config.seed, cache=cache, on_done=advance
        )
        return asyncio.run(asked)
