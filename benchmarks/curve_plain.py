"""The curve of `ilr-fast bench curve` by GRPO in plain PyTorch: what the algorithm does, without anybody's trainer.

    python -m ilr_benchmarks.curve_plain bfloat16,autocast --seeds 1-8 --out DIR

Same problems, samples, rate and rewards; the seeds learn side by side in one process (curve_model.py). Precisions, each
with AdamW on float32 weights:

    autocast          float32 weights under bfloat16 autocast: embeddings, norms and residuals stay float32
    mixed             the same, but bfloat16 samples and is evaluated, as vLLM does beside TRL
    bfloat16          all in bfloat16, rounded from float32 copies after each step, as here (ilr_fast/copies.py)
    residual, norms, embeddings, …   bfloat16 but for these

Rows go to DIR/curve_plain.json as they come: `curve` of [step, held-out accuracy], `sampled` the share of right samples
of each step, `tokens` their mean length.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from ilr_benchmarks.common import row, write_results
from ilr_benchmarks.curve import (
    MODEL,
    MOST_TOKENS,
    QUESTIONS,
    RATE,
    SAMPLES,
    grade,
    prompt,
    read_problems,
    write_problems,
)
from ilr_benchmarks.curve_model import PRECISIONS, Cache, Llama
from torch import Tensor
from transformers import AutoTokenizer

from ilr_fast.models import resolve_model

SCALE = 2.0**12  # of float16's loss
STEPS, EVERY = 70, 10
Problem = dict[str, str]


class Texts:
    """Prompts as tokens of one length, answers as text."""

    def __init__(self, folder: Path, device: str):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.device = device
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._ids = lambda question: tokenizer(prompt(question))["input_ids"]
        self._texts = [tokenizer.decode([i], skip_special_tokens=True) for i in range(len(tokenizer))]
        self._ends = {i for i, text in enumerate(self._texts) if "\n" in text} | {tokenizer.eos_token_id}

    def prompts(self, questions_KQ: Sequence[Sequence[Problem]]) -> tuple[Tensor, Tensor]:
        """(ids, mask) [K, Q, P], padded on the left."""
        ids = [[self._ids(q["question"]) for q in questions] for questions in questions_KQ]
        longest = max(len(i) for part in ids for i in part)
        found = [[[self.pad] * (longest - len(i)) + i for i in part] for part in ids]
        mask = [[[0] * (longest - len(i)) + [1] * len(i) for i in part] for part in ids]
        return torch.tensor(found, device=self.device), torch.tensor(mask, device=self.device)

    def length(self, ids: Sequence[int]) -> int:
        """Tokens up to the first that ends an answer, itself included; all where none does."""
        return next((n for n, token in enumerate(ids, 1) if token in self._ends), len(ids))

    def read(self, ids: Sequence[int]) -> str:
        return "".join(self._texts[i] for i in ids)


class Samples:
    """Answers of K seeds: ids and mask [K, B, P + T], lengths and rewards [K, B], B a multiple of the questions."""

    def __init__(self, ids: Tensor, prompt_mask: Tensor, questions_KQ: Sequence[Sequence[Problem]], texts: Texts):
        each = ids.shape[1] // len(questions_KQ[0])
        lengths, rewards = [], []
        for answers, questions in zip(ids[..., -MOST_TOKENS:].tolist(), questions_KQ, strict=True):
            lengths.append([texts.length(a) for a in answers])
            said = [texts.read(a[:n]) for a, n in zip(answers, lengths[-1], strict=True)]
            rewards.append([grade(text, questions[i // each]["answer"]) for i, text in enumerate(said)])
        self.ids, self.rewards = ids, torch.tensor(rewards, device=ids.device)
        self.lengths = torch.tensor(lengths, device=ids.device)
        own = torch.arange(MOST_TOKENS, device=ids.device) < self.lengths[..., None]
        self.mask = torch.cat([prompt_mask.repeat_interleave(each, 1), own.long()], -1)


class Plain:
    """Models of K seeds and their AdamW; `teller` answers, `model` is updated: one where sampling is no less exact."""

    def __init__(self, folder: Path, precision: str, seeds: Sequence[int], device: str):
        kind = PRECISIONS[precision]
        self.scale = SCALE if kind.matrices == torch.float16 else 1.0
        self.model = Llama(folder, kind, seeds, device)
        self.teller = Llama(folder, PRECISIONS[kind.teller], seeds, device) if kind.teller else self.model
        self.teller.follow(self.model.masters)
        self.texts = Texts(folder, device)
        masters = list(self.model.masters.values())
        self.adamw = torch.optim.AdamW(masters, lr=RATE, betas=(0.9, 0.999), weight_decay=0.0, fused=True)

    @torch.no_grad()
    def answers(self, questions_KQ: Sequence[Sequence[Problem]], samples: int) -> Samples:
        """`samples` answers for each question at temperature 1, or, for 0, one that is greedy."""
        ids, mask = self.texts.prompts(questions_KQ)
        start_mask, cache = mask, Cache()
        logits = self.teller.logits(ids, mask, 1, cache)
        if samples:
            logits = [part.repeat_interleave(samples, 0) for part in logits]
            ids, mask = (x.repeat_interleave(samples, 1) for x in (ids, mask))
            cache.repeated(samples)
        for n in range(MOST_TOKENS):
            if samples:  # Gumbel's way to sample
                logits = [part - torch.empty_like(part).exponential_().log_() for part in logits]
            token = torch.stack([part.argmax(-1) for part in logits])
            ids, mask = torch.cat([ids, token], -1), torch.cat([mask, torch.ones_like(token)], -1)
            if n + 1 < MOST_TOKENS:
                logits = self.teller.logits(token, mask, 1, cache)
        return Samples(ids, start_mask, questions_KQ, self.texts)

    def learn(self, found: Samples, aggregation: str) -> None:
        """One update of each seed by its groups of SAMPLES answers."""
        groups = found.rewards.unflatten(1, (-1, SAMPLES))
        spreads = groups.std(2, keepdim=True) + 1e-4
        advantages = ((groups - groups.mean(2, keepdim=True)) / spreads).flatten(1)
        most = int((advantages != 0).sum(1).max())
        if not most:
            return
        live = (advantages == 0).int().argsort(dim=1, stable=True)[:, :most]  # what has no gradient is left out
        chosen = live[..., None].expand(-1, -1, found.ids.shape[-1])
        ids, mask = found.ids.gather(1, chosen), found.mask.gather(1, chosen)
        logps = self.model.logps(ids, mask, MOST_TOKENS)
        own = found.mask[..., -MOST_TOKENS:].float()
        if aggregation == "dapo":
            weights = own / own.sum((1, 2), keepdim=True)
        else:
            weights = own / own.sum(2, keepdim=True) / own.shape[1]
        loss = torch.zeros((), device=ids.device)
        for k, logp in enumerate(logps):
            loss = loss - (logp * advantages[k, live[k], None] * weights[k, live[k]]).sum()
        (loss * self.scale).backward()
        self.model.gradients(self.scale)
        self._clip()
        self.adamw.step()
        self.adamw.zero_grad()
        for model in {id(m): m for m in (self.model, self.teller)}.values():
            model.follow(self.model.masters)

    def _clip(self) -> None:
        """Each seed's gradient to a norm of 1 at most."""
        gradients = [m.grad.flatten(1) for m in self.model.masters.values() if m.grad is not None]
        norms = torch.stack([g.norm(dim=1) for g in gradients]).norm(dim=0)
        factors = (1 / (norms + 1e-6)).clamp(max=1)
        for gradient in gradients:
            gradient *= factors[:, None]


