"""What one public format is to this package: how it is recognised, what it asks, and how it is read.

A new format is one file that makes a ``Format``, and its line in ``formats.py``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from idm_fast.checkpoints.settings import Setting, Settings
from idm_fast.checkpoints.source import Source
from idm_fast.errors import IdmFastError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Reading:
    """A file understood: ``config``; ``module`` laid out on the meta device; and where its tensors lie.

    ``names``: our tensor -> theirs, several being stacked along their first dimension. A tensor whose elements are as
    many as ours but for dimensions of 1 is reshaped (1x1 convolutions are 1-D in some families). ``tensors``: the
    file's, by full name. ``dropped``: those that no network of ours needs, by intent. ``averaged``: whether the EMA
    weights were taken, None where the file has one kind only.
    """

    config: Any
    module: nn.Module
    names: Mapping[str, tuple[str, ...]]
    tensors: Mapping[str, Tensor]
    dropped: frozenset[str] = field(default_factory=frozenset)
    averaged: bool | None = None


@dataclass(frozen=True)
class Format:
    """``name``: the word of ``--format``. ``title``: what it is, for people. ``matches``: whether the names of a source
    are of this format. ``read``: (source, settings, averaged) -> Reading, where ``averaged`` is the caller's choice
    between EMA weights (True) and raw ones (False), None: the family's habit. ``aside``: settings that may be given and
    mean nothing here. ``kind``: of module, as ``native`` knows it.
    """

    name: str
    title: str
    matches: Callable[[Source], bool]
    read: Callable[[Source, Settings, bool | None], Reading]
    settings: tuple[Setting, ...] = ()
    aside: frozenset[str] = field(default_factory=frozenset)


def fitted(where: str, reading: Reading, *, copy: bool) -> dict[str, Tensor]:
    """The tensors of ``reading`` under our names, each of the shape that its module expects.

    ``copy``: independent of the file and float32; else as stored, mapped from the file. Raises ``IdmFastError`` listing
    missing and unexpected names with the nearest match, a wrong shape, a type that is no float, inf or nan.
    """
    expected = reading.module.state_dict()
    _check_names(where, reading, expected)
    made = {}
    for name, theirs in reading.names.items():
        parts = [reading.tensors[part] for part in theirs]
        made[name] = _fit(where, theirs, parts, tuple(expected[name].shape))
        if copy:
            made[name] = made[name].to(torch.float32, copy=True).contiguous()
    check_finite(where, made, {name: theirs[0] for name, theirs in reading.names.items()})
    return made


def check_finite(where: str, tensors: Mapping[str, Tensor], shown: Mapping[str, str] | None = None) -> None:
    """Raises ``IdmFastError`` with the names (as ``shown`` has them) of tensors that hold inf or nan."""
    bad = [name for name, tensor in tensors.items() if not _finite(tensor)]
    if bad:
        named = [(shown or {}).get(name, name) for name in bad[:3]]
        raise IdmFastError(f"{where}: weights must be finite, got inf or nan in {len(bad)} of them {named}")


def need(where: str, tensors: Mapping[str, Tensor], name: str, dims: int) -> tuple[int, ...]:
    """Shape of the tensor that a family cannot be without, of ``dims`` dimensions."""
    if name not in tensors:
        raise IdmFastError(f"{where}: tensor {name} must be there, got none; nearest {nearest(name, tensors)}")
    shape = tuple(tensors[name].shape)
    if len(shape) != dims or 0 in shape:
        raise IdmFastError(f"{where}: {name} must have {dims} dimensions of at least 1, got shape {shape}")
    return shape


def nearest(name: str, among: Iterable[str]) -> str:
    """The name most like ``name``, or "none like it"."""
    found = difflib.get_close_matches(name, list(among)[:5000], n=1, cutoff=0.75)
    return found[0] if found else "none like it"


def modules_to_names(module: nn.Module, pairs: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    """Of (our module, their module) pairs, which may name more than there is, the table of tensor names."""
    theirs = dict(pairs)
    made: dict[str, tuple[str, ...]] = {}
    for name in module.state_dict():
        owner, _, leaf = name.rpartition(".")
        made[name] = (f"{theirs[owner]}.{leaf}",)
    return made


def _check_names(where: str, reading: Reading, expected: Mapping[str, Tensor]) -> None:
    used = {part for theirs in reading.names.values() for part in theirs}
    missing = sorted(used - set(reading.tensors))
    extra = sorted(set(reading.tensors) - used - reading.dropped)
    missing += sorted(f"(ours) {name}" for name in set(expected) - set(reading.names))
    if not missing and not extra:
        return
    told = []
    if missing:
        told.append(f"{len(missing)} tensors missing: " + "; ".join(_with_nearest(name, extra) for name in missing[:3]))
    if extra:
        told.append(f"{len(extra)} unexpected: " + "; ".join(_with_nearest(name, missing) for name in extra[:3]))
    raise IdmFastError(f"{where}: tensors must be those of the network, got {', '.join(told)}")


def _with_nearest(name: str, among: list[str]) -> str:
    near = nearest(name, among)
    return name if near == "none like it" else f"{name} (nearest: {near})"


def _fit(where: str, names: tuple[str, ...], parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    for name, part in zip(names, parts, strict=True):
        if part.dtype not in _FLOATS:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
            raise IdmFastError(
                f"{where}: {name} must be one of {allowed}, got {str(part.dtype).removeprefix('torch.')}"
            )
    rows = sum(part.shape[0] if part.ndim else 1 for part in parts)
    stacked = (rows, *parts[0].shape[1:])
    if _squeezed(stacked) != _squeezed(shape) or any(part.shape[1:] != parts[0].shape[1:] for part in parts):
        got = tuple(parts[0].shape) if len(parts) == 1 else [tuple(part.shape) for part in parts]
        expected = shape if len(parts) == 1 else f"{shape} together"
        raise IdmFastError(f"{where}: {' + '.join(names)} must be {expected}, got {got}")
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(shape)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without trailing dimensions of 1: a 1x1 convolution is a matrix."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _finite(tensor: Tensor) -> bool:
    # A sum is inf or nan wherever one element is, and needs no table of flags; an overflow of it is looked at closely.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
