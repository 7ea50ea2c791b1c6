"""A Llama of several seeds at once in plain PyTorch: every weight has a first dimension K, one entry a seed.

Seeds of a small model are bound by launches; K of them together take hardly more launches than one. What is rounded to
16 bits is said part by part (`Precision`), so that one part at a time can be compared. Shapes: K seeds, B texts, T
tokens, D hidden.

    model = Llama(folder, PRECISIONS["bfloat16"], seeds=[1, 2], device="cuda")
    logits = model.logits(ids_KBT, mask_KBT, last=13)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ilr_fast.copies import spread

LAYER = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    "first": "input_layernorm", "second": "post_attention_layernorm",
}  # fmt: skip
NORMS = ("first", "second", "norm")
WIDE, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


class Precision(NamedTuple):
    """What each part is used in; AdamW's weights are float32 in all of them. Products take `matrices`.

    `residual` is what layers add up in, rotations too; `start` is where AdamW's float32 weights begin: at the folder's
    `own` float32 weights, at those rounded to 16 bits (`rounded`), or spread over what rounds to them (copies.py).
    """

    matrices: torch.dtype
    norms: torch.dtype
    embeddings: torch.dtype
    residual: torch.dtype
    start: str = "spread"
    teller: str | None = None  # the precision in which answers are sampled, another than that of the update


PRECISIONS = {
    "autocast": Precision(BF16, WIDE, WIDE, WIDE, "own"),
    "bfloat16": Precision(BF16, BF16, BF16, BF16),
    "mixed": Precision(BF16, WIDE, WIDE, WIDE, "own", "bfloat16"),
    "float16": Precision(FP16, FP16, FP16, FP16),
    "residual": Precision(BF16, BF16, BF16, WIDE),
    "norms": Precision(BF16, WIDE, BF16, BF16),
    "embeddings": Precision(BF16, BF16, WIDE, BF16),
    "residual_norms": Precision(BF16, WIDE, BF16, WIDE),
    "autocast_spread": Precision(BF16, WIDE, WIDE, WIDE),
    "bfloat16_rounded": Precision(BF16, BF16, BF16, BF16, "rounded"),
    "residual_norms_mixed": Precision(BF16, WIDE, BF16, WIDE, "spread", "bfloat16"),
}


class Llama:
    """`masters`: AdamW's float32 weights by name [K, …]; `used`: what a pass reads, a master or its rounded copy."""

    def __init__(self, folder: Path, precision: Precision, seeds: Sequence[int], device: str):
        self.shape = json.loads((folder / "config.json").read_text())
        assert self.shape["tie_word_embeddings"], "the head is the embedding"
        self.precision, self.count, self.device = precision, len(seeds), device
        own = {}
        for file in folder.glob("*.safetensors"):
            own |= load_file(file)
        own = {
            name.removeprefix("model."): tensor.to(device).float()
            for name, tensor in own.items()
            if "lm_head" not in name
        }
        self.masters = {
            name: torch.stack([self._start(name, own[name], seed, i) for seed in seeds]).requires_grad_()
            for i, name in enumerate(sorted(own))
        }
        self.used = {name: self._as_used(name, master) for name, master in self.masters.items()}
        self.layers = [
            {short: f"layers.{i}.{long}.weight" for short, long in LAYER.items()}
            for i in range(self.shape["num_hidden_layers"])
        ]
        self.heads, self.key_heads = self.shape["num_attention_heads"], self.shape["num_key_value_heads"]
        self.size = self.shape.get("head_dim") or self.shape["hidden_size"] // self.heads

    def dtype(self, name: str) -> torch.dtype:
        """What a weight is used in."""
        kinds = {"embed_tokens": self.precision.embeddings}
        kinds |= dict.fromkeys(("norm", "input_layernorm", "post_attention_layernorm"), self.precision.norms)
        return kinds.get(name.split(".")[-2], self.precision.matrices)

    def _start(self, name: str, own: Tensor, seed: int, place: int) -> Tensor:
        if self.precision.start == "own":
            return own
        width = self.dtype(name) if self.dtype(name) != WIDE else BF16
        rounded = own.to(width)
        return spread(rounded, seed, place) if self.precision.start == "spread" else rounded.float()

    def _as_used(self, name: str, master: Tensor) -> Tensor:
        kind = self.dtype(name)
        return master if kind == WIDE else master.detach().to(kind).requires_grad_()

    def gradients(self, scale: float) -> None:
        """Moves gradients of rounded weights, of `scale` times the loss, to the masters."""
        for name, master in self.masters.items():
            used = self.used[name]
            if used is not master:
                master.grad, used.grad = None if used.grad is None else used.grad.float(), None
            if scale != 1 and master.grad is not None:
                master.grad /= scale

    @torch.no_grad()
    def follow(self, masters: dict[str, Tensor]) -> None:
        """Rounds what AdamW moved, of this model or of another."""
        for name, used in self.used.items():
            if used is not masters[name]:
                used.copy_(masters[name])

    def logits(self, ids: Tensor, mask: Tensor, last: int, cache: Cache | None = None) -> list[Tensor]:
        """Each seed's float32 logits [B, last, V]: see `hidden`."""
        return [(x @ head.T).float() for x, head in zip(*self.hidden(ids, mask, last, cache), strict=True)]

    def logps(self, ids: Tensor, mask: Tensor, last: int) -> list[Tensor]:
        """Each seed's log-probs of the last tokens of its texts [B, last]; logits are computed again going back."""
        hidden = zip(*self.hidden(ids, mask, last + 1), strict=True)
        return [
            checkpoint(_logp, x[:, :-1], head, ids[k, :, -last:], use_reentrant=False)
            for k, (x, head) in enumerate(hidden)
        ]

    def hidden(
        self, ids: Tensor, mask: Tensor, last: int, cache: Cache | None = None
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Each seed's normed hidden states [B, last, D] of the last tokens of ids [K, B, T], and its head.

        mask [K, B, T + what is cached]; texts are padded on the left; `cache` gives earlier tokens and takes these.
        """
        K, B, T = ids.shape
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[..., -T:]
        seen = mask.shape[-1]
        earlier = torch.ones(T, seen, dtype=torch.bool, device=ids.device).tril(seen - T)
        itself = earlier.triu(seen - T)  # which padding sees too
        allowed = earlier & mask[:, :, None, :].bool() | itself
        allowed = allowed.view(K * B, 1, T, seen)
        embeddings = self.used["embed_tokens.weight"]
        rows = torch.arange(K, device=ids.device)[:, None, None] * embeddings.shape[1] + ids
        x = F.embedding(rows.view(K, -1), embeddings.flatten(0, 1)).to(self.precision.residual)
        rotation = self._rotation(positions.reshape(K * B, T))
        for i, names in enumerate(self.layers):
            w = {short: self.used[name] for short, name in names.items()}
            if torch.is_grad_enabled():
                x = checkpoint(self._layer, x, w, allowed, rotation, None, i, use_reentrant=False)
            else:
                x = self._layer(x, w, allowed, rotation, cache, i)
        x = self._norm(x, self.used["norm.weight"]).view(K, B, T, -1)[:, :, -last:]
        return x.unbind(0), embeddings.to(self.precision.matrices).unbind(0)

    def _layer(
        self, x: Tensor, w: dict[str, Tensor], allowed: Tensor, rotation: Any, cache: Cache | None, i: int
    ) -> Tensor:
        texts, tokens = allowed.shape[0], allowed.shape[2]
        h = self._norm(x, w["first"])
        q, k, v = (self._heads(_product(h, w[name]), texts, tokens) for name in ("q", "k", "v"))
        q, k = (_rotated(y, rotation).to(v.dtype) for y in (q, k))
        if cache is not None:
            k, v = cache.extended(i, k, v)
        k, v = (y.repeat_interleave(self.heads // self.key_heads, 1) for y in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        x = x + _product(out.transpose(1, 2).reshape(h.shape[0], h.shape[1], -1), w["o"])
        h = self._norm(x, w["second"])
        return x + _product(F.silu(_product(h, w["gate"])) * _product(h, w["up"]), w["down"])

    def _heads(self, y: Tensor, texts: int, tokens: int) -> Tensor:
        return y.view(texts, tokens, -1, self.size).transpose(1, 2)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """[K, N, D] by weight [K, D] → the same, as products take it."""
        wide = x.float()
        normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.shape["rms_norm_eps"])).to(x.dtype)
        return (weight[:, None] * normed).to(self.precision.matrices)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        base = (self.shape.get("rope_parameters") or self.shape)["rope_theta"]
        rates = base ** (-torch.arange(0, self.size, 2, device=positions.device).float() / self.size)
        angles = (positions[..., None].float() * rates).repeat(1, 1, 2)[:, None]
        return angles.cos().to(self.precision.residual), angles.sin().to(self.precision.residual)


class Cache:
    """Keys and values of earlier tokens, of every layer [texts, heads, T, size]."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def extended(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.kept:
            k, v = (torch.cat(pair, 2) for pair in zip(self.kept[layer], (k, v), strict=True))
        self.kept[layer] = k, v
        return k, v

    def repeated(self, times: int) -> None:
        """Each text `times` times, one after the other."""
        self.kept = {i: tuple(y.repeat_interleave(times, 0) for y in pair) for i, pair in self.kept.items()}  # type: ignore[misc]


def _logp(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax((x @ head.T).float(), -1).gather(-1, targets[..., None])[..., 0]


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """[K, N, in] by weight [K, out, in] → [K, N, out]."""
    return torch.bmm(x, weight.to(x.dtype).transpose(1, 2))


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin
