"""`ilr-fast bench` at small sizes on the CPU: its JSON, its errors, and that a wrong variant gets no time."""

import json

import pytest
import torch

bench = pytest.importorskip("ilr_benchmarks.bench")
from ilr_fast.cli import main  # noqa: E402

KEYS = {"variant", "shape", "ms", "ms_min", "ms_max", "extra_gib", "error", "limit_ms", "over_limit"}
TOP = {"device", "driver", "versions", "commit", "date", "command", "rows"}


def run(name, folder):
    status = main(["bench", name, "--quick", "--rounds", "1", "--out", str(folder)])
    return status, json.loads((folder / f"{name}_quick.json").read_text())


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("name", ["lm_head", "lm_head_shapes", "advantage", "lm_head_cpu"])
def test_quick_runs_and_writes_the_contract_s_json(name, tmp_path):
    status, result = run(name, tmp_path)
    assert status == 0
    assert set(result) >= TOP
    for row in result["rows"]:
        assert set(row) >= KEYS and row["status"] == "timed" and row["ms"] > 0
    assert any(row["error"] is not None for row in result["rows"])


def test_a_wrong_variant_gets_no_time_and_status_1(tmp_path, monkeypatch, capsys):
    from ilr_benchmarks import lm_head

    right = lm_head.linear_policy_loss

    def wrong(**arguments):
        return right(**{**arguments, "advantage_T": 1.5 * arguments["advantage_T"]})

    monkeypatch.setattr(lm_head, "linear_policy_loss", wrong)
    status, result = run("lm_head_cpu", tmp_path)
    rows = {row["variant"]: row for row in result["rows"]}
    assert status == 1 and "wrong" in capsys.readouterr().err
    assert rows["ours, new dweight"]["ms"] is None and rows["ours, new dweight"]["status"] == "wrong, not timed"
    assert rows["plain PyTorch, whole logits"]["ms"] > 0


def test_unknown_names_and_a_missing_gpu_are_the_user_s_mistakes(capsys):
    assert main(["bench", "lm_heed"]) == 2
    assert "lm_head" in capsys.readouterr().err
    assert main(["bench", "lm_head"]) == 2
    assert "--quick" in capsys.readouterr().err
