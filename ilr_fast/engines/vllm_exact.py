"""vLLM so that a token has the same bits whatever shares its batch, decoded or in a prompt, cached or not.

Its batch-invariant mode gives attention in one split. Everything else is what the trainer's fused layers compute with:
norms with the residual added, RoPE and the gated unit by this project's kernels, products by cuBLAS, which is told not
to split sums. (vLLM's mode has slower products of its own, in Triton, and puts operators in the place of torch's for
the whole process: neither is used.) For heads of other widths than 128 and 256 attention is vLLM's Triton kernel.

    with exact_modules():
        client = InprocClient(…)
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from ilr_kernels.gated import gated
from ilr_kernels.norm import add_norm_forward, norm_forward
from ilr_kernels.rotary import rotate_by_table
from torch import Tensor, nn

from ilr_fast.errors import UserError
from ilr_fast.whole_sums import whole_sums

SEEN = (0, 25)  # releases of vLLM whose batch-invariant mode was seen to be enough


def check_exact(model: Any, device: torch.device, where: str) -> None:
    """UserError where it is not known that vLLM's kernels give every token the same bits in any batch."""
    place = f"{where}.engine.exact"
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        what = "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
        raise UserError(f"no exact engine on {what}", place, "use a GPU of compute capability 9.0, or leave it out")
    if model.dtype != torch.bfloat16:
        raise UserError(f"no exact engine in {model.dtype}", place, "use `dtype: bfloat16`, or leave it out")
    if "vllm" in sys.modules and os.environ.get("VLLM_BATCH_INVARIANT") != "1":
        raise UserError("vLLM is in this process already, and not exact", place, "set `host: process`")


def exact_arguments(model: Any) -> dict[str, Any]:
    """Arguments of vLLM's engine for `model`.

    FlashAttention 3 tiles the keys of heads of 64 otherwise for one query than for many, those of 128 and 256 do not.
    """
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"attention_backend": "FLASH_ATTN" if width in (128, 256) else "TRITON_ATTN"}


@contextlib.contextmanager
def exact_modules() -> Iterator[None]:
    """While a core is opened: its model's modules are exact before anything of it is captured."""
    from vllm.model_executor.layers import batch_invariant, linear, vocab_parallel_embedding
    from vllm.v1.worker.gpu_worker import Worker

    load_model = Worker.load_model
    linear.linear_batch_invariant = vocab_parallel_embedding.linear_batch_invariant = F.linear
    batch_invariant.enable_batch_invariant_mode = whole_sums

    def loaded(worker: Any, *arguments: Any, **named: Any) -> None:
        load_model(worker, *arguments, **named)
        make_exact(worker.get_model())

    Worker.load_model = loaded
    try:
        yield
    finally:
        Worker.load_model = load_model


def make_exact(engine_model: nn.Module) -> None:
    """Norms, RoPE and gated units of vLLM's model are computed by the trainer's kernels from then on."""
    modules: list[Any] = list(engine_model.modules())
    for module in modules:
        kind, has_table = type(module).__name__, hasattr(module, "cos_sin_cache")
        found = _norm if kind == "RMSNorm" else _gated if kind == "SiluAndMul" else _rotary if has_table else None
        if found is not None:
            module._forward_method = partial(found, module)  # what vLLM's module calls on any platform


def _norm(module: Any, x: Tensor, residual: Tensor | None = None) -> Any:
    kind = module.weight.data, module.variance_epsilon, False
    return norm_forward(x, *kind) if residual is None else add_norm_forward(x, residual, *kind)


def _gated(module: Any, x: Tensor) -> Tensor:
    return gated(*x.chunk(2, -1), "silu")


def _rotary(module: Any, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    table_PD = module._match_cos_sin_cache_dtype(query)
    rotate_by_table(*(x.unflatten(-1, (-1, module.head_size)) for x in (query, key)), table_PD, positions)
    return query, key
