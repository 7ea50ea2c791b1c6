"""Which families share their weights with vLLM, parameter by parameter, and that log-probs agree there.

Run by `make test-vllm`; the table in docs/engines.md has its lines from here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine_embedded import END, log_probs, prompts_of, run, tiny_tokenizer
from torch import nn
from vllm_models import FAMILIES, small_model

from ilr_fast.errors import UserError
from ilr_fast.types import Sampling
from ilr_fast.weights import CannotShare, check_shared, connect, share

with_vllm = pytest.mark.vllm
REFUSED = {("gemma2", False): "refused: vLLM's Gemma 2 ties its head"}  # as all that were published do


class Fused(nn.Module):
    """What the engine has of one layer: q, k and v in one matrix, and an embedding with rows to spare."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(4, 10)
        self.qkv_proj.output_sizes = [6, 2, 2]
        self.embed = nn.Embedding(8, 4)
        self.embed.org_vocab_size = 5

    def load_weights(self, weights: Any) -> set[str]:
        rows = {"q_proj": slice(0, 6), "k_proj": slice(6, 8), "v_proj": slice(8, 10)}
        for name, tensor in weights:
            module, kind = name.split(".")
            if module == "embed":
                self.embed.weight[:5] = tensor
            else:
                getattr(self.qkv_proj, kind)[rows[module]] = tensor
        return {name for name, _ in self.named_parameters()}


class Plain(nn.Module):
    """The trainer's side of `Fused`."""

    def __init__(self, v: int = 2, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(4, 6), nn.Linear(4, 2), nn.Linear(4, v)
        self.embed = nn.Embedding(5, 4)
        self.to(dtype)


def test_parameters_become_views_and_keep_their_values_and_identity() -> None:
    model, engine = Plain(), Fused()
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    share(model, engine, "agents.ada")
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
    with torch.no_grad():
        model.k_proj.weight.fill_(7)
        model.embed.weight[4] = 3
    assert (engine.qkv_proj.weight == 7).sum() == 8 and (engine.qkv_proj.weight[6:8] == 7).all()
    assert (engine.embed.weight[4] == 3).all()


def test_what_can_not_be_shared_is_named_and_leaves_the_trainer_alone() -> None:
    wrong = Fused()
    wrong.packed_modules_mapping = {"qkv_proj": ["q_proj", "v_proj", "k_proj"]}
    more, less = Plain(), Plain()
    more.extra = nn.Linear(2, 2)
    del less.v_proj
    cases = [
        (Plain(v=3), Fused(), "v_proj.weight is"),
        (Plain(dtype=torch.float16), Fused(), "float16"),
        (Plain(), wrong, "k_proj.weight has other values"),
        (more, Fused(), "extra.weight has no counterpart"),
        (less, Fused(), "does not hold all of qkv_proj.weight"),
    ]
    for model, engine, message in cases:
        addresses = [p.data_ptr() for p in model.parameters()]
        with pytest.raises(UserError, match=message) as caught:
            share(model, engine, "agents.ada")
        assert "agents.ada.engine.weights" in str(caught.value) and "copy" in str(caught.value)
        assert [p.data_ptr() for p in model.parameters()] == addresses


def test_a_copy_stands_in_only_where_the_config_allows_it() -> None:
    """`auto` copies what can't be shared, `share` never copies, `copy` never shares; an update reaches a copy."""
    other = Plain(dtype=torch.float16)
    with pytest.raises(UserError, match=r"agents\.ada\.engine\.weights: .*q_proj\.weight is .*float16"):
        connect(other, Fused(), "share", torch.device("cpu"), "agents.ada")
    for model, how, copies in ((other, "auto", True), (Plain(), "auto", False), (Plain(), "copy", True)):
        engine = Fused()
        copy = connect(model, engine, how, torch.device("cpu"), "agents.ada")
        assert (copy is not None) == copies
        assert torch.equal(engine.qkv_proj.weight[6:8], model.k_proj.weight.float())
        with torch.no_grad():
            model.k_proj.weight.fill_(7)
        assert bool((engine.qkv_proj.weight[6:8] == 7).all()) != copies
        if copy is not None:
            assert copy() == sum(p.nbytes for p in model.parameters())
        assert (engine.qkv_proj.weight[6:8] == 7).all()


@pytest.mark.parametrize("whose", ["trainer", "engine"])
def test_a_parameter_that_moves_after_a_check_is_found_by_the_next(whose: str) -> None:
    model, engine = Plain(), Fused()
    connect(model, engine, "share", torch.device("cpu"), "agents.ada")
    check_shared(model, engine, "agents.ada")
    moved = model.k_proj.weight if whose == "trainer" else engine.qkv_proj.weight
    moved.data = moved.data.clone()
    for _ in range(2):
        with pytest.raises(CannotShare, match=r"_proj\.weight has moved away"):
            check_shared(model, engine, "agents.ada")


def test_the_table_in_the_docs_has_these_families() -> None:
    page = (Path(__file__).parents[1] / "docs/engines.md").read_text(encoding="utf-8")
    for family, (_, _, row) in FAMILIES.items():
        tied, untied = (REFUSED.get((family, tied), "shares") for tied in (True, False))
        assert f"| {row} | {tied} | {untied} | written in place |\n" in page


@with_vllm
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_share(family: str, tied: bool) -> None:
    pytest.importorskip("vllm")
    from ilr_fast.engines.vllm import VllmEngine
    from ilr_fast.engines.vllm_core import CoreOptions

    model = small_model(family, tied=tied)
    options = CoreOptions(slots=4, cache_gib=0.05)
    if (family, tied) in REFUSED:
        with pytest.raises(UserError, match=r"lm_head\.weight has no counterpart"):
            VllmEngine(model, tiny_tokenizer(), options=options)
        return
    engine = VllmEngine(model, tiny_tokenizer(), options=options, stop_tokens=[END], weights="share")
    prompts = prompts_of([70, 3, 90])

    def difference() -> float:  # the largest over all sampled tokens
        results = run(engine, prompts, [Sampling(12, seed=n) for n in range(3)])
        assert [r.error for r in results] == [None] * 3
        with torch.no_grad():
            pairs = [(log_probs(model, p, r.tokens, 1.0), r.logps) for p, r in zip(prompts, results, strict=True)]
        return max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))

    assert difference() <= 1e-4
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    engine.weights_changed()
    assert difference() <= 1e-4
