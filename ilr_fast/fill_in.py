"""What is `auto` in a config, for the card at hand; and which keys would make a config fit that does not.

    config = fill_in(config, shapes, machine)               # the fastest settings that fit
    for remedy in remedies(config, shapes, machine): ...     # each with the plan that it would give

Settings are tried from the fastest on. Smaller micro-batches cost little while they fill the card, states on the host a
copy of them each way a step, recomputation a third of the training; so that is the order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ilr_fast.config import AgentConfig, Config
from ilr_fast.graph_sizes import worthwhile
from ilr_fast.memory import trained_count
from ilr_fast.model_shape import ModelShape
from ilr_fast.plan import Machine, RunPlan, estimated_contexts, place, plan_run, with_caches

# What a setting costs, as a share of the step's time: the order in which settings are tried. Not measured.
MICRO_BATCHES = {16384: 0.0, 8192: 0.01, 4096: 0.04, 2048: 0.1, 1024: 0.25, 512: 0.5}
OFFLOAD_COST, MLP_COST, RECOMPUTE_COST = 0.08, 0.15, 0.25
SLEEPS = {"never": 0.0, "cache": 0.002, "turns": 0.5}
DEFAULT_MICRO_BATCH = 8192
SPARE = 0.04  # of the card, which `auto` leaves free: a plan is not exact


class Setting(NamedTuple):
    """A key of an agent's and a value: `set_key` puts it into a config."""

    agent: str
    key: str
    value: Any

    @property
    def text(self) -> str:
        """As an argument of the command line: agents.NAME.key=value."""
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"agents.{self.agent}.{self.key}={value}"


@dataclass(frozen=True, slots=True)
class Remedy:
    """Settings that were tried together, and the plan that they give."""

    settings: tuple[Setting, ...]
    plan: RunPlan

    @property
    def text(self) -> str:
        """Its settings as arguments, parted by spaces."""
        return " ".join(setting.text for setting in self.settings)


def set_keys(config: Config, settings: Sequence[Setting]) -> Config:
    """The config with the settings in it."""
    agents = dict(config.agents)
    for name, path, value in settings:
        agents[name] = _replaced(agents[name], path.split("."), value)
    return replace(config, agents=agents)


def _replaced(node: Any, path: Sequence[str], value: Any) -> Any:
    if len(path) == 1:
        return replace(node, **{path[0]: value})
    return replace(node, **{path[0]: _replaced(getattr(node, path[0]), path[1:], value)})


def fill_in(
    config: Config, shapes: Mapping[str, ModelShape], machine: Machine, contexts: Mapping[str, int] | None = None
) -> Config:
    """The config with a value for each `auto`: fast ones that fit with some room, else that fit, else the smallest.

    What all agents share is tried in every combination; for each of them, what an agent has to itself is slowed down
    step by step, that first which brings most for its cost, until it fits: plans in proportion to the agents' square.
    """
    contexts = contexts or estimated_contexts(config)
    config = with_caches(config, shapes, machine, contexts)
    own = _own_choices(config, machine, shapes)
    smallest, least = config, math.inf
    for spare in (SPARE, SPARE / 2, 0.0):
        best, lowest = None, math.inf
        for shared, settings in sorted(_shared_choices(config, machine), key=lambda choice: choice[0]):
            if shared >= lowest:
                break
            found = _slowed(set_keys(config, settings), own, _Judge(shapes, machine, contexts, spare))
            if found.excess == 0 and shared + found.cost < lowest:
                best, lowest = found.config, shared + found.cost
            elif found.excess < least:
                smallest, least = found.config, found.excess
        if best is not None:
            return _with_graphs(best, _Judge(shapes, machine, contexts, spare))
    return _with_graphs(smallest, _Judge(shapes, machine, contexts, 0.0))


@dataclass(frozen=True, slots=True)
class _Judge:
    """How far a config is from fitting."""

    shapes: Mapping[str, ModelShape]
    machine: Machine
    contexts: Mapping[str, int]
    spare: float

    def __call__(self, config: Config) -> float:
        """Bytes beyond what each device has but for the share to spare, all phases together."""
        planned = plan_run(config, self.shapes, self.machine, self.contexts)
        return sum(
            max(0.0, phase.total - (1 - self.spare) * device.capacity)
            for device in (*planned.devices, planned.host) if device.capacity is not None for phase in device.phases
        )  # fmt: skip


