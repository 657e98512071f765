"""How much of an identity is recovered: the embedding found for a degraded face against that of the clean one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from idm_fast.bench.plot import COLOURS, GRID, Axis, Chart
from idm_fast.files import atomic
from idm_fast.models.irn import Irn
from idm_fast.models.recognition import Recognition
from idm_fast.training.degradation import LEVELS, degrade_level

_BATCH = 16


@dataclass(frozen=True)
class Likeness:
    """Of N embeddings to the true ones: mean cosine and Euclidean ``distance``, and ``found``: the share whose nearest
    of all true embeddings (by cosine) is their own. A constant may have a high cosine, but finds nobody.
    """

    cosine: float
    distance: float
    found: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def likeness(embeddings: Tensor, true: Tensor) -> Likeness:
    """Both [N, 128]."""
    nearest = (F.normalize(embeddings) @ F.normalize(true).T).argmax(1)
    return Likeness(
        float(F.cosine_similarity(embeddings, true).mean()),
        float(torch.linalg.vector_norm(embeddings - true, dim=1).mean()),
        float((nearest == torch.arange(len(true), device=true.device)).double().mean()),
    )


class RecoveryTest:
    """``faces`` [N, 3, S, S] in [-1, 1], degraded at every level once, and what the recognition network says of them.

    ``own``: embeddings [N, 128] of the degraded faces by level; ``true``: of the clean ones; float32, on the CPU.
    """

    def __init__(self, faces: Tensor, recognition: Recognition) -> None:
        self.recognition = recognition
        self.degraded = {
            level: torch.stack([degrade_level(face, level, seed) for seed, face in enumerate(faces)])
            for level in LEVELS
        }
        self.true = self._embedded(faces)
        self.own = {level: self._embedded(y) for level, y in self.degraded.items()}

    @torch.no_grad()
    def _embedded(self, x: Tensor, irn: Irn | None = None) -> Tensor:
        device = next(self.recognition.parameters()).device
        parts = [part.to(device) for part in torch.split(x, _BATCH)]
        embed = self.recognition.embed_aligned
        return torch.cat([embed(y) if irn is None else irn(y, self.recognition) for y in parts]).cpu()

    def recovered(self, irn: Irn) -> dict[str, Tensor]:
        """Embeddings [N, 128] that ``irn`` recovers, by level."""
        return {level: self._embedded(y, irn) for level, y in self.degraded.items()}


def measure(test: RecoveryTest, recovered: dict[str, Tensor]) -> dict[str, dict[str, Likeness]]:
    """{level: {who: likeness}} of the ``recovered`` embeddings, of the degraded face's ``own``, and of the ``mean`` of
    all true ones, which knows nothing of the face."""
    mean = test.true.mean(0, keepdim=True).expand_as(test.true)
    return {
        level: {
            "recovered": likeness(recovered[level], test.true),
            "own": likeness(test.own[level], test.true),
            "mean": likeness(mean, test.true),
        }
        for level in test.own
    }


def draw(test: RecoveryTest, recovered: dict[str, Tensor], path: Path) -> None:
    """Writes a plot (PNG): a dot a face, how near its own and its recovered embedding are to the true one."""
    pairs = {
        level: [F.cosine_similarity(found[level], test.true).tolist() for found in (test.own, recovered)]
        for level in test.own
    }
    low = max(-1.0, min(value for pair in pairs.values() for values in pair for value in values) - 0.02)
    axis = Axis(low, 1.0)
    chart = Chart(
        f"cosine to the true embedding, {len(test.true)} faces; above the line: recovered", axis, axis,
        "of the degraded face's own embedding", "of the recovered one",
    )  # fmt: skip
    chart.line([(low, low), (1.0, 1.0)], GRID, dots=False)
    for (level, (own, found)), colour in zip(pairs.items(), COLOURS, strict=False):
        for point in zip(own, found, strict=True):
            chart.dot(chart.at(*point), colour, 3)
        chart.legend(level, colour)
    with atomic(path) as temporary:
        chart.save(temporary)
