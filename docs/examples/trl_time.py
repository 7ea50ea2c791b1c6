"""Times TRL's training step before and after `trl_patch.patch`: milliseconds and peak memory, as JSON.

A model of random weights, prompts and completions of random tokens, no generation: what is timed is `compute_loss` and
backward of one micro-batch, as TRL's trainer calls them, the variants in turns. Loss and gradient are compared with
TRL's own first, and a time is given only where they agree. `head` is the patch where it falls back on TRL's loss (our
log-probs alone), `liger` is liger-kernel's `LigerFusedLinearGRPOLoss` on the same hidden states, where it is installed
(TRL 1.16 itself takes only layers from there).

    python docs/examples/trl_time.py --shape 1.5b --batch 16 --completion 512 --out trl_step.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from trl_patch import in_one_dtype, patch

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "tiny": (32, 64, 2, 4, 2, 301),
    "0.5b": (896, 4864, 24, 14, 2, 151936),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
    "3b": (2048, 11008, 36, 16, 2, 151936),
}
PROMPT_TOKENS = 128
MOST_ERROR = 0.1  # of the loss or the gradient, beside TRL's, both in bfloat16


def make_trainer(shape: str, batch: int, completion: int, device: str, **settings: Any) -> Any:
    """TRL's trainer over a Qwen2 of random weights; its tokenizer has two tokens, since nothing is generated."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from tokenizers import Tokenizer, models
    from trl import GRPOConfig, GRPOTrainer

    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    config = transformers.Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=shape != "tiny",
    )
    on_gpu = device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    vocabulary_of_two = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabulary_of_two, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    args = GRPOConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        num_generations=batch,
        max_completion_length=completion,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        report_to=[],
        **settings,
    )
    # with a fingerprint given, datasets need not pickle the table to find one
    data = Dataset(InMemoryTable.from_pydict({"prompt": ["x"] * batch}), fingerprint="prompts")
    trainer = GRPOTrainer(model, lambda completions, **_: [0.0] * len(completions), args, data, None, tokenizer)
    trainer.current_gradient_accumulation_steps = 1  # the training loop sets it
    trainer.model.train()
    return trainer


