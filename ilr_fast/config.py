"""The config tree: every key, its default, its meaning and its bounds; an agent's are in config_agent.py.

`docs/config.md` is generated from it. A YAML file lists only what differs from the defaults. Parsing and its errors are
in config_parse.py, contradictions between keys in config_check.py; both come before anything is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ilr_fast.config_agent import AgentConfig, EngineConfig, LoraConfig, OptimizerConfig
from ilr_fast.config_key import key

__all__ = [
    "AbilityConfig", "AgentConfig", "CheckpointConfig", "Config", "CreditConfig", "DataConfig", "DifficultyConfig",
    "EngineConfig", "EvaluateConfig", "LogConfig", "LoraConfig", "LossConfig", "OptimizerConfig", "PromptConfig",
    "RewardConfig", "RolloutConfig", "calibration_is_noop", "turn_limit",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where questions come from. A source is a JSONL path, a Hub name, or `task:NAME` (see docs/extending.md)."""

    train: str = key("", "Training questions.")
    validation: str = key("", "Validation questions: ability, best checkpoint.")
    test: str = key("", "Held-out questions.")
    task_options: dict[str, Any] = key({}, "Arguments of a generated task (`task:` sources).")
    train_size: int | None = key(None, "At most so many training questions (a task: exactly).", low=1)
    validation_size: int | None = key(
        None, "At most so many validation questions (a task, a shared source: exactly).", low=1
    )
    test_size: int | None = key(None, "At most so many held-out questions (a task, a shared source: exactly).", low=1)
    question_key: str = key("question", "The column that holds the question.")
    answer_key: str = key("answer", "The column that holds the answer.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptConfig:
    """What agents are told. The texts stand in one file of templates."""

    file: str = key("default", "The prompts: built in (`default`, `short`, `steps`, `worked`) or a YAML file.")
    examples: int = key(0, "Worked examples shown before the question, from the training questions.", low=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """How dialogues are sampled."""

    questions: int = key(32, "Questions of one step.", low=1)
    samples: int = key(8, "G: dialogues for each question.", low=1)
    temperature: float = key(1.0, "Sampling temperature; the log-probs are of the same distribution.", low=0.01)
    top_p: float = key(1.0, "Must be 1 while training: the log-probs would be another distribution's.", low=0, high=1)
    top_k: int = key(0, "Must be 0 (off) while training.", low=0)
    max_tokens: dict[str, int] = key({"default": 512}, "Most sampled tokens of a turn by stage; `default`: the rest.")
    stop: list[str] = key([], "Texts that end a turn, beside the template's own end of turn.")
    peer_tokens: int = key(512, "Of a peer's text the last so many tokens are kept.", low=1)
    show_peer_analyses: bool = key(False, "Show the peers' analyses before the fusion too.")
    refill: int = key(
        0, "Fresh questions of a step, at most, for those whose groups have no gradient (dynamic sampling).", low=0
    )
    stop_after_equal: int | None = key(
        None, "Cut a question off when its first so many samples have equal rewards, a guess; null: never.", low=2
    )
    rounds: int = key(2, "Rounds of a debate, the first answer included.", low=1)
    ahead: bool = key(
        False, "The next step's dialogues are sampled while agents learn, one update off-policy (docs/training.md)."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AbilityConfig:
    """γ: each agent's accuracy alone on the validation set, on the IRT scale."""

    questions: int = key(1000, "Validation questions used (all where there are fewer).", low=1)
    refresh_every: int | None = key(None, "Measure again every so many steps; null: once, as in the paper.", low=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DifficultyConfig:
    """D: how hard each agent finds each question."""

    estimator: Literal["self_ranking", "pass_rate", "level"] = key("self_ranking", "How difficulty is estimated.")
    window: int = key(5, "W: questions ranked together.", low=2)
    repeats: int = key(3, "R: windows in which each question appears.", low=1)
    samples: int = key(4, "Rollouts alone of each agent, for `pass_rate`.", low=1)
    levels: int = key(5, "Levels of the data set, for `level`.", low=1)
    max_tokens: int = key(256, "Most tokens of a ranking.", low=4)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """What an answer is worth. Evaluation counts right answers only."""

    name: str = key("math", "`math`, `number`, `steps`, `choice`, `code`, `task`, or `module:Class` of your own.")
    format_weight: float = key(0.1, "Reward for an answer in the asked form; 0: rewards of two values.", low=0)
    stage_reward: Literal["own", "each", "final"] = key(
        "own",
        "own: sharing gets its own answer's reward, later stages the fused one's; each: every turn its own answer's; "
        "final: all get the fused one's.",
    )
    overlong_buffer: int = key(0, "Tokens before a turn's limit over which the reward falls by up to 1; 0: off.", low=0)
    time_limit: float = key(5.0, "Seconds a verifier may take for one answer.", low=0.1)
    workers: int = key(1, "Verifier processes.", low=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditConfig:
    """Perception Calibration and the advantage."""

    calibrate: Literal["reward", "advantage", "none"] = key("reward", "Where the peers' rewards enter.")
    calibrate_weight: float = key(1.0, "λ of `calibrate: advantage`.", low=0)
    advantage: Literal["grpo", "dr_grpo", "rloo"] = key(
        "grpo", "Normalization within a group; dr_grpo: no division by std."
    )
    eps: float = key(1e-4, "Added to the standard deviation.", low=0)
    count_dropped: bool = key(True, "What is dropped still counts in the denominators; false: DAPO's convention.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """The GRPO loss and its variants; the formulas are in docs/method.md."""

    ratio: Literal["token", "sequence"] = key("token", "Importance ratio by token, or by turn (GSPO).")
    objective: Literal["ppo", "cispo"] = key("ppo", "Clipped surrogate, or CISPO.")
    clip_low: float = key(0.2, "Lower clip: the ratio's lower bound is 1 − clip_low.", low=0, high=1)
    clip_high: float = key(0.2, "Upper clip: the ratio's upper bound is 1 + clip_high.", low=0)
    dual_clip: float | None = key(None, "Bound on the ratio for negative advantages (> 1); null: off.", low=1)
    aggregation: Literal["grpo", "dapo", "dr_grpo"] = key(
        "grpo", "Over the whole step: mean of the turns' means, mean of all tokens, or divided by a constant."
    )
    kl: Literal["k1", "k2", "k3"] = key("k2", "KL estimator against the reference; k1 acts in the reward only.")
    beta: float = key(0.0, "Weight of the KL; 0: no reference is held or run.", low=0)
    entropy_coef: float = key(0.0, "Weight of the entropy bonus.")
    importance: Literal["none", "token", "sequence"] = key(
        "none", "Weights of the trainer's policy against the engine's sampling distribution."
    )
    importance_mode: Literal["truncate", "mask"] = key("truncate", "What happens to weights above the cap.")
    importance_cap: float = key(2.0, "The cap of the importance weights.", low=1)
    old_logps: Literal["trainer", "engine"] = key("trainer", "π_old with several updates a rollout: whose log-probs.")
    epochs: int = key(1, "Passes over a rollout.", low=1)
    minibatches: int = key(1, "Optimizer steps of one pass.", low=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """Each agent alone on held-out questions, before and after (and `every` so many steps on validation)."""

    every: int | None = key(None, "Steps between validations; null: only at the end.", low=1)
    few_shot: list[int] = key([], "Base models are also measured with so many worked examples in the prompt.")
    modes: list[str] = key(["single"], "How agents answer: single, debate, idea3.")
    samples: int = key(1, "Answers for each question: 1 is greedy, more are sampled.", low=1)
    temperature: float = key(0.7, "Temperature where samples > 1.", low=0.01)
    validation_limit: int = key(200, "Validation questions used for a checkpoint's score.", low=1)
    folder: str | None = key(None, "Folder of the benchmark files; null: the variable ILR_DATA, else the Hub.")
    base: bool = key(True, "Measure the models before training too.")
    benchmarks: list[str] = key(
        [], "Measured before and after too, as out-of-distribution tests: names, files, Hub names or `task:NAME`."
    )
    option_seed: int = key(0, "Shuffles the options of multiple-choice benchmarks.", low=0)
    benchmark_limit: int | None = key(None, "Only the first so many questions of each; null: all.", low=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """What is kept of a run."""

    every: int | None = key(
        10, "Steps between checkpoints, the last step included; null: only where the run is interrupted.", low=1
    )
    keep: int = key(2, "The newest so many are kept, and the best.", low=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """Where numbers go beside metrics.jsonl."""

    tensorboard: bool = key(True, "Write TensorBoard events.")
    wandb: bool = key(False, "Log to Weights & Biases (its package must be installed).")
    trackio: bool = key(False, "Log to trackio (its package must be installed).")
    logp_warning: float = key(0.5, "Warn where trainer's and engine's log-probs differ by more on average.", low=0)
    logp_warning_max: float | None = key(
        5.0, "Warn where those of one token differ by more; null: one token may.", low=0
    )
    truncated_warning: float = key(
        0.1, "Warn where a larger share of the tokens has an importance weight above the cap.", low=0, high=1
    )
    noise_every: int | None = key(
        10, "vllm: steps between measurements of what its log-probs differ by from themselves; null: none.", low=1
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A training run."""

    run: str = key("runs/default", "The run folder.")
    seed: int = key(0, "Seed of everything random.", low=0)
    steps: int = key(100, "Optimizer steps (rollouts).", low=1)
    deterministic: bool = key(False, "Admission by order alone and deterministic kernels: two runs agree bit for bit.")
    threads: int | None = key(None, "CPU threads of the arithmetic; null: torch's choice.", low=1)
    hang_limit: float | None = key(
        900, "Seconds without progress after which an agent's process counts as hung and is ended; null: never.", low=3
    )
    mps: Literal["auto", "never"] = key(
        "auto", "Agents' processes on one GPU compute at the same time, as clients of an MPS server of the run's "
        "own where it can start one (docs/hosts.md); never: they take turns."
    )
    protocol: str = key("idea3", "Who speaks when: idea3, debate, single, or `module:Class`.")
    interaction: Literal["dynamic", "cooperation", "competition", "ratio", "none"] = key(
        "dynamic", "How agents face each question; `none`: the neutral instruction."
    )
    method: str | None = key(None, "What its results are called; null: by its keys (ilr, ilr_di, grpo, …).")
    cooperation_ratio: float = key(0.5, "Share of cooperation for `interaction: ratio`, drawn by seed.", low=0, high=1)
    max_failed_share: float = key(0.2, "Past this share of failed dialogues or grades the run stops.", low=0, high=1)
    memory_check: Literal["refuse", "warn"] = key(
        "refuse", "A run that does not fit by its memory plan (docs/memory.md) is refused, or begun with a warning."
    )
    agents: dict[str, AgentConfig] = key({}, "The agents, by name.")
    data: DataConfig = key(DataConfig, "Questions.")
    prompts: PromptConfig = key(PromptConfig, "Prompts.")
    rollout: RolloutConfig = key(RolloutConfig, "Dialogues.")
    ability: AbilityConfig = key(AbilityConfig, "Ability γ.")
    difficulty: DifficultyConfig = key(DifficultyConfig, "Difficulty D.")
    reward: RewardConfig = key(RewardConfig, "Rewards.")
    credit: CreditConfig = key(CreditConfig, "Calibration and advantage.")
    loss: LossConfig = key(LossConfig, "The loss.")
    evaluate: EvaluateConfig = key(EvaluateConfig, "Evaluation.")
    checkpoint: CheckpointConfig = key(CheckpointConfig, "Checkpoints.")
    log: LogConfig = key(LogConfig, "Logs.")


def turn_limit(rollout: RolloutConfig, stage: str) -> int:
    """The most tokens that a turn of `stage` may sample."""
    return rollout.max_tokens.get(stage, rollout.max_tokens["default"])


def calibration_is_noop(config: Config) -> bool:
    """Whether calibrated rewards give plain GRPO's advantages: rewards of two values, divided by their std."""
    reward, credit = config.reward, config.credit
    graded = reward.name == "task" or ":" in reward.name  # a task's scorer may give part of a point
    penalised = reward.overlong_buffer > 0 or (config.loss.kl == "k1" and config.loss.beta > 0)
    two_valued = reward.format_weight == 0 and not graded and not penalised
    return two_valued and len(config.agents) > 1 and credit.calibrate == "reward" and credit.advantage == "grpo"
