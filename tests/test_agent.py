"""An agent's update: what must not matter (packing, dropping, interruption) and what must (epochs, KL, adapters)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import transformers
from learners import distance, make_agent, rollout, save_model, weights

from ilr_fast.config import LoraConfig, LossConfig, OptimizerConfig
from ilr_fast.errors import UserError
from ilr_fast.optimizer import learning_rate
from ilr_fast.types import TrainingSequence, TrainingTurn


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models"), "llama_tied")


def updated(agent, sequences, steps=2):
    results = [agent.update(sequences, step) for step in range(1, steps + 1)]
    return weights(agent), results[-1]


def padded_logps(model, sequences):
    """[S, T − 1] log-probs of the next tokens, by transformers alone."""
    longest = max(len(s.tokens) for s in sequences)
    ids = torch.tensor([[*s.tokens, *[0] * (longest - len(s.tokens))] for s in sequences])
    mask = torch.tensor([[1] * len(s.tokens) + [0] * (longest - len(s.tokens)) for s in sequences])
    return model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_micro_batches_add_up_to_one_large_batch(folder, ratio):
    loss = LossConfig(ratio=ratio, epochs=2, minibatches=2, importance="token")
    whole, result = updated(make_agent(folder, loss, micro_batch_tokens=8192), rollout())
    for budget in (60, 16):  # a few sequences at a time; every sequence alone, no prefix shared
        parts, other = updated(make_agent(folder, loss, micro_batch_tokens=budget), rollout())
        assert distance(parts, whole) < 1e-6
        assert other.metrics["grad_norm"] == pytest.approx(result.metrics["grad_norm"], rel=1e-4)
        assert other.metrics["loss"] == pytest.approx(result.metrics["loss"], abs=1e-6)
        assert other.metrics["truncated_share"] == result.metrics["truncated_share"]


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
def test_dropping_what_has_no_gradient_changes_nothing(folder, aggregation):
    sequences = rollout()
    dead = [dataclasses.replace(t, advantage=0.0) for t in sequences[-1].turns]
    sequences[-1] = dataclasses.replace(sequences[-1], turns=tuple(dead))
    loss = LossConfig(aggregation=aggregation)
    dropping, keeping = make_agent(folder, loss), make_agent(folder, loss)
    keeping.rules = dataclasses.replace(keeping.rules, keep_dead=True)
    few, many = dropping.update(sequences, 1), keeping.update(sequences, 1)
    assert distance(weights(dropping), weights(keeping)) < 1e-7
    assert 0 < few.tokens_trained < many.tokens_trained
    assert few.tokens_trained + few.tokens_dropped == many.tokens_trained and many.tokens_dropped == 0


def test_several_updates_are_ppo_against_the_first_pass(folder):
    """Written out with transformers, autograd and torch's AdamW: two epochs of three minibatches, one a question."""
    sequences = [s for s in rollout(dead=False)]
    agent = make_agent(folder, LossConfig(epochs=2, minibatches=3, clip_low=0.01, clip_high=0.02))
    result = agent.update(sequences, 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.0)
    with torch.no_grad():
        old = {q: padded_logps(model, [s for s in sequences if s.group == q]) for q in ("q0", "q1", "q2")}
    for _ in range(2):
        for question, old_ST in old.items():
            part = [s for s in sequences if s.group == question]
            ratio_ST = (padded_logps(model, part) - old_ST).exp()
            terms = []
            for i, s in enumerate(part):
                for t in s.turns:
                    r = ratio_ST[i, t.start - 1 : t.end - 1]
                    terms.append(-torch.minimum(r * t.advantage, r.clamp(0.99, 1.02) * t.advantage).mean())
            optimizer.zero_grad()
            (sum(terms) / len(terms)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    assert distance(weights(agent), torch.cat([p.detach().flatten() for p in model.parameters()])) < 1e-6
    assert 0 < result.metrics["clip_share"] < 1
    assert result.tokens_trained == sum(t.end - t.start for s in sequences for t in s.turns)


def test_old_log_probs_may_be_the_engines(folder):
    sequences = rollout()
    loss = LossConfig(epochs=2, old_logps="engine")
    engine, trainer = make_agent(folder, loss), make_agent(folder, dataclasses.replace(loss, old_logps="trainer"))
    by_engine, by_trainer = engine.update(sequences, 1), trainer.update(sequences, 1)
    assert by_engine.metrics["clip_share"] > by_trainer.metrics["clip_share"]  # these engine log-probs are far off
    assert by_engine.metrics["logp_diff_mean"] == pytest.approx(by_trainer.metrics["logp_diff_mean"], rel=1e-5)


def test_metrics_are_those_of_the_policy_that_sampled(folder):
    agent = make_agent(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (sequence,) = rollout(dead=False)[:1]
    with torch.no_grad():
        logp_T = padded_logps(model, [sequence])[0]
        p_TV = model(input_ids=torch.tensor([sequence.tokens])).logits[0, :-1].softmax(-1)
    rows = [slice(t.start - 1, t.end - 1) for t in sequence.turns]
    turns = tuple(
        dataclasses.replace(t, behavior_logps=tuple((logp_T[r] + 0.1 * (i + 1)).tolist()))
        for i, (t, r) in enumerate(zip(sequence.turns, rows, strict=True))
    )
    metrics = agent.update([dataclasses.replace(sequence, turns=turns)], 1).metrics
    lengths = [t.end - t.start for t in turns]
    entropy_T = -(p_TV * p_TV.log()).sum(-1)
    assert metrics["entropy"] == pytest.approx(float(torch.cat([entropy_T[r] for r in rows]).mean()), rel=1e-5)
    mean = (0.1 * lengths[0] + 0.2 * lengths[1]) / sum(lengths)
    assert metrics["logp_diff_mean"] == pytest.approx(mean, rel=1e-4)
    assert metrics["logp_diff_max"] == pytest.approx(0.2, rel=1e-4)
    assert metrics["kl_reference"] is None and metrics["truncated_share"] is None and metrics["clip_share"] == 0
    assert metrics["lr"] == 1e-3


@pytest.mark.parametrize("train", ["full", "lora"])
def test_the_kl_pulls_towards_the_first_weights(folder, train):
    sequences = rollout(dead=False)
    free = make_agent(folder, train=train)
    bound = make_agent(folder, LossConfig(beta=20.0, kl="k2"), train=train)
    first = bound.update(sequences, 1)
    free.update(sequences, 1)
    assert first.metrics["kl_reference"] == pytest.approx(0, abs=1e-9)
    assert distance(weights(bound), weights(free)) < 1e-7  # at the reference itself the KL has no gradient
    for step in range(2, 6):
        free.update(sequences, step)
        last = bound.update(sequences, step)
    assert last.metrics["kl_reference"] > 1e-6
    with torch.no_grad():
        start, near, far = (padded_logps(a.model, sequences) for a in (make_agent(folder), bound, free))
    rows = [(i, slice(t.start - 1, t.end - 1)) for i, s in enumerate(sequences) for t in s.turns]
    moved = [torch.cat([(x - start)[row] for row in rows]).square().mean() for x in (near, far)]
    assert moved[0] < 0.7 * moved[1]


@pytest.mark.parametrize("train", ["full", "lora"])
def test_reference_log_probs_stay_those_of_the_first_weights(folder, train):
    sequences = rollout()
    agent = make_agent(folder, LossConfig(beta=0.1, kl="k1"), train=train)
    result = agent.update(sequences, 1)
    assert result.metrics["kl_reference"] is None and result.tokens_dropped > 0  # k1 is no part of the loss
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logp_ST = padded_logps(model, sequences)
    for i, (s, found) in enumerate(zip(sequences, agent.reference_logps(sequences), strict=True)):
        expected = torch.cat([logp_ST[i, t.start - 1 : t.end - 1] for t in s.turns])
        assert found == pytest.approx(expected.tolist(), abs=1e-5)


def test_entropy_bonus_keeps_dead_turns_and_raises_the_entropy(folder):
    sequences = [
        dataclasses.replace(s, turns=tuple(dataclasses.replace(t, advantage=0.0) for t in s.turns)) for s in rollout()
    ]
    agent = make_agent(folder, LossConfig(entropy_coef=0.1))
    entropies = [agent.update(sequences, step).metrics["entropy"] for step in range(1, 5)]
    assert entropies == sorted(entropies) and entropies[-1] > entropies[0] + 1e-4


def test_adapters_learn_alone_and_are_saved_by_peft(folder, tmp_path):
    import peft

    agent = make_agent(folder, train="lora", lora=LoraConfig(rank=4), optimizer=OptimizerConfig(lr=1e-2))
    before = {n: p.detach().clone() for n, p in agent.model.named_parameters()}
    assert not agent.sinks.buffers, "a frozen head and embedding need no gradient"
    agent.update(rollout(), 1)
    agent.update(rollout(), 2)
    changed = {n for n, p in agent.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "lora_" in n}
    agent.save_model(tmp_path / "ada")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "ada")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, agent.model(ids).logits, atol=1e-5)
    again = make_agent(tmp_path / "ada", train="full")  # merged
    assert not any("lora" in n for n, _ in again.model.named_parameters())
    with torch.no_grad():
        assert torch.allclose(again.model(ids).logits, loaded(ids).logits, atol=1e-5)


