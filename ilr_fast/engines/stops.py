"""Stop strings, also those that span tokens, checked cheaply at every token.

A stop string can only be completed by a token whose own text holds the string's last character (or half a character,
which decodes to U+FFFD). Only then is the end of the generation decoded, and only if that shows a stop string the whole
of it. Tokens that hold a whole stop string can be told to an engine beforehand (`whole`), as a line's end can: they end
a generation wherever they stand, also where bytes before them make another text of them.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, Protocol

HALF = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """What the engine needs of a tokenizer."""

    def decode(self, token_ids: Sequence[int], /, *, skip_special_tokens: bool) -> str: ...


class StopStrings:
    """Stop-string checks for one tokenizer, with a memory of its tokens' texts."""

    def __init__(self, tokenizer: Decoder):
        self._tokenizer = tokenizer
        self._pieces: dict[int, tuple[str, str]] = {}
        self._whole: dict[tuple[str, ...], tuple[int, ...]] = {}

    def text(self, tokens: Sequence[int]) -> str:
        """The text without special tokens."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def before_stop(self, tokens: Sequence[int], stop: Sequence[str]) -> str:
        """The text up to the first stop string in it."""
        text = self.text(tokens)
        return text[: min((place for s in stop if (place := text.find(s)) >= 0), default=len(text))]

    def whole(self, stop: Sequence[str]) -> tuple[int, ...]:
        """The tokens whose own text holds a stop string, so that they end a generation wherever they stand."""
        asked = tuple(stop)
        if asked not in self._whole:
            texts = _texts(self._tokenizer) if asked else ()
            self._whole[asked] = tuple(i for i, text in enumerate(texts) if any(s in text for s in asked))
        return self._whole[asked]

    def completed(self, tokens: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether the last of `tokens` completes one of the stop strings, or holds one by itself."""
        alone, piece = self._piece(tokens[-1])
        if any(s in alone for s in stop):
            return True
        if HALF not in piece and not any(s[-1] in piece for s in stop):
            return False
        tail = self.text(tokens[-(4 * max(map(len, stop)) + 16) :])  # a character takes at most four tokens
        if not any(s in tail for s in stop):
            return False
        text = self.text(tokens)
        return any(s in text for s in stop)

    def first_end(self, tokens: Sequence[int], known: int, stop: Sequence[str], but: Container[int]) -> int | None:
        """How many tokens there are when a stop string is completed, beyond the first `known`, which complete none, and
        by none of `but`; None where none is."""
        for end in range(known + 1, len(tokens) + 1):
            if tokens[end - 1] not in but and self.completed(tokens[:end], stop):
                return end
        return None

    def _piece(self, token: int) -> tuple[str, str]:
        """A token's text, alone and beside itself: decoders drop a space at the very beginning."""
        if token not in self._pieces:
            once = self.text([token])
            self._pieces[token] = once, once + self.text([token, token])
        return self._pieces[token]


def _texts(tokenizer: Any) -> Sequence[str]:
    """Each token's text, of a quarter of a million in a second."""
    alone = [[token] for token in range(len(tokenizer))]
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        return list(backend.decode_batch(alone, skip_special_tokens=True))
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in alone]
