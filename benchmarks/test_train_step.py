"""One training step of "64 samples of 12 tokens on sums", against the same step on padded batches, on the CPU.

8 questions × 8 samples; forward, loss, backward, clipping and AdamW, in float32. Two loads:

- `sampled`: SmolLM2-135M's own samples for "Question: What is 17 + 26?"; groups of equal rewards are dropped by all;
- `random`: random weights and samples, every sample with an advantage, nothing shared but the prompts (of 15 tokens, 5
  common to all questions): the most that such a step can cost.

Peers, both in plain transformers and torch:

    padded           as it is mostly written: logits of the whole batch, log_softmax, AdamW as it comes
    padded, careful  logits of the sampled tokens only, fused AdamW

Variants run interleaved in one process; before any time is taken their gradient norms are compared (`error`).
`limit_ms` is the time of the step's matrix products alone, each distinct token once.

    pytest benchmarks/test_train_step.py        # writes benchmarks/results/train_step_cpu.json
"""

from __future__ import annotations

import asyncio
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

sys.path.insert(0, str(Path(__file__).parent))
from common import row, write_results

from ilr_fast.agent import Agent
from ilr_fast.allocator import keep_freed_memory
from ilr_fast.config import AgentConfig, Config, OptimizerConfig
from ilr_fast.engines.embedded import EmbeddedEngine
from ilr_fast.errors import UserError
from ilr_fast.models import get_model
from ilr_fast.types import Generation, Sampling, TrainingSequence, TrainingTurn

REPEATS = 5
PROMPT, SAMPLED = 15, 12
LR = 1e-6
SHAPES = {
    "SmolLM2-135M": lambda: transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    ),
    "Gemma-3-270M": lambda: transformers.Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, sliding_window=512,
    ),
}  # fmt: skip


def save(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(SHAPES[name]()).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"w": 0}, unk_token="w"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def samples(vocabulary: int) -> list[TrainingSequence]:
    draw = random.Random(0)
    words = lambda n: [draw.randrange(3, vocabulary) for _ in range(n)]  # noqa: E731
    common, sequences = words(5), []
    for question in range(8):
        prompt = common + words(PROMPT - 5)
        for sample in range(8):
            turn = TrainingTurn(PROMPT, PROMPT + SAMPLED, draw.gauss(0, 1), (-8.0,) * SAMPLED)
            sequences.append(TrainingSequence(f"q{question}", sample, tuple(prompt + words(SAMPLED)), (turn,)))
    return sequences


def sampled(folder: Path) -> list[TrainingSequence]:
    """What the model itself says to sums of two-digit numbers, with plain GRPO's advantages."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine, draw, sequences = EmbeddedEngine(model, tokenizer), random.Random(0), []

    async def ask(prompt: list[int], question: int) -> list[Generation]:
        wanted = [Sampling(SAMPLED, seed=8 * question + sample) for sample in range(8)]
        return list(await asyncio.gather(*(engine.generate(prompt, sampling) for sampling in wanted)))

    for question in range(8):
        a, b = draw.randrange(10, 50), draw.randrange(10, 50)
        prompt = tokenizer.encode(f"Question: What is {a} + {b}?\nAnswer:")
        generations = asyncio.run(ask(prompt, question))
        right = torch.tensor([float(str(a + b) in re.findall(r"\d+", g.text)) for g in generations])
        advantages = ((right - right.mean()) / (right.std() + 1e-4)).tolist()
        for sample, (g, advantage) in enumerate(zip(generations, advantages, strict=True)):
            turn = TrainingTurn(len(prompt), len(prompt) + SAMPLED, advantage, g.logps)
            sequences.append(TrainingSequence(f"q{question}", sample, (*prompt, *g.tokens), (turn,)))
    return sequences


class Padded:
    """GRPO on one padded batch."""

    def __init__(self, folder: Path, careful: bool):
        self.careful = careful
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.adamw = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.0, fused=careful or None)

    def step(self, sequences: list[TrainingSequence]) -> float:
        live = [s for s in sequences if s.turns[0].advantage]
        ids_ST, sampled_ST = torch.tensor([s.tokens for s in live]), torch.tensor([s.tokens[-SAMPLED:] for s in live])
        advantage_S1 = torch.tensor([[s.turns[0].advantage] for s in live])
        keep = SAMPLED + 1 if self.careful else 0
        logits = self.model(ids_ST, attention_mask=torch.ones_like(ids_ST), logits_to_keep=keep).logits[
            :, -SAMPLED - 1 : -1
        ]
        logp_ST = logits.log_softmax(-1).gather(-1, sampled_ST[..., None])[..., 0]
        loss = -(torch.exp(logp_ST - logp_ST.detach()) * advantage_S1).sum() / (len(sequences) * SAMPLED)
        self.adamw.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0))
        self.adamw.step()
        return norm


class Ours:
    """The agent's update."""

    def __init__(self, folder: Path):
        agent = AgentConfig(
            model=str(folder), device="cpu", dtype="float32", optimizer=OptimizerConfig(lr=LR, beta2=0.999)
        )
        self.agent, self.steps = Agent("ada", agent, Config(agents={"ada": agent})), 0

    def step(self, sequences: list[TrainingSequence]) -> float:
        self.steps += 1
        norm = self.agent.update(sequences, self.steps).metrics["grad_norm"]
        assert norm is not None
        return norm


