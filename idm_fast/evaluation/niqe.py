"""NIQE: how far the local statistics of a picture are from those of sharp natural pictures. No clean twin is needed.

    NIQE = sqrt((m - p)^T ((C + P) / 2)^+ (m - p)),   m, C: mean and covariance of the picture's blocks,
                                                      p, P: of blocks of pristine pictures

A block is described by 18 numbers at full and 18 at half resolution: asymmetric generalised Gaussians fitted to its
locally normalised luma and to products of neighbours. Source: Mittal, Soundararajan and Bovik, "Making a 'Completely
Blind' Image Quality Analyzer", IEEE Signal Processing Letters 20(3), 2013. All in float64.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from idm_fast.errors import IdmFastError
from idm_fast.package_files import package_file

FEATURES = 36
BLOCK = 96  # px; the authors' pristine model was fitted on blocks of this side
SMALLEST = 64  # px, of a picture's side
_SMALL_BLOCK = 32  # where two blocks of 96 px do not fit, even overlapping
_SMALL_STRIDE = 32  # between the blocks of a picture that does not hold two of 96 px side by side

_LUMA = (0.2989, 0.5870, 0.1140)  # of ITU-R BT.601, as the authors' code rounds them
_WINDOW_SIGMA, _WINDOW_RADIUS = 7 / 6, 3
_FLAT = 1e-9
_SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))  # (down, right): the neighbours of the products


@dataclass(frozen=True, eq=False)
class Pristine:
    """Mean [36] and covariance [36, 36] (float64) of the features of sharp blocks, and whose they are."""

    mean: Tensor
    covariance: Tensor
    name: str


@lru_cache(maxsize=1)
def authors_model() -> Pristine:
    """The model that the authors published, from an installed package. Raises ``IdmFastError`` where it is missing."""
    install = "mmagic==1.2.0"
    path = package_file("mmagic", "evaluation/metrics/niqe_pris_params.npz", why="NIQE", install=install)
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = file["mu_pris_param"].reshape(-1), file["cov_pris_param"]
    except (OSError, ValueError, KeyError) as error:
        raise IdmFastError(f"{path}: must hold NIQE's parameters, got a file that fails: {error}") from None
    if mean.shape != (FEATURES,) or covariance.shape != (FEATURES, FEATURES):
        raise IdmFastError(f"{path}: mean must be [{FEATURES}], got {mean.shape} and covariance {covariance.shape}")
    return Pristine(torch.from_numpy(mean), torch.from_numpy(covariance), f"the authors' pristine model ({install})")


def fitted_model(images: Iterable[Tensor], name: str) -> Pristine:
    """A pristine model of one's own from sharp ``images`` [3, S, S] in [-1, 1], all of one size.

    Raises ``IdmFastError`` where they hold fewer than twice as many usable blocks as a block has features.
    """
    parts = [block_features(image[None], *blocks_of(image.shape[-1]))[0].cpu() for image in images]
    features = torch.cat(parts) if parts else torch.empty(0, FEATURES)
    features = features[~features.isnan().any(dim=1)]
    if len(features) < 2 * FEATURES:
        raise IdmFastError(
            f"NIQE: a model of {name} needs blocks >= {2 * FEATURES}, got {len(features)}: more pictures"
        )
    return Pristine(features.mean(dim=0), torch.cov(features.T), f"a model fitted to {name}")


def blocks_of(size: int) -> tuple[int, int]:
    """Side of the blocks of a picture of ``size`` px and the distance between them, in px.

    From 192 px on, blocks of 96 px tile the picture, as the authors' do. Fewer than two a side have no covariance:
    from 128 px on they overlap, below they are smaller. Sharp and spoiled faces keep their order that way, but NIQE can
    be compared only among pictures of one size. Raises ``IdmFastError`` below 64 px.
    """
    if size < SMALLEST:
        raise IdmFastError(f"NIQE: pictures must be at least {SMALLEST} px wide and high, got {size}")
    if size < BLOCK + _SMALL_STRIDE:
        return _SMALL_BLOCK, _SMALL_BLOCK
    return BLOCK, BLOCK if size >= 2 * BLOCK else _SMALL_STRIDE


def niqe(images: Tensor, pristine: Pristine, blocks: tuple[int, int] | None = None) -> Tensor:
    """NIQE [N] float64 of ``images`` [N, 3, H, W] in [-1, 1]; NaN where a picture has fewer than two usable blocks.

    ``blocks``: their side and the distance between them, even numbers of px; default: ``blocks_of`` the smaller side.
    """
    features = block_features(images, *(blocks or blocks_of(min(images.shape[2:]))))
    return torch.stack([distance(picture, pristine) for picture in features])


def distance(features: Tensor, pristine: Pristine) -> Tensor:
    """NIQE of the block features [B, 36] of one picture; blocks without a value (flat ones) do not count."""
    mean, whole = features.nanmean(dim=0), features[~features.isnan().any(dim=1)]
    if len(whole) < 2:
        return torch.tensor(torch.nan, dtype=torch.float64)
    apart = mean - pristine.mean.to(mean)
    inverse = torch.linalg.pinv((torch.cov(whole.T) + pristine.covariance.to(mean)) / 2, hermitian=True)
    squared: Tensor = apart @ inverse @ apart
    return squared.clamp(min=0).sqrt().cpu()


def block_features(images: Tensor, block: int, stride: int) -> Tensor:
    """Features [N, B, 36] float64 of blocks of ``block`` px, ``stride`` px apart, of ``images`` [N, 3, H, W].

    Values count as those of 8-bit pictures, which the constant in the normalisation supposes.
    """
    if min(images.shape[2:]) < block:
        raise ValueError(f"niqe: images must be at least {block} x {block} px, got {tuple(images.shape[2:])}")
    if block % 2 or stride % 2 or stride < 2:
        raise ValueError(f"niqe: block and stride must be even, got {block} and {stride}")
    luma = _luma(images)
    height, width = (side - (side - block) % stride for side in luma.shape[1:])  # what the blocks cover
    luma = luma[:, :height, :width]
    fine = _described(_normalised(luma), block, stride)
    coarse = _described(_normalised(_halved(luma)), block // 2, stride // 2)
    return torch.cat([fine, coarse], dim=2)


def _luma(images: Tensor) -> Tensor:
    rgb = ((images.double().clamp(-1, 1) + 1) * 127.5).round()
    return (rgb * rgb.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(dim=1).round()


def _normalised(luma: Tensor) -> Tensor:
    """(x - local mean) / (local deviation + 1), the border repeated. [N, H, W] -> the same."""
    offsets = torch.arange(-_WINDOW_RADIUS, _WINDOW_RADIUS + 1, dtype=luma.dtype, device=luma.device)
    window = torch.exp(-(offsets**2) / (2 * _WINDOW_SIGMA**2))
    window = window / window.sum()

    def local_mean(x: Tensor) -> Tensor:
        planes = F.pad(x.unsqueeze(1), (_WINDOW_RADIUS,) * 4, mode="replicate")
        return F.conv2d(F.conv2d(planes, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1)).squeeze(1)

    mean = local_mean(luma)
    deviation = (local_mean(luma**2) - mean**2).abs().sqrt()
    return (luma - mean) / (deviation + 1)


def _halved(luma: Tensor) -> Tensor:
    """Half the size by an antialiased cubic (a = -1/2) that sees the picture mirrored at its border."""
    margin = 8
    rows, columns = (_mirrored(side, margin).to(luma.device) for side in luma.shape[1:])
    padded = luma[:, rows][:, :, columns].unsqueeze(1)
    half = F.interpolate(padded, scale_factor=0.5, mode="bicubic", antialias=True, align_corners=False)
    cut = margin // 2
    return half[:, 0, cut:-cut, cut:-cut]


def _mirrored(side: int, margin: int) -> Tensor:
    """Indices -margin .. side + margin - 1, those outside mirrored with the edge pixel repeated."""
    index = torch.arange(-margin, side + margin)
    index = torch.where(index < 0, -1 - index, index)
    return torch.where(index >= side, 2 * side - 1 - index, index)


def _described(field: Tensor, block: int, stride: int) -> Tensor:
    """18 features of each block of the normalised ``field`` [N, H, W]: [N, B, 18]."""
    blocks = field.unfold(1, block, stride).unfold(2, block, stride).flatten(1, 2)  # [N, B, block, block]
    shape, left, right = _fit(blocks.flatten(2))
    parts = [shape, (left + right) / 2]
    for down, across in _SHIFTS:  # neighbours wrap around inside the block, as in the authors' code
        shape, left, right = _fit((blocks * blocks.roll((down, across), (2, 3))).flatten(2))
        mean = (right - left) * torch.exp(torch.lgamma(2 / shape) - torch.lgamma(1 / shape))
        parts += [shape, mean, left, right]
    return torch.stack(parts, dim=2)


@lru_cache(maxsize=1)
def _shape_table() -> tuple[Tensor, Tensor]:
    """Shapes 0.2, 0.201 ... 10 and the ratio Gamma(2/a)^2 / (Gamma(1/a) Gamma(3/a)) of each, which grows with them."""
    shape = torch.arange(200, 10001, dtype=torch.float64) / 1000
    return shape, torch.exp(2 * torch.lgamma(2 / shape) - torch.lgamma(1 / shape) - torch.lgamma(3 / shape))


def _fit(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shape and the two scales of an asymmetric generalised Gaussian, by moments, of each row [..., P] of ``x``.

    Source: Lasmar, Stitou and Berthoumieu, ICIP 2009. The scale of a side that has no value is NaN.
    """
    squares = x.square()
    # What is flat is zero but for rounding, which must not decide on which side it counts.
    negative, positive = x < -_FLAT, x > _FLAT
    left = ((squares * negative).sum(-1) / negative.sum(-1)).sqrt()
    right = ((squares * positive).sum(-1) / positive.sum(-1)).sqrt()
    skew = left / right
    ratio = x.abs().mean(-1).square() / squares.mean(-1)
    ratio = ratio * (skew**3 + 1) * (skew + 1) / (skew**2 + 1).square()
    shapes, ratios = (table.to(x.device) for table in _shape_table())
    above = torch.searchsorted(ratios, ratio.nan_to_num(0.0)).clamp(1, len(ratios) - 1)
    nearer = (ratio - ratios[above - 1]).abs() <= (ratios[above] - ratio).abs()
    shape = shapes[torch.where(nearer, above - 1, above)]
    scale = torch.exp((torch.lgamma(1 / shape) - torch.lgamma(3 / shape)) / 2)
    return shape, left * scale, right * scale
