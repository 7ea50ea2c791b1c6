"""What a sampler of logits has to do, checked by the same functions under the interpreter and on a GPU."""

from __future__ import annotations

import numpy as np
import torch
from ilr_kernels.sample import PIECE, sample
from torch import Tensor

SIZES = [(1, 1), (3, 37), (40, 9000)]  # rows, vocabulary
LARGE = [(70, 130), (5, 151936), (60, 49152)]


def given(device: str, rows: int, vocabulary: int, temperature: float) -> tuple[Tensor, ...]:
    """Logits whose rows lie apart, slots out of order, temperatures, seeds and positions."""
    g = torch.Generator().manual_seed(rows + vocabulary)
    wide_NV = torch.full((rows, vocabulary + 8), float("nan"))
    wide_NV[:, :vocabulary] = 4 * torch.randn(rows, vocabulary, generator=g)
    slots_N = torch.randperm(rows, generator=g).int()
    seeds_N = torch.randint(-(2**62), 2**62, (rows,), generator=g)
    more = slots_N, torch.full((rows,), temperature), seeds_N, torch.arange(rows) % 7 + 100
    return wide_NV.to(device)[:, :vocabulary], *(tensor.to(device) for tensor in more)


def philox(seed: np.ndarray, counter: np.ndarray) -> list[np.ndarray]:
    """Philox 4x32 with 10 rounds (Salmon et al., SC 2011): four uint32 arrays."""
    keys = [(seed.astype(np.uint64) >> np.uint64(shift)) & np.uint64(0xFFFFFFFF) for shift in (0, 32)]
    c = [counter.astype(np.uint32).astype(np.uint64), *(np.zeros(counter.shape, np.uint64) for _ in range(3))]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        low = np.uint64(0xFFFFFFFF)
        c = [(b >> np.uint64(32)) ^ c[1] ^ keys[0], b & low, (a >> np.uint64(32)) ^ c[3] ^ keys[1], a & low]
        keys = [(keys[0] + np.uint64(0x9E3779B9)) & low, (keys[1] + np.uint64(0xBB67AE85)) & low]
    return c


def misses(weights: np.ndarray, place: int, bits: int) -> float:
    """By how much of all weight `place` is not the one that 32 random bits draw of `weights`, in float64."""
    below, part = weights[:place].sum() / weights.sum(), (bits + 0.5) / 2**32
    return max(below - part, part - below - weights[place] / weights.sum(), 0.0)


def check_tokens(device: str, rows: int, vocabulary: int, temperature: float) -> None:
    """Pieces and tokens are those that the random bits draw (or next to them by rounding), and the log-probs theirs."""
    logits_NV, *more = given(device, rows, vocabulary, temperature)
    tokens_N, logp_N = sample(logits_NV, *more)
    logps_NV = (logits_NV.double() / (temperature or 1)).log_softmax(-1)
    torch.testing.assert_close(logp_N.double(), logps_NV.gather(1, tokens_N[:, None])[:, 0], atol=2e-5, rtol=0)
    if temperature == 0:
        assert torch.equal(tokens_N, logits_NV.argmax(-1))
        return
    slots_N, _, seeds_S, positions_N = (tensor.tolist() for tensor in more)
    for row, token in enumerate(tokens_N.tolist()):
        weights = logps_NV[row].exp().cpu().numpy()
        bits = philox(np.array([seeds_S[slots_N[row]]]), np.array([positions_N[row]]))
        pieces = np.add.reduceat(weights, np.arange(0, vocabulary, PIECE))
        inside = weights[token // PIECE * PIECE :][:PIECE]
        assert misses(pieces, token // PIECE, int(bits[0][0])) < 1e-5
        assert misses(inside, token % PIECE, int(bits[1][0])) < 1e-5


def check_company(device: str) -> None:
    """A row's token follows from its seed and position, not from its place or the number of rows."""
    logits_NV, slots_N, temperatures_S, seeds_S, positions_N = given(device, 6, 300, 1.0)
    tokens_N, _ = sample(logits_NV, slots_N, temperatures_S, seeds_S, positions_N)
    back = torch.arange(5, -1, -1, device=logits_NV.device)[::3]
    fewer, _ = sample(logits_NV[back], slots_N[back], temperatures_S, seeds_S, positions_N[back])
    assert torch.equal(fewer, tokens_N[back])
    longs, _ = sample(logits_NV, slots_N.long(), temperatures_S, seeds_S, positions_N)
    assert torch.equal(longs, tokens_N), "slots are of either width"


def check_distribution(device: str, rows: int) -> None:
    """χ² of many rows with the same few likely tokens, which lie in one part and in several."""
    vocabulary = 9000
    likely = torch.tensor([0, 1, 255, 256, 4095, 4096, 8191, 8999], device=device)
    logits_V = torch.full((vocabulary,), -11.0, device=device)
    logits_V[likely] = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, 1.5, 2.5, 0.0], device=device)
    zeros_N, one, seed = torch.zeros(rows).int(), torch.ones(1), torch.tensor([7])
    more = (tensor.to(device) for tensor in (zeros_N, one, seed, torch.arange(rows)))
    tokens_N, _ = sample(logits_V.expand(rows, vocabulary), *more)
    counts = [*((tokens_N == token).sum() for token in likely), (~torch.isin(tokens_N, likely)).sum()]
    p = logits_V.softmax(-1)
    expected = rows * torch.cat([p[likely], (1 - p[likely].sum())[None]])
    chi2 = float(((torch.stack(counts) - expected) ** 2 / expected).sum())
    assert chi2 < 30, f"χ² with 8 degrees of freedom: {chi2:.1f}"


def check_not_finite(device: str) -> None:
    """A NaN among the logits is seen in the log-prob; the token is still one."""
    logits_NV, *more = given(device, 2, 1100, 1.0)
    logits_NV[1, 1050] = float("nan")
    tokens_N, logp_N = sample(logits_NV, *more)
    assert logp_N.isfinite().tolist() == [True, False] and 0 <= int(tokens_N[1]) < 1100


def check_last_bits(device: str) -> None:
    """Random bits that float32 rounds to all of the weight, for the piece and for the token, draw no unlikely token."""
    logits_NV = torch.full((2, 9000), -60.0, device=device)
    logits_NV[:, 5] = 0
    ends = torch.tensor([20922799, 25266344])  # positions whose first and second bits are 2³² − 17 and 2³² − 122
    bits = philox(np.array([7, 7]), ends.numpy())
    assert min(int(bits[0][0]), int(bits[1][1])) >= 2**32 - 128
    more = (tensor.to(device) for tensor in (torch.zeros(2).int(), torch.ones(1), torch.tensor([7]), ends))
    tokens_N, _ = sample(logits_NV, *more)
    assert tokens_N.tolist() == [5, 5]


def check_all(device: str) -> None:
    for size in (*SIZES, *(LARGE if device == "cuda" else ())):
        for temperature in (0.0, 0.7):
            check_tokens(device, *size, temperature)
    check_company(device)
    check_not_finite(device)
    check_last_bits(device)
    if device == "cuda":
        check_distribution(device, 20000)
