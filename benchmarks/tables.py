"""Writes the measured tables of docs/kernels.md and README.md from benchmarks/results/*.json.

    python -m ilr_benchmarks.tables

A table stands between <!-- table: NAME --> and <!-- end of table -->, NAME being one of TABLES; without results yet it
is empty. tests/test_bench.py fails where a page and the JSON differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ilr_benchmarks.common import HERE, RESULTS, short

PAGES = ("README.md", "docs/kernels.md")
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
PACKAGES = {"torch": "torch", "triton": "Triton", "transformers": "transformers", "trl": "TRL", "liger-kernel": "Liger",
            "cut-cross-entropy": "cut-cross-entropy"}  # fmt: skip
# how a variant is told, by its beginning (the longest that fits), in the order of the tables
NAMES = {
    "limit: three whole products": "**limit**: three cuBLAS products, whole",
    "limit in chunks": "the same, 2,048 rows at a time",
    "limit: three products, dweight added": "**limit** where dweight is added to a gradient",
    "ours, new dweight": "**`linear_policy_loss`**",
    "ours, into a gradient of the weight's dtype": "into a bfloat16 gradient (`weight_grad_VD`)",
    "ours, into a float32 gradient": "into a float32 gradient",
    "ours, chunk=": "`chunk={}`",
    "ours, half of the rows without advantage": "half of the rows without advantage",
    "ours, half without advantage, with_logp": "the same, log-probs of all rows (`with_logp`)",
    "limit: two products": "**limit** without dweight: two cuBLAS products",
    "ours, frozen head": "head frozen: no dweight",
    "ours, entropy_coef": "with an entropy bonus",
    "ours, ratio=sequence": "GSPO (four products)",
    "plain PyTorch": "plain PyTorch, whole logits",
    "cut-cross-entropy": "cut-cross-entropy, loss in PyTorch",
    "Liger": "Liger, `LigerFusedLinearGRPOLoss`",
    "limit: one product": "**limit** of log-probs: one cuBLAS product",
    "ours, linear_logprob with entropy": "**`linear_logprob`** with entropy, forward",
    "ours, linear_logprob": "`linear_logprob`, forward and backward (four products)",
    "ours, linear_logprob(keep_softmax=True)": "the same, `keep_softmax=True`",
    "limit: one product, N=": "**limit**: one cuBLAS product of {} rows",
    "ours, linear_logprob alone, N=": "`linear_logprob` of {} rows, forward",
    "host: ours, linear_logprob alone, N=": "on the host: a whole call of it, {} rows",
    "limit: three products, N=": "**limit**: three cuBLAS products of {} rows",
    "ours, loss alone, N=": "`linear_policy_loss` of {} rows",
    "host: ours, loss alone, N=": "on the host: a whole call of it and `backward`, {} rows",
    "copy of the logits": "**limit**: half of this copy's time",
    "ours, logits_logprob": "`logits_logprob` with entropy",
    "host: ours, new dweight, a whole call": "on the host: a whole call of `linear_policy_loss`",
    "host: ours, new dweight, before the first product": "on the host: before its first product",
}
TRL = {
    "trl": "TRL's own",
    "patched": "patched",
    "head": "patched, log-probs alone",
    "liger": "Liger's loss on the same hidden states",
}
SWEEP = """### Over V, N and D
Time and memory beside the limit, whose memory is that of the whole logits; and what small calls take on the host: a
whole call, not waiting for the GPU at its end, and until its first product starts, both from an idle GPU."""
PEERS = {"Liger": "liger-kernel", "cut-cross-entropy": "cut-cross-entropy"}
Result = Mapping[str, Any]
Row = Mapping[str, Any]


def number(value: float, digits: int = 3) -> str:
    """To so many significant digits, without an exponent: 0.0031, 1.08, 78.0, 960."""
    rounded = float(f"{value:.{digits - 1}e}")
    exponent = int(f"{rounded:e}".partition("e")[2])
    return f"{rounded:,.{max(0, digits - 1 - exponent)}f}"


def gib(value: float | None) -> str:
    return "" if value is None else "< 0.01 GiB" if value < 0.01 else f"{number(value, 2)} GiB"


def error(value: float | None) -> str:
    return "" if value is None else number(value, 2) if value >= 1e-4 else f"{value:.0e}".replace("e-0", "e-")


def ratio(row: Row) -> str:
    return number(row["over_limit"]) if row["over_limit"] else "1" if row["variant"].startswith("limit: three") else ""


def sized(shape: str) -> str:
    """N = 16,384, D = 4,096, bfloat16 for N=16384 D=4096 bfloat16."""
    told = re.sub(r"([A-Z])=(\d+)", lambda m: f"{m[1]} = {int(m[2]):,}", shape)
    return re.sub(r" (?=[A-Z] =|b?float|given)", ", ", told)


def made_with(result: Result) -> str:
    """Device, versions, date, commit and command."""
    versions = [f"{told} {result['versions'][name]}" for name, told in PACKAGES.items() if name in result["versions"]]
    where = ", ".join([result["device"], *([f"driver {result['driver']}"] if result["driver"] else []), *versions])
    return f"{where}; {result['date'][:10]}, commit {short(result['commit'])}, `{result['command']}`"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def variants(rows: Sequence[Row]) -> str:
    """A row for each variant that has a name: time, spread, × limit, memory, error."""
    owns = [(max((p for p in NAMES if row["variant"].startswith(p)), key=len, default=None), row) for row in rows]
    lines = []
    for prefix, name in NAMES.items():
        for row in (row for own, row in owns if own == prefix):
            told = name.format(row["variant"].rpartition("=")[2])
            if row["ms"] is None:
                lines.append([told, row["status"], "", "", "", ""])
                continue
            spread = f"{number(row['ms_min'])} to {number(row['ms_max'])}"
            measured = [number(row["ms"]), spread, ratio(row), gib(row["extra_gib"]), error(row["error"])]
            lines.append([told, *measured])
    return table(["", "ms", "least to most", "× limit", "extra memory", "error"], lines)


def lm_head(result: Result) -> str:
    """A table for each shape."""
    shapes = dict.fromkeys(row["shape"] for row in result["rows"])
    each = {shape: [row for row in result["rows"] if row["shape"] == shape] for shape in shapes}
    tables = [f"**{sized(shape)}**\n\n{variants(rows)}" for shape, rows in each.items()]
    return "\n\n".join([f"{made_with(result)}:", *tables])


def lm_head_sweep(result: Result) -> str:
    """The figures, and what small calls take on the host."""
    small = [row for row in result["rows"] if row["variant"].startswith("host: ours") and row["ms"] is not None]
    calls: dict[str, dict[str, Row]] = {}
    for row in small:
        calls.setdefault(row["shape"], {})[row["variant"].rpartition(", ")[2]] = row
    lines = [
        [sized(shape), number(next(iter(found.values()))["device_ms"]), *(number(row["ms"]) for row in found.values())]
        for shape, found in calls.items()
    ]
    head = ["`linear_policy_loss`", "ms of the GPU", *(f"host, {name}, ms" for name in next(iter(calls.values()), {}))]
    kinds = {"Time": "time", "Memory": "memory"}
    pictures = "\n".join(f"![{told} over V, N and D](figures/lm_head_{kind}.png)" for told, kind in kinds.items())
    return f"{SWEEP}\n\n{made_with(result)}:\n\n{pictures}\n\n{table(head, lines)}"


def advantage(result: Result) -> str:
    """The least and the most calls' times for each number of agents."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in result["rows"]:
        agents, _, samples = row["shape"].split()
        found.setdefault((agents[2:], samples[2:]), {})[row["variant"]] = row
    lines = [
        [agents, samples, *(number(1e3 * rows[name]["ms"]) for name in ("ours", "empty kernel")), ratio(rows["ours"]),
         *(number(1e3 * rows[name]["ms"]) for name in ("ours, graph", "empty kernel, graph", "eager reference"))]
        for (agents, samples), rows in found.items() if samples in ("8", "64")
    ]  # fmt: skip
    head = ["agents", "samples", "ours, µs", "empty kernel, µs", "× empty", "ours in a CUDA graph, µs",
            "empty kernel there, µs", "eager reference, µs"]  # fmt: skip
    return f"{made_with(result)}; 3 × 1,024 question-stages:\n\n{table(head, lines)}"


