"""How close a restored face is to the clean one, and how close a set of faces is to a set of real ones.

Images are [N, 3, H, W] in [-1, 1] RGB; values are counted on the usual scale of 0 to 1. Every image metric returns
one number an image, so that means come with intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from idm_fast.errors import IdmFastError
from idm_fast.evaluation.inception import Inception
from idm_fast.evaluation.landmarks import Landmarks, landmark_distance
from idm_fast.evaluation.niqe import Pristine, authors_model, blocks_of, niqe
from idm_fast.models.perceptual import Lpips
from idm_fast.models.recognition import Recognition

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
Indices = np.ndarray[Any, np.dtype[np.int64]]

_SSIM_SIGMA, _SSIM_RADIUS = 1.5, 5
_SSIM_C1, _SSIM_C2 = 0.01**2, 0.03**2


def _same_shape(name: str, a: Tensor, b: Tensor) -> None:
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(f"{name}: a must match b [N, C, H, W] = {tuple(b.shape)}, got {tuple(a.shape)}")


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """10 log10(1 / mean squared error) in dB, [N] float64; infinite for equal images."""
    _same_shape("psnr", a, b)
    error = ((a.double() - b.double()) / 2).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity, [N] float64, mean over channels and all positions whose 11 x 11 window fits.

    Gaussian window of sigma 1.5, population covariance. Source: Wang et al., IEEE TIP 13(4), 2004; equal to
    scikit-image's with ``gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1``.
    """
    _same_shape("ssim", a, b)
    if min(a.shape[2:]) < 2 * _SSIM_RADIUS + 1:
        raise ValueError(f"ssim: images must be at least 11 x 11 pixels, got {tuple(a.shape[2:])}")
    a, b = ((x.double() + 1) / 2 for x in (a, b))
    offsets = torch.arange(-_SSIM_RADIUS, _SSIM_RADIUS + 1, dtype=torch.float64, device=a.device)
    window = torch.exp(-(offsets**2) / (2 * _SSIM_SIGMA**2))
    window = window / window.sum()

    def local_mean(x: Tensor) -> Tensor:
        planes = x.flatten(0, 1).unsqueeze(1)
        planes = F.conv2d(F.conv2d(planes, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
        return planes.view(*x.shape[:2], *planes.shape[2:])

    mean_a, mean_b = local_mean(a), local_mean(b)
    variance_a = local_mean(a * a) - mean_a**2
    variance_b = local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    numerator = (2 * mean_a * mean_b + _SSIM_C1) * (2 * covariance + _SSIM_C2)
    denominator = (mean_a**2 + mean_b**2 + _SSIM_C1) * (variance_a + variance_b + _SSIM_C2)
    return (numerator / denominator).mean(dim=(1, 2, 3))


def _as_samples(name: str, features: Tensor | FloatArray) -> Tensor:
    samples = torch.as_tensor(features).detach().cpu().double()
    if samples.ndim != 2 or len(samples) < 2:
        raise ValueError(f"frechet_distance: {name} must be [N >= 2, D], got {tuple(samples.shape)}")
    return samples


def frechet_distance(features_a: Tensor | FloatArray, features_b: Tensor | FloatArray) -> float:
    """|mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)) of Gaussians fitted to features [N, D] and [M, D].

    A = X^T X with X the centred samples over sqrt(N - 1), likewise B = Y^T Y, so the last trace is the sum of the
    singular values of X Y^T. No root of a singular matrix is taken, which matters when N < D. All in float64. With
    few samples the distance is biased upwards: compare only distances between sets of the same sizes.
    Source: Heusel et al., NeurIPS 2017 (arXiv 1706.08500).
    """
    a, b = _as_samples("features_a", features_a), _as_samples("features_b", features_b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"frechet_distance: both must have D = {b.shape[1]} features, got {a.shape[1]}")
    mean_a, mean_b = a.mean(dim=0), b.mean(dim=0)
    # The triangular factor has the same X^T X and at most D rows.
    x = torch.linalg.qr((a - mean_a) / (len(a) - 1) ** 0.5, mode="r").R
    y = torch.linalg.qr((b - mean_b) / (len(b) - 1) ** 0.5, mode="r").R
    cross = torch.linalg.svdvals(x @ y.T).sum()
    means = (mean_a - mean_b).square().sum()
    return float(means + x.square().sum() + y.square().sum() - 2 * cross)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: Tensor | FloatArray | Sequence[float], seed: int, draws: int = 2000) -> Estimate:
    """Mean of ``values`` [N] and the 2.5 and 97.5 percentiles of the means of ``draws`` resamplings."""
    numbers = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError(f"bootstrap_mean: values must be [N >= 1], got {numbers.shape}")
    rng = np.random.default_rng(seed)
    # One resampling at a time: all of them together would take 16 KB of memory a value.
    means = np.sort([numbers[rng.integers(0, len(numbers), len(numbers))].mean() for _ in range(draws)])
    # Picked and not interpolated: the PSNR of equal images is infinite.
    return Estimate(float(numbers.mean()), float(means[int(0.025 * draws)]), float(means[int(0.975 * draws)]))


def jackknife(statistic: Callable[[Indices], float], count: int, seed: int, groups: int = 20) -> Estimate:
    """``statistic`` of all indices 0 .. count - 1, and its normal 95 % interval from leaving out random groups.

    For the Fréchet distance, which a bootstrap would bias: its resamples hold the same image many times.
    """
    order = np.random.default_rng(seed).permutation(count)
    whole = statistic(np.sort(order))
    parts = [part for part in np.array_split(order, groups) if len(part)]
    if len(parts) < 2 or count - len(parts[0]) < 2:
        return Estimate(whole, float("nan"), float("nan"))
    left = [statistic(np.setdiff1d(order, part)) for part in parts]
    half = 1.96 * float(np.sqrt((len(parts) - 1) * np.var(left)))
    return Estimate(whole, whole - half, whole + half)


@dataclass(frozen=True)
class Reference:
    """What the chosen metrics need of a batch of clean images, computed once for all comparisons."""

    images: Tensor
    alex: list[Tensor]
    vgg: list[Tensor]
    embedding: Tensor | None
    landmarks: Tensor | None
    found: dict[str, Tensor]  # what is measured of the clean images alone


class FaceMetrics:
    """The chosen metrics, each network loaded once.

    ``names``: some of ``PAIRED`` (of an image and its clean twin), ``ALONE`` (of an image) and ``DISTRIBUTION`` (of a
    set). ``pristine``: NIQE's model, default the authors'. ``inception``: the features of "fid", which need them.
    Raises ``IdmFastError`` for an unknown name, and when a network's weight package is not installed.
    """

    PAIRED = ("psnr", "ssim", "lpips_alex", "lpips_vgg", "recognition", "landmarks")
    ALONE = ("niqe",)
    DISTRIBUTION = ("fd_vgg", "fid")
    DEFAULT = ("psnr", "ssim", "lpips_alex", "lpips_vgg", "recognition", "fd_vgg")

    def __init__(
        self,
        device: str | torch.device = "cpu",
        names: Collection[str] = DEFAULT,
        *,
        pristine: Pristine | None = None,
        inception: Inception | None = None,
    ) -> None:
        known = (*self.PAIRED, *self.ALONE, *self.DISTRIBUTION)
        if unknown := set(names) - set(known):
            raise IdmFastError(f"metrics must be some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
        if "fid" in names and inception is None:
            raise IdmFastError("metrics: fid needs the features of an Inception network, got none")
        self.names = tuple(name for name in known if name in names)
        self.alex = Lpips("alex").to(device) if "lpips_alex" in names else None
        self.vgg = Lpips("vgg").to(device) if "lpips_vgg" in names or "fd_vgg" in names else None
        self.recognition = Recognition().to(device) if "recognition" in names else None
        self.landmarks = Landmarks() if "landmarks" in names else None
        self.pristine = (pristine or authors_model()) if "niqe" in names else None
        self.inception = inception

    def notes(self, size: int) -> list[str]:
        """What a reader must know of the figures of pictures of ``size`` px, one clause each."""
        notes = []
        if self.landmarks:
            notes.append("Landmark distance: mean of five points over the clean face's distance of the eyes")
        if self.pristine:
            side, stride = blocks_of(size)
            how = "side by side" if stride == side else f"every {stride} px"
            notes.append(f"NIQE: blocks of {side} px {how} against {self.pristine.name}; compare at one size only")
        if self.inception:
            notes.append(f"FID by {self.inception.name}")
        return notes

    @torch.no_grad()
    def reference(self, clean: Tensor) -> Reference:
        """Prepares the clean, FFHQ-aligned images [N, 3, S, S] in [-1, 1]."""
        maps = self.vgg.trunk(clean) if self.vgg else []
        return Reference(
            clean,
            self.alex.prepare(clean) if self.alex else [],
            self.vgg.units(maps) if self.vgg else [],
            self.recognition.embed_aligned(clean) if self.recognition else None,
            self.landmarks(clean) if self.landmarks else None,
            self._alone(clean, maps),
        )

    @torch.no_grad()
    def __call__(self, images: Tensor, reference: Reference | None = None) -> dict[str, Tensor]:
        """What is measured of ``images`` [N, 3, S, S] in [-1, 1], by name: values [N] and, of a set, features [N, D].

        Without ``reference``, only what needs no clean twin. NaN is what a picture has no value of: no face was found,
        or nothing but flat blocks.
        """
        maps = self.vgg.trunk(images) if self.vgg else []
        found = self._alone(images, maps)
        if reference is None:
            return found
        if "psnr" in self.names:
            found["psnr"] = psnr(images, reference.images)
        if "ssim" in self.names:
            found["ssim"] = ssim(images, reference.images)
        if self.alex:
            found["lpips_alex"] = self.alex.distance_to(reference.alex, images)
        if self.vgg and "lpips_vgg" in self.names:
            found["lpips_vgg"] = self.vgg.compare(reference.vgg, maps)
        if self.recognition and reference.embedding is not None:
            apart = self.recognition.embed_aligned(images) - reference.embedding
            found["recognition"] = torch.linalg.vector_norm(apart, dim=1)
        if self.landmarks and reference.landmarks is not None:
            found["landmarks"] = landmark_distance(self.landmarks(images), reference.landmarks)
        return found

    def _alone(self, images: Tensor, maps: list[Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if self.pristine:
            found["niqe"] = niqe(images, self.pristine)
        if "fd_vgg" in self.names:
            found["fd_vgg"] = maps[-1].mean(dim=(2, 3))
        if "fid" in self.names and self.inception:
            found["fid"] = self.inception(images)
        return found
