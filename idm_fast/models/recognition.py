"""Face recognition: embedding [N, 128]; pictures of one person lie less than about 0.6 apart (Euclidean).

dlib's ResNet (King, "High Quality Face Recognition with Deep Metric Learning", 2017) as a differentiable, frozen
torch module; its weights come from an installed package.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idm_fast.errors import IdmFastError
from idm_fast.models.dlib_weights import DlibLayer, read_dlib_layers
from idm_fast.package_files import package_file

CHIP = 150  # side in pixels of the picture that the network was trained on
EMBEDDING = 128
SAME_PERSON = 0.6  # dlib's threshold on the distance

# Where dlib's chip (150 px, padding 0.25) lies in an FFHQ-aligned crop, in fractions of the crop's side. dlib's own
# five-point predictor, run on 386 aligned faces, puts the chip's centre at (0.502, 0.612) and its side at
# 0.676 (medians), without rotation. The separation of same from different persons is flat there: on the 815 same and
# 277,070 different pairs of 746 training faces the area under the ROC curve is 0.9989 (mean distances 0.31 and 0.84),
# and no shift of 0.01 across or 0.02 along the face, nor a side between 0.62 and 0.73, moves it by more than 0.0002.
# (Those identities were themselves clustered by recognition distances, so the curve flatters the network.)
CHIP_CENTRE = (0.5016, 0.6119)
CHIP_SIDE = 0.6760

_STAGES = ((32, 3, False), (64, 4, True), (128, 3, True), (256, 3, True), (256, 1, True))  # width, blocks, halves


class _Block(nn.Module):
    """relu(shortcut + conv(relu(conv(x)))); a halving block averages 2 x 2 pixels in its shortcut."""

    def __init__(self, inputs: int, outputs: int, halves: bool) -> None:
        super().__init__()
        self.halves = halves
        # The halving convolution has no padding, so its plane may be one smaller than the shortcut's.
        self.first = nn.Conv2d(inputs, outputs, 3, 2 if halves else 1, 0 if halves else 1)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)))
        if self.halves:
            x = F.avg_pool2d(x, 2)
            # dlib adds tensors of unequal size as if zeros stood below, to the right, and in further channels.
            x, y = _padded(x, y.shape), _padded(y, x.shape)
        return torch.relu(x + y)


def _padded(x: Tensor, shape: torch.Size) -> Tensor:
    missing = [max(wanted - have, 0) for have, wanted in zip(x.shape, shape, strict=True)]
    return F.pad(x, (0, missing[3], 0, missing[2], 0, missing[1])) if any(missing) else x


@lru_cache(maxsize=16)
def _resampling(size: int, centre: float, side: float) -> tuple[slice, np.ndarray[Any, np.dtype[np.float32]]]:
    """(the part of a line of ``size`` pixels that the chip sees, the matrix [CHIP, part] float32 that resamples it).

    Linear interpolation; where the chip is coarser than the line the triangle is widened to the chip's pixel, so
    that nothing aliases. Pixels beyond the border repeat the border.
    """
    step = side * size / CHIP
    positions = (centre * size - 0.5) + step * (np.arange(CHIP) + 0.5 - CHIP / 2)
    reach = max(step, 1.0)
    margin = int(np.ceil(max(reach, -positions[0] + reach, positions[-1] - size + 1 + reach)))
    line = np.arange(-margin, size + margin)
    weights = np.maximum(1.0 - np.abs(positions[:, None] - line[None, :]) / reach, 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    inside = np.zeros((CHIP, size))
    np.add.at(inside.T, np.clip(line, 0, size - 1), weights.T)
    # An array and not a tensor: one made in inference mode could not serve a later training step.
    seen = np.flatnonzero(inside.any(axis=0))
    part = slice(int(seen[0]), int(seen[-1]) + 1)
    return part, np.ascontiguousarray(inside[:, part], dtype=np.float32)


def crop_chip(x: Tensor) -> Tensor:
    """dlib's chip [N, C, 150, 150] of FFHQ-aligned crops ``x`` [N, C, S, S]; differentiable, antialiased, float32."""
    if x.ndim != 4 or x.shape[2] != x.shape[3]:
        raise ValueError(f"crop_chip: x must be a square crop [N, C, S, S], got {tuple(x.shape)}")
    high, rows = _resampling(x.shape[2], CHIP_CENTRE[1], CHIP_SIDE)
    wide, columns = _resampling(x.shape[3], CHIP_CENTRE[0], CHIP_SIDE)
    x = x[:, :, high, wide]
    with torch.autocast(x.device.type, enabled=False):  # these two small products are cheap; keep them exact
        return torch.from_numpy(rows).to(x.device) @ x.float() @ torch.from_numpy(columns).to(x.device).T


