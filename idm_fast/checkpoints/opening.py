"""Any model file -> our network: detection, settings, weights that fit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from idm_fast.checkpoints import native
from idm_fast.checkpoints.format import Format, Reading, fitted
from idm_fast.checkpoints.formats import choose
from idm_fast.checkpoints.native import Checkpoint
from idm_fast.checkpoints.safetensors_header import check_container
from idm_fast.checkpoints.settings import Settings
from idm_fast.checkpoints.source import Source, open_source
from idm_fast.errors import IdmFastError

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Opened:
    """A foreign file whose network is known and whose weights are still on disk."""

    source: Source
    format: Format
    reading: Reading
    settings: Settings

    def provenance(self, digest: str = "") -> dict[str, Any]:
        """The header's ``source``: where weights came from and what had to be assumed."""
        weights = {True: "averaged", False: "raw", None: "the only ones"}[self.reading.averaged]
        made: dict[str, Any] = {"file": self.source.path.name, "format": self.format.name, "weights": weights}
        made |= {"sha256": digest} if digest else {}
        return made | {"settings": self.settings.given, "assumed": self.settings.assumed}


def load(
    path: str | Path,
    settings: Mapping[str, Any] | None = None,
    format: str = "auto",
    *,
    averaged: bool | None = None,
) -> Checkpoint[Any, Any]:
    """A model file of this project, or of a public family, as (config, float32 module in evaluation mode).

    ``path``: a native .safetensors, a torch file (.pt, .pth, .ckpt), a safetensors file of a public family, or a
    diffusers folder. ``settings``: what the keys cannot tell, by the family's own words (see docs/checkpoints.md);
    unknown ones are refused, absent ones have defaults, which ``source["assumed"]`` lists. ``format``: a name of
    ``FORMATS``, or "auto". ``averaged``: EMA weights (True), raw ones (False), or the family's habit (None).

    The module is called as ``(x, t)``, ``(x, t, low_res)`` for super-resolution (which it enlarges itself),
    ``(x, noise_level, cond)`` for SR3, with ``labels=`` where it has classes; nothing stored in the file is run.
    Raises ``IdmFastError`` naming the file, and the tensor or setting, with what was expected and what came.
    """
    path = Path(path)
    if is_native(path):
        refuse_answers(path, settings, format, averaged)
        return native.load_any(path)
    opened = open_foreign(path, settings, format, averaged=averaged)
    tensors = fitted(str(path), opened.reading, copy=True)
    module = opened.reading.module
    module.load_state_dict(tensors, assign=True)
    module.eval().requires_grad_(False)
    return Checkpoint(opened.reading.config, module, {}, opened.source.metadata.get("license", ""), opened.provenance())


def open_foreign(
    path: Path,
    settings: Mapping[str, Any] | None = None,
    format: str = "auto",
    *,
    averaged: bool | None = None,
    lenient: bool = False,
) -> Opened:
    """Reads what a foreign file is and where its weights lie, without reading the weights.

    ``lenient``: settings without a sound default need not be given, since nothing will be computed.
    """
    given = dict(settings or {})
    if format == "auto" and isinstance(given.get("format"), str):
        format = given["format"]
    source = open_source(path)
    try:
        chosen = choose(source, format)
        answers = Settings(
            str(path), chosen.settings, {k: v for k, v in given.items() if k not in chosen.aside}, lenient
        )
        reading = chosen.read(source, answers, averaged)
        if averaged and not reading.averaged:
            raise IdmFastError(
                f"{path}: averaged (EMA) weights were asked for and must lie beside the raw ones, "
                f"got a file of format {chosen.name} with one kind of weights; leave --ema out to take those"
            )
    except IdmFastError as error:
        raise error if str(path) in str(error) else IdmFastError(f"{path}: {error}") from None
    return Opened(source, chosen, reading, answers)


def refuse_answers(path: Path, settings: Mapping[str, Any] | None, format: str, averaged: bool | None) -> None:
    """A file of this project says all of itself: an answer given beside it would be ignored."""
    if settings or format not in ("auto", "native") or averaged is not None:
        raise IdmFastError(f"{path}: is a file of this project, which takes no format, settings or choice of weights")


def is_native(path: Path) -> bool:
    """Whether ``path`` is a file that this project wrote; False also for what cannot be read."""
    if path.is_dir() or path.suffix.lower() != ".safetensors":
        return False
    check_container(path)
    try:
        with safe_open(path, framework="pt") as file:
            return native.is_native(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise IdmFastError(f"{path}: is not a whole safetensors file: {error}") from None


def sha256(source: Source, progress: Progress | None = None) -> str:
    """Hash of the weights file, in hexadecimal."""
    digest = hashlib.sha256()
    for file in source.files:
        with file.open("rb") as opened:
            while block := opened.read(1 << 22):
                digest.update(block)
                if progress is not None:
                    progress("hash")
    return digest.hexdigest()


def stored_dtype(opened: Opened) -> torch.dtype:
    """float16 where every tensor of the file is of 16 bits (bfloat16 where all are), else float32."""
    kinds = {opened.reading.tensors[name].dtype for names in opened.reading.names.values() for name in names}
    if kinds == {torch.bfloat16}:
        return torch.bfloat16
    return torch.float16 if kinds == {torch.float16} else torch.float32
