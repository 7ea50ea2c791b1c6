"""Launches a Triton kernel through its compiled form, kept by whatever it was specialized on.

Triton looks a kernel up by every argument at each launch, which costs the host 50 to 130 µs for 20 to 30 of them; a
small batch is done by then. The look-up here asks the same of each argument and no more:

    launch(kernel, (programs,), (x, y, rows), (True, 128), num_warps=4)

Arguments come in the kernel's order, its constants last. None stands for a pointer that is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_compiled: dict[tuple, Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: tuple, **options: Any) -> None:
    """Launches on the current device; `constants` are hashable, `options` Triton's own (num_warps, …)."""
    key = (kernel, constants, _device(), *map(_kind, arguments), *options.values())
    found = _compiled.get(key)
    if found is not None:
        found[(*grid, 1, 1)[:3]](*arguments, *constants)
        return
    compiled = kernel[grid](*arguments, *constants, **options)
    if compiled is not None:  # there is none under the interpreter
        _compiled[key] = compiled


def _device() -> int:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else -1


def _kind(x: Any) -> Any:
    """What Triton specializes an argument on: dtype and alignment, divisibility, a descriptor's blocks."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if isinstance(x, int):
        return x == 1, x % 16 == 0, x > 0x7FFFFFFF
    if x is None or isinstance(x, float):
        return type(x)
    return type(x), x.base.dtype, *x.block_shape
