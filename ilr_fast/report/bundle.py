"""The plotting library as it stands in the page, and data as the page unpacks it.

Vega, Vega-Lite and Vega-Embed come from the package `vl-convert-python`, which carries them for Python: 0.9 MB of
JavaScript, 0.3 MB compressed, where plotly's Python package brings 4.8 MB (1.5 MB). From the same specifications
vl-convert also draws PDF and SVG without a browser. Library and data are gzip in base64, which browsers since 2023
unpack by themselves (DecompressionStream); whatever a model wrote is inside such a part, never markup.
"""

from __future__ import annotations

import gzip
import json
from base64 import b64encode
from functools import cache
from typing import Any

MISSING = "figures are left out: pip install vl-convert-python, then ilr-fast report"


@cache
def library() -> str:
    """Vega-Embed with all that it needs as one script, packed; it puts `vegaEmbed` into `window`.

    Empty where the package is not installed, as in an environment that was not made by pip: a run's end must not fail
    for its figures, and the page and the terminal say what to install.
    """
    try:
        import vl_convert
    except ImportError:
        return ""
    return packed(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def packed(value: Any) -> str:
    """A text, or anything else as JSON, gzipped and in base64; the same value always gives the same text."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return b64encode(gzip.compress(text.encode("utf-8", errors="replace"), 9, mtime=0)).decode("ascii")
