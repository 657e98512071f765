"""Rows as a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

COLUMNS = (
    "name", "dtype", "ms/step", "p20 - p80", "steps/s", "faces/s", "launches", "of roof", "PSNR", "memory MB",
    "ours is",
)  # fmt: skip


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table whose first ``left`` columns are aligned left, padded so that it also reads as plain text."""
    rows = [list(head), *map(list, lines)]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return f"| {' | '.join(cells)} |"

    rule = "|".join("-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([line(rows[0]), f"|{rule}|", *(line(row) for row in rows[1:])])


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def title(row: dict[str, Any]) -> str:
    """What rows of one table share."""
    size = f"{row['height']} x {row['width']}"
    return f"{row['preset']}, {size}, batch {row['batch']}, {row['steps']} steps, weights: {row['weights']}"


def best_of_ours(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Our fastest row that is not lossy; of lossy ones only, the fastest of them."""
    mine = [row for row in rows if row["name"] == "idm_fast"]
    exact = [row for row in mine if not row.get("lossy", row["dtype"] == "int8")] or mine
    return min(exact, key=lambda row: row["ms_per_step"], default=None)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One table for each workload, fastest first; "ours is": how many times faster than that row."""
    texts = []
    for about in dict.fromkeys(title(row) for row in rows):
        group = sorted((row for row in rows if title(row) == about), key=lambda row: row["ms_per_step"])
        best = best_of_ours(group)
        lines = [_line(row, best) for row in group]
        notes = [f"{row['name']} {row['dtype']}: {row['note']}" for row in group if row["note"]]
        texts.append("\n".join([about, "", markdown(COLUMNS, lines, left=2), *(["", *notes] if notes else [])]))
    return "\n\n".join(texts)


def _line(row: dict[str, Any], best: dict[str, Any] | None) -> list[str]:
    memory = row["memory_bytes"]
    return [
        row["name"],
        row["dtype"],
        number(row["ms_per_step"]),
        f"{row['p20_ms']:.2f} - {row['p80_ms']:.2f}",
        number(row["steps_per_second"], 1),
        number(row["faces_per_second"], 1),
        "-" if row["launches"] is None else str(row["launches"]),
        percent(row["roofline_fraction"]),
        number(row["psnr_to_fp32"], 1),
        "-" if memory is None else f"{memory / 1e6:.0f}",
        "-" if best is None or row is best else f"{row['ms_per_step'] / best['ms_per_step']:.2f}x",
    ]
