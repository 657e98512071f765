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

from idm_fast.config import ModelConfig
from idm_fast.config_clr_face import ClrFaceConfig
from idm_fast.diffusion import Guidance, SamplerTable, initial_noise, sample
from idm_fast.engine import EngineOptions
from idm_fast.engine.latent import LatentEngine, compile_latent
from idm_fast.engine.memory import exhausted
from idm_fast.engine.weights import PackedWeights
from idm_fast.errors import IdmFastError
from idm_fast.face_model import FaceModel
from idm_fast.identity import IdentityGradient
from idm_fast.models.clr_face import ClrFace
from idm_fast.models.recognition import Recognition
from idm_fast.sampling import GuidanceSettings, SampleSettings
from idm_fast.walk import Walk

USED = ("group_norm_silu", "attention", "sampler_update", "vq_nearest")
USED_BY_ENGINE = ("conv2d", "norm_coefficients", "attention", "sampler_update", "vq_nearest")
_IN_FLOAT32 = ("sampler_update", "vq_nearest")  # on latents, whatever the networks' type


class ClrFaceRestorer(FaceModel):
    """Restored faces of degraded crops by a CLR-Face model. Arguments as for ``FaceModel``; 8 bits are the prior's
    alone.

    The guidance's gradient runs in plain modules: on a CPU face by face, in bfloat16 where the networks are, else in
    float32. Where the recognition network is not installed a walk is not guided, with a warning; ``skipped`` counts
    gradients of single faces that were not finite and were left out.
    """

    clamp = None  # latents have no bounds
    config: ClrFaceConfig
    module: ClrFace
    skipped = 0
    _recognition: Recognition | None = None
    _missing: str | None = None  # why there is none
    _warned = False
    _face_by_face = False  # gradients

    @property
    def walked(self) -> ModelConfig:
        return self.config.prior

    @property
    def size(self) -> int:
        return self.config.image_size

    def _place(self) -> None:
        # A CPU is no slower so, and torch's sums there depend on the batch, which a face must not.
        self._face_by_face = self.device.type == "cpu"
        self._plain = self.module.to(self.device).requires_grad_(False)
        if self._engines is not None:
            parts = self.module.prior, self.module.vqgan
            self._packed = tuple(PackedWeights(part, self.dtype, self.device) for part in parts)
        elif self.dtype != torch.float32:  # the guidance keeps the float32 one
            self._plain = copy.deepcopy(self.module).to(self.dtype)

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
        interval = asked.interval or (c.guidance_interval[0], c.guidance_interval[1])
        every, repeats = asked.every or c.guidance_every, asked.repeats or c.guidance_repeats
        guidance = GuidanceSettings(scale, interval, every, resolution, repeats, asked.masked)
        full = replace(settings.resolved(self.walked), guidance=guidance)
        if scale and (asked.scale is not None or asked.interval is not None):
            evaluations = self.table(full).evaluations
            if not Guidance(torch.zeros_like, interval=interval).guided(evaluations):
                raise IdmFastError(
                    f"guidance_interval must hold one of the walk's {evaluations} evaluations, which lie at "
                    f"0/{evaluations} to {evaluations - 1}/{evaluations} of the way, got {interval}"
                )
        return full

    def _recognises(self, required: bool) -> bool:
        """Whether the recognition network is here; loads it at the first call."""
        if self._recognition is None and self._missing is None:
            try:
                with torch.inference_mode(False):  # gradients go through it, whoever asks first
                    layout: Any = {"device": self.device, "memory_format": torch.channels_last}
                    self._recognition = Recognition().to(**layout)
            except IdmFastError as error:
                self._missing = str(error)
        if self._missing is not None and required:
            raise IdmFastError(f"guidance_scale must be 0 (--no-identity-guidance) here: {self._missing}")
        if self._missing is not None and not self._warned:
            self._warned = True
            text = f"{self.config.name}: restores without identity guidance: {self._missing}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        return self._recognition is not None

    def _guidance(self, walk: Walk) -> Guidance | None:
        """None where the walk is not guided. Its images behind the degraded crops are not, and cost nothing."""
        asked, crops = walk.settings.guidance, walk.cond
        if not asked.scale:
            return None
        assert self._recognition is not None
        assert asked.interval is not None
        assert crops is not None
        count = len(crops) - walk.fill
        at_once = 1 if self._face_by_face else count
        with torch.inference_mode(False), torch.no_grad():  # autograd keeps the target, and no inference tensor
            mask = self.module.mask() if asked.masked else None
            targets = [self.module.irn(y.clone(), self._recognition) for y in torch.split(crops[:count], at_once)]
        found = [
            IdentityGradient(
                self.module.vqgan, self._recognition, target, mask, factor=self.size // (asked.resolution or self.size),
                scale=asked.scale, repeats=asked.repeats or 1,
            )
            for target in targets
        ]  # fmt: skip

        def gradient(x0_hat: Tensor) -> Tensor:
            parts = torch.split(x0_hat[:count], at_once)
            # Never float16, in which a gradient vanishes; bfloat16 turns it by ten degrees and costs none of its gain.
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                made = [one(part) for one, part in zip(found, parts, strict=True)]
            return torch.cat([*made, made[0].new_zeros(walk.fill, *x0_hat.shape[1:])])

        return Guidance(gradient, asked.scale, asked.interval, asked.every or 1)

    def _note(self, guidance: Guidance | None) -> None:
        missed = 0 if guidance is None else guidance.skipped
        if missed:
            self.skipped += missed
            text = f"{self.config.name}: {missed} identity gradients of a walk were not finite and were left out"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    # ---- walks ----

    def _begun(self, walk: Walk) -> Walk:
        shape = (len(walk), self.config.vqgan.embed_channels, self.config.latent_size, self.config.latent_size)
        noise = initial_noise(walk.seeds, shape, self.device)
        return replace(walk, x=noise if walk.whole else walk.table.sigma_start * noise)

    def _walked_plainly(self, walk: Walk) -> Tensor:
        assert walk.cond is not None
        latent, guidance = self._plain.encode(walk.cond), self._guidance(walk)
        walked = sample(
            lambda x, t: self._plain.prior(x, t, latent), walk.table, walk.x + _kept(walk) * latent, walk.seeds,
            callback=walk.report, guidance=guidance, network_dtype=self.dtype,
        )  # fmt: skip
        self._note(guidance)
        return self._plain.decode(walked)

    def _compiled(self, batch: int, table: SamplerTable, options: EngineOptions) -> LatentEngine:
        return compile_latent(
            self.module.vqgan, self.module.prior, (batch, self.size, self.size), table,
            dtype=self.quantised or self.dtype, device=self.device, options=options,
            autoencoder_weights=self._packed[1],
        )  # fmt: skip

    def _walked_by(self, engine: Any, walk: Walk) -> Tensor:
        engine.keep(_kept(walk))
        try:
            guidance = self._guidance(walk)
            out: Tensor = engine.run(walk.x, walk.seeds, walk.cond, walk.report, guidance)
        except torch.OutOfMemoryError as error:  # a gradient's, which needs more than the plan
            raise exhausted((len(walk), self.size, self.size), error) from None
        self._note(guidance)
        return out

    @torch.inference_mode()
    def reconstruct(self, y: Tensor) -> Tensor:
        """``decode(encode(y))``: crops as the autoencoder alone gives them back, by plain modules. As ``restore``."""
        self._check(y)
        y = self._placed(y)
        with self._on_device(), self._forced():
            return self._plain.decode(self._plain.encode(y)).clamp_(-1, 1).cpu()


def _kept(walk: Walk) -> float:
    """How much of the latent the walk begins with."""
    return 0.0 if walk.whole else walk.table.alpha_start
