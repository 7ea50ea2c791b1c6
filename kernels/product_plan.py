"""How the product with the softmax's sums inside is tiled on a card, from the card's own properties.

The copy engine (TMA) loads where there is one, compute capability 9.0 and up; tiles are as large as registers and
shared memory allow without spills. The tiling depends on the card and the head, never on the number of rows: a row's
sums have the same bits in any batch.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # plans for other cards are made where there is no PyTorch
    import torch
    from torch import Tensor


class Plan(NamedTuple):
    """Tile sizes and launch options of `product_kernel`."""

    tma: bool
    flatten: bool  # whether the next tile's first loads start before this one is finished
    halves: bool
    block_m: int
    block_n: int
    block_k: int
    group: int
    warps: int
    stages: int
    programs: int
    specialized: bool = False  # whether groups of warps take roles (`softmax_product_gluon.py`)


BAND_BYTES = 2**24  # hidden states of the rows that share a pass over the weights
INTERPRETED = Plan(False, False, True, 16, 32, 16, group=2, warps=4, stages=1, programs=3)


def plan(hidden_ND: Tensor, weight_VD: Tensor, softcap: bool) -> Plan:
    """The tiling for these tensors on their device; `softcap` needs registers of its own."""
    if not hidden_ND.is_cuda:
        return INTERPRETED
    return card_plan(*_properties(hidden_ND.device), depth=hidden_ND.shape[1], softcap=softcap)


@cache
def card_plan(capability: int, shared_memory: int, processors: int, depth: int, softcap: bool) -> Plan:
    """The tiling for a compute capability (90 for 9.0), bytes of shared memory a block may have, and processors.

    `depth` is the hidden size: a band of rows that share a pass over the weights should stay in the second-level cache.
    """
    group = min(32, max(8, BAND_BYTES // (2 * 128 * depth)))
    tma, large = capability >= 90, shared_memory >= 160 * 1024
    if tma and large and capability < 100 and not softcap:
        return Plan(True, True, True, 128, 256, 64, group, 8, 4, processors, specialized=True)
    depth_of_tile, stages = (64, 4) if large else (32, 3)
    return Plan(tma, tma and large, False, 128, 128, depth_of_tile, group, warps=8, stages=stages, programs=processors)


@cache
def _properties(device: torch.device) -> tuple[int, int, int]:
    import torch

    found = torch.cuda.get_device_properties(device)
    shared = found.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return 10 * found.major + found.minor, shared, found.multi_processor_count
