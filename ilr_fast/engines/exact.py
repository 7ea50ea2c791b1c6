"""What makes the trainer's forward pass equal to an exact engine's, bit for bit.

The engine computes norms, RoPE and the gated unit by this project's kernels (vllm_exact.py), which are those of the
trainer's fused layers; both multiply by cuBLAS without split sums. What is left are attention, whose kernel is vLLM's
on both sides, and the table of RoPE's cosines:

    kernel = trainers_kernel(model, core, True, "agents.ada")
    fuse_layers(model, config, kernel)                        # from then on packed_forward gives the engine's bits

Gradients are the ordinary ones of the same functions. With the same log-prob of the same hidden states on both sides
(`linear_logprob`) the trainer's log-probs of sampled tokens are the engine's. Prefixes that sequences share are
computed once, as always.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ilr_fast.attention import base_model_of, lm_head_of
from ilr_fast.engines.exact_families import check_family
from ilr_fast.engines.vllm_attention import engines_kernel, kernel_of
from ilr_fast.engines.vllm_core import Core
from ilr_fast.engines.vllm_logps import TrainersLogps
from ilr_fast.errors import UserError
from ilr_fast.flash_attention import RaggedKernel

# Rows of a step: what CUDA graphs of decoding steps have, and some prompts.
CHECKED_ROWS = (1, 2, 4, 7, 8, 16, 32, 48, 64, 96, 100, 128, 192, 200, 256, 384, 400, 512, 800, 1600, 3200, 6400)


def trainers_kernel(model: Any, core: Core, exact: bool, where: str) -> RaggedKernel | None:
    """The engine's attention for the trainer's layers; None where torch's own serves as well.

    `exact`: the engine's log-probs are the trainer's from then on. UserError: see `exact_kernel`.
    """
    if not exact:
        same = next(core.model.parameters()).dtype == model.dtype
        return engines_kernel(core.model) if same else None
    kernel = exact_kernel(model, core.model, where)
    TrainersLogps(core.worker.model_runner, core.model, lm_head_of(model))
    return kernel


def exact_kernel(model: Any, engine_model: Any, where: str) -> RaggedKernel | None:
    """The attention for `fuse_layers`; from then on `model` has the engine's RoPE.

    UserError for a family that is not known here, and where cuBLAS's sums depend on the number of rows.
    """
    check_family(type(engine_model).__name__, where)
    layer = engine_model.model.layers[0]
    if not _products_agree(layer):
        remedy = "leave it out on this card, or with this version of cuBLAS"
        raise UserError("cuBLAS's sums depend on the number of rows", f"{where}.engine.exact", remedy)
    theirs: Any = layer.self_attn.rotary_emb
    ours: Any = base_model_of(model).rotary_emb
    if theirs.rotary_dim != theirs.head_size or not theirs.is_neox_style:
        raise UserError("no exact RoPE of a part of each head", f"{where}.engine.exact", "leave it out")
    ours.forward = partial(_looked_up, theirs)
    return kernel_of(layer.self_attn.attn.impl, exact=True)


def _looked_up(rotary: Any, x: Tensor, position_ids: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """transformers' rotary module by the engine's table: cos and sin [1, T, D]."""
    cos, sin = rotary.cos_sin_cache[position_ids].to(x.dtype).chunk(2, -1)
    return cos.repeat(1, 1, 2), sin.repeat(1, 1, 2)


@torch.no_grad()
def _products_agree(layer: Any) -> bool:
    """Whether a row's products have the same bits in any number of rows, as they do where no sum is split."""
    attention, mlp = layer.self_attn, layer.mlp
    for module in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj):
        weight, bias = module.weight, module.bias
        if not weight.is_cuda:
            return True
        draw = torch.Generator(weight.device).manual_seed(0)
        x = torch.randn(max(CHECKED_ROWS), weight.shape[1], device=weight.device, generator=draw).to(weight.dtype)
        wanted = F.linear(x, weight, bias)
        if not all(torch.equal(F.linear(x[:rows], weight, bias), wanted[:rows]) for rows in CHECKED_ROWS):
            return False
    return True
