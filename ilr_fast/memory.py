"""What one agent takes in its device's memory, and in the host's, from its config and its model's shape alone.

    memory = agent_memory(config.agents["ada"], config, shape, Use("cuda", context=4096))
    memory.weights, memory.moments, memory.activations          # bytes

P parameters, of which t are trained, weights of s bytes; what AdamW keeps and a step needs, by `optimizer`:

    rounding     copies of the weights   moments        gradients: backward     in the step
    copies       4 t (0 where s = 4)     8 t            s t                     4 t
    stochastic   0                       8 t or 4 t     s t                     s t

The gradients of the embedding and the LM head are float32 sums in either case. `offload: host` keeps copies and moments
in the host's memory, and stages a part of them on the device. Adapters have the weights' precision. Plans add these up
by phase (plan.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ilr_kernels.chunks import held_bytes, rows_of

from ilr_fast.activations import Activations, How, Recompute, activations, forward_bytes
from ilr_fast.config import AgentConfig, Config, EngineConfig
from ilr_fast.engines.step_size import (
    GRAPH_REQUESTS,
    GRAPH_TOKENS,
    SPARE_TOKENS,
    VLLM_TOKENS,
    logit_rows,
    prompt_tokens,
)
from ilr_fast.graph_sizes import held
from ilr_fast.model_shape import ModelShape

GIB = 2**30
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a number: 4 bits, and scales that are quantized themselves
STAGED = 2**27  # bytes of a bucket of states that is on its way to or from the host (host_states.py)
STAGES = 3  # buckets on the device at once
GRAPHS = int(0.15 * GIB)  # vLLM's graphs and tables beside the tensors of the largest graph
CACHE_BLOCK = 64  # tokens that the embedded engine's cache grows by


@dataclass(frozen=True, slots=True)
class Use:
    """How an agent is used: `device` cuda or cpu, and the most tokens that one of its conversations holds."""

    device: Literal["cuda", "cpu"]
    context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentMemory:
    """Bytes on the device, but for the last two, which are the host's.

    Always there: weights (adapters and a reference included), copies, moments, `graphs` (vLLM's, and those of the
    layers with the gradients that they keep). `cache` and `engine` (a
    copy of the weights, its work space) while it generates; `gradients` and `activations` in a pass, with the larger of
    `head` (before the backward pass) and `passing` (in it); and `step` beyond the gradients while AdamW works.
    """

    weights: int
    copies: int
    moments: int
    cache: int
    engine: int
    graphs: int
    gradients: int
    activations: int
    passing: int
    head: int
    step: int
    host_states: int
    host_weights: int

    @property
    def states(self) -> int:
        """AdamW's, on the device."""
        return self.copies + self.moments

    @property
    def update(self) -> int:
        """What an update takes beside what is always there."""
        return self.gradients + max(self.activations + max(self.passing, self.head), self.step)


def agent_memory(agent: AgentConfig, config: Config, shape: ModelShape, use: Use) -> AgentMemory:
    """The memory of one agent, whose config says nothing that is still `auto` (plan.py fills that in)."""
    size = weight_size(agent, use.device)
    whole = shape.count() * size
    base = _base_weights(agent, shape, size)
    adapters = shape.adapter_sizes(agent.lora.rank, agent.lora.targets) if agent.train == "lora" else ()
    reference = whole if agent.train == "full" and config.loss.beta else 0
    copies, moments = _states(agent, shape, size)
    away = agent.optimizer.offload == "host"
    gradients = _gradients(agent, shape, size)
    passes = _activations(agent, shape, size, use)
    return AgentMemory(
        weights=base + sum(adapters) * size + reference,
        copies=0 if away else copies,
        moments=0 if away else moments,
        cache=_cache(agent.engine, shape, size, use),
        engine=_engine(agent, shape, size, use),
        graphs=_graphs(agent.engine, shape, size, use) + held(agent, shape, size) + _kept(agent, shape, size),
        gradients=gradients,
        activations=passes.saved,
        passing=passes.passing + (_unpacked(agent, shape, size) if agent.train != "none" else 0),
        head=_head(agent, shape, size, use),
        step=_step(agent, shape, size, gradients),
        host_states=copies + moments if away else 0,
        host_weights=whole,
    )


def weight_size(agent: AgentConfig, device: str) -> int:
    """Bytes of one weight."""
    return SIZES[("float32" if device == "cpu" else "bfloat16") if agent.dtype == "auto" else agent.dtype]


def trained_count(agent: AgentConfig, shape: ModelShape) -> int:
    """Numbers that AdamW moves."""
    if agent.train == "none":
        return 0
    return sum(shape.adapter_sizes(agent.lora.rank, agent.lora.targets)) if agent.train == "lora" else shape.count()


def cache_tokens(engine: EngineConfig, use: Use) -> int:
    """Tokens that the engine holds keys and values of when all its slots are full."""
    if engine.name == "vllm":
        return engine.slots * (use.context + SPARE_TOKENS)
    return engine.slots * math.ceil(use.context / CACHE_BLOCK) * CACHE_BLOCK


def micro_batch(agent: AgentConfig, use: Use) -> int:
    """Most packed tokens of one pass: a longer conversation is a micro-batch of its own."""
    return max(agent.batch_tokens, use.context)


def _base_weights(agent: AgentConfig, shape: ModelShape, size: int) -> int:
    if agent.quantize == "none":
        return shape.count() * size
    linear = sum(m.size for m in shape.linears)
    return int(linear * NF4) + (shape.count() - linear) * size


