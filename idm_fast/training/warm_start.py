"""Begins a model from another one's weights, also from one for smaller pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from idm_fast.checkpoints import native
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet


def warm_start(model: UNet, path: Path) -> list[str]:
    """Copies every tensor of the model file ``path`` that fits; returns the names of those left as they were.

    A model with twice the pixel-unshuffle factor gets a stem that averages its pixels down to the smaller model's, and
    a last convolution that repeats the answer: it begins as the smaller model, enlarged.
    """
    checkpoint = native.load(path)
    source, own = checkpoint.module.state_dict(), model.state_dict()
    ratio = model.config.unshuffle // checkpoint.config.unet.unshuffle
    fitting = {}
    for name, tensor in source.items():
        if name in own and ratio > 1 and name.startswith(("stem.weight", "out_conv.")):
            tensor = spread(tensor, checkpoint.config.unet.unshuffle, ratio, dim=int(name == "stem.weight"))
        if name in own and own[name].shape == tensor.shape:
            fitting[name] = tensor
    if not fitting:
        raise IdmFastError(f"{path}: must share tensors with the model to warm-start, got none of the same shape")
    model.load_state_dict(fitting, strict=False)
    return sorted(set(own) - set(fitting))


def spread(tensor: Tensor, factor: int, ratio: int, dim: int) -> Tensor:
    """``tensor`` whose ``dim`` counts (colour, row, column) of an unshuffle by ``factor``, for ``factor * ratio``.

    Each value goes to the ratio x ratio finer pixels of its own; inputs (dim 1) share it, outputs (dim 0) repeat it.
    """
    moved = tensor.movedim(dim, 0)
    colours = moved.shape[0] // factor**2
    grid = moved.reshape(colours, factor, factor, *moved.shape[1:])
    fine = grid.repeat_interleave(ratio, 1).repeat_interleave(ratio, 2)
    if dim == 1:
        fine = fine / ratio**2
    return torch.movedim(fine.reshape(-1, *moved.shape[1:]), 0, dim).contiguous()