def test_a_gradient_that_is_not_finite_is_skipped(folder):
    sequences = rollout()
    broken = dataclasses.replace(
        sequences[0], turns=(dataclasses.replace(sequences[0].turns[0], advantage=math.inf), *sequences[0].turns[1:])
    )
    agent, clean = make_agent(folder), make_agent(folder)
    before = weights(agent)
    result = agent.update([broken, *sequences[1:]], 1)
    assert "not finite" in result.skipped and result.metrics["grad_norm"] is result.metrics["loss"] is None
    assert torch.equal(weights(agent), before)
    assert torch.equal(updated(agent, sequences)[0], updated(clean, sequences)[0]), "optimizer state is untouched too"


def test_a_rollout_without_any_gradient_is_said_so(folder):
    sequence = TrainingSequence("q", 0, (1, 2, 3), (TrainingTurn(1, 3, 0.0, (-1.0, -1.0)),))
    agent = make_agent(folder)
    before = weights(agent)
    result = agent.update([sequence], 1)
    assert result.skipped == "no turn has a gradient" and result.tokens_dropped == 2
    assert set(result.metrics.values()) == {None} and torch.equal(weights(agent), before)
    assert agent.update([], 1).skipped


RESUMED = [
    dict(),
    dict(dtype="bfloat16"),
    dict(train="lora", lora=LoraConfig(rank=4, dropout=0.3)),
]


