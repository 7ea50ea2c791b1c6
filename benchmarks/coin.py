"""A grader for models with random weights: an answer is right by a coin that its text decides, so that groups differ.

    reward: {name: "ilr_benchmarks.coin:Coin"}
"""

from __future__ import annotations

import zlib

from ilr_fast.types import Grade, Question


class Coin:
    """Half of all texts are right."""

    def grade(self, question: Question, text: str) -> Grade:
        """1 or 0, by the text's checksum."""
        right = bool(zlib.crc32(text.encode()) & 1)
        return Grade(float(right), right, True, text[-20:], None)
