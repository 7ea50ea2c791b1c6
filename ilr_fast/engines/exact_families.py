"""The architectures for which an exact engine (`engine.exact`) is known, told apart from a model's config alone."""

from __future__ import annotations

from ilr_fast.errors import UserError

FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def check_family(architecture: str, where: str) -> None:
    """UserError where `architecture`, a class of transformers, has no exact forward pass; `where` is the agent's path."""
    if architecture not in FAMILIES:
        known = ", ".join(name.removesuffix("ForCausalLM") for name in FAMILIES)
        raise UserError(f"no exact forward pass for {architecture}", f"{where}.engine.exact", f"it is there for {known}")
