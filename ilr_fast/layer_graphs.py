"""All decoder layers of a small micro-batch as two CUDA graphs, one for the forward and one for the backward pass.

A layer is some fifty kernels there and back, which the host launches in 2 ms; a GPU has computed a layer of a small
model on a thousand tokens by then. Replayed, all layers are two launches. A graph computes at fixed addresses on fixed
shapes, so a micro-batch is padded to one of few sizes, by sequences of their own that nothing reads: their rows are 0
going in and going back, so that they add nothing to any gradient. Embedding, final norm and loss run as ever.

A size's first micro-batch is launched, which loads what its kernels need; the second is captured; then it is replayed.
All graphs share one pool of memory, so one micro-batch's backward pass comes before the next one's forward pass. Weight
gradients add up in buffers that stay, and are the layers' `.grad` from `begin` to the optimizer's step.

    graphs = LayerGraphs(model, most=4096)
    graphs.begin()                                    # an optimizer step begins: its gradients are 0
    hidden_TD = graphs.hidden(tokens_T, positions_T, plan)    # None where a micro-batch has to go without
    loss(hidden_TD).backward()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ilr_fast.attention import base_model_of
from ilr_fast.config import AgentConfig
from ilr_fast.flash_attention import RaggedKernel, TorchFlash, torch_kernel, usable
from ilr_fast.fused_block import Block, Kept, Surroundings, layer_backward, layer_forward
from ilr_fast.fused_layers import block_of
from ilr_fast.graph_sizes import SIZES
from ilr_fast.segments import KeyRun, Places, Segments, put
from ilr_fast.ticks import tick
from ilr_fast.tree_plan import TreePlan

TILE = 128  # tokens of a sequence of padding at most
KEYS = int(TorchFlash.most_gathered)  # for each row: where more are gathered, `usable` says no
ALIGNED = 64  # numbers between the places at which gradients begin


class Size(NamedTuple):
    """What graphs are made for: at most so many rows, runs of queries, gathered keys, and tokens of a sequence."""

    tokens: int
    runs: int
    keys: int
    longest: int

    @classmethod
    def of(cls, plan: TreePlan) -> Size:
        """The size of a micro-batch: few sizes, since each costs two passes before it is replayed; powers of two."""
        tokens = min(size for size in SIZES if size >= plan.tokens)
        runs = len(plan.key_runs()) + -(-(tokens - plan.tokens) // TILE)
        longest = max(TILE, 1 << (plan.longest() - 1).bit_length())
        return cls(tokens, tokens // 2 if runs <= tokens // 2 else tokens, KEYS * tokens, longest)


class LayerGraphs:
    """Of one model whose layers are all blocks (`fused_layers.block_of`), for micro-batches of up to `most` tokens."""

    def __init__(self, model: Any, most: int, kernel: RaggedKernel | None = None):
        base: Any = base_model_of(model)
        self._base = base
        self.most, self._kernel = min(most, max(SIZES)), kernel or torch_kernel()
        blocks = [block_of(layer) for layer in base.layers]
        self._blocks = [block for block in blocks if block is not None]
        self.possible = len(blocks) == len(self._blocks) > 0
        self._gradients: list[tuple[Any, Tensor]] = []
        self._flat: Tensor | None = None
        self._addresses: list[int] = []
        self._sizes: dict[Size, _Passes] = {}
        self._shared = _Shared()

    def begin(self) -> None:
        """The layers' gradients are 0, in buffers that stay. Graphs of weights that have moved are given up."""
        addresses = [p.data_ptr() for block in self._blocks for p in block.parameters()]
        if addresses != self._addresses:
            self.close()
            self._addresses = addresses
        if self._flat is None:
            self._make_gradients()
        assert self._flat is not None
        self._flat.zero_()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient

    def hidden(self, tokens_T: Tensor, positions_T: Tensor, plan: TreePlan) -> Tensor | None:
        """The final hidden states [T, D], as `attention.packed_forward` gives them; None where no graph fits.

        The backward pass must come before the next call.
        """
        if plan.tokens > self.most or not self._takes(plan):
            return None
        tick()
        x_1TD = self._base.embed_tokens(tokens_T[None])
        cos, sin = self._base.rotary_emb(x_1TD, positions_T[None])
        y_TD = _Layers.apply(x_1TD[0], self._passes(plan), cos[0], sin[0], plan)
        return self._base.norm(y_TD[None])[0]

    def close(self) -> None:
        """Gives the memory of all graphs and gradients back."""
        self._sizes.clear()
        self._gradients, self._flat, self._shared = [], None, _Shared()

    def _takes(self, plan: TreePlan) -> bool:
        weight = self._blocks[0].down
        return self.possible and usable(plan, weight, self._blocks[0].size, None, 0.0, self._kernel)

    def _passes(self, plan: TreePlan) -> _Passes:
        size = Size.of(plan)
        if size not in self._sizes:
            self._sizes[size] = _Passes(size, self._blocks, self._kernel, self._shared)
        return self._sizes[size]

    def _make_gradients(self) -> None:
        """Weights of one product have their gradients one after the other, as `products.joined` wants them."""
        groups = [group for block in self._blocks for group in _groups(block)]
        starts = np.cumsum([0] + [_multiple(sum(p.numel() for p in group), ALIGNED) for group in groups]).tolist()
        self._flat = self._blocks[0].down.new_zeros(starts[-1])
        for group, start in zip(groups, starts, strict=False):
            for parameter in group:
                self._gradients.append((parameter, self._flat[start : start + parameter.numel()].view_as(parameter)))
                start += parameter.numel()


