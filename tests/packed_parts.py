"""The packed parts of a report's page, unpacked for the tests."""

from __future__ import annotations

import gzip
import json
import re
from base64 import b64decode


def unpacked(page: str, part: str) -> str:
    """The text of `library`, `figures` or `spoken`."""
    text = re.search(rf'<script type="text/plain" id="{part}">([^<]*)</script>', page).group(1)
    return gzip.decompress(b64decode(text)).decode("utf-8")


def figures_of(page: str) -> list[dict]:
    """The page's figures: {title, spec, columns, legend}."""
    return json.loads(unpacked(page, "figures"))["figures"]


def spoken_of(page: str) -> dict:
    """The kept dialogues: {runs, dialogues}."""
    return json.loads(unpacked(page, "spoken"))
