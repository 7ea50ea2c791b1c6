"""The curve of `ilr-fast bench curve` by GRPO in plain PyTorch: what the algorithm does, without anybody's trainer.

    python -m ilr_benchmarks.curve_plain 1,2,3 --precision autocast --aggregation dapo --out DIR

Same problems, samples, rate and rewards; transformers samples and evaluates too, one seed after the other. AdamW works
on float32 weights in all of them:

    autocast    float32 weights under bfloat16 autocast: embeddings, norms and residuals stay float32
    mixed       the same, but a copy in bfloat16 samples and is evaluated, as vLLM does beside TRL
    bfloat16    all of the model in bfloat16, rounded from float32 copies after each step, as here (ilr_fast/copies.py)
    float16     the same in float16, the loss scaled

Rows go to DIR/curve_plain.json as they come: `curve` of [step, held-out accuracy], `sampled` the share of right samples
of each step.
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ilr_benchmarks.common import row, write_results
from ilr_benchmarks.curve import (
    EVERY,
    MODEL,
    MOST_TOKENS,
    QUESTIONS,
    RATE,
    SAMPLES,
    STEPS,
    grade,
    prompt,
    read_problems,
    write_problems,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ilr_fast.copies import spread
from ilr_fast.models import resolve_model

SCALE = 2.0**12  # of float16's loss
WIDTHS = {"autocast": torch.float32, "mixed": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Plain:
    """A model, its tokenizer and AdamW; `masters` are the float32 weights, `teller` is the model that answers."""

    def __init__(self, folder: Path, precision: str, seed: int, device: str):
        self.device, self.cast = device, precision in ("autocast", "mixed")
        self.scale = SCALE if precision == "float16" else 1.0
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.to(device).eval()
        self.model.to(WIDTHS[precision])
        self.teller = copy.deepcopy(self.model).to(torch.bfloat16) if precision == "mixed" else self.model
        self.weights = list(self.model.parameters())
        self.masters = [p if self.cast else torch.nn.Parameter(spread(p, seed, i)) for i, p in enumerate(self.weights)]
        self.adamw = torch.optim.AdamW(self.masters, lr=RATE, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
        texts = [self.tokenizer.decode([i]) for i in range(len(self.tokenizer))]
        self.ends = {i for i, text in enumerate(texts) if "\n" in text} | {self.tokenizer.eos_token_id}

    def autocast(self, model: Any) -> AbstractContextManager[Any]:
        """Float32 weights compute in bfloat16."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.cast and model.dtype == torch.float32)

    @torch.no_grad()
    def answers(self, questions: Sequence[dict[str, str]], samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """(prompts and answers [B, P + T], their mask without what follows an end, the answers' lengths [B]); `samples`
        answers for each question at temperature 1, or, for 0, one that is greedy."""
        texts = [prompt(q["question"]) for q in questions]
        batch = self.tokenizer(texts, return_tensors="pt", padding=True).to(self.device)
        how: dict[str, Any] = {"do_sample": False}
        if samples:
            how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": samples}
        with self.autocast(self.teller):
            out = self.teller.generate(**batch, max_new_tokens=MOST_TOKENS, **how,
                                       pad_token_id=self.tokenizer.pad_token_id)  # fmt: skip
        start = batch["input_ids"].shape[1]
        out = F.pad(out, (0, start + MOST_TOKENS - out.shape[1]), value=self.tokenizer.pad_token_id)
        lengths = torch.tensor([first_end(ids, self.ends) for ids in out[:, start:].tolist()], device=self.device)
        own = torch.arange(out.shape[1] - start, device=self.device) < lengths[:, None]
        return out, torch.cat([batch["attention_mask"].repeat_interleave(samples or 1, 0), own.long()], 1), lengths

    def rewards(self, out: Tensor, lengths: Tensor, questions: Sequence[dict[str, str]]) -> Tensor:
        """1 for the right number on the first line [B]."""
        each = len(out) // len(questions)
        answers = zip(out[:, -MOST_TOKENS:].tolist(), lengths.tolist(), strict=True)
        texts = [self.tokenizer.decode(ids[:n], skip_special_tokens=True) for ids, n in answers]
        return torch.tensor([grade(text, questions[i // each]["answer"]) for i, text in enumerate(texts)])

    def learn(self, out: Tensor, mask: Tensor, lengths: Tensor, rewards: Tensor, aggregation: str) -> None:
        """One update by the groups of SAMPLES answers."""
        groups = rewards.view(-1, SAMPLES)
        spreads = groups.std(1, keepdim=True) + 1e-4
        advantages = ((groups - groups.mean(1, keepdim=True)) / spreads).view(-1).to(self.device)
        live = advantages.nonzero()[:, 0]
        if not len(live):
            return
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with self.autocast(self.model):
            logits = self.model(input_ids=out[live], attention_mask=mask[live], position_ids=positions[live],
                                logits_to_keep=MOST_TOKENS + 1).logits[:, :-1]  # fmt: skip
        logp = torch.log_softmax(logits.float(), -1).gather(-1, out[live, -MOST_TOKENS:, None])[..., 0]
        own = mask[:, -MOST_TOKENS:].float()
        weights = own / own.sum() if aggregation == "dapo" else own / own.sum(1, keepdim=True) / len(own)
        (-(logp * advantages[live, None] * weights[live]).sum() * self.scale).backward()
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight is not master:
                master.grad, weight.grad = weight.grad.float() / self.scale, None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.adamw.step()
        self.adamw.zero_grad()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                if weight is not master:
                    weight.copy_(master)
            if self.teller is not self.model:
                for weight, master in zip(self.teller.parameters(), self.masters, strict=True):
                    weight.copy_(master)


def first_end(ids: Sequence[int], ends: set[int]) -> int:
    """Tokens up to the first that ends an answer, itself included; all where none does."""
    return next((n for n, token in enumerate(ids, 1) if token in ends), len(ids))


def learned(seed: int, precision: str, aggregation: str, steps: int, device: str) -> dict[str, Any]:
    """The row of one seed."""
    with tempfile.TemporaryDirectory() as folder:
        write_problems(Path(folder), seed)
        train, held = (read_problems(Path(folder) / f"{name}.jsonl") for name in ("train", "validation"))
    torch.manual_seed(seed)
    plain = Plain(resolve_model(MODEL), precision, seed, device)
    random.Random(seed).shuffle(train)
    curve, sampled, tokens = [], [], []
    for step in range(1, steps + 1):
        questions = [train[((step - 1) * QUESTIONS + i) % len(train)] for i in range(QUESTIONS)]
        out, mask, lengths = plain.answers(questions, SAMPLES)
        rewards = plain.rewards(out, lengths, questions)
        plain.learn(out, mask, lengths, rewards, aggregation)
        sampled.append(float(rewards.mean()))
        tokens.append(float(lengths.float().mean()))
        if step % EVERY == 0:
            out, _, lengths = plain.answers(held, 0)
            curve.append([step, float(plain.rewards(out, lengths, held).mean())])
    return row(f"plain, {precision}", f"{aggregation}, seed {seed}", [], seed=seed, precision=precision,
               aggregation=aggregation, curve=curve, sampled=sampled, tokens=tokens)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO on sums in plain PyTorch")
    parser.add_argument("seeds", help="separated by commas")
    parser.add_argument("--precision", choices=WIDTHS, default="autocast")
    parser.add_argument("--aggregation", choices=("grpo", "dapo"), default="dapo")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for seed in options.seeds.split(","):
        rows.append(learned(int(seed), options.precision, options.aggregation, options.steps, device))
        write_results("curve_plain", rows, "python -m ilr_benchmarks.curve_plain", options.out)


if __name__ == "__main__":
    main()
