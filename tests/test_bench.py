"""`ilr-fast bench` at small sizes on the CPU: JSON, errors, figures, and that a wrong variant gets no time."""

import importlib
import json
import math
import re
from pathlib import Path

import pytest
import torch

bench = pytest.importorskip("ilr_benchmarks.bench")
from ilr_benchmarks import common, figures, host, lm_head, lm_head_cpu, lm_head_sweep, measure, problem, tables  # noqa: E402
from ilr_kernels.policy_loss import PolicyLoss  # noqa: E402

from ilr_fast.cli import main  # noqa: E402

ROOT = Path(__file__).parents[1]
KEYS = {"variant", "shape", "ms", "ms_min", "ms_max", "extra_gib", "error", "limit_ms", "over_limit"}
TOP = {"device", "driver", "versions", "commit", "date", "command", "rows"}


def run(name, folder, *more):
    status = main(["bench", name, "--quick", "--rounds", "1", "--out", str(folder), *more])
    return status, json.loads((folder / f"{name}_quick.json").read_text())


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("ILR_COMMIT", raising=False)


def test_every_name_has_a_module_with_run_and_every_such_module_a_name():
    names = {*bench.GPU, *bench.CPU, *bench.NAMED}
    assert {"lm_head", "lm_head_shapes", "lm_head_sweep", "advantage", "lm_head_cpu"} <= names
    for name in names:
        assert callable(importlib.import_module(f"ilr_benchmarks.{name}").run), name
    files = Path(common.HERE).glob("*.py")
    assert {file.stem for file in files if "\ndef run(*, rounds" in file.read_text()} == names


@pytest.mark.parametrize("name", ["lm_head", "lm_head_shapes", "lm_head_sweep", "advantage", "adamw", "lm_head_cpu"])
def test_quick_runs_and_writes_the_contract_s_json(name, tmp_path):
    status, result = run(name, tmp_path)
    assert status == 0
    assert set(result) >= TOP
    for row in result["rows"]:
        assert set(row) >= KEYS and row["status"] == "timed" and row["ms"] > 0
        assert row["ms_min"] <= row["ms"] <= row["ms_max"]
        if "errors" in row:
            assert row["error"] == max(row["errors"].values())
    assert any(row["error"] is not None for row in result["rows"])


def test_the_loss_log_probs_entropies_and_both_gradients_are_held_against_float64(tmp_path):
    rows = {row["variant"]: row for row in run("lm_head", tmp_path)[1]["rows"]}
    assert set(rows[lm_head.OURS]["errors"]) == {"loss", "logp", "entropy", "dhidden", "dweight"}
    assert set(rows["ours, frozen head"]["errors"]) == {"loss", "logp", "entropy", "dhidden"}
    assert set(rows[lm_head_sweep.FORWARD]["errors"]) == {"logp", "entropy"}


@pytest.mark.parametrize("loss", [PolicyLoss(), PolicyLoss(ratio="sequence"), PolicyLoss(entropy_coef=0.1)])
def test_the_truth_does_not_depend_on_its_slices(loss, monkeypatch):
    x = problem.Problem.make(64, 16, 300, "cpu", torch.float32)
    sliced = problem.policy_truth(x, loss)
    monkeypatch.setattr(problem, "TURNS", 4)
    monkeypatch.setattr(problem, "SLICE", 3)
    again = problem.policy_truth(x, loss)
    exact = {k: v.detach().double() if v.is_floating_point() else v for k, v in x.arguments().items()}
    whole, stats = lm_head.reference.linear_policy_loss(**exact, loss=loss)
    for truth in (sliced, again):
        torch.testing.assert_close(truth["loss"], whole)
        torch.testing.assert_close(truth["entropy"], stats["entropy_T"])
    torch.testing.assert_close(sliced["dweight"], again["dweight"])


def test_a_loss_near_zero_is_held_to_the_size_of_its_terms():
    x = problem.Problem.make(64, 16, 300, "cpu", torch.float32)
    truth = lm_head.Truth(x, PolicyLoss(), lambda x, loss: {"loss": torch.tensor(1e-12, dtype=torch.float64)})
    scale = float((x.token_weight_N * x.advantage_N).abs().sum())
    assert truth.error()({"loss": torch.tensor(0.01)})["loss"] == pytest.approx(0.01 / scale)
    assert math.isnan(truth.error()({"loss": torch.tensor(math.nan)})["loss"])


