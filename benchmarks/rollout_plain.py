"""vLLM by itself for the work of the rollout benchmark: `LLM.generate` in one call, or in a call for every stage.

In one call all turns come after a prompt of their own, as if none waited for another. `same_settings` runs beside our
engine, in its process. `own_defaults` is vLLM as its users have it: in a process of its own, its core in another one,
vLLM's compiler and all sizes of its CUDA graphs; ours are the lengths, the slots, the context and the cache's size.
Texts are not decoded: there is no tokenizer.

    python -m ilr_benchmarks.rollout_plain '{"family": "qwen", "slots": 512, "rounds": 1, …}'      # prints JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from ilr_benchmarks.rollout_engine import timed
from ilr_benchmarks.rollout_load import BETWEEN, TURNS, Load, random_model

from ilr_fast.engines.vllm_core import CoreOptions, plain_llm, save_config
from ilr_fast.engines.vllm_fit import GIB

TIMEOUT = 300  # seconds of the process, its start included


def same_settings(
    model: Any, options: CoreOptions, load: Load, rounds: int, device: str
) -> Iterator[tuple[str, list[float]]]:
    """Seconds of vLLM with the settings of our engine, in this process: of `one_call`, then of `stages`."""
    with tempfile.TemporaryDirectory() as folder:
        llm = plain_llm(model, options, folder, torch.device(device))
        yield from _seconds(llm, load, rounds)


def own_defaults(
    family: str, options: CoreOptions, load: Load, rounds: int, quick: bool, device: str
) -> dict[str, list[float]]:
    """The same with vLLM's own defaults, `no_logps` in one call, and its `start`. RuntimeError if it fails."""
    given = dict(
        family=family, slots=options.slots, context=options.max_context, cache_gib=options.cache_gib, rounds=rounds,
        quick=quick, device=device, dialogues=len(load.prompts), most=int(load.lengths.max()),
    )  # fmt: skip
    command = [sys.executable, "-m", "ilr_benchmarks.rollout_plain", json.dumps(given)]
    ours = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_BREAKABLE_CUDAGRAPH")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"vLLM by itself failed: {done.stderr[-1500:]}")
    found: dict[str, list[float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _seconds(llm: Any, load: Load, rounds: int) -> Iterator[tuple[str, list[float]]]:
    """After a call that loads kernels: every round with an empty prefix cache."""

    def fresh(work: Callable[[], Any]) -> float:
        llm.reset_prefix_cache()
        return timed(work)

    _in_one_call(llm, load.cut(load.in_flight, 8), 0)
    yield "one_call", [fresh(lambda: _in_one_call(llm, load, 0)) for _ in range(rounds)]
    yield "stages", [fresh(lambda: _in_stages(llm, load)) for _ in range(rounds)]


def _in_one_call(llm: Any, load: Load, logprobs: int | None) -> None:
    inputs = [prompt for dialogue in load.prompts for prompt in dialogue]
    _generate(llm, inputs, load.lengths.flatten(), logprobs)


def _in_stages(llm: Any, load: Load) -> None:
    """A call for each stage of `in_flight` dialogues, whose conversations the prefix cache has."""
    for start in range(0, len(load.prompts), load.in_flight):
        prompts = load.prompts[start : start + load.in_flight]
        tokens = [list(prompt[0]) for prompt in prompts]
        for turn in range(TURNS):
            given = _generate(llm, tokens, load.lengths[start : start + load.in_flight, turn], 0)
            tokens = [
                [*before, *said, *prompt[min(turn + 1, TURNS - 1)][:BETWEEN]]
                for before, said, prompt in zip(tokens, given, prompts, strict=True)
            ]


def _generate(llm: Any, prompts: list[list[int]], lengths: Any, logprobs: int | None) -> list[list[int]]:
    from vllm import SamplingParams

    limits = [
        SamplingParams(max_tokens=int(n), ignore_eos=True, logprobs=logprobs, detokenize=False) for n in lengths
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], limits, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _main(given: dict[str, Any]) -> None:
    """The other process: prints its result as the last line."""
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(given["family"], "meta", given["quick"])
        save_config(model, folder)
        llm = LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            generation_config="vllm",
            dtype="float32" if given["device"] == "cpu" else "bfloat16",
            max_model_len=given["context"],
            max_num_seqs=given["slots"],
            kv_cache_memory_bytes=int(given["cache_gib"] * GIB),
            gpu_memory_utilization=0.01,
            logprobs_mode="processed_logprobs",
        )
        started = time.perf_counter() - start
        load = Load.drawn(model.config.vocab_size, given["dialogues"], given["slots"], given["most"])
        found = {"start": [started], **dict(_seconds(llm, load, given["rounds"]))}
        llm.reset_prefix_cache()
        found["no_logps"] = [timed(lambda: _in_one_call(llm, load, None))]
    print(f"\n{json.dumps(found)}", flush=True)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
