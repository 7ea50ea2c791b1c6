"""Small random models of the families that vLLM's CPU attention can run (its heads are 32 wide at the least).

    model = small_model("qwen3", tied=False)
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = dict(
    vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, max_position_embeddings=256, pad_token_id=0, eos_token_id=1,
)  # fmt: skip
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
# By family: transformers' config, what it needs beside the sizes; its name in docs/engines.md and what is particular.
FAMILIES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "llama": (transformers.LlamaConfig, {}, "Llama, SmolLM2 | fused projections"),
    "llama3": (transformers.LlamaConfig, dict(rope_parameters=LLAMA3_ROPE), "Llama 3.x | scaled RoPE"),
    "qwen2": (transformers.Qwen2Config, {}, "Qwen 2, 2.5 | biases of q, k, v"),
    "qwen3": (transformers.Qwen3Config, {}, "Qwen 3 | norms of q and k"),
    "gemma2": (
        transformers.Gemma2Config,
        dict(sliding_window=40, layer_types=SLIDING, attn_logit_softcapping=1.5, final_logit_softcapping=3.0),
        "Gemma 2 | soft-capped logits, sliding window",
    ),
    "gemma3": (transformers.Gemma3TextConfig, dict(sliding_window=40, layer_types=SLIDING), "Gemma 3 | sliding window"),
    "smollm3": (
        transformers.SmolLM3Config,
        dict(no_rope_layers=[1, 0, 1]),
        "SmolLM3 | layers without RoPE; vLLM runs transformers' own modules",
    ),
    "mistral": (transformers.MistralConfig, dict(sliding_window=None), "Mistral | as Llama"),
}


def small_model(family: str, *, tied: bool = False, **changes: Any) -> Any:
    """Random weights of a scale that gives log-probs of some nats, in float32 and eval mode."""
    kind, extra, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = kind(**{**SIZES, **extra, "tie_word_embeddings": tied, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()
