"""What `ilr-fast eval` is asked to measure: run folders (the best checkpoint's agents) and models.

A run keeps its own config: prompts, limits of turns, chat templates. Models share the defaults. Overrides (`key=value`)
go to both; one that names an agent goes where that agent is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ilr_fast.checkpoint import best_good
from ilr_fast.config import AgentConfig, Config
from ilr_fast.config_parse import load_config
from ilr_fast.config_yaml import dump_yaml, read_yaml
from ilr_fast.errors import UserError
from ilr_fast.evaluate import method_of
from ilr_fast.evaluate_papers import NO_DATA
from ilr_fast.models import resolve_model


@dataclass(frozen=True, slots=True)
class Target:
    """Agents that are measured under one config. `folder`: the run they are of, None for models."""

    label: str
    config: Config  # its agents' models are what is measured; none of them is trained
    method: str
    checkpoint: str | None
    folder: Path | None


def read_targets(names: Sequence[str], overrides: Sequence[str]) -> list[Target]:
    """The runs in the order given, then all models as one target. Raises UserError."""
    runs = [Path(name) for name in names if is_run(Path(name))]
    models = [name for name in names if not is_run(Path(name))]
    known = [set(read_yaml(run / "config.yaml").get("agents") or {}) for run in runs]
    agents = _model_agents(models)
    everybody = set(agents).union(*known)
    targets = [_run(run, _for(overrides, mine, everybody)) for run, mine in zip(runs, known, strict=True)]
    if models:
        targets.append(_models(agents, _for(overrides, set(agents), everybody)))
    return targets


def is_run(path: Path) -> bool:
    """Whether a path is a run folder (a model's folder has a config.json)."""
    return (path / "config.yaml").is_file()


def together(targets: Sequence[Target]) -> tuple[Config, dict[str, tuple[Target, str]]]:
    """The first target's config with the agents of all, and by their name in it (target, agent).

    Where two targets have an agent of one name, the agents are called `run.agent`.
    """
    names = [name for target in targets for name in target.config.agents]
    members = {
        (f"{target.label}.{name}" if names.count(name) > 1 else name): (target, name)
        for target in targets for name in target.config.agents
    }  # fmt: skip
    agents = {shown: target.config.agents[name] for shown, (target, name) in members.items()}
    return replace(targets[0].config, agents=agents), members


def _run(run: Path, overrides: Sequence[str]) -> Target:
    config = load_config(run / "config.yaml", [*_of_training(run, overrides), *overrides])
    checkpoint = best_good(run / "checkpoints")
    if checkpoint is None:
        raise UserError("the run has no checkpoint yet", str(run), "wait for one, or name its models: that is the base")
    agents = {
        name: replace(agent, model=str(checkpoint.path / name)) if agent.train != "none" else agent
        for name, agent in config.agents.items()
    }
    return Target(run.resolve().name, _frozen(config, agents), method_of(config), f"step_{checkpoint.step:06d}", run)


def _of_training(run: Path, overrides: Sequence[str]) -> list[str]:
    """What the run's training has filled in and another device or engine would refuse, taken back."""
    names = read_yaml(run / "config.yaml").get("agents") or {}
    engines = {override.partition("=")[0] for override in overrides}
    return [f"agents.{name}.graph_tokens=0" for name in names] + [
        f"agents.{name}.engine.cache_gib=null" for name in names if f"agents.{name}.engine.name" in engines
    ]


def _models(agents: Mapping[str, str], overrides: Sequence[str]) -> Target:
    tree: dict[str, Any] = {
        "agents": {name: {"model": model} for name, model in agents.items()},
        "protocol": "single", "interaction": "none", "data": {"train": NO_DATA, "validation": NO_DATA, "test": NO_DATA},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "models.yaml"
        file.write_text(dump_yaml(tree), encoding="utf-8")
        config = load_config(file, overrides)
    inside = all("checkpoints" in Path(model).parts for model in agents.values())
    return Target("models", _frozen(config, config.agents), "checkpoint" if inside else "base", None, None)


def _frozen(config: Config, agents: Mapping[str, AgentConfig]) -> Config:
    """Without anything that only training needs: optimizers, adapters, the reference."""
    still = {name: replace(agent, train="none") for name, agent in agents.items()}
    return replace(config, agents=still, loss=replace(config.loss, beta=0.0))


def _model_agents(models: Sequence[str]) -> dict[str, str]:
    """A name for each model: the last part of its path; a second one of that name gets a number."""
    agents: dict[str, str] = {}
    for model in models:
        resolve_model(model, f"RUN or MODEL {model}")
        name = Path(model).name or model
        number = 2
        while name in agents:
            name, number = f"{Path(model).name}-{number}", number + 1
        agents[name] = model
    return agents


def _for(overrides: Sequence[str], mine: set[str], everybody: set[str]) -> list[str]:
    """The overrides without those of agents that are elsewhere."""
    others = everybody - mine
    return [text for text in overrides if not any(text.startswith(f"agents.{name}.") for name in others)]
