"""Judges restorers and sets of pictures against a reference set of clean faces.

Everything is judged from both sides: fidelity to the clean face (PSNR, SSIM, LPIPS, recognition and landmark distance)
and realism (NIQE of a picture; of a set FD-VGG, the Fréchet distance of mean relu5_3 features of VGG16 to the clean
faces', and FID where its weights are there).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from idm_fast.evaluation.changes import changes, compared
from idm_fast.evaluation.environment import environment
from idm_fast.evaluation.metrics import FaceMetrics
from idm_fast.evaluation.parts import Part, Parts
from idm_fast.evaluation.pictures import PictureSet, load_at
from idm_fast.evaluation.table import CLEAN, FD, HEADINGS, LABELS, Report, Row, estimates
from idm_fast.training.degradation import DEGRADATION_VERSION, degrade_level

__all__ = ["CLEAN", "FD", "HEADINGS", "INTERVALS", "Degrade", "Report", "Restore", "Row", "Subject", "evaluate"]

Restore = Callable[[Tensor, Tensor], Tensor]
Degrade = Callable[[Tensor, str, int], Tensor]

INTERVALS = "bootstrap of the mean over faces; distances of sets: jackknife over 20 groups of faces"


@dataclass(frozen=True)
class Subject:
    """Something to judge: ``restore(y, seeds)`` maps degraded faces ``y`` [N, 3, S, S] in [-1, 1] to the same shape.

    ``seeds`` [N] int64, one a face, are there for what draws noise, so that batches do not change the result. The rest
    says how it works: ``steps`` of the ``sampler``, in so many network ``evaluations``.
    """

    name: str
    restore: Restore
    steps: int | None = None
    sampler: str | None = None
    evaluations: int | None = None


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
    names: Sequence[str] = (),
    sets: Sequence[PictureSet] = (),
    parts: Parts | None = None,
    against: Sequence[str] = (),
) -> Report:
    """Degrades every face at every level (seed + its number), restores it with every subject and measures.

    ``reference`` names the clean set in words, ``names`` each of its faces. The pictures of ``sets`` are measured as
    they are. ``progress`` is told the number of faces and pictures finished so far; ``parts`` keeps what is finished.
    ``against``: subjects from which the others' changes are told.
    Raises ``ValueError`` when there is no face, or a subject's output is mis-shaped or not finite.
    """
    keep = parts.get_or if parts else _measured
    judged: list[Part] = []
    done = size = 0
    for batch in _batches(faces, batch_size):
        clean, size = torch.stack(batch), batch[0].shape[-1]
        seeds = torch.arange(seed + done, seed + done + len(batch))
        make = partial(_judge, clean, seeds, subjects, metrics, levels, degrade, device)
        judged.append(keep(f"faces-{done:06}", make))
        progress(done := done + len(batch))
    if not done:
        raise ValueError("evaluate: faces must be at least one, got none")
    found = _joined(judged)
    own = _of(found, CLEAN)
    names = names or [f"face {i}" for i in range(done)]
    alone = {key: values for key, values in own.items() if key in metrics.ALONE}
    rows = [_row("-", Subject(CLEAN, _nothing), alone, {}, seed, names)] if alone else []
    for level in levels:
        for index, subject in enumerate(subjects):
            rows.append(_row(level, subject, _of(found, f"{level}/{index}"), own, seed, names, pairs=done))
    changed: dict[str, list[Row]] = {name: [] for name in against}
    for name, level in itertools.product(against, levels):
        for index, base in compared(subjects, name):
            apart = changes(_of(found, f"{level}/{index}"), _of(found, f"{level}/{base}"), own, seed)
            one = subjects[index]
            changed[name].append(Row(level, one.name, one.steps, apart, one.sampler, one.evaluations, done, done))
    finished = done
    for number, pictures in enumerate(sets):
        judged = []
        for first, last, paired in pictures.batches(batch_size):
            make = partial(_judge_pictures, pictures, first, last, paired, metrics, device)
            judged.append(keep(f"set-{number}-{first:06}", make))
            progress(finished := finished + last - first)
        values, paths = _joined(judged), [str(path) for path in pictures.paths]
        subject = Subject(pictures.name, _nothing)
        rows.append(_row("-", subject, values, own, seed, paths, pairs=len(pictures.twins)))
    conditions: dict[str, Any] = {
        "reference": reference,
        "faces": done,
        "crop_px": size,
        "seed": seed,
        "degradation_version": DEGRADATION_VERSION,
        "intervals": INTERVALS,
        "metrics": {key: LABELS[key] for key in LABELS if key in metrics.names},
        "notes": [*metrics.notes(size), *_sizes(rows, done)],
        **environment(device),
    }
    return Report(conditions, rows, changed)


def _batches(faces: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    batch: list[Tensor] = []
    for face in faces:
        batch.append(face)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _measured(name: str, make: Callable[[], Part]) -> Part:
    """In place of ``Parts.get_or`` where nothing is kept."""
    return {key: tensor.cpu() for key, tensor in make().items()}


def _nothing(y: Tensor, seeds: Tensor) -> Tensor:
    return y


def _judge(
    clean: Tensor,
    seeds: Tensor,
    subjects: Sequence[Subject],
    metrics: FaceMetrics,
    levels: Sequence[str],
    degrade: Degrade,
    device: str | torch.device,
) -> Part:
    """All that is measured of a batch of clean faces [N, 3, S, S], as "level/number of the subject/metric"."""
    prepared = metrics.reference(clean.to(device)) if levels else None
    own = prepared.found if prepared else metrics(clean.to(device))
    part = {f"{CLEAN}/{key}": values for key, values in own.items()}
    for level in levels:
        assert prepared is not None
        y = torch.stack([degrade(face, level, int(s)) for face, s in zip(clean, seeds, strict=True)]).to(device)
        for index, subject in enumerate(subjects):
            restored = subject.restore(y, seeds).to(device)
            if restored.shape != y.shape or not bool(torch.isfinite(restored).all()):
                expected, got = tuple(y.shape), tuple(restored.shape)
                raise ValueError(f"evaluate: {subject.name}: output must be finite = {expected}, got {got}")
            values = metrics(restored.float().clamp(-1, 1), prepared)
            part |= {f"{level}/{index}/{key}": numbers for key, numbers in values.items()}
    return part


def _judge_pictures(
    pictures: PictureSet, first: int, last: int, paired: bool, metrics: FaceMetrics, device: str | torch.device
) -> Part:
    images = torch.stack([load_at(path, pictures.size) for path in pictures.paths[first:last]]).to(device)
    if not paired:
        return metrics(images)
    clean = torch.stack([load_at(path, pictures.size) for path in pictures.twins[first:last]]).to(device)
    return metrics(images, metrics.reference(clean))


def _joined(parts: Sequence[Part]) -> Part:
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: torch.cat([part[key] for part in parts if key in part]) for key in keys}


def _of(part: Part, prefix: str) -> Part:
    return {key[len(prefix) + 1 :]: values for key, values in part.items() if key.startswith(f"{prefix}/")}


def _sizes(rows: Sequence[Row], faces: int) -> list[str]:
    """A Fréchet distance of few pictures is larger than one of many from the same source."""
    differ = any(row.pictures != faces for row in rows if set(row.estimates) & set(FaceMetrics.DISTRIBUTION))
    return ["Distances of sets with different numbers of pictures cannot be compared"] if differ else []


def _row(
    level: str, subject: Subject, values: Part, clean: Part, seed: int, names: Sequence[str], pairs: int = 0
) -> Row:
    count = len(next(iter(clean.values()), ()))
    found, missing = estimates(values, clean, seed, names, twins=pairs == len(names) == count)
    return Row(
        level, subject.name, subject.steps, found, subject.sampler, subject.evaluations, len(names), pairs, missing
    )
