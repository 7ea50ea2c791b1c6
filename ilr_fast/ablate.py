"""`ilr-fast ablate CONFIG`: what each part of ILR contributes, from one config (ILR.md, section 5).

| method | differs from the config in |
|---|---|
| `base`, `base_few_shot` | nothing is trained; measured by the first run of each seed |
| `ilr` | Idea3, dynamic interaction, calibrated |
| `ilr_di` | dynamic interaction alone: not calibrated |
| `ilr_pc` | calibration alone: the neutral instruction |
| `ilr_neither` | Idea3 alone: not calibrated, the neutral instruction |
| `ilr_ratio_R` | a fixed share R of cooperation (0 to 1), drawn by seed |
| `grpo` | each trained agent alone in a run of its own, with as many sampled turns: G × those of a dialogue *(ours)* |
| `grpo_third` | `grpo` with G samples a question, a third of them: how many does it take? *(ours)* |
| `cal_…` | what calibration does, by form of the reward and normalization; `calibration` names all eight |
| `grpo_peer` | each trained agent in a run of its own; its frozen peers' solutions are shown, not rewarded *(ours)* |

`grpo_peer` is Idea3 with the neutral instruction, not calibrated, `stage_reward: own`. `cal_binary`, `cal_graded` and
`cal_dr_grpo` (binary, not divided by std) are not calibrated; with `_reward` or `_advantage` they are, by that name of
`credit.calibrate` (docs/calibration.md).

An agent samples as many turns under the same limits in each, and the table states the tokens that came of it. Each
variant stands in its own folder below `<run>-ablation`; what is finished is skipped and what was cut off goes on when
the command is given again. The report over all is written beside them, with `ablation.json` and `ablation.png`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from ilr_fast.ablate_jobs import run_side_by_side
from ilr_fast.ablate_summary import summarise
from ilr_fast.config import Config
from ilr_fast.config_check import check
from ilr_fast.config_parse import load_config
from ilr_fast.errors import RunError, UserError, nearest
from ilr_fast.evaluate import method_of
from ilr_fast.protocols import load_protocol
from ilr_fast.report import report
from ilr_fast.report.runs import read_run
from ilr_fast.runfolder import fingerprint, holds_work

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
RATIO = "ilr_ratio_"
METHODS = ("ilr", "ilr_di", "ilr_pc", *(f"{RATIO}{ratio:g}" for ratio in RATIOS), "grpo", "grpo_peer")
CALIBRATION = ("cal_binary", "cal_binary_reward", "cal_binary_advantage", "cal_graded", "cal_graded_reward",
               "cal_graded_advantage", "cal_dr_grpo", "cal_dr_grpo_reward")
KNOWN = (*METHODS, "ilr_neither", "grpo_third", *CALIBRATION)
GRADED = 0.1  # reward for the form, where the config gives none
Train = Callable[..., Path]  # train(config, *, command) -> run folder


@dataclass(frozen=True, slots=True)
class Variant:
    """One run of the ablation; `name` is its folder's, without the seed."""

    name: str
    config: Config

    @property
    def method(self) -> str:
        """What its results are called."""
        return method_of(self.config)


def ablate(
    config: Config,
    train: Train,
    *,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = (),
    jobs: int = 1,
    command: str = "ilr-fast ablate",
    console: Console | None = None,
) -> Path:
    """Trains every variant that is not finished and returns the path of the report over all.

    Args:
        train: `train(config, command=…)` makes or goes on with one run; used where `jobs` is 1.
        methods: which of the module's table, or `ilr_ratio_R` for another R; `base` comes with each.
        seeds: a run of every variant for each; none: the config's own.
        jobs: so many variants train at a time, each in a process of its own.
    Raises UserError for a config with a single agent, an unknown method, and a folder that holds another config's
    ablation, before anything is trained; RunError where variants failed, after the others are done.
    """
    console = console or Console()
    todo = variants(config, methods, seeds)
    for variant in todo:
        check(variant.config, f"ablation {variant.config.run}")
        _check_folder(variant)
    left = []
    for number, variant in enumerate(todo, 1):
        done = is_finished(variant)
        if done or jobs == 1:
            said = f"ablation {number} of {len(todo)}: {Path(variant.config.run).name}"
            console.print(said + (", finished before" if done else ""), highlight=False, markup=False)
        if not done and jobs == 1:
            train(variant.config, command=command)
        elif not done:
            left.append(variant.config)
    failed = run_side_by_side(left, jobs, folder_of(config), console) if left else []
    summarise(folder_of(config), command=command, console=console)
    if failed:
        raise RunError(f"{folder_of(config)}: {len(failed)} of {len(todo)} variants failed: {', '.join(failed)}\n"
                       "  → read logs/NAME.log there, and give the command again: it goes on with what is not finished")
    return report([Path(v.config.run) for v in todo], out=folder_of(config) / "report.html", console=console)


