"""The Triton kernels of fused layers under Triton's interpreter, in a process of its own; status 0: all agrees.

TRITON_INTERPRET=1 python tests/kernels_interpret_layers.py
"""

from __future__ import annotations

import os

from test_kernels_layers import (
    SIZES,
    check_bits,
    check_gated,
    check_norm,
    check_norm_backward,
    check_rotary,
    check_row_sums,
)

if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    for size in SIZES:
        for one_plus in (False, True):
            check_norm("cpu", size, one_plus)
    for activation in ("silu", "gelu_tanh"):
        check_gated("cpu", activation)
    for size in (8, 24, 64):
        check_rotary("cpu", size)
    check_row_sums("cpu")
    check_norm_backward("cpu")
    check_bits("cpu")
    print("all agree")
