"""The keys of one agent, below `agents.<name>`: its model, adapters, optimizer, engine, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ilr_fast.config_key import key


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (peft), used where `train: lora`."""

    rank: int = key(16, "Rank of the adapters.", low=1)
    alpha: float = key(32.0, "Scale of the adapters; they act with alpha / rank.", low=0)
    dropout: float = key(0.0, "Dropout on the adapters' input.", low=0, high=1)
    targets: str = key("all-linear", "peft's target_modules: `all-linear`, or module names separated by commas.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up and a schedule."""

    lr: float = key(1e-6, "Peak learning rate.", low=0)
    beta1: float = key(0.9, "Decay of the mean of gradients.", low=0, high=1)
    beta2: float = key(0.95, "Decay of the mean of squared gradients.", low=0, high=1)
    eps: float = key(1e-8, "Added to the root of the second moment.", low=0)
    weight_decay: float = key(0.0, "Decoupled weight decay.", low=0)
    warmup_steps: int = key(0, "Steps of linear warm-up.", low=0)
    schedule: Literal["constant", "cosine"] = key("constant", "What follows the warm-up.")
    min_lr_ratio: float = key(0.1, "Where the cosine ends, as a share of lr.", low=0, high=1)
    clip_norm: float | None = key(1.0, "Largest norm of the whole gradient; null: no clipping.", low=0)
    rounding: Literal["copies", "stochastic"] = key(
        "copies",
        "16-bit weights: float32 copies of them are updated, which begin spread over what rounds to them; or they "
        "themselves, rounded stochastically.",
    )
    moments: Literal["float32", "bfloat16"] = key(
        "float32", "Precision of AdamW's moments; bfloat16 with `rounding: stochastic` only."
    )
    offload: Literal["none", "host", "auto"] = key(
        "auto", "Moments and copies in the host's memory: less on the GPU; auto: where they don't fit otherwise."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The rollout engine of one agent."""

    name: Literal["embedded", "vllm"] = key(
        "embedded", "`embedded`: transformers with continuous batching; `vllm`: vLLM in this process (docs/engines.md)."
    )
    slots: int = key(64, "Requests that generate at the same time.", low=1)
    max_context: int | None = key(None, "Tokens of prompt and generation together; null: the model's own.", low=8)
    weights: Literal["share", "copy", "auto"] = key(
        "share", "vllm: the trainer's own weights, a copy after every update, or shared where that can be."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "vllm, with `weights: copy`: precision of the engine's own weights; auto: the trainer's."
    )
    quantization: Literal["none", "fp8"] = key(
        "none",
        "vllm, with `weights: copy`: 8-bit weights of its linear layers, made anew after every update; "
        "what that changes: docs/engines.md.",
    )
    cache_gib: float | None = key(
        None,
        "vllm: GiB for keys and values; null: the longest conversation in all slots, at most a quarter of the memory.",
        low=0,
    )
    tokens_in_flight: int | None = key(
        None, "vllm: tokens of prompts and generations that run at once; null: what the cache holds.", low=1
    )
    exact: bool = key(
        False, "vllm: kernels whose bits no batch changes, in both: log-probs agree bit for bit (docs/engines.md)."
    )
    fast_start: bool = key(True, "vllm: no compilation and few CUDA graphs; false: slower to start, faster after.")
    sleep: Literal["auto", "never", "cache", "turns"] = key(
        "auto",
        "What is given back meanwhile: nothing; keys and values while agents learn; all while another agent of `turns` "
        "works; auto: the first of these that fits (docs/hosts.md).",
    )

    @property
    def rests(self) -> Literal["never", "cache", "turns"]:
        """What is given back, also where nothing has filled in `auto`."""
        return "never" if self.sleep == "auto" else self.sleep


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """One LLM: its weights, tokenizer, template, precision, optimizer and engine."""

    model: str = key("", "A folder, a name that `ilr-fast get-model` knows, or a Hub name.")
    chat_template: str | None = key(None, "A Jinja file or text; null: the tokenizer's own; `plain`: Question/Answer.")
    template_rewrites: Literal["keep", "refuse"] = key(
        "keep", "A template that rewrites earlier turns: keep the tokens as sampled, or refuse the run."
    )
    device: str = key("auto", "`auto` (cuda where there is one), `cpu`, `cuda` or `cuda:1`.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "Precision of the weights; auto: float32 on the CPU, bfloat16 on a GPU."
    )
    random_weights: bool = key(
        False, "Weights drawn by the run's seed, for measuring: the model's folder needs a config.json and a tokenizer."
    )
    train: Literal["full", "lora", "none"] = key("full", "What is trained; `none`: a peer that only talks.")
    quantize: Literal["none", "nf4"] = key(
        "none", "Precision of the frozen weights under adapters; nf4: 4 bits (bitsandbytes, docs/memory.md)."
    )
    lora: LoraConfig = key(LoraConfig, "Adapters, where `train: lora`.")
    optimizer: OptimizerConfig = key(OptimizerConfig, "AdamW and its schedule.")
    engine: EngineConfig = key(EngineConfig, "The rollout engine.")
    host: Literal["local", "process"] = key(
        "local", "Where it lives: in the command's process, or in one of its own (docs/hosts.md)."
    )
    micro_batch_tokens: int | Literal["auto"] = key(
        8192, "Most packed tokens in one forward and backward pass; auto: what fits (docs/memory.md).", low=16
    )
    fused_layers: Literal["auto", "on", "off"] = key(
        "auto", "Fused norms, rotary embeddings, attention projections and MLPs; auto: where Triton runs them on a GPU."
    )
    gradient_checkpointing: bool | Literal["auto", "mlp"] = key(
        False,
        "Compute again in the backward pass, for less memory: whole layers, or the first half of MLPs (`mlp`, a fifth "
        "more work); auto: where activations don't fit.",
    )
    graph_tokens: int | Literal["auto"] = key(
        "auto",
        "Micro-batches of at most so many packed tokens pass through all layers as CUDA graphs (docs/training.md); 0: "
        "none; auto: at most 2,048 (more were not timed) of a model whose layers the host launches longer than a GPU "
        "computes, where memory allows it.",
        low=0,
        high=8192,
    )
    logits_mib: int | None = key(
        None, "MiB of logits that the loss holds at once; null: as many as are fastest, up to 2 GiB on a GPU.", low=16
    )

    @property
    def batch_tokens(self) -> int:
        """Most packed tokens of a micro-batch, also where nothing has filled in `auto`."""
        return 8192 if isinstance(self.micro_batch_tokens, str) else self.micro_batch_tokens

    @property
    def graphed_tokens(self) -> int:
        """Most packed tokens of a micro-batch that has CUDA graphs; 0 also where nothing has filled in `auto`."""
        return 0 if isinstance(self.graph_tokens, str) else self.graph_tokens
