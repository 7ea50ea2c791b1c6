"""AdamW's Triton kernel under Triton's interpreter, in a process of its own; status 0: all agrees.

TRITON_INTERPRET=1 python tests/kernels_interpret_adamw.py
"""

from __future__ import annotations

import os

import torch
from test_kernels_adamw import (
    test_against_truth_in_float32,
    test_gradients_off_alignment,
    test_part_by_part_is_the_whole,
    test_the_seed_decides,
    test_what_is_rounded_is_a_neighbour_and_right_on_average,
)

if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    from ilr_kernels import adamw_triton

    assert type(adamw_triton.adamw_kernel).__name__ == "InterpretedFunction"
    for gradient in (torch.float32, torch.bfloat16):
        test_against_truth_in_float32("cpu", gradient, 10)
    test_what_is_rounded_is_a_neighbour_and_right_on_average("cpu")
    test_the_seed_decides("cpu")
    test_part_by_part_is_the_whole("cpu")
    test_gradients_off_alignment("cpu")
    print("all agree")
