"""Identity guidance: which way a latent must move so that its picture shows the person (CLR-Face, 2402.06106).

    g = d (1 - cos(e(decode(z)), target)) / dz,    gradient = mask g / rms(g)

z a latent in the prior's unit, e the recognition network, ``target`` the embedding that the identity recovery network
finds for the degraded face. Scaled so, an image's unmasked gradient has the root mean square 1 whatever its
face: ``Guidance.scale`` counts in deviations of the latent. Near its target a face would be carried past it by a step
of that length, and away from the person again; so a step ends where a linear distance would (Polyak's step). It is
far from linear: several short steps, each along its own gradient, come nearer than a long one.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from idm_fast.errors import IdmFastError
from idm_fast.models.light_decoder import LightDecoder
from idm_fast.models.vqgan import Vqgan


class Embeds(Protocol):
    """A differentiable embedding [N, E] of aligned crops [N, 3, S, S] in [-1, 1], as ``Recognition`` makes it."""

    def embed_aligned(self, x: Tensor) -> Tensor: ...


class IdentityGradient:
    """Callable: latents x0_hat [N, D, h, w] in the prior's unit to ``gradient``, of the same shape and dtype.

    - ``target`` [N, E]: where the embeddings are to go, one an image.
    - ``mask`` [D, h, w] in [0, 1]: what may change (``LatentMask``); None: everything.
    - ``factor`` f > 1 is lossy: the latent's means over f x f positions are decoded, to a picture of 1 / f of the side.
    - ``light``: a linear stand-in for the decoder (lossy too).
    - ``scale``: the ``Guidance``'s own. An image's gradient is shortened where a step of that scale would be longer
      than distance / |g|, at which a linear distance reaches 0. None: never.
    - ``repeats`` k: the sum of k such gradients, each found where the steps of ``scale`` before it have led.

    For ``diffusion.Guidance``; works under inference mode. The codes are left out: between them there is no gradient. A
    gradient that is not finite stays so (``Guidance`` skips and counts it); that of a picture that nothing can bring
    nearer is 0. Raises ``IdmFastError`` for shapes that do not fit.
    """

    def __init__(
        self,
        vqgan: Vqgan,
        recognition: Embeds,
        target: Tensor,
        mask: Tensor | None = None,
        factor: int = 1,
        light: LightDecoder | None = None,
        scale: float | None = None,
        repeats: int = 1,
    ) -> None:
        if factor < 1:
            raise IdmFastError(f"identity guidance: factor must be >= 1, got {factor}")
        if repeats < 1 or (repeats > 1 and scale is None):
            raise IdmFastError(f"identity guidance: repeats must be >= 1, and 1 without a scale, got {repeats}")
        if target.ndim != 2:
            raise IdmFastError(f"identity guidance: target must be [N, E], got {list(target.shape)}")
        self.vqgan, self.recognition, self.factor, self.light = vqgan, recognition, factor, light
        self.scale, self.repeats = scale, repeats
        self.target, self.mask = target.detach(), None if mask is None else mask.detach()

    def distance(self, x0_hat: Tensor) -> Tensor:
        """1 - cos(e(decode(z)), target) [N] of latents ``x0_hat`` in the prior's unit; differentiable."""
        self._check(x0_hat)
        z = x0_hat if self.factor == 1 else F.avg_pool2d(x0_hat, self.factor)
        z = z / self.vqgan.config.latent_scale
        picture = self.vqgan.decode(z, quantize=False) if self.light is None else self.light(z)
        embeddings = self.recognition.embed_aligned(picture).to(self.target.dtype)  # autocast's may be half
        # One made in inference mode may not be kept for a backward pass; its copy outside of it may.
        target = self.target.clone().to(embeddings)
        return 1 - F.cosine_similarity(embeddings, target, dim=1)

    def __call__(self, x0_hat: Tensor) -> Tensor:
        found = self._at(x0_hat)
        for _ in range(self.repeats - 1):
            found = found + self._at(x0_hat - (self.scale or 0.0) * found)
        return found

    def _at(self, x0_hat: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            z = x0_hat.detach().clone().requires_grad_(True)
            distance = self.distance(z)
            (gradient,) = torch.autograd.grad(distance.sum(), z)
        step = unit_rms(gradient)
        if self.scale is not None:
            step = step * _part(self.scale, distance.detach(), (gradient * step).sum((1, 2, 3)))[:, None, None, None]
        return step if self.mask is None else step * self.mask.to(step)

    def _check(self, x0_hat: Tensor) -> None:
        shape, channels = list(x0_hat.shape), self.vqgan.config.embed_channels
        if x0_hat.ndim != 4 or shape[:2] != [len(self.target), channels]:
            raise IdmFastError(
                f"identity guidance: x0_hat must be [{len(self.target)}, {channels}, h, w] = one latent a target, "
                f"got {shape}"
            )
        if self.mask is not None and shape[1:] != list(self.mask.shape):
            raise IdmFastError(
                f"identity guidance: x0_hat must be of the mask's shape = {list(self.mask.shape)}, got {shape[1:]}"
            )
        if shape[2] % self.factor or shape[3] % self.factor:
            raise IdmFastError(
                f"identity guidance: factor must divide the latent's {shape[2]} x {shape[3]}, got {self.factor}"
            )


def _part(scale: float, distance: Tensor, slope: Tensor) -> Tensor:
    """How much of a step of ``scale`` images may take whose ``distance`` [N] falls by ``slope`` [N] for a step of 1."""
    kind = torch.finfo(slope.dtype)
    distance = (distance - 8 * kind.eps).clamp(min=0)  # what is left behind 1 - cos may be rounding alone
    return (distance / (scale * slope).clamp(min=kind.tiny)).clamp(max=1)  # at a slope of 0 there is no step


def unit_rms(gradient: Tensor) -> Tensor:
    """Each image of ``gradient`` [N, ...] divided by its root mean square; one of zeros stays as it is."""
    tiny = torch.finfo(gradient.dtype).tiny
    dims = tuple(range(1, gradient.ndim))
    # By its largest value first: squares of very small or very large ones would leave the dtype's range.
    gradient = gradient / gradient.abs().amax(dims, keepdim=True).clamp(min=tiny)
    return gradient / gradient.square().mean(dims, keepdim=True).sqrt().clamp(min=tiny)
