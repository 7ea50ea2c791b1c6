"""`ilr-fast ablate CONFIG`: what each part of ILR contributes, from one config (ILR.md, section 5).

| method | differs from the config in |
|---|---|
| `base`, `base_few_shot` | nothing is trained; measured by the first run below |
| `ilr` | Idea3, dynamic interaction, calibrated |
| `ilr_di` | dynamic interaction alone: not calibrated |
| `ilr_pc` | calibration alone: the neutral instruction |
| `ilr_ratio_0`, `ilr_ratio_0.5`, `ilr_ratio_1` | a fixed share of cooperation, drawn by seed |
| `grpo` | each trained agent alone in a run of its own, with as many sampled turns: G × those of a dialogue *(ours)* |

Each stands in its own folder below `<run>-ablation`; what is finished is skipped and what was cut off goes on when the
command is given again. The report over all is written beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from ilr_fast.config import Config
from ilr_fast.config_check import check
from ilr_fast.config_parse import load_config
from ilr_fast.errors import UserError
from ilr_fast.evaluate import method_of
from ilr_fast.protocols import load_protocol
from ilr_fast.report import report
from ilr_fast.report.runs import read_run
from ilr_fast.runfolder import fingerprint

RATIOS = (0.0, 0.5, 1.0)
Train = Callable[..., Path]  # train(config, *, command) -> run folder


@dataclass(frozen=True, slots=True)
class Variant:
    """One run of the ablation; `name` is its folder's."""

    name: str
    config: Config

    @property
    def method(self) -> str:
        """What its results are called."""
        return method_of(self.config)


def ablate(config: Config, train: Train, *, command: str = "ilr-fast ablate", console: Console | None = None) -> Path:
    """Trains every variant that is not finished, one after the other, and returns the path of the report over all.

    `train(config, command=…)` makes or goes on with one run. Raises UserError for a config with a single agent, and for
    a folder that holds another config's ablation, before anything is trained.
    """
    console = console or Console()
    todo = variants(config)
    for variant in todo:
        check(variant.config, f"ablation {variant.name}")
        _check_folder(variant)
    for number, variant in enumerate(todo, 1):
        done = is_finished(variant)
        console.print(f"ablation {number} of {len(todo)}: {variant.name}" + (", finished before" if done else ""),
                      highlight=False, markup=False)
        if not done:
            train(variant.config, command=command)
    return report([Path(v.config.run) for v in todo], out=folder_of(config) / "report.html", console=console)


def variants(config: Config) -> list[Variant]:
    """The runs of an ablation, `ilr` first. UserError where there is nobody to talk to."""
    if len(config.agents) < 2:
        raise UserError("an ablation of learning from one another with a single agent", "agents",
                        "add an agent, or use `ilr-fast train` with `protocol: single`")
    made = []
    for number, (name, changed) in enumerate(_changes(config)):
        evaluation = changed.evaluate if number == 0 else replace(changed.evaluate, few_shot=[])
        made.append(Variant(name, replace(changed, run=str(folder_of(config) / name), evaluate=evaluation)))
    return made


def folder_of(config: Config) -> Path:
    """Where the variants' folders stand."""
    path = Path(config.run)
    return path.with_name(f"{path.name}-ablation")


def is_finished(variant: Variant) -> bool:
    """Whether all steps are done and every trained agent has been measured after them."""
    folder = Path(variant.config.run)
    if not (folder / "config.yaml").is_file():
        return False
    run = read_run(folder)
    trained = {name for name, agent in variant.config.agents.items() if agent.train != "none"}
    measured = {row["agent"] for row in run.results if row["method"] == variant.method}
    return run.steps_done >= variant.config.steps and trained <= measured


def _changes(config: Config) -> Iterator[tuple[str, Config]]:
    calibrate = "reward" if config.credit.calibrate == "none" else config.credit.calibrate
    credit = replace(config.credit, calibrate=calibrate)
    ilr = replace(config, protocol="idea3", interaction="dynamic", credit=credit)
    yield "ilr", ilr
    yield "ilr_di", replace(ilr, credit=replace(credit, calibrate="none"))
    yield "ilr_pc", replace(ilr, interaction="none")
    for ratio in RATIOS:
        yield f"ilr_ratio_{ratio:g}", replace(ilr, interaction="ratio", cooperation_ratio=ratio)
    for name, agent in config.agents.items():
        if agent.train != "none":
            yield f"grpo-{name}", _alone(ilr, name)


def _alone(config: Config, name: str) -> Config:
    """Plain GRPO of one agent with as many sampled turns as it takes part in under `config`."""
    turns = len(load_protocol(config.protocol, config).stages)
    return replace(
        config,
        protocol="single",
        interaction="none",
        agents={name: config.agents[name]},
        rollout=replace(config.rollout, samples=config.rollout.samples * turns),
        credit=replace(config.credit, calibrate="none"),
        evaluate=replace(config.evaluate, modes=["single"]),
    )


def _check_folder(variant: Variant) -> None:
    """Refuses the run of another config now, not after hours of training the variants before it."""
    file = Path(variant.config.run) / "config.yaml"
    if file.is_file() and fingerprint(load_config(file)) != fingerprint(variant.config):
        raise UserError("the ablation of another config stands there", str(file.parent),
                        "give another folder with run=…, or the keys as they were to go on in it")
