"""What tests of the plan share: configs for one card, the shapes of their models, a machine with one card.

    config, known = opened(PAIR, all_shapes())
    plan_run(config, known, machine(22))
"""

from __future__ import annotations

from pathlib import Path

from ilr_benchmarks.shapes import SHAPES, shape_config

from ilr_fast.config_parse import load_config
from ilr_fast.memory import GIB
from ilr_fast.model_shape import shape_of
from ilr_fast.plan import Machine

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("[0-9]*gb/*.yaml"))
PAIR = next(path for path in CONFIGS if path.parent.name == "24gb" and path.stem == "ilr_two_1.5b_full")


def machine(gib, host=None):
    return Machine({"cuda:0": int(gib * GIB)}, host)


def all_shapes():
    return {name: shape_of(shape_config(name)) for name in SHAPES}


def opened(path, shapes, *overrides):
    config = load_config(path, overrides)
    return config, {name: shapes[agent.model] for name, agent in config.agents.items()}
