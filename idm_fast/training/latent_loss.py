"""What a latent prior is trained for: the right latent, and a picture that looks right behind the decoder.

    loss = mse w(t) |z_hat - z0|^2 + lpips_alex LPIPS(decode(z_hat), x0) + lpips_vgg LPIPS of a crop of the same

with w(t) the signal-to-noise ratio clamped to [``snr_min``, ``snr_max``] (Min-SNR, 2303.09556, with a floor so that
pure noise, where a few-step sampler starts, still counts). The square alone gives the middle of all plausible latents,
which the decoder turns into a soft face.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from idm_fast.errors import IdmFastError
from idm_fast.models.perceptual import Lpips
from idm_fast.models.vqgan import Vqgan


@dataclass(frozen=True)
class LatentLossWeights:
    """Weights of the terms; 0 switches one off, and its network is then not loaded.

    ``mse`` is per value of latents of unit deviation. The pictures' terms cost a pass through the decoder and back,
    more than the prior itself: only the share ``decoded`` of a batch's items has them. ``lpips_vgg`` acts on a random
    crop of ``vgg_crop`` pixels.
    """

    mse: float = 1.0
    lpips_alex: float = 1.0
    lpips_vgg: float = 0.0
    decoded: float = 0.25
    vgg_crop: int = 64
    snr_min: float = 0.5
    snr_max: float = 5.0

    def __post_init__(self) -> None:
        for name in ("mse", "lpips_alex", "lpips_vgg"):
            if not getattr(self, name) >= 0:
                raise IdmFastError(f"loss: {name} must be >= 0, got {getattr(self, name)}")
        if not self.mse + self.lpips_alex + self.lpips_vgg > 0:
            raise IdmFastError("loss: mse, lpips_alex or lpips_vgg must be above 0, got 0 for all")
        if not 0 < self.decoded <= 1 or self.vgg_crop < 16:
            raise IdmFastError(
                f"loss: decoded must lie in (0, 1] and vgg_crop be >= 16, got {self.decoded} and {self.vgg_crop}"
            )
        if not 0 <= self.snr_min <= self.snr_max < float("inf") or not self.snr_max > 0:
            raise IdmFastError(
                f"loss: snr_min and snr_max must satisfy 0 <= snr_min <= snr_max, got {self.snr_min} and {self.snr_max}"
            )

    @property
    def pictures(self) -> bool:
        """Whether any term needs the decoder."""
        return self.lpips_alex + self.lpips_vgg > 0


class LatentLoss(nn.Module):
    """Terms of the loss by name, each a mean over its items, already weighted; their sum is minimised."""

    def __init__(self, weights: LatentLossWeights) -> None:
        super().__init__()
        self.weights = weights
        self.alex = Lpips("alex") if weights.lpips_alex else None
        self.vgg = Lpips("vgg") if weights.lpips_vgg else None
        self.requires_grad_(False)

    def latent(self, z_hat: Tensor, z0: Tensor, snr: Tensor) -> dict[str, Tensor]:
        """Of scaled latents [N, D, h, w]; ``snr`` [N] = alpha^2 / sigma^2."""
        w = self.weights
        squares = (z_hat.float() - z0).square().mean(dim=(1, 2, 3))
        return {"mse": w.mse * (snr.clamp(w.snr_min, w.snr_max) * squares).mean()} if w.mse else {}

    def picture(self, vqgan: Vqgan, latent: Tensor, x0: Tensor, corner: tuple[int, int]) -> dict[str, Tensor]:
        """Of latents [n, D, h, w] in the decoder's own unit and the faces x0 [n, 3, S, S] that they are to become.

        The decoder sees codes, as it will when sampling is done; their gradient is handed to the latent as it is.
        """
        w, terms = self.weights, {}
        made = vqgan.decode(latent).float()
        if self.alex is not None:
            terms["lpips_alex"] = w.lpips_alex * self.alex.distance_to(self.alex.prepare(x0), made).mean()
        if self.vgg is not None:
            window = (..., slice(corner[0], corner[0] + w.vgg_crop), slice(corner[1], corner[1] + w.vgg_crop))
            terms["lpips_vgg"] = w.lpips_vgg * self.vgg.distance_to(self.vgg.prepare(x0[window]), made[window]).mean()
        return terms

    def count(self, batch: int) -> int:
        """How many items of a batch have the terms of pictures."""
        return max(1, round(self.weights.decoded * batch)) if self.weights.pictures else 0


def chosen(rng_order: Tensor, count: int) -> Tensor:
    """The first ``count`` of a random order, sorted: their part of a batch keeps its order in memory."""
    return torch.sort(rng_order[:count]).values
