"""Time and memory over the vocabulary V, the rows N and the hidden size D, beside the limit and, at some points, peers.

    ilr-fast bench lm_head_sweep      # one NVIDIA GPU; JSON, and docs/figures/lm_head_time.png and lm_head_memory.png

Every axis has its other two sizes held; a size that lies on two axes is measured once, and `axes` names both. The
limit's extra memory is computed, not measured: what its whole logits take. Rows named `host` are what a call takes on
the host (`host.py`), which at few rows is most of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ilr_benchmarks import peers
from ilr_benchmarks.lm_head import (
    GRPO,
    LIMIT,
    ONE,
    OURS,
    SMALL_CHUNK,
    Products,
    Size,
    Truth,
    forward,
    host_rows,
    loss,
    make,
    name_of,
    release,
)
from ilr_benchmarks.measure import Case, measure
from ilr_benchmarks.problem import Problem
from ilr_kernels import reference

AXES: dict[str, tuple[Size, ...]] = {
    "V": tuple((8192, 2048, v) for v in (32000, 65536, 131072, 262144)),
    "N": tuple((n, 896, 151936) for n in (256, 1024, 4096, 16384, 65536, 131072)),
    "D": tuple((8192, d, 131072) for d in (512, 1024, 2048, 4096, 8192)),
}
QUICK: dict[str, tuple[Size, ...]] = {
    "V": ((64, 32, 500), (64, 32, 1000)),
    "N": ((32, 16, 1200), (64, 16, 1200)),
    "D": ((64, 16, 1000), (64, 32, 1000)),
}
# Two points an axis: a call of Liger's takes up to a second, and seconds more to compile for each size.
PEERS = {(8192, 2048, 32000), (8192, 2048, 131072), (1024, 896, 151936), (16384, 896, 151936), (8192, 8192, 131072)}
HOST = AXES["N"][:3]
ROUNDS = 5
FORWARD, LEAN = "ours, linear_logprob with entropy, forward", f"ours, chunk={SMALL_CHUNK}"
PLAIN = "plain PyTorch, whole logits"


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> Iterator[dict[str, Any]]:
    """Rows of all sizes as they come, with `N`, `D`, `V` and the `axes` they lie on; at most five rounds each."""
    axes = QUICK if quick else AXES
    rows: list[dict[str, Any]] = []
    for size in dict.fromkeys(size for sizes in axes.values() for size in sizes):
        x = make(size, device)
        against = not only_ours and (quick or size in PEERS)
        found = measure(cases(x, against), name_of(x), min(rounds, ROUNDS), device, queued=True)
        found[0]["extra_gib"] = len(x.hidden_ND) * len(x.weight_VD) * x.weight_VD.element_size() / 2**30
        where = {"axes": [axis for axis, sizes in axes.items() if size in sizes], **dict(zip("NDV", size, strict=True))}
        rows += [row | where for row in found]
        yield from rows[-len(found) :]
        del x
        release(device)
    yield from host_rows(QUICK["N"][:1] if quick else HOST, rows, device)


def cases(x: Problem, with_peers: bool) -> list[Case]:
    """The limit first: its row is the one whose memory is computed."""
    truth, products = Truth(x, GRPO), Products(x)
    found = [
        Case(LIMIT, products.whole),
        Case(ONE, products.one),
        Case(OURS, lambda: loss(x), truth.error(), limit=LIMIT),
        Case(LEAN, lambda: loss(x, chunk=SMALL_CHUNK), truth.error(), limit=LIMIT),
        Case(FORWARD, lambda: forward(x), truth.error(), limit=ONE),
    ]
    if with_peers:
        for name, work, most in [(PLAIN, lambda: loss(x, reference), 3), *peers.works(x)]:
            found.append(Case(name, work, truth.error(), tolerance=0.1, limit=LIMIT, most_rounds=min(most, 3)))
    return found
