"""The plan's memory of an update against PyTorch's peak, for a few layers of true shapes: what activations take.

    ilr-fast bench memory_layers        # one NVIDIA GPU with 12 GiB free

A few layers, an update of two micro-batches, for each way to train and to compute again. `planned_gib` is what the plan
gives one agent (weights, states, gradients, activations, LM head or a layer's backward pass) without the context.
"""

from __future__ import annotations

import gc
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ilr_benchmarks.common import row
from ilr_benchmarks.memory_case import sequence
from ilr_benchmarks.shapes import small_shape, write_shape

from ilr_fast.agent import Agent
from ilr_fast.config import AgentConfig, Config, LoraConfig, OptimizerConfig
from ilr_fast.memory import GIB, Use, agent_memory
from ilr_fast.model_shape import model_shape

WITHIN = 0.1


class Case(NamedTuple):
    """A model's layers, how they are trained, and the tokens of a micro-batch."""

    model: str
    layers: int
    tokens: int
    keys: dict[str, Any]


LORA: dict[str, Any] = {"train": "lora", "lora": LoraConfig(rank=32, alpha=64)}
SHAPES = {
    "8B, LoRA": Case("meta-llama/Llama-3.1-8B-Instruct", 4, 4096, LORA),
    "7B, QLoRA": Case("Qwen/Qwen2.5-7B-Instruct", 4, 4096, {**LORA, "quantize": "nf4"}),
    "3B, full": Case("Qwen/Qwen2.5-3B-Instruct", 6, 4096, {}),
    "1.7B, full": Case("HuggingFaceTB/SmolLM2-1.7B-Instruct", 6, 8192, {}),
    "1.5B, full": Case("Qwen/Qwen2.5-1.5B-Instruct", 6, 8192, {}),
}


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> Iterator[dict[str, Any]]:
    """A row for each shape and each `gradient_checkpointing`; `quick`: small shapes, on the CPU, without peaks."""
    for name, case in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            model = (small_shape if quick else write_shape)(case.model, Path(folder))
            if not quick:
                _keep_layers(model / "config.json", case.layers)
            for again in (False, "mlp", True):
                yield _measured(name, case, str(model), again, 256 if quick else case.tokens, device)


def _keep_layers(file: Path, layers: int) -> None:
    config = json.loads(file.read_text())
    config["num_hidden_layers"] = layers
    config.pop("layer_types", None)
    file.write_text(json.dumps(config))


def _measured(name: str, case: Case, model: str, again: Any, tokens: int, device: str) -> dict[str, Any]:
    optimizer = OptimizerConfig(rounding="stochastic", moments="bfloat16", offload="none")
    agent = AgentConfig(
        model=model, random_weights=True, device=device, micro_batch_tokens=tokens, gradient_checkpointing=again,
        optimizer=optimizer, **case.keys,
    )  # fmt: skip
    config = Config(agents={"ada": agent}, steps=10)
    shape, length = model_shape(model, "model"), tokens // 2
    planned = agent_memory(agent, config, shape, Use("cpu" if device == "cpu" else "cuda", length))
    total = planned.weights + planned.states + planned.update
    gc.collect()
    on_card = device != "cpu"
    if on_card:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
    made, draw = Agent("ada", agent, config), random.Random(0)
    vocabulary = made.model.get_input_embeddings().weight.shape[0]
    for step in (1, 2):
        batch = [sequence([draw.randrange(3, vocabulary) for _ in range(length)], n, draw) for n in range(4)]
        if on_card:
            torch.cuda.reset_peak_memory_stats()
        result = made.update(batch, step)
    peak = torch.cuda.max_memory_allocated() - before if on_card else None
    return row(
        f"{name}, {case.layers} layers, computed again: {again}", f"{tokens} tokens, PyTorch's peak", [],
        **({} if result.note is None else {"status": f"wrong: {result.note}"}),
        planned_gib=round(total / GIB, 3), measured_gib=None if peak is None else round(peak / GIB, 3),
        ratio=None if peak is None else round(total / peak, 3), target="within 10%",
        met=None if peak is None else abs(total / peak - 1) <= WITHIN,
        parts={key: round(getattr(planned, key) / GIB, 3) for key in (
            "weights", "states", "gradients", "activations", "passing", "head", "step")},
    )  # fmt: skip
