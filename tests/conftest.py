"""What every test takes for granted: SIGINT interrupts, also where the runner was started in the background; and each
gives a GPU's memory back, since other processes' tests may need it."""

import signal
import sys

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def gpu_memory_goes_back():
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
