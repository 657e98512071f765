"""Training figures: a CSV line every few steps, and TensorBoard when it is installed."""

from __future__ import annotations

import csv
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

from idm_fast.files import atomic


def put_row(path: Path, step: int, values: dict[str, float]) -> None:
    """Adds the line of ``step`` to the table ``path``, with 4 decimals; those of this and of later steps go, which were
    made before the run was set back.
    """
    rows: list[dict[str, object]] = []
    if path.is_file():
        with path.open(newline="") as file:
            rows = [dict(row) for row in csv.DictReader(file) if int(row["step"]) < step]
    rows.append({"step": step} | {key: round(value, 4) for key, value in values.items()})
    with atomic(path) as temporary, temporary.open("w", newline="") as file:
        # A figure may be missing for a while: that of a package which was not installed yet.
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


class Log:
    """Appends means over the last ``every`` steps to ``out / log.csv``; ``enabled=False`` writes nothing.

    ``step`` is where the run goes on: lines of later steps, which will be made again, are dropped.
    """

    def __init__(self, out: Path, enabled: bool, step: int = 0, every: int = 20) -> None:
        self.every, self.enabled = every, enabled
        self.recent: dict[str, deque[float]] = {}
        self.path = out / "log.csv"
        self.board: Any = None
        if enabled:
            out.mkdir(parents=True, exist_ok=True)
            self._rewind(step)
            try:
                from torch.utils.tensorboard import SummaryWriter  # optional

                self.board = SummaryWriter(str(out), purge_step=step + 1)
            except ImportError:
                pass

    def _rewind(self, step: int) -> None:
        if not self.path.is_file():
            return
        with self.path.open(newline="") as file:
            kept = [
                row for row in csv.DictReader(file) if (row.get("step") or "").isdigit() and int(row["step"]) <= step
            ]
        if not kept:
            self.path.unlink()
            return
        with atomic(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(kept[0]), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.board is not None:
            self.board.close()

    def add(self, step: int, seconds: float, learning_rate: float, terms: dict[str, float], last: bool) -> None:
        """Records the terms of step ``step``; ``seconds`` of training so far; ``last`` writes a line in any case."""
        for name, value in terms.items():
            self.recent.setdefault(name, deque(maxlen=self.every)).append(value)
        if not self.enabled or (step % self.every and not last):
            return
        row = {"step": step, "seconds": round(seconds, 1), "learning_rate": learning_rate} | self.shown()
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
        if self.board is not None:
            for name, value in self.shown().items():
                self.board.add_scalar(name, value, step)

    def shown(self) -> dict[str, float]:
        """Mean of each term over the last steps."""
        return {name: round(sum(values) / len(values), 4) for name, values in self.recent.items()}
