"""A picture of how a model is doing: rows of faces; of a restorer, columns input, one step, four steps, truth."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from idm_fast.config import ModelConfig
from idm_fast.crops import CropRestorer, SampleSettings
from idm_fast.errors import IdmFastError
from idm_fast.files import atomic
from idm_fast.models.unet import UNet
from idm_fast.training.data import UnreadableError, list_faces, load_crop
from idm_fast.training.degradation import degrade_level


def faces_to_show(data: Path, size: int, count: int) -> Tensor | None:
    """Up to ``count`` faces [N, 3, size, size], spread over the validation split (training where it is empty).

    None where none can be read.
    """
    try:
        faces = list_faces(data, "val")
    except IdmFastError:
        faces = list_faces(data, "train")
    crops = []
    for face in faces[:: max(1, len(faces) // count)]:
        with suppress(UnreadableError):  # the data set has named it already, or another part of the run will
            crops.append(load_crop(face.path, size))
        if len(crops) == count:
            break
    return torch.stack(crops) if crops else None


def save_columns(columns: list[Tensor], path: Path) -> None:
    """Writes faces [N, 3, S, S] in [-1, 1], one row each and beside it those of the other ``columns``, as a PNG."""
    grid = torch.cat([torch.cat(list(row), dim=2) for row in zip(*columns, strict=True)], dim=1)
    pixels = ((grid.cpu() + 1) * 127.5 + 0.5).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    with atomic(path) as temporary:
        Image.fromarray(np.ascontiguousarray(pixels)).save(temporary)


def draw(module: UNet, config: ModelConfig, data: Path, path: Path, count: int = 8) -> None:
    """Writes the sheet of ``count`` validation faces (training faces where there are none) to ``path`` (PNG)."""
    x0 = faces_to_show(data, config.unet.image_size, count)
    if x0 is None:
        return
    y = torch.stack([degrade_level(face, "medium", seed) for seed, face in enumerate(x0)])
    device = next(module.parameters()).device
    restorer = CropRestorer(config, copy.deepcopy(module), device, torch.float32, engine=False)
    seeds = torch.arange(len(x0))
    save_columns([y, *(restorer.restore(y, seeds, SampleSettings(steps)) for steps in (1, 4)), x0], path)