def make_inputs(trainer: Any, batch: int, completion: int) -> dict[str, torch.Tensor]:
    """What TRL hands to compute_loss: completions of completion / 2 to completion tokens, group advantages."""
    g = torch.Generator().manual_seed(1)
    vocabulary = trainer.model.config.vocab_size
    length_B1 = torch.randint(completion // 2, completion + 1, (batch, 1), generator=g)
    mask_BC = (torch.arange(completion) < length_B1).long()
    inputs = {
        "prompt_ids": torch.randint(2, vocabulary, (batch, PROMPT_TOKENS), generator=g),
        "prompt_mask": torch.ones(batch, PROMPT_TOKENS, dtype=torch.long),
        "completion_ids": torch.randint(2, vocabulary, (batch, completion), generator=g),
        "completion_mask": mask_BC,
        "advantages": torch.randn(batch, generator=g),
        "num_items_in_batch": mask_BC.sum(),
    }
    return {name: x.to(trainer.accelerator.device) for name, x in inputs.items()}


def train_step(trainer: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Loss and gradients of one micro-batch."""
    loss = trainer.compute_loss(trainer.model, inputs)
    trainer.accelerator.backward(loss)
    return loss.detach()


def liger_step(trainer: Any, inputs: dict[str, torch.Tensor], head: Any) -> torch.Tensor:
    """The same with Liger's head on the same hidden states."""
    model, c = trainer.model, inputs["completion_ids"].shape[1]
    with trainer.accelerator.autocast():
        tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        hidden = model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        hidden, weight, _ = in_one_dtype(hidden[:, -c - 1 : -1], model.lm_head.weight, None)
    loss, _ = head(hidden, weight, inputs["completion_ids"], inputs["completion_mask"], inputs["advantages"])
    trainer.accelerator.backward(loss)
    return loss.detach()


@contextmanager
def variant(name: str, trainer: Any):
    """The trainer's step with TRL's head and loss, with ours, or with our log-probs under TRL's loss."""
    if name == "trl":
        yield lambda inputs: train_step(trainer, inputs)
        return
    if name == "liger":
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        head = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type=trainer.loss_type)
        yield lambda inputs: liger_step(trainer, inputs, head)
        return
    trl_loss = type(trainer)._compute_loss
    undo = patch(type(trainer), strict=True)
    if name == "head":
        type(trainer)._compute_loss = trl_loss
    try:
        yield lambda inputs: train_step(trainer, inputs)
    finally:
        undo()


def first_step(name: str, trainer: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A variant's loss and its gradient of the LM head, after which everything is compiled."""
    for _ in range(2):
        trainer.model.zero_grad(set_to_none=True)
        with variant(name, trainer) as step:
            loss = step(inputs)
    gradient = trainer.model.get_output_embeddings().weight.grad.clone()
    trainer.model.zero_grad(set_to_none=True)
    return loss, gradient


def timed_step(name: str, trainer: Any, inputs: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Milliseconds by device events, and GiB at the peak beyond what was held before (gradients are in it)."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    held = torch.cuda.memory_allocated()
    with variant(name, trainer) as step:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start.record()
        step(inputs)
        end.record()
    torch.cuda.synchronize()
    gib = (torch.cuda.max_memory_allocated() - held) / 2**30
    trainer.model.zero_grad(set_to_none=True)
    return start.elapsed_time(end), gib


def errors_beside_trl(names: list[str], trainer: Any, inputs: dict[str, torch.Tensor]) -> dict[str, float | str]:
    """Each variant's relative error to TRL in loss and gradient, whichever is larger, or why there is none."""
    loss, gradient = first_step("trl", trainer, inputs)
    found: dict[str, float | str] = {}
    for name in names:
        try:
            its_loss, its_gradient = first_step(name, trainer, inputs)
        except Exception as error:  # a peer that is missing, does not compile or needs more memory than there is
            if name == "patched":
                raise
            found[name] = f"{type(error).__name__}: {error}"[:200]
            continue
        of_gradient = (its_gradient - gradient).float().norm() / gradient.float().norm()
        found[name] = max(float((its_loss - loss).abs() / loss.abs()), float(of_gradient))
        if found[name] > MOST_ERROR:  # type: ignore[operator]
            found[name] = f"off by {found[name]:.3f}: no time is given"
    return found


def output(*command: str) -> str | None:
    """What a command prints, None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description="TRL's training step before and after the patch")
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--batch", type=int, default=16, help="completions in a micro-batch")
    parser.add_argument("--completion", type=int, default=512, help="most tokens of a completion")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--variants", default="trl,head,patched,liger")
    parser.add_argument("--out", type=Path, default=Path("trl_step.json"))
    args = parser.parse_args()
    trainer = make_trainer(args.shape, args.batch, args.completion, "cuda", loss_type="bnpo")
    trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = make_inputs(trainer, args.batch, args.completion)
    errors = errors_beside_trl(args.variants.split(","), trainer, inputs)
    measured = [name for name, error in errors.items() if not isinstance(error, str)]
    torch.cuda.empty_cache()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in measured}
    for _ in range(args.rounds):
        for name in measured:
            taken[name].append(timed_step(name, trainer, inputs))
    shape = f"{args.shape}, {args.batch} x ({PROMPT_TOKENS} + {args.completion}) tokens, bf16, gradient checkpointing"
    rows = []
    for name, error in errors.items():
        ms, gib = zip(*taken[name], strict=True) if name in taken else ((), ())
        times = {"ms": statistics.median(ms), "ms_min": min(ms), "ms_max": max(ms), "extra_gib": max(gib)} if ms else {}
        empty = dict.fromkeys(("ms", "ms_min", "ms_max", "extra_gib", "limit_ms", "over_limit"))
        rows.append({"variant": name, "shape": shape, **empty, **times, "error": error})
        print(json.dumps(rows[-1]))
    versions = {name: metadata.version(name) for name in ("torch", "triton", "transformers", "trl")}
    found = {
        "device": torch.cuda.get_device_name(),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": versions,
        "commit": os.environ.get("ILR_COMMIT") or output("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python " + " ".join(sys.argv),
        "rows": rows,
    }
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
