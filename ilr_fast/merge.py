"""Adapters → full models that load without peft: `ilr-fast train CONFIG --merge`.

    merge_adapters(Path("runs/a"))      # [runs/a/merged/ada]: of the best checkpoint, for each agent of `train: lora`

The checkpoints keep the adapters, because a run that goes on needs them apart from their base. Adapters of `quantize:
nf4` are merged into the weights as they were before four bits were made of them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ilr_fast.checkpoint import best_good
from ilr_fast.config import Config
from ilr_fast.config_parse import load_config
from ilr_fast.durable import TEMPORARY, clean, disk_errors, remove_tree, sync_tree
from ilr_fast.errors import UserError


def check_merge(config: Config) -> None:
    """UserError where a config has no adapters."""
    if all(agent.train != "lora" for agent in config.agents.values()):
        raise UserError("no agent has adapters", "--merge", "leave it out, or set `train: lora` for an agent")


def merge_adapters(run: Path) -> list[Path]:
    """Writes RUN/merged/<agent>/, Hugging Face folders, from the best checkpoint; replaces what stands there.

    Raises UserError where the run has no checkpoint or no adapters, or the disk is full.
    """
    config = load_config(run / "config.yaml")
    check_merge(config)
    checkpoint = best_good(run / "checkpoints")
    if checkpoint is None:
        raise UserError("the run has no checkpoint yet", str(run), "train it first")
    folder = run / "merged"
    made = []
    with disk_errors(folder, "free some space and run the same command again"):
        folder.mkdir(exist_ok=True)
        clean(folder)
        for name, agent in config.agents.items():
            if agent.train == "lora":
                made.append(folder / name)
                _merge(config, name, checkpoint.path / name, folder / name)
    return made


def _merge(config: Config, name: str, adapters: Path, place: Path) -> None:
    from transformers import AutoTokenizer

    from ilr_fast.loading import load_reference

    temporary = place.with_name(f"{TEMPORARY}{name}-new")
    model = load_reference(replace(config.agents[name], model=str(adapters), quantize="none"), f"agents.{name}")
    model.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(adapters).save_pretrained(temporary)
    sync_tree(temporary)
    if place.exists():
        remove_tree(place)
    temporary.rename(place)
