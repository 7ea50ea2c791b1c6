"""The memory of a run, phase by phase, from its config alone: what is held when, and whether it fits.

    planned = plan_run(config, shapes, capacity=24 * GIB)
    planned.peak, planned.fits

A device's phases are loading, generating (validation too), the update of each agent, and writing a checkpoint. Agents
of one process generate by turns, so their engines' work space is counted once; agents in processes of their own
generate, and update, at the same time. What is `auto` in a config must have been filled in (fill_in.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ilr_fast.config import AgentConfig, Config, turn_limit
from ilr_fast.engines.step_size import longest_request
from ilr_fast.engines.vllm_fit import CACHE_SHARE
from ilr_fast.memory import GIB, AgentMemory, Use, agent_memory, cache_tokens, engine_size, weight_size
from ilr_fast.model_shape import ModelShape
from ilr_fast.protocols import load_protocol
from ilr_fast.types import Residence

CONTEXT = int(0.75 * GIB)  # a process's CUDA context, its libraries and their work space (0.72 on an H100)
HOST_PROCESS = int(0.6 * GIB)  # an interpreter with torch and transformers
PROMPT_TOKENS = 512  # a question and its instructions, where they have not been counted
TURN_TOKENS = 128  # what an instruction between two turns takes


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one thing; `agent` is "" for what belongs to none."""

    agent: str
    item: str
    size: int


