"""An agent and its engine in this process: the engine samples from the very weights that the optimizer changes.

With vLLM the engine is there first and the trainer's parameters become its own, so a model has one place in memory.

host = open_host("ada", config.agents["ada"], config, chat)
generation = await host.generate(tokens, sampling)
result = host.update(sequences, step=1)
"""

from __future__ import annotations

import gc
import os
import resource
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from ilr_fast.agent import Agent
from ilr_fast.allocator import grow_segments, keep_freed_memory, plain_segments
from ilr_fast.chat import ChatFormat
from ilr_fast.config import AgentConfig, Config
from ilr_fast.engines.device_memory import OutOfMemory
from ilr_fast.engines.embedded import EmbeddedEngine
from ilr_fast.engines.regions import bytes_away
from ilr_fast.engines.vllm import VllmEngine
from ilr_fast.engines.vllm_core import CoreOptions
from ilr_fast.errors import UserError
from ilr_fast.loading import device_of, load_policy
from ilr_fast.parked import Parked, tensors_in
from ilr_fast.residency import by_device
from ilr_fast.types import Generation, Residence, Sampling, StepResult, TrainingSequence

QUANTIZATIONS = {"none": None, "fp8": "fp8_per_tensor"}  # what vLLM calls them
TURNS = "lower micro_batch_tokens or engine.cache_gib, or free memory"


