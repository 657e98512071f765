"""Pictures of figures, drawn with Pillow: lines over an axis, bars in groups, a roofline. No plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE = (960, 540)
LEFT, TOP, RIGHT, BOTTOM = 90, 50, 230, 60  # margins; the legend is on the right
COLOURS = ("#1b6ac9", "#d1495b", "#2e933c", "#e08e00", "#7a4fb5", "#17919b", "#8c564b", "#666666")
INK, GRID = "#222222", "#dddddd"
Point = tuple[float, float]
Series = dict[str, list[Point]]


@dataclass(frozen=True)
class Axis:
    """From ``low`` to ``high``, both shown; logarithmic axes need low > 0."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """0 at ``low``, 1 at ``high``."""
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            few = self.high / self.low < 1000
            found = [m * 10.0**e for e in range(first, last + 1) for m in ((1, 2, 5) if few else (1,))]
        else:
            step = 10.0 ** math.floor(math.log10((self.high - self.low) / 2))
            step = next(s for s in (step, 2 * step, 5 * step, 10 * step) if (self.high - self.low) / s <= 6)
            found = [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [tick for tick in found if self.low * 0.999 <= tick <= self.high * 1.001]


def axis_of(values: Sequence[float], *, log: bool = False) -> Axis:
    """An axis around the values; a linear one begins at 0."""
    low, high = min(values), max(values)
    if log:
        return Axis(low / 1.3, high * 1.3, True)
    return Axis(0.0, (high or 1.0) * 1.08)


class Chart:
    """A white picture with axes; ``save`` writes it."""

    def __init__(
        self, title: str, x: Axis, y: Axis, x_label: str, y_label: str, *, x_ticks: Sequence[float] | None = None
    ) -> None:
        self.x, self.y = x, y
        self.image = Image.new("RGB", SIZE, "white")
        self.draw = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(14)
        self.legend_at = TOP
        self.text((LEFT, 14), title, size=17)
        self.text((LEFT, SIZE[1] - 28), x_label)
        self.text((LEFT, TOP - 18), y_label)
        for tick in y.ticks():
            level = self.at(x.low, tick)[1]
            self.draw.line([(LEFT, level), (SIZE[0] - RIGHT, level)], fill=GRID)
            self.draw.text((LEFT - 8, level), f"{tick:g}", fill=INK, font=self.font, anchor="rm")
        for tick in x.ticks() if x_ticks is None else x_ticks:
            column = self.at(tick, y.low)[0]
            self.draw.line([(column, TOP), (column, SIZE[1] - BOTTOM)], fill=GRID)
            self.draw.text((column, SIZE[1] - BOTTOM + 6), f"{tick:g}", fill=INK, font=self.font, anchor="ma")
        self.draw.line([(LEFT, TOP), (LEFT, SIZE[1] - BOTTOM), (SIZE[0] - RIGHT, SIZE[1] - BOTTOM)], fill=INK)

    def at(self, x: float, y: float) -> Point:
        """Pixels of a value, held inside the frame."""
        across, up = (min(1.0, max(0.0, axis.place(value))) for axis, value in ((self.x, x), (self.y, y)))
        return LEFT + across * (SIZE[0] - LEFT - RIGHT), SIZE[1] - BOTTOM - up * (SIZE[1] - TOP - BOTTOM)

    def text(self, at: Point, text: str, colour: str = INK, size: int = 14) -> None:
        font = self.font if size == 14 else ImageFont.load_default(size)
        self.draw.text(at, text, fill=colour, font=font)

    def line(self, points: Sequence[Point], colour: str, *, dots: bool = True) -> None:
        placed = [self.at(*point) for point in points]
        self.draw.line(placed, fill=colour, width=3)
        for point in placed if dots else ():
            self.dot(point, colour)

    def dot(self, at: Point, colour: str, radius: float = 4) -> None:
        box = (at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius)
        self.draw.ellipse(box, fill=colour, outline="white")

    def legend(self, name: str, colour: str) -> None:
        x = SIZE[0] - RIGHT + 20
        self.draw.rectangle((x, self.legend_at + 3, x + 12, self.legend_at + 15), fill=colour)
        self.text((x + 20, self.legend_at), name[:26])
        self.legend_at += 22

    def save(self, path: Path) -> None:
        self.image.save(path, format="PNG", optimize=True)


def lines(
    path: Path, series: Series, title: str, x_label: str, y_label: str, *, log_x: bool = False, log_y: bool = False
) -> None:
    """One line a name over (x, y) points."""
    points = [point for values in series.values() for point in values]
    x, y = ([point[i] for point in points] for i in (0, 1))
    ticks = sorted(set(x)) if len(set(x)) <= 10 else None  # what was measured, where there is room
    chart = Chart(title, axis_of(x, log=log_x), axis_of(y, log=log_y), x_label, y_label, x_ticks=ticks)
    for index, (name, values) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        chart.line(sorted(values), colour)
        chart.legend(name, colour)
    chart.save(path)


def bars(path: Path, groups: dict[str, dict[str, float]], title: str, y_label: str) -> None:
    """Groups side by side, in each one bar a name, its value on top."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    top = [value for group in groups.values() for value in group.values()]
    chart = Chart(title, Axis(0, len(groups)), axis_of(top), "", y_label, x_ticks=())
    for place, (group, values) in enumerate(groups.items()):
        width = 0.84 / max(1, len(values))
        for i, (name, value) in enumerate(values.items()):
            left, upper = chart.at(place + 0.08 + i * width, value)
            right, lower = chart.at(place + 0.08 + (i + 0.9) * width, 0)
            chart.draw.rectangle((left, upper, right, lower), fill=COLOURS[names.index(name) % len(COLOURS)])
            chart.draw.text(((left + right) / 2, upper - 2), f"{value:.3g}", fill=INK, font=chart.font, anchor="mb")
        middle = chart.at(place + 0.5, 0)
        chart.draw.text((middle[0], middle[1] + 8), group, fill=INK, font=chart.font, anchor="ma")
    for index, name in enumerate(names):
        chart.legend(name, COLOURS[index % len(COLOURS)])
    chart.save(path)


def roofline(path: Path, points: Series, flops_per_s: float, bytes_per_s: float, title: str) -> None:
    """FLOP/s over FLOPs per byte, with the machine's two limits; each point is (FLOPs per byte, FLOP/s)."""
    every = [point for values in points.values() for point in values] or [(1.0, flops_per_s)]
    ridge = flops_per_s / bytes_per_s
    x = axis_of([*(p[0] for p in every), ridge / 4, ridge * 4], log=True)
    y = axis_of([*(p[1] / 1e9 for p in every), flops_per_s / 1e9], log=True)
    chart = Chart(title, x, y, "FLOPs per byte moved", "GFLOP/s")
    begin = max(x.low, y.low * 1e9 / bytes_per_s)
    roof = [(begin, begin * bytes_per_s / 1e9), (ridge, flops_per_s / 1e9), (x.high, flops_per_s / 1e9)]
    chart.line(roof, INK, dots=False)
    chart.legend("limits, measured", INK)
    for index, (name, values) in enumerate(points.items()):
        colour = COLOURS[index % len(COLOURS)]
        chart.legend(name, colour)
        for intensity, rate in values:
            chart.dot(chart.at(intensity, rate / 1e9), colour, 5)
    chart.save(path)
