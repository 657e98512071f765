"""The project's own format: safetensors with a JSON header that says what the tensors cannot.

Metadata key ``idm_fast``: {"format": 1, "config": ModelConfig, "notes": {...}}.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from idm_fast.config import ModelConfig, from_dict
from idm_fast.errors import IdmFastError
from idm_fast.files import atomic
from idm_fast.models.unet import UNet

FORMAT = 1
_DTYPES = {"F16", "BF16", "F32", "F64"}
_LARGEST_HEADER = 8 << 20  # bytes; the header of a network of a thousand tensors has about 100,000


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model: ``config``, ``module`` (float32, evaluation mode) and free-form ``notes`` (how it was made)."""

    config: ModelConfig
    module: UNet
    notes: dict[str, Any]


def save(path: Path, module: UNet, config: ModelConfig, notes: dict[str, Any], dtype: torch.dtype) -> None:
    """Writes ``module``'s weights as ``dtype`` with ``config`` in the header; the file appears whole or not at all.

    ``notes`` holds plain JSON values. Raises ``IdmFastError`` for weights that ``dtype`` cannot hold.
    """
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in module.state_dict().items()}
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise IdmFastError(f"{path}: weights must be finite in {dtype}, got inf or nan in {bad[:3]}")
    header = json.dumps({"format": FORMAT, "config": config.to_dict(), "notes": notes})
    with atomic(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"idm_fast": header})
        except SafetensorError as error:
            raise IdmFastError(f"{path}: cannot be written: {error}") from None


def load(path: Path) -> Checkpoint:
    """Reads a file that ``save`` wrote. ``IdmFastError`` names the file and what is wrong with it.

    The network is laid out without memory and compared with the header first, so a damaged or hostile file costs no
    more than its own size.
    """
    _check_container(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(path, file.metadata() or {})
            config = from_dict(ModelConfig, header["config"], str(path))
            with torch.device("meta"):
                module = _network(path, config)
            expected = module.state_dict()
            _check_shapes(path, expected, {name: file.get_slice(name) for name in file.keys()})  # noqa: SIM118
            tensors = {name: file.get_tensor(name).to(torch.float32, copy=True) for name in expected}
    except (SafetensorError, OSError) as error:
        raise IdmFastError(f"{path}: is not a whole safetensors file: {error}") from None
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise IdmFastError(f"{path}: weights must be finite, got inf or nan in {len(bad)} of them {bad[:3]}")
    module.load_state_dict(tensors, assign=True)
    return Checkpoint(config, module.eval().requires_grad_(False), header["notes"])


def _check_container(path: Path) -> None:
    """A file, and one whose first eight bytes (the length of its JSON header) are believable."""
    try:
        if not path.is_file():
            got = "a folder" if path.is_dir() else "nothing there"
            raise IdmFastError(f"{path}: must be a weights file (.safetensors), got {got}")
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise IdmFastError(f"{path}: cannot be read: {error.strerror}") from None
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= min(size - 8, _LARGEST_HEADER):
        raise IdmFastError(
            f"{path}: must be a safetensors file with a header of 2..{_LARGEST_HEADER} bytes inside it, "
            f"got {size} bytes that begin with {start[:8]!r}"
        )


def _header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if "idm_fast" not in metadata:
        raise IdmFastError(f"{path}: header must hold the key 'idm_fast', got {sorted(metadata)[:5]}")
    try:
        header = json.loads(metadata["idm_fast"])
    except (ValueError, RecursionError) as error:
        raise IdmFastError(f"{path}: header 'idm_fast' must be JSON: {error}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        got = header.get("format") if isinstance(header, dict) else header
        raise IdmFastError(f"{path}: format must be {FORMAT}, got {got!r:.60}")
    if "config" not in header or not isinstance(header.get("notes", {}), dict):
        raise IdmFastError(f"{path}: header must hold a 'config' and a table of 'notes', got {sorted(header)[:5]}")
    return {"notes": {}} | header


def _network(path: Path, config: ModelConfig) -> UNet:
    try:
        return UNet(config.unet)
    except IdmFastError as error:
        raise IdmFastError(f"{path}: {error}") from None


def _check_shapes(path: Path, expected: dict[str, torch.Tensor], slices: dict[str, Any]) -> None:
    missing, extra = sorted(set(expected) - set(slices)), sorted(set(slices) - set(expected))
    if missing or extra:
        raise IdmFastError(f"{path}: {len(missing)} tensors missing {missing[:3]}, {len(extra)} unexpected {extra[:3]}")
    for name, stored in slices.items():
        shape = tuple(stored.get_shape())
        if shape != tuple(expected[name].shape):
            raise IdmFastError(f"{path}: {name} must be {tuple(expected[name].shape)}, got {shape}")
        if stored.get_dtype() not in _DTYPES:
            raise IdmFastError(f"{path}: {name} must be one of {sorted(_DTYPES)}, got {stored.get_dtype()}")
