"""Packed attention against the same sequences run one by one with transformers' own eager attention."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from ilr_fast.attention import lm_head_of, pack_sequences, packed_forward, prepare, tree_plan
from ilr_fast.errors import UserError

TINY = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=0,
    tie_word_embeddings=False,
)
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen2": (transformers.Qwen2Config, dict(use_sliding_window=True, sliding_window=6, layer_types=SLIDING)),
    "qwen3": (transformers.Qwen3Config, {}),
    "mistral": (transformers.MistralConfig, dict(sliding_window=5)),
    "gemma2": (
        transformers.Gemma2Config,
        dict(sliding_window=7, layer_types=SLIDING, attn_logit_softcapping=1.5, final_logit_softcapping=3.0),
    ),
    "gemma3": (transformers.Gemma3TextConfig, dict(sliding_window=6, layer_types=SLIDING)),
}


def tiny_model(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    kind, extra = CONFIGS[name]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(kind(**TINY, **extra), attn_implementation="eager")
    for parameter in model.parameters():  # larger than the usual initialization, so that attention matters
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def forest(seed: int = 0) -> list[list[int]]:
    """A few-shot prefix common to all, two groups, branches; a duplicate, a prefix of another, one on its own."""
    g = np.random.default_rng(seed)
    draw = lambda n: g.integers(1, 61, n).tolist()  # noqa: E731
    shared, first, second = draw(9), draw(5), draw(4)
    sequences = [shared + first + draw(n) for n in (4, 7, 1)] + [shared + second + draw(n) for n in (3, 6)]
    return [*sequences, sequences[1], sequences[4][:11], draw(13)]


@pytest.mark.parametrize("overhead", [0, 300, 10**9])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_and_gradients_equal_those_of_single_sequences(name: str, share: bool, overhead: int) -> None:
    model, sequences = tiny_model(name), forest()
    plain = copy.deepcopy(model)
    packed = pack_sequences(sequences, share_prefixes=share, block_overhead=overhead)
    hidden_TD = packed_forward(model, packed.tokens_T, packed.positions_T, packed.plan)
    torch.manual_seed(1)
    loss, expected_loss = torch.zeros(()), torch.zeros(())
    for tokens, rows in zip(sequences, packed.index_S, strict=True):
        expected = plain.model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
        torch.testing.assert_close(hidden_TD[rows], expected, rtol=2e-4, atol=2e-4)
        weights = torch.randn_like(expected)
        loss, expected_loss = loss + (hidden_TD[rows] * weights).sum(), expected_loss + (expected * weights).sum()
    loss.backward()
    expected_loss.backward()
    for (key, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            scale = theirs.grad.abs().max().item()
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * scale, msg=f"gradient of {key}")


def test_common_prefixes_stand_once_and_rows_spell_the_sequences() -> None:
    sequences = forest()
    packed = pack_sequences(sequences)
    for tokens, rows in zip(sequences, packed.index_S, strict=True):
        assert packed.tokens_T[rows].tolist() == tokens
        assert packed.positions_T[rows].tolist() == list(range(len(tokens)))
    prefixes = {tuple(tokens[: n + 1]) for tokens in sequences for n in range(len(tokens))}
    assert len(packed.tokens_T) == len(prefixes)
    assert packed.plan.shares_prefixes
    assert not pack_sequences(sequences, share_prefixes=False).plan.shares_prefixes


@pytest.mark.parametrize("overhead", [0, 100, 1000, 10**9])
def test_blocks_partition_the_row_and_hold_every_ancestor(overhead: int) -> None:
    plan = pack_sequences(forest(), block_overhead=overhead).plan
    rows = [row for block in plan.blocks for row in range(block.start, block.end)]
    assert rows == list(range(len(plan.positions_T)))
    for block in plan.blocks:
        keys = {row for start, end in block.ranges for row in range(start, end)}
        for query in range(block.start, block.end):
            assert {j for j in range(query + 1) if query < plan.subtree_end_T[j]} <= keys
    assert (len(plan.blocks) == 1) == (overhead == 10**9)


def test_a_row_laid_out_by_hand_has_the_same_plan() -> None:
    stem, branches = [1, 2, 3, 4], [[5, 6], [7], [8, 9, 10]]
    packed = pack_sequences([stem + branch for branch in branches] + [[11, 12, 13]])
    by_hand = tree_plan([(4, [2, 1, 3]), (0, [3])])
    assert (
        by_hand.subtree_end_T.tolist()
        == packed.plan.subtree_end_T.tolist()
        == [10] * 4 + [6, 6, 7] + [10] * 3 + [13] * 3
    )
    assert by_hand.positions_T.tolist() == packed.plan.positions_T.tolist()
    assert by_hand.blocks == packed.plan.blocks


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    model, packed = tiny_model("gemma3"), pack_sequences(forest())
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model.zero_grad()
        packed_forward(model, packed.tokens_T, packed.positions_T, packed.plan).square().sum().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_without_a_plan_the_model_is_an_ordinary_one() -> None:
    for name in ("gemma2", "gemma3", "llama"):
        model = tiny_model(name).eval()
        tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13], [0, 0, 0, 4, 3, 2, 7, 7, 1]])
        mask = (tokens != 0).long()
        expected = model(input_ids=tokens, attention_mask=mask).logits
        generated = model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False)
        prepare(model)
        assert model.config._attn_implementation == "ilr_packed"
        torch.testing.assert_close(
            model(input_ids=tokens, attention_mask=mask).logits[mask.bool()], expected[mask.bool()]
        )
        again = model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False)
        assert torch.equal(again, generated)


def test_a_saved_model_names_no_attention_of_ours(tmp_path: Path) -> None:
    model = tiny_model("llama")
    prepare(model)
    model.save_pretrained(tmp_path)
    assert "ilr_packed" not in (tmp_path / "config.json").read_text()


def test_peft_model_and_its_head() -> None:
    peft = pytest.importorskip("peft")
    model, packed = tiny_model("qwen3"), pack_sequences(forest())
    before = packed_forward(model, packed.tokens_T, packed.positions_T, packed.plan).detach()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    after = packed_forward(wrapped, packed.tokens_T, packed.positions_T, packed.plan)
    assert not torch.allclose(before, after)
    after.sum().backward()
    assert all(p.grad is not None for n, p in wrapped.named_parameters() if "lora_B" in n)
    assert lm_head_of(wrapped).weight is model.lm_head.weight
    with pytest.raises(UserError, match="LM head"):
        lm_head_of(peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["lm_head"])))


def test_lm_head_gives_the_models_logits() -> None:
    model = tiny_model("gemma2").eval()
    tokens = torch.tensor([[3, 4, 5, 6]])
    head = lm_head_of(model)
    assert head.softcap == 3.0 and head.scale == 1.0 and head.bias is None
    hidden = model.model(input_ids=tokens).last_hidden_state
    logits = head.softcap * torch.tanh(hidden @ head.weight.T * head.scale / head.softcap)
    torch.testing.assert_close(logits, model(input_ids=tokens).logits)


def test_nothing_to_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="sequences"):
        pack_sequences([])
    with pytest.raises(ValueError, match="sequences"):
        pack_sequences([[1], []])
