"""Which library multiplies where sums may not be split: forward passes so, backward passes as ever."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from learners import make_agent, rollout, save_model

from ilr_fast import agent as agents
from ilr_fast import whole_sums as module
from ilr_fast.whole_sums import split_sums, whole_sums


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was chosen last: a library, and whether sums of bfloat16 may be rounded and split."""
    found: list[Any] = [("torch's own", True)]
    monkeypatch.setattr(module, "_before", [])
    monkeypatch.setattr(module, "_choose", lambda *given: found.append(given))
    monkeypatch.setenv("CUBLASLT_WORKSPACE_SIZE", "4096")
    return found


def test_sums_are_split_in_a_backward_pass_alone(chosen: list[Any]) -> None:
    with split_sums():
        assert len(chosen) == 1, "nothing where they may be split anyway"
    whole_sums()
    whole_sums()  # of a second engine
    assert chosen[-1] == ("cublaslt", (False, False)) and os.environ["CUBLASLT_WORKSPACE_SIZE"] == "1"
    with pytest.raises(ZeroDivisionError), split_sums():
        assert chosen[-1] == ("cublas", torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)
        raise ZeroDivisionError
    assert chosen[-1] == ("cublaslt", (False, False))


def test_an_agent_forms_its_log_probs_with_whole_sums(
    chosen: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[str]] = {}

    def note(owner: Any, name: str) -> None:
        theirs = getattr(owner, name)

        def called(*arguments: Any, **named: Any) -> Any:
            seen.setdefault(name, set()).add(chosen[-1][0])
            return theirs(*arguments, **named)

        monkeypatch.setattr(owner, name, called)

    note(agents, "packed_forward")
    note(agents, "linear_policy_loss")
    note(torch.Tensor, "backward")
    agent = make_agent(save_model(tmp_path, "llama_tied"))
    whole_sums()
    agent.update(rollout(), 1)
    assert seen == {"packed_forward": {"cublaslt"}, "linear_policy_loss": {"cublaslt"}, "backward": {"cublas"}}
