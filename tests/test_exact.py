"""The trainer's forward pass by what an exact engine computes with: right up to rounding, and its gradients.

That the two are equal bit for bit is a matter of kernels on a GPU (`ilr-fast bench exactness`); here, on the CPU build,
are the modules of vLLM that are replaced, RoPE's table, the pages of the attention and the gradients. Run by
`make test-vllm`.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ragged_softmax import RaggedSoftmax
from torch import Tensor
from vllm_engines import engine_for
from vllm_models import small_model

from ilr_fast.attention import LMHead, pack_sequences, packed_forward, prepare
from ilr_fast.engines import vllm_exact, vllm_logps
from ilr_fast.engines.exact import exact_kernel
from ilr_fast.engines.vllm_attention import InPages, Pages
from ilr_fast.engines.vllm_exact import make_exact
from ilr_fast.errors import UserError
from ilr_fast.flash_attention import TorchFlash
from ilr_fast.fused_layers import fuse
from ilr_fast.segments import Segments
from ilr_fast.types import Sampling

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
FAMILIES = [("llama3", {}), ("qwen2", {"tied": True}), ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2})]


def attention_in_pages(
    q_THD: Tensor, k_pages: Tensor, v_pages: Tensor, pages: Pages, segments: Segments, scale: float
) -> Tensor:
    """What a kernel reads: each run's pages by the table, of which the first `length` rows count."""
    outputs = []
    for r, length in enumerate(pages.lengths_R.tolist()):
        k, v = (x[pages.table_RP[r].long()].flatten(0, 1)[:length].transpose(0, 1) for x in (k_pages, v_pages))
        q = q_THD[segments.starts_q[r] : segments.starts_q[r + 1]].transpose(0, 1)
        seen = torch.ones(q.shape[1], length, dtype=torch.bool).tril(length - q.shape[1])
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True))
    return torch.cat([x.transpose(0, 1) for x in outputs])


@pytest.fixture
def flash_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's kernel, and what stands for vLLM's."""
    monkeypatch.setattr(TorchFlash, "forward", RaggedSoftmax.forward)
    monkeypatch.setattr(TorchFlash, "backward", RaggedSoftmax.backward)
    monkeypatch.setattr("ilr_fast.engines.exact.kernel_of", lambda backend, exact: InPages(attention_in_pages))


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_hidden_states_and_gradients_are_the_trainers(
    family: str, options: dict[str, Any], flash_written_out: None
) -> None:
    model = small_model(family, **options)
    prepare(model)
    engine = engine_for(model)
    draw = torch.Generator().manual_seed(1)
    stem = torch.randint(61, (21,), generator=draw).tolist()
    sequences = [torch.randint(61, (n,), generator=draw).tolist() for n in (1, 16, 40)]
    sequences += [[*stem, *torch.randint(61, (n,), generator=draw).tolist()] for n in (17, 3)]
    packed = pack_sequences(sequences)
    assert packed.plan.shares_prefixes
    upstream = torch.randn(len(packed.tokens_T), 64, generator=draw)
    found = []
    for exact in (False, True):
        if exact:
            fuse(model, kernel=exact_kernel(model, engine._core.model, "here"))
        model.zero_grad()
        hidden = packed_forward(model, packed.tokens_T, packed.positions_T, packed.plan)
        hidden.backward(upstream)
        found.append([hidden.detach(), *(p.grad for p in model.model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)
    engine.close()


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_an_engine_with_the_trainers_modules_samples_from_the_same(
    family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(family, **options)
    engine = engine_for(model)
    found = []
    for modules in ("vLLM's", "the trainer's", "wrong"):
        if modules == "wrong":
            monkeypatch.setattr(vllm_exact, "gated", lambda gate, up, activation: up)
        elif modules != "vLLM's":
            make_exact(engine._core.model)
            replaced = {m._forward_method.func.__name__ for m in engine._core.model.modules()
                        if hasattr(getattr(m, "_forward_method", None), "func")}  # fmt: skip
            assert replaced == {"_norm", "_gated", "_rotary"}
        engine.weights_changed()
        found.append(asyncio.run(engine.generate(list(range(2, 40)), Sampling(12, temperature=0.0, seed=1))))
    assert found[0].tokens == found[1].tokens
    np.testing.assert_allclose(found[0].logps, found[1].logps, atol=1e-4)
    assert abs(np.array(found[2].logps) - found[0].logps).max() > 0.01
    engine.close()


def test_the_engines_log_probs_are_linear_logprobs(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.outputs import LogprobsTensors

    draw = torch.Generator().manual_seed(1)
    hidden_ND, weight_VD = torch.randn(5, 16, generator=draw), torch.randn(33, 16, generator=draw)
    tokens_N, temperatures_N = torch.tensor([3, 32, 0, 7, 7]), np.array([0.7, 1, 0, 0.7, 0], dtype=np.float32)
    logits = vllm_logps._Float32Logits(33)
    logits.hidden_ND = hidden_ND
    monkeypatch.setattr(vllm_logps, "processors", lambda _: [SimpleNamespace(_get_logits=logits)])

    class Sampler:
        sampling_states = SimpleNamespace(temperature=SimpleNamespace(np=temperatures_N[[4, 3, 2, 1, 0]]))

        def __call__(self, logits_NV: Tensor, batch: Any) -> Any:
            given = LogprobsTensors(tokens_N[:, None], torch.zeros(5, 1), torch.zeros(5))
            return SimpleNamespace(sampled_token_ids=tokens_N[:, None], logprobs_tensors=given)

    runner = SimpleNamespace(sampler=Sampler())
    vllm_logps.TrainersLogps(runner, torch.nn.Identity(), LMHead(weight_VD, None, 2.0, 1.0))
    assert runner.sampler.sampling_states is Sampler.sampling_states
    output = runner.sampler(torch.zeros(5, 33), SimpleNamespace(idx_mapping_np=np.array([4, 3, 2, 1, 0])))
    x_NV = 2 * torch.tanh(hidden_ND @ weight_VD.t() / 2) / torch.tensor([0.7, 1, 1, 0.7, 1])[:, None]
    wanted = x_NV.log_softmax(-1).gather(1, tokens_N[:, None])
    torch.testing.assert_close(output.logprobs_tensors.logprobs, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of compute capability 9.0")
def test_no_token_differs_and_a_changed_parameter_is_seen(tmp_path: Path) -> None:
    rows = [r for part in ("exact", "families") for r in rows_of(part, tmp_path / f"{part}.json")]
    assert {r["variant"]: r["error"] for r in rows if r["error"]} == {}
    assert sum(r["error"] == 0 for r in rows) == 2 + 3 * 4
    assert [r["logp_diff_max"] > 0 for r in rows if "changed" in r["variant"]] == [True]


def rows_of(part: str, file: Path) -> list[dict[str, Any]]:
    """Of the benchmark's exact processes."""
    subprocess.run([sys.executable, "-m", "ilr_benchmarks.exactness", part, str(file), "1", "1"], check=True)
    return json.loads(file.read_text())


def test_what_is_not_known_to_be_exact_is_refused() -> None:
    with pytest.raises(UserError, match=r"no exact engine on the CPU.*\n?.*compute capability 9"):
        engine_for(small_model("llama"), exact=True)


def test_other_families_are_refused() -> None:
    model = small_model("gemma3")
    with pytest.raises(UserError, match=r"no exact forward pass for Gemma3ForCausalLM"):
        exact_kernel(model, engine_for(model)._core.model, "agents.ada")
