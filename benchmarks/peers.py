"""The same loss by other libraries, where they are installed: Liger and cut-cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from ilr_benchmarks.measure import Outputs
from ilr_benchmarks.problem import TURNS, Problem


def works(x: Problem) -> list[tuple[str, Callable[[], Outputs], int]]:
    """(name, one call, most rounds) of each peer that is installed and can run here."""
    if not x.hidden_ND.is_cuda:
        return []
    found: list[tuple[str, Callable[[], Outputs], int]] = []
    if find_spec("liger_kernel"):
        found.append(("Liger", _liger(x), 2))
    if find_spec("cut_cross_entropy"):
        found.append(("cut-cross-entropy", lambda: cut_cross_entropy(x), 5))
    return found


def _liger(x: Problem) -> Callable[[], Outputs]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    fused = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="bnpo", chunk_size=1, epsilon_low=0.2, epsilon_high=0.2
    )
    length = len(x.target_N) // TURNS
    torch.compiler.reset()  # Liger compiles its chunk for this shape alone, not for whatever was measured before

    def work() -> Outputs:
        x.forget()
        hidden, target, old, advantage = (
            y.view(TURNS, length, *y.shape[1:]) for y in (x.hidden_ND, x.target_N, x.old_logp_N, x.advantage_N)
        )
        mask = torch.ones_like(old)
        out = fused(hidden, x.weight_VD, target, mask, advantage[:, 0].contiguous(), old_per_token_logps=old)
        loss = out[0] if isinstance(out, tuple) else out
        loss.backward()
        return {"loss": loss.detach(), **_gradients(x)}

    return work


def cut_cross_entropy(x: Problem) -> Outputs:
    from cut_cross_entropy import linear_cross_entropy

    x.forget()
    logp_N = -linear_cross_entropy(x.hidden_ND, x.weight_VD, x.target_N, reduction="none").float()
    ratio_N = (logp_N - x.old_logp_N).exp()
    gain_N = torch.minimum(ratio_N * x.advantage_N, ratio_N.clamp(0.8, 1.2) * x.advantage_N)
    loss = -(gain_N * x.token_weight_N).sum()
    loss.backward()
    return {"loss": loss.detach(), "logp": logp_N.detach(), **_gradients(x)}


def _gradients(x: Problem) -> Outputs:
    found = {"dhidden": x.hidden_ND.grad, "dweight": x.weight_VD.grad}
    x.forget()
    return {name: tensor for name, tensor in found.items() if tensor is not None}
