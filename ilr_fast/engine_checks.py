"""What vLLM would refuse when it opens, found from the config and the models' shapes before anything is loaded.

    check_engines(config, shapes, machine)      # UserError: agents.ada.engine.max_context: a context of …
"""

from __future__ import annotations

from collections.abc import Mapping

from ilr_fast.config import AgentConfig, Config
from ilr_fast.engines.exact_families import check_family
from ilr_fast.engines.vllm_fit import check_one_request, check_positions
from ilr_fast.engines.vllm_lora import check_rank
from ilr_fast.errors import UserError
from ilr_fast.memory import GIB, engine_size, weight_size
from ilr_fast.model_shape import ModelShape
from ilr_fast.plan import Machine, context_limit, place


def check_engines(config: Config, shapes: Mapping[str, ModelShape], machine: Machine) -> None:
    """UserError for the first agent whose engine can't run its model as it is asked to, on the device that it has."""
    for name, agent in config.agents.items():
        if agent.engine.name == "vllm":
            where, on_cpu = f"agents.{name}", place(agent, machine) == "cpu"
            _check_model(agent, shapes[name], where, on_cpu)
            _check_requests(agent, shapes[name], where, on_cpu)


def _check_model(agent: AgentConfig, shape: ModelShape, where: str, on_cpu: bool) -> None:
    if agent.engine.exact:
        check_family(shape.architecture, where)
        if on_cpu:
            raise UserError("no exact engine on the CPU", f"{where}.engine.exact", "use a GPU, or leave it out")
    if agent.engine.quantization != "none" and on_cpu:
        raise UserError("8-bit weights need a GPU", f"{where}.engine.quantization", "use a GPU, or leave it out")
    if agent.train == "lora":
        check_rank(agent.lora.rank, where)


def _check_requests(agent: AgentConfig, shape: ModelShape, where: str, on_cpu: bool) -> None:
    """A context that the model, or the memory of keys and values, does not hold."""
    check_positions(agent.engine.max_context or 0, shape.positions, where)
    if agent.engine.cache_gib is not None:
        size = engine_size(agent.engine, weight_size(agent, "cpu" if on_cpu else "cuda"))
        token = shape.cache_per_token() * size
        check_one_request(int(agent.engine.cache_gib * GIB), context_limit(agent, shape), token, where)
