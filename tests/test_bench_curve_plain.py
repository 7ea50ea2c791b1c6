"""The plain loop beside which the curve is looked at: its model is transformers', each precision learns."""

import pytest
import torch
from ilr_benchmarks.curve_model import PRECISIONS, WIDE, Cache, Llama, Precision
from ilr_benchmarks.curve_plain import MOST_TOKENS, SAMPLES, Plain, Samples
from learners import save_model
from transformers import AutoModelForCausalLM

QUESTIONS = [[{"question": "w1 w2", "answer": "3"}, {"question": "w4", "answer": "4"}]] * 2
TRUTH = Precision(WIDE, WIDE, WIDE, WIDE, "own")


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path, "llama_tied")


def logp(model, found: Samples, k: int) -> torch.Tensor:
    with torch.no_grad():
        logits = model.logits(found.ids, found.mask, MOST_TOKENS + 1)[k][:, :-1]
    return torch.log_softmax(logits, -1).gather(-1, found.ids[k, :, -MOST_TOKENS:, None])[..., 0]


@pytest.mark.parametrize(("kind", "bound"), [(TRUTH, 1e-5), (PRECISIONS["bfloat16"], 0.0)])
def test_logits_are_those_of_transformers_and_with_a_cache_the_same(folder, kind, bound):
    model = Llama(folder, kind, [1, 2], "cpu")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=kind.residual).eval()
    ids = torch.randint(3, 20, (2, 3, 7))
    mask = torch.ones_like(ids)
    mask[0, 1, :3] = 0
    flat, positions = mask.flatten(0, 1), (mask.flatten(0, 1).cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        wanted = theirs(input_ids=ids.flatten(0, 1), attention_mask=flat, position_ids=positions).logits[:, -4:]
        found = torch.cat(model.logits(ids, mask, 4))
        cache = Cache()
        model.logits(ids[..., :6], mask[..., :6], 1, cache)
        last = torch.cat(model.logits(ids[..., 6:], mask, 1, cache))
    assert (found - wanted).abs().max() <= bound
    assert (last - found[:, -1:]).abs().max() <= max(bound, 2e-2)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("aggregation", ["grpo", "dapo"])
def test_an_update_makes_what_was_rewarded_likelier_for_its_seed_alone(folder, precision, aggregation):
    plain = Plain(folder, precision, [0, 1], "cpu")
    plain.adamw.param_groups[0]["lr"] = 0.01
    found = plain.answers(QUESTIONS, SAMPLES)
    assert found.ids.shape == found.mask.shape and found.ids.shape[:2] == (2, 2 * SAMPLES)
    assert torch.equal(found.mask[..., -MOST_TOKENS:].sum(2), found.lengths)
    before = [logp(plain.teller, found, k)[0, : found.lengths[k, 0]].sum() for k in (0, 1)]
    found.rewards = torch.zeros(2, 2 * SAMPLES)
    plain.learn(found, aggregation)  # equal rewards teach nothing
    assert logp(plain.teller, found, 0)[0, : found.lengths[0, 0]].sum() == before[0]
    found.rewards[0, 0] = 1.0
    plain.learn(found, aggregation)
    after = [logp(plain.teller, found, k)[0, : found.lengths[k, 0]].sum() for k in (0, 1)]
    assert after[0] > before[0] and after[1] == before[1]
    assert all(master.dtype == torch.float32 for master in plain.model.masters.values())


def test_an_answer_ends_with_its_first_end(folder):
    plain = Plain(folder, "autocast", [0], "cpu")
    end = next(iter(plain.texts._ends))
    assert [plain.texts.length(ids) for ids in ([5, end, 7, end], [5, 5], [end])] == [2, 2, 1]
