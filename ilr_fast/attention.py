"""Attention over packed tokens: one row [1, T] without padding, and a plan that says who attends to whom.

transformers' models call a registered attention function with whatever keyword arguments their forward was given; here
that is `ilr_plan`, an object with one method

    attend(layer, query_1HTD, key_1KTD, value_1KTD, settings) -> output_1THD

`TreePlan` (training: shared prefixes, exact gradients) is handled in this module; the engine's cache plan brings its
own. All other layers of the model work token by token and need no change. Without a plan the model is an ordinary one
(`generate` works): the call goes on to transformers' own SDPA, or to plain softmax attention where scores are
soft-capped.

    prepare(model)                                    # once
    packed = pack_sequences(token_lists)
    hidden_TD = packed_forward(model, packed.tokens_T, packed.positions_T, packed.plan)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ilr_fast.errors import UserError
from ilr_fast.flash_attention import flash_attention, usable
from ilr_fast.ticks import tick
from ilr_fast.tree_plan import PackedSequences, TreePlan, pack_sequences, tree_plan

__all__ = [
    "IMPLEMENTATION",
    "AttentionPlan",
    "AttentionSettings",
    "LMHead",
    "PackedSequences",
    "TreePlan",
    "base_model_of",
    "lm_head_of",
    "pack_sequences",
    "packed_forward",
    "prepare",
    "scores_attention",
    "tree_plan",
]

IMPLEMENTATION = "ilr_packed"


@dataclass(frozen=True, slots=True)
class AttentionSettings:
    """What a layer asks for: scores are scale·qk, soft-capped, limited to keys less than `window` positions back."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0


class AttentionPlan(Protocol):
    """Attention for the T packed tokens of one forward pass."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """query [1, H, T, D], key and value [1, K, T, D] of layer `layer` → [1, T, H, D]."""
        ...


class LMHead(NamedTuple):
    """logits = softcap·tanh(scale·(hidden·weightᵀ + bias)/softcap), or without the cap where softcap is None."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float


def prepare(model: nn.Module) -> None:
    """Makes `model` (full or peft) use the packed attention where a plan is given. Harmless when repeated."""
    base = _unwrapped(model)
    if base.config._attn_implementation != IMPLEMENTATION:
        base.set_attn_implementation(IMPLEMENTATION)


def packed_forward(model: nn.Module, tokens_T: Tensor, positions_T: Tensor, plan: AttentionPlan | TreePlan) -> Tensor:
    """Final hidden states [T, D] of one packed row, the LM head not applied; differentiable in the model's weights.

    `tokens_T` and `positions_T` are int64 [T]; `plan` says who attends to whom. Works for full and peft models.
    """
    tick()
    prepare(model)
    base = base_model_of(model)
    # A mask of four dimensions is passed on as it is: no mask is built, and none is looked at where a plan is given.
    no_mask = torch.empty(1, 1, 1, 1, device=tokens_T.device)
    output = base(
        input_ids=tokens_T[None], position_ids=positions_T[None], attention_mask=no_mask, use_cache=False, ilr_plan=plan
    )
    return output.last_hidden_state[0]


def base_model_of(model: nn.Module) -> nn.Module:
    """The decoder under the LM head, with peft's layers in it."""
    inner = _unwrapped(model)
    return inner.get_decoder()


def lm_head_of(model: nn.Module) -> LMHead:
    """The LM head's live parameters (weight [V, D], bias [V] or None) and what is done to its logits."""
    inner = _unwrapped(model)
    head = inner.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # peft keeps a trained copy of the whole module
        head = head.modules_to_save[head.active_adapter]
    if hasattr(head, "base_layer"):
        raise UserError("an adapter on the LM head is not supported", "lora target_modules", "leave `lm_head` out")
    config = inner.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return LMHead(head.weight, getattr(head, "bias", None), softcap, scale)


