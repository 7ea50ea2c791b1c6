"""One LLM that learns: weights, optional frozen reference, optimizer, and one rollout's update.

    sequences → split by question → drop, weigh, pack → [π_old, π_ref] → loss and gradient, micro-batch by micro-batch
              → clip, AdamW → metrics

With one update a rollout the step is on-policy: the ratio is 1 and no old log-probs are computed. With more (`epochs`,
`minibatches`) π_old is the trainer's own pass before the first update, or the engine's log-probs by `loss.old_logps`.
Gradients of micro-batches add up to those of one large batch, because a token's weight comes from the whole step.

    agent = Agent("ada", config.agents["ada"], config)
    result = agent.update(sequences, step=1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
from ilr_kernels.chunks import rows_of
from ilr_kernels.lm_head import linear_logprob, linear_policy_loss
from torch import Tensor
from transformers import AutoTokenizer

from ilr_fast.agent_files import AgentFiles
from ilr_fast.attention import LMHead, lm_head_of, packed_forward
from ilr_fast.batch import BatchRules, PackedBatch, PackedStep, pack_step, split_by_question
from ilr_fast.config import AgentConfig, Config
from ilr_fast.flash_attention import RaggedKernel
from ilr_fast.fused_layers import fuse_layers
from ilr_fast.gradients import GradientSinks
from ilr_fast.layer_graphs import LayerGraphs, make_graphs
from ilr_fast.loading import load_policy, load_reference, recompute_activations
from ilr_fast.models import resolve_model
from ilr_fast.optimizer import Optimizer
from ilr_fast.out_of_memory import MemoryGuard
from ilr_fast.step_meter import METRICS, StepMeter
from ilr_fast.types import StepResult, TrainingSequence
from ilr_fast.update_inputs import Given, Minibatch, policy_loss_of
from ilr_fast.whole_sums import split_sums

Result = TypeVar("Result")
FIRST_LOSS_SCALE = 2.0**12  # float16 gradients below 6e-8 would vanish; halved after every overflow


class Agent(AgentFiles):
    """A model with what its training needs. `train: none` has neither optimizer nor reference.

    `model`: what `load_policy` gave, where an engine has already made its weights the engine's own; `kernel`: the
    engine's attention (engines/vllm_attention.py).
    """

    def __init__(
        self,
        name: str,
        config: AgentConfig,
        run: Config,
        tokenizer: Any = None,
        model: Any = None,
        kernel: RaggedKernel | None = None,
    ):
        where = f"agents.{name}"
        self.name, self.config, self.run, self.loss = name, config, run, run.loss
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(resolve_model(config.model, weights=not config.random_weights))
        self.tokenizer = tokenizer
        self.model: Any = load_policy(config, where, run.seed) if model is None else model
        self.device = self.model.device
        fuse_layers(self.model, config, kernel)
        self.trains = config.train != "none"
        self.policy_loss = policy_loss_of(run.loss)
        self.rules = BatchRules(
            run.loss.aggregation,
            keep_dead=self.policy_loss.beta != 0 or self.policy_loss.entropy_coef != 0,
            count_dropped=run.credit.count_dropped,
            turn_limit=max(run.rollout.max_tokens.values()),
        )
        self.reference = self._reference(where)
        self.optimizer: Optimizer | None = None
        self.sinks: GradientSinks | None = None
        self.loss_scale = FIRST_LOSS_SCALE if self.model.dtype == torch.float16 and self.trains else 1.0
        if self.trains:
            trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            self.optimizer = Optimizer(trained, config.optimizer, run.steps, run.seed)
            self.sinks = GradientSinks(self.model.get_input_embeddings(), lm_head_of(self.model).weight)
        self.graphs: LayerGraphs | None = make_graphs(self.model, config, kernel)
        self.recomputes = self.trains and config.gradient_checkpointing is True
        spare = self._recompute if self.trains and not self.recomputes else None
        self.guard = MemoryGuard(name, config.batch_tokens, spare)

    def update(self, sequences: Sequence[TrainingSequence], step: int) -> StepResult:
        """Trains on one rollout: `epochs` × `minibatches` optimizer steps at the rate of `step` (from 1).

        An update whose gradient is not finite is left out, with the weights untouched, and named in `skipped`; so is a
        rollout in which no turn has a gradient. `tokens_trained` counts each token of the rollout once.
        """
        assert self.trains, "a peer that only talks is not updated"
        minibatches = [Minibatch(part, self._pack) for part in split_by_question(sequences, self.loss.minibatches)]
        packed = [part.packed(self.guard.tokens) for part in minibatches]
        trained, dropped = sum(p.tokens_trained for p in packed), sum(p.tokens_dropped for p in packed)
        parts = [part for part, p in zip(minibatches, packed, strict=True) if p.batches]
        if not parts:
            return StepResult(dict.fromkeys(METRICS), 0, dropped, "no turn has a gradient")
        meter = StepMeter()
        longest, several = max(p.longest for p in packed), self.loss.epochs * len(parts) > 1
        del packed

        def guarded(work: Callable[[int, StepMeter], Result]) -> Result:
            """The work with micro-batches that fit; what it gathered before they did is left out."""

            def attempt(tokens: int) -> Result:
                gathered = StepMeter()
                result = work(tokens, gathered)
                meter.absorb(gathered)
                return result

            return self.guard.run(attempt, self._make_room, longest)

        given = [guarded(partial(self._given, part, several)) for part in parts]
        with self._training(step):
            for epoch in range(self.loss.epochs):
                for number, (part, constants) in enumerate(zip(parts, given, strict=True)):
                    guarded(partial(self._optimize, part, constants, step, epoch + number == 0))
            self._drop_gradients()
        return StepResult(meter.metrics(), trained, dropped, _skipped(meter), self.guard.told())

    def reference_logps(self, sequences: Sequence[TrainingSequence]) -> list[tuple[float, ...]]:
        """The frozen reference's log-probs of every trained token, by sequence, its turns one after the other.

        For a KL in the reward (`loss.kl: k1`): reward − beta · Σ (behavior log-prob − reference log-prob).
        """
        if not sequences:
            return []
        rules = replace(self.rules, keep_dead=True)

        def logp_N(tokens: int) -> Tensor:
            batches = pack_step(sequences, rules, tokens, self.device).batches
            found = torch.cat([self._reference_logp(batch) for batch in batches])
            return found[torch.cat([batch.token_N for batch in batches]).argsort()]

        longest = max(len(sequence.tokens) for sequence in sequences)
        found = iter(self.guard.run(logp_N, self._make_room, longest, backward=False).tolist())
        return [tuple(islice(found, sum(t.end - t.start for t in s.turns))) for s in sequences]

    def _reference(self, where: str) -> Any:
        """A second model for full training; for adapters the model itself, with the adapters switched off."""
        if not self.trains or self.loss.beta == 0:
            return None
        return self.model if self.config.train == "lora" else load_reference(self.config, where, self.run.seed)

    def _pack(self, sequences: Sequence[TrainingSequence], tokens: int) -> PackedStep:
        return pack_step(sequences, self.rules, tokens, self.device)

    def _drop_gradients(self) -> None:
        """All gradients and their memory."""
        if self.optimizer is not None:
            self.optimizer.forget_gradients()
        if self.sinks is not None:
            self.sinks.release()

    def _make_room(self) -> str | None:
        """After a lack of memory: what this optimizer step has made, and for good what graphs hold, which is said."""
        self._drop_gradients()
        had, self.graphs = self.graphs is not None, None
        return "the layers have no CUDA graphs from here on (graph_tokens)" if had else None

    def _given(self, part: Minibatch, several: bool, tokens: int, meter: StepMeter) -> Given:
        """π_old and π_ref of a minibatch, before the first update."""
        if not several and not self.policy_loss.beta:
            return Given(None, None)
        batches = part.packed(tokens).batches
        found = []
        for batch in batches:
            old_N = batch.behavior_logp_N if several else None
            if several and self.loss.old_logps == "trainer":
                old_N = self._logp(self.model, batch)
                meter.difference(old_N, batch.behavior_logp_N)
            found.append(Given(old_N, self._reference_logp(batch) if self.policy_loss.beta else None))
        order = torch.cat([batch.token_N for batch in batches]).argsort()
        return Given(*(None if x[0] is None else torch.cat(x)[order] for x in zip(*found, strict=True)))

    def _optimize(self, part: Minibatch, given: Given, step: int, first: bool, tokens: int, meter: StepMeter) -> None:
        """One optimizer step over its micro-batches; `first`: no update of this rollout came before."""
        optimizer, sinks = self.optimizer, self.sinks
        assert optimizer is not None and sinks is not None, "a peer that only talks is not updated"
        optimizer.forget_gradients()
        sinks.clear()
        if self.graphs is not None:
            self.graphs.begin()
        with sinks.open():
            for batch in part.packed(tokens).batches:
                constants = given.at(batch.token_N)
                loss, stats = self._loss(batch, constants, sinks.head)
                with split_sums():
                    loss.backward()
                meter.loss(loss / self.loss_scale, stats)
                if first and (constants.old_logp_N is None or self.loss.old_logps == "engine"):
                    meter.difference(stats["logp_T"], batch.behavior_logp_N)
                del loss, stats
        outcome = optimizer.step(step, loss_scale=self.loss_scale, sinks=sinks.buffers)
        if outcome.skipped:
            self.loss_scale = max(1.0, self.loss_scale / 2)
        meter.outcomes.append(outcome)

    def _loss(self, batch: PackedBatch, given: Given, weight_grad_VD: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        hidden_ND, head = self._hidden(self.model, batch)
        return linear_policy_loss(
            hidden_ND,
            head.weight,
            batch.target_N,
            batch.advantage_N,
            batch.token_weight_N * self.loss_scale,
            old_logp_T=given.old_logp_N,
            ref_logp_T=given.ref_logp_N,
            behavior_logp_T=batch.behavior_logp_N if self.policy_loss.importance != "none" else None,
            turn_T=batch.turn_N,
            loss=self.policy_loss,
            bias_V=head.bias,
            temperature=self.run.rollout.temperature,
            softcap=head.softcap,
            chunk=rows_of(self.config.logits_mib, head.weight.shape[0], head.weight.element_size()),
            weight_grad_VD=weight_grad_VD,
        )

    def _hidden(self, model: Any, batch: PackedBatch) -> tuple[Tensor, LMHead]:
        """Hidden states of the trained rows, and the head; a scale of the logits is moved into both."""
        packed, hidden_TD = (batch.tokens_T, batch.positions_T, batch.plan), None
        if self.graphs is not None and torch.is_grad_enabled():
            hidden_TD = self.graphs.hidden(*packed)
        hidden_TD = packed_forward(model, *packed) if hidden_TD is None else hidden_TD
        hidden_ND, head = hidden_TD.index_select(0, batch.rows_N), lm_head_of(model)
        if head.scale == 1:
            return hidden_ND, head
        return hidden_ND * head.scale, head._replace(bias=None if head.bias is None else head.bias * head.scale)

    @torch.no_grad()
    def _logp(self, model: Any, batch: PackedBatch) -> Tensor:
        hidden_ND, head = self._hidden(model, batch)
        temperature = self.run.rollout.temperature
        logp_N = linear_logprob(
            hidden_ND, head.weight, batch.target_N, bias_V=head.bias, temperature=temperature, softcap=head.softcap
        )
        return logp_N

    def _reference_logp(self, batch: PackedBatch) -> Tensor:
        assert self.reference is not None, "a reference is held where beta is not 0"
        with self.model.disable_adapter() if self.reference is self.model else nullcontext():
            return self._logp(self.reference, batch)

    def _recompute(self) -> None:
        """From here on activations are recomputed, in an update that runs too."""
        recompute_activations(self.model)
        self.recomputes = True
        self.model.train()

    @contextmanager
    def _training(self, step: int) -> Iterator[None]:
        """Train mode where something needs it (dropout of adapters, checkpointing), with random numbers of its own."""
        if not self.recomputes and not (self.config.train == "lora" and self.config.lora.dropout):
            yield
            self.model.eval()  # recomputation may have begun meanwhile
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(hash((self.run.seed, step)))
            self.model.train()
            try:
                yield
            finally:
                self.model.eval()


def _skipped(meter: StepMeter) -> str | None:
    bad = sum(o.skipped for o in meter.outcomes)
    return f"the gradient is not finite in {bad} of {len(meter.outcomes)} updates" if bad else None
