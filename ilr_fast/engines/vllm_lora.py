"""A trained adapter (peft's LoRA) inside vLLM: its one slot is written in place, without a file and without merging.

    y = W x + (alpha / r) · B (A x)

vLLM keeps the adapters' matrices of a layer in buffers [slot, 1, r, in] and [slot, 1, out, r], one pair for each part
of a fused layer (q, k, v; gate, up), and adds B (A x) to the part's rows; the scale is in B. Here the slot belongs to
the trainer's adapter for as long as the engine lives. vLLM is given an adapter of zeros by that name, so that it never
looks for a file, and after every update `write` copies A and B · alpha / r to where the kernels read. The base weights
are shared or copied as those of a full model are (weights.py); they do not change.

    arguments = lora_arguments(model, "agents.ada")        # what vLLM is opened with; {} for a model without adapters
    adapter = Adapter(model, core, "agents.ada")
    adapter.write()
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ilr_fast.errors import UserError
from ilr_fast.weights import EMBEDDED

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of vLLM's buffers
NUMBER = 1  # vLLM's id of the adapter


class _Layer(NamedTuple):
    """One adapted matrix: A [r, in], B [out, r], alpha / r, and vLLM's layer with the number of its part."""

    name: str
    a_RI: Tensor
    b_OR: Tensor
    scale: float
    module: Any
    part: int


def lora_arguments(model: Any, where: str) -> dict[str, Any]:
    """Arguments of vLLM's engine for `model`'s adapters; UserError: see `check_rank`."""
    if not hasattr(model, "peft_config"):
        return {}
    layers = dict(_trained(model))
    rank = max(layer.r[layer.active_adapter[0]] for layer in layers.values())
    check_rank(rank, where)
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": next(r for r in RANKS if r >= rank),
        "lora_target_modules": sorted({name.rpartition(".")[2] for name in layers}),
    }


def check_rank(rank: int, where: str) -> None:
    """UserError for a rank that vLLM has no buffers for."""
    if rank > RANKS[-1]:
        remedy = f"vLLM takes at most {RANKS[-1]}: use that, or {EMBEDDED}"
        raise UserError(f"an adapter of rank {rank}", f"{where}.lora.rank", remedy)


class Adapter:
    """The trainer's adapter in the engine's slot; UserError where vLLM has no place for one of its matrices."""

    def __init__(self, model: Any, worker: Any, where: str):
        from vllm.lora.request import LoRARequest

        self._model, self._where = model, where
        self.request = LoRARequest(where, NUMBER, "in the trainer's memory")
        worker.model_runner.lora_manager.add_dummy_lora(self.request, 1)
        self._manager = worker.model_runner.lora_manager._adapter_manager
        self._manager.activate_adapter(NUMBER)
        self._slot = self._manager.lora_index_to_id.index(NUMBER)
        self.write()
        self.check()

    @torch.no_grad()
    def write(self) -> int:
        """Brings the trainer's A and B to the engine, in the engine's precision; returns the bytes."""
        assert self._manager.lora_index_to_id[self._slot] == NUMBER, "vLLM has given the adapter's slot away"
        copied = 0
        for layer in self._layers():
            for buffer, given in zip(_buffers(layer, self._slot), (layer.a_RI, layer.b_OR * layer.scale), strict=True):
                buffer.copy_(given)
                copied += buffer.numel() * buffer.element_size()
        return copied

    @torch.no_grad()
    def check(self) -> None:
        """UserError unless the slot holds the trainer's adapter, and 0 wherever the trainer has none."""
        counted: dict[int, int] = {}
        for layer in self._layers():
            for buffer, given in zip(_buffers(layer, self._slot), (layer.a_RI, layer.b_OR * layer.scale), strict=True):
                if not torch.equal(buffer, given.to(buffer.device, buffer.dtype)):
                    what = f"the adapter of {layer.name} has other values in the engine"
                    raise UserError(what, self._where, EMBEDDED)
                start = buffer.untyped_storage().data_ptr()
                counted[start] = counted.get(start, 0) + int(buffer.count_nonzero())
        for name, module in self._manager.modules.items():
            for stacked in (*module.lora_a_stacked, *module.lora_b_stacked):
                if int(stacked.count_nonzero()) != counted.get(stacked.untyped_storage().data_ptr(), 0):
                    raise UserError(f"the engine has an adapter of its own in {name}", self._where, EMBEDDED)

    def _layers(self) -> Iterator[_Layer]:
        packed: dict[str, list[str]] = self._manager.packed_modules_mapping
        for name, layer in _trained(self._model):
            parent, _, child = name.rpartition(".")
            fused = next((f for f, parts in packed.items() if child in parts), None)
            path, part = (name, 0) if fused is None else (f"{parent}.{fused}", packed[fused].index(child))
            module = self._manager.modules.get(path)
            active = layer.active_adapter[0]
            if module is None or part >= len(module.lora_a_stacked) or active not in layer.lora_A:
                remedy = f"leave {child} out of lora.targets, or {EMBEDDED}"
                raise UserError(f"vLLM has no place for the adapter of {name}", f"{self._where}.lora.targets", remedy)
            a_RI, b_OR = layer.lora_A[active].weight, layer.lora_B[active].weight
            yield _Layer(name, a_RI, b_OR, layer.scaling[active], module, part)


def _buffers(layer: _Layer, slot: int) -> tuple[Tensor, Tensor]:
    """Where the engine reads A [r, in] and B [out, r]."""
    a, b = (stacked[layer.part][slot, 0] for stacked in (layer.module.lora_a_stacked, layer.module.lora_b_stacked))
    rank = layer.a_RI.shape[0]
    assert a.shape[1] == layer.a_RI.shape[1] and b.shape[0] == layer.b_OR.shape[0], layer.name
    return a[:rank], b[:, :rank]


def _trained(model: Any) -> Iterator[tuple[str, Any]]:
    """peft's adapted layers, by their names in the model without adapters."""
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            yield name, module
