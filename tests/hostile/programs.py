"""Programs that want a reward without the work, or to do harm: the sections of programs.txt.

An attack sets `won`; the right `f` is defined only if it succeeds: a right answer means harm was done. The runner
puts these names in front: SECRET (an environment variable's name), VICTIM (a process id), PORT (of a listening socket),
FOLDER (anyone may write there; it holds the file `data`, whose content is "granted").
"""

from __future__ import annotations

import re
from pathlib import Path

GRANTED = "def f(a, b): return a + b\n"


def attack(body: str) -> str:
    """A program that runs `body` and defines `f` right only if that set `won`."""
    indented = "\n".join("    " + line for line in body.splitlines())
    return f"won = False\ntry:\n{indented}\nexcept Exception:\n    pass\nif won:\n    {GRANTED}else:\n    f = None\n"


def _read() -> dict[str, str]:
    text = (Path(__file__).parent / "programs.txt").read_text()
    sections = re.findall(r"^### (attack: )?(.+)\n((?:(?!### ).*\n?)*)", text, re.MULTILINE)
    return {name: attack(body.rstrip()) if is_attack else body for is_attack, name, body in sections}


PROGRAMS = {**_read(), "nul bytes": "f = '\0'", "deep program": "f = " + "(" * 10_000 + ")" * 10_000}
