"""vLLM's scheduler without Python for every running request and step.

Of hundreds of running requests nearly all do the same in a step: decode one token inside a block of the cache that they
have, and go on. vLLM spends 15 to 20 µs of Python on each of them: more than the GPU takes for it. Here those requests
are rows of a few arrays. A step schedules all rows and takes their tokens by array operations; a request is told what
became of it (`_settle`) when something happens to it, at the latest when its blocks are full, and its tokens leave the
scheduler then, many at a time.

Everything else is left to vLLM's own functions, by hiding the rows from them: prompts, a request's first token and its
last one (its limit or a stop token), a new block, requests with other parameters than a rollout's, what is aborted, and
everything once the cache is full. So both give the same tokens, and no rule of vLLM's is written down twice.

    config.scheduler_config.scheduler_cls = rollout_scheduler(config.scheduler_config.get_scheduler_cls())
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from ilr_fast.engines.vllm_ends import Ends
from ilr_fast.engines.vllm_results import Sampled

AT_ONCE = 8  # blocks that a request is given at a time, and told of its tokens after
READ = "tokens are read as they come"  # an extra argument of requests that stop at texts: they are told more often


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows that a step decodes, with the generation that each of them then was of."""

    names: list[str]
    places_N: np.ndarray
    generations_N: np.ndarray


