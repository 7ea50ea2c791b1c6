"""Launches a Triton kernel through its compiled form, kept by whatever it was specialized on.

Triton looks a kernel up by every argument at each launch and asks its hooks before and after, which costs the host 50
to 130 µs for 20 to 30 arguments; a small batch is done by then. The look-up here asks the same of each argument and no
more, and tensors travel as addresses:

    launch(kernel, (programs,), (x, y, rows), (True, 128), num_warps=4)

Arguments come in the kernel's order, its constants last. None stands for a pointer that is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs

_compiled: dict[tuple, Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: tuple, **options: Any) -> None:
    """Launches on the current device; `constants` are hashable, `options` Triton's own (num_warps, …)."""
    device = torch._C._cuda_getDevice() if torch.cuda.is_initialized() else -1
    key = [id(kernel), device, constants, *options.values()]
    values = []
    for x in arguments:
        kind = type(x)
        if kind is int:  # 1 is a constant to Triton, multiples of 16 tell of alignment
            key.append((x == 1) + 2 * (x % 16 == 0) + 4 * (x > 0x7FFFFFFF))
        elif x is None or kind is float:
            key.append(kind)
        elif isinstance(x, Tensor):
            address = x.data_ptr()
            key += x.dtype, address % 16
            values.append(address if x.is_cuda else x)
            continue
        else:  # a descriptor for the copy engine
            key += kind, x.base.dtype, *x.block_shape
        values.append(x)
    found = _compiled.get(tuple(key))
    if found is not None:
        _run(found, grid, device, values, constants, arguments)
        return
    compiled = kernel[grid](*arguments, *constants, **options)
    if compiled is not None:  # there is none under the interpreter
        _compiled[tuple(key)] = compiled


def aligned_vectors(number: int, length: int, like: Tensor) -> tuple[Tensor, ...]:
    """Empty float32 vectors of one allocation, on `like`'s device, each at a multiple of 16 bytes.

    Triton compiles a kernel anew for every other combination of aligned and unaligned arguments: vectors that lie one
    right after another would make that combination depend on their length.
    """
    return like.new_empty(number, length + -length % 4, dtype=torch.float32)[:, :length].unbind()


class Launch:
    """A kernel at one grid with one set of constants, specialized on nothing that may change: no look-up at all.

    The kernel must be told so (`do_not_specialize`), and always be given tensors of the same dtypes.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], constants: tuple, **options: Any):
        self._kernel, self._grid, self._constants, self._options = kernel, grid, constants, options
        self._compiled: Any = None

    def __call__(self, device: int | None, tensors: Sequence[Tensor | None], scalars: tuple) -> None:
        """Launches on `device`, which must be the current one (None: the interpreter's, on the CPU)."""
        if self._compiled is not None:
            assert device is not None
            addresses = [None if x is None else x.data_ptr() for x in tensors]
            values, arguments = (*addresses, *scalars), (*tensors, *scalars)
            _run(self._compiled, self._grid, device, values, self._constants, arguments)
        else:
            self._compiled = self._kernel[self._grid](*tensors, *scalars, *self._constants, **self._options)


def _run(
    compiled: Any, grid: tuple[int, ...], device: int, values: Sequence[Any], constants: tuple, arguments: Sequence[Any]
) -> None:
    """Launches a compiled kernel on the device's current stream; `values` are the arguments, tensors as addresses."""
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    if knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:  # a profiler's
        compiled[x, y, z](*arguments, *constants)
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    function, metadata = compiled.function, compiled.packed_metadata
    compiled.run(x, y, z, stream, function, metadata, None, None, None, *values, *constants)
