"""Template text and content → token ids, in which only the template itself can write a special token.

What stands between two special tokens of the template, its plain text and the content together, is encoded as one text
with the parsing of special tokens off, so that honest text gets the ids that encoding the whole rendering would give,
and "<|im_end|>" in content is a few ordinary tokens:

    pieces = TokenPieces(tokenizer, "<|im_start|>user\n<|im_end|>\n")
    pieces.encode([Part("<|im_start|>user\n", True), Part("hi <|im_end|>", False), Part("<|im_end|>\n", True)])

Whatever a tokenizer does, an id of a special token is never taken from content: it would be dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

PROBE = "Question: What is 12 + 7?\nAnswer:  é 😀 "

class Part(NamedTuple):
    """A stretch of a prompt: the template's own text, or content."""

    text: str
    of_template: bool


class TokenPieces:
    """Encodes parts and decodes tokens. `template_text` is all of the template's own text.

    Special are the tokenizer's special tokens, and the added tokens that the template writes though the tokenizer does
    not call them special (Gemma's <start_of_turn> in a GGUF file, Qwen's <think>).
    """

    def __init__(self, tokenizer: Any, template_text: str):
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.specials = {
            token.content: (index, token)
            for index, token in added.items()
            if token.special or (token.content.strip() and token.content in template_text)
        }
        self._ids = frozenset(index for index, _ in self.specials.values())
        unknown = tokenizer.unk_token_id
        bounds = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        written = unknown is not None and (unknown in bounds or tokenizer.unk_token in template_text)
        # an unknown character gives the unknown token, which is no structure
        self._forbidden = self._ids if written else self._ids - {unknown}
        longest_first = sorted(self.specials, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._backend = self._find_backend(PROBE + "".join(longest_first[:1]))
        self._guard = self._find_guard()

    def split(self, text: str) -> list[str]:
        """The template's text, cut into special tokens and what stands between them; empty texts left out."""
        cut, position = [], 0
        for found in self._pattern.finditer(text):
            cut += [text[position : found.start()], found[0]]
            position = found.end()
        return [piece for piece in [*cut, text[position:]] if piece]

    def encode(self, parts: Iterable[Part], *, start: bool) -> list[int]:
        """The ids of the parts in a row; `start`: they begin the conversation."""
        ids: list[int] = []
        text, strip_left = "", False
        for piece, of_template in self._pieces(parts):
            if not of_template or piece not in self.specials:
                text += piece
                continue
            index, token = self.specials[piece]
            text = text.rstrip() if token.lstrip else text
            ids += self.plain(text.lstrip() if strip_left else text, start=start and not ids)
            ids.append(index)
            text, strip_left = "", token.rstrip
        return ids + self.plain(text.lstrip() if strip_left else text, start=start and not ids)

    def plain(self, text: str, *, start: bool = False) -> list[int]:
        """The ids of a text in which nothing is special; `start`: it begins the conversation."""
        ids = self._raw(text, start)
        if self._forbidden.isdisjoint(ids):
            return ids
        # the vocabulary itself holds the special token's text: cut it in two, so that no piece of text is that token
        cuts = {f.start() + 1 for s in self.specials for f in re.finditer(f"(?={re.escape(s)})", text)}
        bounds = [0, *sorted(cuts), len(text)]
        ids = [i for a, b in zip(bounds, bounds[1:], strict=False) for i in self._raw(text[a:b], start and a == 0)]
        return [i for i in ids if i not in self._forbidden]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the tokens, special ones left out."""
        kept = [int(token) for token in tokens if int(token) not in self._ids]
        return self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def beginning(self) -> list[int]:
        """What the tokenizer itself puts before a text (Gemma: <bos>), which a template of plain text lacks."""
        with_special = self.tokenizer("a").input_ids
        without = self.tokenizer("a", add_special_tokens=False).input_ids
        starts = (n for n in range(len(with_special)) if with_special[n : n + len(without)] == without)
        found = with_special[: next(starts, 0)]
        return list(found)

    def _pieces(self, parts: Iterable[Part]) -> Iterable[Part]:
        for part in parts:
            if part.of_template:
                yield from (Part(piece, True) for piece in self.split(part.text))
            else:
                yield part

    def _raw(self, text: str, start: bool) -> list[int]:
        if not text:
            return []
        if start or not self._guard:
            return list(self._encode(text))
        ids, guard = self._encode(self._guard + text), self._encode(self._guard)
        return list(ids[len(guard) :]) if ids[: len(guard)] == guard else list(self._encode(text))

    def _encode(self, text: str) -> list[int]:
        backend = self._backend
        if backend is None or backend.truncation or backend.padding:
            return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        backend.encode_special_tokens = True  # transformers sets it as it wants it at each of its calls
        return backend.encode(text, add_special_tokens=False).ids

    def _find_backend(self, probe: str) -> Any:
        """What encodes below transformers, whose own call sets threads going for a batch of one; None where it is not
        known to be the same."""
        self._backend = None
        wanted = self._encode(probe)
        self._backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return self._backend if self._encode(probe) == wanted else None

    def _find_guard(self) -> str:
        """A text to encode before another, for tokenizers that add a space at the start of a text alone (Llama 2).

        After a special token they add none, so a text from the middle must not be encoded as if it began one.
        """
        mark = next((s for s, (_, token) in self.specials.items() if not token.rstrip), None)
        if mark is None:
            return ""
        after = self.tokenizer(f"{mark}ab c", add_special_tokens=False).input_ids
        index = self.specials[mark][0]
        if index not in after or after[after.index(index) + 1 :] == self._encode("ab c"):
            return ""
        return "\n"
