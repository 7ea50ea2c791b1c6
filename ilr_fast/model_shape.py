"""The sizes of a model's parameters from its config.json alone: nothing is loaded, nothing is downloaded but that file.

    shape = model_shape("meta-llama/Llama-3.1-8B", "agents.ada.model")
    shape.count()                   # 8030261248

transformers builds the model on torch's meta device, which allocates nothing, so that every family's biases, norms and
tied matrices are counted as they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ilr_fast.errors import UserError
from ilr_fast.models import resolve_config

# transformers' families whose decoder layers are norm → attention, + residual, norm → MLP, + residual.
BLOCKS = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight by name, as [out, in] for a linear layer and [rows, width] for an embedding."""

    name: str
    rows: int
    width: int

    @property
    def size(self) -> int:
        """Its numbers."""
        return self.rows * self.width


@dataclass(frozen=True, slots=True)
class ModelShape:
    """`architecture`: transformers' class. `sizes`: numbers of each parameter, a tied one once. `linears` are all
    linear layers but the LM head.

    `query` and `key` are the widths of all query and of all key heads of a layer; widths of layers that differ are the
    largest. `positions` is the longest context, None where the model names none.
    """

    architecture: str
    sizes: tuple[int, ...]
    linears: tuple[Matrix, ...]
    head: Matrix
    embedding: Matrix
    tied: bool
    hidden: int
    layers: int
    query: int
    key: int
    heads: int
    intermediate: int
    positions: int | None

    def count(self) -> int:
        """All parameters."""
        return sum(self.sizes)

    def cache_per_token(self) -> int:
        """Numbers that keys and values of one token are, in all layers."""
        return 2 * self.layers * self.key

    def adapted(self, targets: str) -> tuple[Matrix, ...]:
        """What peft puts adapters on: `all-linear`, or names separated by commas."""
        if targets == "all-linear":
            return self.linears
        names = tuple(t.strip() for t in targets.split(","))
        candidates = (*self.linears, self.embedding)
        return tuple(m for m in candidates if any(f".{m.name}".endswith(f".{name}") for name in names))

    def adapter_sizes(self, rank: int, targets: str) -> tuple[int, ...]:
        """Numbers of each adapter matrix: A [rank, in] and B [out, rank] of every module."""
        return tuple(size for m in self.adapted(targets) for size in (rank * m.width, rank * m.rows))


def model_shape(model: str, where: str) -> ModelShape:
    """The shape of a folder, small model or Hub name; UserError naming `where` where its config.json does not do."""
    folder = resolve_config(model, where)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        return model_shape(str(base), where)
    from transformers import AutoConfig

    try:
        return shape_of(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"its config.json can't be used ({error})", f"{where} = {model}",
                        "give a Hugging Face folder of a causal language model") from None  # fmt: skip


def shape_of(config: Any) -> ModelShape:
    """The shape of transformers' config of a causal language model."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    linears = [
        Matrix(name, *module.weight.shape)
        for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    ]  # fmt: skip
    text = config.get_text_config()
    return ModelShape(
        architecture=type(model).__name__,
        sizes=tuple(p.numel() for p in model.parameters()),
        linears=tuple(linears),
        head=Matrix(names[id(head)], *head.weight.shape),
        embedding=Matrix(names[id(embedding)], *embedding.weight.shape),
        tied=head.weight is embedding.weight,
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        query=_widest(linears, ("q_proj",)) or text.hidden_size,
        key=_widest(linears, ("k_proj",)) or text.hidden_size,
        heads=text.num_attention_heads,
        intermediate=_widest(linears, ("gate_proj", "up_proj")) or text.intermediate_size,
        positions=getattr(text, "max_position_embeddings", None),
    )


def _widest(linears: Sequence[Matrix], names: Sequence[str]) -> int:
    """Rows of the largest of the named projections of a layer, 0 where there is none."""
    return max((m.rows for m in linears if m.name.rpartition(".")[2] in names), default=0)