def products_seconds(model: torch.nn.Module, tokens: int, trained: int) -> float:
    """Forward and both backward products of every linear layer over `tokens` rows, of the LM head over `trained`."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    layers = [
        (m.weight.detach(), trained if m is head else tokens) for m in model.modules() if isinstance(m, torch.nn.Linear)
    ]
    inputs = {(n, d): torch.randn(n, d) for w, n in layers for d in w.shape}
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for weight, n in layers:
            x_ND, g_NV = inputs[n, weight.shape[1]], inputs[n, weight.shape[0]]
            torch.mm(x_ND, weight.t()), torch.mm(g_NV, weight), torch.mm(g_NV.t(), x_ND)
        times.append(time.perf_counter() - start)
    return min(times)


def measure(name: str, folder: Path, load: str, sequences: list[TrainingSequence], careless: bool) -> list[dict]:
    ours, careful = Ours(folder), Padded(folder, True)
    variants: dict[str, Callable[[list[TrainingSequence]], float]] = {
        "ilr-fast": ours.step,
        "padded, careful": careful.step,
    }
    if careless:
        variants["padded"] = Padded(folder, False).step
    norms = {variant: step(sequences) for variant, step in variants.items()}
    error = abs(norms["ilr-fast"] / norms["padded, careful"] - 1)
    assert error < 1e-4, f"gradient norms differ by {error}: no times"
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(REPEATS):
        for variant, step in variants.items():
            start = time.perf_counter()
            step(sequences)
            seconds[variant].append(time.perf_counter() - start)
    (batch,) = ours.agent._pack(sequences).batches
    limit = products_seconds(careful.model, len(batch.tokens_T), len(batch.rows_N))
    shape = f"{name} float32, 8 questions x 8 samples x {SAMPLED} tokens, {load}: {len(batch.rows_N)} trained"
    rows = []
    for variant, times in seconds.items():
        rows.append(row(variant, shape, times, error=error if variant == "ilr-fast" else None, limit_seconds=limit))
        print(f"{name:14} {load:8} {variant:16} {sorted(times)[REPEATS // 2]:6.2f} s (products {limit:.2f} s)")
    return rows


def test_train_step_against_padded_batches(tmp_path_factory: pytest.TempPathFactory) -> None:
    transformers.logging.set_verbosity_error()
    keep_freed_memory()
    rows = []
    try:
        folder = get_model("smollm2-135m-instruct")
        rows += measure("SmolLM2-135M", folder, "sampled", sampled(folder), careless=True)
    except UserError as error:  # its package is not installed
        print(f"without the load `sampled`: {error}")
    for name in SHAPES:
        folder = save(tmp_path_factory.mktemp("models"), name)
        sequences = samples(SHAPES[name]().vocab_size)
        # Gemma's logits of the whole padded batch would take 7 GiB.
        rows += measure(name, folder, "random", sequences, careless=name == "SmolLM2-135M")
    write_results("train_step_cpu", rows, "pytest benchmarks/test_train_step.py")
