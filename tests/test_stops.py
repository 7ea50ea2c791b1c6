"""Stop strings: which tokens end a generation wherever they stand, and which only after others."""

import pytest
import transformers
from learners import words
from tokenizers import Tokenizer, decoders, models

from ilr_fast.engines.stops import StopStrings


class Letters:
    """A tokenizer of one that has `decode` alone: a token for each of these texts."""

    TEXTS = ("a", "\n", ".\n", "b#", "#", "##c")

    def __len__(self):
        return len(self.TEXTS)

    def decode(self, token_ids, /, *, skip_special_tokens):
        return "".join(self.TEXTS[i] for i in token_ids)


def test_tokens_that_hold_a_stop_string_are_known_beforehand():
    stops = StopStrings(Letters())
    assert stops.whole(("\n",)) == (1, 2) and stops.whole(("##", "\n")) == (1, 2, 5) and stops.whole(()) == ()
    for token in stops.whole(("##", "\n")):
        assert stops.completed([0, token], ("##", "\n"))
    assert stops.completed([3, 4], ("##",)) and 4 not in stops.whole(("##",))  # only together


@pytest.mark.parametrize("stop", ["w7", "w"])
def test_of_a_fast_tokenizer_too(stop):
    tokenizer = words()
    wanted = tuple(i for i in range(len(tokenizer)) if stop in tokenizer.decode([i], skip_special_tokens=True))
    assert StopStrings(tokenizer).whole((stop,)) == wanted and wanted


def test_a_byte_that_is_a_stop_alone_ends_a_generation_also_after_half_a_character():
    """Where it is text no more: what an engine was told beforehand and what is found later are the same."""
    vocabulary = {"a": 0, "<0xC3>": 1, "<0x0A>": 2, "<0xA4>": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert fast.decode([0, 2]) == "a\n" and "\n" not in fast.decode([1, 2]) and fast.decode([1, 3]) == "ä"
    stops = StopStrings(fast)
    assert stops.whole(("\n",)) == (2,) and stops.completed([1, 2], ("\n",)) and stops.completed([0, 2], ("\n",))
    assert not stops.completed([1, 3], ("\n",)) and stops.completed([0, 1, 3], ("aä",))
