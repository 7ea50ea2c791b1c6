"""A short two-agent run with vLLM as both agents' engine: one on shared weights, one on a copy.

Run by `make test-vllm`, in an environment of its own; skipped where vLLM is missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import end_to_end
import pytest
from end_to_end import agent, read_rows, said_in, save_models, start, without_timings, write_config

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
ENGINE = {"name": "vllm", "slots": 16, "max_context": 1024, "cache_gib": 0.05}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models whose heads are as wide as vLLM's CPU attention wants them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(end_to_end.SIZES, "head_dim", 32)
        return save_models(tmp_path_factory.mktemp("models"))


def train(
    folder: Path,
    models: Path,
    host: str = "local",
    ada: dict[str, Any] | None = None,
    sleep: str = "auto",
    weights: str = "share",
    **changes: Any,
) -> tuple[int, list[dict[str, Any]]]:
    folder.mkdir()
    agents = {
        "ada": agent(models, engine={**ENGINE, "weights": weights, "sleep": sleep}, host=host, **(ada or {})),
        "bob": agent(models, "bob", engine={**ENGINE, "weights": "copy", "sleep": sleep}, host=host),
    }
    config = write_config(folder, models, agents=agents, **{"steps": 2, **changes})
    process = start("train", str(config))
    process.join()
    return process.exitcode, read_rows(folder / "run")


@pytest.mark.parametrize("host", ["local", "process"])
def test_two_agents_train_with_vllm(tmp_path: Path, models: Path, host: str) -> None:
    status, rows = train(tmp_path / "a", models, host)
    assert status == 0 and [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["failures"] == 0
        for name in ("ada", "bob"):
            told = row["agents"][name]
            assert told["grad_norm"] > 0 and told["skipped"] is None
            assert 0 < told["prefix_hit_rate"] < 1
            assert told["logp_diff_mean"] < 1e-5 and told["logp_diff_max"] < 1e-4, "the engine lags behind the trainer"
    assert sum(row["tokens"]["prompt_reused"] for row in rows) > 0


def test_an_agent_with_adapters_trains_with_vllm(tmp_path: Path, models: Path) -> None:
    pytest.importorskip("peft")
    ada = {"train": "lora", "lora": {"rank": 4}, "optimizer": {"lr": 0.05}}
    status, rows = train(tmp_path / "a", models, ada=ada, loss={"beta": 0.01})
    assert status == 0 and len(rows) == 2
    for row in rows:
        told = row["agents"]["ada"]
        assert told["grad_norm"] > 0 and told["logp_diff_max"] < 1e-4, "the engine lags behind the trainer"
    assert rows[0]["agents"]["ada"]["kl_reference"] == pytest.approx(0, abs=1e-6), "no adapter, the reference's policy"
    assert rows[1]["agents"]["ada"]["kl_reference"] > 1e-6
    assert rows[0]["agents"]["ada"]["engine_noise"] < 1e-5 and rows[1]["agents"]["ada"]["engine_noise"] is None


def test_dialogues_are_sampled_a_step_ahead(tmp_path: Path, models: Path) -> None:
    ahead = {"rollout__ahead": True, "loss": {"importance": "token"}}
    status, rows = train(
        tmp_path / "a", models, "process", ada={"optimizer": {"lr": 0.02}}, weights="copy", **ahead
    )
    assert status == 0 and len(rows) == 2
    first, second = (row["agents"]["ada"] for row in rows)
    assert first["logp_diff_max"] < 1e-4 and second["logp_diff_max"] > 0.01, "of the weights before the first update"
    assert first["grad_norm"] > 0 and first["truncated_share"] == 0


@pytest.fixture(scope="module")
def deterministic(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """A run in which all stay awake."""
    folder = tmp_path_factory.mktemp("deterministic") / "a"
    assert train(folder, models, sleep="never")[0] == 0
    return folder / "run"


def test_a_deterministic_run_repeats(tmp_path: Path, models: Path, deterministic: Path) -> None:
    _, rows = train(tmp_path / "b", models)
    before = read_rows(deterministic)
    assert [without_timings(row) for row in rows] == [without_timings(row) for row in before] and len(rows) == 2
    for step in (1, 2):
        file = f"dialogues/step_{step:06d}.jsonl"
        assert (tmp_path / "b" / "run" / file).read_bytes() == (deterministic / file).read_bytes()


def test_agents_that_take_turns_say_the_same(tmp_path: Path, models: Path, deterministic: Path) -> None:
    status, rows = train(tmp_path / "a", models, sleep="turns")
    assert status == 0 and len(rows) == 2
    for row in rows:
        assert row["seconds"]["swap"] > 0
        assert said_in(tmp_path / "a" / "run", row["step"]) == said_in(deterministic, row["step"])
        assert all(row["agents"][name]["logp_diff_max"] < 1e-4 for name in ("ada", "bob"))
    assert all(noise < 1e-5 for noise in (rows[0]["agents"][name]["engine_noise"] for name in ("ada", "bob")))
