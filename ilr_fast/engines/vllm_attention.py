"""vLLM's attention kernels for the trainer's forward pass: what an engine attends with, its trainer does too.

Gradients are torch's flash attention's, from the output and the log-sum-exp of vLLM's forward pass. With the trainer's
own kernel forwards too, attention alone makes a third of what the two sides' log-probs differ by.

    kernel = engines_kernel(core.model)
    fuse_layers(model, config, kernel)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ilr_fast.flash_attention import CHECK_TOLERANCE, RaggedKernel, TorchFlash, check
from ilr_fast.segments import Segments

PAGE = 16  # tokens, as in the engine's cache: the kernel's tiles follow from it


def engines_kernel(engine_model: nn.Module) -> RaggedKernel | None:
    """The attention of all of a model's layers; None where there are several, or torch's own serves as well."""
    from vllm.model_executor.layers.attention import Attention

    backends: list[Any] = [module.impl for module in engine_model.modules() if isinstance(module, Attention)]
    kinds = {(getattr(b, "vllm_flash_attn_version", None), getattr(b, "head_size", 0)) for b in backends}
    if len(kinds) > 1 or (kernel := kernel_of(backends[0], exact=False)) is None:
        return None
    weight = next(engine_model.parameters())
    return kernel if _computes(kernel, weight.device, weight.dtype, backends[0].head_size) else None


def _computes(kernel: RaggedKernel, device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether it gives what a softmax written out gives, and its gradients; a warning where it does not."""
    try:
        error = max(check(device, dtype, size, window, kernel) for window in (None, 5))
    except (RuntimeError, AttributeError, TypeError, ImportError) as problem:
        warnings.warn(f"vLLM's attention can't be used for training ({problem})", stacklevel=2)
        return False
    if not error < CHECK_TOLERANCE:
        warnings.warn(f"vLLM's attention is off by {error:.2g} in training, and is not used there", stacklevel=2)
    return error < CHECK_TOLERANCE


def kernel_of(backend: Any, *, exact: bool) -> RaggedKernel | None:
    """The kernel of one of vLLM's attention backends (`impl`); None where torch's own serves as well.

    FlashAttention 3, or for an `exact` engine what its backend does with prompts.
    """
    version, window = getattr(backend, "vllm_flash_attn_version", None), getattr(backend, "sliding_window", (-1, -1))
    if version == 3:
        return FlashInOneSplit(window if exact else None)
    return InPages(partial(_unified, backend)) if exact else None


class FlashInOneSplit(TorchFlash):
    """FlashAttention 3 forwards, every query's keys in one split; torch's backwards.

    `window`: an exact engine's (left, right), kept where no sequence reaches it: other tiles have other bits.
    """

    def __init__(self, window: tuple[int, int] | None = None):
        self._window = window
        self.most_gathered = TorchFlash.most_gathered if window is None else math.inf

    def forward(self, q_THD, k_NKD, v_NKD, segments, scale, window):  # type: ignore[no-untyped-def]
        """See RaggedKernel."""
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        reach = self._window or ((-1, -1) if window is None else (window - 1, 0))
        out_THD, lse = flash_attn_varlen_func(
            q_THD, k_NKD, v_NKD, segments.longest_q, segments.starts_q, segments.longest_k, segments.starts_k,
            softmax_scale=scale, causal=True, window_size=list(reach), fa_version=3, num_splits=1,
            return_softmax_lse=True,
        )  # fmt: skip
        return out_THD, lse, torch.empty(2, dtype=torch.uint64, device=q_THD.device)


class Pages(NamedTuple):
    """Where keys go, N rows of R runs, each run's from a page of its own on, as in the engine's cache."""

    slot_N: Tensor  # int64, row of the cache
    table_RP: Tensor  # int32, each run's pages
    lengths_R: Tensor  # int32
    rows: int

    @classmethod
    def of(cls, segments: Segments, keys: int) -> Pages:
        """Pages for `keys` rows in all, without waiting for the device."""
        starts = segments.starts_k.long()
        lengths = starts.diff()
        pages = (lengths + PAGE - 1) // PAGE
        first = pages.cumsum(0) - pages
        most = keys // PAGE + len(lengths)  # pages, counted from above
        table = first[:, None] + torch.arange(-(-segments.longest_k // PAGE), device=starts.device)
        ahead = (first * PAGE - starts[:-1]).repeat_interleave(lengths, output_size=keys)
        slots = ahead + torch.arange(keys, device=starts.device)
        return cls(slots, table.clamp_max(most - 1).int(), lengths.int(), most * PAGE)

    def laid_out(self, rows_NKD: Tensor) -> Tensor:
        """[N, K, D] → [pages, page, K, D]."""
        cache = rows_NKD.new_zeros(self.rows, *rows_NKD.shape[1:])
        return cache.index_copy_(0, self.slot_N, rows_NKD).unflatten(0, (-1, PAGE))


Attend = Callable[[Tensor, Tensor, Tensor, Pages, Segments, float], Tensor]


class InPages(TorchFlash):
    """A kernel that reads keys and values from pages, and gives the output alone; torch's backwards."""

    most_gathered = math.inf

    def __init__(self, attend: Attend):
        self._attend = attend
        self._last: tuple[Segments, Pages] | None = None

    def forward(self, q_THD, k_NKD, v_NKD, segments, scale, window):  # type: ignore[no-untyped-def]
        """See RaggedKernel."""
        if self._last is None or self._last[0] is not segments:  # one micro-batch's layers come one after the other
            self._last = segments, Pages.of(segments, len(k_NKD))
        pages = self._last[1]
        out_THD = self._attend(q_THD.contiguous(), pages.laid_out(k_NKD), pages.laid_out(v_NKD), pages, segments, scale)
        _, lse, state = super().forward(q_THD, k_NKD, v_NKD, segments, scale, window)
        return out_THD, lse, state


def _unified(
    backend: Any, q_THD: Tensor, k_pages: Tensor, v_pages: Tensor, pages: Pages, segments: Segments, scale: float
) -> Tensor:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    out_THD = torch.empty_like(q_THD)
    unified_attention(
        q=q_THD, k=k_pages, v=v_pages, out=out_THD, cu_seqlens_q=segments.starts_q, max_seqlen_q=segments.longest_q,
        seqused_k=pages.lengths_R, max_seqlen_k=segments.longest_k, softmax_scale=scale, causal=True,
        window_size=backend.sliding_window, block_table=pages.table_RP, softcap=0.0, q_descale=None, k_descale=None,
        v_descale=None, use_td=backend.use_td,
    )  # fmt: skip
    return out_THD
