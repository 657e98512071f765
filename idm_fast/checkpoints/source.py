"""A file or folder of weights, opened without running anything in it: its tensors by name, and the text beside them.

Tensors are mapped from disk where the container allows it, so opening costs no memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from idm_fast.checkpoints.safetensors_header import check_container, is_believable
from idm_fast.checkpoints.torch_file import load_torch, looks_like_torch
from idm_fast.errors import IdmFastError

_LARGEST_JSON = 8 << 20  # bytes; a config of diffusers has about 1,000
_LONGEST_NAME = 500  # characters of a tensor's name; the public families stay below 100
_NESTED = ("state_dict", "model_state_dict", "model", "network", "params", "weights")
_AVERAGED = ("ema", "ema_state_dict", "model_ema", "params_ema", "ema_model")
_WRAPPERS = ("module.", "_orig_mod.", "_forward_module.")


@dataclass(frozen=True)
class Source:
    """``tensors`` by their names in the file, wrappers such as ``module.`` taken off; ``averaged``: a second table of
    them that training averaged (EMA), where the file has one apart. ``config``, ``scheduler``: the JSON of a diffusers
    folder. ``metadata``: of a safetensors header. ``container``: what kind of file this is, in words.
    """

    path: Path
    container: str
    tensors: dict[str, Tensor]
    averaged: dict[str, Tensor] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()  # of which the weights came

    def __post_init__(self) -> None:
        for name in (*self.tensors, *(self.averaged or ())):  # messages show them, on a terminal
            if not name.isprintable() or len(name) > _LONGEST_NAME:
                raise IdmFastError(
                    f"{self.path}: names of tensors must be printable, of at most {_LONGEST_NAME} characters, "
                    f"got {len(name)} characters that begin with {name[:60]!r}"
                )

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def open_source(path: str | Path) -> Source:
    """Opens a torch file (.pt, .pth, .ckpt, .bin), a safetensors file, or a diffusers folder.

    Raises ``IdmFastError`` naming the file and what is wrong with it: nothing there, damaged, a global that is not
    admitted, more to unpack than there is, no tensors.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _folder(path)
        if not path.is_file():
            raise IdmFastError(f"{path}: must be a weights file or a diffusers folder, got nothing there")
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise IdmFastError(f"{path}: cannot be read: {error.strerror or error}") from None
    if path.suffix.lower() != ".safetensors" and looks_like_torch(start):
        return _torch(path)
    if path.suffix.lower() != ".safetensors" and not is_believable(path, start):
        raise IdmFastError(
            f"{path}: must be a torch file (an archive or a pickle), safetensors, or a diffusers folder, "
            f"got {path.stat().st_size} bytes that begin with {start!r}"
        )
    return _safetensors(path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, which must be of a sane size."""
    try:
        size = path.stat().st_size
        if size > _LARGEST_JSON:
            raise IdmFastError(f"{path}: must be a JSON file of at most {_LARGEST_JSON} bytes, got {size}")
        made = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise IdmFastError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise IdmFastError(f"{path}: must be JSON: {error}") from None
    if not isinstance(made, dict):
        raise IdmFastError(f"{path}: must hold a JSON object, got {type(made).__name__}")
    return made


def _torch(path: Path) -> Source:
    tree = load_torch(path)
    if not isinstance(tree, Mapping):
        raise IdmFastError(f"{path}: must hold a table of tensors, got {type(tree).__name__}")
    tensors, name = _table(tree, _NESTED)
    averaged, other = _table(tree, _AVERAGED) if name or not tensors else ({}, "")
    if not tensors:  # averaged weights alone
        tensors, averaged, name = averaged, {}, other
    if not tensors:
        raise IdmFastError(f"{path}: must hold tensors, or a table of them under {_NESTED[0]}, got {_names(tree)}")
    stored = path.stat().st_size
    _check_honest(path, {**tensors, **{f"averaged {key}": value for key, value in averaged.items()}}, stored)
    container = "torch file, {" + f'"{name}": ...' + "}" if name else "torch file"
    return Source(path, container, _unwrapped(tensors), _unwrapped(averaged) or None, files=(path,))


def _table(tree: Mapping[Any, Any], nested: tuple[str, ...]) -> tuple[dict[str, Tensor], str]:
    """The tensors of ``tree`` itself, or of the first of ``nested`` that has some, with its name."""
    for name in nested:
        inner = tree.get(name)
        if isinstance(inner, Mapping) and (found := _tensors(inner)):
            return found, name
    return (_tensors(tree), "") if nested is _NESTED else ({}, "")


def _tensors(table: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in table.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that wrappers of training put before every name."""
    again = True
    while again and tensors:
        again = False
        for prefix in _WRAPPERS:
            if all(name.startswith(prefix) for name in tensors):
                tensors, again = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}, True
    return tensors


def _check_honest(path: Path, tensors: dict[str, Tensor], stored: int) -> None:
    """A tensor may claim more elements than it has bytes (strides of 0): copied out, it would fill the memory."""
    total = 0
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise IdmFastError(f"{path}: {name} must be a plain tensor, got {tensor.layout} on {tensor.device}")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise IdmFastError(
                f"{path}: {name} must have its {tensor.nbytes} bytes, got {tensor.untyped_storage().nbytes()} stored"
            )
        total += tensor.nbytes
    if total > 4 * stored:  # some share their bytes; none do so often
        raise IdmFastError(f"{path}: tensors must fit into the file's {stored} bytes, got {total} bytes of them")


def _safetensors(path: Path) -> Source:
    check_container(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise IdmFastError(f"{path}: is not a whole safetensors file: {error}") from None
    if not tensors:
        raise IdmFastError(f"{path}: must hold tensors, got none")
    return Source(path, "safetensors file", _unwrapped(tensors), metadata=metadata, files=(path,))


def _folder(path: Path) -> Source:
    """Of diffusers: a model's own folder, or a pipeline's with its U-Net or else its autoencoder inside."""
    inside = next((path / name for name in ("unet", "vqvae", "vae") if (path / name / "config.json").is_file()), path)
    inside = path if (path / "config.json").is_file() else inside
    if not (inside / "config.json").is_file():
        found = sorted(entry.name for entry in path.iterdir())[:5]
        raise IdmFastError(f"{path}: must be a diffusers folder with config.json or unet/config.json, got {found}")
    config = read_json(inside / "config.json")
    scheduler = next(
        (place for base in (path, path.parent) if (place := base / "scheduler" / "scheduler_config.json").is_file()),
        None,
    )
    weights = _folder_weights(inside)
    source = _torch(weights) if weights.suffix == ".bin" else _safetensors(weights)
    return Source(
        path, f"diffusers folder, {weights.name}", source.tensors, None, config,
        read_json(scheduler) if scheduler else {}, files=(weights,),
    )  # fmt: skip


def _folder_weights(folder: Path) -> Path:
    stem = "diffusion_pytorch_model"
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{stem}.bin", f"{stem}.fp16.bin"):
        if (folder / name).is_file():
            return folder / name
    if list(folder.glob(f"{stem}*.index.json")):
        raise IdmFastError(f"{folder}: weights must be one file = {stem}.safetensors, got several shards")
    found = sorted(entry.name for entry in folder.iterdir())[:5]
    raise IdmFastError(f"{folder}: must hold {stem}.safetensors or {stem}.bin, got {found}")


def _names(tree: Mapping[Any, Any]) -> str:
    return repr([str(key)[:40] for key in list(tree)[:5]])
