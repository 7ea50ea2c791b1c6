"""Contradictions between keys, which no single key can tell; found before anything is loaded.

    check(config, "configs/mine.yaml")      # UserError: configs/mine.yaml: rollout.samples: a group of one …
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ilr_fast.config import AgentConfig, Config, EngineConfig, LossConfig, RolloutConfig, turn_limit
from ilr_fast.errors import UserError

PEER_PROTOCOLS = ("idea3", "debate")
Finding = tuple[bool, str, str, str]  # whether it is wrong, what, the key's path, the remedy
_FULL_DISTRIBUTION = "the log-probs trained on are those of the full distribution"


def check(config: Config, where: str) -> None:
    """Raises UserError for the first contradiction between keys; `where` names the file."""
    for wrong, what, path, remedy in _findings(config):
        if wrong:
            raise UserError(what, f"{where}: {path}", remedy)


def _findings(config: Config) -> Iterator[Finding]:
    yield not config.agents, "no agents", "agents", "name at least one, each with its `model`"
    for name, agent in config.agents.items():
        yield from _agent(name, agent, config.rollout)
    together = {a.engine.exact for a in config.agents.values() if a.engine.name == "vllm" and a.host == "local"}
    yield (
        len(together) > 1,
        "vLLM's batch-invariant mode is the whole process's",
        "agents",
        "set `engine.exact` for all agents or none, or `host: process`",
    )
    yield (
        all(agent.train == "none" for agent in config.agents.values()),
        "no agent is trained",
        "agents",
        "set `train: full` or `train: lora` for at least one",
    )
    for part in ("train", "validation", "test"):
        remedy = "give a JSONL file, a Hub name or `task:NAME`"
        yield not getattr(config.data, part), "no questions", f"data.{part}", remedy
    yield from _rollout(config.rollout)
    yield from _groups(config)
    yield from _ahead(config)
    yield from _loss(config.loss, config.rollout)
    yield from _peers(config)
    few = config.evaluate.few_shot
    yield any(k < 1 for k in few), "a few-shot prompt of no examples", "evaluate.few_shot", "use numbers of 1 or more"


def _agent(name: str, agent: AgentConfig, rollout: RolloutConfig) -> Iterator[Finding]:
    path = f"agents.{name}"
    remedy = "use letters, digits, '-', '_' and '.', a letter or digit first"
    yield not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name), f"{name!r} can't name a folder", path, remedy
    # A checkpoint keeps the folder NAME.state and files of these endings beside the agents' folders.
    yield name.endswith((".state", ".json")), f"{name!r} is a name of the checkpoint's own files", path, "rename it"
    yield not agent.model, "no model", f"{path}.model", "give a folder or a name (`ilr-fast get-model` lists some)"
    betas = (agent.optimizer.beta1, agent.optimizer.beta2)
    yield max(betas) >= 1, "AdamW's averages never move", f"{path}.optimizer", "use beta1 and beta2 below 1"
    rounding, moments = agent.optimizer.rounding, agent.optimizer.moments
    yield (
        rounding == "stochastic" and agent.dtype == "float16",
        "float16 weights can't be rounded stochastically",
        f"{path}.optimizer.rounding",
        "use bfloat16, or `rounding: copies`",
    )
    yield (
        rounding == "copies" and moments != "float32",
        "AdamW on float32 copies keeps float32 moments",
        f"{path}.optimizer.moments",
        "add `rounding: stochastic`, or leave moments at float32",
    )
    yield (
        agent.quantize != "none" and agent.train == "full",
        "weights of four bits can't be trained",
        f"{path}.quantize",
        "set `train: lora`, or remove the key",
    )
    yield (
        agent.quantize != "none" and agent.engine.name == "vllm",
        "vLLM is not given weights of four bits",
        f"{path}.engine.name",
        "use `embedded`, or remove `quantize`",
    )
    limits = [turn_limit(rollout, stage) for stage in rollout.max_tokens if "default" in rollout.max_tokens]
    context = agent.engine.max_context
    yield (
        context is not None and max(limits, default=0) >= context,
        f"a turn of {max(limits, default=0)} tokens (rollout.max_tokens) does not fit",
        f"{path}.engine.max_context",
        "raise it, or lower rollout.max_tokens",
    )
    yield from _graphs(agent, path, rollout.ahead)
    yield from _engine(agent, path)


def _graphs(agent: AgentConfig, path: str, ahead: bool) -> Iterator[Finding]:
    """CUDA graphs of the layers, where they are asked for by number."""
    if not agent.graphed_tokens:
        return
    for wrong, what in (
        (agent.train != "full", f"with `train: {agent.train}`"),
        (agent.device == "cpu", "on the CPU"),
        (agent.dtype == "float32", "in float32"),
        (agent.fused_layers == "off", "without fused layers"),
        (agent.gradient_checkpointing is True, "of layers that are computed again"),
        (agent.engine.exact, "with an exact engine"),
        (agent.engine.sleep == "turns", "of weights that leave the GPU meanwhile"),
        (ahead, "while another thread generates (rollout.ahead)"),
    ):
        yield wrong, f"no CUDA graphs of the layers {what}", f"{path}.graph_tokens", "set it to 0, or leave it at auto"


def _engine(agent: AgentConfig, path: str) -> Iterator[Finding]:
    engine, plain = agent.engine, EngineConfig()
    vllm = engine.name == "vllm"
    yield (
        vllm and agent.device.startswith("cuda:") and agent.device != "cuda:0",
        f"vLLM computes on the first device, not on {agent.device}",
        f"{path}.device",
        "use `cuda`, and CUDA_VISIBLE_DEVICES to choose the device",
    )
    own = engine.dtype != "auto" or engine.quantization != "none"
    remedy = "use `copy`, or leave engine.dtype and engine.quantization out"
    yield (
        vllm and own and engine.weights != "copy",
        "an engine of another precision has no weights of the trainer's",
        f"{path}.engine.weights",
        remedy,
    )
    yield (
        engine.quantization != "none" and agent.train == "lora",
        "adapters on an engine's 8-bit weights were not tested",
        f"{path}.engine.quantization",
        "leave it out, or use `train: full`",
    )
    if engine.exact:
        reason = "an exact engine "
        yield agent.train == "lora", reason + "with adapters", f"{path}.train", "use `train: full`"
        yield engine.weights != "share", reason + "on a copy", f"{path}.engine.weights", "use `share`"
        yield not engine.fast_start, reason + "that is compiled", f"{path}.engine.fast_start", "use true"
        yield agent.dtype not in ("auto", "bfloat16"), reason + f"in {agent.dtype}", f"{path}.dtype", "use bfloat16"
        remedy = "leave that out"
        yield agent.fused_layers == "off", reason + "without fused layers", f"{path}.fused_layers", remedy
    for key in ("weights", "dtype", "quantization", "cache_gib", "exact", "tokens_in_flight", "fast_start"):
        given = getattr(engine, key) != getattr(plain, key)
        yield not vllm and given, "a setting of vLLM's", f"{path}.engine.{key}", "set `engine.name: vllm`, or remove it"


def _rollout(rollout: RolloutConfig) -> Iterator[Finding]:
    yield rollout.top_p != 1, "top-p while training", "rollout.top_p", f"leave it at 1: {_FULL_DISTRIBUTION}"
    yield rollout.top_k != 0, "top-k while training", "rollout.top_k", f"leave it at 0: {_FULL_DISTRIBUTION}"
    group = "a group of one has advantage 0 everywhere"
    yield rollout.samples < 2, group, "rollout.samples", "use 2 or more (8 is usual)"
    limits = rollout.max_tokens
    yield any(v < 1 for v in limits.values()), "a turn of no tokens", "rollout.max_tokens", "use 1 or more"
    yield "default" not in limits, "no limit for the other stages", "rollout.max_tokens", "add `default: N`"


def _groups(config: Config) -> Iterator[Finding]:
    """Groups that are replaced or cut off because they have no gradient must have none."""
    rollout, loss = config.rollout, config.loss
    stop = rollout.stop_after_equal
    bonus = "the KL" if loss.beta else "the entropy bonus"
    for path, used in (("rollout.refill", rollout.refill > 0), ("rollout.stop_after_equal", stop is not None)):
        yield (
            used and bool(loss.beta or loss.entropy_coef),
            f"groups of equal rewards have a gradient all the same, by {bonus}",
            path,
            "leave it off, or set loss.beta and loss.entropy_coef to 0",
        )
    yield (
        stop is not None and stop >= rollout.samples,
        f"there is nothing to cut off after {stop} of {rollout.samples} samples",
        "rollout.stop_after_equal",
        f"use fewer than rollout.samples = {rollout.samples}, or null",
    )
    yield (
        stop is not None and config.credit.calibrate == "advantage" and len(config.agents) > 1,
        "groups of equal rewards have an advantage with `calibrate: advantage`, by their peers",
        "rollout.stop_after_equal",
        "use null, or another credit.calibrate",
    )


def _ahead(config: Config) -> Iterator[Finding]:
    """Dialogues beside an update: of weights that stay whole meanwhile, and weighed for being an update old."""
    path, loss = "rollout.ahead", config.loss
    if not config.rollout.ahead:
        return
    yield (
        loss.importance == "none",
        "dialogues of the weights before the last update need importance weights",
        path,
        "set `loss.importance: token`, or leave it off",
    )
    yield (
        loss.kl == "k1" and loss.beta > 0,
        "a KL in the reward is computed by the trainer, which is learning then",
        path,
        "use `loss.kl: k2`, or leave it off",
    )
    for name, agent in config.agents.items():
        engine, trained = f"agents.{name}.engine", agent.train != "none"
        yield (
            trained and agent.engine.name != "vllm",
            "the embedded engine samples with the weights that are trained: half-updated ones",
            path,
            f"leave it off, or set `{engine}.name: vllm` and `{engine}.weights: copy`",
        )
        yield (
            agent.train == "full" and agent.engine.weights != "copy",
            "an engine on the trainer's own weights would sample from half-updated ones",
            f"{engine}.weights",
            "set `copy`, or leave rollout.ahead off",
        )
        yield (
            agent.engine.sleep in ("cache", "turns"),
            "an engine that gives memory back can't generate while agents learn",
            f"{engine}.sleep",
            "set `never`, or leave rollout.ahead off",
        )


def _loss(loss: LossConfig, rollout: RolloutConfig) -> Iterator[Finding]:
    upper = 1 + loss.clip_high
    yield (
        loss.dual_clip is not None and loss.dual_clip <= upper,
        f"clip bounds crossed: dual_clip {loss.dual_clip} lies below 1 + clip_high = {upper:g}",
        "loss.dual_clip",
        f"use more than {upper:g}, or null",
    )
    yield (
        loss.objective == "cispo" and loss.dual_clip is not None,
        "dual_clip belongs to the ppo objective",
        "loss.dual_clip",
        "remove it, or use `objective: ppo`",
    )
    yield (
        loss.minibatches > rollout.questions,
        "more minibatches than questions",
        "loss.minibatches",
        f"use at most rollout.questions = {rollout.questions}",
    )


def _peers(config: Config) -> Iterator[Finding]:
    alone, protocol = len(config.agents) == 1, config.protocol
    yield alone and protocol in PEER_PROTOCOLS, f"{protocol} needs peers", "protocol", "add an agent, or use `single`"
    # `dynamic` is the default, so a single agent's config need not turn it off.
    yield (
        alone and protocol == "single" and config.interaction not in ("none", "dynamic"),
        "an interaction for a single agent that talks to nobody",
        "interaction",
        "use `interaction: none`",
    )
    for mode in config.evaluate.modes:
        known = mode in ("single", *PEER_PROTOCOLS)
        yield not known, f"unknown mode {mode!r}", "evaluate.modes", "use single, debate or idea3"
        yield alone and mode != "single", f"{mode} needs peers", "evaluate.modes", "use single, or add an agent"
