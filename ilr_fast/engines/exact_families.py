"""The architectures for which an exact engine (`engine.exact`) is known, told apart from a model's config alone."""

from __future__ import annotations

from ilr_fast.errors import UserError

FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def check_family(architecture: str, where: str) -> None:
    """UserError where `architecture`, transformers' class, has no exact forward pass; `where`: the agent's path."""
    if architecture not in FAMILIES:
        known = ", ".join(name.removesuffix("ForCausalLM") for name in FAMILIES)
        what = f"no exact forward pass for {architecture}"
        raise UserError(what, f"{where}.engine.exact", f"it is there for {known}")
