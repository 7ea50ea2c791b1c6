"""A process that holds one agent, its engine and its trainer, and does what its host (process.py) asks for.

    python -m ilr_fast.hosts.worker PARENT_PID

Messages come on the standard input and go to the standard output (messages.py); what anyone prints goes to the standard
error, which the host keeps as the log. SIGINT is the host's to handle. When the host ends, so does this process: the
kernel kills it (Linux), and its input ends.

Requests reach the running engine between two of its steps, and results leave as they are there, all of a step in one
message. In lockstep (`deterministic`) the engine takes a step only when the host says `advance`, so that what it
computes together does not depend on the clock.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import sys
import threading
import traceback
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

from ilr_fast.hosts import Host, messages
from ilr_fast.hosts.messages import Message
from ilr_fast.hosts.pulse import Pulse
from ilr_fast.parent import die_with
from ilr_fast.types import Residence

# Fewer than the engine takes between two steps: what finished in one hands in its result before the next.
PASSES_AFTER_STEP = 3


class Worker:
    """Serves one host. `requests` and `answers` are the two pipes."""

    def __init__(self, requests: BinaryIO, answers: BinaryIO):
        self._requests, self._answers = requests, answers
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self._host: Host
        self._lockstep = False
        self._running: dict[int, asyncio.Task[None]] = {}
        self._finished: list[list[Any]] = []

    async def serve(self) -> None:
        """Answers until the host hangs up."""
        self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Event()
        threading.Thread(target=self._read, name="requests", daemon=True).start()
        while True:
            message = await self._next()
            call, key = message["call"], message.get("id")
            try:
                value = await getattr(self, f"_{call}")(**message.get("arguments", {}))
            except Exception as error:
                known = messages.from_error(error)
                if known is None or key is None:
                    raise
                self._send([[key, None, known]])
            else:
                if key is not None:
                    self._send([[key, value, None]])

    def _read(self) -> None:
        for message in messages.read(self._requests):
            self._inbox.put(message)
            self._loop.call_soon_threadsafe(self._arrived.set)
        os._exit(0)  # the host has hung up, or is gone

    async def _next(self) -> Message:
        """The next message. In lockstep nothing moves until it is there."""
        while not self._lockstep and self._inbox.empty():
            self._arrived.clear()
            await self._arrived.wait()
        return self._inbox.get()

    def _send(self, answers: list[list[Any]]) -> None:
        messages.write(self._answers, {"answers": answers})

    async def _open(self, name: str, config: dict[str, Any]) -> dict[str, Any]:
        """Loads the agent; how long a context its engine holds."""
        from ilr_fast.config import Config
        from ilr_fast.config_parse import build
        from ilr_fast.hosts.local import open_host
        from ilr_fast.team import prepare_chat

        run: Config = build(Config, config, "", name)
        self._host = open_host(name, run.agents[name], run, prepare_chat(name, run.agents[name]))
        self._lockstep = run.deterministic
        return {"max_context": self._host.max_context}

    async def _generate(self, requests: list[list[Any]]) -> None:
        for key, tokens, sampling in requests:
            self._running[key] = self._loop.create_task(self._sample(key, tokens, sampling))

    async def _cancel(self, keys: list[int]) -> None:
        for key in keys:
            if key in self._running:
                self._running[key].cancel()

    async def _advance(self, requests: list[list[Any]], cancelled: list[int]) -> list[list[Any]]:
        """One step of the engine with the requests that came in; (key, generation) of those that finished in it."""
        await self._cancel(cancelled)
        await self._generate(requests)
        steps = self._host.stats()["steps"]
        while self._running and self._host.stats()["steps"] == steps:
            await asyncio.sleep(0)
        for _ in range(PASSES_AFTER_STEP):
            await asyncio.sleep(0)
        finished, self._finished = self._finished, []
        return [[key, generation] for key, generation, _ in finished]

    async def _sample(self, key: int, tokens: list[int], sampling: list[Any]) -> None:
        try:
            generation = await self._host.generate(tokens, messages.to_sampling(sampling))
        except Exception as error:  # the engine's own fault, which no request explains: `serve` ends with it
            self._inbox.put({"call": "fail", "arguments": {"error": error}})
            self._arrived.set()
            return
        finally:
            del self._running[key]
        if not self._finished and not self._lockstep:
            self._loop.call_soon(self._flush)
        self._finished.append([key, messages.from_generation(generation), None])

    async def _fail(self, error: Exception) -> None:
        raise error

    def _flush(self) -> None:
        finished, self._finished = self._finished, []
        self._send(finished)

    async def _update(self, sequences: list[Any], step: int, beside: bool) -> list[Any] | None:
        """What came of it; None where it runs beside the engine, and `learned` is asked later."""
        self._learning = self._host.start_update(messages.to_sequences(sequences), step, beside)
        return None if beside else await self._learned()

    async def _learned(self) -> list[Any]:
        return messages.from_result(self._learning())

    async def _reference_logps(self, sequences: list[Any]) -> list[tuple[float, ...]]:
        return self._host.reference_logps(messages.to_sequences(sequences))

    async def _save_model(self, folder: str) -> None:
        self._host.save_model(Path(folder))

    async def _save_state(self, folder: str) -> None:
        self._host.save_state(Path(folder))

    async def _load(self, model_folder: str, state_folder: str) -> None:
        self._host.load(Path(model_folder), Path(state_folder))

    async def _forget(self) -> None:
        self._host.forget()

    async def _reside(self, residence: Residence) -> None:
        self._host.reside(residence)

    async def _stats(self) -> dict[str, float]:
        return self._host.stats()


def pipes() -> tuple[BinaryIO, BinaryIO]:
    """The standard input and output as private files; 0 becomes /dev/null, and 1 the standard error."""
    requests, answers = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    return os.fdopen(requests, "rb"), os.fdopen(answers, "wb")


def main(parent: int) -> None:
    """Serves until the host hangs up; what nobody expected is printed, named to the host, and the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(parent)
    faulthandler.enable()
    requests, answers = pipes()
    Pulse(partial(messages.write, answers)).start()
    try:
        asyncio.run(Worker(requests, answers).serve())
    except BaseException as error:
        traceback.print_exc()
        messages.write(answers, {"failed": f"{type(error).__name__}: {error}"})
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
