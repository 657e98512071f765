"""Trains a vector-quantised autoencoder (VQGAN, 2012.09841): what CLR-Face's latents are made of.

Everything random follows from the seed and the item's position in the run, so a run that is stopped and resumed is the
same run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idm_fast.checkpoints import native
from idm_fast.config_vqgan import VqganConfig, vqgan_preset
from idm_fast.errors import IdmFastError
from idm_fast.models.perceptual import Lpips
from idm_fast.models.vqgan import Vqgan
from idm_fast.training.codebook import CodebookAverage
from idm_fast.training.data import FacePictures
from idm_fast.training.ema import Ema
from idm_fast.training.face_loop import FaceLoop
from idm_fast.training.log import put_row
from idm_fast.training.reconstruction import Reconstruction, draw, measure
from idm_fast.training.sheet import faces_to_show
from idm_fast.training.state import Stateful
from idm_fast.training.vqgan_loss import VqganLoss
from idm_fast.training.vqgan_settings import VqganSettings

_SHOWN, _MEASURED = 8, 64  # validation faces of a sheet, and of its figures


class _Pass(nn.Module):
    """What a training step asks of the network, in one call, so that it can be spread over processes."""

    def __init__(self, model: Vqgan) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, quantise: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        latent = self.model.encode(x)
        quantised, codes = self.model.quantize(latent)
        return self.model.decode(quantised if quantise else latent, quantize=False), latent, quantised, codes


class VqganTrainer(FaceLoop[VqganConfig, Vqgan]):
    """One run: ``VqganTrainer(settings).run()``. Resumes from ``settings.out / 'state.pt'`` when it is there.

    Raises ``IdmFastError`` before any work for data, settings or a state that do not fit.
    """

    settings: VqganSettings

    def __init__(self, settings: VqganSettings) -> None:
        self.settings = settings
        config = vqgan_preset(settings.preset)
        super().__init__(settings, config, lambda: Vqgan(config))
        begins = settings.init_from is not None and not self.state_file.exists()
        if settings.init_from is not None and begins:
            _begin_from(self.model, settings.init_from)
            self.ema = Ema(self.model, settings.ema_decay)
        self.model.codebook.requires_grad_(False)  # it learns by running means
        self.average = CodebookAverage(
            self.model.codebook, settings.codebook_decay, settings.revive_below, settings.revive_every
        )
        if begins:
            positions = settings.batch_size * self.group.size * (config.image_size // config.factor) ** 2
            self.average.keep(self.model.codebook, positions / config.codebook_size)
        self.loss = VqganLoss(settings.loss).to(self.device)
        self.judge_optimizer: torch.optim.Optimizer | None = None
        if self.loss.judge is not None:
            self.judge_optimizer = torch.optim.Adam(
                self.loss.judge.parameters(), lr=settings.loss.judge_rate, betas=(0.5, 0.99)
            )
        self._measured: tuple[int, Reconstruction | None] = (-1, None)  # of which step
        self.resume(_Pass(self.model))

    def parts(self) -> dict[str, Stateful]:
        parts = super().parts() | {"codebook": self.average}
        if self.judge_optimizer is not None and self.loss.judge is not None:
            parts |= {"judge": self.loss.judge, "judge_optimizer": self.judge_optimizer}
        return parts

    def _steps(self) -> Iterator[dict[str, float]]:
        s, size = self.settings, self.model.config.image_size
        pictures = FacePictures(self.faces, size, self._items, s.seed, s.degraded, self._cache_bytes)
        for x in self._batches(pictures):
            yield self._step(x.to(self.device, non_blocking=True))

    def _step(self, x: Tensor) -> dict[str, float]:
        s, group = self.settings, self.group
        rng = np.random.default_rng((s.seed, 3, self.step))  # alike in every process
        side = max(1, x.shape[-1] - s.loss.vgg_crop + 1)
        corner = (int(rng.integers(side)), int(rng.integers(side)))
        torch.manual_seed(int(rng.integers(2**31)) + group.rank)  # of dropout
        self._set_rate()
        with self._autocast():
            made, latent, quantised, codes = self.network(x, self.step >= s.codebook_lead)
            last = self.model.decoder.out_conv.weight
            gradient, terms = self.loss(made, x, last, corner, self.step)
        commitment = s.loss.commitment * F.mse_loss(latent.float(), quantised.detach().float())
        # The sum of the terms is linear in the picture here: its gradient is the one that was found.
        total = (made.float() * gradient).sum() + commitment
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip)
        error = (made.detach().float() - x).square().mean(dim=(1, 2, 3))
        shown = terms | {"commitment": commitment.detach(), "psnr": 10 * (4 / error).log10().mean(), "grad_norm": norm}
        if self.loss.judge is not None:
            shown["judge"] = self._teach_judge()
        figures = dict(zip(shown, torch.stack([v.float() for v in shown.values()]).tolist(), strict=True))
        if math.isfinite(figures["grad_norm"]):  # one bad batch must not end a run; the log shows it
            self.optimizer.step()
            self.average.update(self.model.codebook, latent, codes, self.step, s.seed, group)
            self.ema.update(self.model, self.step)
            self.ema.model.codebook.load_state_dict(self.model.codebook.state_dict())  # means already
        used, perplexity = self.average.use()
        return figures | {"codes_used": used, "perplexity": perplexity}

    def _teach_judge(self) -> Tensor:
        hinge = self.loss.hinge()  # float32: it is small
        if hinge is None or self.judge_optimizer is None or self.loss.judge is None:
            return torch.zeros((), device=self.device)
        self.judge_optimizer.zero_grad(set_to_none=True)
        hinge.backward()  # type: ignore[no-untyped-call]
        self.group.average(self.loss.judge)
        if hinge.isfinite():
            self.judge_optimizer.step()
        return hinge.detach()

    def _draw(self, path: Path) -> None:
        faces = self._faces()
        found = self._found()
        if faces is not None and found is not None:
            draw(self.ema.model, faces[:: max(1, len(faces) // _SHOWN)][:_SHOWN], path)
            put_row(self.settings.out / "reconstruction.csv", self.step, found.to_dict())

    def _faces(self) -> Tensor | None:
        return faces_to_show(self.settings.data, self.model.config.image_size, _MEASURED)

    def _found(self) -> Reconstruction | None:
        """The figures of the averaged weights as they are now; None without a picture to measure."""
        if self._measured[0] != self.step:
            faces = self._faces()
            try:
                lpips = Lpips("alex").to(self.device)
            except IdmFastError:  # a run without a perceptual term needs no such weights
                lpips = None
            self._measured = self.step, None if faces is None else measure(self.ema.model, faces, lpips)
        return self._measured[1]

    def export(self) -> None:
        """Writes the averaged weights as ``out / model.safetensors`` in fp16, with their figures and latent scale."""
        found, notes, config = self._found(), self._notes(), self.model.config
        if found is not None:
            notes |= {"reconstruction": {key: round(value, 4) for key, value in found.to_dict().items()}}
            if found.latent_deviation > 0:
                config = replace(config, latent_scale=round(1 / found.latent_deviation, 4))
        native.save(self.settings.out / "model.safetensors", self.ema.model, config, notes, torch.float16)


def _begin_from(model: Vqgan, path: Path) -> None:
    """The weights of a model file of the same network."""
    checkpoint = native.load_any(path)
    if not isinstance(checkpoint.module, Vqgan):
        raise IdmFastError(f"{path}: must hold a VQGAN to begin from, got {type(checkpoint.module).__name__}")
    if replace(checkpoint.config, latent_scale=1.0, name="") != replace(model.config, latent_scale=1.0, name=""):
        raise IdmFastError(f"{path}: must hold a network of {model.config.name}'s shape, got another")
    model.load_state_dict(checkpoint.module.state_dict())
