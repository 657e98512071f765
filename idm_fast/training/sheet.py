"""A picture of how a model is doing: rows of faces, columns input, one step, four steps, truth."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from idm_fast.config import ModelConfig
from idm_fast.crops import CropRestorer, SampleSettings
from idm_fast.errors import IdmFastError
from idm_fast.files import atomic
from idm_fast.models.unet import UNet
from idm_fast.training.data import UnreadableError, list_faces, load_crop
from idm_fast.training.degradation import degrade_level


def draw(module: UNet, config: ModelConfig, data: Path, path: Path, count: int = 8) -> None:
    """Writes the sheet of ``count`` validation faces (training faces where there are none) to ``path`` (PNG)."""
    try:
        faces = list_faces(data, "val")
    except IdmFastError:
        faces = list_faces(data, "train")
    crops = []
    for face in faces[:: max(1, len(faces) // count)]:
        with suppress(UnreadableError):  # the data set has named it already, or another part of the run will
            crops.append(load_crop(face.path, config.unet.image_size))
        if len(crops) == count:
            break
    if not crops:
        return
    x0 = torch.stack(crops)
    y = torch.stack([degrade_level(face, "medium", seed) for seed, face in enumerate(x0)])
    device = next(module.parameters()).device
    restorer = CropRestorer(config, copy.deepcopy(module), device, torch.float32, engine=False)
    seeds = torch.arange(len(x0))
    columns = [y, *(restorer.restore(y, seeds, SampleSettings(steps)) for steps in (1, 4)), x0]
    grid = torch.cat([torch.cat(list(row), dim=2) for row in zip(*columns, strict=True)], dim=1)
    pixels = ((grid + 1) * 127.5 + 0.5).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    with atomic(path) as temporary:
        Image.fromarray(np.ascontiguousarray(pixels)).save(temporary)