@lru_cache(maxsize=1)
def weight_shapes() -> dict[str, tuple[int, ...]]:
    """The shapes of all weights of a ``Recognition`` by their names, biases aside; needs none of its files."""
    shapes: dict[str, tuple[int, ...]] = {"stem.weight": (32, 3, 7, 7)}
    inputs = 32
    for index, width in enumerate(width for width, repeats, _ in _STAGES for _ in range(repeats)):
        shapes[f"blocks.{index}.first.weight"] = (width, inputs, 3, 3)
        shapes[f"blocks.{index}.second.weight"] = (width, width, 3, 3)
        inputs = width
    return shapes | {"projection": (256, EMBEDDING)}


class Recognition(nn.Module):
    """Frozen recognition network. ``weights``: a dlib ``.dat`` file, by default the installed package's.

    Raises ``IdmFastError`` when the file is missing or holds another network.
    """

    mean: Tensor
    projection: Tensor

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        path = weights or package_file(
            "face_recognition_models",
            "models/dlib_face_recognition_resnet_model_v1.dat",
            why="the recognition distance",
            install="face-recognition-models==0.3.0",
        )
        self.stem = nn.Conv2d(3, 32, 7, 2)
        blocks, inputs = [], 32
        for width, repeats, halves in _STAGES:
            for index in range(repeats):
                blocks.append(_Block(inputs, width, halves and index == 0))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1), persistent=False)
        self.register_buffer("projection", torch.zeros(256, EMBEDDING), persistent=False)
        try:
            self._fill([layer for layer in read_dlib_layers(path) if layer.arrays])
        except (StopIteration, ValueError) as error:
            raise IdmFastError(
                f"{path}: is not dlib's face recognition network: {error or 'too few layers'}"
            ) from error
        self.requires_grad_(False)
        self.eval()

    def _fill(self, layers: list[DlibLayer]) -> None:
        stream = iter(layers)
        self.mean.copy_(torch.from_numpy(_take(stream, "input").arrays[0]).view(1, 3, 1, 1))
        for conv in (module for module in self.modules() if isinstance(module, nn.Conv2d)):
            layer = _take(stream, "con")
            expected = (conv.kernel_size[0], conv.stride[0], conv.padding[0])
            if layer.arrays[0].shape != conv.weight.shape or (layer.window, layer.stride, layer.padding) != expected:
                raise ValueError(f"convolution must be {tuple(conv.weight.shape)}, got {layer.arrays[0].shape}")
            # The affine layer that follows every convolution is folded into it (exactly: it comes after the padding).
            weight, bias = (torch.from_numpy(array).double() for array in layer.arrays)
            gamma, beta = (torch.from_numpy(array).double() for array in _take(stream, "affine").arrays)
            assert conv.bias is not None
            with torch.no_grad():
                conv.weight.copy_(weight * gamma.view(-1, 1, 1, 1))
                conv.bias.copy_(bias * gamma + beta)
        self.projection.copy_(torch.from_numpy(_take(stream, "fc").arrays[0]))

    def forward(self, faces: Tensor) -> Tensor:
        """Embeddings [N, 128] float32 of dlib chips ``faces`` [N, 3, 150, 150] in [-1, 1] RGB."""
        if faces.ndim != 4 or tuple(faces.shape[1:]) != (3, CHIP, CHIP):
            raise ValueError(f"Recognition: faces must be [N, 3, {CHIP}, {CHIP}], got {tuple(faces.shape)}")
        # ((faces + 1) 127.5 - mean) / 256, in one pass
        x = torch.add((127.5 - self.mean) / 256.0, faces, alpha=127.5 / 256.0).to(self.stem.weight.dtype)
        x = torch.relu(F.max_pool2d(self.stem(x), 3, 2))  # what is kept is the same in either order, and smaller now
        pooled: Tensor = self.blocks(x).float().mean(dim=(2, 3))
        with torch.autocast(faces.device.type, enabled=False):
            return pooled @ self.projection.float()

    def embed_aligned(self, x: Tensor) -> Tensor:
        """Embeddings [N, 128] of FFHQ-aligned crops ``x`` [N, 3, S, S] in [-1, 1] RGB, any S; differentiable."""
        embeddings: Tensor = self(crop_chip(x))
        return embeddings

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Euclidean distances [N] of the faces in the FFHQ-aligned crops ``a`` and ``b`` [N, 3, S, S] in [-1, 1]."""
        distances: Tensor = torch.linalg.vector_norm(self.embed_aligned(a) - self.embed_aligned(b), dim=1)
        return distances


def _take(stream: Iterator[DlibLayer], kind: str) -> DlibLayer:
    layer = next(stream)
    if layer.kind != kind:
        raise ValueError(f"layer must be {kind}, got {layer.kind}")
    return layer
