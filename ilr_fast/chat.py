"""Messages → token pieces of one conversation, whatever the template.

A conversation is `first(messages)`, the agent's sampled tokens, `follow(message, …)`, its sampled tokens, and so on:
the sampled tokens stand as the engine made them, and only what is between them is rendered. What the template puts
there is found by rendering it with marked contents and cutting at the marks:

    chat = ChatFormat(tokenizer, "plain")
    chat.first([Message("user", "1+1?")])              # "Question: 1+1?\\nAnswer:"
    chat.follow("Are you sure?", "stop", sampled)      # "Question: Are you sure?\\nAnswer:"

Contents are data: only the template writes special tokens (tokenpieces.py), and where its turns are marked by plain
text, the marks are kept out of contents (quoting.py).
"""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from ilr_fast.errors import UserError
from ilr_fast.quoting import RoleMarks, one_newline
from ilr_fast.tokenpieces import Part, TokenPieces
from ilr_fast.types import FinishReason, Message, Role

PLAIN = """\
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ 'Question: ' + message.content + '\\nAnswer:' }}
{%- elif message.role == 'assistant' -%}{{ ' ' + message.content + '\\n' }}
{%- else -%}{{ message.content + '\\n' }}
{%- endif -%}
{%- endfor -%}"""


class ChatFormat:
    """One agent's chat format.

    `template`: None for the tokenizer's own, `plain` for Question/Answer texts (base models; a turn ends with its
    line), a Jinja text, or the path of one. `where` names the config key in errors. Raises UserError for a missing or
    broken one.

    `stop_tokens`: ids that end a turn (the template's and the tokenizer's own). `stop_strings`: texts that do.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, *, where: str = "chat_template"):
        self.tokenizer, self._where = tokenizer, where
        self._template = _load_template(tokenizer, template, where)
        self._skeletons: dict[tuple[tuple[Role, ...], bool], list[str] | None] = {}
        self._last_first: tuple[tuple[Message, ...], tuple[int, ...]] | None = None
        shown = self._skeleton(("user", "assistant", "user"))
        if shown is None:
            raise self._broken("it must show a user's, an assistant's and a user's message once each, in their order")
        self._between, self._after = shown[2], shown[3]
        self._has_system = self._skeleton(("system", "user")) is not None
        written = shown + (self._skeleton(("system", "user")) or [])
        self._pieces = TokenPieces(tokenizer, "\0".join(written))
        self._beginning = [] if template is None else self._missing_beginning(shown[0])
        self._closing, self._close_id = self._find_closing()
        eos = tokenizer.eos_token_id
        self.stop_tokens: tuple[int, ...] = tuple(dict.fromkeys(i for i in (self._close_id, eos) if i is not None))
        self.stop_strings: tuple[str, ...] = (self._closing,) if self._closing and self._close_id is None else ()
        marks = [self._without_specials(text) for text in written]
        self._marks = RoleMarks(marks, all_marks=self._close_id is None)

    def first(self, messages: Sequence[Message]) -> list[int]:
        """The tokens up to the agent's first turn: system, worked examples, first user message, generation prompt."""
        asked = tuple(messages)
        if self._last_first is None or asked != self._last_first[0]:  # all samples of a question begin with the same
            self._last_first = asked, tuple(self._first(asked))
        return list(self._last_first[1])

    def _first(self, messages: Sequence[Message]) -> list[int]:
        messages = self._fold_system(messages)
        skeleton = self._skeleton(tuple(m.role for m in messages))
        if skeleton is None:
            raise self._broken(f"it can't show messages of the roles {', '.join(m.role for m in messages)}")
        parts = [Part(skeleton[0], True)]
        for message, text in zip(messages, skeleton[1:], strict=True):
            parts += [Part(self._content(message.content), False), Part(text, True)]
        return self._beginning + self._pieces.encode(parts, start=True)

    def follow(self, message: str, finish: FinishReason, sampled: Sequence[int] | None = None) -> list[int]:
        """What is appended after the agent's own turn: the rest of its closing, the user's message, the next prompt.

        `sampled` are the turn's tokens; with them a turn that ended otherwise than by the template's own end of turn
        (by another stop token or stop string) is closed too. Without them `finish` alone decides.
        """
        closed = finish == "stop" if sampled is None else self._is_closed(sampled)
        between = self._between[len(self._closed_by()) :] if closed else self._between
        parts = [Part(between, True), Part(self._content(message), False), Part(self._after, True)]
        return self._pieces.encode(parts, start=False)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special tokens and the template's marks."""
        return self._pieces.decode(tokens)

    def tokens(self, text: str) -> list[int]:
        """The ids of a text as content: nothing in it is special."""
        return self._pieces.plain(text)

    def tail(self, text: str, limit: int) -> str:
        """The text's last `limit` tokens, as text; the whole text where it is no longer."""
        if len(text) <= limit:  # a token is a character or more
            return text
        ids = self.tokens(text)
        return text if len(ids) <= limit else self.text(ids[-limit:]).lstrip("\ufffd")

    def rewrites_earlier_turns(self) -> bool:
        """Whether the template shows an earlier turn otherwise than it was sampled (Qwen3 leaves out its thinking).

        Compared without white space: what stands between two turns may differ from a rendering in that.
        """
        return any(self._rewrites(answer) for answer in ("fine", "<think>\nhm\n</think>\n\nfine"))

    def _rewrites(self, answer: str) -> bool:
        said = Message("assistant", answer)
        turns = [Message("user", "u0"), said, Message("user", "u1"), said, Message("user", "u2")]
        shown = ""
        for length in (1, 3, 5):
            rendering = "".join(self._render(turns[:length], True).split())
            if not rendering.startswith(shown):
                return True
            shown = rendering + "".join(answer.split())
        return False

    def _content(self, content: str) -> str:
        return self._marks.keep_out(one_newline(content).strip())

    def _is_closed(self, sampled: Sequence[int]) -> bool:
        if self._close_id is not None:
            return bool(sampled) and sampled[-1] == self._close_id
        return bool(self._closing) and self._closing in self.text(sampled)

    def _closed_by(self) -> str:
        """The start of the text between two turns that a closed turn already holds."""
        if self._close_id is None:
            return self._closing
        pieces = self._pieces.split(self._closing)
        end = next(n for n, piece in enumerate(pieces) if piece in self._pieces.specials)
        return "".join(pieces[: end + 1])

    def _find_closing(self) -> tuple[str, int | None]:
        """How a turn ends: the closing text, and its special token if it has one.

        The closing is what follows the turn at the end of a conversation and in its middle alike. Where that is nothing
        but white space, the turn ends where the next one is announced; only `plain` ends with its line.
        """
        if self._template == PLAIN:
            return "\n", None
        ended = self._skeleton(("user", "assistant"), prompt=False)
        closing = os.path.commonprefix([ended[2], self._between]) if ended else ""
        closing = closing if closing.strip() else self._between.rstrip()
        specials = self._pieces.specials
        return closing, next((specials[p][0] for p in self._pieces.split(closing) if p in specials), None)

    def _missing_beginning(self, text: str) -> list[int]:
        """What the tokenizer puts at the start of every text and a template that was given to it does not write."""
        beginning = self._pieces.beginning()
        written = self._pieces.encode([Part(text, True)], start=True)
        return [] if written[: len(beginning)] == beginning else beginning

    def _without_specials(self, text: str) -> str:
        return "\0".join(p for p in self._pieces.split(text) if p not in self._pieces.specials)

    def _fold_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        """A system message becomes the head of the first user message where the template knows no system role."""
        if self._has_system or not messages or messages[0].role != "system":
            return messages
        system, user, *rest = messages
        return [Message("user", f"{system.content.strip()}\n\n{user.content}"), *rest]

    def _skeleton(self, roles: tuple[Role, ...], prompt: bool = True) -> list[str] | None:
        """The template's texts before, between and after the contents; None where it can't show these roles."""
        if (roles, prompt) not in self._skeletons:
            marks = [f'zq{n}<"&>qz' for n in range(len(roles))]
            messages = [Message(role, mark) for role, mark in zip(roles, marks, strict=True)]
            try:
                self._skeletons[roles, prompt] = _cut(self._render(messages, prompt), marks)
            except TemplateSyntaxError as error:
                raise self._broken(f"{error.message} (line {error.lineno})") from None
            except (TemplateError, TypeError, KeyError, ValueError):  # the template refuses these roles
                self._skeletons[roles, prompt] = None
        return self._skeletons[roles, prompt]

    def _render(self, messages: Sequence[Message], prompt: bool) -> str:
        plain = [{"role": m.role, "content": m.content} for m in messages]
        return self.tokenizer.apply_chat_template(
            plain, chat_template=self._template, tokenize=False, add_generation_prompt=prompt
        )

    def _broken(self, what: str) -> UserError:
        return UserError(f"the chat template can't be used: {what}", self._where, "give another one")


def _load_template(tokenizer: Any, template: str | None, where: str) -> str | None:
    """The Jinja text; None for the tokenizer's own."""
    if template is None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("the model has no chat template, and none is given", where,
                            "set it to `plain` (Question/Answer, for base models) or to a Jinja file")
        return None
    if template == "plain":
        return PLAIN
    if "{{" in template or "{%" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{template!r} can't be read as a template ({error})", where,
                        "give `plain`, a Jinja text, or the path of a Jinja file") from None


def _cut(text: str, marks: Sequence[str]) -> list[str] | None:
    """The text between the marks, if each stands there once and in order."""
    cut, position = [], 0
    for mark in marks:
        found = text.find(mark, position)
        if found < 0 or text.count(mark) != 1:
            return None
        cut.append(text[position:found])
        position = found + len(mark)
    return [*cut, text[position:]]
