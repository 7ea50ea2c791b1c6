"""TRL's side of `ilr-fast bench curve`: its GRPOTrainer with vLLM in the same process, as TRL has it by default.

    python -m ilr_benchmarks.curve_trl --folder DIR --seed 1 --steps 60 --every 5 --lr 2e-5 --device cuda

Reads train.jsonl and validation.jsonl in the folder and writes trl.jsonl, a line as soon as a step or an evaluation is
over. Weights are float32 under bfloat16 autocast, TRL's default. Held-out answers are greedy, on a GPU by TRL's own
vLLM, which is given the weights for it as before a rollout (and again before the next one), on the CPU by transformers.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pyarrow
import torch
from datasets import Dataset
from ilr_benchmarks.curve import MODEL, MOST_TOKENS, QUESTIONS, SAMPLES, grade, prompt, read_problems
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from ilr_fast.models import resolve_model

LONGEST = 256  # tokens, as in configs/gpu/sums.yaml


class Curve(TrainerCallback):
    """Times steps and evaluates between them."""

    def __init__(self, folder: Path, tokenizer: Any, every: int, held: int | None = None):
        self.file, self.tokenizer, self.every = folder / "trl.jsonl", tokenizer, every
        self.held = read_problems(folder / "validation.jsonl")[:held]
        self.trainer: Any = None
        self.seconds = self.began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.file.write_text("")
        self.evaluate(0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.began = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        spent = now() - self.began
        self.seconds += spent
        self.write({"step": state.global_step, "step_seconds": spent})
        if state.global_step % self.every == 0:
            self.evaluate(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        if "reward" in (logs or {}):
            told = {"reward": float(logs["reward"]), "tokens": float(logs["completions/mean_length"])}
            self.write({"step": state.global_step, **told})

    def evaluate(self, step: int) -> None:
        """Greedy accuracy on the held-out problems."""
        said = self.answers([prompt(q["question"]) for q in self.held])
        right = sum(grade(text, q["answer"]) for text, q in zip(said, self.held, strict=True))
        self.write({"step": step, "seconds": self.seconds, "accuracy": right / len(self.held), "at": time.time()})

    @torch.no_grad()
    def answers(self, texts: list[str]) -> list[str]:
        """What the model says to each of them, greedily."""
        if not self.trainer.use_vllm:
            return self.answers_of_transformers(texts)
        from vllm import SamplingParams

        engine = self.trainer.vllm_generation
        engine.sync_weights()
        prompts = [{"prompt_token_ids": ids} for ids in self.tokenizer(texts)["input_ids"]]
        greedy = SamplingParams(temperature=0.0, max_tokens=MOST_TOKENS, stop=["\n"])
        return [told.outputs[0].text for told in engine.llm.generate(prompts, greedy, use_tqdm=False)]

    def answers_of_transformers(self, texts: list[str]) -> list[str]:
        """The same without vLLM."""
        model = self.trainer.model
        training = model.training
        model.eval()
        batch = self.tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
        out = model.generate(**batch, max_new_tokens=MOST_TOKENS, do_sample=False,
                             pad_token_id=self.tokenizer.pad_token_id)  # fmt: skip
        model.train(training)
        return self.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    def write(self, line: dict[str, Any]) -> None:
        with open(self.file, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def settings(options: argparse.Namespace) -> GRPOConfig:
    """TRL's defaults but for the samples, the rate, the limit, the end of an answer, and vLLM in this process."""
    on_gpu = options.device == "cuda"
    stop = {"generation_kwargs": {"stop": ["\n"], "include_stop_str_in_output": True}} if on_gpu else {}
    vllm = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": options.memory,
            "vllm_max_model_length": LONGEST} if on_gpu else {}  # fmt: skip
    return GRPOConfig(
        output_dir=str(options.folder / "trl"), num_generations=SAMPLES, learning_rate=options.lr, seed=options.seed,
        per_device_train_batch_size=SAMPLES * (QUESTIONS if on_gpu else 1), gradient_accumulation_steps=1,
        max_completion_length=MOST_TOKENS, max_steps=options.steps, beta=0.0, bf16=on_gpu, use_cpu=not on_gpu,
        temperature=1.0, lr_scheduler_type="constant", gradient_checkpointing=False,
        logging_steps=options.every, report_to=[], save_strategy="no", disable_tqdm=True, **vllm, **stop,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="TRL's learning curve on sums")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--held", type=int, help="only the first of the held-out problems")
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--memory", type=float, default=0.3, help="share of the GPU's memory that vLLM may take")
    for name in ("seed", "steps", "every"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    model = str(resolve_model(MODEL))
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = read_problems(options.folder / "train.jsonl")
    answers = {prompt(q["question"]): q["answer"] for q in rows}

    def reward(prompts: list[str], completions: list[str], **more: Any) -> list[float]:
        return [grade(text, answers[asked]) for asked, text in zip(prompts, completions, strict=True)]

    curve = Curve(options.folder, tokenizer, options.every, options.held)
    data = Dataset(pyarrow.Table.from_pylist([{"prompt": asked} for asked in answers]), fingerprint="sums")
    curve.trainer = GRPOTrainer(model=model, reward_funcs=reward, args=settings(options), train_dataset=data,
                                callbacks=[curve])  # fmt: skip
    curve.trainer.train()


if __name__ == "__main__":
    main()