def _with_graphs(config: Config, judge: _Judge) -> Config:
    """CUDA graphs of the layers in what memory the other settings leave, as many as fit: they slow nothing down."""
    for name, agent in config.agents.items():
        if agent.graph_tokens == "auto":
            device = "cpu" if place(agent, judge.machine) == "cpu" else "cuda"
            sizes = worthwhile(agent, config, judge.shapes[name], device)
            choices = [set_keys(config, [Setting(name, "graph_tokens", size)]) for size in sizes]
            config = next(one for one in choices if not one.agents[name].graphed_tokens or not judge(one))
    return config


class _Found(NamedTuple):
    config: Config
    cost: float
    excess: float


def _slowed(config: Config, own: Sequence[Sequence[tuple[float, Setting]]], judge: _Judge) -> _Found:
    """The config with one of each agent's own choices, from the fastest on, so far as it needs slower ones."""
    taken = [0] * len(own)

    def with_(changed: Mapping[int, int]) -> Config:
        return set_keys(config, [choices[changed.get(n, taken[n])][1] for n, choices in enumerate(own)])

    excess = judge(with_({}))
    while excess:
        best: tuple[float, int, int, float] | None = None
        for n, choices in enumerate(own):
            for step in range(taken[n] + 1, len(choices)):
                left = judge(with_({n: step}))
                worth = (excess - left) / (choices[step][0] - choices[taken[n]][0])
                if left < excess and (best is None or worth > best[0]):
                    best = worth, n, step, left
        if best is None:
            break
        _, number, taken[number], excess = best
    for n in range(len(own)):  # an early change may have become needless
        taken[n] = next((step for step in range(taken[n]) if not excess and not judge(with_({n: step}))), taken[n])
    return _Found(with_({}), sum(choices[taken[n]][0] for n, choices in enumerate(own)), excess)


def remedies(
    config: Config, shapes: Mapping[str, ModelShape], machine: Machine, contexts: Mapping[str, int] | None = None
) -> list[Remedy]:
    """Single changes that lower the peak of a config without `auto`, and one of several that fits, if there is one."""
    contexts = contexts or estimated_contexts(config)
    before = plan_run(config, shapes, machine, contexts)
    found = []
    for _, setting in _single(config, machine):
        remedy = Remedy((setting,), plan_run(set_keys(config, (setting,)), shapes, machine, contexts))
        if _excess(remedy.plan) < _excess(before):
            found.append(remedy)
    if not any(remedy.plan.fits for remedy in found):
        found += _together(config, shapes, machine, contexts, before)
    return found


def _shared_choices(config: Config, machine: Machine) -> list[tuple[float, tuple[Setting, ...]]]:
    """What all agents share: each combination of micro-batches and sleep that are `auto`, with its cost."""
    options: list[list[tuple[float, tuple[Setting, ...]]]] = []
    on_cpu = _on_cpu(config, machine)
    autos = [name for name, agent in config.agents.items() if agent.micro_batch_tokens == "auto"]
    if autos:
        sizes = {DEFAULT_MICRO_BATCH: 0.0} if on_cpu else MICRO_BATCHES
        options.append([(c, tuple(Setting(n, "micro_batch_tokens", t) for n in autos)) for t, c in sizes.items()])
    sleepers = [name for name, agent in config.agents.items() if agent.engine.sleep == "auto"]
    if sleepers:
        kinds = [kind for kind in SLEEPS if kind == "never" or not on_cpu and _may_sleep(config, kind)]
        options.append([(SLEEPS[kind], tuple(Setting(n, "engine.sleep", kind) for n in sleepers)) for kind in kinds])
    return [
        (sum(cost for cost, _ in chosen), tuple(setting for _, settings in chosen for setting in settings))
        for chosen in itertools.product(*options)
    ]


def _own_choices(
    config: Config, machine: Machine, shapes: Mapping[str, ModelShape]
) -> list[list[tuple[float, Setting]]]:
    """For each `auto` that an agent has to itself its values with their costs, the fastest first."""
    found, on_cpu = [], _on_cpu(config, machine)
    for name, agent in config.agents.items():
        if agent.gradient_checkpointing == "auto":
            costs = {False: 0.0, "mlp": MLP_COST, True: RECOMPUTE_COST}
            found.append([
                (cost, Setting(name, "gradient_checkpointing", again)) for again, cost in costs.items()
                if again != "mlp" or agent.train == "full"  # with adapters its speed has not been measured
                if again is not True or not agent.graphed_tokens
            ])
        if agent.optimizer.offload == "auto":
            key, pays = "optimizer.offload", trained_count(agent, shapes[name]) > 10**8 and not on_cpu
            found.append([(0.0, Setting(name, key, "none")), *([(OFFLOAD_COST, Setting(name, key, "host"))] * pays)])
    return found


