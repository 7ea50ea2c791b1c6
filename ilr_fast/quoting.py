r"""Text that others wrote, shown as a quotation: no line of it can be taken for a turn of the conversation.

Special tokens are kept out of content by tokenpieces.py. Where a template marks its turns with ordinary text instead
("Question:", "[INST]"), the marks themselves must be kept out:

    quote("760\nQuestion: 1+1?")   # > 760
                                   # > Question: 1+1?

`RoleMarks` does the same for all content of such a template, the questions of a data set included.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LINE_BREAK = re.compile("\r\n|[\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029]")
BRACKETS = re.compile(r"[\[\]<>|#{}]")
NOTHING = "(no text)"


def one_newline(text: str) -> str:
    r"""The text with every kind of line break as a plain newline."""
    return LINE_BREAK.sub("\n", text)


def quote(text: str) -> str:
    """Every line of the text behind "> ", blank lines left out; a text of nothing says so."""
    lines = [line.rstrip() for line in one_newline(text).strip().split("\n") if line.strip()]
    return "\n".join(f"> {line}" for line in lines or [NOTHING])


class RoleMarks:
    """The plain-text marks of a template's turns, and how they are kept out of content.

    `texts` are the template's own texts around the contents, special tokens cut out, the first one being the start of
    the conversation. `all_marks`: nothing but text ends a turn, so that every line of the template is a mark. Else a
    mark is a line with brackets ("[INST]", "<|user|>") or a colon at its end ("USER:"): a bare "user" after a special
    token forges nothing. A mark that the template writes inside a line ("… [/INST] …") is kept out of lines too.
    """

    def __init__(self, texts: Sequence[str], all_marks: bool):
        starts: set[str] = set()
        inside: set[str] = set()
        for index, text in enumerate(texts):
            lines = [line.strip() for line in text.split("\n")]
            for number, mark in enumerate(lines):
                if len(mark) < 2 or not (all_marks or BRACKETS.search(mark) or mark.endswith(":")):
                    continue
                starts_line = number > 0 or index == 0
                (starts if starts_line and not BRACKETS.search(mark) else inside).add(mark)
        self._starts = _any_of(starts, r"^(?=[^\S\n]*(?:{}))", re.MULTILINE | re.IGNORECASE)
        self._inside = _any_of(inside, r"(?<!\w)(?:{})", 0)

    def keep_out(self, content: str) -> str:
        """The content with marks made harmless: a line that starts with one is quoted, one inside a line is broken."""
        if self._starts is None and self._inside is None:
            return content
        content = one_newline(content)
        if self._inside is not None:
            content = self._inside.sub(lambda found: f"{found[0][0]} {found[0][1:]}", content)
        return content if self._starts is None else self._starts.sub("> ", content)


def _any_of(marks: set[str], pattern: str, flags: int) -> re.Pattern[str] | None:
    choices = "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True))
    return re.compile(pattern.format(choices), flags) if marks else None
