"""A GGUF file's vocabulary → a fast tokenizer with the pipeline that its model was trained with.

Two kinds: byte-level BPE (`gpt2` with the pre-tokenizer `smollm`: each digit alone) and SentencePiece BPE (`llama`:
spaces as ▁, bytes for unknown characters). A SentencePiece vocabulary has scores and no merges: every split of a piece
into two pieces is a merge, ranked by the piece's score. GGUF gives all added pieces (runs of spaces, line breaks) one
low score, but the model's tokenizer puts them first: "  x" is "▁▁", "x" and not "▁", "▁x".
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_CONTROL, _USER_DEFINED = 3, 4  # GGUF's token types
_NO_LIMIT = int(1e30)  # what Hugging Face writes where a tokenizer itself has no limit


def byte_level_tokenizer(meta: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of SmolLM2: GPT-2's byte-level BPE with every digit a token of its own."""
    if meta["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(f"no conversion for the pre-tokenizer {meta['tokenizer.ggml.pre']!r}")
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _wrapped(tokenizer, meta, tokens)


def sentencepiece_tokenizer(meta: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of Gemma 3: SentencePiece BPE with byte fallback; <bos> stands before every text."""
    types = meta["tokenizer.ggml.token_type"]
    added = {i for i, kind in enumerate(types) if kind == _USER_DEFINED}
    # GGUF writes the runs of spaces as spaces; the normalizer has turned them into ▁ before the merges see them
    tokens = [t.replace(" ", "▁") if i in added else t for i, t in enumerate(meta["tokenizer.ggml.tokens"])]
    scores = [0.0 if i in added else score for i, score in enumerate(meta["tokenizer.ggml.scores"])]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = _merges(vocab, scores, {t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL})
    unknown = tokens[meta["tokenizer.ggml.unknown_token_id"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bos_id = meta["tokenizer.ggml.bos_token_id"]
    bos = tokens[bos_id]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )
    return _wrapped(tokenizer, meta, tokens)


def _merges(vocab: dict[str, int], scores: list[float], control: set[str]) -> list[tuple[str, str]]:
    """All splits of each piece into two pieces, best score first; equal scores by the pieces' numbers."""
    ranked = sorted((token for token in vocab if token not in control), key=lambda t: (-scores[vocab[t]], vocab[t]))
    merges = []
    for token in ranked:
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        merges += sorted((vocab[a], vocab[b], a, b) for a, b in splits if a in vocab and b in vocab)
    return [(a, b) for _, _, a, b in merges]


def _wrapped(tokenizer: Tokenizer, meta: dict[str, Any], tokens: list[str]) -> PreTrainedTokenizerFast:
    kinds = list(zip(tokens, meta["tokenizer.ggml.token_type"], strict=True))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in kinds if k == _CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in kinds if k == _USER_DEFINED])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=meta.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=_NO_LIMIT,
        **{key: tokens[meta[f"tokenizer.ggml.{name}_token_id"]] for key, name in names.items()},
    )