def learned(
    seeds: Sequence[int], precision: str, aggregation: str, steps: int, device: str, questions: int = QUESTIONS
) -> Iterator[list[dict[str, Any]]]:
    """Rows of the seeds, each time that they were evaluated."""
    train, held = [], []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            write_problems(Path(folder), seed)
            train.append(read_problems(Path(folder) / "train.jsonl"))
            held.append(read_problems(Path(folder) / "validation.jsonl"))
        random.Random(seed).shuffle(train[-1])
    torch.manual_seed(seeds[0])
    plain = Plain(resolve_model(MODEL), precision, seeds, device)
    curve, sampled, tokens = [], [], []
    for step in range(1, steps + 1):
        asked = [[part[((step - 1) * questions + i) % len(part)] for i in range(questions)] for part in train]
        found = plain.answers(asked, SAMPLES)
        plain.learn(found, aggregation)
        sampled.append(found.rewards.mean(1).tolist())
        tokens.append(found.lengths.float().mean(1).tolist())
        if step % EVERY == 0 or step == steps:
            curve.append((step, plain.answers([part[: questions * 8] for part in held], 0).rewards.mean(1).tolist()))
            yield [
                row(f"plain, {precision}", f"{aggregation}, seed {seed}", [], seed=seed, precision=precision,
                    aggregation=aggregation, curve=[[step, at[k]] for step, at in curve],
                    sampled=[at[k] for at in sampled], tokens=[at[k] for at in tokens])
                for k, seed in enumerate(seeds)
            ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO on sums in plain PyTorch")
    parser.add_argument("precisions", help=f"separated by commas, one after the other: {', '.join(PRECISIONS)}")
    parser.add_argument("--seeds", default="1-8", help="first-last, side by side")
    parser.add_argument("--rounds", type=int, default=1, help="again with the seeds that follow")
    parser.add_argument("--aggregation", choices=("grpo", "dapo"), default="dapo")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    first, last = (int(n) for n in options.seeds.split("-"))
    rows: list[dict[str, Any]] = []
    for turn in range(options.rounds):
        for precision in options.precisions.split(","):
            seeds = [seed + turn * (last + 1 - first) for seed in range(first, last + 1)]
            began, now = time.perf_counter(), []
            for now in learned(seeds, precision, options.aggregation, options.steps, device, options.questions):
                write_results("curve_plain", [*rows, *now], "python -m ilr_benchmarks.curve_plain", options.out)
                lately = statistics.mean(x for r in now for x in r["sampled"][-EVERY:])
                print(f"{time.perf_counter() - began:6.1f} s {precision} step {now[0]['curve'][-1][0]}:",
                      *(f"{100 * r['curve'][-1][1]:.1f}" for r in now), f"sampled {100 * lately:.1f}%",
                      flush=True)  # fmt: skip
            rows += now


if __name__ == "__main__":
    main()
