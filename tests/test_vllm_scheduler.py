"""Rows in vLLM's scheduler: a pretended model that checks positions, blocks and prefixes gets the same tokens as alone.

The scheduler is vLLM's own, on top of it the rows; only the model is pretended: a request's next token follows from its
last ones, and what each place of the cache holds is remembered.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from ilr_fast.engines import vllm_ends
from ilr_fast.engines.vllm_results import Sampled

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

BLOCK, SLOTS, BATCH, CONTEXT, STOPS = 16, 24, 512, 256, (7, 11, 13, 200, 300)


@dataclass(frozen=True)
class Job:
    """A request; its prompt follows what another one was given, if `after` names one."""

    name: str
    prompt: tuple[int, ...]
    limit: int
    logprobs: int | None = 0
    after: str | None = None
    stops: tuple[int, ...] = STOPS


def next_token(known: Sequence[int]) -> int:
    return (hash(tuple(known[-8:])) + 7 * len(known)) % 900


def alone(job: Job, prompt: Sequence[int]) -> list[int]:
    known, given = list(prompt), []
    while True:
        given.append(next_token(known))
        known.append(given[-1])
        if given[-1] in job.stops or len(given) == job.limit or len(known) == CONTEXT:
            return given


def scheduler_for(folder: Path, blocks: int, ahead: bool) -> Any:
    from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from ilr_fast.engines.vllm_scheduler import rollout_scheduler

    sizes = dict(vocab_size=1000, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=CONTEXT, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    model = ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=CONTEXT, seed=0)
    scheduling = SchedulerConfig(
        max_num_seqs=SLOTS, max_num_batched_tokens=BATCH, max_model_len=CONTEXT, is_encoder_decoder=False,
        policy="priority",
    )  # fmt: skip
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=True)
    whole = VllmConfig(model_config=model, scheduler_config=scheduling, cache_config=cache)
    scheduling.async_scheduling = ahead
    cache.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    scheduler = rollout_scheduler(AsyncScheduler if ahead else Scheduler)(
        vllm_config=whole,
        kv_cache_config=KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(whole),
        block_size=BLOCK,
    )
    scheduler.use_v2_model_runner = ahead
    return scheduler


class PretendedModel:
    """Keeps what a runner is told of its requests, and what is where in the cache."""

    def __init__(self, ahead: bool):
        self.ahead = ahead
        self.known: dict[str, list[int]] = {}
        self.blocks: dict[str, list[int]] = {}
        self.computed: dict[str, int] = {}
        self.cache: dict[tuple[int, int], tuple[int, ...]] = {}
        self.most_rows = self.steps = 0

    def __call__(self, step: Any) -> Any:
        from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

        self.told(step)
        self.most_rows = max(self.most_rows, len(step.rows.names) if hasattr(step, "rows") else 0)
        assert sum(step.num_scheduled_tokens.values()) == step.total_num_scheduled_tokens <= BATCH
        before = {name: tuple(self.known[name]) for name in step.num_scheduled_tokens}
        given = {name: self.computes(name, tokens) for name, tokens in step.num_scheduled_tokens.items()}
        for name, known in before.items():  # what requests read was written by themselves, or is the same prefix
            for n in range(0, self.computed[name], 5):
                assert self.cache[self.place(name, n)] == known[: n + 1]
        names = sorted(given, key=step.num_scheduled_tokens.get) if self.ahead else sorted(given)  # either runner's way
        logps_N1 = np.array([-(given[n] or [0])[0] / 1000 for n in names], np.float32).reshape(-1, 1)
        logprobs = LogprobsLists(logps_N1.astype(int), logps_N1, logps_N1[:, 0])
        index = {name: n for n, name in enumerate(names)}
        more = dict(prompt_logprobs_dict={}, pooler_output=[])
        found: Any = [given[n] for n in names]
        self.steps += 1
        if self.ahead and self.steps % 3:  # results as arrays, or as vLLM's own lists
            found = Sampled(np.array([(g or [0])[0] for g in found]), np.array([len(g) for g in found]))
        return ModelRunnerOutput(names, index, found, logprobs=logprobs, **more)

    def told(self, step: Any) -> None:
        gone = set(step.finished_req_ids) | (set(step.preempted_req_ids or ()) if self.ahead else set())
        for name in gone:
            self.known.pop(name, None)
        for one in step.scheduled_new_reqs:
            self.known[one.req_id] = list(one.prefill_token_ids if self.ahead else one.prompt_token_ids)
            self.blocks[one.req_id], self.computed[one.req_id] = list(one.block_ids[0]), one.num_computed_tokens
        cached = step.scheduled_cached_reqs
        for name, computed, blocks in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
        ):
            if name in cached.resumed_req_ids:
                self.blocks[name], self.computed[name] = [], computed
            assert self.computed[name] == computed
            self.blocks[name] += blocks[0] if blocks else []

    def place(self, name: str, n: int) -> tuple[int, int]:
        return self.blocks[name][n // BLOCK], n % BLOCK

    def computes(self, name: str, tokens: int) -> list[int]:
        known, first = self.known[name], self.computed[name]
        self.computed[name] = first + tokens
        assert self.computed[name] <= len(known)
        for n in range(first, first + tokens):
            self.cache[self.place(name, n)] = tuple(known[: n + 1])
        if self.computed[name] < len(known):
            return []
        known.append(next_token(known))
        return [known[-1]]


def run(scheduler: Any, model: Any, jobs: Sequence[Job], events: dict[int, Callable[[], Any]], ahead: bool) -> Any:
    """What each request was given, its log-probs, and the prompts, when everything has ended."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)
    given, logps, prompts, ended = defaultdict(list), defaultdict(list), {}, set()
    waiting, under_way, step = list(jobs), deque(), 0
    while waiting or scheduler.has_requests() or under_way:
        while waiting and len(scheduler.requests) < SLOTS + 4 and waiting[0].after in (*ended, None):
            job = waiting.pop(0)
            before = [*prompts[job.after], *given[job.after]] if job.after else []
            prompts[job.name] = [*before, *job.prompt][: CONTEXT - 1]
            parameters = SamplingParams(
                max_tokens=job.limit, stop_token_ids=list(job.stops), ignore_eos=True, logprobs=job.logprobs,
                detokenize=False,
            )  # fmt: skip
            scheduler.add_request(
                Request(job.name, list(prompts[job.name]), parameters, None, priority=-len(before), block_hasher=hasher)
            )
        step += 1
        events.get(step, lambda: None)()
        ended |= {name for name in prompts if name not in scheduler.requests}
        if scheduler.has_requests():
            scheduled = scheduler.schedule()
            under_way.append((scheduled, model(scheduled)))
            if ahead and len(under_way) < 2:
                continue
        if under_way:
            for outputs in scheduler.update_from_output(*under_way.popleft()).values():
                for output in outputs.outputs:
                    given[output.request_id] += output.new_token_ids
                    if output.new_logprobs is not None:
                        logps[output.request_id] += output.new_logprobs.logprobs[:, 0].tolist()
                    if output.finish_reason is not None:
                        ended.add(output.request_id)
    return given, logps, prompts