def adamw(result: Result) -> str:
    """Every variant beside a copy of as many bytes."""
    lines = []
    for row in result["rows"]:
        told = f"**{row['variant']}**" if row["variant"].startswith("limit") else row["variant"]
        if row["ms"] is None:
            lines.append([told, row["status"], "", "", "", ""])
            continue
        spread = f"{number(row['ms_min'])} to {number(row['ms_max'])}"
        step = (row.get("errors") or {}).get("step")
        lines.append([told, number(row["ms"]), spread, ratio(row), gib(row["extra_gib"]), error(step)])
    head = ["AdamW", "ms", "least to most", "× copy", "extra memory", "error of the step"]
    return f"{result['rows'][0]['shape']}; {made_with(result)}:\n\n{table(head, lines)}"


def trl_loss(result: Result) -> str:
    """TRL's step before and after."""
    rows = {row["variant"]: row for row in result["rows"]}
    lines = [
        [told, number(rows[name]["ms"]), f"{number(rows[name]['ms_min'])} to {number(rows[name]['ms_max'])}",
         gib(rows[name]["extra_gib"])]
        for name, told in TRL.items() if name in rows
    ]  # fmt: skip
    head = ["TRL's training step", "ms", "least to most", "extra memory"]
    return f"{result['rows'][0]['shape']}; {made_with(result)}:\n\n{table(head, lines)}"


