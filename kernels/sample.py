"""Samples a token of every row of logits and gives its log-prob: softmax(logits / temperature), or greedy at 0.

    tokens_N, logp_N = sample(logits_NV, slot_N, temperature_S, seed_S, position_N)

Random numbers follow from a row's seed and position alone, not from the rows beside it. Log-probs of greedy rows are at
temperature 1. For a GPU or Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
from ilr_kernels.launch import aligned_vectors, launch
from ilr_kernels.sample_kernel import draw_kernel, weigh_pieces_kernel
from torch import Tensor

PIECE = 4096  # logits


def sample(
    logits_NV: Tensor, slot_N: Tensor, temperature_S: Tensor, seed_S: Tensor, position_N: Tensor
) -> tuple[Tensor, Tensor]:
    """int64 tokens and float32 log-probs of N rows.

    `logits_NV` float32, its rows may lie apart; `slot_N` int32 or int64 says where a row's float32 temperature and
    int64 seed are; `position_N` int64. ValueError names what has another dtype or shape.
    """
    rows, vocabulary = logits_NV.shape
    for name, tensor, *dtypes in (
        ("logits_NV", logits_NV, torch.float32), ("slot_N", slot_N, torch.int32, torch.int64),
        ("position_N", position_N, torch.int64), ("temperature_S", temperature_S, torch.float32),
        ("seed_S", seed_S, torch.int64),
    ):  # fmt: skip
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} is {tensor.dtype}, not {' or '.join(map(str, dtypes))}")
    if slot_N.shape != (rows,) or position_N.shape != (rows,) or logits_NV.stride(1) != 1:
        raise ValueError("slot_N and position_N have an element for every row of logits_NV, whose columns are adjacent")
    pieces = triton.cdiv(vocabulary, PIECE)
    max_P, sum_P = aligned_vectors(2, rows * pieces, logits_NV)  # of one row after the other
    sampled_N = torch.empty(rows, dtype=torch.int64, device=logits_NV.device)
    logp_N = torch.empty(rows, dtype=torch.float32, device=logits_NV.device)
    if rows == 0:
        return sampled_N, logp_N
    weighed = (logits_NV, slot_N, temperature_S, max_P, sum_P, logits_NV.stride(0), vocabulary)
    launch(weigh_pieces_kernel, (rows, pieces), weighed, (PIECE,), num_warps=4)
    drawn = (
        logits_NV, slot_N, temperature_S, seed_S, position_N, max_P, sum_P, sampled_N, logp_N,
        logits_NV.stride(0), vocabulary, pieces,
    )  # fmt: skip
    launch(draw_kernel, (rows,), drawn, (triton.next_power_of_2(pieces), PIECE), num_warps=8)
    return sampled_N, logp_N