@dataclass(frozen=True, slots=True)
class Phase:
    """What is held at the worst moment of a phase."""

    name: str
    parts: tuple[Part, ...]

    @property
    def total(self) -> int:
        return sum(part.size for part in self.parts)


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """One device's phases. `capacity` in bytes, None where nobody knows it."""

    device: str
    phases: tuple[Phase, ...]
    capacity: int | None

    @property
    def worst(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        return self.capacity is None or self.worst.total <= self.capacity


@dataclass(frozen=True, slots=True)
class RunPlan:
    """All devices of a run, and the host's memory (states that are kept there, and the weights of what loads)."""

    devices: tuple[DevicePlan, ...]
    host: DevicePlan

    @property
    def fits(self) -> bool:
        return all(device.fits for device in (*self.devices, self.host))

    @property
    def room(self) -> float:
        """Bytes that the run leaves free of its fullest device all the time; infinite where no size is known."""
        known = [device.capacity - device.worst.total for device in self.devices if device.capacity is not None]
        return min(known, default=math.inf)

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of the fullest device."""
        return max((device.worst.total for device in self.devices or (self.host,)), default=0)


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is: bytes of each device by name (`cuda:0`), and of the host; None where unknown."""

    devices: Mapping[str, int | None]
    host: int | None


def plan_run(
    config: Config, shapes: Mapping[str, ModelShape], machine: Machine, contexts: Mapping[str, int] | None = None
) -> RunPlan:
    """The plan of a config without `auto`. `contexts`: tokens of each agent's longest conversation, where counted."""
    contexts = contexts or estimated_contexts(config)
    memories, places = {}, {}
    for name, agent in config.agents.items():
        places[name] = place(agent, machine)
        context = min(contexts[name], context_limit(agent, shapes[name]))
        use = Use("cpu" if places[name] == "cpu" else "cuda", context)
        memories[name] = agent_memory(agent, config, shapes[name], use)
    devices = [d for d in dict.fromkeys(places.values()) if d != "cpu"]
    there = {device: {n: m for n, m in memories.items() if places[n] == device} for device in devices}
    plans = [DevicePlan(device, _phases(config, there[device]), machine.devices.get(device)) for device in devices]
    return RunPlan(tuple(plans), _host(config, memories, places, machine.host))


def place(agent: AgentConfig, machine: Machine) -> str:
    """cpu, or the name of the CUDA device."""
    if agent.device == "auto":
        return "cuda:0" if machine.devices else "cpu"
    return f"{agent.device}:0" if agent.device == "cuda" else agent.device


def with_caches(
    config: Config, shapes: Mapping[str, ModelShape], machine: Machine, contexts: Mapping[str, int]
) -> Config:
    """The config with vLLM's memory of keys and values where it names none: all slots at their longest, and one request
    of the engine's context at the least, but at most a share of the device's memory."""
    agents = dict(config.agents)
    for name, agent in config.agents.items():
        if agent.engine.name == "vllm" and agent.engine.cache_gib is None:
            device, limit = place(agent, machine), context_limit(agent, shapes[name])
            use = Use("cpu" if device == "cpu" else "cuda", min(contexts[name], limit))
            token = shapes[name].cache_per_token() * engine_size(agent.engine, weight_size(agent, use.device))
            wanted = max(cache_tokens(agent.engine, use), limit) * token
            there = machine.host if device == "cpu" else machine.devices.get(device)
            size = wanted if there is None else min(wanted, int(CACHE_SHARE * there))
            engine = replace(agent.engine, cache_gib=math.ceil(1000 * size / GIB) / 1000)
            agents[name] = replace(agent, engine=engine)
    return replace(config, agents=agents)


def context_limit(agent: AgentConfig, shape: ModelShape) -> int:
    """The most tokens that the agent's engine lets a conversation have."""
    return longest_request(agent.engine.max_context, shape.positions)


def estimated_contexts(config: Config) -> dict[str, int]:
    """Tokens of each agent's longest conversation, where questions have not been counted."""
    stages = load_protocol(config.protocol, config).stages
    heard = config.rollout.peer_tokens * (len(config.agents) - 1) + TURN_TOKENS
    turns = sum(turn_limit(config.rollout, stage) for stage in stages)
    tokens = PROMPT_TOKENS * (1 + config.prompts.examples) + turns + heard * (len(stages) - 1)
    return dict.fromkeys(config.agents, tokens)


def residence(agent: AgentConfig) -> Residence:
    """What stays of an agent on its device while others are at work."""
    if agent.engine.rests == "turns":
        return "away"
    return "training" if agent.engine.name == "embedded" or agent.engine.rests == "cache" else "awake"


def _phases(config: Config, memories: Mapping[str, AgentMemory]) -> tuple[Phase, ...]:
    crew = _Crew(config, memories)
    away = [name for name in memories if residence(config.agents[name]) == "away"]
    loaded = [crew.resting((n,), fresh=True) for n in memories] if away else [crew.resting(memories, fresh=True)]
    phases = [_phase("load", _largest(loaded))]
    for turn in [[name] for name in away] or [[]]:
        awake = [name for name in memories if name not in away or name in turn]
        phases.append(_phase(_named("generate", turn), crew.generating(awake)))
    for together in _updates(config, memories):
        phases.append(_phase(_named("update", together), crew.updating(together)))
    return (*phases, _phase("checkpoint", _largest(crew.resting((name,)) for name in memories)))


def _named(phase: str, names: Sequence[str]) -> str:
    return f"{phase} {' + '.join(names)}".rstrip()


def _largest(parts: Iterable[list[Part]]) -> list[Part]:
    return max(parts, key=lambda found: sum(part.size for part in found), default=[])


@dataclass(frozen=True, slots=True)
class _Crew:
    """The agents of one device."""

    config: Config
    memories: Mapping[str, AgentMemory]

    def resting(self, present: Iterable[str], *, fresh: bool = False) -> list[Part]:
        """What is there while nothing is computed: of those that may be away, only the present.

        `fresh`: before the first update, which makes AdamW's moments; its copies of the weights are there.
        """
        parts = []
        for name, memory in self.memories.items():
            agent = self.config.agents[name]
            stays = residence(agent)
            if stays != "away" or name in present:
                parts.append(Part(name, "weights", memory.weights))
                parts.append(Part(name, "AdamW's states", memory.copies if fresh else memory.states))
            parts.append(Part(name, "CUDA graphs", memory.graphs))
            if agent.engine.name == "vllm" and stays == "awake":
                parts.append(Part(name, "keys and values", memory.cache))
        return [*parts, Part("", "CUDA contexts", CONTEXT * _processes(self.config, self.memories))]

    def generating(self, awake: Sequence[str]) -> list[Part]:
        """Keys and values of all that generate; of one process's engines the largest work space."""
        parts = [part for part in self.resting(awake) if part.item != "keys and values"]
        parts += [Part(name, "keys and values", self.memories[name].cache) for name in awake]
        local = [name for name in awake if self.config.agents[name].host == "local"]
        largest = max(local, key=lambda name: self.memories[name].engine, default=None)
        working = [name for name in awake if name not in local or name == largest]
        return parts + [Part(name, "engine", self.memories[name].engine) for name in working]

    def updating(self, names: Sequence[str]) -> list[Part]:
        """The named agents' updates at the same time; beside the dialogues, where these are a step ahead."""
        there = self.generating(list(self.memories)) if self.config.rollout.ahead else self.resting(names)
        return there + [part for name in names for part in _update(name, self.memories[name])]


def _phase(name: str, parts: Sequence[Part]) -> Phase:
    return Phase(name, tuple(part for part in parts if part.size))


def _update(name: str, memory: AgentMemory) -> list[Part]:
    """The worst of three moments: the LM head's, a layer's backward pass, AdamW at work."""
    parts = [Part(name, "gradients", memory.gradients)]
    if memory.step > memory.activations + max(memory.head, memory.passing):
        return [*parts, Part(name, "AdamW's step", memory.step)]
    parts.append(Part(name, "activations", memory.activations))
    if memory.head >= memory.passing:
        return [*parts, Part(name, "LM head", memory.head)]
    return [*parts, Part(name, "a layer's backward", memory.passing)]


def _updates(config: Config, memories: Mapping[str, AgentMemory]) -> list[tuple[str, ...]]:
    """The agents that update at the same time: those in processes of their own, beside one of the command's; all,
    where dialogues are a step ahead."""
    trains = [name for name in memories if config.agents[name].train != "none"]
    if config.rollout.ahead:
        return [tuple(trains)]
    if any(residence(config.agents[name]) == "away" for name in memories):
        return [(name,) for name in trains]
    apart = tuple(name for name in trains if config.agents[name].host == "process")
    local = [name for name in trains if name not in apart]
    return [(*apart, name) for name in local] if local else [apart]


def _processes(config: Config, memories: Mapping[str, AgentMemory]) -> int:
    """Processes that have a context on the device."""
    hosts = [config.agents[name].host for name in memories]
    return hosts.count("process") + ("local" in hosts)


def _host(
    config: Config, memories: Mapping[str, AgentMemory], places: Mapping[str, str], capacity: int | None
) -> DevicePlan:
    """The host's memory: agents that compute there; of the others what is kept there, and weights in passing."""
    here = {name: memory for name, memory in memories.items() if places[name] == "cpu"}
    away = {name: memory for name, memory in memories.items() if name not in here}
    base = [Part("", "processes", HOST_PROCESS * (1 + [a.host for a in config.agents.values()].count("process")))]
    base += [Part(name, "AdamW's states", memory.host_states) for name, memory in memories.items()]
    resting = [name for name in away if residence(config.agents[name]) == "away"]
    base += [Part(name, "an agent that is away", away[name].weights + away[name].states) for name in resting]
    largest = max(away.values(), key=lambda memory: memory.host_weights, default=None)
    loading = [Part("", "weights in passing", largest.host_weights)] if largest else []
    phases = _phases(config, here) if here else ()
    own = {phase.name: [p for p in phase.parts if p.item != "CUDA contexts"] for phase in phases}
    names = list(own) or ["load", "train", "checkpoint"]
    passing = ("load", "checkpoint")
    parts = {name: [*base, *own.get(name, ()), *(loading if name in passing else ())] for name in names}
    return DevicePlan("host", tuple(_phase(name, found) for name, found in parts.items()), capacity)
