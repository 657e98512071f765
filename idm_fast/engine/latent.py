"""``LatentEngine``: encoder, walk over latents and decoder, compiled as one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from idm_fast.diffusion import SamplerTable
from idm_fast.engine.autoencoder import Part
from idm_fast.engine.buffers import images
from idm_fast.engine.checks import check_shape, check_shared
from idm_fast.engine.engine import Engine, EngineOptions, Memory, allotted, ingredients, loop_of
from idm_fast.engine.lower_vqgan import lower_decoder, lower_encoder
from idm_fast.engine.memory import require
from idm_fast.engine.plan import Plan
from idm_fast.engine.precision import chosen_device, chosen_dtype
from idm_fast.engine.surroundings import shielded
from idm_fast.engine.weights import PackedWeights
from idm_fast.engine.writer import Shape
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet
from idm_fast.models.vqgan import Vqgan

_WHO = "LatentEngine"


class LatentPlan(Plan):
    """A prior's plan between an encoder and a decoder: ``cond`` and ``result`` are pictures, x and history are latents
    times ``scale``.

    The three take turns in one memory, so what one hands to the next lies apart.
    """

    finishes = True

    def __init__(self, *prior: Any, encoder: Part, decoder: Part, scale: float) -> None:
        super().__init__(*prior)
        self.encoder, self.decoder, self.scale = encoder, decoder, scale
        self.noise, self._handed = torch.zeros_like(self.x), torch.zeros_like(self.x)
        # How much of the encoder's latent the walk begins with, beside the noise: read on the device, as all that
        # differs from walk to walk.
        self.keep = torch.zeros(1, device=self.x.device)
        self._lost = torch.zeros(len(self.x), 1, 1, 1, device=self.x.device)  # NaN where a latent is not finite

    @property
    def start(self) -> Tensor:
        return self.noise

    @property
    def cond(self) -> Tensor:
        return self.encoder.x

    @property
    def result(self) -> Tensor:
        return self.decoder.out

    def setup(self) -> None:
        self.encoder.run()
        self._enter_latents()
        super().setup()

    def finish(self) -> None:
        self._leave_latents()
        self.decoder.run()
        # The nearest code to NaN is one like any other: its picture would hide that the walk has failed.
        torch.sum(self._handed.mul_(0), (1, 2, 3), keepdim=True, out=self._lost)
        self.result.add_(self._lost)

    def check_range(self) -> bool:
        prior = self.weights.dtype != torch.float16 or self.weights.range_checked == self.weights.version
        if prior and self.encoder.range_known and self.decoder.range_known:
            return False
        if not self.encoder.check_range(True):
            self.encoder.run()
        self._enter_latents()
        super().check_range()
        self._leave_latents()
        self.decoder.check_range(True)
        return True

    def _enter_latents(self) -> None:
        prior_cond = super().cond
        assert prior_cond is not None
        torch.mul(self.encoder.out, self.scale, out=self._handed)
        prior_cond.copy_(self._handed)
        torch.addcmul(self.noise, self._handed, self.keep, out=self.x)

    def _leave_latents(self) -> None:
        torch.div(self.x, self.scale, out=self._handed)
        self.decoder.x.copy_(self._handed)


class LatentEngine(Engine):
    """Made by ``compile_latent``: an ``Engine`` whose images are latents, between pictures.

    ``run`` gives the restored pictures [N, 3, H, W] of ``cond`` [N, 3, H, W], not clamped: it encodes, walks from
    ``start`` [N, D, h, w] with the latent as condition, decodes. Latents, and the x and x0_hat of ``callback`` and
    ``guidance``, are of unit deviation. A picture is NaN where its latent is not finite.
    """

    _plan: LatentPlan

    def keep(self, part: float) -> None:
        """Walks begin at ``start + part * latent`` from now on, at first at ``start`` alone."""
        with self.arena.turn():
            self._plan.keep.fill_(part)

    def memory(self) -> Memory:
        held, plan = super().memory(), self._plan
        parts = plan.encoder.stats_nbytes + plan.decoder.stats_nbytes + 2 * plan.noise.nbytes
        return replace(held, weights=held.weights + plan.encoder.weights.nbytes, workspace=held.workspace + parts)


@shielded
def compile_latent(
    vqgan: Vqgan,
    prior: UNet,
    shape: Shape,  # N, H, W of the pictures
    table: SamplerTable,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    options: EngineOptions | None = None,
    autoencoder_weights: PackedWeights | None = None,
) -> LatentEngine:
    """``vqgan`` and ``prior`` as one engine for N pictures of H x W pixels and walks of ``table.evaluations`` at most.

    Without a callback or guidance a run on CUDA is one graph; with one its ends and its steps are graphs of their own.
    ``options.weights`` are the prior's; 8-bit dtypes are the prior's too, whose autoencoder keeps 16 bits or 32. Raises
    ``IdmFastError`` as ``Engine.compile``, and where the prior does not fit the latents.
    """
    options = options or EngineOptions()
    place = chosen_device(device)
    kind, quantised = chosen_dtype(dtype, place, options.backend)
    check_shape(_WHO, shape, vqgan.config.factor)
    channels, config = vqgan.config.embed_channels, prior.config
    if (config.in_channels, config.cond_channels) != (channels, channels):
        raise IdmFastError(
            f"{_WHO}: prior must have the latent's channels and condition = {channels} and {channels}, "
            f"got {config.in_channels} and {config.cond_channels}"
        )
    inside = (shape[0], shape[1] // vqgan.config.factor, shape[2] // vqgan.config.factor)
    made = ingredients(prior, inside, table, place, kind, quantised, options)
    check_shared(_WHO, autoencoder_weights, None, vqgan.config, kind, place)
    packed = autoencoder_weights or PackedWeights(vqgan, kind, place)
    ends = lower_encoder(vqgan, shape, kind), lower_decoder(vqgan, shape, kind)
    with allotted(options, made.arena, shape):
        need = max(images(nodes)[1] for nodes in (*(end.nodes for end in ends), made.lowered.setup + made.lowered.step))
        if need > made.arena.nbytes:
            require(need, place)
        made.arena.take(need)  # grown once, so that all three lie in it
        encoder, decoder = (Part(end, packed, made.arena, made.tuner) for end in ends)
        made.load(table)
        plan = LatentPlan(
            made.lowered, made.tables, made.weights, shape[0], made.arena, made.tuner, encoder=encoder,
            decoder=decoder, scale=vqgan.config.latent_scale,
        )  # fmt: skip
    made.tuner.save()
    return LatentEngine(plan, table, made.weights, made.arena, loop_of(plan, options))
