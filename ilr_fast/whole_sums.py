"""cuBLAS so that a row's product has the same bits whatever is computed beside it: no sum over its length is split.

An exact engine (engines/vllm_exact.py) wants that of every product that log-probs follow from, for the whole process.
Gradients follow from none: a backward pass multiplies as it always did.

    whole_sums()                 # before anything is multiplied on the device
    with split_sums():
        loss.backward()
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_before: list[bool] = []  # whether bfloat16 sums might be rounded on their way, before they were whole


def whole_sums() -> None:
    """From now on products go by cuBLASLt, which gets no room for parts of a sum."""
    os.environ["CUBLASLT_WORKSPACE_SIZE"] = "1"
    if not _before:
        _before.append(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)
    _choose("cublaslt", (False, False))


@contextmanager
def split_sums() -> Iterator[None]:
    """Products by cuBLAS itself, which has its workspace; nothing where sums are not whole. One thread at a time."""
    if not _before:
        yield
        return
    _choose("cublas", _before[0])
    try:
        yield
    finally:
        _choose("cublaslt", (False, False))


def _choose(library: str, allowed: bool | tuple[bool, bool]) -> None:
    torch.backends.cuda.preferred_blas_library(library)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = allowed
