"""Any model file -> this project's own format, without ever holding the weights twice; or -> a diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from idm_fast.checkpoints import diffusers_vqgan, diffusers_write, native
from idm_fast.checkpoints.format import fitted
from idm_fast.checkpoints.kinds import UNET, VQGAN, kind_of
from idm_fast.checkpoints.native import Checkpoint
from idm_fast.checkpoints.opening import Opened, Progress, is_native, load, open_foreign, sha256, stored_dtype
from idm_fast.errors import IdmFastError

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def convert(
    path: str | Path,
    out: str | Path,
    settings: Mapping[str, Any] | None = None,
    format: str = "auto",
    *,
    averaged: bool | None = None,
    dtype: str | None = None,
    license: str = "",
    force: bool = False,
    progress: Progress | None = None,
) -> Opened:
    """Writes ``out`` (.safetensors) with the weights of ``path`` and what its header must say; returns what was read.

    Arguments as for ``load``. ``dtype``: fp16 or fp32, None = as stored. ``license``: a note on the terms, kept in the
    header. ``progress`` is told each stage. The file appears whole or not at all. Raises ``IdmFastError`` for a file
    that is there already (unless ``force``), and for all that ``load`` refuses.
    """
    path, out = Path(path), Path(out)
    tell = progress or (lambda stage: None)
    check_place(path, out, force)
    if dtype is not None and dtype not in DTYPES:
        raise IdmFastError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if is_native(path):
        raise IdmFastError(f"{path}: must be a file of another project, got one of this project already")
    tell("open")
    opened = open_foreign(path, settings, format, averaged=averaged)
    tell("check")
    tensors = fitted(str(path), opened.reading, copy=False)
    module = opened.reading.module
    module.load_state_dict(tensors, assign=True)
    del tensors
    tell("hash")
    source = opened.provenance(sha256(opened.source))
    tell("write")
    kept = DTYPES[dtype] if dtype is not None else stored_dtype(opened)
    terms = license or opened.source.metadata.get("license", "")
    native.save(out, module, opened.reading.config, {}, kept, license=terms, source=source)
    return opened


def export(
    path: str | Path,
    out: str | Path,
    settings: Mapping[str, Any] | None = None,
    format: str = "auto",
    *,
    averaged: bool | None = None,
    dtype: str | None = None,
) -> Checkpoint[Any, Any]:
    """Writes the network of ``path``, a file of this project or of another, as the folder ``out`` that diffusers loads.

    Arguments and errors as for ``convert``; the folder must not be there. Returns what was written. Raises
    ``IdmFastError`` for a network that the library cannot say.
    """
    loaded = load(path, settings, format, averaged=averaged)
    kept, kind = DTYPES["fp32" if dtype is None else dtype], kind_of(loaded.config)
    if Path(out).exists():
        raise IdmFastError(f"{out}: must not be there yet")
    if kind is UNET:
        diffusers_write.write(out, loaded.module, loaded.config, kept)
    elif kind is VQGAN:
        diffusers_vqgan.write(out, loaded.module, kept)
    else:
        raise IdmFastError(f"{path}: must be a U-Net or a VQGAN for diffusers, got {kind.name}")
    return loaded


def check_place(path: Path, out: Path, force: bool) -> None:
    """That ``out`` may be written."""
    if out.suffix != ".safetensors":
        raise IdmFastError(f"{out}: must end with .safetensors (or --to diffusers), got {out.suffix or 'no ending'}")
    if out.exists() and path.exists() and out.samefile(path):
        raise IdmFastError(f"{out}: must be another file than the one it is made of")
    if out.exists() and not force:
        raise IdmFastError(f"{out}: must not be there yet (--force overwrites it)")
