"""QLoRA: the frozen linear layers in four bits (NF4), adapters above them in 16 (Dettmers et al., 2023).

    quantize_(model, torch.bfloat16, "agents.ada")
    model.to("cuda")            # here the numbers become four bits

Every linear layer but the LM head; the scales of 64 numbers are quantized themselves, so that a number takes 0.516
bytes. A product unpacks its matrix first: a token costs the more the fewer there are, so generation is slower than with
16 bits and training nearly as fast. bitsandbytes does it, on a GPU and on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ilr_fast.errors import UserError


def quantize_(
    model: Any, dtype: torch.dtype, where: str, draw: Callable[[nn.Module], torch.device] | None = None
) -> None:
    """Replaces the model's linear layers, in place; products are in `dtype`. UserError without bitsandbytes.

    `draw` gives a layer on the meta device its numbers, and says where they are: it is quantized there at once, so that
    no more than one layer is ever held in 16 bits.
    """
    try:
        import bitsandbytes as bnb
    except ImportError:
        remedy = "pip install 'ilr-fast[quantized]', or remove the key"
        raise UserError("bitsandbytes is not installed", f"{where}.quantize", remedy) from None
    head = model.get_output_embeddings()
    for path in [path for path, _ in model.named_modules()]:  # what is replaced is not held on to
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear) and module is not head:
            parent, _, name = path.rpartition(".")
            device = draw(module) if draw is not None else None
            made = _quantized(bnb, module, dtype)
            setattr(model.get_submodule(parent), name, made if device is None else made.to(device))
    model.is_loaded_in_4bit = True  # what peft asks for
    model.is_quantized = True


def _quantized(bnb: Any, layer: nn.Linear, dtype: torch.dtype) -> Any:
    """The layer's numbers, to be quantized when they move to the device; nothing is copied."""
    made = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=dtype, quant_type="nf4",
        compress_statistics=True, device="meta",
    )  # fmt: skip
    made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    return made
