"""In the verifier's process: math-verify's slow parts, done fast where that changes no verdict.

- Its parser is ANTLR's, which by default looks as far ahead as its grammar may need (LL). A parse that succeeds with
  the cheaper look-ahead (SLL) is the same parse; one that fails is begun again with the whole one.
- Two expressions that differ at one point are not equal: `simplify` is asked only where they agree there.
"""

from __future__ import annotations

import random
from typing import Any

DIGITS = 30
APART = 1e-9  # relative to the values: far above the rounding of DIGITS digits


def install() -> None:
    """Replaces the parser's look-ahead and the symbolic comparison, once a process."""
    import math_verify.grader as grader
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy

    whole, parse, simplified = _Latex2Sympy.create_parser, _Latex2Sympy.parse, grader.sympy_symbolic_eq

    def create_parser(self: Any, latex: str) -> Any:
        parser = whole(self, latex)
        if getattr(self, "_short", True):
            parser._interp.predictionMode = PredictionMode.SLL
        return parser

    def parse_twice(self: Any, latex: str) -> Any:
        try:
            return parse(self, latex)
        except Exception:
            self._short = False
            return parse(self, latex)

    _Latex2Sympy.create_parser, _Latex2Sympy.parse = create_parser, parse_twice
    grader.sympy_symbolic_eq = lambda a, b: not apart(a, b) and simplified(a, b)


def apart(a: Any, b: Any) -> bool:
    """Whether two sympy expressions, or an entry of two matrices, differ at one point of positive coordinates.

    False says nothing: they agree there, or one has no finite value.
    """
    from sympy import Expr, MatrixBase, Rational

    if isinstance(a, MatrixBase) and isinstance(b, MatrixBase) and a.shape == b.shape:
        return any(apart(x, y) for x, y in zip(a, b, strict=True))
    if not (isinstance(a, Expr) and isinstance(b, Expr)):
        return False
    draw = random.Random(1)
    names = sorted(a.free_symbols | b.free_symbols, key=str)
    point = {name: Rational(draw.randrange(1, 10**6), 10**6) + 1 for name in names}
    try:
        x, y = (complex(one.subs(point).evalf(DIGITS)) for one in (a, b))
    except (TypeError, ValueError, OverflowError, ArithmeticError, AttributeError):
        return False
    size = abs(x) + abs(y)
    return size < float("inf") and abs(x - y) > APART * max(size, 1.0)
