"""TRL's GRPO step on the same work as `bench step`, in a process of its own: prints a line of JSON for each step.

    python -m ilr_benchmarks.step_trl '{"shape": "Qwen/Qwen2.5-1.5B-Instruct", "settings": [{}, …], …}'

`GRPOTrainer` with vLLM in its process, importance correction as it is by default, completions of the forced length,
rewards by chance. Each setting is trained for some steps by a trainer of its own; vLLM is opened once, since its
settings are the same for all. A setting that runs out of memory is told as such; one that has run makes those needless
that differ from it in a smaller micro-batch alone. Settings, all of TRL's own:

    micro_batch    per_device_train_batch_size; gradient accumulation makes it the same step
    checkpointing  gradient_checkpointing
    liger          use_liger_kernel (its layers; the loss is TRL's own); last, since it changes the model for good
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1")
os.environ.update(VLLM_LOGGING_LEVEL="ERROR", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost")

import torch
import transformers
from ilr_benchmarks.shapes import shape_config, small_shape, write_shape
from ilr_benchmarks.step_case import PROMPT, TEMPLATE

from ilr_fast.card import PeakSampler


def main(asked: dict[str, Any]) -> None:
    """Trains each setting and prints its steps."""
    with PeakSampler() as sampler:
        folder = _model(asked, Path(asked["folder"]))
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, chat_template=TEMPLATE)
        tokenizer.pad_token = tokenizer.eos_token
        transformers.AutoTokenizer.from_pretrained = lambda *_, **__: tokenizer  # the shapes' is of no model's class
        opened = _open_vllm_once()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=_dtype())
        ran: list[dict[str, Any]] = []
        for setting in asked["settings"]:
            if setting | {"micro_batch": 0} in ran:
                continue
            begun = time.perf_counter()
            try:
                _train(asked, setting, model, tokenizer, sampler)
                ran.append(setting | {"micro_batch": 0})
            except torch.OutOfMemoryError as error:
                print(json.dumps({"setting": setting, "failed": str(error).splitlines()[0][:200]}), flush=True)
            print(json.dumps({"setting": setting, "ended": time.perf_counter() - begun}), flush=True)
            model.zero_grad(set_to_none=True)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        del opened


def _model(asked: Mapping[str, Any], folder: Path) -> Path:
    """A folder with random weights."""
    target = (small_shape if asked["quick"] else write_shape)(asked["shape"], folder)
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(target) if asked["quick"] else shape_config(asked["shape"])
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        transformers.AutoModelForCausalLM.from_config(config, dtype=_dtype()).save_pretrained(target)
    return target


def _dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def _open_vllm_once() -> list[Any]:
    """Trainers after the first use its engine, which holds nothing of theirs but the model that it reads."""
    from trl.trainer import grpo_trainer

    make, opened = grpo_trainer.VLLMGeneration, []

    def once(**given: Any) -> Any:
        if not opened:
            opened.append(make(**given))
        opened[0].model, opened[0].accelerator = given["model"], given["accelerator"]
        return opened[0]

    grpo_trainer.VLLMGeneration = once
    return opened


def _train(asked: Mapping[str, Any], setting: Mapping[str, Any], model: Any, tokenizer: Any, sampler: Any) -> None:
    import pyarrow
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    cuda = torch.cuda.is_available()
    batch, micro = asked["questions"] * asked["samples"], setting["micro_batch"]
    config = GRPOConfig(
        output_dir=str(Path(asked["folder"]) / "trl"),
        use_vllm=cuda,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=asked.get("utilization", 0.3),
        vllm_max_model_length=asked["context"],
        num_generations=asked["samples"],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // micro,
        max_completion_length=asked["forced"],
        max_steps=asked["steps"],
        beta=0.0,
        bf16=cuda,
        use_cpu=not cuda,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        learning_rate=1e-6,
        gradient_checkpointing=setting["checkpointing"],
        use_liger_kernel=setting.get("liger", False),
        generation_kwargs={"ignore_eos": True} if cuda else {"min_new_tokens": asked["forced"]},
        optim="adamw_torch_fused",
        disable_tqdm=True,
    )
    draw = random.Random("train")
    words = 900 if asked["quick"] else 100_000
    questions = [" ".join(f"w{draw.randrange(5, words)}" for _ in range(PROMPT - 3)) for _ in range(batch)]
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in questions]
    data = Dataset(pyarrow.Table.from_pylist(rows), fingerprint="step")
    trainer = GRPOTrainer(
        model=model, processing_class=tokenizer, args=config, train_dataset=data,
        reward_funcs=lambda completions, **_: [random.random() for _ in completions],
        callbacks=[_Clock(setting, sampler)],
    )  # fmt: skip
    trainer.train()


class _Clock(transformers.TrainerCallback):
    """Prints what each step took, with what TRL itself says of its parts."""

    def __init__(self, setting: Mapping[str, Any], sampler: PeakSampler):
        self.setting, self.sampler, self.start = setting, sampler, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The clock starts."""
        self.start = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The clock stops."""
        peak = self.sampler.take()
        told = {"setting": self.setting, "step": state.global_step, "seconds": _now() - self.start,
                "memory_gib": None if peak is None else peak / 2**30}  # fmt: skip
        print(json.dumps(told), flush=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """TRL's own figures of a step."""
        kept = ("profiling", "completions/mean_length", "logp_difference/mean", "step_time", "grad_norm")
        numbers = {k: v for k, v in (logs or {}).items() if any(word in k for word in kept)}
        if numbers:
            print(json.dumps({"setting": self.setting, "logs": numbers}, default=str), flush=True)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
