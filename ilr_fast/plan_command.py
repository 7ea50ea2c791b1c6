"""`ilr-fast plan CONFIG`: the memory of a run as a table, before anything is loaded; and what `train` asks first.

    ilr-fast plan configs/24gb/ilr_two_1.5b_full.yaml --gpu-memory 24GiB

The table has a column for each phase. A config that does not fit is the user's mistake (exit status 2); the keys that
would make it fit are then shown, each with the peak that it gives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ilr_fast.card import card_memory, host_memory
from ilr_fast.config import Config
from ilr_fast.config_parse import load_config, to_tree, walk_values
from ilr_fast.data import check_tasks
from ilr_fast.engine_checks import check_engines
from ilr_fast.errors import UserError
from ilr_fast.fill_in import Remedy, fill_in, remedies
from ilr_fast.memory import GIB
from ilr_fast.model_shape import ModelShape, model_shape
from ilr_fast.plan import DevicePlan, Machine, RunPlan, place, plan_run
from ilr_fast.rewards import grader_class

UNITS = {"": GIB, "gib": GIB, "gb": 10**9, "mib": 2**20, "mb": 10**6}


def plan_command(path: str, overrides: Sequence[str], gpu_memory: str | None) -> None:
    """Prints the plan of a config file; UserError where it does not fit, or the config is no good."""
    config = load_config(path, overrides)
    grader_class(config.reward.name)
    check_tasks(config.data)
    machine = machine_at_hand() if gpu_memory is None else a_machine_of(config, parse_size(gpu_memory))
    check_devices(config, machine)
    shapes = shapes_of(config)
    settled = fill_in(config, shapes, machine)
    check_engines(settled, shapes, machine)
    planned = plan_run(settled, shapes, machine)
    found = [] if planned.fits else remedies(settled, shapes, machine)
    from ilr_fast.plan_table import print_plan

    print_plan(planned, filled(config, settled), found)
    if not planned.fits:
        raise does_not_fit(planned, found, path)


def shapes_of(config: Config) -> dict[str, ModelShape]:
    """Each agent's model's shape, by name."""
    return {name: model_shape(agent.model, f"agents.{name}.model") for name, agent in config.agents.items()}


def machine_at_hand() -> Machine:
    """This machine's cards, without what other processes hold of them, and the host's memory."""
    cards = {f"cuda:{i}": memory.total - memory.used for i, memory in enumerate(card_memory())}
    if not cards:
        cards = _by_torch()
    return Machine(cards, host_memory())


def a_machine_of(config: Config, size: int) -> Machine:
    """A machine with cards of `size` bytes, as many as the config names; its host's memory is not known."""
    named = [agent.device for agent in config.agents.values() if agent.device.startswith("cuda:")]
    return Machine(dict.fromkeys(["cuda:0", *named], size), None)


def check_devices(config: Config, machine: Machine) -> None:
    """UserError where an agent's device is not there."""
    for name, agent in config.agents.items():
        device = place(agent, machine)
        if device != "cpu" and device not in machine.devices:
            found = ", ".join(machine.devices) or "none"
            remedy = f"use `auto`, or plan for another machine by --gpu-memory; CUDA devices found: {found}"
            raise UserError(f"no device {agent.device} here", f"agents.{name}.device", remedy)


def parse_size(text: str) -> int:
    """24GiB, 24 GB, 22.5 (GiB) as bytes; UserError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in UNITS or float(match[1]) == 0:
        raise UserError(f"{text!r} is no size", "--gpu-memory", "write for example 24GiB or 80GB")
    return int(float(match[1]) * UNITS[match[2].lower()])


def settle(config: Config, contexts: Mapping[str, int]) -> tuple[Config, RunPlan]:
    """A config for this machine, with nothing `auto` left, and its plan; UserError where it can't fit.

    `contexts`: tokens of each agent's longest conversation.
    """
    shapes, machine = shapes_of(config), machine_at_hand()
    settled = fill_in(config, shapes, machine, contexts)
    check_engines(settled, shapes, machine)
    planned = plan_run(settled, shapes, machine, contexts)
    if not _may_begin(planned) and config.memory_check == "refuse":
        raise does_not_fit(planned, remedies(settled, shapes, machine, contexts), "the config")
    return settled, planned


def does_not_fit(planned: RunPlan, found: Sequence[Remedy], where: str) -> UserError:
    """What does not fit, by how much, and what would make it fit."""
    over = max((d for d in (*planned.devices, planned.host) if not d.fits), key=_excess)
    assert over.capacity is not None
    what = (
        f"the run does not fit: {over.worst.total / GIB:.1f} GiB in phase {over.worst.name!r}, "
        f"and {over.device} has {over.capacity / GIB:.1f} GiB"
    )
    fitting = [remedy for remedy in found if remedy.plan.fits]
    if fitting:
        choices = "; or ".join(f"{r.text} ({r.plan.peak / GIB:.1f} GiB)" for r in fitting[:3])
        return UserError(what, where, f"it fits with {choices}")
    return UserError(what, where, "no setting that was tried makes it fit: take smaller models, or a larger card")


def filled(config: Config, settled: Config) -> list[str]:
    """What was filled in, as key=value."""
    before, after = dict(walk_values(to_tree(config))), dict(walk_values(to_tree(settled)))
    return [f"{key}={str(after[key]).lower()}" for key in after if after[key] != before.get(key)]


def _may_begin(planned: RunPlan) -> bool:
    """Cards hold what they have. The host's memory is planned from above, and gives way; not by half, though."""
    host = planned.host
    return all(d.fits for d in planned.devices) and (host.capacity is None or host.worst.total <= 1.5 * host.capacity)


def _excess(device: DevicePlan) -> int:
    return device.worst.total - (device.capacity or 0)


def _by_torch() -> dict[str, int]:
    """Free memory as CUDA says it, where NVML says nothing."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {f"cuda:{i}": torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())}