def variants(config: Config, methods: Sequence[str] = METHODS, seeds: Sequence[int] = ()) -> list[Variant]:
    """The runs of an ablation, seed by seed, the methods in the order given. UserError for what can't be run.

    The base models are measured by the first run of each seed alone: they are the same for all.
    """
    if len(config.agents) < 2:
        raise UserError("an ablation of learning from one another with a single agent", "agents",
                        "add an agent, or use `ilr-fast train` with `protocol: single`")
    sets = {"base": (), "calibration": CALIBRATION}
    methods = [one for method in methods for one in sets.get(method, (method,))]
    for given, option in ((methods, "--methods"), (seeds, "--seeds")):
        if len(set(given)) < len(given):
            raise UserError(f"one stands twice in {', '.join(map(str, given))}", option, "name each once")
    made = []
    for seed in seeds or (config.seed,):
        seeded = replace(config, seed=seed)
        measured: set[str] = set()
        for method in methods:
            for name, changed in _variant(seeded, method):
                new = set(changed.agents) - measured  # the models are the same in all: measured once
                measured |= new
                few_shot = changed.evaluate.few_shot if new else []
                evaluation = replace(changed.evaluate, base=bool(new), few_shot=few_shot)
                folder = folder_of(config) / (f"{name}-seed{seed}" if seeds else name)
                made.append(Variant(name, replace(changed, run=str(folder), evaluate=evaluation)))
    if not made:
        raise UserError("no method is named", "--methods", f"name one of {', '.join(KNOWN)}")
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


def _variant(config: Config, method: str) -> Iterator[tuple[str, Config]]:
    """The runs of one method: (folder's name, config)."""
    calibrate = "reward" if config.credit.calibrate == "none" else config.credit.calibrate
    credit = replace(config.credit, calibrate=calibrate)
    ilr = replace(config, protocol="idea3", interaction="dynamic", credit=credit)
    alone = replace(credit, calibrate="none")
    if method == "ilr":
        yield method, ilr
    elif method == "ilr_di":
        yield method, replace(ilr, credit=alone)
    elif method == "ilr_pc":
        yield method, replace(ilr, interaction="none")
    elif method == "ilr_neither":
        yield method, replace(ilr, interaction="none", credit=alone)
    elif method.startswith(RATIO):
        yield method, replace(ilr, interaction="ratio", cooperation_ratio=_ratio(method))
    elif method in CALIBRATION:
        yield method, replace(_calibrated(ilr, method.removeprefix("cal_")), method=method)
    elif method in ALONE:
        for name, agent in config.agents.items():
            if agent.train != "none":
                yield f"{method}-{name}", ALONE[method](ilr, name)
    else:
        raise UserError(f"no method is called {method!r}", "--methods", nearest(method, KNOWN))


def _ratio(method: str) -> float:
    text = method.removeprefix(RATIO)
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise UserError(f"{text!r} is no share of cooperation", f"--methods {method}", "use 0 to 1")
    return ratio


def _calibrated(config: Config, name: str) -> Config:
    """`binary`, `graded` or `dr_grpo`, then how it is calibrated; without that part it is not."""
    kind = next(kind for kind in ("binary", "graded", "dr_grpo") if name.startswith(kind))
    weight = (config.reward.format_weight or GRADED) if kind == "graded" else 0.0
    calibrate = name.removeprefix(kind).removeprefix("_") or "none"
    advantage = "dr_grpo" if kind == "dr_grpo" else "grpo"
    credit = replace(config.credit, calibrate=calibrate, advantage=advantage)  # type: ignore[arg-type]
    return replace(config, reward=replace(config.reward, format_weight=weight), credit=credit)


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


def _a_third(config: Config, name: str) -> Config:
    """Plain GRPO of one agent with as many samples as there are dialogues."""
    return replace(_alone(config, name), rollout=config.rollout, method="grpo_third")


def _before_frozen_peers(config: Config, name: str) -> Config:
    """One agent learns from its own rewards alone while its peers, as they are, show their solutions."""
    agents = {other: agent if other == name else replace(agent, train="none") for other, agent in config.agents.items()}
    return replace(
        config,
        interaction="none",
        agents=agents,
        reward=replace(config.reward, stage_reward="own"),
        credit=replace(config.credit, calibrate="none"),
    )


# One agent learns, in a run of its own.
ALONE = {"grpo": _alone, "grpo_third": _a_third, "grpo_peer": _before_frozen_peers}


def _check_folder(variant: Variant) -> None:
    """Refuses the run of another config now, not after hours of training the variants before it."""
    file = Path(variant.config.run) / "config.yaml"
    if file.is_file() and holds_work(file.parent) and fingerprint(load_config(file)) != fingerprint(variant.config):
        raise UserError("the ablation of another config stands there", str(file.parent),
                        "give another folder with run=…, or the keys as they were to go on in it")
