"""Functions that float32 kernels need exact near 0, where the plain formulas cancel."""

import triton
import triton.language as tl


@triton.jit
def tanh(z):
    """tanh z: by a Padé approximant below 1 (to 1e-9), above by the exponential."""
    s = z * z
    small = z * (135135.0 + s * (17325.0 + s * (378.0 + s))) / (135135.0 + s * (62370.0 + s * (3150.0 + s * 28.0)))
    return tl.where(s < 1.0, small, 1.0 - 2.0 / (tl.exp(2.0 * z) + 1.0))


@triton.jit
def log1p(z):
    """log(1 + z) by its series near 0, where 1 + z would round z away and a GPU's logarithm is off by 1e-8."""
    small = z * (1.0 - z * (0.5 - z * (1.0 / 3.0 - z * 0.25)))
    return tl.where(tl.abs(z) < 0.01, small, tl.log(1.0 + z))