def broken(right, **factors):
    """The loss with its value or an output scaled."""

    def wrong(*arguments, **options):
        if "advantage" in factors:
            options["advantage_T"] = factors["advantage"] * options["advantage_T"]
        value, stats = right(*arguments, **options)
        scaled = {k: stats[k] * factors[k] for k in stats if k in factors}
        # the value alone is wrong: its gradient stays
        return value + (factors.get("value", 1) - 1) * value.detach(), {**stats, **scaled}

    return wrong


@pytest.mark.parametrize("factors", [{"advantage": 1.5}, {"value": 2.0}, {"logp_T": 1.1}, {"entropy_T": 1.1},
                                     {"entropy_T": math.nan}], ids=str)  # fmt: skip
def test_a_wrong_variant_gets_no_time_and_status_1(factors, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lm_head, "linear_policy_loss", broken(lm_head.linear_policy_loss, **factors))
    monkeypatch.setattr(lm_head_sweep, "QUICK", {"N": lm_head_sweep.QUICK["N"][:1]})
    monkeypatch.setattr(figures, "draw_results", lambda out, quick: [])
    status, result = run("lm_head_sweep", tmp_path)
    assert status == 1 and "wrong" in capsys.readouterr().err
    timed = {row["variant"]: row["ms"] for row in result["rows"]}
    assert timed[lm_head_sweep.OURS] is None and timed[lm_head_sweep.LEAN] is None
    assert timed[lm_head_sweep.FORWARD] > 0 and timed[lm_head_sweep.PLAIN] > 0
    assert not [name for name in timed if name.startswith("host: ours")]
    assert {row["status"] for row in result["rows"] if row["ms"] is None} == {measure.WRONG}


def test_every_error_is_found_before_any_time_is_taken():
    calls = []

    def case(name, error):
        return measure.Case(name, lambda: calls.append(name), None if error is None else lambda _: error, limit=None)

    cases = [case("limit", None), case("right", 0.01), case("wrong", 0.03), case("nan", {"a": 0.0, "b": math.nan})]
    rows = {row["variant"]: row for row in measure.measure(cases, "S", 9, "cpu")}
    assert calls[:4] == ["limit", "right", "wrong", "nan"]
    rounds = {tuple(calls[i : i + 2]) for i in range(4, len(calls), 2)}
    assert len(calls) == 4 + 2 * 9 and rounds == {("limit", "right"), ("right", "limit")}, "each round in another order"
    assert rows["right"]["error"] == 0.01 and rows["right"]["ms"] is not None
    assert rows["wrong"]["error"] == 0.03 and rows["wrong"]["ms"] is None
    assert rows["nan"]["error"] is None and rows["nan"]["errors"] == {"a": 0.0, "b": None}
    assert rows["wrong"]["status"] == rows["nan"]["status"] == measure.WRONG


def test_a_variant_that_fails_leaves_the_others_their_times():
    def fails():
        raise RuntimeError("no kernel image")

    cases = [measure.Case("fails", fails, lambda _: 0.0), measure.Case("right", lambda: None, lambda _: 0.0)]
    first, second = measure.measure(cases, "S", 1, "cpu")
    assert first["ms"] is None and "no kernel image" in first["status"] and second["ms"] > 0


def test_unknown_names_and_a_missing_gpu_are_the_user_s_mistakes(capsys):
    assert main(["bench", "lm_heed"]) == 2
    assert "lm_head" in capsys.readouterr().err
    assert main(["bench", "lm_head"]) == 2
    assert "--quick" in capsys.readouterr().err