def make_graphs(model: Any, config: AgentConfig, kernel: RaggedKernel | None = None) -> LayerGraphs | None:
    """Those of an agent whose config has some, None where its model is none that they are for."""
    half = model.device.type == "cuda" and model.dtype in (torch.bfloat16, torch.float16)
    if not config.graphed_tokens or config.train != "full" or not half:
        return None
    graphs = LayerGraphs(model, config.graphed_tokens, kernel)
    return graphs if graphs.possible else None


class _Shared:
    """What all sizes of a model share: memory, a stream to capture on, and whose forward pass came last."""

    def __init__(self) -> None:
        self.pool: Any = None
        self.stream: torch.cuda.Stream | None = None
        self.open: object = None

    def captured(self, work: Callable[[], None], like: Tensor) -> torch.cuda.CUDAGraph:
        """A graph of what `work` launches; nothing of it is computed yet."""
        if self.stream is None:
            self.stream, self.pool = torch.cuda.Stream(like.device), torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream(like.device))
        with torch.cuda.stream(self.stream):
            like[:1] @ like[:1].t()  # cuBLAS takes its room for this thread and stream now, not from the pool
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # of a capture that failed
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream(like.device).wait_stream(self.stream)
        return graph


class _Passes:
    """The layers' two passes on micro-batches of one size, on tensors that stay where they are."""

    def __init__(self, size: Size, blocks: Sequence[Block], kernel: RaggedKernel, shared: _Shared):
        weight, width = blocks[0].down, blocks[0].size
        self.size, self.shared, self._blocks = size, shared, blocks
        self._x, self._dy = (weight.new_zeros(size.tokens, weight.shape[0]) for _ in range(2))
        self._cos, self._sin = (weight.new_zeros(size.tokens, width) for _ in range(2))
        self._segments = _FixedSegments(size, weight.device)
        self._around = Surroundings(self._cos, self._sin, self._segments.value, kernel, size.longest)
        self._begun = False  # a micro-batch of this size has been run
        self._graphs: list[torch.cuda.CUDAGraph | None] = [None, None]
        self._kept: list[Kept] = []
        self._y = self._dx = self._x

    def forward(self, x_TD: Tensor, cos_TD: Tensor, sin_TD: Tensor, plan: TreePlan) -> Tensor:
        """The last layer's output [T, D], which stays until the next forward pass of any size."""
        self.shared.open = self
        for fixed, given in ((self._x, x_TD), (self._cos, cos_TD), (self._sin, sin_TD)):
            _fill(fixed, given)
        self._segments.fill(plan)
        self._run(0, self._forward)
        return self._y[: len(x_TD)]

    def backward(self, dy_TD: Tensor) -> Tensor:
        """The gradient of x [T, D]; the weights' are added to their `.grad`."""
        assert self.shared.open is self, "another forward pass has taken the memory of this one"
        self.shared.open = None
        _fill(self._dy, dy_TD)
        self._run(1, self._backward)
        self._begun = True
        return self._dx[: len(dy_TD)]

    def _run(self, which: int, work: Callable[[], None]) -> None:
        if not self._begun or not self._x.is_cuda:
            work()
            return
        graph = self._graphs[which]
        if graph is None:
            graph = self._graphs[which] = self.shared.captured(work, self._x)
        graph.replay()

    @torch.no_grad()
    def _forward(self) -> None:
        x, self._kept = self._x, []
        for block in self._blocks:
            x, kept = layer_forward(x, block, self._around)
            self._kept.append(kept)
        self._y = x

    @torch.no_grad()
    def _backward(self) -> None:
        dy = self._dy
        for block in reversed(self._blocks):
            dy = layer_backward(dy, self._kept.pop(), block, self._around)
        self._dx = dy


