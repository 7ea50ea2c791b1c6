"""A plan as a table in the terminal: what is held by whom, a column for each phase, GiB."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ilr_fast.fill_in import Remedy
from ilr_fast.memory import GIB
from ilr_fast.plan import DevicePlan, RunPlan


def print_plan(
    planned: RunPlan, filled: Sequence[str] = (), found: Sequence[Remedy] = (), console: Console | None = None
) -> None:
    """All devices, the host, what was `auto`, and for what does not fit the remedies."""
    console = console or Console()
    for device in (*planned.devices, planned.host):
        console.print(_table(device))
        console.print(_verdict(device), highlight=False)
    if filled:
        console.print("\nauto: " + escape("  ".join(filled)), highlight=False, soft_wrap=True)
    if found:
        console.print(_remedies(found))


def _table(device: DevicePlan) -> Table:
    table = Table(title=f"{device.device}, GiB", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("")
    for phase in device.phases:
        table.add_column(escape(phase.name), justify="right")
    rows = dict.fromkeys((part.agent, part.item) for phase in device.phases for part in phase.parts)
    sizes = [{(part.agent, part.item): part.size for part in phase.parts} for phase in device.phases]
    for agent, item in sorted(rows, key=lambda row: list(dict.fromkeys(a for a, _ in rows)).index(row[0])):
        name = escape(f"{agent} {item}".strip())
        table.add_row(name, *(_gib(held.get((agent, item), 0)) for held in sizes))
    table.add_section()
    table.add_row("together", *(_gib(phase.total) for phase in device.phases), style="bold")
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size else "·"


def _verdict(device: DevicePlan) -> str:
    peak = f"{device.worst.total / GIB:.2f} GiB at most ({escape(device.worst.name)})"
    if device.capacity is None:
        return peak
    there = f"of {device.capacity / GIB:.1f} GiB"
    return f"{peak} {there}: {'[green]fits[/]' if device.fits else '[red]does not fit[/]'}"


def _remedies(found: Sequence[Remedy]) -> Table:
    table = Table(title="what would change it", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for name in ("keys", "GiB", ""):
        table.add_column(name, justify="right" if name == "GiB" else "left", overflow="fold")
    for remedy in found:
        fits = "[green]fits[/]" if remedy.plan.fits else "does not fit"
        table.add_row(escape(remedy.text.replace(" ", "\n")), _gib(remedy.plan.peak), fits)
    return table
