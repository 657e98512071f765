"""Results files of ``idm-fast bench`` -> tables and pictures: ``python benchmarks/report.py FILE... --out DIR``.

DIR/report.md: machine and commit, one table a workload, and what lets itself be drawn:
    peers.png                  steps a second by preset and peer
    batch.png, size.png, steps.png   how the cost of a step grows, where a file has several of them
Compare within a table: its rows took turns in one process, so each file has tables, bars and lines of its own. Several
files are one machine's runs, or they are refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from idm_fast.bench import plot
from idm_fast.bench.text import table
from idm_fast.errors import IdmFastError
from idm_fast.files import atomic

Row = dict[str, Any]
WORKLOAD = ("file", "preset", "batch", "height", "width", "steps")
# (file, what grows, its label, what is drawn, its label)
GROWTH = (
    ("batch", "batch", "pictures at once", "ms a step and picture"),
    ("size", "height", "side, pixels", "ms a step"),
    ("steps", "steps", "steps of a walk", "ms a walk"),
)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="written by idm-fast bench --json")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder (default: %(default)s)")
    return parser.parse_args(arguments)


def load(files: Sequence[Path]) -> dict[str, Any]:
    """One report of several: rows and absences in order, the machine of the first, all commits."""
    found: dict[str, Any] = {"rows": [], "absent": [], "commits": []}
    for number, file in enumerate(files):
        try:
            report = json.loads(file.read_text())
            rows, machine = report["rows"], report["machine"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IdmFastError(f"{file}: must be written by idm-fast bench --json, got {error!r}") from None
        first = found.setdefault("machine", machine)
        for key in ("device", "threads"):
            if machine.get(key) != first.get(key):
                raise IdmFastError(
                    f"{file}: {key} must be that of the other files = {first.get(key)}, got {machine.get(key)}"
                )
        found["rows"] += [{**row, "file": number} for row in rows]
        found["absent"] += [each for each in report.get("absent", []) if each not in found["absent"]]
        if machine.get("commit") not in found["commits"]:
            found["commits"].append(machine.get("commit"))
    return found


def label(row: Row) -> str:
    return f"{row['name']} {row['dtype']}{', reusing levels' if row.get('lossy') and row['note'] else ''}"


def peers(rows: Sequence[Row], path: Path) -> bool:
    """Bars of steps a second at batch 1, or the smallest there is; the first file and walk length of each preset."""
    groups: dict[str, dict[str, float]] = {}
    for preset in dict.fromkeys(row["preset"] for row in rows):
        mine = [row for row in rows if row["preset"] == preset]
        least = min(mine, key=lambda row: (row["file"], row["batch"], mine.index(row)))
        same = [row for row in mine if all(row[key] == least[key] for key in WORKLOAD)]
        groups[preset] = {label(row): row["steps_per_second"] for row in same}
    if not groups or max(map(len, groups.values())) < 2:
        return False
    plot.bars(path, groups, "Steps a second", "steps/s")
    return True


def growth(rows: Sequence[Row], what: str, x_label: str, y_label: str, path: Path) -> bool:
    """Lines of the cost as one of ``WORKLOAD`` grows and the others stay."""
    held = [key for key in WORKLOAD if key not in ((what, "width") if what == "height" else (what,))]
    families: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        families.setdefault(tuple(row[key] for key in held), []).append(row)
    several = [rows for rows in families.values() if len({row[what] for row in rows}) > 1]
    if not several:
        return False
    series: plot.Series = {}
    differs = [key for key in held if len({family[0][key] for family in several}) > 1]
    for family in several:
        about = [_said(key, family[0][key]) for key in differs]
        for row in family:
            name = ", ".join([label(row), *about])
            series.setdefault(name, []).append((row[what], _cost(row, what)))
    longest = {name: points for name, points in series.items() if len(points) > 1}
    title = f"Cost as {what if what != 'height' else 'the size'} grows"
    plot.lines(path, longest, title, x_label, y_label, log_x=True, log_y=what != "batch")
    return True


def _said(key: str, value: Any) -> str:
    """Of a workload, in the words of a legend."""
    return str(value) if key == "preset" else f"file {value + 1}" if key == "file" else f"{key} {value}"


def _cost(row: Row, what: str) -> float:
    cost = {"batch": row["ms_per_step"] / row["batch"], "steps": row["ms_per_step"] * row["steps"]}
    return float(cost.get(what, row["ms_per_step"]))


def markdown(report: dict[str, Any], pictures: Sequence[str]) -> str:
    machine, files = report["machine"], dict.fromkeys(row["file"] for row in report["rows"])
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    lines = [
        "# Steps a second",
        f"{machine['device']}, {machine.get('threads')} threads, {machine.get('cpu_isa') or 'no native module'}; "
        f"commit {', '.join(map(str, report['commits']))}; load average {machine.get('load_average', 0):.1f}.",
        f"{versions}.",
        "",
        "Median of whole walks divided by their steps; the rows of a table took turns in one process. "
        'Compare within a table only. "ours is": how many times faster than that row.',
        "",
        "\n\n".join(table([row for row in report["rows"] if row["file"] == n]) for n in files),
    ]
    if report["absent"]:
        lines += ["", "Not timed:", ""]
        who = [f"{each['name']} {each['dtype']}".rstrip() for each in report["absent"]]
        lines += [f"- {n} ({each['preset']}): {each['reason']}" for n, each in zip(who, report["absent"], strict=True)]
    lines += ["", *(f"![{name}]({name}.png)" for name in pictures)]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        report = load(options.files)
    except IdmFastError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = report["rows"]
    drawn = ["peers"] if peers(rows, options.out / "peers.png") else []
    for name, what, x_label, y_label in GROWTH:
        if growth(rows, what, x_label, y_label, options.out / f"{name}.png"):
            drawn.append(name)
    with atomic(options.out / "report.md") as path:
        path.write_text(markdown(report, drawn))
    print(options.out / "report.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
