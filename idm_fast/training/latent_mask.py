"""Trains the mask of identity guidance, and puts a whole CLR-Face model together (2402.06106).

    z' = z - scale mask g,    loss = identity (1 - cos(e(D(z')), e(x0))) + lpips LPIPS(D(z'), x0) + l1 |D(z') - x0|
                                     + sparsity mean(mask)

with z the estimate of a prior's walk at an evaluation drawn for each item, g the identity gradient there towards what
the identity recovery network found (a constant here; the sum of those of the repeated steps, walked unmasked), D the
decoder without codes and e the recognition network. So the mask opens where a step towards the recovered identity
brings the true one nearer, and closes where it spoils the picture. Everything random follows from the seed and the
item's position in the run, so a run that is stopped and resumed is the same run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idm_fast.checkpoints import native
from idm_fast.checkpoints.kinds import IRN, UNET, VQGAN
from idm_fast.config_clr_face import ClrFaceConfig
from idm_fast.diffusion import Guidance
from idm_fast.errors import IdmFastError
from idm_fast.identity import IdentityGradient
from idm_fast.latent_space import matched
from idm_fast.models.clr_face import ClrFace
from idm_fast.models.latent_mask import LatentMask
from idm_fast.models.perceptual import Lpips
from idm_fast.models.recognition import Recognition
from idm_fast.training.data import list_faces
from idm_fast.training.face_loop import FaceLoop
from idm_fast.training.guided import GuidedValidation, table_of, walk
from idm_fast.training.identity_settings import LatentMaskSettings
from idm_fast.training.log import put_row
from idm_fast.training.mask_picture import draw_mask
from idm_fast.training.noising import item_seeds
from idm_fast.training.rounds import digest
from idm_fast.training.sheet import faces_to_show
from idm_fast.training.state import Stateful


class _Parts:
    """Digests of the model files, as part of a run's state: it goes on with the same ones only."""

    def __init__(self, files: dict[str, Path]) -> None:
        self.files, self.digests = files, {name: digest(file) for name, file in files.items()}

    def state_dict(self) -> dict[str, str]:
        return self.digests

    def load_state_dict(self, state: dict[str, str]) -> None:
        for name, found in self.digests.items():
            if state[name] != found:
                raise IdmFastError(
                    f"{self.files[name]}: must be the {name} that the run began with = {state[name][:12]}, "
                    f"got {found[:12]}; give that one or another --out"
                )


