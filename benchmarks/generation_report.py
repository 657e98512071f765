"""What benchmarks/generation.py found, as a table, a verdict, a sheet of samples and a plot of the losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from idm_fast.bench.plot import lines
from idm_fast.files import atomic
from idm_fast.training.generator import draw_sheet

COLUMNS = 16  # of the sheet; two rows a set
Row = dict[str, Any]


def line(row: Row) -> str:
    return f"{row['set']}-{row['seed']}: FD-VGG {row['fd_val']['mean']:.2f}, held-out loss {row['held_out_loss']:.4f}"


def _runs(report: dict[str, Any]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in report["rows"]:
        if row["seed"] is not None:
            found.setdefault(row["set"], []).append(row)
    return found


def verdicts(report: dict[str, Any]) -> list[str]:
    """For every two sets: in how many seeds the first, whose mean is lower, has the lower FD-VGG to held-out faces."""
    runs = _runs(report)
    means = {name: np.mean([row["fd_val"]["mean"] for row in rows]) for name, rows in runs.items()}
    order = sorted(runs, key=lambda name: means[name])
    said = []
    for i, better in enumerate(order):
        for worse in order[i + 1 :]:
            pairs = list(zip(runs[better], runs[worse], strict=True))
            wins = sum(a["fd_val"]["mean"] < b["fd_val"]["mean"] for a, b in pairs)
            gain = 1 - means[better] / means[worse]
            said.append(f"{better} is below {worse} in {wins} of {len(pairs)} seeds, on average by {gain:.1%}.")
    return said


def markdown(report: dict[str, Any]) -> str:
    """The conditions in a sentence, a table of all runs with their spread, and the verdicts."""
    c = report["conditions"]
    text = [
        f"{c['preset']}, {c['steps']} steps of {c['batch_size']}; {c['samples']} samples a run, {c['sampling_steps']} "
        f"steps of {c['sampler']}. FD-VGG to the {c['held_out_faces']} held-out faces (split val) and to the "
        f"{c['reference_faces']} training faces of {c['reference']}; 95 % intervals: {c['intervals']}. Loss: mean and "
        f"deviation over the last {c['loss_of_last']:.0%} of the run; held-out: on split val, fixed noise.",
        "",
        "| set | seed | FD-VGG held-out ↓ | FD-VGG train ↓ | training loss | held-out loss ↓ |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in report["rows"]:
        cells = [
            f"{row[key]['mean']:.1f} [{row[key]['low']:.1f}, {row[key]['high']:.1f}]" for key in ("fd_val", "fd_train")
        ]
        if row["seed"] is None:
            text.append(f"| {row['set']} | the pictures themselves | {cells[0]} | {cells[1]} | | |")
        else:
            loss = f"{row['last_loss']:.4f} ± {row['last_loss_deviation']:.4f}"
            text.append(
                f"| {row['set']} | {row['seed']} | {cells[0]} | {cells[1]} | {loss} | {row['held_out_loss']:.4f} |"
            )
    for name, rows in _runs(report).items():
        over = {key: [row[key]["mean"] for row in rows] for key in ("fd_val", "fd_train")}
        over |= {key: [row[key] for row in rows] for key in ("last_loss", "held_out_loss")}
        digits = {"fd_val": 1, "fd_train": 1, "last_loss": 4, "held_out_loss": 4}
        cells = [f"{np.mean(v):.{digits[k]}f} ± {np.std(v):.{digits[k]}f}" for k, v in over.items()]
        text.append(f"| **{name}** | **mean ± deviation** | " + " | ".join(cells) + " |")
    return "\n".join([*text, "", *verdicts(report)]) + "\n"


def write(report: dict[str, Any], out: Path) -> None:
    """results.json, results.md, samples.jpg (a row pair a set, first seed) and loss.png in ``out``."""
    with atomic(out / "results.json") as path:
        path.write_text(json.dumps(report, indent=1) + "\n")
    with atomic(out / "results.md") as path:
        path.write_text(markdown(report))
    runs = _runs(report)
    first = [
        load_file(out / f"{name}-{rows[0]['seed']}" / "samples.safetensors")["pixels"] for name, rows in runs.items()
    ]
    draw_sheet(torch.cat([pixels[: 2 * COLUMNS] for pixels in first]).float() / 127.5 - 1, out / "samples.jpg", COLUMNS)
    curves = {
        name: [(step, float(np.mean(values))) for step, *values in _together(rows)] for name, rows in runs.items()
    }
    with atomic(out / "loss.png") as path:
        lines(path, curves, "Training loss, mean over seeds", "step", "loss", log_y=True)


def _together(rows: list[Row]) -> list[tuple[float, ...]]:
    return [
        (points[0][0], *(value for _, value in points)) for points in zip(*(row["curve"] for row in rows), strict=True)
    ]
