"""The forward pass by the layers of vLLM's model: the trainer's own, up to rounding, and its gradients.

That the two are equal bit for bit is vLLM's kernels' on a GPU (`ilr-fast bench exactness`); here, on the CPU build, are
the order of the layers, the pages of the attention and the gradients. Run by `make test-vllm`.
"""

from __future__ import annotations

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
from test_engine_vllm import engine_for
from torch import Tensor
from vllm_models import small_model

from ilr_fast.attention import LMHead, pack_sequences, packed_forward, prepare
from ilr_fast.engines import vllm_logps
from ilr_fast.engines.exact import ExactForward, Pages
from ilr_fast.errors import UserError

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


def attention_in_pages(attn: Any, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, pages: Pages) -> Tensor:
    """What a kernel reads: each sequence's pages by the table, of which the first `length` rows count."""
    outputs = []
    keys, values = pages.laid_out(k_TKD), pages.laid_out(v_TKD)
    for s, length in enumerate(pages.lengths_S.tolist()):
        k, v = (x[pages.table_SP[s].long()].flatten(0, 1)[:length].transpose(0, 1) for x in (keys, values))
        q = q_THD[pages.starts_S1[s] : pages.starts_S1[s + 1]].transpose(0, 1)
        scale = attn.impl.scale
        outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True))
    return torch.cat([x.transpose(0, 1) for x in outputs])


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama3", {}), ("qwen2", {"tied": True}), ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2})],
)
def test_hidden_states_and_gradients_are_the_trainers(family: str, options: dict[str, Any]) -> None:
    model = small_model(family, **options)
    prepare(model)
    engine = engine_for(model)
    draw = torch.Generator().manual_seed(1)
    sequences = [torch.randint(61, (n,), generator=draw).tolist() for n in (1, 16, 40, 17)]
    packed = pack_sequences(sequences, share_prefixes=False)
    upstream = torch.randn(len(packed.tokens_T), 64, generator=draw)
    found = []
    for forward in (packed_forward, ExactForward(model, engine._core.model, "here", attention_in_pages)):
        model.zero_grad()
        hidden = forward(model, packed.tokens_T, packed.positions_T, packed.plan)
        hidden.backward(upstream)
        found.append([hidden.detach(), *(p.grad for p in model.model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)
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
    command = [sys.executable, "-m", "ilr_benchmarks.exactness", str(tmp_path / "rows.json"), "1", "1"]
    subprocess.run(command, check=True)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["logp_diff_max"] for row in rows if row["error"] is not None] == [0, 0]
    assert [row["logp_diff_max"] > 0 for row in rows if "changed" in row["variant"]] == [True]


def test_what_is_not_known_to_be_exact_is_refused() -> None:
    with pytest.raises(UserError, match=r"no exact engine on the CPU.*\n?.*compute capability 9"):
        engine_for(small_model("llama"), exact=True)


def test_other_families_are_refused() -> None:
    model = small_model("gemma3")
    with pytest.raises(UserError, match=r"no exact forward pass for Gemma3ForCausalLM"):
        ExactForward(model, engine_for(model)._core.model, "agents.ada")