class LocalHost:
    """A `Host` (hosts/__init__.py) without any process between."""

    def __init__(self, agent: Agent, engine: EmbeddedEngine | VllmEngine):
        self.agent, self.engine = agent, engine
        self._keeps = isinstance(engine, VllmEngine) and _alone(agent.name, agent.run)
        self.name, self.trains, self.max_context = agent.name, agent.trains, engine.max_context
        self._updates = 0
        self._noise: float | None = None
        self._parked = Parked(lambda: self._on_device(self._changing()), lambda: self._on_device(self._frozen()))

    async def generate(self, tokens: Sequence[int], sampling: Sampling) -> Generation:
        """Samples with the current weights."""
        return await self.engine.generate(tokens, sampling)

    def update(self, sequences: Sequence[TrainingSequence], step: int) -> StepResult:
        """See Host. What the embedded engine has cached goes first, so that its memory is free for training."""
        self._measure_noise()
        if isinstance(self.engine, EmbeddedEngine):
            self.engine.forget()
            self._give_back()
        return self._learned(self.agent.update(sequences, step))

    def _learned(self, result: StepResult) -> StepResult:
        """The engine gets the new weights."""
        self.engine.weights_changed()
        self._give_back()
        noise, self._noise = self._noise, None
        self._updates += 1
        return replace(result, metrics={**result.metrics, "engine_noise": noise})

    def _give_back(self) -> None:
        """What PyTorch keeps of freed memory goes back to the device, for other processes and as one piece; not where
        nobody takes it: asking for it again in every step costs a small model more than its products do."""
        if self.agent.device.type == "cuda" and not self._keeps:
            torch.cuda.empty_cache()

    def start_update(
        self, sequences: Sequence[TrainingSequence], step: int, beside: bool = False
    ) -> Callable[[], StepResult]:
        """See Host. In this process the update runs when its result is asked for, unless it is to run `beside`."""
        if not beside:
            return partial(self.update, sequences, step)
        apart = isinstance(self.engine, VllmEngine) and (self.agent.config.train == "lora" or not self.engine.shares)
        assert apart, "an engine on the weights that are trained would sample from half an update"
        self._measure_noise()
        learning = ThreadPoolExecutor(1, thread_name_prefix=f"{self.name} learns")
        result = learning.submit(self.agent.update, sequences, step)
        learning.shutdown(wait=False)
        return lambda: self._learned(result.result())

    def reference_logps(self, sequences: Sequence[TrainingSequence]) -> list[tuple[float, ...]]:
        """See Host."""
        return self.agent.reference_logps(sequences)

    def hold(self) -> bool:
        """See Host."""
        return self.agent.hold()

    def save_model(self, folder: Path) -> None:
        """See Host."""
        self.agent.save_model(folder)

    def save_state(self, folder: Path) -> None:
        """See Host."""
        self.agent.save_state(folder)

    def load(self, model_folder: Path, state_folder: Path) -> None:
        """See Host."""
        self.agent.load(model_folder, state_folder)
        self.engine.weights_changed()

    def forget(self) -> None:
        """See Host. What an embedded engine has cached becomes the device's."""
        self.engine.forget()
        if isinstance(self.engine, EmbeddedEngine):
            self._give_back()

    def reside(self, residence: Residence) -> None:
        """See Host. Weights of the trainer's own, its optimizer's states and a reference leave with the engine's."""
        self._measure_noise()
        _peak.look(self.agent.device)
        try:
            if residence != "away":
                self._parked.come_back()
            self.engine.reside(residence)
            if residence == "away":
                self._parked.leave()
        except OutOfMemory as error:
            raise UserError(f"{error}, as agents take turns", f"agents.{self.name}", TURNS) from None
        if residence != "awake" and self.agent.device.type == "cuda":
            torch.cuda.empty_cache()

    def _measure_noise(self) -> None:
        """While the engine is awake, since it may sleep when the update asks for it; once for an update, where due."""
        every = self.agent.run.log.noise_every
        due = every is not None and self._updates % every == 0 and self._noise is None
        if due and isinstance(self.engine, VllmEngine) and self.engine.residence == "awake":
            self._noise = self.engine.noise()

    def _changing(self) -> Iterator[Tensor]:
        """What training changes and the engine does not move."""
        agent = self.agent
        yield from (p for p in agent.model.parameters() if p.requires_grad)
        if agent.optimizer is not None and agent.sinks is not None:
            yield from tensors_in(agent.optimizer.state())
            yield from agent.sinks.buffers.values()

    def _frozen(self) -> Iterator[Tensor]:
        """What never changes."""
        for model in (self.agent.model, self.agent.reference):
            if model is not None:
                yield from (p for p in model.parameters() if not p.requires_grad)

    def _on_device(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """Those that take memory of a GPU of their own."""
        return (t for t in tensors if t.device.type == "cuda" and not self.engine.holds(t))

    def stats(self) -> dict[str, float]:
        """Counters since start. `memory_peak_gib` is the highest so far, of the device; on the CPU of the process."""
        counted = self.engine.stats()
        return {
            "tokens_generated": counted.tokens_generated,
            "tokens_prompt": counted.tokens_prompt,
            "tokens_reused": counted.tokens_reused,
            "seconds_busy": counted.seconds,
            "steps": counted.steps,
            "memory_peak_gib": _peak.look(self.agent.device) / 2**30,
        }

    def close(self) -> None:
        """Drops model, optimizer and cache."""
        if isinstance(self.engine, VllmEngine):
            self.engine.close()
        else:
            self.engine.forget()
        del self.agent, self.engine, self._parked
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def open_host(name: str, agent: AgentConfig, config: Config, chat: ChatFormat) -> LocalHost:
    """Loads an agent's model and opens its engine. Sets the process's threads and determinism as the config says."""
    _set_up_torch(config)
    if agent.engine.name == "vllm":
        return _with_vllm(name, agent, config, chat)
    loaded = Agent(name, agent, config, chat.tokenizer)
    engine = EmbeddedEngine(
        loaded.model,
        chat.tokenizer,
        slots=agent.engine.slots,
        max_context=agent.engine.max_context,
        stop_tokens=chat.stop_tokens,
    )
    return LocalHost(loaded, engine)


def _with_vllm(name: str, agent: AgentConfig, config: Config, chat: ChatFormat) -> LocalHost:
    where = f"agents.{name}"
    model = load_policy(agent, where, config.seed, on_host=True)
    options = CoreOptions(
        slots=agent.engine.slots,
        max_context=agent.engine.max_context,
        cache_gib=agent.engine.cache_gib,
        tokens_in_flight=agent.engine.tokens_in_flight,
        fast_start=agent.engine.fast_start,
        sleeps=agent.engine.rests != "never",
        exact=agent.engine.exact,
        dtype=None if agent.engine.dtype == "auto" else getattr(torch, agent.engine.dtype),
        quantization=QUANTIZATIONS[agent.engine.quantization],
        seed=config.seed,
    )
    with plain_segments():
        engine = VllmEngine(
            model,
            chat.tokenizer,
            options=options,
            weights=agent.engine.weights,
            stop_tokens=chat.stop_tokens,
            # While agents learn beside it, torch's one generator is not the engine's alone.
            seeded=config.deterministic or config.rollout.ahead,
            device=device_of(agent, where),
            where=where,
        )
    return LocalHost(Agent(name, agent, config, chat.tokenizer, model, engine.kernel), engine)


def _alone(name: str, config: Config) -> bool:
    """Whether an agent has its device for itself, and its engine holds what it needs all the time."""
    own = next(names for names in by_device(config).values() if name in names)
    return len(own) == 1 and config.agents[name].engine.rests == "never"


def _set_up_torch(config: Config) -> None:
    keep_freed_memory()
    grow_segments()
    disable_progress_bar()  # transformers' bars would tear the display of the run
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with a workspace only
        torch.use_deterministic_algorithms(True)
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 (mypy does not know it)


class _Peak:
    """The most that this process has held of a device (the CPU: in all): looked at before anything is given back."""

    def __init__(self) -> None:
        self._bytes: dict[torch.device, int] = {}

    def look(self, device: torch.device) -> int:
        """Bytes so far."""
        if device.type != "cuda":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        held = torch.cuda.max_memory_allocated(device) - bytes_away()
        torch.cuda.reset_peak_memory_stats(device)
        self._bytes[device] = max(held, self._bytes.get(device, 0))
        return self._bytes[device]


_peak = _Peak()