def test_the_commit_can_be_given_and_the_command_names_no_place(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ilr-fast", "bench", "advantage", "--quick", "--out", str(tmp_path)])
    assert run("advantage", tmp_path, "--commit", "0123abc+")[1]["commit"] == "0123abc+"
    monkeypatch.setenv("ILR_COMMIT", "0123abd")
    result = run("advantage", tmp_path)[1]
    assert result["commit"] == "0123abd" and result["command"] == "ilr-fast bench advantage --quick"
    assert main(["bench", "advantage", "--quick", "--commit", "newest", "--out", str(tmp_path)]) == 2
    assert "'newest' is no commit" in capsys.readouterr().err


@pytest.mark.parametrize("command, told", [
    ("ilr-fast bench lm_head --out /tmp/o --rounds 3", "ilr-fast bench lm_head --rounds 3"),
    ("ilr-fast bench --out='/tmp/a b' lm_head --commit 0123abc", "ilr-fast bench lm_head"),
    ("OMP_NUM_THREADS=2 pytest benchmarks/test_engine.py", "OMP_NUM_THREADS=2 pytest benchmarks/test_engine.py"),
])  # fmt: skip
def test_what_a_command_keeps(command, told):
    assert common.without_places(command) == told


def span(name, start, length):
    return host.Span(name, start, length)


def test_the_first_product_is_no_fill_and_no_small_kernel():
    calls = [
        span("gemm", 500, 100),  # before any marker
        span(host.MARKER, 1000, 1), span("count_rows", 1040, 3), span("Memset (Device)", 1050, 90),
        span("vectorized_elementwise_kernel", 1150, 80), span("softmax_product", 1250, 60), span("gemm", 1320, 100),
        span(host.MARKER, 2000, 1), span("gemm", 2012, 100), span("gemm", 2120, 100),
        span(host.MARKER, 3000, 1),
    ]  # fmt: skip
    assert host.delays(reversed(calls)) == pytest.approx([250e-6, 12e-6])


def test_the_host_s_clock_is_not_asked_for_a_wrong_variant():
    checked = {"status": "timed", "shape": "S", "error": 0.25, "ms": 4.0}
    (row,) = host.rows("ours", lambda: None, checked, "cpu")
    assert row["variant"] == "host: ours, a whole call" and row["device_ms"] == 4.0 and row["error"] == 0.25
    assert host.rows("ours", pytest.fail, {**checked, "status": measure.WRONG}, "cpu") == []


def test_a_profiler_that_fails_leaves_the_other_figures(monkeypatch):
    def fails(work):
        raise RuntimeError("no CUPTI")

    checked = {"status": "timed", "shape": "S", "error": 0.0, "ms": 1.0}
    monkeypatch.setattr(host, "whole_call", lambda work, device: [0.5])
    monkeypatch.setattr(host, "before_first_product", fails)
    whole, first = host.rows("ours", lambda: None, checked, "cuda")
    assert whole["ms"] == 500 and first["ms"] is None and "no CUPTI" in first["status"]
    monkeypatch.setattr(host, "before_first_product", lambda work: [])
    assert host.rows("ours", lambda: None, checked, "cuda")[1]["status"] == "not seen by the profiler"


def test_the_sweep_has_the_sizes_it_promises():
    v, n, d = (lm_head_sweep.AXES[axis] for axis in "VND")
    assert {size[:2] for size in v} == {(8192, 2048)} and (v[0][2], v[-1][2]) == (32000, 262144)
    assert {size[1:] for size in n} == {(896, 151936)} and (n[0][0], n[-1][0]) == (256, 131072)
    assert {size[::2] for size in d} == {(8192, 131072)} and (d[0][1], d[-1][1]) == (512, 8192)
    sizes = {*v, *n, *d}
    assert sizes > lm_head_sweep.PEERS and [size[0] for size in lm_head_sweep.HOST] == [256, 1024, 4096]
    for axis in lm_head_sweep.AXES.values():
        assert len(lm_head_sweep.PEERS & set(axis)) >= 2


@pytest.fixture
def made_up():
    """Results that no machine gave: a limit by the operations, everything else by a factor of it."""
    factors = {lm_head_sweep.LIMIT: 1, lm_head_sweep.ONE: 1 / 3, lm_head_sweep.OURS: 1.1, lm_head_sweep.LEAN: 1.2,
               lm_head_sweep.FORWARD: 0.4}  # fmt: skip
    peers = {lm_head_sweep.PLAIN: 3, "Liger": 15, "cut-cross-entropy": 4}
    rows = []
    for size in {size for sizes in lm_head_sweep.AXES.values() for size in sizes}:
        n, d, v = size
        axes = [axis for axis, sizes in lm_head_sweep.AXES.items() if size in sizes]
        for variant, factor in (factors | (peers if size in lm_head_sweep.PEERS else {})).items():
            seconds, gib = 6 * n * d * v / 7e14 * factor, n * v * factor / 2**29
            row = common.row(variant, f"N={n} D={d} V={v} bfloat16", [seconds], extra_gib=gib)
            rows.append({**row, "axes": axes, "N": n, "D": d, "V": v})
    versions = {"torch": "0.0", "triton": "0.0"}
    where = {"device": "made up", "driver": None, "versions": versions, "command": "none", "date": "0000"}
    return {**where, "commit": "0123456789abcdef+", "rows": rows}


def test_lines_have_a_point_for_every_size_that_was_timed(made_up):
    line = figures.points(made_up["rows"], "N", lm_head_sweep.OURS, "ms")
    assert [x for x, _ in line] == [256, 1024, 4096, 16384, 65536, 131072]
    assert line[1][1] == pytest.approx(4 * line[0][1])
    made_up["rows"] = [row | {"ms": None} if row["N"] == 4096 else row for row in made_up["rows"]]
    assert [x for x, _ in figures.points(made_up["rows"], "N", lm_head_sweep.OURS, "extra_gib")] == [
        256, 1024, 16384, 65536, 131072]  # fmt: skip
    assert [x for x, _ in figures.points(made_up["rows"], "D", "Liger", "ms")] == [2048, 8192]


def test_names_are_pushed_apart_in_their_order():
    assert figures.apart([3.0, 1.0], 1.0) == [3.0, 1.0]
    placed = figures.apart([0.0, 0.1, 0.05, 5.0], 1.0)
    assert sorted(range(4), key=lambda i: placed[i]) == [0, 2, 1, 3]
    assert min(b - a for a, b in zip(sorted(placed), sorted(placed)[1:], strict=False)) > 0.99


def test_figures_show_what_the_json_says(made_up, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    files = figures.draw(made_up, tmp_path / "a")
    assert [file.name for file in files] == ["lm_head_time.png", "lm_head_memory.png"]
    for file in files:
        image = Image.open(file)
        assert image.width >= 880 and file.stat().st_size < 150_000
        assert len(image.convert("RGB").getcolors(2**24)) > 8
    slower = [row | {"ms": 2 * row["ms"]} if row["variant"] == lm_head_sweep.OURS else row for row in made_up["rows"]]
    time, memory = figures.draw({**made_up, "rows": slower}, tmp_path / "b")
    assert time.read_bytes() != files[0].read_bytes() and memory.read_bytes() == files[1].read_bytes()


def test_a_panel_has_its_lines_labels_and_log_scales(made_up):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    panel = Figure().subplots()
    panel.set_yscale("log")
    figures._panel(panel, made_up["rows"], "V", figures.TIME, "ms")
    assert panel.get_xscale() == panel.get_yscale() == "log"
    assert {text.get_text() for text in panel.texts} == {line.name for line in figures.TIME}
    assert len(panel.lines) == len(figures.TIME)
    named = {line.get_color(): list(line.get_xdata()) for line in panel.lines}
    assert named[figures.BLUE] == [32000, 65536, 131072, 262144] and named[figures.RED] == [32000, 131072]


def test_figures_are_drawn_after_the_sweep_and_again_from_its_json(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    assert run("lm_head_sweep", tmp_path)[0] == 0
    files = [tmp_path / f"lm_head_{kind}_quick.png" for kind in ("time", "memory")]
    drawn = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    monkeypatch.setattr(lm_head_sweep, "run", pytest.fail)
    assert main(["bench", "figures", "--quick", "--out", str(tmp_path)]) == 0
    assert [file.read_bytes() for file in files] == drawn
    assert str(files[0]) in capsys.readouterr().out


def test_figures_without_results_or_matplotlib_are_told_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    assert main(["bench", "figures", "--out", str(tmp_path)]) == 2
    assert "lm_head_sweep" in capsys.readouterr().err
    (tmp_path / "lm_head_sweep.json").write_text("{")
    assert main(["bench", "figures", "--out", str(tmp_path)]) == 2
    assert "no JSON" in capsys.readouterr().err
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with monkeypatch.context() as patch:
        patch.setattr(lm_head_sweep, "run", pytest.fail)
        assert main(["bench", "lm_head_sweep", "--quick", "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "ilr-fast[bench]" in told and "--no-figures" in told
    monkeypatch.setattr(lm_head_sweep, "QUICK", {"N": lm_head_sweep.QUICK["N"][:1]})
    assert run("lm_head_sweep", tmp_path, "--no-figures")[0] == 0 and not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("name", tables.PAGES)
def test_the_pages_tables_are_those_of_the_json(name):
    """`python -m ilr_benchmarks.tables` writes them anew."""
    page = (ROOT / name).read_text()
    assert tables.BLOCK.search(page)
    assert tables.rendered(page) == page


def test_a_page_s_tables_follow_the_json(tmp_path):
    page = (ROOT / "README.md").read_text()
    result = json.loads((common.RESULTS / "lm_head.json").read_text())
    for row in result["rows"]:
        if row["variant"] == lm_head.OURS:
            row["ms"] = 12345.6
    (tmp_path / "lm_head.json").write_text(json.dumps(result))
    assert "**12,300 ms**" in tables.rendered(page, tmp_path)
    empty = tables.rendered(page, tmp_path / "nothing")
    assert "| **" not in empty.partition("<!-- table: readme -->")[2].partition("<!-- end of table -->")[0]
    with pytest.raises(KeyError):
        tables.rendered("<!-- table: no_such -->\n<!-- end of table -->")


def test_a_table_says_why_there_is_no_time(made_up):
    row = common.row(lm_head.OURS, "N=1 D=2 V=3 bfloat16", []) | {"status": measure.WRONG}
    assert f"| **`linear_policy_loss`** | {measure.WRONG} |" in tables.lm_head({**made_up, "rows": [row]})


def test_the_sweep_s_part_of_the_page_has_figures_and_the_host_s_times(made_up):
    checked = {"status": "timed", "shape": "N=256 D=896 V=151936 bfloat16", "error": 0.0, "ms": 0.75}
    rows = [
        common.row(f"host: {lm_head.OURS}, {what}", checked["shape"], [seconds], device_ms=0.75)
        for what, seconds in (("a whole call", 0.002), ("before the first product", 0.001))
    ]
    text = tables.lm_head_sweep({**made_up, "rows": [*made_up["rows"], *rows]})
    assert "made up, torch 0.0, Triton 0.0; 0000, commit 0123456+, `none`" in text
    assert "| N = 256, D = 896, V = 151,936, bfloat16 | 0.750 | 2.00 | 1.00 |" in text
    for file in re.findall(r"\]\((\S+)\)", text):
        assert Path(file).name in {"lm_head_time.png", "lm_head_memory.png"} and file.startswith("figures/")


def test_numbers_of_the_readme_s_cpu_row_are_those_of_the_json():
    rows = {row["variant"]: row for row in json.loads((common.RESULTS / "lm_head_cpu.json").read_text())["rows"]}
    (line,) = (line for line in (ROOT / "README.md").read_text().splitlines() if "`ilr-fast bench lm_head_cpu`" in line)
    seconds = {name: tables.number(rows[name]["ms"] / 1e3) for name in (lm_head_cpu.INTO, lm_head_cpu.OURS)}
    assert f"**{seconds[lm_head_cpu.INTO]} s** into the weight's gradient" in line
    assert f"{seconds[lm_head_cpu.OURS]} s into a new one" in line
    assert f"plain PyTorch {tables.number(rows[f'{lm_head_cpu.PLAIN}, 512 rows']['over_limit'])} ×" in line
    assert f"| {tables.number(rows[lm_head_cpu.LIMIT]['ms'] / 1e3)} s |" in line


@pytest.mark.parametrize("value, told", [(72.0176, "72.0"), (960.4, "960"), (0.00999, "0.00999"), (0.9996, "1.00"),
                                         (12345.0, "12,300"), (9.996, "10.0")])  # fmt: skip
def test_numbers_have_three_digits(value, told):
    assert tables.number(value) == told


def test_the_cpu_benchmark_knows_its_memory(tmp_path):
    """A process of its own holds whole logits at its peak where the variant does, and less where it need not."""
    size = (512, 16, 32768)  # logits of 64 MiB
    plain, ours = (lm_head_cpu.extra_gib(name, size) for name in (lm_head_cpu.PLAIN, lm_head_cpu.OURS))
    if plain is None:
        pytest.skip("needs Linux's /proc")
    assert plain > 2 * 2**-4 and ours < plain / 2


def test_the_training_step_is_timed_with_and_without_shared_prefixes():
    from ilr_benchmarks import train_step

    forced, fresh, ragged, alone, deterministic = train_step.run(rounds=1, quick=True, only_ours=True, device="cpu")
    assert forced["error"] < 1e-5 and forced["rows"] < alone["rows"] == 12 * (train_step.PROMPT + 12 - 1)
    assert ragged["of_forced"] > 0 and forced["first_ms"] > 0
    assert len(fresh["steps"]) == 4 and fresh["of_forced"] > 0 and deterministic["error"] == 0


def test_whole_steps_are_run_by_the_training_loop():
    from ilr_benchmarks import step, step_agents

    forced, training, memory, rest, ragged = step.run(rounds=1, quick=True, only_ours=True, device="cpu")
    assert forced["tokens"]["generated"] == 2 * 3 * 12 and forced["agents"]["ada"]["grad_norm"] > 0
    assert forced["ms"] > training["ms"] > 0 and rest["share"] < 1 and memory["memory_gib"] is None
    assert ragged["of_forced"] > 0 and 0 < ragged["packed"] <= 1
    (both,) = step_agents.run(rounds=1, quick=True, only_ours=True, device="cpu")
    assert both["generate_alone"].keys() == both["train_seconds"].keys() == {"ada", "bob"}
    assert 0.2 < both["ratio"] < 5
