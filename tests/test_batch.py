"""Dropping, weighing and packing, on cases small enough to check by eye."""

import pytest
import torch

from ilr_fast import batch as batch_module
from ilr_fast.batch import BatchRules, pack_step, split_by_question
from ilr_fast.types import TrainingSequence, TrainingTurn


def turn(start, end, advantage):
    return TrainingTurn(start, end, advantage, tuple(-0.1 * t for t in range(start, end)))


def sequence(group, tokens, *turns, sample=0):
    return TrainingSequence(group, sample, tuple(tokens), tuple(turns))


TWO = [
    sequence("q", [1, 2, 3, 10, 11], turn(3, 5, 1.0)),
    sequence("q", [1, 2, 3, 20, 21, 22], turn(3, 6, -1.0), sample=1),
]


def test_prefix_is_stored_once_and_its_last_row_predicts_every_branch():
    (batch,) = pack_step(TWO, BatchRules(), budget=100).batches
    assert batch.tokens_T.tolist() == [1, 2, 3, 10, 20, 21]  # the last token of each sequence is only a target
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 3, 4]
    assert batch.plan.subtree_end_T.tolist() == [6, 6, 6, 4, 6, 6]
    assert batch.rows_N.tolist() == [2, 3, 2, 4, 5]
    assert batch.target_N.tolist() == [10, 11, 20, 21, 22]
    assert batch.advantage_N.tolist() == [1, 1, -1, -1, -1]
    assert batch.turn_N.tolist() == [0, 0, 1, 1, 1]
    assert batch.behavior_logp_N == pytest.approx(torch.tensor([-0.3, -0.4, -0.3, -0.4, -0.5]))


def test_sequences_may_lie_one_after_the_other():
    rules = BatchRules(share_prefixes=False)
    (batch,) = pack_step(TWO, rules, budget=9).batches
    assert batch.tokens_T.tolist() == [1, 2, 3, 10, 1, 2, 3, 20, 21] and not batch.plan.shares_prefixes
    assert batch.rows_N.tolist() == [2, 3, 6, 7, 8]
    assert [b.tokens_T.tolist() for b in pack_step(TWO, rules, budget=8).batches] == [[1, 2, 3, 10], [1, 2, 3, 20, 21]]
    assert len(pack_step(TWO, BatchRules(), budget=8).batches) == 1


def test_prefix_reaches_into_sampled_tokens_and_branches_may_be_empty():
    same = [sequence("q", [1, 2, 7, 8], turn(1, 4, a), sample=i) for i, a in enumerate((1.0, -1.0))]
    longer = sequence("q", [1, 2, 7, 8, 9], turn(1, 5, 0.5), sample=2)
    (batch,) = pack_step([*same, longer], BatchRules(), budget=100).batches
    assert batch.tokens_T.tolist() == [1, 2, 7, 8]
    assert batch.rows_N.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [("grpo", [1 / 4, 1 / 4, 1 / 6, 1 / 6, 1 / 6]), ("dapo", [1 / 5] * 5), ("dr_grpo", [1 / 16] * 5)],
)
def test_token_weights(aggregation, weights):
    (batch,) = pack_step(TWO, BatchRules(aggregation, turn_limit=8), budget=100).batches
    assert batch.token_weight_N == pytest.approx(torch.tensor(weights))


def test_weights_are_of_the_whole_step_not_of_a_micro_batch():
    other = [sequence("r", [5, 6, 7], turn(1, 3, 1.0))]
    step = pack_step(TWO + other, BatchRules(), budget=6)
    assert [b.tokens_T.numel() for b in step.batches] == [6, 2]
    assert sum(float(b.token_weight_N.sum()) for b in step.batches) == pytest.approx(1)
    assert float(step.batches[1].token_weight_N[0]) == pytest.approx(1 / 6)


DEAD = [
    sequence("q", [1, 2, 3, 4, 5, 6, 7], turn(1, 3, 0.0), turn(4, 5, 1.0), turn(6, 7, 0.0)),
    sequence("q", [1, 2, 3, 4, 5], turn(1, 3, 0.0), turn(4, 5, 0.0), sample=1),
]


def test_dead_turns_are_dropped_cut_off_or_kept_as_context():
    step = pack_step(DEAD, BatchRules(), budget=100)
    (batch,) = step.batches
    assert batch.tokens_T.tolist() == [1, 2, 3, 4]
    assert batch.target_N.tolist() == [5]
    assert batch.token_weight_N.tolist() == pytest.approx([1 / 5])  # five turns count
    assert (step.tokens_trained, step.tokens_dropped) == (1, 6)


def test_dropped_turns_need_not_count():
    (batch,) = pack_step(DEAD, BatchRules(count_dropped=False), budget=100).batches
    assert batch.token_weight_N.tolist() == [1]


def test_with_a_kl_nothing_is_dropped():
    step = pack_step(DEAD, BatchRules(keep_dead=True), budget=100)
    assert (step.tokens_trained, step.tokens_dropped) == (7, 0)


def test_all_dead_gives_no_batch():
    step = pack_step(DEAD[1:], BatchRules(), budget=100)
    assert not step.batches and step.tokens_dropped == 3
    assert not pack_step([], BatchRules(), budget=100).batches


def test_a_group_over_the_budget_is_split_and_a_long_sequence_goes_alone():
    group = [sequence("q", [1, 2, 3, 10 + i, 20, 21], turn(3, 6, 1.0), sample=i) for i in range(3)]
    long = sequence("r", range(20), turn(1, 20, 1.0))
    step = pack_step([*group, long], BatchRules(), budget=7)
    assert sorted(b.tokens_T.numel() for b in step.batches) == [5, 7, 19]


def test_groups_share_what_all_questions_begin_with():
    groups = [sequence(q, [1, 2, 3, q, 30, 31], turn(4, 6, 1.0)) for q in (7, 8, 9)]
    (batch,) = pack_step(groups, BatchRules(), budget=9).batches
    assert batch.tokens_T.tolist() == [1, 2, 3, 7, 30, 8, 30, 9, 30]


def test_minibatches_keep_groups_whole():
    sequences = [sequence(q, [1, 2], turn(1, 2, 1.0)) for q in "aabbbccd"]
    parts = split_by_question(sequences, 3)
    assert [[s.group for s in p] for p in parts] == [["a", "a", "b", "b", "b"], ["c", "c"], ["d"]]
    assert len(split_by_question(sequences, 9)) == 4 and split_by_question([], 2) == []


def test_a_micro_batch_is_packed_once_when_it_is_asked_for(monkeypatch):
    packed, real = [], batch_module._pack
    monkeypatch.setattr(batch_module, "_pack", lambda kept, *more: (packed.append(len(kept)), real(kept, *more))[1])
    step = pack_step(TWO, BatchRules(), budget=5)
    assert len(step.batches) == 2 and step.tokens_trained == 5 and not packed
    first = step.batches[0]
    assert packed == [1] and step.batches[0] is first and list(step.batches)[0] is first and packed == [1, 1]
