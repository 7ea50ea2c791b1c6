"""What vLLM's scheduler takes of the host for a token of a rollout, by itself and with rows on top; needs no GPU.

    ilr-fast bench rollout_host      # where vLLM or its CPU build is installed; half a minute

512 requests of 200 prompt tokens decode at once; the model is pretended. Timed are `schedule` and `update_from_output`
of vLLM's scheduler that schedules ahead, as on a GPU, over steps in which every request is given a token.
"""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from ilr_benchmarks.common import row, without_vllm

PROMPT, CONTEXT, BLOCK, BATCH = 200, 4096, 16, 8192


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> Iterator[dict[str, Any]]:
    """A row for vLLM's scheduler and one for ours; a row with a status alone where vLLM is missing."""
    requests, steps = (16, 40) if quick else (512, 100)
    shape = f"{requests} requests, {steps} steps, milliseconds a step"
    if (missing := without_vllm("rows on top of it", shape)) is not None:
        yield missing
        return
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from ilr_fast.engines.vllm_scheduler import rollout_scheduler

    kinds = {"rows on top of it": rollout_scheduler(AsyncScheduler)} | (
        {} if only_ours else {"vLLM's scheduler": AsyncScheduler}
    )
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, kind in kinds.items():
            found[name].append(_seconds(kind, requests, steps))
    for name, seconds in found.items():
        yield row(name, shape, seconds, us_per_token=1e6 * float(np.median(seconds)) / requests)


def _seconds(kind: Any, requests: int, steps: int) -> float:
    """Seconds of the scheduler in a step."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    scheduler, hasher = _scheduler(kind, requests), get_request_block_hasher(BLOCK, sha256)
    for n in range(requests):
        plain = SamplingParams(max_tokens=4 * steps, ignore_eos=True, logprobs=0, detokenize=False)
        prompt = [n] * PROMPT
        scheduler.add_request(Request(str(n), prompt, plain, None, block_hasher=hasher, arrival_time=float(n)))
    taken, under_way = 0.0, deque()  # type: ignore[var-annotated]
    warm = -(-requests * PROMPT // BATCH) + 4  # until all prompts are in
    for step in range(warm + steps):
        start = time.perf_counter()
        scheduled = scheduler.schedule()
        taken += (time.perf_counter() - start) * (step >= warm)
        under_way.append((scheduled, _results(scheduler, scheduled)))
        if len(under_way) == 2:
            start = time.perf_counter()
            scheduler.update_from_output(*under_way.popleft())
            taken += (time.perf_counter() - start) * (step >= warm)
    return taken / steps


def _results(scheduler: Any, scheduled: Any) -> Any:
    """A pretended model's: token 5 for every request whose prompt is in."""
    from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

    names = sorted(scheduled.num_scheduled_tokens, key=scheduled.num_scheduled_tokens.get)
    tokens = [[] if scheduler.requests[name].is_prefill_chunk else [5] for name in names]
    logps_N1 = np.full((len(names), 1), -1.0, np.float32)
    index = {name: n for n, name in enumerate(names)}
    logprobs = LogprobsLists(logps_N1.astype(int), logps_N1, logps_N1[:, 0])
    return ModelRunnerOutput(names, index, tokens, logprobs=logprobs, prompt_logprobs_dict={}, pooler_output=[])


def _scheduler(kind: Any, slots: int) -> Any:
    import transformers
    from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    with tempfile.TemporaryDirectory() as folder:
        sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        config = transformers.LlamaConfig(**sizes, max_position_embeddings=CONTEXT, architectures=["LlamaForCausalLM"])
        config.save_pretrained(folder)
        model = ModelConfig(model=folder, skip_tokenizer_init=True, dtype="float32", max_model_len=CONTEXT, seed=0)
        scheduling = SchedulerConfig(
            max_num_seqs=slots, max_num_batched_tokens=BATCH, max_model_len=CONTEXT, is_encoder_decoder=False
        )
        cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=True)
        whole = VllmConfig(model_config=model, scheduler_config=scheduling, cache_config=cache)
    scheduling.async_scheduling = True
    cache.num_gpu_blocks = slots * CONTEXT // BLOCK
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    scheduler = kind(
        vllm_config=whole,
        kv_cache_config=KVCacheConfig(cache.num_gpu_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(whole),
        block_size=BLOCK,
        log_stats=False,
    )
    scheduler.use_v2_model_runner = True
    return scheduler
