"""Sampling a token and its log-prob by one reading of the logits, against the formula in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from sample_cases import check_all  # noqa: E402


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_on_a_gpu() -> None:
    check_all("cuda")


@pytest.mark.interpret
def test_under_the_interpreter() -> None:
    script = Path(__file__).parent / "kernels_interpret_sample.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=600)
    assert "all agree" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


def test_wrong_arguments_are_named() -> None:
    from ilr_kernels.sample import sample

    logits_NV, slots_N, one = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int32), torch.ones(2)
    seeds, positions_N = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="logits_NV is torch.bfloat16"):
        sample(logits_NV.bfloat16(), slots_N, one, seeds, positions_N)
    with pytest.raises(ValueError, match="position_N"):
        sample(logits_NV, slots_N, one, seeds, positions_N[:1])
    with pytest.raises(ValueError, match=r"slot_N is torch.int16, not torch.int32 or torch.int64"):
        sample(logits_NV, slots_N.short(), one, seeds, positions_N)


def test_a_kernel_is_compiled_once_whatever_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles anew for other alignments of its arguments."""
    from ilr_kernels import sample as module

    unaligned: list[int] = []

    def launched(kernel: Any, grid: Any, arguments: Any, *more: Any, **options: Any) -> None:
        unaligned.extend(x.data_ptr() % 16 for x in arguments if isinstance(x, torch.Tensor))

    monkeypatch.setattr(module, "launch", launched)
    for rows in (1, 2, 3, 5):
        zeros = torch.zeros(rows, dtype=torch.int64)
        module.sample(torch.zeros(rows, 9000), zeros.int(), torch.ones(rows), zeros, zeros)
    assert not any(unaligned)
