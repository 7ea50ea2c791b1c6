"""What an update takes beside the model: each optimizer step's sequences, the loss's constants, the loss itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ilr_kernels.policy_loss import PolicyLoss
from torch import Tensor

from ilr_fast.batch import PackedStep
from ilr_fast.config import LossConfig
from ilr_fast.types import TrainingSequence


class Given(NamedTuple):
    """What the loss takes as constants, by trained token; None where it is not needed."""

    old_logp_N: Tensor | None
    ref_logp_N: Tensor | None

    def at(self, token_N: Tensor) -> Given:
        """Those of some tokens."""
        return Given(*(None if x is None else x[token_N] for x in self))


class Minibatch:
    """The sequences of one optimizer step, packed once for every number of tokens."""

    def __init__(self, sequences: Sequence[TrainingSequence], pack: Callable[..., PackedStep]):
        self._sequences, self._pack = sequences, pack
        self._packed: tuple[int, PackedStep] | None = None

    def packed(self, tokens: int) -> PackedStep:
        """For micro-batches of at most so many tokens."""
        if self._packed is None or self._packed[0] != tokens:
            self._packed = tokens, self._pack(self._sequences, tokens)
        return self._packed[1]


def policy_loss_of(config: LossConfig) -> PolicyLoss:
    """The kernels' loss for a config; k1 acts in the reward, so the loss then has no KL."""
    return PolicyLoss(
        ratio=config.ratio,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        objective=config.objective,
        kl="k2" if config.kl == "k1" else config.kl,
        beta=0.0 if config.kl == "k1" else config.beta,
        entropy_coef=config.entropy_coef,
        importance=config.importance,
        importance_mode=config.importance_mode,
        importance_cap=config.importance_cap,
    )
