"""The plain loop beside which the curve is looked at: where answers end, and that each precision learns."""

import pytest
import torch
from ilr_benchmarks.curve_plain import MOST_TOKENS, SAMPLES, WIDTHS, Plain, first_end
from learners import save_model

QUESTIONS = [{"question": "w1 w2", "answer": "3"}, {"question": "w4", "answer": "4"}]


def test_an_answer_ends_with_its_first_end():
    assert first_end([5, 6, 7, 6], {6}) == 2 and first_end([5, 5], {6}) == 2 and first_end([6], {6}) == 1


@pytest.mark.parametrize("precision", WIDTHS)
@pytest.mark.parametrize("aggregation", ["grpo", "dapo"])
def test_an_update_makes_what_was_rewarded_likelier(tmp_path, precision, aggregation):
    plain = Plain(save_model(tmp_path, "llama"), precision, 0, "cpu")
    plain.adamw.param_groups[0]["lr"] = 0.01
    out, mask, lengths = plain.answers(QUESTIONS, SAMPLES)
    assert out.shape == mask.shape and len(out) == 2 * SAMPLES
    assert torch.equal(mask[:, -MOST_TOKENS:].sum(1), lengths)

    def likelihood() -> float:
        with torch.no_grad():
            logp = torch.log_softmax(plain.teller(input_ids=out[:1]).logits[:, :-1].float(), -1)
        return float(logp.gather(-1, out[:1, 1:, None])[0, -MOST_TOKENS:, 0][: int(lengths[0])].sum())

    before = likelihood()
    plain.learn(out, mask, lengths, torch.zeros(len(out)), aggregation)  # equal rewards teach nothing
    assert likelihood() == before
    plain.learn(out, mask, lengths, torch.tensor([1.0] + [0.0] * (len(out) - 1)), aggregation)
    assert likelihood() > before
    assert all(master.dtype == torch.float32 for master in plain.masters)
