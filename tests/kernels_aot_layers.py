"""The kernels of fused layers as cases for kernels_aot.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

WIDTHS = {64: (32, 64), 1536: (1, 2048), 4096: (1, 4096), 8192: (1, 8192)}  # to rows and columns of a block


def layer_cases(case: Callable[..., Any], import_kernels: Callable[[str], Any]) -> Iterator[Any]:
    """Norms of heads and of models, gated units, rotary embeddings, in bfloat16; sampling of float32 logits."""
    norm, gated = import_kernels("norm_kernel"), import_kernels("gated_kernel")
    rotary = import_kernels("rotary_kernel").rotary_kernel
    pointers = dict.fromkeys(("p_x", "p_weight", "p_y", "p_dy", "p_dx", "p_add", "p_sum"), "*bf16") | {
        "p_dw": "*fp32",
        "eps": "fp32",
    }
    types = pointers | dict.fromkeys(("rows", "blocks", "heads", "stride"), "i32")
    for size, (block_r, block_d) in WIDTHS.items():
        blocks = {"SIZE": size, "ONE_PLUS": size == 64, "BLOCK_R": block_r, "BLOCK_D": block_d}
        warps = min(16, max(4, block_d // 512))
        yield case(f"norm_forward_kernel {size}", norm.norm_forward_kernel, types, blocks, warps=warps)
        yield case(f"norm_backward_kernel {size}", norm.norm_backward_kernel, types, blocks, warps=warps)
    types = dict.fromkeys(("p_gate", "p_up", "p_out", "p_dout"), "*bf16")
    types |= dict.fromkeys(("size", "stride", "out_stride"), "i32")
    for activation in ("silu", "gelu_tanh"):
        constants = {"ACTIVATION": activation, "BLOCK": 1024}
        for kernel in (gated.gated_forward_kernel, gated.gated_backward_kernel):
            yield case(f"{kernel.__name__} {activation}", kernel, types, constants, warps=4)
    types = dict.fromkeys(("p_q", "p_k", "p_cos", "p_sin", "p_q_out", "p_k_out"), "*bf16")
    types |= dict.fromkeys(("tokens", "heads", "key_heads"), "i32")
    types |= dict.fromkeys(("q_stride", "k_stride", "q_out_stride", "k_out_stride"), "i32")
    types |= {"p_positions": "*i64"}
    for backward, second in ((False, 64), (True, 64), (False, 0)):
        constants = {"SIZE": 128, "HALF": 64, "SECOND": second, "BACKWARD": backward, "BLOCK_H": 32, "BLOCK_D": 64}
        yield case(f"rotary_kernel {backward} {second}", rotary, types, constants, warps=4)
    types = dict.fromkeys(("p_one", "p_two", "p_one_out", "p_two_out"), "*bf16")
    types |= dict.fromkeys(("p_starts", "p_places"), "*i32") | dict.fromkeys(("one_stride", "two_stride"), "i32")
    kernel = import_kernels("row_sums_kernel").row_sums_kernel
    yield case("row_sums_kernel", kernel, types, {"WIDTH": 256, "BLOCK": 256}, warps=2)
    sampling = import_kernels("sample_kernel")
    types = dict.fromkeys(("p_logits", "p_temperature", "p_max", "p_sum", "p_logp"), "*fp32") | {"p_slot": "*i32"}
    types |= dict.fromkeys(("p_seed", "p_position", "p_sampled"), "*i64")
    types |= dict.fromkeys(("stride", "V", "pieces"), "i32")
    yield case("weigh_pieces_kernel", sampling.weigh_pieces_kernel, types, {"S": 4096}, warps=4)
    yield case("draw_kernel", sampling.draw_kernel, types, {"P": 64, "S": 4096}, warps=8)
