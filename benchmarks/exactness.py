"""How far the trainer's log-probs of sampled tokens are from the engine's, what each measure gains, and what it costs.

    ilr-fast bench exactness        # one NVIDIA GPU with vLLM; about three minutes

A model of Qwen2's 1.5B shape with random weights, its last norm scaled so that tokens have log-probs of some nats.
Requests of 128 tokens each sample 256 more. The trainer then updates on them (at rate 0), which gives the differences
of what enters the loss, and the engine computes some of them once more as prompts (its own noise). Measures of the
default mode, each with those before it:

    logits in bfloat16 (vLLM's own) · in float32 (what the engine does here)
    the trainer's layers as transformers has them · with RoPE in float32, rounded once · fused, rounded where vLLM
    rounds · with vLLM's attention (what training does)

A process of its own has an exact engine (`exact: true`): every difference must be 0, also after an update, and must not
be 0 once one parameter has changed. A step there, rollout and update, is given over that of the default mode. Small
models of three families follow, exact too: prompts with a common prefix, and long ones that come in parts and again
from the prefix cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ilr_benchmarks.common import row
from ilr_benchmarks.exactness_setting import Setting

from ilr_fast.errors import UserError

SMALL: dict[str, Any] = dict(
    vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, max_position_embeddings=4096,
    tie_word_embeddings=True,
)  # fmt: skip


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> Iterator[dict[str, Any]]:
    """Rows of the default mode, and from processes of their own of the exact one."""
    steps = []
    try:
        for found in default_mode(quick, device, rounds):
            steps.append(found.get("step_seconds"))
            yield found
    except UserError as error:
        yield row("default", "", [], status=str(error).splitlines()[0])
        return
    for part in ("exact", "families") if device == "cuda" else ():
        for found in _in_a_process(part, quick, rounds):
            if "step_seconds" in found:
                found["over_default"] = found["step_seconds"] / steps[-1]
            yield found


def _in_a_process(part: str, quick: bool, rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        arguments = part, str(file), str(int(quick)), str(rounds)
        subprocess.run([sys.executable, "-m", "ilr_benchmarks.exactness", *arguments], check=False)
        return json.loads(file.read_text()) if file.exists() else [row(part, "", [], status="failed")]


def default_mode(quick: bool, device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """The measures one by one, on the same engine."""
    from ilr_fast.engines import vllm_logps

    setting = Setting(quick, device)
    engine, model = setting.open()
    kernel, engine.kernel = engine.kernel, None
    _plain_logits(engine)
    told, _ = setting.measure(1)
    yield row("logits in bfloat16", setting.shape, told.pop("seconds"), **told)
    vllm_logps.float32_logits(engine._core.model)
    told, results = setting.measure(rounds)
    noise, seconds = told["engine_noise"], told.pop("seconds")
    yield row("logits in float32", setting.shape, seconds, **told)
    with _rope_in_float32():
        yield row("  and the trainer's RoPE", setting.shape, [], **setting.differences(results))
    if device == "cuda":
        setting.changed(fused_layers="on")
        yield row("  and its layers fused", setting.shape, [], **setting.differences(results))
        yield row("an update, torch's attention", setting.shape, setting.updates(results, rounds))
        engine.kernel = kernel
        setting.changed()
        found = setting.differences(results)
        mean = found["logp_diff_mean"]
        yield row("  and vLLM's attention", setting.shape, [], over_noise=noise and mean / noise, **found)
    updates = setting.updates(results, rounds)
    yield row("an update", setting.shape, updates, **setting.memory())
    yield setting.step("a step", seconds, updates)
    del engine, model, kernel
    setting.close()


def exact_mode(quick: bool, rounds: int) -> list[dict[str, Any]]:
    """The exact mode; `error` is the largest difference over all sampled tokens."""
    setting = Setting(quick, "cuda", exact=True)
    engine, model = setting.open()
    told, results = setting.measure(rounds)
    seconds = told.pop("seconds")
    rows = [row("exact", setting.shape, seconds, error=told["logp_diff_max"], **told)]
    updates = setting.updates(results, rounds)
    rows.append(row("exact: an update", setting.shape, updates, **setting.memory()))
    rows.append(setting.step("exact: a step", seconds, updates))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 0.5
    setting.changed()
    found = setting.differences(results)
    red = {} if found["logp_diff_max"] > 0 else {"status": "wrong: a changed parameter is not seen"}
    rows.append(row("exact, one parameter of the trainer's changed", setting.shape, [], **found, **red))
    engine.weights_changed()
    told, results = setting.measure(1)
    told.pop("seconds")
    rows.append(row("exact, after the update", setting.shape, [], error=told["logp_diff_max"], **told))
    return rows


def families(quick: bool, rounds: int) -> list[dict[str, Any]]:
    """Small exact models: heads of 128 and 64, biases, norms of q and k; prefixes, prompts in parts, cached ones."""
    import transformers

    stem, *ends = _tokens(700, *[20] * 48)
    loads = {
        "48 requests with a common prefix": [[*stem, *end] for end in ends],
        "prompts of 3,000 in parts": _tokens(*[3000] * 6),
    }
    rows = []
    kinds = {"Qwen2": (transformers.Qwen2Config, 128), "Llama": (transformers.LlamaConfig, 64),
             "Qwen3": (transformers.Qwen3Config, 128)}  # fmt: skip
    for name, (kind, size) in kinds.items():
        heads = 1024 // size
        config = kind(**{**SMALL, "num_attention_heads": heads, "num_key_value_heads": heads // 4, "head_dim": size})
        setting = Setting(True, "cuda", exact=True, config=config)
        setting.shape = f"{name}, {SMALL['num_hidden_layers']} layers, heads of {size}"
        setting.open()
        for what, prompts in loads.items():
            setting.prompts, setting.requests, setting.sampled = prompts, len(prompts), 64
            for again in ("", ", from the prefix cache"):
                found = setting.differences(setting.sample())
                rows.append(row(f"exact: {what}{again}", setting.shape, [], error=found["logp_diff_max"], **found))
    return rows


def _tokens(*lengths: int) -> list[list[int]]:
    draw = np.random.default_rng(1)
    return [draw.integers(0, SMALL["vocab_size"], length).tolist() for length in lengths]


def _plain_logits(engine: Any) -> None:
    from ilr_fast.engines.vllm_logps import processors

    for processor in processors(engine._core.model):
        processor.__dict__.pop("_get_logits", None)


@contextmanager
def _rope_in_float32() -> Iterator[None]:
    """Queries and keys turned in float32 and rounded once."""
    from transformers.models.qwen2 import modeling_qwen2 as module

    turn = module.apply_rotary_pos_emb

    def changed(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any) -> Any:
        return tuple(x.to(q.dtype) for x in turn(q.float(), k.float(), cos.float(), sin.float(), *more))

    with _replaced(module, "apply_rotary_pos_emb", changed):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


if __name__ == "__main__":
    os.environ["VLLM_BATCH_INVARIANT"] = "1"
    part, file, quick, rounds = sys.argv[1:]
    found = {"exact": exact_mode, "families": families}[part](bool(int(quick)), int(rounds))
    Path(file).write_text(json.dumps(found))
