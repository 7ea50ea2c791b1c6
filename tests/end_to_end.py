"""Whole runs on tiny random models of two families and vocabularies, for the tests of `train`, of resuming and the CLI.

    models = save_models(folder)                     # folder/ada (Llama, ChatML), folder/bob (Gemma 3, no template)
    config = write_config(folder, models, steps=2)   # a YAML file, with questions beside it
    assert main(["train", str(config)]) == 0
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=4096,
)  # fmt: skip
# Where runs are compared bit for bit, these say how long they took.
TIMINGS = ("seconds", "tokens_per_second", "memory_peak_gib")


def save_models(folder: Path) -> Path:
    """Two models that often answer with a digit, so that rewards differ within a group."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    ada = _tokenizer(bytes_, [], ["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
    ada.chat_template = CHATML
    llama = transformers.LlamaConfig(vocab_size=len(ada), **SIZES, tie_word_embeddings=False, eos_token_id=257)
    _save(folder / "ada", llama, ada, seed=1)
    merges = [(a, b) for a in "aehinorst" for b in "aehinorst"]
    bob = _tokenizer(bytes_[::-1], merges, ["<bos>", "<eos>"], bos_token="<bos>", eos_token="<eos>")
    gemma = transformers.Gemma3TextConfig(
        vocab_size=len(bob), **SIZES, sliding_window=64, layer_types=["sliding_attention", "full_attention"],
        bos_token_id=len(bob) - 2, eos_token_id=len(bob) - 1, pad_token_id=0,
    )  # fmt: skip
    _save(folder / "bob", gemma, bob, seed=2)
    return folder


def _tokenizer(
    alphabet: Sequence[str], merges: list[tuple[str, str]], special: list[str], **named: str
) -> transformers.PreTrainedTokenizerFast:
    pieces = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def _save(folder: Path, config: Any, tokenizer: Any, seed: int) -> None:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    digits = [tokenizer.convert_tokens_to_ids(d) for d in "0123456789"]
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[[*digits, tokenizer.eos_token_id]] = torch.randn(11, head.shape[1]) * 0.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_questions(folder: Path) -> dict[str, str]:
    """Three JSONL files of sums of one digit that share none; their paths by split."""
    pairs = [(a, b) for a in range(10) for b in range(10 - a)]
    rows = [{"id": f"q{a}{b}", "question": f"{a} + {b}?", "answer": str(a + b)} for a, b in pairs]
    parts = {"train": rows[:30], "validation": rows[30:36], "test": rows[36:44]}
    paths = {}
    for part, questions in parts.items():
        paths[part] = str(folder / f"{part}.jsonl")
        Path(paths[part]).write_text("".join(json.dumps(row) + "\n" for row in questions))
    return paths


def tree(folder: Path, models_: Path, **changes: Any) -> dict[str, Any]:
    """The config of a short run as a YAML tree; `changes` by dotted path, `__` for the dot, None to leave a key out."""
    optimizer = {"lr": 1e-4}
    made: dict[str, Any] = {
        "run": str(folder / "run"), "steps": 3, "deterministic": True, "threads": 1,
        "agents": {"ada": {"model": str(models_ / "ada"), "optimizer": optimizer},
                   "bob": {"model": str(models_ / "bob"), "optimizer": optimizer, "chat_template": "plain"}},
        "data": write_questions(folder),
        "prompts": {"file": "short"},
        "rollout": {"questions": 2, "samples": 3, "max_tokens": 2, "peer_tokens": 4},
        "difficulty": {"estimator": "pass_rate", "samples": 2},
        "reward": {"name": "number"},
        "checkpoint": {"every": 1},
    }  # fmt: skip
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = made
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is None:
            node.pop(last, None)
        else:
            node[last] = copy.deepcopy(value)
    return made


def write_config(folder: Path, models_: Path, **changes: Any) -> Path:
    """Writes `tree` to folder/config.yaml."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(tree(folder, models_, **changes), sort_keys=False))
    return file


def agent(models_: Path, name: str = "ada", **keys: Any) -> dict[str, Any]:
    """One agent's part of the config."""
    template = {"chat_template": "plain"} if name == "bob" else {}
    return {"model": str(models_ / name), "optimizer": {"lr": 1e-4}, **template, **keys}


def read_rows(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The rows of a JSONL file of a run; none where it is not there."""
    file = run / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def without_timings(value: Any) -> Any:
    """A row without what says how long something took."""
    if isinstance(value, dict):
        return {k: without_timings(v) for k, v in value.items() if k not in TIMINGS}
    return value


def said_in(run: Path, step: int) -> Any:
    """A step's dialogues without their log-probs, whose last bits depend on what else was in a batch."""
    return _without_floats(read_rows(run, f"dialogues/step_{step:06d}.jsonl"))


def _without_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_floats(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_without_floats(v) for v in value]
    return None if isinstance(value, float) else value


def weights_of(run: Path, step: int, name: str) -> bytes:
    """The bytes of an agent's weights in a checkpoint."""
    (file,) = (run / "checkpoints" / f"step_{step:06d}" / name).glob("*.safetensors")
    return file.read_bytes()


def start(*arguments: str) -> Any:
    """Runs the command line in a process of its own; a fork server loads the libraries once."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ilr_fast.train", "ilr_fast.hosts.local", "ilr_fast.cli", "transformers"])
    process = context.Process(target=_run, args=arguments)
    process.start()
    return process


def _run(*arguments: str) -> None:
    from ilr_fast.cli import main

    raise SystemExit(main(list(arguments)))
