"""Files that are whole or not there: written beside their place, flushed to the disk, then renamed.

A rename within a folder is atomic, but only what has been flushed (fsync) survives a power cut, the folder's own entry
included; so the order is: file, its folder, rename, the folder above.

    write_text(Path("runs/a/results.json"), "[]\n")
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ilr_fast.errors import UserError

TEMPORARY = ".unfinished-"  # prefix of files and folders that were not completed
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
# Libraries that write through Rust or C++ lose errno; torch's archive writer only says that its position is off.
_FULL_TEXTS = (*(f"os error {number}" for number in _FULL), "No space left", "file write failed", "unexpected pos")


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8) atomically; on any error the old file stands as it was."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def point(link: Path, target: str) -> None:
    """Makes `link` a relative symbolic link to `target`, atomically."""
    temporary = link.with_name(f"{TEMPORARY}{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
    sync(link.parent)


def sync(path: Path) -> None:
    """Flushes one file or one folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flushes everything below a folder, and the folder."""
    for parent, _, files in os.walk(folder):
        for name in files:
            sync(Path(parent, name))
        sync(Path(parent))


def remove_tree(folder: Path) -> None:
    """Removes a folder so that a kill in between leaves no half of it under its own name."""
    doomed = folder.with_name(f"{TEMPORARY}{folder.name}")
    if doomed != folder:
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
    shutil.rmtree(doomed)


def clean(folder: Path) -> None:
    """Removes what was left unfinished directly in a folder. Only its one writer may call this."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def keep_lines(path: Path, good: Callable[[str], bool]) -> None:
    """Keeps the leading lines of a text file that are complete and `good`, and cuts off everything after them."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")[:-1]  # what follows the last newline is half a line, or nothing
    kept = 0
    for line in lines:
        if not good(line.decode("utf-8", errors="replace")):
            break
        kept += len(line) + 1
    if kept < path.stat().st_size:
        os.truncate(path, kept)


def append_line(path: Path, line: str) -> None:
    """Appends a line and flushes it; if that fails (a full disk), the file is as it was."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        os.truncate(path, size)
        raise


def is_full(error: BaseException) -> bool:
    """Whether an error, or one it was raised while handling, comes of a full disk, quota or file size limit."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if any(text in str(seen) for text in _FULL_TEXTS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def disk_errors(path: Path, remedy: str) -> Iterator[None]:
    """Turns a full disk, and a folder that can't be written, into a UserError about `path`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError):
            raise
        if is_full(error):
            free = shutil.disk_usage(_existing(path)).free / 2**30
            raise UserError(f"the disk is full ({free:.2f} GiB are free there)", str(path), remedy) from error
        if isinstance(error, OSError) and error.errno in _NOT_OURS:
            raise UserError(f"can't be written ({error.strerror})", str(path), "choose a folder of yours") from error
        raise


def check_writable(path: Path, where: str) -> None:
    """UserError, before anything is done for it, where `path` can't become a folder or a file; makes nothing."""
    there = _existing(path)
    if there != path and not there.is_dir():
        raise UserError(f"{there} is a file, not a folder", f"{where} {path}", "name another place")
    if not os.access(there, os.W_OK):
        raise UserError("it can't be written", f"{where} {path}", "name a place of yours")


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())
