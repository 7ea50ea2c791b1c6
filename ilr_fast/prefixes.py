"""What token sequences begin with in common."""

from __future__ import annotations

import numpy as np


def sorting_key(tokens: np.ndarray) -> bytes:
    """Bytes that sort as the tokens do (not negative, below 2^32), a prefix before what it is a prefix of."""
    return tokens.astype(">u4").tobytes()


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    return int(different.argmax()) if different.any() else n
