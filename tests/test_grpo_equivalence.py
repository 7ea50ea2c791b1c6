"""One agent without calibration is plain GRPO: held against a step written out here with nothing but transformers,
log_softmax, autograd and torch's AdamW, on padded batches."""

from __future__ import annotations

import pytest
import torch
import transformers
from learners import distance, make_agent, rollout, save_model, weights

from ilr_fast.config import CreditConfig, LossConfig, OptimizerConfig, RolloutConfig
from ilr_fast.credit import credit, training_sequences
from ilr_fast.types import Dialogue, Generation, Question, Scored, Turn


def plain_logps(model, sequences, temperature=1.0):
    """[S, T − 1] log-probs of the next tokens of a right-padded batch."""
    longest = max(len(s.tokens) for s in sequences)
    ids = torch.tensor([[*s.tokens, *[0] * (longest - len(s.tokens))] for s in sequences])
    mask = torch.tensor([[1] * len(s.tokens) + [0] * (longest - len(s.tokens)) for s in sequences])
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1] / temperature
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def plain_step(model, optimizer, sequences, clip, temperature=1.0):
    """GRPO on-policy: the mean over turns of the mean over tokens of −A·exp(logp − logp.detach())."""
    logp = plain_logps(model, sequences, temperature)
    turns = [
        -(t.advantage * (x := logp[i, t.start - 1 : t.end - 1]) - t.advantage * x.detach() + t.advantage).mean()
        for i, s in enumerate(sequences)
        for t in s.turns
    ]
    loss = sum(turns) / len(turns)
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return float(loss.detach()), float(norm)


def scored_groups():
    """Ragged groups with rewards, as the pipeline gives them."""
    scored = []
    for s in rollout(dead=False):
        turns = []
        edge = 0
        for t in s.turns:
            generation = Generation(s.tokens[t.start : t.end], t.behavior_logps, "stop", "")
            turns.append(
                Turn(f"stage{t.start > s.turns[0].start}", "neutral", "", s.tokens[edge : t.start], generation)
            )
            edge = t.end
        rewards = tuple(float(1.1 * (sum(t.generation.tokens) % 2)) for t in turns)
        dialogue = Dialogue(Question(s.group, "", ""), s.sample, "test", {"ada": tuple(turns)})
        scored.append(Scored(dialogue, {}, {"ada": rewards}))
    return scored


def plain_advantages(scored):
    """(R − mean)/(std + 1e-4) over the samples of each question and stage."""
    groups: dict = {}
    for one in scored:
        for stage, reward in enumerate(one.rewards["ada"]):
            groups.setdefault((one.dialogue.question.id, stage), []).append(reward)

    def advantage(key, reward):
        group = torch.tensor(groups[key], dtype=torch.float64)
        return float((reward - group.mean()) / (group.std() + 1e-4))

    return [[advantage((s.dialogue.question.id, k), r) for k, r in enumerate(s.rewards["ada"])] for s in scored]


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma3", "gemma2", "cohere"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_three_steps_equal_a_plain_grpo_step(tmp_path, family, temperature):
    folder = save_model(tmp_path, family)
    agent = make_agent(folder, rollout=RolloutConfig(temperature=temperature))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.0)
    scored = scored_groups()
    sequences = training_sequences(credit(scored, ["ada"], CreditConfig(calibrate="none")), "ada")
    for one, expected in zip(sequences, plain_advantages(scored), strict=True):
        assert [t.advantage for t in one.turns] == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert any(t.advantage == 0 for s in sequences for t in s.turns), "a group of equal rewards belongs to the case"
    start = weights(agent)
    for step in range(1, 4):
        result = agent.update(sequences, step)
        loss, norm = plain_step(model, optimizer, sequences, 0.5, temperature)
        assert result.skipped is None
        assert result.metrics["loss"] == pytest.approx(loss, abs=1e-6)
        assert result.metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
        plain = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert distance(weights(agent), plain) < 1e-6
        assert distance(plain, start) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gradients_equal_autograd(tmp_path, family):
    """One step of plain gradient descent in disguise: with a huge eps, AdamW's first step is lr · g / eps."""
    folder = save_model(tmp_path, family)
    optimizer = OptimizerConfig(lr=1e6, eps=1e6, clip_norm=None)
    agent = make_agent(folder, optimizer=optimizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    sequences, before = rollout(), weights(agent).double()
    agent.update(sequences, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    plain_step(model, sgd, sequences, float("inf"))
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert distance(weights(agent).double() - before, after - before) < 1e-5


def test_dr_grpo_and_dapo_weigh_tokens_their_way(tmp_path):
    folder = save_model(tmp_path, "llama")
    sequences = rollout()
    tokens = sum(t.end - t.start for s in sequences for t in s.turns)
    total = sum(t.advantage * (t.end - t.start) for s in sequences for t in s.turns)
    turns = sum(len(s.turns) for s in sequences)
    for aggregation, divisor in (("dapo", tokens), ("dr_grpo", turns * 512)):
        result = make_agent(folder, LossConfig(aggregation=aggregation)).update(sequences, 1)
        assert result.metrics["loss"] == pytest.approx(-total / divisor, rel=1e-5)
