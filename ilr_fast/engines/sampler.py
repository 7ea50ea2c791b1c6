"""Sampling from a batch of logits, each row by its own rule and its own random number.

A row's token is the inverse of its cumulative distribution at one uniform number u(seed, position), in two levels: the
sums of blocks of 512 probabilities are searched first, then the one block that holds the token, so that a vocabulary of
262,144 costs one softmax and one sum more than the logits. u comes from a counter-based hash (splitmix64, Steele, Lea
and Flood, 2014), not from a generator with a state: nothing else in the batch can move it. A row's arithmetic does not
depend on the other rows either; its logits may, in the last bits (see engines/embedded.py).

    tokens, logps = sample(logits_RV, [Sampling(max_tokens=1, seed=3)] * R, positions)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ilr_fast.types import Sampling

BLOCK = 512
CANDIDATES = 1024  # the likeliest tokens that top-p looks at first; only a row that needs more is sorted whole

_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_WORD = (1 << 64) - 1


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """One float64 in [0, 1) for each pair of a seed (any integer, taken modulo 2**64) and a position."""
    seed = np.array([s & _WORD for s in seeds], dtype=np.uint64)
    bits = _splitmix(_splitmix(seed) + np.asarray(positions, dtype=np.uint64))
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52  # u·total < total, also after rounding


def _splitmix(x: np.ndarray) -> np.ndarray:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def sample(logits_RV: Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> tuple[list[int], list[float]]:
    """Samples one token a row and gives its log-prob under softmax(logits / temperature), before top-k and top-p.

    `logits_RV` is float32 and is overwritten. Greedy rows (temperature 0) take the first of the likeliest tokens and
    temperature 1. A row whose logits are not finite gets a NaN log-prob.
    """
    greedy = [r for r, s in enumerate(samplings) if s.temperature == 0]
    temperatures = [s.temperature or 1.0 for s in samplings]
    if any(t != 1 for t in temperatures):
        logits_RV.div_(torch.tensor(temperatures, device=logits_RV.device)[:, None])
    tokens_R = torch.empty(len(samplings), dtype=torch.int64, device=logits_RV.device)
    if greedy:
        tokens_R[greedy] = logits_RV[greedy].argmax(-1) if len(greedy) < len(samplings) else logits_RV.argmax(-1)
    probs_RV = torch.softmax(logits_RV, dim=-1, out=logits_RV)
    if len(greedy) < len(samplings):
        _sample_rows(probs_RV, samplings, positions, tokens_R)
    logps_R = probs_RV.gather(1, tokens_R[:, None])[:, 0].log()
    return tokens_R.tolist(), logps_R.tolist()


def _sample_rows(probs_RV: Tensor, samplings: Sequence[Sampling], positions: Sequence[int], tokens_R: Tensor) -> None:
    """Fills in the tokens of the rows that are not greedy."""
    u_R = torch.from_numpy(uniforms([s.seed for s in samplings], positions)).to(probs_RV.device)
    plain = [r for r, s in enumerate(samplings) if s.temperature > 0 and not s.top_k and s.top_p >= 1]
    if len(plain) == len(samplings):
        tokens_R.copy_(_invert(probs_RV, u_R))
    elif plain:
        tokens_R[plain] = _invert(probs_RV[plain], u_R[plain])
    for r, s in enumerate(samplings):
        if s.temperature > 0 and (s.top_k or s.top_p < 1):
            tokens_R[r] = _restricted(probs_RV[r], s, float(u_R[r]))


def _invert(probs_RV: Tensor, u_R: Tensor) -> Tensor:
    """The token whose cell of the cumulative distribution holds u, for each row."""
    vocabulary = probs_RV.shape[1]
    whole = vocabulary // BLOCK * BLOCK
    sums = [probs_RV[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)] if whole else []
    if whole < vocabulary:
        sums.append(probs_RV[:, whole:].sum(-1, keepdim=True))
    cdf_RB = torch.cat(sums, dim=1).double().cumsum(-1)
    target_R1 = u_R[:, None] * cdf_RB[:, -1:]
    block_R1 = torch.searchsorted(cdf_RB, target_R1, right=True).clamp_(max=cdf_RB.shape[1] - 1)
    before_R1 = torch.where(block_R1 > 0, cdf_RB.gather(1, (block_R1 - 1).clamp_(min=0)), 0.0)
    columns_RC = block_R1 * BLOCK + torch.arange(min(BLOCK, vocabulary), device=probs_RV.device)
    inside_RC = probs_RV.gather(1, columns_RC.clamp_(max=vocabulary - 1)).double()
    inside_RC[block_R1[:, 0] * BLOCK + inside_RC.shape[1] > vocabulary, vocabulary - whole :] = 0
    place_R1 = torch.searchsorted(inside_RC.cumsum(-1), target_R1 - before_R1, right=True)
    # A block's sum was rounded: a target above it falls on the block's last token that can be sampled at all.
    last_R1 = (inside_RC > 0).long().cumsum(-1).argmax(-1, keepdim=True)
    return (block_R1 * BLOCK + torch.minimum(place_R1, last_R1))[:, 0].clamp_(max=vocabulary - 1)


def _restricted(probs_V: Tensor, sampling: Sampling, u: float) -> int:
    """top-k first, then top-p of what is left, likeliest first: the smallest set that holds `top_p`."""
    size = min(sampling.top_k or CANDIDATES, len(probs_V))
    values, tokens = probs_V.topk(size)
    total = values.sum(dtype=torch.float64) if sampling.top_k else 1.0
    cdf = values.double().cumsum(-1)
    if not sampling.top_k and cdf[-1] < sampling.top_p:
        values, tokens = probs_V.sort(descending=True)
        cdf = values.double().cumsum(-1)
    if sampling.top_p < 1:
        kept = int((cdf - values < sampling.top_p * total).sum())
        cdf = cdf[: max(kept, 1)]
    place = int(torch.searchsorted(cdf, u * cdf[-1], right=True))
    return int(tokens[min(place, len(cdf) - 1)])
