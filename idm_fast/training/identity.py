"""Trains an identity recovery network (CLR-Face, 2402.06106) against the frozen recognition network.

    loss = 1 - cos(recovered(y), e(x0)) + euclid |recovered(y) - e(x0)|^2

with y = degrade(x0) and e the recognition network. Everything random follows from the seed and the item's position in
the run, so a run that is stopped and resumed is the same run.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idm_fast.checkpoints import native
from idm_fast.files import atomic
from idm_fast.models.irn import IRN_PRESETS, Irn, IrnConfig
from idm_fast.models.recognition import Recognition
from idm_fast.training.data import list_faces
from idm_fast.training.face_loop import FaceLoop
from idm_fast.training.identity_settings import IdentitySettings
from idm_fast.training.recovery import Likeness, RecoveryTest, draw, measure
from idm_fast.training.sheet import faces_to_show

_MEASURED = 256  # validation faces at most


class _Recovery(nn.Module):
    """What a training step asks, in one call, so that it can be spread over processes."""

    def __init__(self, irn: Irn, recognition: Recognition) -> None:
        super().__init__()
        self.irn, self.recognition = irn, recognition

    def forward(self, y: Tensor) -> Tensor:
        recovered: Tensor = self.irn(y, self.recognition)
        return recovered


class IdentityTrainer(FaceLoop[IrnConfig, Irn]):
    """One run: ``IdentityTrainer(settings).run()``. Resumes from ``settings.out / 'state.pt'`` when it is there.

    Raises ``IdmFastError`` before any work for data, settings or a state that do not fit, and where the recognition
    network's weights are not installed.
    """

    settings: IdentitySettings

    def __init__(self, settings: IdentitySettings) -> None:
        self.settings = settings
        config = IRN_PRESETS[settings.preset]
        self.faces = list_faces(settings.data, "train", settings.min_native_px)
        recognition = Recognition()
        super().__init__(settings, config, lambda: Irn(config))
        self.recognition = recognition.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._test: RecoveryTest | None = None
        self._measured: tuple[int, dict[str, Tensor]] = (-1, {})  # of which step
        self.resume(_Recovery(self.model, self.recognition))

    def _steps(self) -> Iterator[dict[str, float]]:
        for x0, y in self._pairs(self.config.image_size):
            yield self._step(x0, y)

    def _step(self, x0: Tensor, y: Tensor) -> dict[str, float]:
        s = self.settings
        self._set_rate()
        with self._autocast():
            with torch.no_grad():
                true, own = self.recognition.embed_aligned(torch.cat([x0, y])).chunk(2)
            recovered = self.network(y)
        cosine = F.cosine_similarity(recovered, true)
        loss = (1 - cosine + s.euclid * (recovered - true).square().sum(1)).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip)
        terms = {"loss": loss, "cosine": cosine.mean(), "own": F.cosine_similarity(own, true).mean(), "grad_norm": norm}
        shown = torch.stack([value.detach().float() for value in terms.values()]).tolist()
        figures = dict(zip(terms, shown, strict=True))
        if math.isfinite(figures["grad_norm"]):  # one bad batch must not end a run; the log shows it
            self.optimizer.step()
            self.ema.update(self.model, self.step)
        return figures

    def _found(self) -> tuple[RecoveryTest, dict[str, Tensor]] | None:
        """The validation faces and what the averaged weights recover of them now; None without a picture."""
        if self._test is None:
            faces = faces_to_show(self.settings.data, self.config.image_size, _MEASURED)
            self._test = None if faces is None else RecoveryTest(faces, self.recognition)
        if self._test is None:
            return None
        if self._measured[0] != self.step:
            self._measured = self.step, self._test.recovered(self.ema.model)
        return self._test, self._measured[1]

    def _draw(self, path: Path) -> None:
        if found := self._found():
            draw(*found, path)
            self._note(measure(*found))

    def _note(self, levels: dict[str, dict[str, Likeness]]) -> None:
        """Lines of ``recovery.csv``; those of later steps, which were made before the run was set back, go."""
        path = self.settings.out / "recovery.csv"
        rows: list[dict[str, object]] = []
        if path.is_file():
            with path.open(newline="") as file:
                rows = [dict(row) for row in csv.DictReader(file) if int(row["step"]) < self.step]
        for level, found in levels.items():
            for who, values in found.items():
                rounded = {key: round(value, 4) for key, value in values.to_dict().items()}
                rows.append({"step": self.step, "level": level, "embedding": who} | rounded)
        with atomic(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[-1]))
            writer.writeheader()
            writer.writerows(rows)

    def export(self) -> None:
        """Writes the averaged weights as ``out / model.safetensors`` in fp16, with what they recover."""
        found, notes = self._found(), self._notes()
        if found:
            notes["recovery"] = {
                level: {who: {k: round(v, 4) for k, v in values.to_dict().items()} for who, values in row.items()}
                for level, row in measure(*found).items()
            }
        native.save(self.settings.out / "model.safetensors", self.ema.model, self.config, notes, torch.float16)
