"""The page's first lines: each trained agent alone, before and after."""

from __future__ import annotations

from typing import Any

from ilr_fast.report.content import Content
from ilr_fast.report.curves import labels_of
from ilr_fast.report.overview import line_name
from ilr_fast.report.texts import difference_text, interval_text, number, questions_text

MOST = 6  # with more, the tables tell it better


def tiles(content: Content) -> list[dict[str, Any]]:
    """A tile for each trained line of mode single; none where they are many."""
    with_arm, labels = len(content.arms) > 1, labels_of(content.arms) if content.arms else []
    found = []
    for group in content.groups:
        base = next((line for line in group.lines if line.method == "base"), None)
        for line in group.lines if group.mode == "single" else ():
            if line.is_base:
                continue
            to_base = line.to.get("base")
            n = questions_text(line.n, line.samples, line.seeds)
            text = f"95% interval {interval_text(line.ci95)}, n = {n}"
            if to_base is not None:
                text = f"against base: {difference_text(to_base)}, n = {n}"
            name = line.arm if with_arm else line.agent
            found.append({
                "who": f"{group.agent}, {line_name(line, with_arm)}: {group.benchmark}",
                "colour": labels.index(name) % 8 if name in labels else 0,
                "after": number(line.accuracy, "percent"),
                "before": number(base.accuracy, "percent") if base else "", "text": text,
            })  # fmt: skip
    return found if len(found) <= MOST else []
