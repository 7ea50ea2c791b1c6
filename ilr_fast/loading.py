"""From an agent's config to a model on its device: full weights, adapters, or a frozen reference.

A folder that holds adapters is loaded with its base and merged; what is trained then is the whole, or new adapters.

model = load_policy(config, "agents.ada", seed=0)
reference = load_reference(config, "agents.ada")     # a second, frozen copy
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ilr_fast.allocator import in_large_pages
from ilr_fast.attention import lm_head_of, prepare
from ilr_fast.config import AgentConfig, LoraConfig
from ilr_fast.errors import UserError
from ilr_fast.models import resolve_model
from ilr_fast.quantized import quantize_


def device_of(config: AgentConfig, where: str) -> torch.device:
    """The device that the config names; UserError where it is not there."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise UserError(f"{config.device!r} is no device", f"{where}.device", "use auto, cpu, cuda or cuda:1") from None
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= there:
        raise UserError(
            f"no device {config.device} here", f"{where}.device", f"use `auto`; CUDA devices found: {there}"
        )
    return device


def dtype_of(config: AgentConfig, device: torch.device) -> torch.dtype:
    """The precision of the weights: the config's, or by device where it says `auto`."""
    if config.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, config.dtype)


def load_policy(config: AgentConfig, where: str, seed: int, *, on_host: bool = False) -> Any:
    """The model that talks and learns, in eval mode; only what is trained requires gradients.

    `where` is the agent's config path for errors; `seed` sets the adapters' first weights; `on_host` leaves the weights
    in the host's memory, for an engine whose weights they become.
    """
    return for_training(_load(config, where, seed, on_host=on_host), config, where, seed)


def for_training(model: Any, config: AgentConfig, where: str, seed: int) -> Any:
    """A model that was loaded, in eval mode with what is trained: see `load_policy`."""
    model.requires_grad_(config.train == "full")
    if config.train == "lora":
        model = _with_adapters(model, config.lora, f"{where}.lora", seed)
    if config.gradient_checkpointing is True and config.train != "none":
        recompute_activations(model)
    lm_head_of(model)  # refuses an adapter on the LM head before anything runs
    return model.eval()


def recompute_activations(model: Any) -> None:
    """In train mode, backward passes recompute a layer's activations from its input."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def load_reference(config: AgentConfig, where: str, seed: int = 0) -> Any:
    """A frozen copy of the model as it was before training; `seed` as it was then."""
    return _load(config, where, seed).requires_grad_(False).eval()


def _load(config: AgentConfig, where: str, seed: int, *, on_host: bool = False) -> Any:
    folder = resolve_model(config.model, f"{where}.model", weights=not config.random_weights)
    device = device_of(config, where)
    try:
        if config.random_weights:
            model = _random(folder, config, device, seed, where)
        elif (folder / "adapter_config.json").exists():
            model = _peft(where).AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype_of(config, device))
            model = model.merge_and_unload()
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype_of(config, device))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"the model can't be loaded ({error})",
            f"{where}.model = {config.model}",
            "give a Hugging Face folder with config.json and weights, or a name from `ilr-fast get-model`",
        ) from None
    _without_dropout(model)
    prepare(model)
    if config.quantize == "nf4" and not config.random_weights:
        quantize_(model, dtype_of(config, device), where)
    if on_host and config.random_weights and device.type == "cuda":
        return _moved_to_host(model)  # they were drawn there
    return model.to("cpu" if on_host else device)


@torch.no_grad()
def _moved_to_host(model: nn.Module) -> nn.Module:
    """The same model, its tensors in the host's memory."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = in_large_pages(torch.empty_like(tensor, device="cpu")).copy_(tensor)
    torch.cuda.empty_cache()
    return model


def _random(folder: Path, config: AgentConfig, device: torch.device, seed: int, where: str) -> Any:
    """A model of the folder's shape; its weights are drawn where it will compute, which takes no time on a GPU.

    In four bits layer by layer, so that what has room in four bits is never held in 16.
    """
    dtype, quantized = dtype_of(config, device), config.quantize == "nf4"
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with torch.device("meta") if quantized else device:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)

        def draw(module: nn.Module) -> torch.device:
            module.to_empty(device=device, recurse=False)
            model._init_weights(module)
            return device

        if quantized:
            quantize_(model, dtype, where, draw)
            for module in model.modules():
                if any(t.is_meta for t in (*module._parameters.values(), *module._buffers.values()) if t is not None):
                    draw(module)
    model.tie_weights()
    return model


def _without_dropout(model: nn.Module) -> None:
    """A policy's ratio to itself must be 1: sampling has no dropout, so training has none either."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _with_adapters(model: Any, config: LoraConfig, where: str, seed: int) -> Any:
    peft = _peft(where)
    targets = config.targets if config.targets == "all-linear" else [t.strip() for t in config.targets.split(",")]
    options = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    # In the weights' precision: AdamW has float32 copies; float32 adapters would keep every layer's input in float32.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(model, options, autocast_adapter_dtype=False)
        except ValueError as error:
            raise UserError(
                str(error), f"{where}.targets = {config.targets}", "use `all-linear` or the model's module names"
            ) from None


def _peft(where: str) -> Any:
    try:
        import peft
    except ImportError:
        raise UserError("peft is not installed", where, "pip install 'ilr-fast[lora]', or use full models") from None
    return peft


@torch.no_grad()
def restore_weights(model: Any, folder: Path) -> None:
    """Copies saved weights (a full model, or adapters where `model` has them) into `model`, in place, bit for bit."""
    if hasattr(model, "peft_config"):
        import peft

        weights = peft.load_peft_weights(str(folder), device="cpu")
        loaded: Any = peft.set_peft_model_state_dict(model, weights)
        wanted = set(peft.get_peft_model_state_dict(model))
        missing = sorted(wanted ^ set(weights)) + list(loaded.unexpected_keys)
    else:
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).state_dict()
        own = model.state_dict()
        missing = sorted(
            n for n in own.keys() | saved.keys() if n not in own or n not in saved or own[n].shape != saved[n].shape
        )
        if not missing:
            for name, tensor in own.items():
                tensor.copy_(saved[name])
    if missing:
        raise UserError(
            f"the checkpoint holds another model ({missing[0]} does not fit)",
            str(folder),
            "resume with the config of the run, or start with `--fresh`",
        )