def jobs_of(seed: int) -> list[Job]:
    g = random.Random(seed)
    shared = [tuple(g.randrange(900) for _ in range(g.randrange(1, 60))) for _ in range(5)]

    def some(most: int) -> tuple[int, ...]:
        return tuple(g.randrange(900) for _ in range(g.randrange(1, most)))

    first = [
        Job(f"first {n}", shared[n % 5] + some(20), g.choice([1, 2, 3, 17, 40, 90]), None if n % 17 == 5 else 0)
        for n in range(50)
    ]
    then = [
        Job(f"then {n}", some(30), 999 if n % 9 == 0 else g.choice([1, 5, 33, 60]), after=f"first {n}", stops=stops)
        for n in range(50)
        for stops in [(3,) if n % 13 == 1 else STOPS]
    ]
    return first + then


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("blocks, events", [(400, "none"), (61, "none"), (400, "aborts"), (400, "resets")])
def test_every_request_is_given_its_own_tokens(tmp_path: Path, ahead: bool, blocks: int, events: str) -> None:
    from vllm.v1.request import RequestStatus

    scheduler, model, jobs = scheduler_for(tmp_path, blocks, ahead), PretendedModel(ahead), jobs_of(blocks)
    aborted = {f"first {n}" for n in (3, 11, 12)} if events == "aborts" else set()
    at: dict[int, Callable[[], Any]] = {}
    if events == "aborts":
        at[9] = lambda: scheduler.finish_requests(sorted(aborted), RequestStatus.FINISHED_ABORTED)
    if events == "resets":
        at = dict.fromkeys((9, 20, 21, 40), lambda: scheduler.reset_prefix_cache(reset_running_requests=True))
    given, logps, prompts = run(scheduler, model, jobs, at, ahead)
    for job in jobs:
        expected = alone(job, prompts[job.name])
        if job.name in aborted:
            assert given[job.name] == expected[: len(given[job.name])]
            continue
        assert given[job.name] == expected
        if job.logprobs == 0:
            assert logps[job.name] == pytest.approx([-token / 1000 for token in expected])
    assert model.most_rows > (SLOTS // 2 if blocks > 100 else 4), "rows were used"
    assert not scheduler.running and not scheduler.requests and len(scheduler._free) == SLOTS
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == blocks - 1


@pytest.mark.parametrize(("kinds", "rows"), [(64, SLOTS - 2), (2, 0)])
def test_requests_of_different_stops_end_at_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: int, rows: int
) -> None:
    """As rows of one step; where there are more kinds of stops than are told apart, vLLM has the others."""
    monkeypatch.setattr(vllm_ends, "KINDS", kinds)
    tokens = random.Random(5)
    stops = [(), STOPS, (3,), (899,), tuple(range(0, 900, 7)), tuple(range(1, 900, 6))]
    jobs = [
        Job(f"{n}", tuple(tokens.randrange(900) for _ in range(9)), 90, stops=stops[n % len(stops)]) for n in range(40)
    ]
    scheduler, model = scheduler_for(tmp_path, 400, True), PretendedModel(True)
    given, _, prompts = run(scheduler, model, jobs, {}, True)
    for job in jobs:
        assert given[job.name] == alone(job, prompts[job.name])
    assert len({len(given[job.name]) for job in jobs}) > 5 and model.most_rows > rows
    assert len(scheduler._ends._kinds) == min(kinds, len(stops))
