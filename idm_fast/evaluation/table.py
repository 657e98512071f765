"""The table of an evaluation: estimates with their intervals, as JSON and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from idm_fast.evaluation.metrics import Estimate, FaceMetrics, bootstrap_mean, frechet_distance, jackknife

FD = "fd_vgg"
CLEAN = "clean faces"  # name of the row of the reference set itself
LABELS = {
    "psnr": "PSNR dB ↑",
    "ssim": "SSIM ↑",
    "lpips_alex": "LPIPS Alex ↓",
    "lpips_vgg": "LPIPS VGG ↓",
    "recognition": "recognition distance ↓",
    "landmarks": "landmark distance % ↓",
    FD: "FD-VGG ↓",
    "fid": "FID ↓",
    "niqe": "NIQE ↓",
}
HEADINGS = {key: LABELS[key] for key in FaceMetrics.DEFAULT}  # of what is measured where nothing else is asked for
_DIGITS = {"psnr": 2, FD: 1, "fid": 1, "landmarks": 2, "niqe": 2}
_PERCENT = {FD: "FD-VGG % ↓", "fid": "FID % ↓"}  # of changes
_NOTHING = Estimate(math.nan, math.nan, math.nan)
_MOST_NAMED = 10  # pictures without a value that the Markdown names; the JSON names all


@dataclass(frozen=True)
class Row:
    """One subject at one level ("-": pictures as they are), with an estimate for every metric that applies to it.

    ``pictures``: how many were judged; ``pairs``: how many of those had a clean twin. ``missing``: by metric, the names
    of pictures that have no value of it and do not count in its mean.
    """

    level: str
    name: str
    steps: int | None
    estimates: dict[str, Estimate]
    sampler: str | None = None
    evaluations: int | None = None
    pictures: int = 0
    pairs: int = 0
    missing: dict[str, list[str]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "name": self.name,
            "steps": self.steps,
            "sampler": self.sampler,
            "evaluations": self.evaluations,
            "pictures": self.pictures,
            "pairs": self.pairs,
            "metrics": {
                key: {"mean": _finite(e.mean), "low": _finite(e.low), "high": _finite(e.high)}
                for key, e in self.estimates.items()
            },
            "missing": self.missing,
        }


@dataclass(frozen=True)
class Report:
    """Rows (the clean faces, subjects level by level, sets) and the conditions under which they hold.

    ``changes``: of the other subjects from the named ones, face by face (see changes.py).
    """

    conditions: dict[str, Any]
    rows: list[Row]
    changes: dict[str, list[Row]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """A document of plain values; what is infinite or not a number becomes null."""
        document = {"conditions": self.conditions, "rows": [row.as_json() for row in self.rows]}
        if not self.changes:
            return document
        return document | {"changes": {name: [row.as_json() for row in rows] for name, rows in self.changes.items()}}

    def as_markdown(self) -> str:
        """The conditions in a sentence, a table of ``mean [low, high]``, what had no value, and the changes."""
        c = self.conditions
        lines = [
            f"Reference set: {c['reference']}, N = {c['faces']}, {c['crop_px']} px crops. "
            f"Degradation version {c['degradation_version']}, seed {c['seed']}. 95 % intervals: {c['intervals']}."
            + "".join(f" {note}." for note in c.get("notes", [])),
            "",
            *self._table(self.rows, LABELS),
        ]
        without = [_without(row) for row in self.rows if row.missing]
        lines += ["", *without] if without else []
        for name, rows in self.changes.items():
            said = "95 % intervals of the mean difference; of distances of sets: of the change in percent"
            lines += ["", f"Change from {name} on the same faces ({said}):", ""]
            lines += self._table(rows, LABELS | _PERCENT, "+")
        return "\n".join(lines) + "\n"

    def _table(self, rows: Sequence[Row], labels: Mapping[str, str], sign: str = "") -> list[str]:
        faces = self.conditions["faces"]
        keys = [key for key in labels if any(key in row.estimates for row in rows)]
        samplers = any(row.sampler for row in rows)
        sets = any(row.pictures != faces or row.pairs not in (0, row.pictures) for row in rows)
        columns = {"level": "---", "what": "---", **({"sampler": "---"} if samplers else {}), "steps": "--:"}
        columns |= {"pictures (with a clean twin)": "--:"} if sets else {}
        lines = [
            f"| {' | '.join([*columns, *(labels[key] for key in keys)])} |",
            f"|{'|'.join([*columns.values(), *(['--:'] * len(keys))])}|",
        ]
        for row in rows:
            cells = [row.level, row.name, *([row.sampler or "-"] if samplers else [])]
            cells += ["-" if row.steps is None else str(row.steps)]
            cells += [f"{row.pictures} ({row.pairs})"] if sets else []
            cells += [_cell(row, key, sign) for key in keys]
            lines.append(f"| {' | '.join(cells)} |")
        return lines


def estimates(
    values: Mapping[str, Tensor], clean: Mapping[str, Tensor], seed: int, names: Sequence[str], twins: bool
) -> tuple[dict[str, Estimate], dict[str, list[str]]]:
    """Estimates of what was measured, and the names of the pictures without a value, by metric.

    ``values``: by metric, values [N] or, of a set, features [N, D]; ``clean``: the features [M, D] of the clean faces;
    ``names``: of the pictures; ``twins``: whether picture i belongs to clean face i, so that both are left out at
    once. A metric of which no picture has a value becomes NaN.
    """
    found: dict[str, Estimate] = {}
    missing: dict[str, list[str]] = {}
    for key in (key for key in LABELS if key in values):
        numbers = values[key].double()
        if key in FaceMetrics.DISTRIBUTION:
            found[key] = _distance(numbers, clean[key].double(), seed, twins) if key in clean else _NOTHING
            continue
        absent = torch.isnan(numbers)
        if bool(absent.any()):
            missing[key] = [names[i] for i in absent.nonzero().flatten().tolist()]
        found[key] = _NOTHING if bool(absent.all()) else bootstrap_mean(numbers[~absent], seed)
    return found, missing


def _distance(features: Tensor, clean: Tensor, seed: int, twins: bool) -> Estimate:
    if min(len(features), len(clean)) < 2:  # a distribution cannot be fitted to one face
        return _NOTHING
    if twins:
        return jackknife(lambda pick: frechet_distance(features[pick], clean[pick]), len(features), seed)
    return jackknife(lambda pick: frechet_distance(features[pick], clean), len(features), seed)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _cell(row: Row, key: str, sign: str = "") -> str:
    e = row.estimates.get(key)
    if e is None or math.isnan(e.mean):
        return "-"
    shown = f"{sign}.{_DIGITS.get(key, 3)}f"
    mark = f" ({len(row.missing[key])} without)" if key in row.missing else ""
    return f"{e.mean:{shown}} [{e.low:{shown}}, {e.high:{shown}}]{mark}"


def _without(row: Row) -> str:
    """What a reader must know of a mean that leaves pictures out."""
    said = []
    for key, names in row.missing.items():
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        what = "no face was found" if key == "landmarks" else "there was no value"
        said.append(f"{LABELS[key][:-2]}: {what} in {', '.join(names[:_MOST_NAMED])}{more}")
    which = f"{row.name}, {row.steps} steps" if row.steps else row.name
    return f"- {'' if row.level == '-' else f'{row.level}, '}{which}: {'; '.join(said)}."