def _states(agent: AgentConfig, shape: ModelShape, size: int) -> tuple[int, int]:
    """Bytes of float32 copies and of moments."""
    trained = trained_count(agent, shape)
    if agent.optimizer.rounding == "copies":
        return (0 if size == 4 else 4 * trained), 8 * trained
    return 0, 2 * SIZES[agent.optimizer.moments] * trained


def _summed(agent: AgentConfig, shape: ModelShape) -> int:
    """Numbers of the embedding and the LM head, whose gradients are float32 sums (gradients.py)."""
    if agent.train != "full":
        return 0
    return shape.head.size if shape.tied else shape.head.size + shape.embedding.size


def _gradients(agent: AgentConfig, shape: ModelShape, size: int) -> int:
    summed = _summed(agent, shape)
    return 4 * summed + size * (trained_count(agent, shape) - summed) - _kept(agent, shape, size)


def _kept(agent: AgentConfig, shape: ModelShape, size: int) -> int:
    """Of the gradients those that graphs of the layers keep from update to update."""
    return size * (trained_count(agent, shape) - _summed(agent, shape)) if agent.graphed_tokens else 0


def _step(agent: AgentConfig, shape: ModelShape, size: int, gradients: int) -> int:
    """Bytes beyond the gradients while AdamW works."""
    trained = trained_count(agent, shape)
    if agent.optimizer.offload == "host":
        copies, moments = _states(agent, shape, size)
        bucket = min(STAGED, copies + moments)
        return STAGES * bucket + (bucket // 3 if copies else 0)  # and the bucket's gradients in float32
    if agent.optimizer.rounding == "copies" and size != 4:
        return 4 * trained - gradients
    return 0


def _cache(engine: EngineConfig, shape: ModelShape, size: int, use: Use) -> int:
    if engine.name == "vllm" and engine.cache_gib is not None:
        return int(engine.cache_gib * GIB)
    return cache_tokens(engine, use) * shape.cache_per_token() * engine_size(engine, size)


def _engine(agent: AgentConfig, shape: ModelShape, size: int, use: Use) -> int:
    """The engine's work space in its largest step, and vLLM's own copy of the weights where it has one."""
    slots, vocabulary = agent.engine.slots, shape.head.rows
    if agent.engine.name == "vllm":
        copy = _copied(agent.engine, shape, size) if agent.engine.weights == "copy" else 0
        size = engine_size(agent.engine, size)
        logits = min(slots, 1024) * vocabulary * (size + 12)
        return copy + max(forward_bytes(shape, VLLM_TOKENS, size=size), logits)
    rows = min(slots, logit_rows(use.device, vocabulary))
    tokens = prompt_tokens(use.device, shape.intermediate) + slots
    prompts = forward_bytes(shape, tokens, size=size, adapters=agent.train == "lora")
    return rows * vocabulary * (size + 16) + max(prompts, _attending(agent, shape, size, use)) + _unpacked(
        agent, shape, size
    )


def engine_size(engine: EngineConfig, size: int) -> int:
    """Bytes of a number that the engine computes with, where a weight of the trainer's has `size`."""
    return size if engine.dtype == "auto" else SIZES[engine.dtype]


def _copied(engine: EngineConfig, shape: ModelShape, size: int) -> int:
    """vLLM's own weights; what it makes 8 bits of, one layer's at a time, is not counted."""
    size = engine_size(engine, size)
    quantized = sum(m.size for m in shape.linears) if engine.quantization != "none" else 0
    return shape.count() * size - quantized * (size - 1)


def _graphs(engine: EngineConfig, shape: ModelShape, size: int, use: Use) -> int:
    """vLLM's CUDA graphs, which hold what their largest step computes with."""
    if engine.name != "vllm" or use.device == "cpu":
        return 0
    tokens = GRAPH_TOKENS + min(engine.slots, GRAPH_REQUESTS)
    return GRAPHS + forward_bytes(shape, tokens, size=engine_size(engine, size))


def _attending(agent: AgentConfig, shape: ModelShape, size: int, use: Use) -> int:
    """One layer's attention of the embedded engine when all slots are full."""
    slots = agent.engine.slots
    if use.device == "cpu":
        return slots * shape.heads * use.context * (2 * size + 4) // max(1, shape.query // shape.key)
    return slots * use.context * (2 * shape.key * size + 5 * 8)  # keys and values gathered, and their places


def _activations(agent: AgentConfig, shape: ModelShape, size: int, use: Use) -> Activations:
    if agent.train == "none":
        return Activations(0, 0)
    given = agent.gradient_checkpointing
    recompute: Recompute = False if given == "auto" else given
    fused = agent.fused_layers == "on" or (agent.fused_layers == "auto" and use.device != "cpu")
    how: How = "plain" if not fused else "block" if agent.train == "full" and recompute is not True else "modules"
    return activations(shape, micro_batch(agent, use), size=size, recompute=recompute, how=how)


def _unpacked(agent: AgentConfig, shape: ModelShape, size: int) -> int:
    """A matrix of four bits is unpacked while it is multiplied with."""
    return max(m.size for m in shape.linears) * size if agent.quantize != "none" else 0


def _head(agent: AgentConfig, shape: ModelShape, size: int, use: Use) -> int:
    if agent.train == "none":
        return 0
    dtype = agent.dtype if agent.dtype != "auto" else ("float32" if use.device == "cpu" else "bfloat16")
    chunk = rows_of(agent.logits_mib, shape.head.rows, size)
    return held_bytes(micro_batch(agent, use), shape.head.rows, shape.hidden, dtype, use.device, chunk)
