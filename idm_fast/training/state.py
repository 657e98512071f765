"""The full state of a training run on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from idm_fast.errors import IdmFastError
from idm_fast.files import atomic

if TYPE_CHECKING:
    from idm_fast.training.intrinsic import Trainer

_KEYS = {"step", "seconds", "settings", "model", "ema", "optimizer", "scaler"}
# Settings that may change between two parts of a run without making it another run.
_FREE = {"out", "steps", "workers", "save_every", "sheet_every", "data", "init_from"}


def save_state(path: Path, trainer: Trainer) -> None:
    """Writes weights, average, optimiser, scaler, position and settings; the file appears whole or not at all."""
    state = {
        "step": trainer.step,
        "seconds": trainer.seconds,
        "settings": trainer.settings.to_dict(),
        "model": trainer.model.state_dict(),
        "ema": trainer.ema.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
    }
    if trainer.critic_optimizer is not None and trainer.loss.critic is not None:
        state["critic"] = trainer.loss.critic.state_dict()
        state["critic_optimizer"] = trainer.critic_optimizer.state_dict()
    with atomic(path) as temporary:
        torch.save(state, temporary)


def load_state(path: Path, trainer: Trainer) -> tuple[int, float]:
    """Restores ``trainer`` from ``path``; returns (step, seconds). Other settings than the run's are an error."""
    try:
        # On the CPU first: the optimiser counts its steps there, and everything else is copied to where it lives.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise IdmFastError(f"{path}: is not a whole training state: {error}".splitlines()[0]) from None
    if not isinstance(state, dict) or not state.keys() >= _KEYS:
        got = sorted(map(str, state))[:8] if isinstance(state, dict) else type(state).__name__
        raise IdmFastError(f"{path}: must be a training state with {sorted(_KEYS)}, got {got}")
    changed = _changed(state["settings"], trainer.settings.to_dict())
    if changed:
        said = ", ".join(f"{key} = {old} (now {new})" for key, (old, new) in changed.items())
        raise IdmFastError(f"{path}: belongs to a run with {said}; give the same settings or another --out")
    try:
        trainer.model.load_state_dict(state["model"])
        trainer.ema.model.load_state_dict(state["ema"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.scaler.load_state_dict(state["scaler"])
        if trainer.critic_optimizer is not None and trainer.loss.critic is not None:
            trainer.loss.critic.load_state_dict(state["critic"])
            trainer.critic_optimizer.load_state_dict(state["critic_optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise IdmFastError(f"{path}: does not fit {trainer.config.name}: {error}".splitlines()[0]) from None
    return int(state["step"]), float(state["seconds"])


def _changed(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings of the run that differ now. One that the run did not know yet is not compared."""
    found: dict[str, tuple[Any, Any]] = {}
    for key, value in old.items():
        now = new.get(key)
        if isinstance(value, dict) and isinstance(now, dict):
            found |= _changed(value, now, f"{prefix}{key}.")
        elif prefix + key not in _FREE and now != value:
            found[prefix + key] = (value, now)
    return found
