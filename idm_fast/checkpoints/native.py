"""The project's own format: safetensors with a JSON header that says what the tensors cannot.

Metadata key ``idm_fast``: {"format": 1, "kind": "unet", "config": ModelConfig, "notes": {...}, "license": text,
"source": {...}}. The config holds the network, its noise schedule and what it predicts; ``source`` says of which file
the weights were converted, with its hash. The last two, and ``kind``, may be absent.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from idm_fast.checkpoints.format import check_finite
from idm_fast.checkpoints.kinds import KINDS, UNET, Kind, kind_of
from idm_fast.checkpoints.safetensors_header import check_container
from idm_fast.config import ModelConfig, from_dict
from idm_fast.errors import IdmFastError
from idm_fast.files import atomic
from idm_fast.models.unet import UNet

FORMAT = 1
_DTYPES = {"F16", "BF16", "F32", "F64"}
ConfigT = TypeVar("ConfigT")
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Checkpoint(Generic[ConfigT, ModuleT]):
    """A loaded model: ``config``, ``module`` (float32, evaluation mode) and free-form ``notes`` (how it was made).

    ``license``: what is known of the terms. ``source``: of converted weights, where they came from: file, sha256,
    format, which weights (averaged or raw), the settings that were given and those that were assumed.
    """

    config: ConfigT
    module: ModuleT
    notes: dict[str, Any]
    license: str = ""
    source: dict[str, Any] = field(default_factory=dict)


def save(
    path: Path,
    module: nn.Module,
    config: Any,
    notes: dict[str, Any],
    dtype: torch.dtype,
    *,
    license: str = "",
    source: dict[str, Any] | None = None,
) -> None:
    """Writes ``module``'s weights as ``dtype`` with ``config`` in the header; the file appears whole or not at all.

    ``notes`` and ``source`` hold plain JSON values. Raises ``IdmFastError`` for weights that ``dtype`` cannot hold.
    """
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in module.state_dict().items()}
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise IdmFastError(f"{path}: weights must be finite in {dtype}, got inf or nan in {bad[:3]}")
    header: dict[str, Any] = {"format": FORMAT, "kind": kind_of(config).name, "config": config.to_dict()}
    header |= {"notes": notes, "license": license, "source": source or {}}
    with atomic(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"idm_fast": json.dumps(header)})
        except SafetensorError as error:
            raise IdmFastError(f"{path}: cannot be written: {error}") from None


def load(path: Path) -> Checkpoint[ModelConfig, UNet]:
    """Reads a U-Net that ``save`` wrote. ``IdmFastError`` names the file and what is wrong with it."""
    return load_any(path, UNET)


def load_any(path: Path, wanted: Kind | None = None) -> Checkpoint[Any, Any]:
    """Reads a file that ``save`` wrote, of the kind ``wanted`` or any. ``IdmFastError`` names the file and the trouble.

    The network is laid out without memory and compared with the header first, so a damaged or hostile file costs no
    more than its own size.
    """
    made, tensors = _open(path, wanted, read=True)
    check_finite(str(path), tensors)
    made.module.load_state_dict(tensors, assign=True)
    made.module.eval().requires_grad_(False)
    return made


def inspect(path: Path) -> Checkpoint[Any, Any]:
    """The same without the weights: its module lies on the meta device."""
    return _open(path, None, read=False)[0]


def is_native(metadata: dict[str, str]) -> bool:
    """Whether a safetensors file's own text says that ``save`` wrote it."""
    return "idm_fast" in metadata


def _open(path: Path, wanted: Kind | None, read: bool) -> tuple[Checkpoint[Any, Any], dict[str, torch.Tensor]]:
    check_container(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(path, file.metadata() or {})
            kind = KINDS[header["kind"]]
            if wanted is not None and kind is not wanted:
                raise IdmFastError(f"{path}: must hold a network of kind {wanted.name}, got {kind.name}")
            config = from_dict(kind.config, header["config"], str(path))
            with torch.device("meta"):
                module = _network(path, kind, config)
            expected = module.state_dict()
            _check_shapes(path, expected, {name: file.get_slice(name) for name in file.keys()})  # noqa: SIM118
            names = expected if read else {}
            tensors = {name: file.get_tensor(name).to(torch.float32, copy=True) for name in names}
    except (SafetensorError, OSError) as error:
        raise IdmFastError(f"{path}: is not a whole safetensors file: {error}") from None
    return Checkpoint(config, module, header["notes"], header["license"], header["source"]), tensors


def _header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if not is_native(metadata):
        raise IdmFastError(f"{path}: header must hold the key 'idm_fast', got {sorted(metadata)[:5]}")
    try:
        header = json.loads(metadata["idm_fast"])
    except (ValueError, RecursionError) as error:
        raise IdmFastError(f"{path}: header 'idm_fast' must be JSON: {error}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        got = header.get("format") if isinstance(header, dict) else header
        raise IdmFastError(f"{path}: format must be {FORMAT}, got {got!r:.60}")
    header = {"kind": UNET.name, "notes": {}, "license": "", "source": {}} | header
    if "config" not in header or not isinstance(header["notes"], dict):
        raise IdmFastError(f"{path}: header must hold a 'config' and a table of 'notes', got {sorted(header)[:5]}")
    if not isinstance(header["license"], str) or not isinstance(header["source"], dict):
        raise IdmFastError(f"{path}: header must hold 'license' as text and 'source' as a table, got other types")
    if header["kind"] not in KINDS:
        raise IdmFastError(f"{path}: kind must be one of {', '.join(KINDS)}, got {header['kind']!r:.60}")
    return header


def _network(path: Path, kind: Kind, config: Any) -> nn.Module:
    try:
        return kind.build(config)
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
