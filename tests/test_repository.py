"""What the texts of the repository name is there: files, links, commands, options, config keys. The wheel is whole."""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest
from ilr_benchmarks import bench
from vllm_needs import needs

from ilr_fast.cli import COMMANDS
from ilr_fast.config import Config
from ilr_fast.config_parse import walk

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "LOG.md"]
SOURCES = [path for folder in ("ilr_fast", "kernels", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py")]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
TEXTS = [*PAGES, *CONFIGS, *sorted(SOURCES)]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FOLDERS = "configs|docs|tests|benchmarks|ilr_fast|kernels"
FILE = re.compile(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]*\w\.(?:yaml|md|py|json|svg)\b")
COMMAND = re.compile(r"(?:^[ #$]*|`)ilr-fast ([a-z][a-z-]*)([^`\n|#]*)", re.MULTILINE)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(re.sub(r"(?s)```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"))):
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if link.startswith(("http://", "https://")):
            continue
        if not target.exists() or (anchor and anchor not in headings(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("text", TEXTS, ids=name_of)
def test_files_that_are_named_are_there(text: Path) -> None:
    named = set(FILE.findall(text.read_text(encoding="utf-8"))) - {"configs/mine.yaml", "configs/NAME.yaml"}
    missing = {name for name in named if not (ROOT / name).exists()}
    assert not missing


@cache
def options_of(command: str) -> set[str]:
    parser = argparse.ArgumentParser()
    COMMANDS[command][0](parser)
    return {"--debug", "--help"} | set(parser._option_string_actions)


KEYS = [path for path, _, _ in walk(Config)]
BENCHMARKS = {*bench.GPU, *bench.CPU, *bench.NAMED, bench.FIGURES}
SECTIONS = {part for path in KEYS for part in path.split(".")[:-1]}


def is_key(name: str) -> bool:
    """Whether a key's path, or the end of one, is known; an agent may have any name, a free mapping any keys."""
    pattern = re.sub(r"^agents\.[^.]+\.", "agents.<name>.", name)
    return any(
        path == pattern or path.endswith(f".{pattern}") or path.startswith(f"{pattern}.") or f".{pattern}." in path
        or pattern.startswith(("data.task_options.", "rollout.max_tokens.")) for path in KEYS
    )  # fmt: skip


def commands() -> Iterator[tuple[str, str, str]]:
    for text in TEXTS:
        for command, rest in COMMAND.findall(text.read_text(encoding="utf-8")):
            yield name_of(text), command, rest.split("   ")[0]


def test_commands_and_options_that_are_named_exist() -> None:
    wrong = []
    for where, command, rest in commands():
        known = options_of(command) if command in COMMANDS else set()
        keys = re.findall(r"(?<!\S)([a-z][\w.]*)=", rest)
        given = [option for option in re.findall(r"(?<![\w-])--[a-z-]+", rest) if option not in known]
        names = re.findall(r"^(?: [a-z_]+)+", rest)[0].split() if command == "bench" and rest[1:2].islower() else []
        if command not in COMMANDS or given or not all(map(is_key, keys)) or not set(names) <= BENCHMARKS:
            wrong.append((where, command, rest))
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_config_keys_that_are_named_exist(page: Path) -> None:
    words = re.findall(r"`([a-z_]+(?:\.[a-z_A-Z]+)+)(?:: [^`]*|=[^`]*)?`", page.read_text(encoding="utf-8"))
    wrong = {word for word in words if word.split(".")[0] in SECTIONS and not is_key(word.removesuffix(".py"))}
    assert not wrong


def test_the_wheel_has_every_package_and_every_file_that_is_read() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "ilr_fast").rglob("*.py")}
    named = {Path(*package.split(".")) for package in tool["packages"]}
    assert folders | {Path("ilr_kernels"), Path("ilr_benchmarks")} == named
    patterns = tool["package-data"]["ilr_fast"]
    others = [path.relative_to(ROOT / "ilr_fast") for path in (ROOT / "ilr_fast").rglob("*.*") if path.suffix != ".py"]
    left_out = [p for p in others if "__pycache__" not in p.parts and not any(fnmatch(str(p), g) for g in patterns)]
    assert not left_out
    assert (ROOT / "ilr_fast" / "py.typed").exists(), "its types are for others too"


def test_what_vllm_needs_is_on_pypi() -> None:
    """Torch without the name of a build that PyPI does not have; the markers stay."""
    lines = ["numpy", 'torch==2.13.0+cpu; platform_machine == "x86_64"', "torchaudio", "torchcodec>=0.14", "torch-c"]
    report = json.dumps({"install": [{"metadata": {"requires_dist": lines}}]})
    assert needs(report) == ["numpy", 'torch==2.13.0; platform_machine == "x86_64"', "torch-c"]
