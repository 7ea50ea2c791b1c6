"""What vLLM does to the process it is imported into, and what this project does to vLLM, each undone afterwards.

vLLM is imported on first use, with its subprocess, its log lines and its usage report turned off. It leaves behind a
preloaded allocator for child processes, a torch whose `set_num_threads` does nothing any more, and transformers'
classes with its compilation in them (such models run without it). It looks at a model's class in a new process. On the
CPU it packs the weights of linear layers and gives up the originals; here they stay as they are, because they are what
the trainer changes.

    with process_kept_as_it_is(), class_kept_as_it_is(type(model.get_decoder())):
        …                                                             # vLLM is imported and opened
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch


def prepare_process(*, pieces: bool = True, exact: bool = False) -> None:
    """What has to be set before vLLM is imported: its core in this process, few words, no report to its makers.

    `pieces`: CUDA graphs that stop at attention (vllm_quick.graphs); the first engine of a process decides. `exact`:
    its batch-invariant mode, which replaces operators of the whole process.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if exact:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    for name, value in (quiet | ({"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"} if pieces else {})).items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())  # vLLM sets it later than it speaks


def import_vllm() -> None:
    """Loads vLLM's engine, which takes seconds, with the process prepared for it."""
    prepare_process()
    import vllm.v1.engine.core_client  # noqa: F401


@contextlib.contextmanager
def process_kept_as_it_is() -> Iterator[None]:
    """Random numbers, torch's functions and what child processes inherit are afterwards as they were before.

    What torch deprecates of what vLLM uses is not the user's to read.
    """
    preload, set_threads, threads = os.environ.get("LD_PRELOAD"), torch.set_num_threads, torch.get_num_threads()
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            yield
        finally:
            torch.set_num_threads = set_threads
            torch.set_num_threads(threads)
            os.environ.pop("LD_PRELOAD", None)
            if preload is not None:
                os.environ["LD_PRELOAD"] = preload


@contextlib.contextmanager
def class_kept_as_it_is(kind: type) -> Iterator[None]:
    """Models that vLLM runs by transformers' own modules are given its compilation; the trainer's class stays plain."""
    bases, members = kind.__bases__, dict(vars(kind))
    try:
        yield
    finally:
        if kind.__bases__ != bases:
            kind.__bases__ = bases
        for name in set(vars(kind)) - set(members):
            delattr(kind, name)
        for name, member in members.items():
            if vars(kind)[name] is not member:
                setattr(kind, name, member)


@contextlib.contextmanager
def models_inspected_here() -> Iterator[None]:
    """What vLLM wants to know of a model's class it asks a new process for, which imports all of vLLM first: some ten
    seconds, so that CUDA is not touched here. Here it is touched anyway."""
    from vllm.model_executor.models import registry

    elsewhere = getattr(registry, "_run_in_subprocess", None)
    if elsewhere is None:
        yield
        return
    registry._run_in_subprocess = lambda inspect: inspect()
    try:
        yield
    finally:
        registry._run_in_subprocess = elsewhere


@contextlib.contextmanager
def weights_left_in_place() -> Iterator[None]:
    """On the CPU: linear layers multiply by their parameter itself instead of a packed copy of it."""
    from vllm.model_executor.layers import utils

    packing = getattr(utils, "dispatch_cpu_unquantized_gemm", None)
    if packing is None:
        yield
        return

    def unpacked(layer: Any, remove_weight: bool = False) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = unpacked
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = packing
