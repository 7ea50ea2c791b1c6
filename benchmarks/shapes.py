"""True shapes of public models without their weights: folders with a config.json and a tokenizer made on the spot.

    folder = write_shape("meta-llama/Llama-3.1-8B-Instruct", Path("/tmp/shapes"))     # then `random_weights: true`

The numbers are those of the models' own config.json files on the Hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

_LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)  # fmt: skip
# By Hub name: transformers' config class and its sizes.
SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "meta-llama/Llama-3.1-8B-Instruct": (
        transformers.LlamaConfig,
        dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
             rope_parameters=_LLAMA3_ROPE, tie_word_embeddings=False),
    ),
    "Qwen/Qwen2.5-7B-Instruct": (
        transformers.Qwen2Config,
        dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
             num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=32768, tie_word_embeddings=False),
    ),
    "Qwen/Qwen2.5-14B-Instruct": (
        transformers.Qwen2Config,
        dict(vocab_size=152064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=48,
             num_attention_heads=40, num_key_value_heads=8, max_position_embeddings=32768, tie_word_embeddings=False),
    ),
    "Qwen/Qwen2.5-3B-Instruct": (
        transformers.Qwen2Config,
        dict(vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
             num_attention_heads=16, num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True),
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": (
        transformers.Qwen2Config,
        dict(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
             num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True),
    ),
    "meta-llama/Llama-3.2-1B-Instruct": (
        transformers.LlamaConfig,
        dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
             num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=131072,
             rope_parameters=_LLAMA3_ROPE | {"factor": 32.0}, tie_word_embeddings=True),
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        transformers.LlamaConfig,
        dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
             num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True),
    ),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": (
        transformers.LlamaConfig,
        dict(vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24,
             num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=8192, tie_word_embeddings=True),
    ),
}  # fmt: skip


def shape_config(name: str) -> Any:
    """transformers' config of a model by its Hub name."""
    kind, sizes = SHAPES[name]
    return kind(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=None)


def write_shape(name: str, folder: Path) -> Path:
    """`folder`/NAME with config.json and a tokenizer of a word for each id; returns it."""
    return _write(shape_config(name), folder / name)


def _write(config: Any, target: Path) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.save_pretrained(target)
    tokenizer(config.vocab_size).save_pretrained(target)
    return target


def tokenizer(vocabulary: int) -> Any:
    """One word w0, w1 … for each id, but <end> (1), which ends a turn, and <unknown> (2)."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"w{n}" for n in range(vocabulary)]
    words[1:3] = "<end>", "<unknown>"
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unknown>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<unknown>")


def small_config(name: str) -> Any:
    """The same family, small, for a try without a GPU, with heads of 32, the least that vLLM has on the CPU."""
    kind, sizes = SHAPES[name]
    small = dict(vocab_size=997, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2)  # fmt: skip
    return kind(**{**sizes, **small}, bos_token_id=0, eos_token_id=1, pad_token_id=None)


def small_shape(name: str, folder: Path) -> Path:
    """As `write_shape`, for `small_config`."""
    return _write(small_config(name), folder / name)