class _Layers(torch.autograd.Function):
    """All layers as one step of autograd."""

    @staticmethod
    def forward(ctx, x_TD, passes, cos_TD, sin_TD, plan):  # type: ignore[no-untyped-def]
        ctx.passes = passes
        return passes.forward(x_TD, cos_TD, sin_TD, plan)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_TD):  # type: ignore[no-untyped-def]
        return ctx.passes.backward(dy_TD), None, None, None, None


class _FixedSegments:
    """`Segments` of a size, filled by one copy; runs and keys beyond a plan's own are empty or never read."""

    def __init__(self, size: Size, device: torch.device):
        lengths = [size.runs + 1, size.runs + 1, size.keys, size.tokens + 1, size.keys]
        starts = np.cumsum([0] + [_multiple(length, 4) for length in lengths]).tolist()
        self._size = size
        self._cuts = [slice(start, start + length) for start, length in zip(starts, lengths, strict=False)]
        self._all = torch.zeros(starts[-1], dtype=torch.int32, device=device)
        starts_q, starts_k, *rest = (self._all[cut] for cut in self._cuts)
        self.value = Segments(starts_q, starts_k, size.longest, size.longest, *rest)

    def fill(self, plan: TreePlan) -> None:
        """For a plan that the size holds."""
        places = Places.of(_padded(plan, self._size.tokens), self._size.tokens)
        whole = np.zeros(len(self._all), dtype=np.int32)
        for cut, vector, last in zip(self._cuts, places, (True, True, False, False, False), strict=True):
            part = whole[cut]
            part[: len(vector)] = vector
            if last:  # empty runs
                part[len(vector) :] = vector[-1]
        self._all.copy_(put(whole, self._all.device))


def _padded(plan: TreePlan, tokens: int) -> list[KeyRun]:
    """The plan's runs, and sequences of TILE rows at most that fill up to `tokens` rows."""
    starts = range(plan.tokens, tokens, TILE)
    ends = (min(start + TILE, tokens) for start in starts)
    return [*plan.key_runs(), *((start, end, np.arange(start, end)) for start, end in zip(starts, ends, strict=True))]


def _fill(fixed: Tensor, given_TD: Tensor) -> None:
    """The given rows, and zeros."""
    fixed[: len(given_TD)].copy_(given_TD)
    fixed[len(given_TD) :].zero_()


def _groups(block: Block) -> list[list[Any]]:
    """A layer's trained parameters, those of one product together."""
    norms = [[n.weight] for n in (block.first, block.second, block.query_norm, block.key_norm) if n is not None]
    biases = [b for b in block.biases if b is not None]
    return [*norms, list(block.qkv), biases, [block.output], list(block.gate_up), [block.down]]


def _multiple(n: int, of: int) -> int:
    return n + -n % of
