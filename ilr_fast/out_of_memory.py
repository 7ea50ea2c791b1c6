"""What an update does when the device's memory runs out: it gives up what it has of this optimizer step, and takes it
again with smaller micro-batches.

Nothing is lost by that: gradients only add up until AdamW moves, and they do not depend on how a step is cut into
micro-batches. Half as many tokens are tried until each sequence goes alone; then activations are recomputed; then the
run ends, with the keys that would help. What was found stays for the steps that follow.

    guard = MemoryGuard("ada", 8192, recompute=model.gradient_checkpointing_enable)
    gradient = guard.run(lambda tokens: ..., undo=drop_gradients, longest=1500)
    guard.told()        # "micro-batches of 4096 tokens …", once
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from ilr_fast.errors import RunError

Result = TypeVar("Result")


class MemoryGuard:
    """The micro-batches of one agent. `recompute` makes the model recompute activations; None where it does already."""

    def __init__(self, name: str, tokens: int, recompute: Callable[[], object] | None):
        self.name, self.tokens = name, tokens
        self._recompute = recompute
        self._told: str | None = None

    def run(
        self, work: Callable[[int], Result], undo: Callable[[], str | None], longest: int, *, backward: bool = True
    ) -> Result:
        """work(tokens), after each lack of memory once more with less, `undo` first: where it says what it gave up
        for good, that alone is tried.

        `longest` is the longest sequence: fewer tokens than that change nothing. Without a `backward` pass there is
        nothing to recompute. RunError where nothing is left to try.
        """
        while True:
            try:
                return work(self.tokens)
            except torch.OutOfMemoryError as error:
                what = str(error).partition("\n")[0]
            given_up = undo()  # outside of `except`: the error's traceback holds what the pass had made
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            change = given_up or self._shrink(longest, what, backward)
            self._told = f"out of memory in an update, whose step was taken again; {change}"

    def told(self) -> str | None:
        """What was changed since the last call, for a warning."""
        told, self._told = self._told, None
        return told

    def _shrink(self, longest: int, what: str, backward: bool) -> str:
        if self.tokens > longest:
            self.tokens //= 2
            change = f"micro_batch_tokens is {self.tokens} from here on"
        elif self._recompute is not None and backward:
            self._recompute()
            self._recompute = None
            change = "activations are recomputed from here on (gradient_checkpointing)"
        else:
            keys = "rollout.max_tokens, rollout.peer_tokens, engine.max_context or engine.slots"
            raise RunError(
                f"{self.name}: a single sequence of up to {longest} tokens does not fit the device's memory ({what})\n"
                f"  → lower {keys}, or see what `ilr-fast plan` proposes; the run goes on from its last checkpoint"
            )
        return change
