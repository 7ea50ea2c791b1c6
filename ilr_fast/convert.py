"""GGUF → Hugging Face folder, for the two architectures of the small models: `llama` and `gemma3`.

    convert_gguf(Path("SmolLM2-135M-Instruct.Q4_1.gguf"), Path("smollm2"))

Weights are dequantized to float32 and stored as such: a block's scale (11 bits) times its integers (up to 8 bits) fits
neither bfloat16 nor float16, float32 holds it exactly. What GGUF stores differently is undone: llama's query and key
rows are interleaved for another rotary layout, Gemma's norm weights have 1 added. The configuration is written from the
file's metadata, and what GGUF leaves to the reader (Gemma's local layers) from the architecture's definition.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ilr_fast.convert_tokenizer import byte_level_tokenizer, sentencepiece_tokenizer

Metadata = dict[str, Any]

_END_OF_TURN = "<end_of_turn>"
_LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_LLAMA_LAYER = _LAYER | {"ffn_norm": "post_attention_layernorm"}
_GEMMA_LAYER = _LAYER | {
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes config, generation config, float32 safetensors and tokenizer of `gguf` into the existing `folder`.

    Raises ValueError for an architecture that is neither llama nor gemma3, or one with tensors that have no place.
    """
    from gguf import GGUFReader  # of the extra `models`

    reader = GGUFReader(gguf)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    architecture = meta["general.architecture"]
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"no conversion for the architecture {architecture!r}; known: {', '.join(_ARCHITECTURES)}")
    config_of, tensor_of, tokenizer_of = _ARCHITECTURES[architecture]
    config = config_of(meta)
    _write_weights(reader, folder / "model.safetensors", lambda name, value: tensor_of(name, value, config))
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config(meta))
    tokenizer_of(meta).save_pretrained(folder)


def _write_weights(reader: Any, path: Path, rename: Callable[[str, np.ndarray], tuple[str, np.ndarray]]) -> None:
    from gguf import dequantize
    from safetensors.numpy import save_file

    tensors = {}
    for tensor in reader.tensors:
        name, value = rename(tensor.name, dequantize(tensor.data, tensor.tensor_type))
        tensors[name] = np.ascontiguousarray(value, dtype=np.float32)
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # it is written for its owner alone otherwise


def _write_json(path: Path, value: Metadata) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _generation_config(meta: Metadata) -> Metadata:
    """Where generation ends: the end of text, and the end of a turn where the vocabulary has one of its own."""
    tokens = meta["tokenizer.ggml.tokens"]
    ends = [meta["tokenizer.ggml.eos_token_id"]]
    if _END_OF_TURN in tokens:
        ends.append(tokens.index(_END_OF_TURN))
    return {**_special_ids(meta), "eos_token_id": ends if len(ends) > 1 else ends[0]}


def _special_ids(meta: Metadata) -> Metadata:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: meta[f"tokenizer.ggml.{name}_token_id"] for key, name in names.items()}


def _shared_config(meta: Metadata, prefix: str) -> Metadata:
    return {
        **_special_ids(meta),
        "dtype": "float32",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,  # neither file holds an output matrix
        "use_cache": True,
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": meta[f"{prefix}.embedding_length"],
        "intermediate_size": meta[f"{prefix}.feed_forward_length"],
        "num_hidden_layers": meta[f"{prefix}.block_count"],
        "num_attention_heads": meta[f"{prefix}.attention.head_count"],
        "num_key_value_heads": meta[f"{prefix}.attention.head_count_kv"],
        "max_position_embeddings": meta[f"{prefix}.context_length"],
        "rms_norm_eps": float(f"{meta[f'{prefix}.attention.layer_norm_rms_epsilon']:.6g}"),  # 1e-6, not its float32
    }


def _llama_config(meta: Metadata) -> Metadata:
    return {
        **_shared_config(meta, "llama"),
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": meta["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "mlp_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
    }


def _gemma_config(meta: Metadata) -> Metadata:
    """Gemma 3 of 270M and 1B: five local layers to one global; local layers rotate with base 10,000."""
    shared = _shared_config(meta, "gemma3")
    layers, head_dim = shared["num_hidden_layers"], meta["gemma3.attention.key_length"]
    rope = {"full_attention": meta["gemma3.rope.freq_base"], "sliding_attention": 10_000.0}
    return {
        **shared,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window": meta["gemma3.attention.sliding_window"],
        "layer_types": ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)],
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in rope.items()},
    }


def _tensor_name(name: str, layer_names: dict[str, str]) -> str:
    top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in top:
        return top[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    kind = rest.removesuffix(".weight")
    if kind not in layer_names:
        raise ValueError(f"no place for the tensor {name!r}")
    return f"model.layers.{block}.{layer_names[kind]}.weight"


def _llama_tensor(name: str, value: np.ndarray, config: Metadata) -> tuple[str, np.ndarray]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for kind, count in heads.items():
        if f".{kind}." in name:  # rows of a head stand as pairs (i, i + half); Hugging Face has the halves apart
            rows, columns = value.shape
            value = value.reshape(count, rows // count // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return _tensor_name(name, _LLAMA_LAYER), value


def _gemma_tensor(name: str, value: np.ndarray, config: Metadata) -> tuple[str, np.ndarray]:
    return _tensor_name(name, _GEMMA_LAYER), value - 1 if name.endswith("norm.weight") else value


_ARCHITECTURES = {
    "llama": (_llama_config, _llama_tensor, byte_level_tokenizer),
    "gemma3": (_gemma_config, _gemma_tensor, sentencepiece_tokenizer),
}
