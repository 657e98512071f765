"""A sheet of what a cleaning did: counts, histograms of the measures, and the largest changes, before and after."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from idm_fast.bench.plot import COLOURS, INK, SIZE, Axis, Chart
from idm_fast.clean.folder import MANIFEST
from idm_fast.clean.manifest import Record, scan
from idm_fast.clean.options import CleanSummary
from idm_fast.errors import IdmFastError
from idm_fast.files import atomic
from idm_fast.images import read_image

# name in a face's record, label, and the name of the same measure of the original (None: it is a difference)
_MEASURES = (
    ("restored_recognition_distance", "recognition distance, restored to original", None),
    ("restored_low_frequency", "low-frequency difference, restored to original", None),
    ("sharpness", "sharpness", "sharpness_before"),
    ("noise", "noise", "noise_before"),
)
_SHOWN, _TILE, _ACROSS = 24, 192, 4  # faces on the sheet, side of a picture of one, faces in a row
_CAPTION, _MARGIN = 40, 12
_GAIN = 4  # the difference is shown this much larger
_FINEST = 1e-5  # histograms are counted in bins of a tenth of a decade first, from here up


@dataclass
class Tally:
    """What a sheet needs of any number of records, in bounded memory: histograms in logarithmic bins, and the faces
    that changed most."""

    counts: dict[str, dict[int, int]] = field(default_factory=dict)
    largest: list[tuple[float, int, Record, dict[str, Any]]] = field(default_factory=list)
    faces: int = 0

    def add(self, record: Record) -> None:
        for face in record.get("faces", ()):
            self.faces += 1
            for name in {name for after, _, before in _MEASURES for name in (after, before) if name}:
                if (value := face.get(name)) is not None:
                    bins = self.counts.setdefault(name, {})
                    bins[_bin(value)] = bins.get(_bin(value), 0) + 1
            entry = (_change(face), self.faces, record, face)  # the number makes each entry unlike any other
            (heapq.heappush if len(self.largest) < _SHOWN else heapq.heappushpop)(self.largest, entry)


def draw(source: Path, out: Path, summary: CleanSummary, path: Path) -> None:
    """Writes the sheet of the output folder ``out`` to ``path`` (PNG), from its manifest and both folders' pictures.

    Raises ``IdmFastError`` where it cannot be written.
    """
    tally = Tally()
    for record in scan(out / MANIFEST):
        tally.add(record)
    charts = [_histogram(tally, *measure) for measure in _MEASURES]
    cells = [_cell(source, out, record, face) for _, _, record, face in sorted(tally.largest, reverse=True)]
    sheet = _arranged(_title(summary, tally), [chart for chart in charts if chart is not None], cells)
    with atomic(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def _bin(value: float) -> int:
    return math.floor(10 * math.log10(max(value, _FINEST)))


def _change(face: dict[str, Any]) -> float:
    """How near a restored face is to where it would look like another: its recognition distance, or what there is."""
    distance = face.get("restored_recognition_distance")
    return float(face["restored_low_frequency"] if distance is None else distance)


def _title(summary: CleanSummary, tally: Tally) -> list[str]:
    counts = ", ".join(
        f"{getattr(summary, name)} {name}"
        for name in ("kept", "blended", "rejected", "copied", "duplicate", "failed")
        if getattr(summary, name)
    )
    return [f"{summary.total} pictures, {tally.faces} faces: {counts}", f"output {Path(summary.out).name}"]


def _histogram(tally: Tally, after: str, label: str, before: str | None) -> Image.Image | None:
    """Share of faces in each tenth of a decade of a measure, of the original too where it has one."""
    shown = [
        (name, text) for name, text in ((before, "original"), (after, "written" if before else "restored")) if name
    ]
    found = [(tally.counts[name], text) for name, text in shown if name in tally.counts]
    if not found:
        return None
    bins = [place for counts, _ in found for place in counts]
    low, high = min(bins), max(bins) + 1
    most = max(max(counts.values()) / sum(counts.values()) for counts, _ in found)
    ends = [10 ** (place / 10) for place in (low, high)]
    chart = Chart(
        label, Axis(ends[0], ends[1], log=True), Axis(0.0, most * 1.08), "value (logarithmic)", "share of faces"
    )
    for (counts, text), colour in zip(found, COLOURS[2 - len(found) :], strict=False):
        total, steps = sum(counts.values()), []
        for place in range(low, high):
            share = counts.get(place, 0) / total
            steps += [(10 ** (place / 10), share), (10 ** ((place + 1) / 10), share)]
        chart.draw.line([chart.at(*point) for point in steps], fill=colour, width=3)
        chart.legend(f"{text}, median {_median(counts):.3g}", colour)
    return chart.image


def _median(counts: dict[int, int]) -> float:
    """The middle of the bin that holds the median."""
    total = sum(counts.values())
    places = sorted(counts)
    sums = itertools.accumulate(counts[place] for place in places)
    middle = next(place for place, upto in zip(places, sums, strict=True) if 2 * upto >= total)
    return float(10 ** ((middle + 0.5) / 10))


def _cell(source: Path, out: Path, record: Record, face: dict[str, Any]) -> Image.Image:
    """One face: original, what was written, and their difference, over what the record says."""
    cell = Image.new("RGB", (3 * _TILE, _TILE + _CAPTION), "white")
    try:
        before, after = (_part(path, face["box"]) for path in (source / record["file"], out / record["output"]))
    except IdmFastError as error:  # moved since
        ImageDraw.Draw(cell).text((0, 0), str(error)[:90], fill=INK)
        return cell
    difference = 127.5 + _GAIN * (after.astype(np.float32) - before)
    for place, pixels in enumerate((before, after, np.clip(difference, 0, 255).astype(np.uint8))):
        cell.paste(Image.fromarray(pixels), (place * _TILE, 0))
    font = ImageFont.load_default(12)
    distance = face.get("restored_recognition_distance")
    lines = [
        f"{record['file'][-40:]}: {record['result']}, blend {face['blend']:g}",
        f"distance {'-' if distance is None else f'{distance:.3f}'}, low {face['restored_low_frequency']:.4f}, "
        f"sharpness {face['sharpness_before']:.3f} > {face['sharpness']:.3f}, "
        f"noise {face['noise_before']:.4f} > {face['noise']:.4f}",
    ]
    for number, line in enumerate(lines):
        ImageDraw.Draw(cell).text((2, _TILE + 3 + 17 * number), line, fill=INK, font=font)
    return cell


def _part(path: Path, box: Sequence[float]) -> Any:
    """The face's box with a margin, uint8 [_TILE, _TILE, 3]."""
    picture = read_image(path)
    x0, y0, x1, y1 = box
    half = max(x1 - x0, y1 - y0) / 2
    whole = half * 2 >= min(picture.width, picture.height)
    half = half if whole else 1.4 * half
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    pixels = (np.clip(picture.pixels, 0, 1) * 255 + 0.5).astype(np.uint8)
    part = Image.fromarray(pixels).crop((round(x - half), round(y - half), round(x + half), round(y + half)))
    return np.asarray(part.resize((_TILE, _TILE), Image.Resampling.LANCZOS))


