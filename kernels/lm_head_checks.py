"""Checks of the LM head functions' arguments: a mistake raises `ValueError` with the argument's name first."""

from __future__ import annotations

import math

import torch
from ilr_kernels.policy_loss import PolicyLoss
from torch import Tensor

IGNORED = -100  # a target that carries no loss and no gradient

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_head(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> None:
    """Shapes, dtypes and devices; `rows.Counting` looks at the targets."""
    _require(hidden_TD.dim() == 2, "hidden_TD must have two dimensions (tokens, hidden size), not {}", hidden_TD.shape)
    _require(hidden_TD.dtype in FLOATS, "hidden_TD must be a float tensor, not {}", hidden_TD.dtype)
    _require(
        weight_VD.dim() == 2 and weight_VD.shape[1] == hidden_TD.shape[1] and weight_VD.shape[0] > 0,
        "weight_VD must be (vocabulary, {}) to fit hidden_TD, not {}",
        hidden_TD.shape[1],
        weight_VD.shape,
    )
    _like("weight_VD", weight_VD, hidden_TD)
    _check_target(target_T, "hidden_TD", hidden_TD)
    if bias_V is not None:
        _require(bias_V.shape == weight_VD.shape[:1], "bias_V must be ({},), not {}", weight_VD.shape[0], bias_V.shape)
        _like("bias_V", bias_V, hidden_TD)
    _check_finish(temperature, softcap)


def check_logits(logits_TV: Tensor, target_T: Tensor, temperature: float, softcap: float | None) -> None:
    """The same where the logits are given."""
    shape = logits_TV.shape
    _require(len(shape) == 2 and shape[1] > 0, "logits_TV must be (tokens, vocabulary), not {}", shape)
    _require(logits_TV.dtype in FLOATS, "logits_TV must be a float tensor, not {}", logits_TV.dtype)
    _check_target(target_T, "logits_TV", logits_TV)
    _check_finish(temperature, softcap)


def _check_target(target_T: Tensor, name: str, rows: Tensor) -> None:
    _require(
        target_T.shape == rows.shape[:1],
        "target_T must be ({},), one target for each row of {}, not {}",
        rows.shape[0],
        name,
        target_T.shape,
    )
    _require(target_T.dtype == torch.int64, "target_T must be int64, not {}", target_T.dtype)
    _require(target_T.device == rows.device, "target_T is on {}, {} on {}", target_T.device, name, rows.device)


def _check_finish(temperature: float, softcap: float | None) -> None:
    _require(temperature > 0 and math.isfinite(temperature), "temperature must be above 0, not {}", temperature)
    _require(softcap is None or softcap > 0, "softcap must be above 0 or None, not {}", softcap)


def check_tokens(hidden_TD: Tensor, tokens: dict[str, Tensor | None]) -> None:
    """Float vectors with one entry a token."""
    for name, x_T in tokens.items():
        if x_T is None:
            continue
        _require(x_T.shape == hidden_TD.shape[:1], "{} must be ({},), not {}", name, hidden_TD.shape[0], x_T.shape)
        _require(x_T.dtype in FLOATS, "{} must be a float tensor, not {}", name, x_T.dtype)
        _require(x_T.device == hidden_TD.device, "{} is on {}, hidden_TD on {}", name, x_T.device, hidden_TD.device)


def check_loss(
    loss: PolicyLoss,
    hidden_TD: Tensor,
    ref_logp_T: Tensor | None,
    behavior_logp_T: Tensor | None,
    turn_T: Tensor | None,
) -> None:
    """What the chosen loss needs is there."""
    _require(loss.beta == 0 or ref_logp_T is not None, "ref_logp_T is needed for beta={}", loss.beta)
    _require(
        loss.importance == "none" or behavior_logp_T is not None,
        "behavior_logp_T is needed for importance={!r}",
        loss.importance,
    )
    if turn_T is None:
        _require(not loss.over_turns, "turn_T is needed where the ratio or the importance weight is over a sequence")
        return
    _require(turn_T.shape == hidden_TD.shape[:1], "turn_T must be ({},), not {}", len(hidden_TD), turn_T.shape)
    _require(turn_T.dtype in (torch.int64, torch.int32), "turn_T must be an integer tensor, not {}", turn_T.dtype)
    _require(turn_T.device == hidden_TD.device, "turn_T is on {}, hidden_TD on {}", turn_T.device, hidden_TD.device)


def check_buffer(weight_grad_VD: Tensor | None, weight_VD: Tensor) -> None:
    """The buffer that dweight is added to."""
    if weight_grad_VD is None:
        return
    _require(
        weight_grad_VD.shape == weight_VD.shape,
        "weight_grad_VD must have weight_VD's shape {}, not {}",
        weight_VD.shape,
        weight_grad_VD.shape,
    )
    _require(
        weight_grad_VD.dtype in (weight_VD.dtype, torch.float32),
        "weight_grad_VD must be float32 or weight_VD's {}, not {}",
        weight_VD.dtype,
        weight_grad_VD.dtype,
    )
    _require(
        weight_grad_VD.device == weight_VD.device,
        "weight_grad_VD is on {}, weight_VD on {}",
        weight_grad_VD.device,
        weight_VD.device,
    )


def check_chunk(chunk: int | None) -> None:
    """Rows of logits held at once."""
    _require(chunk is None or chunk >= 1, "chunk must be at least 1 or None, not {}", chunk)


def _like(name: str, x: Tensor, hidden_TD: Tensor) -> None:
    _require(x.dtype == hidden_TD.dtype, "{} is {}, hidden_TD {}: must be the same", name, x.dtype, hidden_TD.dtype)
    _require(x.device == hidden_TD.device, "{} is on {}, hidden_TD on {}", name, x.device, hidden_TD.device)


def _require(holds: bool, message: str, *parts: object) -> None:
    """Raises `message` with `parts` filled in, which costs too much to be written out where nothing is wrong."""
    if not holds:
        raise ValueError(message.format(*(tuple(p) if isinstance(p, torch.Size) else p for p in parts)))
