"""The models that ship with the package, and how a name, a path or a Hub id becomes a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from idm_fast import checkpoints, hub
from idm_fast.checkpoints.native import Checkpoint
from idm_fast.clr_face import ClrFaceRestorer
from idm_fast.config import ModelConfig
from idm_fast.crops import CropRestorer
from idm_fast.difface import START_INDEX, DifFace
from idm_fast.engine.precision import chosen_device, chosen_dtype
from idm_fast.errors import IdmFastError
from idm_fast.estimators import Bicubic, Estimator, OneStep, Regression
from idm_fast.face_model import FaceModel
from idm_fast.models.clr_face import ClrFace
from idm_fast.models.swinir import SwinIR
from idm_fast.models.unet import UNet

WEIGHTS = Path(__file__).parent / "weights"

# A family holds one model per face size, smallest first; a restorer picks one for each face.
FAMILIES = {"idm-face": ("idm-face-128", "idm-face-256")}
DEFAULT_MODEL = "idm-face"
METHODS = ("conditional", "difface")


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


@dataclass(frozen=True)
class Method:
    """How a model restores. ``name``: "conditional" shows it the degraded face; "difface" gives an unconditional one an
    estimate, by ``estimator`` (see ``load_estimator``), noised to ``start_index`` of its respaced chain.

    Raises ``IdmFastError`` for an unknown name.
    """

    name: str = "conditional"
    estimator: str | Path = DEFAULT_MODEL
    start_index: int = START_INDEX

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise IdmFastError(f"method must be one of {', '.join(METHODS)}, got {self.name!r}")


def shipped() -> list[str]:
    """Names of the models whose weights lie in the package."""
    return sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))


def find_files(name_or_path: str | Path) -> list[Path]:
    """Weights files of a family (smallest face first), a shipped model's name, a path, or a Hub id.

    What lies here goes first: only a name of the form owner/name that is no path here is asked of the Hugging Face
    Hub. Raises ``IdmFastError`` for a name that is none of them (listing the known ones), or without its weights.
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
    if path.suffix.lower() in hub.WEIGHTS or os.path.exists(path):  # unlike path.exists(), never an error
        return [path]
    if isinstance(name_or_path, str) and hub.looks_like_id(name):
        return [hub.fetch(name)]
    raise IdmFastError(
        f"model must be {', '.join([*FAMILIES, *here])}, a model file (.safetensors, .pt, .pth, .ckpt), a diffusers "
        f"folder or a Hub id (owner/name), got {name!r}"
    )


@torch.inference_mode(False)  # an identity's gradient goes through weights, whoever loads them
def load_models(
    name_or_path: str | Path, target: Target, method: Method | None = None, settings: Mapping[str, Any] | None = None
) -> list[FaceModel]:
    """One restorer per face size, smallest first, for whatever ``find_files`` takes.

    ``settings``: of a public project's file, what its keys cannot tell. Raises ``IdmFastError`` for an unknown name, a
    broken file, a model that does not restore pictures by ``method``, a device, dtype or back end that cannot run it.
    """
    method = method or Method()
    target.resolved()  # what is wrong with it is said before any file is read
    models: list[FaceModel] = []
    for file in find_files(name_or_path):
        models.append(_restorer(file, checkpoints.load(file, settings), target, method))
        models[-1].check_backend()
    return models


def _restorer(file: Path, loaded: Checkpoint[Any, Any], target: Target, method: Method) -> FaceModel:
    """What a file holds, ready to restore by ``method``."""
    where = (*target.resolved(), target.backend, target.engine, target.cache_every)
    if isinstance(loaded.module, ClrFace):
        if method.name != "conditional":
            raise IdmFastError(f"{file}: method of a CLR-Face model must be conditional, got {method.name}")
        return ClrFaceRestorer(loaded.config, loaded.module, *where)
    if not isinstance(loaded.module, UNet):
        kind = type(loaded.module).__name__
        raise IdmFastError(f"{file}: model must be a diffusion U-Net or a CLR-Face to restore with, got a {kind}")
    reason = _why_not(loaded.config, method)
    if reason is not None:
        raise IdmFastError(f"{file}: {reason}")
    if method.name == "difface":
        estimator = load_estimator(method.estimator, target)
        return DifFace(loaded.config, loaded.module, *where, estimator=estimator, start_index=method.start_index)
    return CropRestorer(loaded.config, loaded.module, *where)


# What makes an estimate of the clean face, by name; beside them every restorer of ours by its name, and files.
ESTIMATORS: dict[str, Callable[[], Estimator]] = {"bicubic": Bicubic}


def load_estimator(name_or_path: str | Path, target: Target) -> Estimator:
    """An estimator by its name in ``ESTIMATORS``, or of whatever ``find_files`` takes: a restorer of ours, used in one
    step, or a SwinIR as DifFace publishes it.

    Raises ``IdmFastError`` naming what it is instead.
    """
    if str(name_or_path) in ESTIMATORS:
        return ESTIMATORS[str(name_or_path)]()
    try:
        files = find_files(name_or_path)
    except IdmFastError as error:
        raise IdmFastError(f"estimator must be {', '.join(ESTIMATORS)} or a model, and a {error}") from None
    first = checkpoints.load(files[0])
    if isinstance(first.module, SwinIR):
        return Regression(first.module, target.resolved()[0])
    if (
        not isinstance(first.module, UNet)
        or _why_not(first.config, Method()) is not None
        or not _one_step(first.config)
    ):
        raise IdmFastError(
            f"{files[0]}: estimator must be {', '.join(ESTIMATORS)}, a restorer that predicts the clean face "
            f"({', '.join(FAMILIES)}) or a SwinIR, got a {type(first.module).__name__} that is neither"
        )
    return OneStep(load_models(name_or_path, target))


def choose(models: list[FaceModel], shown_px: float) -> FaceModel:
    """The smallest model whose answer fills ``shown_px``, a face's side in the output, to a fifth; else the largest."""
    for model in models:
        if shown_px <= 1.2 * model.size:
            return model
    return models[-1]


def _one_step(config: ModelConfig) -> bool:
    """x0 and v say at the noisiest time what the network expects; of eps nothing can be told there."""
    return config.diffusion.prediction in ("x0", "v")


def _why_not(config: ModelConfig, method: Method) -> str | None:
    """Why a network cannot restore by ``method``, in words, or None."""
    u = config.unet
    got = f"got {config.name} with {u.in_channels}, {u.cond_channels}, {u.out_channels} and {u.num_classes} classes"
    if config.latent:
        return f"model must work on pictures, got {config.name}, which works on the latents of an autoencoder"
    if u.num_classes:
        return f"model must have no classes, since nobody says of which class a face is, {got}"
    if u.in_channels != 3 or u.out_channels not in (3, 6) or u.cond_channels not in (0, 3):
        return f"model must work on pictures = 3 input, 0 or 3 condition, 3 or 6 output channels, {got}"
    if method.name == "difface":
        return None if u.cond_channels == 0 else f"model must be unconditional for difface, {got}"
    if u.cond_channels == 0:
        return (
            f"model must be conditioned on a picture = 3 condition channels, {got}; an unconditional model restores "
            "with method difface (--method difface)"
        )
    return None