def _arranged(title: list[str], charts: list[Image.Image], cells: list[Image.Image]) -> Image.Image:
    cell = (3 * _TILE + _MARGIN, _TILE + _CAPTION + _MARGIN)
    across = min(_ACROSS, max(1, len(cells)))
    width = max(across * cell[0], 2 * SIZE[0]) + _MARGIN
    heading = 40 + 26 * len(title)
    chart_rows, cell_rows = -(-len(charts) // 2), -(-len(cells) // across)
    below = heading + chart_rows * SIZE[1]
    sheet = Image.new("RGB", (width, below + (40 if cells else 0) + cell_rows * cell[1] + _MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(20)
    for number, line in enumerate(title):
        pen.text((_MARGIN, _MARGIN + 26 * number), line, fill=INK, font=font)
    for number, chart in enumerate(charts):
        sheet.paste(chart, ((number % 2) * SIZE[0], heading + (number // 2) * SIZE[1]))
    if cells:
        text = f"largest changes: original, written, difference x {_GAIN} on grey"
        pen.text((_MARGIN, below + 8), text, fill=INK, font=font)
    for number, image in enumerate(cells):
        place = (_MARGIN + (number % across) * cell[0], below + 40 + (number // across) * cell[1])
        sheet.paste(image, place)
    return sheet
