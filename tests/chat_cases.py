"""Small tokenizers, trained here, and the templates of several families, for the tests of dialogues."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "Which number is the largest: 436, 760, 20? Answer: 760\nQuestion: what is 12 + 7?\nAnswer: 19",
    "user system assistant model header start end of turn im id Peer 1 said:\n> 760\n\nYou are right. Be brief.",
] * 20

CHATML = """{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
You are helpful.<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA3 = """{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

# earlier thinking is left out, and the answer after the last user message gets an empty one
QWEN3 = """{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}\
{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role != 'assistant' %}\
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% else %}{% set said = m.content.split('</think>')[-1].lstrip('\\n') %}<|im_start|>assistant
{% if loop.index0 > ns.last %}<think>

</think>

{% endif %}{{ said }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}\
{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

# turns marked by plain text, closed by a special token
LLAMA2 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]\
{% elif m.role == 'assistant' %} {{ m.content }}</s>\
{% else %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}"""

# turns marked by plain text alone
ALPACA = """{% for m in messages %}### {{ 'Instruction' if m.role == 'user' else 'Response' }}:
{{ m.content }}

{% endfor %}{% if add_generation_prompt %}### Response:
{% endif %}"""


def byte_level(specials: list[str], plain_added: tuple[str, ...] = (), **names: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as of GPT-2, SmolLM2, Llama 3 and Qwen; `plain_added` are added but not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=380, special_tokens=specials, **options))
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain_added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def sentencepiece(specials: list[str], plain_added: tuple[str, ...] = (), prefix: bool = False, **names: str) -> Any:
    """SentencePiece BPE, bytes for unknown characters, <bos> before every text; `prefix`: a space too (Llama 2).

    Line breaks in a row are added tokens that are not special, as in Gemma.
    """
    special = ["<unk>", *specials]
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # no piece crosses a space
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*special, *bytes_], show_progress=False)
    tokenizer.train_from_iterator([line for text in TEXT for line in text.split("\n")], trainer)
    tokenizer = Tokenizer(tokenizer.model)
    if prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    breaks = () if prefix else ("\n", "\n\n")
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in (*breaks, *plain_added)])
    bos = names["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **names)


def families() -> dict[str, tuple[Any, str]]:
    """By name, a tokenizer and the template that belongs to it."""
    chatml = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    headers = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    smollm = byte_level(chatml, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>")
    llama3 = byte_level(headers, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    qwen = byte_level(chatml, ("<think>", "</think>"), eos_token="<|im_end|>", pad_token="<|endoftext|>")
    turns = ["<start_of_turn>", "<end_of_turn>"]
    gemma = sentencepiece(["<bos>", "<eos>", *turns], bos_token="<bos>", eos_token="<eos>")
    # as in a GGUF file: added, but not called special
    gemma_gguf = sentencepiece(["<bos>", "<eos>"], tuple(turns), bos_token="<bos>", eos_token="<eos>")
    llama2 = sentencepiece(["<s>", "</s>"], prefix=True, bos_token="<s>", eos_token="</s>")
    return {
        "chatml": (smollm, CHATML),
        "llama3": (llama3, LLAMA3),
        "qwen3": (qwen, QWEN3),
        "gemma": (gemma, GEMMA),
        "gemma_gguf": (gemma_gguf, GEMMA),
        "llama2": (llama2, LLAMA2),
        "plain_byte_level": (smollm, "plain"),
        "plain_sentencepiece": (gemma, "plain"),
        "alpaca": (smollm, ALPACA),
    }