def _unwrapped(model: nn.Module) -> Any:
    inner: Any = model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    ilr_plan: AttentionPlan | TreePlan | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers: see the module's docstring."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if ilr_plan is None:
        return _ordinary(module, query, key, value, attention_mask, scale, dropout, softcap, kwargs), None
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UserError(f"attention with {name} is not supported", type(module).__name__, "use another model")
    settings = AttentionSettings(scale, sliding_window, softcap, dropout)
    if isinstance(ilr_plan, TreePlan):
        return tree_attention(ilr_plan, query, key, value, settings), None
    return ilr_plan.attend(module.layer_idx, query, key, value, settings), None


def _ordinary(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    softcap: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scale, **kwargs)[0]
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    if mask.dtype == torch.bool:  # a padding row sees nothing: with -inf its softmax would be NaN
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, lowest)
    settings = AttentionSettings(scale, softcap=softcap, dropout=dropout)
    return scores_attention(query, key, value, mask, settings).transpose(1, 2).contiguous()


def tree_attention(plan: TreePlan, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
    """query [1, H, T, D], key and value [1, K, T, D] → [1, T, H, D]: by flash attention where it can, else by masks."""
    if usable(plan, query, query.shape[-1], settings.softcap, settings.dropout):
        q_THD, k_TKD, v_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
        window = plan.window(settings.window)
        return flash_attention(q_THD, k_TKD, v_TKD, plan.segments(query.device), settings.scale, window)[None]
    masks = plan.masks(settings.window, query.dtype, query.device)
    queries = query.split([block.end - block.start for block in plan.blocks], dim=2)
    # One split, not a slice a block: a slice's backward fills a whole row with zeros.
    keys, values = key.split(plan.cut.sizes, dim=2), value.split(plan.cut.sizes, dim=2)
    outputs = [
        block_attention(q, _join(keys, chunks), _join(values, chunks), mask, settings).transpose(1, 2)
        for q, chunks, mask in zip(queries, plan.cut.chunks, masks, strict=True)
    ]
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0].contiguous()


def _join(pieces: tuple[Tensor, ...], chunks: tuple[int, ...]) -> Tensor:
    return torch.cat([pieces[n] for n in chunks], dim=2) if len(chunks) > 1 else pieces[chunks[0]]


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: AttentionSettings
) -> Tensor:
    """Attention of query [B, H, Q, D] to key and value [B, K, S, D] (H a multiple of K) → [B, H, Q, D].

    `mask` is additive and broadcasts to [B, H, Q, S]; None means causal with Q = S.
    """
    if settings.softcap is not None:
        if mask is None:
            size = query.shape[2]
            mask = torch.full((size, size), float("-inf"), dtype=query.dtype, device=query.device).triu_(1)
        return scores_attention(query, key, value, mask, settings)
    groups = query.shape[1] // key.shape[1]
    grouped = groups > 1 and (query.device.type == "cpu" or (mask is None and query.dtype != torch.float32))
    if groups > 1 and not grouped:  # CUDA's kernel for masks knows no groups
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=settings.dropout,
        is_causal=mask is None,
        scale=settings.scale,
        enable_gqa=grouped,
    )


def scores_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, settings: AttentionSettings) -> Tensor:
    """Softmax attention with the scores in memory, for soft-capped scores; shapes as in `block_attention`."""
    batch, heads, queries, dim = query.shape
    groups = heads // key.shape[1]
    if mask.dim() == 4 and mask.shape[1] > 1:
        mask = mask.reshape(mask.shape[0], key.shape[1], groups, *mask.shape[2:])
    elif mask.dim() == 4:
        mask = mask[:, :, None]
    grouped = query.reshape(batch, key.shape[1], groups, queries, dim)
    scores = grouped @ key[:, :, None].transpose(-1, -2) * settings.scale
    if settings.softcap is not None:
        scores = settings.softcap * torch.tanh(scores / settings.softcap)
    weights = (scores + mask).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, settings.dropout, training=settings.dropout > 0)
    return (weights @ value[:, :, None]).reshape(batch, heads, queries, value.shape[-1])


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
