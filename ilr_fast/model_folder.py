"""What can be said about a Hugging Face folder before its weights are read.

    check_model_folder(Path("models/mine"), "agents.ada.model")

The configuration is there and names an architecture, a tokenizer is there, and the weights are: every shard, each as
long as its header says (a download that broke off is noticed here, not after minutes of loading).
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

from ilr_fast.errors import UserError

_REMEDY = "give a complete Hugging Face folder (config.json, tokenizer, weights), or a name from `ilr-fast get-model`"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_INDEX = {"model.safetensors.index.json", "pytorch_model.bin.index.json"}


def is_model_folder(folder: Path) -> bool:
    """Whether `folder` looks like a model: it has a configuration of a model or of an adapter."""
    return (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()


def check_model_folder(folder: Path, where: str) -> None:
    """UserError, naming `where`, for the first thing that `folder` lacks to be loaded."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", where, _REMEDY)
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"the folder {folder} can't be read", where, "give yourself read permission (chmod u+rx)")
    if not is_model_folder(folder):
        raise UserError(f"no config.json in {folder}", where, _REMEDY)
    adapter = (folder / "adapter_config.json").is_file()
    config = _read_json(folder / ("adapter_config.json" if adapter else "config.json"), where)
    if not adapter and not config.get("model_type"):
        raise UserError(f"{folder / 'config.json'} names no model_type", where, _REMEDY)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise UserError(f"no tokenizer in {folder} (none of {', '.join(_TOKENIZERS)})", where, _REMEDY)
    for path in _weight_files(folder, where):
        _check_safetensors(path, where)


def _read_json(path: Path, where: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error})", where, _REMEDY) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object", where, _REMEDY)
    return value


def _weight_files(folder: Path, where: str) -> list[Path]:
    files = [p for pattern in ("*.safetensors", "*model*.bin") for p in sorted(folder.glob(pattern))]
    for index in sorted(_INDEX):
        if (folder / index).is_file():
            shards = set(_read_json(folder / index, where).get("weight_map", {}).values())
            missing = sorted(shard for shard in shards if not (folder / shard).is_file())
            if missing:
                raise UserError(f"{missing[0]} is missing in {folder} (named by {index})", where, _REMEDY)
    if not files:
        raise UserError(f"no weights in {folder} (neither *.safetensors nor *.bin)", where, _REMEDY)
    return files


def _check_safetensors(path: Path, where: str) -> None:
    """A safetensors file is 8 bytes (the header's length), the JSON header, and the tensors that it describes."""
    if path.suffix != ".safetensors":
        return
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 1 << 27)))
        end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged or can't be read ({error})", where, "copy or download it again") from None
    size, wanted = path.stat().st_size, 8 + length + end
    if size != wanted:
        damage = f"{path} is cut short or damaged ({size:,} of {wanted:,} bytes)"
        raise UserError(damage, where, "copy or download it again")
