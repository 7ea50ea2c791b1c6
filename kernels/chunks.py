"""How many rows' logits the sweeps over the LM head hold at once, and what they hold in all. Loads neither torch nor
Triton, so that memory can be planned where neither is needed.

    held_bytes(8192, 151936, 896, "bfloat16", "cuda")      # beside inputs and dweight's buffer
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

# On a GPU in bfloat16, exponentials held at once: 1.25 GiB; for large heads, whose dweight each chunk reads and writes,
# up to two heads.
GPU_ELEMENTS = 5 * 2**27, 2**30
# On a GPU in float32 and float16, logits: 512 MiB of 16-bit floats.
GPU_WIDE_ELEMENTS = 2**28
# On a CPU: with fewer rows the products lose speed, with less than 64 MiB (float32) nothing is gained, and 256 MiB is
# the most.
CPU_ROWS = 256
CPU_ELEMENTS = 2**24, 2**26
CPU_BLOCK_ELEMENTS = 2**20  # logits worked on at once at most: 4 MiB, and a scratch of the same size
CPU_CACHE_BYTES = 2**24  # where the system does not tell
CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def gpu_chunk(vocabulary: int, depth: int) -> int:
    """Rows whose exponentials are held at once on a GPU in bfloat16."""
    least, most = GPU_ELEMENTS
    return max(128, min(max(2 * vocabulary * depth, least), most) // vocabulary)


def gpu_wide_chunk(vocabulary: int) -> int:
    """Rows whose logits are held at once on a GPU in float32 and float16."""
    return max(128, GPU_WIDE_ELEMENTS // vocabulary // 128 * 128)


def cpu_chunk(vocabulary: int) -> int:
    """Rows of logits held at once on a CPU."""
    few, many = (elements // vocabulary for elements in CPU_ELEMENTS)
    return max(16, min(CPU_ROWS, many), few)


def cpu_block(vocabulary: int, threads: int) -> int:
    """Rows of logits worked on at once on a CPU: every core has one, and with their scratch (both float32) they take
    half of the largest cache at most."""
    return max(threads, min(CPU_BLOCK_ELEMENTS, cpu_cache_bytes(CPU_CACHES) // 16) // vocabulary)


@cache
def cpu_cache_bytes(caches: Path) -> int:
    """The largest cache that the system names, as in /sys/devices/system/cpu/cpu0/cache/index3/size: 32768K."""
    try:
        sizes = [path.read_text().strip() for path in caches.glob("index*/size")]
        return max(int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes)
    except (OSError, ValueError, KeyError, IndexError):
        return CPU_CACHE_BYTES


def balanced(n: int, most: int, tile: int) -> int:
    """Rows of a chunk: as few chunks as `most` allows, of equal size, in whole tiles where that fits."""
    chunks = -(-n // min(n, most))
    rows = -(-n // chunks)
    return min(rows + -rows % tile, most) if most >= tile else rows


def rows_of(mib: int | None, vocabulary: int, size: int) -> int | None:
    """The `chunk` whose logits of `size` bytes take so many MiB; None for None, the sweeps' own choice."""
    return None if mib is None else max(128, mib * 2**20 // (vocabulary * size) // 128 * 128)


def held_bytes(rows: int, vocabulary: int, depth: int, dtype: str, device: str, chunk: int | None = None) -> int:
    """Bytes that `linear_policy_loss` holds at its peak for so many rows, beside its inputs and a `weight_grad_VD`.

    `dtype` as torch names it, `device` cuda or cpu, `chunk` as there. That is the chunk of logits or exponentials,
    dhidden of all rows, and what is made of one chunk's hidden states.
    """
    size = {"float64": 8, "float32": 4}.get(dtype, 2)
    if rows == 0:
        return 0
    if device == "cpu":
        chunk = min(rows, chunk or cpu_chunk(vocabulary))
        return chunk * vocabulary * size + CPU_BLOCK_ELEMENTS * (4 + size) + rows * depth * size
    if dtype != "bfloat16":
        return min(rows, chunk or gpu_wide_chunk(vocabulary)) * vocabulary * size + rows * depth * size
    chunk = balanced(rows, chunk or gpu_chunk(vocabulary, depth), tile=128)
    return chunk * vocabulary * 2 + chunk * depth * 4 + rows * depth * 2
