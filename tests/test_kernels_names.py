"""What importing the kernel package must not break: transformers, and machines without Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_folder_is_no_package_named_kernels():
    """transformers takes an importable `kernels` for Hugging Face's; a folder without __init__.py is not taken."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import transformers.modeling_utils, ilr_kernels.lm_head; print('fine')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0 and "fine" in done.stdout, done.stderr[-2000:]


def test_public_modules_import_and_run_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # an import of it now fails
import torch
from ilr_kernels import advantage, lm_head, policy_loss, reference
advantage.calibrated_advantage(torch.rand(2, 3, 4))
lm_head.linear_policy_loss(torch.rand(2, 3), torch.rand(4, 3), torch.tensor([0, 1]), torch.ones(2), torch.ones(2))
print("fine")
"""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean)
    assert done.returncode == 0 and "fine" in done.stdout, done.stderr[-2000:]


def test_kernels_import_nothing_of_the_program():
    for path in (ROOT / "kernels").glob("*.py"):
        assert "ilr_fast" not in path.read_text(), f"{path.name}: the kernels lie below the program"
