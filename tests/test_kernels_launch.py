"""Compiled kernels are kept by what Triton specializes on, no more and no less: seen with a kernel that only counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")


class Compiled:
    function, packed_metadata = 17, (4, 1, 0)

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def run(self, *arguments: Any) -> None:
        self.calls.append(arguments)

    def __getitem__(self, grid: tuple) -> Any:
        return lambda *arguments: self.calls.append(("hooked", *grid, *arguments))


class Kernel:
    """Compiles anew whenever it is launched in Triton's own way."""

    def __init__(self) -> None:
        self.made: list[Compiled] = []

    def __getitem__(self, grid: tuple) -> Any:
        def compile_and_launch(*arguments: Any, **options: Any) -> Compiled:
            self.made.append(Compiled())
            return self.made[-1]

        return compile_and_launch


@pytest.fixture
def launching(monkeypatch: pytest.MonkeyPatch) -> Any:
    from ilr_kernels import launch

    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 99, raising=False)
    return launch


def test_the_same_kind_of_arguments_compiles_once(launching: Any) -> None:
    kernel, room = Kernel(), torch.zeros(64)
    for x, n, y in ((room, 48, 0.5), (room[4:], 32, 0.25), (room[8:], 16, 1.0)):
        launching.launch(kernel, (3,), (x, n, y, None), (True, "k3"), num_warps=4)
    (compiled,) = kernel.made
    assert len(compiled.calls) == 2
    grid, stream, function, metadata, hooks = (
        compiled.calls[0][a:b] for a, b in ((0, 3), (3, 4), (4, 5), (5, 6), (6, 9))
    )
    assert (grid, stream, function, metadata, hooks) == ((3, 1, 1), (99,), (17,), ((4, 1, 0),), (None, None, None))
    x, n, y, left_out, *constants = compiled.calls[0][9:]
    assert x.data_ptr() == room[4:].data_ptr() and (n, y, left_out, constants) == (32, 0.25, None, [True, "k3"])


@pytest.mark.parametrize(
    ("arguments", "constants", "warps"),
    [
        ((torch.zeros(64)[1:], 48, 0.5, None), (True,), 4),  # not at a multiple of 16 bytes
        ((torch.zeros(64).bfloat16(), 48, 0.5, None), (True,), 4),
        ((torch.zeros(64), 47, 0.5, None), (True,), 4),
        ((torch.zeros(64), 1, 0.5, None), (True,), 4),  # a constant to Triton
        ((torch.zeros(64), 2**31, 0.5, None), (True,), 4),  # 64 bits wide
        ((torch.zeros(64), 48, 0.5, torch.zeros(64)), (True,), 4),
        ((torch.zeros(64), 48, 0.5, None), (False,), 4),
        ((torch.zeros(64), 48, 0.5, None), (True,), 8),
    ],
)
def test_another_kind_compiles_again(launching: Any, arguments: tuple, constants: tuple, warps: int) -> None:
    kernel = Kernel()
    launching.launch(kernel, (1,), (torch.zeros(64), 48, 0.5, None), (True,), num_warps=4)
    launching.launch(kernel, (1,), arguments, constants, num_warps=warps)
    assert len(kernel.made) == 2


def test_a_profilers_hooks_are_heard(launching: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    kernel, x = Kernel(), torch.zeros(64)
    launching.launch(kernel, (2, 5), (x,), (7,), num_warps=4)
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [print])
    launching.launch(kernel, (2, 5), (x,), (7,), num_warps=4)
    assert kernel.made[0].calls == [("hooked", 2, 5, 1, x, 7)]


def test_a_launch_that_is_always_the_same_looks_nothing_up(launching: Any) -> None:
    kernel = Kernel()
    once = launching.Launch(kernel, (4, 2, 1), (True,), num_warps=4)
    room = torch.zeros(8)
    for n in (1, 16, 17):
        once(0, (room[1:], None), (n,))
    assert len(kernel.made) == 1 and [call[:3] for call in kernel.made[0].calls] == [(4, 2, 1)] * 2
    assert kernel.made[0].calls[0][9:] == (room[1:].data_ptr(), None, 16, True)
    assert not launching._compiled
