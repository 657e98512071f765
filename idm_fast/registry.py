"""The models that ship with the package, and how a name or a path becomes a model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from idm_fast.checkpoints import native
from idm_fast.config import ModelConfig
from idm_fast.crops import CropRestorer
from idm_fast.engine.precision import chosen_device, chosen_dtype
from idm_fast.errors import IdmFastError

WEIGHTS = Path(__file__).parent / "weights"

# A family holds one model per face size, smallest first; a restorer picks one for each face.
FAMILIES = {"idm-face": ("idm-face-128", "idm-face-256")}
DEFAULT_MODEL = "idm-face"


@dataclass(frozen=True)
class Target:
    """Where a model is to run. ``None`` means: choose (CUDA where there is one, and its fastest sound dtype).

    ``backend``: kernel back ends in order of preference, one name or several ("cpu,torch"). ``engine``: whether the
    network runs as a compiled plan or as plain modules; ``cache_every`` as in ``EngineOptions``.
    """

    device: str | None = None
    dtype: str | None = None
    backend: str | None = None
    engine: bool = True
    cache_every: int = 1

    def resolved(self) -> tuple[torch.device, torch.dtype | str]:
        """Checked device and dtype; raises ``IdmFastError`` for ones that are unknown or not here."""
        device = chosen_device(self.device)
        dtype, quantised = chosen_dtype(self.dtype, device, self.backend)
        return device, quantised or dtype


def shipped() -> list[str]:
    """Names of the models whose weights lie in the package."""
    return sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))


def find_files(name_or_path: str | Path) -> list[Path]:
    """Weights files of a family (smallest face first), a shipped model's name or a path, which need not exist.

    Raises ``IdmFastError`` for a name that is none of them (listing the known ones), or without its weights.
    """
    name, here = str(name_or_path), shipped()
    if name in FAMILIES:
        files = [WEIGHTS / f"{member}.safetensors" for member in FAMILIES[name] if member in here]
        if not files:
            raise IdmFastError(f"{name}: weights must lie in {WEIGHTS}, got none; is the package installed whole?")
        return files
    if name in here:
        return [WEIGHTS / f"{name}.safetensors"]
    path = Path(name_or_path)
    if path.suffix == ".safetensors" or os.path.exists(path):  # unlike path.exists(), never an error
        return [path]
    raise IdmFastError(f"model must be {', '.join([*FAMILIES, *here])} or a .safetensors file, got {name!r}")


def load_models(name_or_path: str | Path, target: Target) -> list[CropRestorer]:
    """One restorer per face size, smallest first, for whatever ``find_files`` takes.

    Raises ``IdmFastError`` for an unknown name, a broken file, a model that restores no pictures, a device, dtype or
    back end that cannot run it here.
    """
    device, dtype = target.resolved()
    models = []
    for file in find_files(name_or_path):
        loaded = native.load(file)
        _check_restores(file, loaded.config)
        models.append(
            CropRestorer(
                loaded.config, loaded.module, device, dtype, target.backend, target.engine, target.cache_every
            )
        )  # fmt: skip
        models[-1].check_backend()
    return models


def choose(models: list[CropRestorer], shown_px: float) -> CropRestorer:
    """The smallest model whose answer fills ``shown_px``, a face's side in the output, to a fifth; else the largest."""
    for model in models:
        if shown_px <= 1.2 * model.size:
            return model
    return models[-1]


def _check_restores(file: Path, config: ModelConfig) -> None:
    """A file may hold a network that draws faces from noise alone, or by class; this takes those that are shown one."""
    u = config.unet
    got = (u.in_channels, u.cond_channels, u.out_channels)
    if got != (3, 3, 3) or u.num_classes:
        raise IdmFastError(
            f"{file}: model must be conditioned on a picture = 3 input, 3 condition, 3 output channels and no classes, "
            f"got {config.name} with {got[0]}, {got[1]}, {got[2]} and {u.num_classes} classes"
        )
