"""The two real small models against llama.cpp: tokens, and the greedy text that it computes from the same GGUF files
with their weights dequantized to float32.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ilr_fast.models import cache_folder, get_model

pytestmark = pytest.mark.models


def real(name: str) -> Path:
    folder = cache_folder() / "models" / name
    if not (folder / "manifest.json").exists():
        pytest.skip(f"{name} is not in the cache: ilr-fast get-model {name}")
    return get_model(name)


@functools.lru_cache(maxsize=1)
def loaded(name: str):
    folder = real(name)
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()


GREEDY = {
    ("smollm2-135m-instruct", "The capital of France is"): " Paris.\n\nThe answer is: 2018-01-22 12:1",
    ("smollm2-135m-instruct", None): "The capital of France is Paris.",
    ("gemma-3-270m", "The capital of France is"): " the capital of the country of France. It is the largest cit",
    ("gemma-3-270m", "12 + 7 = 19\n5 + 8 ="): " 13\n10 + 11 = 19\n12 + 10 = 1",
}


@pytest.mark.parametrize(("name", "prompt"), GREEDY)
def test_real_models_continue_as_in_llama_cpp(name, prompt):
    tokenizer, model = loaded(name)
    text = prompt or "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    generated = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(generated, skip_special_tokens=True).startswith(GREEDY[name, prompt])


def test_real_smollm2_tokens():
    tokenizer = AutoTokenizer.from_pretrained(real("smollm2-135m-instruct"))
    assert tokenizer.convert_ids_to_tokens(tokenizer("x   1  2").input_ids) == ["x", "ĠĠĠ", "1", "ĠĠ", "2"]
    assert tokenizer("<|im_start|>user").input_ids[0] == 1
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    message = {"role": "user", "content": "Hi"}
    turn = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert turn.startswith("<|im_start|>system\n") and turn.endswith("Hi<|im_end|>\n<|im_start|>assistant\n")


def test_real_gemma_config_and_tokens():
    folder = real("gemma-3-270m")
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (640, 18, 4)
    assert (config.num_key_value_heads, config.head_dim, config.intermediate_size) == (1, 256, 2048)
    assert (config.vocab_size, config.sliding_window, config.query_pre_attn_scalar) == (262144, 512, 256)
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [5, 11, 17]
    thetas = {kind: rope["rope_theta"] for kind, rope in config.rope_parameters.items()}
    assert thetas == {"full_attention": 1e6, "sliding_attention": 1e4}
    ids = tokenizer("<start_of_turn>user\n  x = 12<end_of_turn>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<bos>", "<start_of_turn>", "user", "\n", "▁▁", "x", "▁=", "▁", "1", "2", "<end_of_turn>",
    ]  # fmt: skip
    assert len(tokenizer) == 262144 and tokenizer.chat_template is None
