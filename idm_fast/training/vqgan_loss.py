"""What an autoencoder is trained for: the same picture, the same texture, latents near their codes.

    loss = l1 |y - x| + lpips_vgg LPIPS(y, x) + commitment |z - code(z)|^2 + adversarial lambda (-D(y))

where lambda makes the adversarial gradient as large as that of the two terms before it, at the decoder's last
convolution: "Taming Transformers" (arXiv 2012.09841), equations 5 to 7. The codes themselves learn by running means
(codebook.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idm_fast.errors import IdmFastError
from idm_fast.models.perceptual import Lpips
from idm_fast.training.critic import Critic, Judge
from idm_fast.training.patch_discriminator import PatchDiscriminator

_DELTA, _LARGEST = 1e-6, 1e4  # of equation 7, and of its public code


@dataclass(frozen=True)
class VqganLossWeights:
    """Weights of the terms; 0 switches a term off. ``lpips_vgg`` acts on a random crop of ``vgg_crop`` pixels.

    ``adversarial``: share of the other terms' gradient; 0.8 in the paper. It is heard from step ``adversarial_from``,
    and its ``judge`` ("patch": a discriminator of the pixels; "features": one of VGG16's maps of the crop) learns
    alone for the ``judge_lead`` steps before, at the learning rate ``judge_rate``.
    """

    l1: float = 1.0
    lpips_vgg: float = 1.0
    vgg_crop: int = 64
    commitment: float = 0.25
    adversarial: float = 0.0
    adversarial_from: int = 0
    judge: Literal["patch", "features"] = "patch"
    judge_lead: int = 200
    judge_rate: float = 3e-4

    def __post_init__(self) -> None:
        for name in ("l1", "lpips_vgg", "commitment", "adversarial", "adversarial_from", "judge_lead"):
            if not getattr(self, name) >= 0:
                raise IdmFastError(f"loss: {name} must be >= 0, got {getattr(self, name)}")
        if not self.l1 + self.lpips_vgg > 0:
            raise IdmFastError("loss: l1 or lpips_vgg must be above 0, got 0 for both")
        if self.vgg_crop < 16 or not self.judge_rate > 0:
            raise IdmFastError(
                f"loss: vgg_crop must be >= 16 and judge_rate > 0, got {self.vgg_crop} and {self.judge_rate}"
            )
        if self.judge not in ("patch", "features"):
            raise IdmFastError(f"loss: judge must be patch or features, got {self.judge!r}")
        if self.adversarial and self.judge == "features" and not self.lpips_vgg:
            raise IdmFastError("loss: lpips_vgg must be above 0 with judge = features, which shares its maps, got 0")


class VqganLoss(nn.Module):
    """The terms by name, and the gradient of their sum with respect to the picture.

    With a judge, ``hinge`` after each ``forward`` is its own loss on the pictures it has just seen.
    """

    def __init__(self, weights: VqganLossWeights) -> None:
        super().__init__()
        self.weights = weights
        self.vgg = Lpips("vgg") if weights.lpips_vgg else None
        self.requires_grad_(False)
        self.judge: Judge | None = None
        if weights.adversarial:
            self.judge = PatchDiscriminator() if weights.judge == "patch" else Critic()
        self._seen: tuple[list[Tensor], list[Tensor]] | None = None  # what it looks at, of real and made pictures

    def forward(
        self, made: Tensor, x: Tensor, last: Tensor, corner: tuple[int, int], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(gradient [N, 3, H, W] float32 of the sum of the terms, the terms, weighted).

        ``made``: the network's picture of ``x`` [N, 3, H, W] in [-1, 1], with its graph; ``last``: the weight of its
        last convolution; ``corner`` of the crop; ``step`` of the training. The graph stays for the backward pass.
        """
        w = self.weights
        leaf = made.detach().float().requires_grad_()
        terms: dict[str, Tensor] = {}
        if w.l1:
            terms["l1"] = w.l1 * F.l1_loss(leaf, x)
        real, fake = [x], [leaf]
        if self.vgg is not None:
            window = (..., slice(corner[0], corner[0] + w.vgg_crop), slice(corner[1], corner[1] + w.vgg_crop))
            with torch.no_grad():
                real_maps = self.vgg.trunk(x[window])
            maps = self.vgg.trunk(leaf[window])
            terms["lpips_vgg"] = w.lpips_vgg * self.vgg.compare(self.vgg.units(real_maps), maps).mean()
            if w.judge == "features":
                real, fake = real_maps, maps
        begins = w.adversarial_from - w.judge_lead
        heard = self.judge is not None and step >= w.adversarial_from
        total = torch.stack(list(terms.values())).sum()
        (gradient,) = torch.autograd.grad(total, leaf, retain_graph=heard)
        self._seen = None
        if self.judge is not None:
            none = torch.zeros((), device=x.device)  # a log has the same columns from the first step on
            terms |= {"adversarial": none, "adversarial_weight": none}
            if step >= begins:
                self._seen = [each.detach() for each in real], [each.detach() for each in fake]
            if heard:
                persuasion = self.judge.persuade(fake)
                (wanted,) = torch.autograd.grad(persuasion, leaf)
                weight = w.adversarial * balance(made, last, gradient, wanted)
                gradient = gradient + weight * wanted
                terms |= {"adversarial": persuasion, "adversarial_weight": weight}
        return gradient, {name: term.detach() for name, term in terms.items()}

    def hinge(self) -> Tensor | None:
        """The judge's own loss on what ``forward`` saw last; None while it does not learn."""
        if self.judge is None or self._seen is None:
            return None
        return self.judge.hinge(*self._seen)


def balance(made: Tensor, last: Tensor, kept: Tensor, wanted: Tensor) -> Tensor:
    """lambda of equation 7: |d kept / d last| / (|d wanted / d last| + 1e-6), of two gradients at the picture."""
    sizes = []
    for gradient in (kept, wanted):
        (at_last,) = torch.autograd.grad(made, last, gradient.to(made.dtype), retain_graph=True)
        sizes.append(torch.linalg.vector_norm(at_last.float()))
    share: Tensor = sizes[0] / (sizes[1] + _DELTA)
    return share.clamp(max=_LARGEST).detach()
