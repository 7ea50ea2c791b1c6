"""Tiny random models as GGUF files, written the way llama.cpp's converter writes the real ones."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
}  # fmt: skip
LLAMA_NAMES = NAMES | {"post_attention_layernorm": "ffn_norm"}
GEMMA_NAMES = NAMES | {
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def byte_level_vocabulary(writer, size: int) -> None:
    """SmolLM2's kind: two control tokens, single bytes, and merges that would join digits and spaces."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "ĠĠ", "ĠĠĠ", "12", "Ġ1"]
    tokens += [f"<unused{i}>" for i in range(size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL] * 3 + [NORMAL] * (size - 3))
    writer.add_token_merges(["Ġ Ġ", "ĠĠ Ġ", "1 2", "Ġ 1"])
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    for add, number in ((writer.add_unk_token_id, 0), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2)):
        add(number)
    writer.add_pad_token_id(2)


def sentencepiece_vocabulary(writer, size: int) -> None:
    """Gemma's kind: runs of spaces stand as spaces with the lowest score, as in the real file."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>", "\n", "  ", "   "]
    types = [CONTROL] * 5 + [USER_DEFINED] * 3
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [BYTE] * 256
    pieces = ["▁x", "xy", "▁", "x", "y", "1"]
    scores = [-1000.0] * 264 + [-float(i) for i in range(len(pieces))]
    unused = size - 264 - len(pieces)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens + pieces + [f"<unused{i}>" for i in range(unused)])
    writer.add_token_types(types + [NORMAL] * len(pieces) + [CONTROL] * unused)
    writer.add_token_scores(scores + [-1000.0] * unused)
    writer.add_pad_token_id(0)
    for add, number in ((writer.add_eos_token_id, 1), (writer.add_bos_token_id, 2), (writer.add_unk_token_id, 3)):
        add(number)


def write_gguf(path: Path, model, architecture: str) -> None:
    """`model` as llama.cpp stores it: llama's query and key rows interleaved, Gemma's norms with 1 added."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    if architecture == "llama":
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        byte_level_vocabulary(writer, config.vocab_size)
    else:
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
        sentencepiece_vocabulary(writer, config.vocab_size)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(*stored(name, tensor.numpy().astype(np.float32), config, architecture))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored(name: str, value: np.ndarray, config, architecture: str) -> tuple[str, np.ndarray]:
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if architecture == "gemma3" and "norm" in name:
        value = value + 1
    if name in top:
        return top[name], value
    _, _, layer, rest = name.split(".", 3)
    kind = (LLAMA_NAMES if architecture == "llama" else GEMMA_NAMES)[rest.removesuffix(".weight")]
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if architecture == "llama" and kind in heads:
        rows, columns = value.shape
        value = value.reshape(heads[kind], 2, rows // heads[kind] // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return f"blk.{layer}.{kind}.weight", np.ascontiguousarray(value)


def tiny(architecture: str):
    """A random model with norm weights away from their start, so that a lost norm shows."""
    torch.manual_seed(0)
    shared = dict(
        hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        vocab_size=280, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    if architecture == "llama":
        rope = {"rope_type": "default", "rope_theta": 100_000.0}
        config = LlamaConfig(**shared, num_hidden_layers=2, rms_norm_eps=1e-5, rope_parameters=rope)
    else:
        thetas = {"full_attention": 1e6, "sliding_attention": 1e4}
        rope = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()}
        config = Gemma3TextConfig(
            **shared, num_hidden_layers=7, sliding_window=4, query_pre_attn_scalar=8, rope_parameters=rope,
            layer_types=["full_attention" if i == 5 else "sliding_attention" for i in range(7)],
        )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if "norm" in name else 0.2))
    return model