def _on_cpu(config: Config, machine: Machine) -> bool:
    return all(place(agent, machine) == "cpu" for agent in config.agents.values())


def _excess(planned: RunPlan) -> int:
    """Bytes beyond what there is, all phases together; without known capacities the peak."""
    devices = (*planned.devices, planned.host)
    if all(device.capacity is None for device in devices):
        return planned.peak
    return sum(
        max(0, phase.total - device.capacity)
        for device in devices if device.capacity is not None for phase in device.phases
    )  # fmt: skip


def _may_sleep(config: Config, kind: str) -> bool:
    """Whether `engine.sleep: kind` frees anything: a lone agent has nobody to take turns with, and none has who talks
    while others learn; weights that graphs were asked for stay where they are."""
    graphed = any(agent.graphed_tokens for agent in config.agents.values())
    return not config.rollout.ahead and (kind != "turns" or len(config.agents) > 1 and not graphed)


def _single(config: Config, machine: Machine) -> Iterator[tuple[float, Setting]]:
    """Changes that may save memory, each with its cost."""
    for name, agent in config.agents.items():
        on_card = place(agent, machine) != "cpu"
        for kind in ("cache", "turns") if on_card else ():
            if SLEEPS[kind] > SLEEPS[agent.engine.rests] and _may_sleep(config, kind):
                yield SLEEPS[kind], Setting(name, "engine.sleep", kind)
        changes = [*_of_engine(agent, on_card), *(_of_training(agent, on_card) if agent.train != "none" else ())]
        yield from ((cost, Setting(name, key, value)) for cost, key, value in changes)


def _of_engine(agent: AgentConfig, on_card: bool) -> Iterator[tuple[float, str, Any]]:
    if agent.engine.name == "vllm" and agent.engine.cache_gib:
        yield 0.1, "engine.cache_gib", agent.engine.cache_gib / 2
    elif agent.engine.slots >= 16:
        yield 0.1, "engine.slots", agent.engine.slots // 2
    if agent.dtype == "float32" and on_card:
        yield 1.0, "dtype", "bfloat16"


def _of_training(agent: AgentConfig, on_card: bool) -> Iterator[tuple[float, str, Any]]:
    tokens, optimizer = agent.batch_tokens, agent.optimizer
    if tokens >= 1024:
        yield 0.05 * 8192 / tokens, "micro_batch_tokens", tokens // 2
    if on_card and (agent.logits_mib is None or agent.logits_mib > 512):
        yield 0.03, "logits_mib", 512
    if not agent.gradient_checkpointing and agent.train == "full":
        yield MLP_COST, "gradient_checkpointing", "mlp"
    if agent.gradient_checkpointing is not True:
        yield RECOMPUTE_COST, "gradient_checkpointing", True
    if agent.train == "full" and on_card:
        if optimizer.offload == "none":
            yield OFFLOAD_COST, "optimizer.offload", "host"
        if optimizer.rounding == "copies" and agent.dtype in ("auto", "bfloat16"):
            yield 0.3, "optimizer.rounding", "stochastic"
        yield 20.0, "train", "lora"
    if optimizer.rounding == "stochastic" and optimizer.moments == "float32":
        yield 0.3, "optimizer.moments", "bfloat16"
    if agent.train == "lora" and agent.quantize == "none" and agent.engine.name == "embedded" and on_card:
        yield 10.0, "quantize", "nf4"


def _together(
    config: Config,
    shapes: Mapping[str, ModelShape],
    machine: Machine,
    contexts: Mapping[str, int],
    before: RunPlan,
) -> list[Remedy]:
    """Changes one after the other, those first that bring most for their cost, until it fits; empty where it can't."""
    taken: dict[tuple[str, str], Setting] = {}
    excess = _excess(before)
    while excess:
        changed, best = set_keys(config, tuple(taken.values())), None
        for cost, setting in _single(changed, machine):
            left = _excess(plan_run(set_keys(changed, (setting,)), shapes, machine, contexts))
            if left < excess and (best is None or (excess - left) / cost > best[0]):
                best = (excess - left) / cost, setting, left
        if best is None:
            return []
        taken[best[1][:2]], excess = best[1], best[2]
    for key in list(taken):  # an early change may have become needless
        fewer = tuple(setting for other, setting in taken.items() if other != key)
        if plan_run(set_keys(config, fewer), shapes, machine, contexts).fits:
            del taken[key]
    settings = tuple(taken.values())
    return [Remedy(settings, plan_run(set_keys(config, settings), shapes, machine, contexts))]
