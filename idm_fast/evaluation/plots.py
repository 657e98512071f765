"""Pictures of an evaluation: quality against steps for every solver, and all subjects side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from idm_fast.bench.plot import COLOURS, GRID, INK, SIZE, Axis, Chart, axis_of
from idm_fast.evaluation.metrics import Estimate
from idm_fast.evaluation.table import CLEAN, LABELS, Report, Row
from idm_fast.files import atomic

_COLUMNS = 2  # of charts on a sheet
_MARGIN, _BAR, _LABELS, _VALUES = 16, 22, 330, 150  # px: sheets of bars
_WIDTH = 960
_DASH = 8
_GREYS = ("#aaaaaa", "#555555", "#c8a878")


def draw(report: Report, folder: Path) -> list[Path]:
    """Writes ``curves-LEVEL.png`` (where something has several numbers of steps) and ``bars-LEVEL.png``; their paths.

    Whiskers are the 95 % intervals. What has no finite value is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    clean = [row for row in report.rows if row.name == CLEAN]  # where the others would like to be: on every sheet
    others = [row for row in report.rows if row.name != CLEAN]
    for level in dict.fromkeys(row.level for row in others):
        rows = [row for row in others if row.level == level] + clean
        keys = [key for key in LABELS if any(_value(row, key) for row in rows)]
        if not keys:
            continue
        name = "pictures" if level == "-" else level
        title = f"{name}, {report.conditions['faces']} faces of {report.conditions['crop_px']} px"
        sheets = {f"bars-{name}.png": _bars_sheet(rows, keys, title)}
        lines = _lines(rows)
        if charts := [chart for key in keys if (chart := _curves(lines, rows, key, title))]:
            sheets[f"curves-{name}.png"] = _together(charts)
        for file, sheet in sheets.items():
            with atomic(folder / file) as path:
                sheet.save(path, format="PNG", optimize=True)
            written.append(folder / file)
    return written


def _value(row: Row, key: str) -> Estimate | None:
    estimate = row.estimates.get(key)
    return estimate if estimate and math.isfinite(estimate.mean) else None


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of one restorer and solver by their number of network evaluations, where there are several."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.steps is not None:
            found.setdefault(f"{row.name}, {row.sampler}" if row.sampler else row.name, []).append(row)
    lines = {name: sorted(line, key=_evaluations) for name, line in found.items()}
    return lines if any(len(line) > 1 for line in lines.values()) else {}


def _evaluations(row: Row) -> int:
    return row.evaluations or row.steps or 1


@dataclass(frozen=True)
class _Level:
    """A horizontal line: something that takes no steps."""

    name: str
    value: float


def _curves(lines: dict[str, list[Row]], rows: Sequence[Row], key: str, title: str) -> Image.Image | None:
    """One metric against network evaluations; horizontal lines are what takes no steps."""
    series = {name: [(_evaluations(row), e) for row in line if (e := _value(row, key))] for name, line in lines.items()}
    shown = [estimate for line in series.values() for _, estimate in line]
    if not shown:
        return None
    still = [_Level(row.name, e.mean) for row in rows if row.steps is None and (e := _value(row, key))]
    low, high = _range(shown, still)
    at = sorted({x for line in series.values() for x, _ in line})
    chart = Chart(_words(key), axis_of(at, log=True), Axis(low, high), "network evaluations", title, x_ticks=at)
    for index, (name, line) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        aside = 1.025 ** (index - (len(series) - 1) / 2)  # so that the whiskers of two solvers do not hide each other
        for x, e in line:
            if math.isfinite(e.low) and math.isfinite(e.high):
                chart.draw.line([chart.at(x * aside, e.low), chart.at(x * aside, e.high)], fill=colour, width=1)
        chart.line([(x * aside, e.mean) for x, e in line], colour)
        chart.legend(name, colour)
    for level, grey in zip(still, cycle(_GREYS), strict=False):
        inside = low <= level.value <= high
        if inside:
            _dashed(chart, level.value, grey)
        chart.legend(level.name if inside else f"{level.name}: {level.value:.3g}", grey if inside else "white")
    return chart.image


def _range(shown: Sequence[Estimate], still: Sequence[_Level]) -> tuple[float, float]:
    """What the curves and their intervals need, widened for horizontal lines that are near."""
    edges = [edge for e in shown for edge in (e.mean, e.low, e.high) if math.isfinite(edge)]
    low, high = min(edges), max(edges)
    span = (high - low) or abs(high) or 1.0
    near = [level.value for level in still if low - span <= level.value <= high + span]
    low, high = min([low, *near]), max([high, *near])
    return low - 0.08 * span, high + 0.08 * span


def _dashed(chart: Chart, value: float, colour: str) -> None:
    (begin, y), (end, _) = chart.at(chart.x.low, value), chart.at(chart.x.high, value)
    for x in range(int(begin), int(end), 2 * _DASH):
        chart.draw.line([(x, y), (x + _DASH, y)], fill=colour, width=2)


def _together(charts: Sequence[Image.Image]) -> Image.Image:
    height = math.ceil(len(charts) / _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * SIZE[0], height * SIZE[1]), "white")
    for index, chart in enumerate(charts):
        sheet.paste(chart, (index % _COLUMNS * SIZE[0], index // _COLUMNS * SIZE[1]))
    return sheet


def _bars_sheet(rows: Sequence[Row], keys: Sequence[str], title: str) -> Image.Image:
    """A block of horizontal bars a metric, from 0, one bar a row."""
    blocks = [(key, [(row, e) for row in rows if (e := _value(row, key))]) for key in keys]
    height = 60 + sum(40 + _BAR * len(block) for _, block in blocks)
    sheet = Image.new("RGB", (_WIDTH, height), "white")
    pen = ImageDraw.Draw(sheet)
    font, large = ImageFont.load_default(14), ImageFont.load_default(17)
    pen.text((_MARGIN, 14), title, fill=INK, font=large)
    top = 50
    names = list(dict.fromkeys(row.name for row in rows))
    for key, block in blocks:
        pen.text((_MARGIN, top), _words(key), fill=INK, font=large)
        top += 26
        most = max(max(e.mean, e.high if math.isfinite(e.high) else e.mean) for _, e in block) or 1.0
        scale = (_WIDTH - _LABELS - _VALUES) / most
        for row, e in block:
            middle = top + _BAR / 2
            pen.text((_LABELS - 8, middle), _label(row), fill=INK, font=font, anchor="rm")
            colour = COLOURS[names.index(row.name) % len(COLOURS)]
            pen.rectangle((_LABELS, top + 3, _LABELS + max(1.0, e.mean * scale), top + _BAR - 3), fill=colour)
            if math.isfinite(e.low) and math.isfinite(e.high):
                ends = (_LABELS + max(0.0, e.low) * scale, middle), (_LABELS + e.high * scale, middle)
                pen.line(ends, fill=INK, width=2)
            pen.text((_WIDTH - _VALUES + 12, middle), f"{e.mean:.4g}", fill=INK, font=font, anchor="lm")
            top += _BAR
        pen.line([(_LABELS, top - _BAR * len(block)), (_LABELS, top)], fill=GRID)
        top += 14
    return sheet


def _words(key: str) -> str:
    """The heading in letters that the font has."""
    return LABELS[key].replace("↓", "(lower is better)").replace("↑", "(higher is better)")


def _label(row: Row) -> str:
    how = [row.sampler or "", f"{row.steps} step{'s' if row.steps != 1 else ''}" if row.steps else ""]
    return ", ".join([row.name[-30:], *(part for part in how if part)])
