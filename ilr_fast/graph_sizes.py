"""Micro-batches whose layers are worth CUDA graphs (layer_graphs.py). Loads no torch, so that memory can be planned.

Larger micro-batches gain nothing: a layer takes the GPU longer than its launches the host (engines/step_size.py).
"""

from __future__ import annotations

from ilr_fast.activations import Recompute, activations
from ilr_fast.config import AgentConfig, Config
from ilr_fast.engines.step_size import LAUNCHED
from ilr_fast.model_shape import BLOCKS, ModelShape

SIZES = (8192, 4096, 2048, 1024, 512, 256)  # tokens that graphs are made for
TIMED = 2048  # the largest size that was timed; `auto` makes no larger one
WORTH = 2048  # a model that gains by smaller micro-batches only is left alone


def worthwhile(agent: AgentConfig, config: Config, shape: ModelShape, device: str) -> list[int]:
    """What `graph_tokens: auto` may become on `device` (cuda or cpu), the largest first, and 0 last.

    None where a run that goes on must have the bits of one that was not cut off, where another thread uses the GPU
    meanwhile, and where weights come and go.
    """
    linear = sum(m.size for m in shape.linears) / shape.layers
    apart = config.deterministic or config.rollout.ahead or agent.engine.exact or agent.engine.rests == "turns"
    again = agent.gradient_checkpointing is True
    blocks = shape.architecture.removesuffix("ForCausalLM") in BLOCKS and agent.fused_layers != "off"
    trained = agent.train == "full" and agent.dtype != "float32"
    if device == "cpu" or apart or again or not blocks or not trained or LAUNCHED / linear < WORTH:
        return [0]
    most = min(LAUNCHED / linear, _size_above(agent.batch_tokens), TIMED)
    return [*(size for size in SIZES if size <= most), 0]


def _size_above(tokens: int) -> int:
    """The size that so many tokens are padded to."""
    return min((size for size in SIZES if size >= tokens), default=SIZES[0])


def held(agent: AgentConfig, shape: ModelShape, size: int) -> int:
    """Bytes that graphs hold, of numbers of `size` bytes: what the largest computes with, half, a quarter … of it."""
    recompute: Recompute = "mlp" if agent.gradient_checkpointing == "mlp" else False
    tokens = _size_above(agent.graphed_tokens) if agent.graphed_tokens else 0
    one = activations(shape, tokens, size=size, recompute=recompute, how="block")
    return 2 * (one.saved + one.passing)