@pytest.mark.parametrize("keys", RESUMED, ids=["full", "bfloat16", "lora"])
def test_resuming_gives_the_same_bits(folder, tmp_path, keys):
    optimizer = OptimizerConfig(lr=1e-4, warmup_steps=2, schedule="cosine")
    agent = make_agent(folder, optimizer=optimizer, **keys)
    for step in (1, 2):
        agent.update(rollout(step), step)
    agent.save_model(tmp_path / "model")
    agent.save_state(tmp_path / "state")
    for step in (3, 4):
        agent.update(rollout(step), step)
    again = make_agent(folder, optimizer=optimizer, **keys)
    again.update(rollout(9), 1)  # whatever it did before must be gone
    torch.rand(3)  # nor do random numbers drawn elsewhere matter
    again.load(tmp_path / "model", tmp_path / "state")
    for step in (3, 4):
        again.update(rollout(step), step)
    assert torch.equal(weights(again), weights(agent))
    assert not torch.equal(weights(agent), weights(make_agent(folder, **keys)))


def test_what_is_held_is_written_whatever_is_learned_meanwhile_and_once(folder, tmp_path, monkeypatch):
    agent = make_agent(folder, dtype="bfloat16")
    assert not agent.hold()  # on the host nothing is gained
    monkeypatch.setattr("ilr_fast.host_copy.worth_it", lambda device: True)
    agent.update(rollout(1), 1)
    for name in ("plain", "held", "later"):
        assert name != "held" or agent.hold()
        if name == "held":
            agent.update(rollout(2), 2)
        agent.save_model(tmp_path / name)
        agent.save_state(tmp_path / name)
    plain, held, later = (
        [(tmp_path / name / file).read_bytes() for file in ("model.safetensors", "trainer.pt", "config.json")]
        for name in ("plain", "held", "later")
    )
    assert held == plain and later[0] != plain[0] and later[1] != plain[1]
    monkeypatch.setattr("ilr_fast.host_copy.available_host_memory", lambda: 1000)
    assert not agent.hold()
    adapters = make_agent(folder, train="lora", lora=LoraConfig(rank=4))
    assert not adapters.hold()


def test_another_models_checkpoint_is_refused(folder, tmp_path):
    other = make_agent(save_model(tmp_path, "gemma3"))
    other.save_model(tmp_path / "model")
    other.save_state(tmp_path / "state")
    with pytest.raises(UserError, match="another model"):
        make_agent(folder).load(tmp_path / "model", tmp_path / "state")
    with pytest.raises(UserError, match="other parameters"):
        agent = make_agent(folder)
        agent.save_model(tmp_path / "own")
        agent.load(tmp_path / "own", tmp_path / "state")


def test_small_steps_are_not_lost_in_bfloat16(folder):
    """Ten steps of 1e-5 are far below bfloat16's spacing, one by one; together they are not."""
    optimizer = OptimizerConfig(lr=3e-5, eps=1e-12)
    fine, coarse = (make_agent(folder, optimizer=optimizer, dtype=d) for d in ("float32", "bfloat16"))
    start = weights(fine)
    for step in range(1, 21):
        fine.update(rollout(), step)
        coarse.update(rollout(), step)
    moved = weights(fine) - start
    assert torch.nn.functional.cosine_similarity(moved, weights(coarse) - weights(fine) + moved, dim=0) > 0.5


def test_checkpointing_changes_nothing(folder):
    plain, _ = updated(make_agent(folder), rollout())
    checkpointed, _ = updated(make_agent(folder, gradient_checkpointing=True), rollout())
    assert distance(checkpointed, plain) < 1e-6


def test_schedule():
    warm = OptimizerConfig(lr=1.0, warmup_steps=4, schedule="cosine", min_lr_ratio=0.1)
    assert [learning_rate(warm, s, 12) for s in (1, 4, 8, 12, 20)] == pytest.approx([0.25, 1, 0.55, 0.1, 0.1])
    assert learning_rate(OptimizerConfig(lr=2.0), 1, 1) == 2.0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(device="cuda:7"), "no device"),
        (dict(device="quantum"), "is no device"),
        (dict(train="lora", lora=LoraConfig(targets="nothing")), "lora.targets"),
        (dict(train="lora", lora=LoraConfig(targets="lm_head")), "LM head"),
    ],
)
def test_mistakes_are_named(folder, keys, message):
    with pytest.raises(UserError, match=message):
        make_agent(folder, **keys)
