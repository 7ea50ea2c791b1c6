"""Some of the rows: which they are, taking them out, and putting results back in their places."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from ilr_kernels.backend import on_device
from ilr_kernels.lm_head_checks import IGNORED
from torch import Tensor

Result = TypeVar("Result")


class Gate(NamedTuple):
    """What stands before a sweep's costly launches: the host waits, or a kernel looks for itself."""

    wait: Callable[[], None]  # raises SomeRows unless all rows are needed
    go: Tensor  # [1] int32 on the GPU: 1 where all rows are needed, else 0


class SomeRows(Exception):
    """Not all rows are needed after all."""


def over_needed_rows(counting: Counting | None, run: Callable[[Tensor | None, Gate | None], Result]) -> Result:
    """run(rows, gate) over the rows that `counting` finds are needed (None: all).

    While a GPU still counts, everything is prepared for all rows: `run` calls `gate.wait` before its first costly
    launch, or after one that does nothing unless `gate.go`, and is done again with fewer rows where that raises.
    """
    if counting is None:
        return run(None, None)
    if not counting.under_way:
        return run(counting.rows(), None)
    try:
        return run(None, Gate(counting.expect_all, counting.go))
    except SomeRows:  # what was prepared is given back before the second run
        pass
    return run(counting.rows(), None)


class _Mailbox(NamedTuple):
    """Where a GPU leaves its counts in the host's memory, and how to tell that it has."""

    counts: Tensor
    event: torch.cuda.Event

    @classmethod
    def make(cls) -> _Mailbox:
        return cls(torch.empty(3, dtype=torch.int64, pin_memory=True), torch.cuda.Event())


_mailboxes: dict[torch.device, list[_Mailbox]] = {}  # those that are free; making one costs the host 0.1 ms


class Counting:
    """What a look at targets and factors will have found, by the time that somebody waits for it.

    The GPU looks while the host goes on; `rows` is the one place that waits for it.
    """

    def __init__(self, target_T: Tensor, factors: tuple[Tensor, ...], vocabulary: int):
        self._target_T, self._factors, self._vocabulary = target_T, factors, vocabulary
        self._mailbox: _Mailbox | None = None
        self.go = target_T.new_empty(1, dtype=torch.int32)
        if target_T.is_cuda:
            self._mailbox = self._launch()
        else:
            inside_T = (target_T >= 0) & (target_T < vocabulary) | (target_T == IGNORED)
            found = (~inside_T, target_T != IGNORED, counted(target_T, factors))
            self._counts = [int(x_T.sum()) for x_T in found]

    @property
    def under_way(self) -> bool:
        """Whether somebody would have to wait."""
        return self._mailbox is not None

    def expect_all(self) -> None:
        """Raises SomeRows unless all rows are needed, and ValueError for a target outside the vocabulary."""
        if self._wait() < self._target_T.shape[0]:
            raise SomeRows

    def check(self) -> None:
        """Raises ValueError for a target outside the vocabulary."""
        self._wait()

    def rows(self) -> Tensor | None:
        """The rows whose target is not ignored and none of whose factors is 0; None where that is all of them.

        Raises ValueError for a target outside the vocabulary.
        """
        needed = self._wait()
        if needed == self._target_T.shape[0]:
            return None
        return torch.nonzero_static(counted(self._target_T, self._factors), size=needed)[:, 0]

    def rest(self) -> Tensor:
        """The rows whose target is not ignored and some of whose factors are 0; nobody waits who has waited before."""
        needed = self._wait()
        rest_T = (self._target_T != IGNORED) & ~counted(self._target_T, self._factors)
        return torch.nonzero_static(rest_T, size=self._counts[1] - needed)[:, 0]

    def _wait(self) -> int:
        if self._mailbox is not None:
            self._mailbox.event.synchronize()
            self._counts = self._mailbox.counts.tolist()
            _mailboxes[self._target_T.device].append(self._mailbox)
            self._mailbox = None
        outside, _, needed = self._counts
        if outside > 0:
            target_T, vocabulary = self._target_T, self._vocabulary
            outside_T = ((target_T < 0) | (target_T >= vocabulary)) & (target_T != IGNORED)
            row = int(outside_T.nonzero()[0])
            raise ValueError(
                f"target_T[{row}] = {int(target_T[row])} is outside the vocabulary of {vocabulary} (ignored: {IGNORED})"
            )
        return needed

    def _launch(self) -> _Mailbox:
        """One kernel, which writes into the host's memory."""
        from ilr_kernels.launch import launch
        from ilr_kernels.rows_kernel import count_kernel

        target_T = self._target_T
        free = _mailboxes.setdefault(target_T.device, [])
        mailbox = free.pop() if free else _Mailbox.make()
        first, second = (*(f.contiguous() for f in self._factors), None, None)[:2]
        found = (mailbox.counts, self.go, target_T.shape[0], self._vocabulary)
        arguments = (target_T.contiguous(), first, second, *found)
        with on_device(target_T):
            launch(count_kernel, (1,), arguments, (IGNORED, 4096), num_warps=16)
            mailbox.event.record()
        return mailbox


def counted(target_T: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    """Whether a row's target is not ignored and none of its factors is 0."""
    counted_T = target_T != IGNORED
    for factor_T in factors:
        counted_T &= factor_T != 0
    return counted_T


def take(x_T: Tensor, rows: Tensor | None) -> Tensor:
    """The rows of x; None: all."""
    return x_T if rows is None else x_T[rows]


def put(x_N: Tensor, rows: Tensor | None, tokens: int, fill: float) -> Tensor:
    """Rows back in their places, `fill` elsewhere."""
    if rows is None:
        return x_N
    return x_N.new_full((tokens, *x_N.shape[1:]), fill).index_copy_(0, rows, x_N)


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, during which nothing may wait for the GPU."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