def readme(result: Result) -> str:
    """One line a shape: ours, its memory, peers, the limit."""
    peers = {name: f"{name} {result['versions'].get(package, '')}" for name, package in PEERS.items()}
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in result["rows"]):
        rows = {row["variant"]: row for row in result["rows"] if row["shape"] == shape and row["ms"] is not None}
        ms = {name: f"{number(row['ms'])} ms" for name, row in rows.items()}
        ours, plain = "ours, new dweight", "plain PyTorch, whole logits"
        sizes = sized(shape).partition(", ")[2].removesuffix(", bfloat16")
        memory = {name: gib(rows[name]["extra_gib"]) for name in (ours, plain) if name in rows}
        whole = f"{ms[plain]}, {memory[plain]}" if plain in rows else ""
        others = [ms.get(name, "") for name in peers]
        lines.append([sizes, f"**{ms[ours]}**", memory[ours], *others, whole, ms["limit: three whole products"]])
    head = ["log-prob, policy loss and both gradients", "ours", "extra memory", *peers.values(), "plain PyTorch",
            "limit: three products"]  # fmt: skip
    return table(head, lines)


TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "lm_head": ("lm_head", lm_head),
    "lm_head_shapes": ("lm_head_shapes", lm_head),
    "lm_head_sweep": ("lm_head_sweep", lm_head_sweep),
    "advantage": ("advantage", advantage),
    "adamw": ("adamw", adamw),
    "trl_loss": ("trl_loss", trl_loss),
    "readme": ("lm_head", readme),
}


def rendered(page: str, results: Path = RESULTS) -> str:
    """The page's text with every table written anew; raises KeyError for a name that TABLES does not have."""

    def block(match: re.Match[str]) -> str:
        source, write = TABLES[match[2]]
        file = results / f"{source}.json"
        text = write(json.loads(file.read_text())) + "\n" if file.exists() else ""
        return match[1] + text + match[3]

    return BLOCK.sub(block, page)


if __name__ == "__main__":
    for name in PAGES:
        path = HERE.parent / name
        path.write_text(rendered(path.read_text()))
