"""Latent diffusion (CompVis): the U-Net inside a Lightning ``.ckpt``, raw under ``model.diffusion_model.`` and
averaged under ``model_ema.`` with the dots of its names left out.
"""

from __future__ import annotations

from typing import Any

import torch

from idm_fast.checkpoints.format import Format, Reading, modules_to_names
from idm_fast.checkpoints.guided_diffusion import ASIDE, INFERRED, NETWORK_SETTINGS, agree, network_fields
from idm_fast.checkpoints.guided_keys import modules, structure
from idm_fast.checkpoints.schedules import from_betas
from idm_fast.checkpoints.settings import Setting, Settings
from idm_fast.checkpoints.source import Source
from idm_fast.config import DiffusionConfig, ModelConfig, Prediction, UNetConfig
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet

_RAW = "model.diffusion_model."
_PREDICTIONS: dict[str, Prediction] = {"eps": "eps", "x0": "x0", "v": "v"}
_SETTINGS = (
    *NETWORK_SETTINGS,
    *INFERRED,
    Setting("parameterization", "word", "what the network predicts", "eps", tuple(_PREDICTIONS)),
    Setting("linear_start", "number", "first beta, where the file has no table", 0.0015),
    Setting("linear_end", "number", "last beta, where the file has no table", 0.0195),
    Setting("timesteps", "whole number", "entries of the schedule, where the file has no table", 1000),
)


def _averaged(name: str) -> str:
    """The name of the averaged copy of ``model.diffusion_model.input_blocks.0.0.weight``."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def _read(source: Source, settings: Settings, averaged: bool | None) -> Reading:
    where, tensors = str(source.path), source.tensors
    network = {name[len(_RAW) :]: tensor for name, tensor in tensors.items() if name.startswith(_RAW)}
    found = structure(where, network)
    out = found.fields["out_channels"]
    cond = found.in_channels - out if found.in_channels > out else 0  # by concatenation, behind the latent
    fields: dict[str, Any] = {
        **network_fields(settings, found, image_size=64, head_channels=32),
        "in_channels": found.in_channels - cond,
        "cond_channels": cond,
    }
    try:
        unet = UNetConfig(**fields)
    except IdmFastError as error:
        raise IdmFastError(f"{where}: {error}") from None
    agree(settings, unet)
    with torch.device("meta"):
        module = UNet(unet)
    names = modules_to_names(module, modules(module, _RAW))
    both = all(_averaged(name) in tensors for theirs in names.values() for name in theirs)
    taken = averaged is not False and both
    if taken:
        names = {ours: tuple(_averaged(name) for name in theirs) for ours, theirs in names.items()}
    # Autoencoder, conditioning, losses and tables lie beside it; of the network itself nothing may be left over.
    dropped = frozenset(name for name in tensors if taken or not name.startswith(_RAW))
    config = ModelConfig(source.path.stem, unet, _schedule(source, settings), "ddim", 200, latent=True)
    return Reading(config, module, names, tensors, dropped, averaged=taken if both else None)


def _schedule(source: Source, settings: Settings) -> DiffusionConfig:
    prediction = _PREDICTIONS[settings.ask("parameterization", "eps")]
    if "betas" in source.tensors:
        return from_betas(settings.where, source.tensors["betas"], prediction)
    first, last = settings.ask("linear_start", 0.0015), settings.ask("linear_end", 0.0195)
    return DiffusionConfig("scaled_linear", prediction, settings.ask("timesteps", 1000), first, last)


LDM = Format(
    "ldm",
    "U-Net of latent diffusion (LDM)",
    lambda source: any(name.startswith(_RAW) for name in source.tensors),
    _read,
    _SETTINGS,
    ASIDE,
)
