"""Puts `ilr_kernels` in the place of TRL's GRPO loss head (TRL 1.16): one call before training.

    from trl import GRPOTrainer
    from trl_patch import patch

    patch(GRPOTrainer)      # then make the trainer and train as before

The loss, its gradients and the logged metrics stay TRL's. Log-probs and entropies of every trainer's LM head come from
`linear_logprob`; GRPO's training loss comes from `linear_policy_loss`, three matrix products in all, wherever it is a
sum of weighted token losses: grpo, bnpo, dr_grpo, dapo and cispo, ratios by token or sequence, beta = 0 or not, delta,
vLLM's importance weights. What that does not cover (`uncovered` names it) runs TRL's own loss on our log-probs, and
says so once; with `patch(GRPOTrainer, strict=True)` it raises ValueError instead.

`trl_time.py` times a step before and after.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from ilr_kernels.lm_head import linear_logprob, linear_policy_loss
from ilr_kernels.policy_loss import PolicyLoss
from torch import Tensor

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
IMAGES = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "image_sizes", "token_type_ids", "num_images")
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def patch(trainer_class: type, strict: bool = False) -> Callable[[], None]:
    """Replaces the LM head of TRL's trainers and `trainer_class`'s GRPO loss; returns what puts TRL's own back."""
    from trl.trainer import utils

    trl_head, trl_loss = getattr(utils, "_ChunkedLogProbFunction", None), getattr(trainer_class, "_compute_loss", None)
    if trl_head is None or trl_loss is None:
        raise RuntimeError("this TRL is built differently: the patch is written for trl 1.16")
    if isinstance(trl_head, LogprobHead):
        raise RuntimeError("TRL is patched already")

    def compute_loss(self: Any, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        why = uncovered(self, inputs)
        if why is None:
            return fused_loss(self, model, inputs)
        if strict:
            raise ValueError(f"linear_policy_loss does not cover {why}")
        warnings.warn(f"linear_policy_loss does not cover {why}: TRL's own loss on our log-probs", stacklevel=2)
        return trl_loss(self, model, inputs)

    def undo() -> None:
        utils._ChunkedLogProbFunction, trainer_class._compute_loss = trl_head, trl_loss  # type: ignore[attr-defined]

    utils._ChunkedLogProbFunction, trainer_class._compute_loss = LogprobHead(trl_head), compute_loss  # type: ignore
    return undo


class LogprobHead:
    """Stands for TRL's autograd function of log-probs and entropies; other statistics are left to the original."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def apply(self, hidden, weight, bias, target, temperature, chunk, softcap, scale, outputs):
        if not {"log_probs", "entropy"}.issuperset(outputs):
            return self.original.apply(hidden, weight, bias, target, temperature, chunk, softcap, scale, outputs)
        hidden, weight, bias = in_one_dtype(hidden, weight, bias)
        hidden = hidden if scale == 1 else hidden * scale
        options: dict[str, Any] = {"bias_V": bias, "temperature": temperature, "softcap": softcap}
        with torch.autocast(hidden.device.type, enabled=False):
            found = linear_logprob(hidden, weight, target, **options, with_entropy="entropy" in outputs)
        logp, entropy = found if isinstance(found, tuple) else (found, None)
        return logp, entropy, None, None, None


def uncovered(trainer: Any, inputs: dict[str, Any]) -> str | None:
    """What keeps a trainer's loss from being a weighted sum of `PolicyLoss`es, or None."""
    args, beta = trainer.args, trainer.beta
    config = trainer.model.config.get_text_config()
    cases = {
        f"loss_type={trainer.loss_type!r}": trainer.loss_type not in LOSS_TYPES,
        "top_entropy_quantile < 1": trainer.top_entropy_quantile < 1,
        "off_policy_mask_threshold": trainer.off_policy_mask_threshold is not None,
        "an entropy bonus": trainer._entropy_bonus_enabled,
        "the auxiliary loss of a router": trainer.aux_loss_enabled,
        "images": any(inputs.get(name) is not None for name in IMAGES),
        # our KL is weighted by the token's own ratio, which is 1 on-policy
        "beta != 0 off-policy without use_bias_correction_kl": beta != 0
        and not args.use_bias_correction_kl
        and inputs.get("old_per_token_logps") is not None,
        "beta != 0 with sequence ratios and use_bias_correction_kl": beta != 0
        and args.use_bias_correction_kl
        and trainer.importance_sampling_level == "sequence",
        "cispo with epsilon_high < 1": trainer.loss_type == "cispo" and trainer.epsilon_high < 1,
        "delta within the clip": args.delta is not None and args.delta <= 1 + trainer.epsilon_high,
        "cast_lm_head_to_fp32": args.cast_lm_head_to_fp32,
        "logits that the model scales": any(getattr(config, name, None) not in (None, 1) for name in SCALES),
        "an adapter in the LM head": hasattr(trainer.model.get_output_embeddings(), "base_layer"),
        "several processes": trainer.accelerator.num_processes > 1,
        "sharded parameters": trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled,
    }
    return next((name for name, holds in cases.items() if holds), None)


def fused_loss(trainer: Any, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
    """TRL's loss of one micro-batch of B completions of C tokens, and its metrics."""
    completion_BC, mask_BC = inputs["completion_ids"], inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask_BC = mask_BC * inputs["tool_mask"]
    b, c = completion_BC.shape
    base = trainer.accelerator.unwrap_model(model)
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    with trainer.accelerator.autocast():
        tokens = torch.cat([inputs["prompt_ids"], completion_BC], 1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        hidden = base.base_model(input_ids=tokens, attention_mask=attention_mask, use_cache=False).last_hidden_state
        head = base.get_output_embeddings()
        hidden_TD = hidden[:, -c - 1 : -1].flatten(0, 1)  # the hidden state before a token predicts it
        hidden_TD, weight_VD, bias_V = in_one_dtype(hidden_TD, head.weight, head.bias)

    advantages = inputs["advantages"].float()
    advantages = advantages if advantages.dim() == 2 else advantages[:, None]
    policy_BC = advantages.expand(b, c)
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        policy_BC = policy_BC * inputs["importance_sampling_ratio"]  # at least 0: every clip commutes with it
    weight_BC = token_weights(trainer, inputs, mask_BC)
    old_BC, ref_BC = inputs.get("old_per_token_logps"), inputs.get("ref_per_token_logps") if trainer.beta != 0 else None
    loss, stats = linear_policy_loss(
        hidden_TD,
        weight_VD,
        completion_BC.masked_fill(mask_BC == 0, -100).flatten(),
        policy_BC.flatten(),
        weight_BC.flatten(),
        old_logp_T=None if old_BC is None else old_BC.flatten(),
        ref_logp_T=None if ref_BC is None else ref_BC.flatten(),
        turn_T=torch.arange(b, device=hidden_TD.device).repeat_interleave(c),
        loss=policy_loss(trainer),
        bias_V=bias_V,
        temperature=trainer.temperature,
        softcap=getattr(base.config.get_text_config(), "final_logit_softcapping", None),
        with_logp=True,
    )
    logp_BC, entropy_BC = (stats[name].view(b, c).masked_fill(mask_BC == 0, 0) for name in ("logp_T", "entropy_T"))
    log_ratio_BC = torch.zeros_like(logp_BC) if old_BC is None else (logp_BC - old_BC) * mask_BC
    kl_BC = None
    if ref_BC is not None:
        difference = (ref_BC - logp_BC) * mask_BC
        kl_BC = difference.expm1() - difference
        if trainer.args.use_bias_correction_kl:  # k2 has the gradient of r · k3, but not its value
            kl_BC = kl_BC * log_ratio_BC.exp()
            loss = loss + trainer.beta * (weight_BC * (kl_BC - log_ratio_BC.exp() * difference.square() / 2)).sum()
    log_metrics(trainer, mask_BC, advantages, log_ratio_BC, entropy_BC, kl_BC)
    return loss


def policy_loss(trainer: Any) -> PolicyLoss:
    """TRL's settings as ours: its cispo has no lower bound and an upper one that counts from 0."""
    ratio = "sequence" if trainer.importance_sampling_level == "sequence" else "token"
    if trainer.loss_type == "cispo":
        bounds: dict[str, Any] = {"objective": "cispo", "clip_low": 1.0, "clip_high": trainer.epsilon_high - 1}
    else:
        bounds = {"clip_low": trainer.epsilon_low, "clip_high": trainer.epsilon_high, "dual_clip": trainer.args.delta}
    kl = "k2" if trainer.args.use_bias_correction_kl else "k3"  # k2 has the gradient of r · k3
    return PolicyLoss(ratio=ratio, kl=kl, beta=trainer.beta, **bounds)


def token_weights(trainer: Any, inputs: dict[str, Any], mask_BC: Tensor) -> Tensor:
    """What TRL multiplies each token's loss with: 1 / length, 1 / tokens or a constant, by loss_type."""
    mask_BC = mask_BC.float()
    train, steps = trainer.model.training, trainer.current_gradient_accumulation_steps
    if trainer.loss_type in ("dapo", "cispo"):  # num_items_in_batch spans all that was generated at once
        share = steps / trainer.args.steps_per_generation if train else 1.0
        return mask_BC / (inputs["num_items_in_batch"].clamp(min=1) * share)
    if trainer.loss_type == "grpo":
        tokens = mask_BC.sum(1, keepdim=True).clamp(min=1) * len(mask_BC)
    elif trainer.loss_type == "bnpo":
        tokens = mask_BC.sum().clamp(min=1)
    else:
        tokens = len(mask_BC) * trainer.max_completion_length
    return mask_BC / tokens / (steps if train else 1)


def log_metrics(
    trainer: Any, mask_BC: Tensor, advantages: Tensor, log_ratio: Tensor, entropy_BC: Tensor, kl_BC: Tensor | None
) -> None:
    """Entropy, KL and clip shares under TRL's names."""
    counted = mask_BC.float()
    if trainer.importance_sampling_level == "sequence":  # then one ratio a sequence
        log_ratio = log_ratio.sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)
        counted = torch.ones_like(log_ratio)
    ratio = log_ratio.exp()

    def mean(x: Tensor, over: Tensor) -> Tensor:
        return (x * over).sum() / over.sum().clamp(min=1)

    values = {"entropy": mean(entropy_BC, mask_BC)}
    if kl_BC is not None:
        values["kl"] = mean(kl_BC, mask_BC)
    if trainer.loss_type == "cispo":
        values["cispo_clip_ratio"] = mean((ratio > trainer.epsilon_high) & (advantages > 0), counted)
    else:
        low = ((ratio < 1 - trainer.epsilon_low) & (advantages < 0)).float()
        high = ((ratio > 1 + trainer.epsilon_high) & (advantages > 0)).float()
        low_B, high_B = ((x * counted).sum(1) / counted.sum(1) for x in (low, high))  # NaN: nothing to count
        values["clip_ratio/low_mean"] = mean(low, counted)
        values["clip_ratio/high_mean"] = mean(high, counted)
        values["clip_ratio/region_mean"] = mean(low + high, counted)
        values["clip_ratio/low_min"] = low_B[~low_B.isnan()].min()
        values["clip_ratio/high_max"] = high_B[~high_B.isnan()].max()
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    for name, value in zip(values, torch.stack(list(values.values())).tolist(), strict=True):  # waits for the GPU once
        metrics[name].append(value)


def in_one_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The head's operands in autocast's dtype where it is on, else in that of the hidden states."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
