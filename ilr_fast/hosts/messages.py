"""What a host and its worker say to each other: lines of JSON that hold text, ids and numbers, never a tensor.

    host → worker   {"call": "update", "id": 7, "arguments": {…}}      answered under its id
                    {"call": "generate", "requests": [[8, tokens, sampling], …]}, {"call": "cancel", "ids": [8]}
    worker → host   {"answers": [[8, generation, null], [7, null, error], …]}, {"failed": "OutOfMemoryError: …"},
                    {"pulse": 17, "at": "agent.py:211 _optimize"} (pulse.py)

Floats are written with as many digits as it takes to read the same bits again.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from ilr_fast.durable import is_full
from ilr_fast.errors import UserError
from ilr_fast.types import Generation, Sampling, StepResult, TrainingSequence, TrainingTurn

Message = dict[str, Any]


def write(pipe: BinaryIO, message: Message) -> None:
    """Writes one message. OSError where nobody reads it any more."""
    pipe.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")
    pipe.flush()


def read(pipe: BinaryIO) -> Iterator[Message]:
    """The messages until the other side ends; one that was cut off is its last breath and left out."""
    for line in pipe:
        if line.endswith(b"\n"):
            yield json.loads(line)


def from_sampling(sampling: Sampling) -> list[Any]:
    """A sampling rule as JSON."""
    s = sampling
    return [s.max_tokens, s.temperature, s.top_p, s.top_k, list(s.stop), s.seed, s.turn]


def to_sampling(data: Sequence[Any]) -> Sampling:
    """The inverse of `from_sampling`."""
    max_tokens, temperature, top_p, top_k, stop, seed, turn = data
    return Sampling(max_tokens, temperature, top_p, top_k, tuple(stop), seed, turn)


def from_generation(generation: Generation) -> list[Any]:
    """What an engine sampled, as JSON."""
    g = generation
    return [list(g.tokens), list(g.logps), g.finish, g.text, g.error]


def to_generation(data: Sequence[Any]) -> Generation:
    """The inverse of `from_generation`."""
    tokens, logps, finish, text, error = data
    return Generation(tuple(tokens), tuple(logps), finish, text, error)


def from_sequences(sequences: Sequence[TrainingSequence]) -> list[Any]:
    """Training sequences as JSON."""
    return [
        [s.group, s.sample, list(s.tokens), [[t.start, t.end, t.advantage, list(t.behavior_logps)] for t in s.turns]]
        for s in sequences
    ]


def to_sequences(data: Sequence[Any]) -> list[TrainingSequence]:
    """The inverse of `from_sequences`."""
    return [
        TrainingSequence(group, sample, tuple(tokens), tuple(
            TrainingTurn(start, end, advantage, tuple(logps)) for start, end, advantage, logps in turns
        ))
        for group, sample, tokens, turns in data
    ]


def from_result(result: StepResult) -> list[Any]:
    """An update's result as JSON."""
    return [dict(result.metrics), result.tokens_trained, result.tokens_dropped, result.skipped, result.note]


def to_result(data: Sequence[Any]) -> StepResult:
    """The inverse of `from_result`."""
    return StepResult(*data)


def from_error(error: Exception) -> list[Any] | None:
    """An error that the host raises as its own: the user's mistake, or the disk's. None for any other."""
    if isinstance(error, UserError):
        return ["user", error.what, error.where, error.remedy]
    if isinstance(error, OSError) and error.errno is not None:
        return ["disk", error.errno, error.strerror, error.filename and str(error.filename)]
    return ["disk", errno.ENOSPC, str(error), None] if is_full(error) else None


def to_error(data: Sequence[Any]) -> Exception:
    """The inverse of `from_error`."""
    kinds: dict[str, Callable[..., Exception]] = {"user": UserError, "disk": OSError}
    kind, *arguments = data
    return kinds[kind](*(argument for argument in arguments if argument is not None))
