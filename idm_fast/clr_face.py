"""CLR-Face (2402.06106): a walk over the latents of faces, guided to the identity that was recovered.

A crop is encoded, not quantised; the prior walks from noise to a clean latent that is conditioned on it; decoding
quantises. At chosen evaluations the estimate is moved so that its face is recognised as whom the degraded face shows.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from idm_fast.config_clr_face import ClrFaceConfig
from idm_fast.diffusion import Guidance, SamplerTable, initial_noise, sample
from idm_fast.engine import EngineOptions
from idm_fast.engine.engine import Callback
from idm_fast.engine.latent import LatentEngine, compile_latent
from idm_fast.engine.weights import PackedWeights
from idm_fast.errors import IdmFastError
from idm_fast.face_model import FaceModel
from idm_fast.identity import IdentityGradient
from idm_fast.models.clr_face import ClrFace
from idm_fast.models.recognition import Recognition
from idm_fast.sampling import GuidanceSettings, SampleSettings

USED = ("group_norm_silu", "attention", "sampler_update", "vq_nearest")
USED_BY_ENGINE = ("conv2d", "norm_coefficients", "attention", "sampler_update", "vq_nearest")
_IN_FLOAT32 = ("sampler_update", "vq_nearest")  # on latents, whatever the networks' type


class ClrFaceRestorer(FaceModel):
    """Restored faces of degraded crops by a CLR-Face model. Arguments as for ``CropRestorer``; 8 bits are the prior's
    alone.

    The guidance's gradient runs in plain float32 modules. Where the recognition network is not installed a walk is not
    guided, with a warning; ``skipped`` counts gradients of single faces that were not finite and were left out.
    """

    clamp = None  # latents have no bounds
    config: ClrFaceConfig
    module: ClrFace

    def __init__(
        self,
        config: ClrFaceConfig,
        module: ClrFace,
        device: torch.device,
        dtype: torch.dtype | str,
        backend: str | None = None,
        engine: bool = True,
        cache_every: int = 1,
    ) -> None:
        super().__init__(config, config.prior, config.image_size, module, device, dtype, backend, engine, cache_every)
        self._plain = self.module = module.to(device).requires_grad_(False)
        self.skipped = 0
        self._recognition: Recognition | None = None
        self._missing: str | None = None  # why there is none
        if engine:
            self._packed = tuple(PackedWeights(part, self.dtype, device) for part in (module.prior, module.vqgan))
        elif self.dtype != torch.float32:  # the guidance keeps the float32 one
            self._plain = copy.deepcopy(module).to(self.dtype)

    def _used(self) -> Iterator[tuple[str, torch.dtype]]:
        used = USED if self._engines is None else USED_BY_ENGINE
        for name in (*used, *([f"conv2d_{self.quantised}"] if self.quantised else [])):
            yield name, torch.float32 if name in _IN_FLOAT32 else self.dtype

    # ---- guidance ----

    def resolved(self, settings: SampleSettings) -> SampleSettings:
        """With the model's defaults filled in. A scale that is asked for needs the recognition network:
        ``IdmFastError`` where it is missing; the model's own scale becomes 0 there, with one warning."""
        asked, c = settings.guidance, self.config
        scale = c.guidance_scale if asked.scale is None else asked.scale
        resolution = self.size if asked.resolution is None else asked.resolution
        if resolution > self.size or self.size % resolution or resolution % c.vqgan.factor:
            raise IdmFastError(
                f"guidance_resolution must divide the model's {self.size} px and be a multiple of {c.vqgan.factor}, "
                f"got {resolution}"
            )
        if scale and not self._recognises(required=asked.scale is not None):
            scale = 0.0
        guidance = GuidanceSettings(
            scale,
            asked.interval or (c.guidance_interval[0], c.guidance_interval[1]),
            asked.every or c.guidance_every,
            resolution,
            asked.masked,
        )
        return replace(settings.resolved(self.walked), guidance=guidance)

    def _recognises(self, required: bool) -> bool:
        """Whether the recognition network is here; loads it at the first call."""
        if self._recognition is None and self._missing is None:
            try:
                with torch.inference_mode(False):  # gradients go through it, whoever asks first
                    self._recognition = Recognition().to(self.device)
            except IdmFastError as error:
                self._missing = str(error)
                if not required:
                    text = f"{self.config.name}: restores without identity guidance: {error}"
                    warnings.warn(text, RuntimeWarning, stacklevel=2)
        if self._missing is not None and required:
            raise IdmFastError(f"guidance_scale must be 0 (--no-identity-guidance) here: {self._missing}")
        return self._recognition is not None

    def _guidance(self, y: Tensor, settings: SampleSettings) -> Guidance | None:
        """Of degraded crops ``y``; None where the walk is not guided."""
        asked = settings.guidance
        if not asked.scale:
            return None
        assert self._recognition is not None
        assert asked.interval is not None
        with torch.inference_mode(False), torch.no_grad():  # autograd keeps the target, and no inference tensor
            target = self.module.irn(y.clone(), self._recognition)
            mask = self.module.mask() if asked.masked else None
        factor = self.size // (asked.resolution or self.size)
        gradient = IdentityGradient(self.module.vqgan, self._recognition, target, mask, factor, scale=asked.scale)
        return Guidance(gradient, asked.scale, asked.interval, asked.every or 1)

    def _note(self, guidance: Guidance | None) -> None:
        missed = 0 if guidance is None else guidance.skipped
        if missed:
            self.skipped += missed
            text = f"{self.config.name}: {missed} identity gradients of a walk were not finite and were left out"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    # ---- walks ----

    def _beginning(
        self, y: Tensor, seeds: Tensor, table: SamplerTable, settings: SampleSettings
    ) -> tuple[Tensor, Tensor | None]:
        shape = (len(y), self.config.vqgan.embed_channels, self.config.latent_size, self.config.latent_size)
        noise = initial_noise(seeds, shape, self.device)
        return noise if settings.strength == 1 else table.sigma_start * noise, y

    def _walked_plainly(
        self,
        start: Tensor,
        seeds: Tensor,
        cond: Tensor | None,
        table: SamplerTable,
        settings: SampleSettings,
        report: Callback | None,
    ) -> Tensor:
        assert cond is not None
        latent, guidance = self._plain.encode(cond), self._guidance(cond, settings)
        walked = sample(
            lambda x, t: self._plain.prior(x, t, latent), table, start + _kept(table, settings) * latent, seeds,
            callback=report, guidance=guidance, network_dtype=self.dtype,
        )  # fmt: skip
        self._note(guidance)
        return self._plain.decode(walked)

    def _compiled(self, batch: int, table: SamplerTable, options: EngineOptions) -> LatentEngine:
        return compile_latent(
            self.module.vqgan, self.module.prior, (batch, self.size, self.size), table,
            dtype=self.quantised or self.dtype, device=self.device, options=options,
            autoencoder_weights=self._packed[1],
        )  # fmt: skip

    def _walked_by(
        self,
        engine: Any,
        start: Tensor,
        seeds: Tensor,
        cond: Tensor | None,
        table: SamplerTable,
        settings: SampleSettings,
        report: Callback | None,
    ) -> Tensor:
        assert cond is not None
        guidance = self._guidance(cond, settings)
        out: Tensor = engine.run(start, seeds, cond, report, guidance, keep=_kept(table, settings))
        self._note(guidance)
        return out

    @torch.inference_mode()
    def reconstruct(self, y: Tensor) -> Tensor:
        """``decode(encode(y))``: crops as the autoencoder alone gives them back, by plain modules. As ``restore``."""
        self._check(y)
        y = y.to(self.device, torch.float32).contiguous(memory_format=torch.channels_last)
        with self._forced():
            return self._plain.decode(self._plain.encode(y)).clamp_(-1, 1).cpu()


def _kept(table: SamplerTable, settings: SampleSettings) -> float:
    """How much of the latent the walk begins with."""
    return 0.0 if settings.strength == 1 else table.alpha_start
