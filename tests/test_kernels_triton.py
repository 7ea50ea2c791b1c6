"""The Triton kernels without a GPU: their results under the interpreter, their registers from the compiler.

Each runs in a process of its own: the interpreter and the compiler cannot share one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).parent


def run(script: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script of this folder; its output is shown where it fails."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(TESTS / script)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean | environment, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


@pytest.mark.interpret
def test_kernels_agree_with_truth_under_the_interpreter():
    assert "all agree" in run("kernels_interpret.py", TRITON_INTERPRET="1", OMP_NUM_THREADS="1").stdout


def test_no_kernel_spills_registers():
    assert ", 0 with spills" in run("kernels_aot.py").stdout


@pytest.mark.interpret
def test_no_kernel_is_compiled_again_for_another_number_of_rows():
    assert "all agree" in run("kernels_interpret_rows.py", TRITON_INTERPRET="1", OMP_NUM_THREADS="1").stdout
