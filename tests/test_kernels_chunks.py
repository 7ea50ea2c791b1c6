"""Rows held at once: on a CPU by its cores and caches."""

from __future__ import annotations

from pathlib import Path

import pytest
from ilr_kernels import chunks


def caches(folder: Path, *sizes: str) -> Path:
    for i, size in enumerate(sizes):
        (folder / f"index{i}").mkdir(parents=True)
        (folder / f"index{i}" / "size").write_text(size + "\n")
    return folder


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        (("32K", "32K", "512K", "4096K"), 2**22),
        (("48K", "2M"), 2**21),
        ((), chunks.CPU_CACHE_BYTES),
        (("unknown",), chunks.CPU_CACHE_BYTES),
    ],
)
def test_the_largest_cache(tmp_path: Path, sizes: tuple[str, ...], found: int) -> None:
    assert chunks.cpu_cache_bytes(caches(tmp_path, *sizes)) == found


def test_a_block_fits_half_of_the_cache_and_gives_every_core_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CPU_CACHES", caches(tmp_path / "small", "4096K"))
    assert chunks.cpu_block(4096, threads=2) == 64  # of 16 KiB, twice: 2 MiB
    assert chunks.cpu_block(262144, threads=8) == 8
    monkeypatch.setattr(chunks, "CPU_CACHES", caches(tmp_path / "large", "1024M"))
    assert chunks.cpu_block(4096, threads=2) * 4096 == chunks.CPU_BLOCK_ELEMENTS
