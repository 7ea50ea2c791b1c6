"""Memory that runs out in the middle of an update: the step is taken again with less, nothing is lost, one warning."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from end_to_end import agent, read_rows, save_models, weights_of, without_timings, write_config
from learners import distance, make_agent, rollout, save_model, weights

from ilr_fast.cli import main
from ilr_fast.config import LossConfig, OptimizerConfig
from ilr_fast.engines.embedded import EmbeddedEngine
from ilr_fast.errors import RunError
from ilr_fast.out_of_memory import MemoryGuard

TOKENS = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models"), "llama")


class _Fails(torch.autograd.Function):
    """Runs out of memory in the backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")


def limit(trainer, tokens, where="backward", recomputed=None):
    """Micro-batches of more than `tokens` fail, `recomputed` of them where activations are recomputed; counts tries."""
    loss, tries = trainer._loss, []

    def limited(batch, given, sink):
        size = batch.tokens_T.numel()
        most = recomputed if recomputed and trainer.recomputes else tokens
        tries.append(size)
        if size > most and where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        value, stats = loss(batch, given, sink)
        return (_Fails.apply(value) if size > most else value), stats

    trainer._loss = limited
    return tries


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(
    "keys", [{}, {"optimizer": OptimizerConfig(lr=1e-3, rounding="stochastic", offload="host")}, {"train": "lora"}]
)
def test_the_step_is_taken_again_with_half_the_tokens(folder, where, keys):
    plain, halved, failing = (make_agent(folder, micro_batch_tokens=t, **keys) for t in (TOKENS, TOKENS // 2, TOKENS))
    tries = limit(failing, TOKENS // 2, where)
    results = [made.update(rollout(questions=6), 1) for made in (plain, halved, failing)]
    assert failing.guard.tokens == TOKENS // 2 and max(tries) > TOKENS // 2
    assert torch.equal(weights(failing), weights(halved))
    assert distance(weights(failing), weights(plain)) < 1e-4
    assert results[2].metrics == results[1].metrics and results[2].tokens_trained == results[0].tokens_trained
    assert "micro_batch_tokens is 48" in results[2].note and results[0].note is None
    again = [made.update(rollout(seed=1, questions=6), 2) for made in (halved, failing)]
    assert torch.equal(weights(failing), weights(halved)) and again[1].note is None
    assert all(p.grad is None for p in failing.model.parameters()) and not failing.sinks.buffers


def test_what_is_given_up_for_good_is_tried_before_anything_shrinks():
    guard, given_up, tries = MemoryGuard("ada", 64, None), ["no graphs from here on", None], []

    def work(tokens):
        tries.append(tokens)
        if len(tries) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    assert guard.run(work, lambda: given_up.pop(0), longest=8) == "done" and tries == [64, 64, 32]
    assert "micro_batch_tokens is 32" in guard.told()


def test_an_agent_gives_its_graphs_up_once(folder):
    made = make_agent(folder)
    made.graphs = object()
    assert "graph_tokens" in made._make_room() and made.graphs is None
    assert made._make_room() is None


def test_gradients_of_float32_copies_are_given_up_too(folder):
    failing = make_agent(folder, micro_batch_tokens=TOKENS, dtype="bfloat16")
    adamw, free = failing.optimizer.adamw, []
    collect = adamw.collect

    def limited(sinks):
        free.append(all(copy.grad is None for copy in adamw.masters))
        gradients = collect(sinks)
        if len(free) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return gradients

    adamw.collect = limited
    failing.update(rollout(questions=6), 1)
    assert free == [True, True]


def test_old_and_reference_log_probs_stay_those_of_before_the_first_update(folder):
    loss = LossConfig(beta=0.1, epochs=2, minibatches=2, kl="k3")
    plain, failing = (make_agent(folder, loss, micro_batch_tokens=4096) for _ in range(2))
    original, calls = failing._loss, []

    def fails_once(batch, given, sink):
        calls.append(batch.tokens_T.numel())
        if len(calls) == 4:  # in the last of four optimizer steps
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(batch, given, sink)

    failing._loss = fails_once
    expected, found = plain.update(rollout(questions=6), 1), failing.update(rollout(questions=6), 1)
    assert len(calls) > 4 and found.note
    assert distance(weights(failing), weights(plain)) < 1e-5
    for key in ("loss", "kl_reference", "grad_norm", "clip_share"):
        assert found.metrics[key] == pytest.approx(expected.metrics[key], rel=1e-4), key


@pytest.mark.parametrize("keys", [{}, {"train": "lora"}])
def test_the_references_log_probs_are_tried_again_too(folder, keys):
    loss, sequences = LossConfig(beta=0.1, kl="k1"), rollout(questions=6)
    plain, failing, hopeless = (make_agent(folder, loss, micro_batch_tokens=TOKENS, **keys) for _ in range(3))
    for made, most in ((failing, TOKENS // 2), (hopeless, 1)):
        logp = made._logp

        def limited(model, batch, logp=logp, most=most):
            if batch.tokens_T.numel() > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
            return logp(model, batch)

        made._logp = limited
    expected, found = plain.reference_logps(sequences), failing.reference_logps(sequences)
    assert failing.guard.tokens <= TOKENS // 2 < plain.guard.tokens and "micro_batch_tokens" in failing.guard.told()
    assert [len(logps) for logps in found] == [sum(t.end - t.start for t in s.turns) for s in sequences]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    with pytest.raises(RunError, match="ada: a single sequence"):
        hopeless.reference_logps(sequences)
    assert not hopeless.recomputes and not hopeless.model.training


def test_then_activations_are_recomputed_and_then_the_run_ends(folder):
    failing, plain = (make_agent(folder, micro_batch_tokens=TOKENS) for _ in range(2))
    limit(failing, 1, recomputed=10**6)
    note = failing.update(rollout(), 1).note
    plain.update(rollout(), 1)
    assert failing.recomputes and "recomputed" in note
    assert distance(weights(failing), weights(plain)) < 1e-5
    hopeless = make_agent(folder, micro_batch_tokens=TOKENS)
    before = weights(hopeless)
    limit(hopeless, 1)
    with pytest.raises(RunError, match="ada: a single sequence"):
        hopeless.update(rollout(), 1)
    assert torch.equal(weights(hopeless), before)


def test_out_of_memory_while_weights_move_is_not_tried_again(folder):
    made = make_agent(folder)

    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    made.optimizer.adamw.step = fails
    with pytest.raises(RunError, match="optimizer.offload: host"):
        made.update(rollout(), 1)


def test_generation_says_what_would_help(folder, monkeypatch):
    import asyncio

    from ilr_fast.types import Sampling

    trainer = make_agent(folder)
    engine = EmbeddedEngine(trainer.model, trainer.tokenizer, slots=2)

    def fails(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(engine, "_forward", fails)
    failed = asyncio.run(engine.generate([1, 2, 3], Sampling(4)))
    assert failed.finish == "error" and "engine.slots" in failed.error


# In a worker's process: every micro-batch of more than 160 tokens fails.
PATCH = """
import sys
if "ilr_fast.hosts.worker" in sys.orig_argv:
    import torch
    from ilr_fast.agent import Agent
    loss = Agent._loss
    def limited(self, batch, given, sink):
        if batch.tokens_T.numel() > 160:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(self, batch, given, sink)
    Agent._loss = limited
"""


def test_a_run_with_agents_in_processes_goes_on(tmp_path, monkeypatch, capfd):
    models, runs = save_models(tmp_path / "models"), {}
    for name, tokens in (("never", 160), ("failing", 320)):
        folder = tmp_path / name
        folder.mkdir()
        if name == "failing":
            (folder / "sitecustomize.py").write_text(PATCH)
            monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        agents = {n: agent(models, n, host="process", micro_batch_tokens=tokens) for n in ("ada", "bob")}
        options = {"agents": agents, "steps": 2, "log__tensorboard": False}
        assert main(["train", str(write_config(folder, models, **options)), "--debug"]) == 0
        runs[name] = folder / "run"
        warnings = capfd.readouterr().out.count("out of memory in an update")
        assert warnings == (2 if name == "failing" else 0)  # one for each agent
    for name in ("ada", "bob"):
        assert weights_of(runs["never"], 2, name) == weights_of(runs["failing"], 2, name)
    rows = [[without_timings(row) for row in read_rows(Path(run))] for run in runs.values()]
    assert rows[0] == rows[1]
