"""The sampling kernels under Triton's interpreter, in a process of its own; status 0: all agrees.

TRITON_INTERPRET=1 python tests/kernels_interpret_sample.py
"""

from __future__ import annotations

import os

from sample_cases import check_all

if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    check_all("cpu")
    print("all agree")
