"""The full state of a training run on disk."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Protocol

import torch

from idm_fast.errors import IdmFastError
from idm_fast.files import atomic

_KEYS = {"step", "seconds", "settings"}
# Settings that may change between two parts of a run without making it another run.
_FREE = {"out", "steps", "workers", "save_every", "sheet_every", "data", "init_from", "vqgan", "prior", "irn"}


class Stateful(Protocol):
    """What a step changes: weights, their average, optimiser, scaler."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


def save_state(path: Path, step: int, seconds: float, settings: dict[str, Any], parts: Mapping[str, Stateful]) -> None:
    """Writes position, settings and all ``parts``; the file appears whole or not at all."""
    state = {"step": step, "seconds": seconds, "settings": settings}
    with atomic(path) as temporary:
        torch.save(state | {name: part.state_dict() for name, part in parts.items()}, temporary)


def load_state(path: Path, settings: dict[str, Any], parts: Mapping[str, Stateful], network: str) -> tuple[int, float]:
    """Restores ``parts`` from ``path``; returns (step, seconds). Other ``settings`` than the run's are an error.

    ``network``: its name, for errors.
    """
    try:
        # On the CPU first: the optimiser counts its steps there, and everything else is copied to where it lives.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise IdmFastError(f"{path}: is not a whole training state: {error}".splitlines()[0]) from None
    needed = _KEYS | parts.keys()
    if not isinstance(state, dict) or not state.keys() >= _KEYS | {"model"}:
        got = sorted(map(str, state))[:8] if isinstance(state, dict) else type(state).__name__
        raise IdmFastError(f"{path}: must be a training state with {sorted(needed)}, got {got}")
    check_unchanged(path, state["settings"], settings, _FREE)
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (RuntimeError, ValueError, KeyError) as error:
        raise IdmFastError(f"{path}: does not fit {network}: {error}".splitlines()[0]) from None
    return int(state["step"]), float(state["seconds"])


def check_unchanged(path: Path, old: dict[str, Any], new: dict[str, Any], free: Set[str] = frozenset()) -> None:
    """Raises ``IdmFastError`` naming every setting of the run in ``path`` that differs now, but for the ``free`` ones.

    Settings are compared as plain values, tables within by their keys ("loss.mse"). One that the run did not know
    yet is not compared.
    """
    changed = _changed(old, new, free)
    if changed:
        said = ", ".join(f"{key} = {before} (now {now})" for key, (before, now) in changed.items())
        raise IdmFastError(f"{path}: belongs to a run with {said}; give the same settings or another --out")


def _changed(old: dict[str, Any], new: dict[str, Any], free: Set[str], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for key, value in old.items():
        now = new.get(key)
        if isinstance(value, dict) and isinstance(now, dict):
            found |= _changed(value, now, free, f"{prefix}{key}.")
        elif prefix + key not in free and now != value:
            found[prefix + key] = (value, now)
    return found
