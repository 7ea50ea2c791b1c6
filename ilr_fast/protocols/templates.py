r"""The texts that agents are told, read from one YAML file that a user can replace (`prompts.file`).

    prompts = load_prompts("short", "number")
    prompts.message("single", View(question))

A text holds placeholders in braces: {question}, {answer_form}, {stance}, {peers}, {own}. `\boxed{}` is no placeholder;
`{{answer}}` writes {answer}. `answer_form` and `example` hold a text for each reward and one called `default`; `stance`
holds, for each stage, the words of cooperation, competition and neutrality. What is put in is never read as a template.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ilr_fast.config_parse import read_yaml
from ilr_fast.errors import UserError, nearest
from ilr_fast.protocols.base import View
from ilr_fast.types import Message, Question

FOLDER = Path(__file__).parent / "prompts"
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")
TURN = ("question", "answer_form", "stance", "peers", "own")
STAGES = {"single": ("question", "answer_form"), "sharing": TURN[:3], "analysis": TURN, "fusion": TURN, "debate": TURN}
OTHERS = {"peer": ("name", "text"), "ranking": ("count", "questions"), "ranked_question": ("number", "question")}
TABLES = {"answer_form": (), "example": ("answer", "solution"), "stance": ()}
INTERACTIONS = ("cooperation", "competition", "neutral")


class Prompts:
    """The checked texts of one file for one kind of reward. `texts` are the file's, `where` its path for errors."""

    def __init__(self, texts: Mapping[str, Any], reward: str, where: str):
        _check(texts, where)
        self._texts, self._where = texts, where
        self._answer_form = texts["answer_form"].get(reward, texts["answer_form"]["default"])
        self._example = texts["example"].get(reward, texts["example"]["default"])

    def message(self, key: str, view: View, *, own: str = "", peers: Sequence[str] = ()) -> str:
        """The text `key` (a stage, or one of the file's own) with the question and what the agent sees put in.

        `own` and `peers` are quoted texts, the peers' in their order. UserError where the file has no such text.
        """
        if not isinstance(self._texts.get(key), str):
            raise UserError(f"no text called {key!r}", self._where, nearest(key, self._texts))
        stance = self._texts["stance"].get(key, {}).get(view.interaction, "")
        shown = [fill(self._texts["peer"], name=f"Peer {n}", text=text) for n, text in enumerate(peers, 1)]
        return fill(
            self._texts[key], question=view.question.text.strip(), answer_form=self._answer_form.strip(),
            stance=stance.strip(), own=own, peers="\n".join(shown).strip(),
        )

    def ranking(self, questions: Sequence[Question]) -> str:
        """The request to order the questions, numbered from 1, from the easiest to the hardest."""
        listed = [
            fill(self._texts["ranked_question"], number=str(number), question=question.text.strip())
            for number, question in enumerate(questions, 1)
        ]
        return fill(self._texts["ranking"], count=str(len(questions)), questions="\n".join(listed).strip())

    def worked(self, questions: Sequence[Question]) -> list[Message]:
        """The questions as worked examples: for each, the message of `single` and the answer in the asked form."""
        messages = []
        for question in questions:
            answer = fill(self._example, answer=question.answer.strip(), solution=(question.solution or "").strip())
            messages += [Message("user", self.message("single", View(question))), Message("assistant", answer)]
        return messages


@lru_cache(maxsize=256)  # all samples of a question ask the same
def fill(text: str, /, **values: str) -> str:
    """The text with its placeholders filled, in one pass; one that is empty leaves no blank line or space behind.

    >>> fill("{stance} What is {question}?", stance="", question="1+1")
    'What is 1+1?'
    """
    empty = [name for name, value in values.items() if not value]
    for name in empty:
        text = re.sub(rf"(?<!\{{)\{{{name}\}}[ \t]*", "", text)
    text = re.sub(r"\n{3,}", "\n\n", text).strip("\n")

    def value(found: re.Match[str]) -> str:
        return values[found[1]] if found[1] else found[0][0]

    return PLACEHOLDER.sub(value, text).strip()


def load_prompts(file: str, reward: str) -> Prompts:
    """The prompts of a built-in name or a YAML path, for the reward called `reward`. Raises UserError."""
    builtin = FOLDER / f"{file}.yaml"
    path = builtin if "/" not in file and builtin.exists() else Path(file)
    if not path.exists():
        names = sorted(p.stem for p in FOLDER.glob("*.yaml"))
        remedy = f"{nearest(file, names)}; or give the path of a file"
        raise UserError(f"no prompts called {file!r}, and no such file", "prompts.file", remedy)
    return Prompts(read_yaml(path), reward, str(path))


def _check(texts: Mapping[str, Any], where: str) -> None:
    """UserError for a text that is missing, of the wrong kind, or holds an unknown placeholder; names file and key."""
    for key in (*STAGES, *OTHERS, *TABLES):
        if key not in texts:
            near = difflib.get_close_matches(key, set(texts) - {*STAGES, *OTHERS, *TABLES}, n=1)
            hint = f"rename {near[0]!r}" if near else f"add it; {FOLDER / 'default.yaml'} has them all"
            raise UserError(f"the text {key!r} is missing", where, hint)
    for key, text in texts.items():
        if key not in TABLES:
            _check_text(text, OTHERS.get(key, STAGES.get(key, TURN)), f"{where}: {key}")
    for key in ("answer_form", "example"):
        _check_table(texts[key], ("default",), TABLES[key], f"{where}: {key}")
    for stage, words in _mapping(texts["stance"], f"{where}: stance").items():
        _check_table(words, INTERACTIONS, (), f"{where}: stance.{stage}")


def _check_table(table: Any, required: Sequence[str], placeholders: Sequence[str], where: str) -> None:
    table = _mapping(table, where)
    for key in required:
        if key not in table:
            there = ", ".join(map(repr, table)) or "nothing"
            raise UserError(f"{key!r} is missing", where, f"add it; there is {there}")
    for key, text in table.items():
        _check_text(text, placeholders, f"{where}.{key}")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"expected names with texts, got {value!r}", where, f"see {FOLDER / 'default.yaml'}")
    return value


def _check_text(text: Any, placeholders: Sequence[str], where: str) -> None:
    if not isinstance(text, str):
        raise UserError(f"expected a text, got {text!r}", where, "put it in quotes")
    for found in PLACEHOLDER.finditer(text):
        if found[1] and found[1] not in placeholders:
            hint = nearest(found[1], placeholders) if placeholders else "none can stand here"
            remedy = f"{hint}; for the text itself write {{{found[0]}}}"
            raise UserError(f"unknown placeholder {found[0]}", where, remedy)