class LatentMaskTrainer(FaceLoop[ClrFaceConfig, LatentMask]):
    """One run: ``LatentMaskTrainer(settings).run()``. Resumes from ``settings.out / 'state.pt'`` when it is there.

    Raises ``IdmFastError`` before any work for data, settings, model files or a state that do not fit, and where the
    recognition network's weights are not installed.
    """

    settings: LatentMaskSettings

    def __init__(self, settings: LatentMaskSettings) -> None:
        self.settings = settings
        self.faces = list_faces(settings.data, "train", settings.min_native_px)
        recognition = Recognition()
        whole, self._made = _assembled(settings)
        self._parts = _Parts({"vqgan": settings.vqgan, "prior": settings.prior, "irn": settings.irn})
        c = whole.config
        super().__init__(settings, c, lambda: LatentMask(c.vqgan.embed_channels, c.latent_size, c.latent_size))
        layout: Any = {"device": self.device, "memory_format": torch.channels_last}
        self.whole, self.recognition = whole.to(**layout), recognition.to(**layout)
        self.lpips = Lpips("alex").to(self.device).requires_grad_(False) if settings.loss.lpips else None
        self.table = table_of(self.whole)
        self.guided = Guidance(torch.zeros_like, c.guidance_scale, settings.guidance_interval).guided(
            self.table.evaluations
        )
        if not self.guided:
            raise IdmFastError(
                f"guidance_interval must hold one of the prior's {self.table.evaluations} evaluations, which lie at 0, "
                f"{1 / self.table.evaluations:.3g}, ... of the way, got {settings.guidance_interval}"
            )
        self._validation: GuidedValidation | None = None
        self._unmasked: dict[str, Tensor] = {}  # validation faces by the ways that no mask changes
        self.resume()

    def parts(self) -> dict[str, Stateful]:
        return super().parts() | {"files": self._parts}

    def _steps(self) -> Iterator[dict[str, float]]:
        for x0, y in self._pairs(self.config.image_size):
            yield self._step(x0, y)

    def _step(self, x0: Tensor, y: Tensor) -> dict[str, float]:
        s, c = self.settings, self.config
        self._set_rate()
        with self._autocast():
            with torch.no_grad():
                true = self.recognition.embed_aligned(x0)
                target = self.whole.irn(y, self.recognition)
                estimate = self._estimates(self.whole.encode(y).float())
            found = IdentityGradient(
                self.whole.vqgan, self.recognition, target, scale=c.guidance_scale, repeats=c.guidance_repeats
            )
            gradient = found(estimate)
            # A gradient that is not finite is none, as in a walk.
            finite = torch.isfinite(gradient).flatten(1).all(1)[:, None, None, None]
            mask = self.network()
            moved = estimate - c.guidance_scale * mask * torch.where(finite, gradient, 0.0)
            picture = self.whole.vqgan.decode(moved / c.vqgan.latent_scale, quantize=False).float()
            cosine = F.cosine_similarity(self.recognition.embed_aligned(picture), true)
            terms = {"identity": s.loss.identity * (1 - cosine).mean()}
            if self.lpips is not None:
                terms["lpips"] = s.loss.lpips * self.lpips(picture, x0).mean()
        terms |= {"l1": s.loss.l1 * (picture - x0).abs().mean(), "sparsity": s.loss.sparsity * mask.mean()}
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip)
        shown = terms | {"mask": mask.mean(), "skipped": (~finite).sum(), "grad_norm": norm}
        values = torch.stack([value.detach().float() for value in shown.values()]).tolist()
        figures = dict(zip(shown, values, strict=True))
        if math.isfinite(figures["grad_norm"]):  # one bad batch must not end a run; the log shows it
            self.optimizer.step()
            self.ema.update(self.model, self.step)
        return figures

    def _estimates(self, cond: Tensor) -> Tensor:
        """What a walk under ``cond`` [N, D, h, w] takes for the clean latents, of each item at an evaluation of its own
        of those that are guided."""
        group, count = self.group, len(cond)
        rng = np.random.default_rng((self.settings.seed, 3, self.step))  # alike in every process
        drawn = rng.choice(np.array(self.guided), count * group.size)[group.rank :: group.size]
        chosen = torch.from_numpy(drawn).to(cond.device)
        found = torch.zeros_like(cond)

        def keep(e: int, x: Tensor, x0_hat: Tensor) -> None:
            found.copy_(torch.where((chosen == e)[:, None, None, None], x0_hat, found))

        seeds = item_seeds(self._first() + group.rank, count, group.size, self.settings.seed).to(cond.device)
        walk(self.whole, self.table, cond, seeds, callback=keep)
        return found

    def _draw(self, path: Path) -> None:
        """The sheet of restored faces, the mask's picture beside it, and a line of ``guidance.csv``."""
        s = self.settings
        self.whole.mask.load_state_dict(self.ema.model.state_dict())
        if self._validation is None:
            faces = faces_to_show(s.data, self.config.image_size, s.val_faces)
            if faces is None:
                return
            self._validation = GuidedValidation(faces, self.recognition, self.lpips)
            self._unmasked = self._validation.restore(self.whole, ("unguided", "unmasked"))
        restored = self._unmasked | self._validation.restore(self.whole, ("masked",))
        self._validation.draw(restored, path)
        draw_mask(self.whole.mask(), self._validation.faces[0], path.with_name(f"mask-{path.name}"))
        put_row(s.out / "guidance.csv", self.step, self._validation.measure(restored))

    def export(self) -> None:
        """Writes the whole model with the averaged mask as ``out / model.safetensors`` in fp16."""
        self.whole.mask.load_state_dict(self.ema.model.state_dict())
        notes = self._notes() | {"parts": self._made}
        native.save(self.settings.out / "model.safetensors", self.whole, self.config, notes, torch.float16)


def _assembled(settings: LatentMaskSettings) -> tuple[ClrFace, dict[str, Any]]:
    """The parts of a model as one, frozen, and how each was made. Raises ``IdmFastError`` for those that do not fit."""
    vqgan, prior, irn = (
        native.load_any(file, kind)
        for file, kind in ((settings.vqgan, VQGAN), (settings.prior, UNET), (settings.irn, IRN))
    )
    space = matched(prior.notes, settings.prior, vqgan.module, settings.vqgan)
    config = ClrFaceConfig(
        settings.preset, space, prior.config, irn.config, settings.guidance_scale, settings.guidance_interval,
        settings.guidance_every, settings.guidance_repeats,
    )  # fmt: skip
    whole = ClrFace(config)
    for part, loaded in (("vqgan", vqgan), ("prior", prior), ("irn", irn)):
        getattr(whole, part).load_state_dict(loaded.module.state_dict())
    made = {"vqgan": vqgan.notes, "prior": prior.notes, "irn": irn.notes}
    return whole.eval().requires_grad_(False), made