def rollout_scheduler(base: Any) -> Any:
    """A scheduler for plain sampling on top of `base`, vLLM's `AsyncScheduler` or `Scheduler`."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.outputs import LogprobsLists

    ahead = issubclass(base, AsyncScheduler)

    class RolloutScheduler(base):  # type: ignore[misc]
        """See the module."""

        running: list[Any]

        def __init__(self, *arguments: Any, **named: Any):
            super().__init__(*arguments, **named)
            sizes = [one.block_size for one in self.kv_cache_manager.coordinator.single_type_managers]
            self._block, self._groups = min(sizes), len(sizes)
            slots = self.max_num_running_reqs
            self._plain = self.connector is None and self.num_lookahead_tokens == 0 and not self.defer_block_free
            self._place: dict[str, int] = {}  # of the requests that are rows
            self._free = list(range(slots))
            self._request: list[Any] = [None] * slots
            self._generation_R = np.zeros(slots, np.int64)
            self._prompt_R = np.zeros(slots, np.int64)  # tokens of the prompt
            self._computed_R = np.zeros(slots, np.int64)  # vLLM's num_computed_tokens
            self._begun_R = np.zeros(slots, np.int64)  # steps scheduled since the request was told
            self._taken_R = np.zeros(slots, np.int64)  # of those, the steps whose tokens are here
            self._room_R = np.zeros(slots, np.int64)  # tokens that the last block still has room for
            self._schedulable_R = np.zeros(slots, np.int64)  # steps until the limit
            self._until_last_R = np.zeros(slots, np.int64)  # tokens to be taken until the limit
            self._tokens_RT = np.zeros((slots, AT_ONCE * self._block + 4), np.int64)
            self._logps_RT = np.zeros(self._tokens_RT.shape, np.float32)
            self._ends = Ends()
            self._kind_R = np.zeros(slots, np.int64)  # of the tokens that end a row
            self._settled: list[Any] = []  # outputs that leave with the next step's

        @property
        def held(self) -> int:
            """Tokens of rows whose requests were not told of them yet."""
            return int(self._taken_R.sum())

        def schedule(self, *arguments: Any, **named: Any) -> Any:
            """vLLM's output for one step, the rows' tokens added."""
            if self._plain:
                self._adopt()
            rows = self._decoding()
            if rows is None:
                self._give_up(list(self._place))
                return super().schedule(*arguments, **named)
            blocks = self._new_blocks(rows)
            output = self._schedule_others(len(rows.names), *arguments, **named)
            self._add(output, rows, blocks)
            return output

        def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
            """Takes the rows' tokens, and has vLLM take those of all others and the last ones."""
            rows: _Rows | None = getattr(scheduler_output, "rows", None)
            if rows is not None:
                others = scheduler_output.num_scheduled_tokens = dict(scheduler_output.others)
                others |= dict.fromkeys(self._take(rows, model_runner_output), 1)
            found = super().update_from_output(scheduler_output, model_runner_output)
            for name in scheduler_output.num_scheduled_tokens:
                place = self._place.get(name)
                if place is not None and self._request[place].is_finished():
                    self._drop(name)
            if self._settled:
                outputs = found.setdefault(0, EngineCoreOutputs())
                outputs.outputs = [*self._settled, *outputs.outputs]
                self._settled = []
            return found

        def finish_requests(self, request_ids: Any, *arguments: Any, **named: Any) -> Any:
            """Ends requests from outside, all if None."""
            if request_ids is not None:
                request_ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
            self._give_up(list(self._place) if request_ids is None else request_ids)
            return super().finish_requests(request_ids, *arguments, **named)

        def reset_prefix_cache(self, *arguments: Any, **named: Any) -> bool:
            """Drops the prefixes; running requests begin again."""
            self._give_up(list(self._place))
            return bool(super().reset_prefix_cache(*arguments, **named))

        def _adopt(self) -> None:
            """Requests that decode from now on become rows."""
            if len(self._place) == len(self.running):
                return
            for request in self.running:
                if request.request_id in self._place or not self._decodes(request):
                    continue
                if (kind := self._ends.kind(request.sampling_params)) is None:
                    continue
                name, place, underway = request.request_id, self._free.pop(), request.num_output_placeholders
                limit = min(request.max_tokens, self.max_model_len - request.num_prompt_tokens)
                self._place[name], self._request[place], self._kind_R[place] = place, request, kind
                self._prompt_R[place] = request.num_prompt_tokens
                self._computed_R[place] = request.num_computed_tokens
                self._begun_R[place] = self._taken_R[place] = self._room_R[place] = 0
                rest = limit - request.num_output_tokens - underway
                self._schedulable_R[place] = self._until_last_R[place] = rest

        def _decodes(self, request: Any) -> bool:
            """Whether the next step of a request takes in its last token alone, and it samples as rollouts do."""
            ready = request.num_tokens + request.num_output_placeholders - request.num_computed_tokens == 1
            stale = getattr(request, "async_tokens_to_discard", 0) or getattr(request, "num_stale_output_tokens", 0)
            return ready and not stale and not request.is_prefill_chunk and self._is_plain(request)

        def _is_plain(self, request: Any) -> bool:
            one = request.sampling_params
            if one is None or one.logprobs != 0 or one.prompt_logprobs is not None or one.min_tokens:
                return False
            if getattr(one, "repetition_detection", None) is not None or request.use_structured_output:
                return False
            return not (request.resumable or request.mm_features or request.pooling_params is not None)

        def _decoding(self) -> _Rows | None:
            """The rows that can decode; None where there are none or the cache is nearly full."""
            if not self._place:
                return None
            places_N = np.fromiter(self._place.values(), np.int64, len(self._place))
            may_N = self._schedulable_R[places_N] > 0
            names = list(self._place)
            if not may_N.all():
                names = [name for name, may in zip(names, may_N.tolist(), strict=True) if may]
                places_N = places_N[may_N]
            needed = 2 * self._groups * int((self._room_R[places_N] == 0).sum())
            if len(self.running) > len(self._place):  # so that nothing has to make room for what vLLM schedules itself
                needed += self._groups * (self.max_num_scheduled_tokens // self._block + len(self.running))
            if not names or self.kv_cache_manager.block_pool.get_num_free_blocks() < needed:
                return None
            return _Rows(names, places_N, self._generation_R[places_N])

        def _new_blocks(self, rows: _Rows) -> dict[str, Any]:
            """New blocks for every row whose blocks are full: several while the cache has plenty of them."""
            full = rows.places_N[self._room_R[rows.places_N] == 0].tolist()
            free = self.kv_cache_manager.block_pool.get_num_free_blocks()
            at_once = AT_ONCE if free > 2 * self._groups * AT_ONCE * len(rows.names) else 1
            blocks = {}
            for place in full:
                request = self._request[place]
                self._settle(place)
                several = 1 if (request.sampling_params.extra_args or {}).get(READ) else at_once
                tokens = min(several * self._block, int(self._schedulable_R[place]))
                new = self.kv_cache_manager.allocate_slots(request, 1, num_lookahead_tokens=tokens - 1)
                assert new is not None, "there are enough free blocks"
                self._room_R[place] = tokens
                if (ids := new.get_block_ids(allow_none=True)) is not None:
                    blocks[request.request_id] = ids
            return blocks

        def _schedule_others(self, tokens: int, *arguments: Any, **named: Any) -> Any:
            """vLLM's own step for all requests that are no rows, in the room that the rows leave."""
            limits = [k for k in ("max_num_running_reqs", "max_num_active_reqs") if hasattr(self, k)]
            rows, self.running = self.running, []
            if len(rows) > len(self._place):
                self.running = [request for request in rows if request.request_id not in self._place]
                rows = [request for request in rows if request.request_id in self._place]
            for limit in limits:
                setattr(self, limit, getattr(self, limit) - len(rows))
            self.max_num_scheduled_tokens -= tokens
            try:
                return super().schedule(*arguments, **named)
            finally:
                self.running = [*rows, *self.running]
                self.max_num_scheduled_tokens += tokens
                for limit in limits:
                    setattr(self, limit, getattr(self, limit) + len(rows))

        def _add(self, output: Any, rows: _Rows, blocks: dict[str, Any]) -> None:
            """The rows decode a token each in the step that `output` is of."""
            output.rows, output.others = rows, output.num_scheduled_tokens
            output.num_scheduled_tokens = dict.fromkeys(rows.names, 1) | output.others
            output.total_num_scheduled_tokens += len(rows.names)
            output.num_common_prefix_blocks = [0] * len(output.num_common_prefix_blocks)
            cached = output.scheduled_cached_reqs
            computed_N = self._computed_R[rows.places_N]
            given_N = computed_N + 1 - self._prompt_R[rows.places_N]  # tokens sampled, those on their way included
            cached.req_ids = [*rows.names, *cached.req_ids]
            cached.new_block_ids = [*map(blocks.get, rows.names), *cached.new_block_ids]
            cached.num_computed_tokens = [*computed_N.tolist(), *cached.num_computed_tokens]
            cached.num_output_tokens = [*given_N.tolist(), *cached.num_output_tokens]
            if not self.use_v2_model_runner:
                self.prev_step_scheduled_req_ids.update(rows.names)
            self._computed_R[rows.places_N] += 1
            self._begun_R[rows.places_N] += 1
            self._room_R[rows.places_N] -= 1
            self._schedulable_R[rows.places_N] -= 1

        def _take(self, rows: _Rows, results: Any) -> list[str]:
            """Keeps the tokens of rows that go on; the names of requests that vLLM has to take a token of."""
            count, sampled = len(rows.names), results.sampled_token_ids
            index_N: Any = slice(count)
            if results.req_ids[:count] != rows.names:
                index_N = [results.req_id_to_index[name] for name in rows.names]
            if isinstance(sampled, Sampled):
                token_N = sampled.tokens_N[index_N]
            else:
                lists = sampled[:count] if isinstance(index_N, slice) else map(sampled.__getitem__, index_N)
                token_N = np.fromiter(chain.from_iterable(lists), np.int64, count)
            counts = results.logprobs.cu_num_generated_tokens
            if counts is not None:
                index_N = np.array(counts)[index_N]
            logp_N = results.logprobs.logprobs[index_N, 0]
            is_row_N = self._generation_R[rows.places_N] == rows.generations_N
            last_N = (self._until_last_R[rows.places_N] == 1) | ~np.isfinite(logp_N)
            last_N |= self._ends.found(self._kind_R[rows.places_N], token_N)
            goes_on_N = is_row_N & ~last_N
            places_N = rows.places_N[goes_on_N]
            taken_N = self._taken_R[places_N]
            self._tokens_RT[places_N, taken_N] = token_N[goes_on_N]
            self._logps_RT[places_N, taken_N] = logp_N[goes_on_N]
            self._taken_R[places_N] += 1
            self._until_last_R[places_N] -= 1
            self._give_up([rows.names[n] for n in np.flatnonzero(is_row_N & last_N)])
            return [rows.names[n] for n in np.flatnonzero(~goes_on_N)]

        def _settle(self, place: int) -> None:
            """Tells a row's request what it has been given since the last time."""
            request, taken = self._request[place], int(self._taken_R[place])
            if taken:
                tokens = self._tokens_RT[place, :taken].tolist()
                logps_T1 = self._logps_RT[place, :taken, None].copy()
                request.append_output_token_ids(tokens)
                logprobs = LogprobsLists(None, logps_T1, None)
                self._settled.append(
                    EngineCoreOutput(request_id=request.request_id, new_token_ids=tokens, new_logprobs=logprobs)
                )
            begun = int(self._begun_R[place])
            request.num_computed_tokens += begun
            if ahead:
                request.num_output_placeholders += begun - taken
            if hasattr(request, "num_in_flight_tokens"):
                request.num_in_flight_tokens += begun - taken
            self._begun_R[place] = self._taken_R[place] = 0

        def _give_up(self, names: Iterable[str]) -> None:
            """Rows become requests of vLLM's own again; their full blocks are there for other requests' prefixes."""
            for name in names:
                if name in self._place:
                    place = self._place[name]
                    request = self._request[place]
                    self._settle(place)
                    done = request.num_computed_tokens - request.num_output_placeholders  # what is under way is not
                    self.kv_cache_manager.cache_blocks(request, min(done, request.num_tokens))
                    self._drop(name)

        def _drop(self, name: str) -> None:
            place = self._place.pop(name)
            self._generation_R[place] += 1
            self._taken_R[place] = 0
            self._request[place] = None
            self._free.append(place)

    return RolloutScheduler
