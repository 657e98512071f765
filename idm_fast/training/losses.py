"""What a restorer is trained for: the right picture, the right texture, the right person.

    loss = w(t) |x0_hat - x0|^2 + perceptual LPIPS(x0_hat, x0) + identity |e(x0_hat) - e(x0)|^2 - adversarial D(x0_hat)

with w(t) the signal-to-noise ratio clamped to [``snr_min``, ``snr_max``] (Min-SNR, 2303.09556, with a floor so that
pure noise, where a few-step sampler starts, still counts) and e the frozen recognition embedding. The perceptual
terms act on x0_hat at every time: what few steps give is what is judged. Those terms alone give the middle of all
plausible faces, which is smoother than any of them; the critic D (critic.py) asks for one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from idm_fast.errors import IdmFastError
from idm_fast.models.perceptual import Lpips
from idm_fast.models.recognition import Recognition
from idm_fast.training.critic import Critic


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms; 0 switches a term off, and its network is then not loaded.

    ``mse`` is per pixel of pictures in [-1, 1]; ``lpips_vgg`` acts on a random crop of
    ``vgg_crop`` pixels, since the whole face would cost more than the U-Net; ``lpips_alex`` and ``identity`` act on the
    whole face. ``adversarial`` sees the crop of ``lpips_vgg``, whose features it shares; the critic learns alone for
    ``critic_lead`` steps, at the learning rate ``critic_rate``.
    """

    mse: float = 5.0
    lpips_vgg: float = 1.0
    lpips_alex: float = 1.0
    identity: float = 2.0
    vgg_crop: int = 64
    snr_min: float = 0.5
    snr_max: float = 5.0
    adversarial: float = 0.0
    critic_lead: int = 200
    critic_rate: float = 3e-4

    def __post_init__(self) -> None:
        if self.adversarial and not self.lpips_vgg:
            raise IdmFastError(
                f"loss: lpips_vgg must be above 0 with adversarial = {self.adversarial}, which shares its features,"
                f" got {self.lpips_vgg}"
            )


class RestorationLoss(nn.Module):
    """Terms of the loss by name, each a mean over the batch, already weighted; their sum is minimised.

    With a critic, ``hinge`` after each ``forward`` is its own loss on the faces it has just seen.
    """

    def __init__(self, weights: LossWeights) -> None:
        super().__init__()
        self.weights = weights
        self.vgg = Lpips("vgg") if weights.lpips_vgg else None
        self.alex = Lpips("alex") if weights.lpips_alex else None
        self.recognition = Recognition() if weights.identity else None
        self.requires_grad_(False)
        self.critic = Critic() if weights.adversarial else None
        self._seen: tuple[list[Tensor], list[Tensor]] | None = None  # feature maps of the real and the restored crops

    def forward(
        self, x0_hat: Tensor, x0: Tensor, snr: Tensor, corner: tuple[int, int], step: int = 0
    ) -> dict[str, Tensor]:
        """``x0_hat``, ``x0`` [N, 3, S, S] in [-1, 1]; ``snr`` [N] = alpha^2 / sigma^2; ``corner`` of the crop.

        ``step`` of the training says whether the critic has learned long enough to be heard.
        """
        w = self.weights
        x0_hat = x0_hat.float()
        squares = (x0_hat - x0).square().mean(dim=(1, 2, 3))
        terms = {"mse": w.mse * (snr.clamp(w.snr_min, w.snr_max) * squares).mean()}
        if self.vgg is not None:
            window = (..., slice(corner[0], corner[0] + w.vgg_crop), slice(corner[1], corner[1] + w.vgg_crop))
            with torch.no_grad():
                real = self.vgg.trunk(x0[window])
            fake = self.vgg.trunk(x0_hat[window])
            terms["lpips_vgg"] = w.lpips_vgg * self.vgg.compare(self.vgg.units(real), fake).mean()
            if self.critic is not None:
                self._seen = real, [features.detach() for features in fake]
                if step >= w.critic_lead:
                    terms["adversarial"] = w.adversarial * self.critic.persuade(fake)
        if self.alex is not None:
            terms["lpips_alex"] = w.lpips_alex * self.alex(x0_hat, x0).mean()
        if self.recognition is not None:
            with torch.no_grad():
                target = self.recognition.embed_aligned(x0)
            apart = (self.recognition.embed_aligned(x0_hat) - target).square().sum(dim=1)
            terms["identity"] = w.identity * apart.mean()
        return terms

    def hinge(self) -> Tensor:
        """The critic's own loss on what ``forward`` saw last."""
        if self.critic is None or self._seen is None:
            raise RuntimeError("RestorationLoss.hinge: needs adversarial > 0 and a forward before it")
        return self.critic.hinge(*self._seen)
