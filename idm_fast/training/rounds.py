"""What a run of extrinsic rounds is asked for, where its files lie, and which of its parts are finished.

OUT/rounds.json              settings, and what each finished part ended with
OUT/round-0/                 R_0: model.safetensors, log.csv, sheets/, figures.json, values.safetensors (face by face);
                             state.pt until it is trained, judging-.../ until it is judged
OUT/data-1/                  D_1: the faces as R_0 cleaned them, with the cleaner's manifest
OUT/round-1/                 R_1, trained on D_1 ...
OUT/control-1/               the same training on D_0 instead
OUT/table.md, table.json     all figures side by side
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from idm_fast.clean import CleanOptions
from idm_fast.errors import IdmFastError
from idm_fast.files import atomic
from idm_fast.training.data import FaceFile, fingerprint
from idm_fast.training.degradation import LEVELS
from idm_fast.training.settings import TrainSettings
from idm_fast.training.state import check_unchanged

FORMAT = 1
# Of the first training's settings: what may change between two parts of a run, and what is compared by content instead.
_FREE = {"out", "workers", "save_every", "sheet_every"}
_BY_CONTENT = {"data", "init_from"}
_FIRST_ONLY = {"steps", "learning_rate", "min_native_px"}


@dataclass(frozen=True)
class JudgeSettings:
    """How models are compared: faces of split "val" of ``data`` (the first ``limit`` of them) at ``levels``.

    ``steps``: numbers of sampling steps, a row of the table each. ``data`` None: the run's own.
    """

    data: Path | None = None
    levels: tuple[str, ...] = ("medium",)
    steps: tuple[int, ...] = (1, 4)
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.levels or not set(self.levels) <= set(LEVELS):
            raise IdmFastError(f"judging: levels must be some of {list(LEVELS)}, got {list(self.levels)}")
        if not self.steps or min(self.steps) < 1:
            raise IdmFastError(f"judging: steps must be >= 1, got {list(self.steps)}")
        if self.limit is not None and self.limit < 1:
            raise IdmFastError(f"judging: limit must be >= 1, got {self.limit}")


@dataclass(frozen=True)
class Part:
    """One part of the run: ``name`` is its folder; ``control`` is trained on D_0 instead of D_``round``."""

    kind: Literal["train", "clean", "judge"]
    round: int
    control: bool = False

    @property
    def name(self) -> str:
        return f"{'data' if self.kind == 'clean' else 'control' if self.control else 'round'}-{self.round}"


@dataclass(frozen=True)
class RoundSettings:
    """``first``: the training of R_0 on D_0 = ``first.data``, in the run's folder ``first.out``; with its ``init_from``
    R_0 is that model as it is, and not trained. Every later training shares its settings but for ``round_steps``,
    ``round_learning_rate`` and ``round_min_native_px`` (None: that of ``first``), begins from the model before it and
    draws from seed + round.

    ``source``: R_r cleans "original" = D_0 (always the same pictures, so that nothing adds up), or "previous" = D_r.
    ``control``: the same trainings once more, all on D_0: what longer training alone would have brought.
    ``judge`` None: models are not judged.
    """

    first: TrainSettings
    rounds: int = 2
    round_steps: int = 2000
    round_learning_rate: float = 1e-4
    round_min_native_px: int | None = None
    source: Literal["original", "previous"] = "original"
    control: bool = False
    clean: CleanOptions = field(default_factory=lambda: CleanOptions(steps=4, aligned=True))
    clean_workers: int = 1
    judge: JudgeSettings | None = field(default_factory=JudgeSettings)

    def __post_init__(self) -> None:
        for name in ("rounds", "clean_workers"):
            if getattr(self, name) < 1:
                raise IdmFastError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.source not in ("original", "previous"):
            raise IdmFastError(f"source must be original or previous, got {self.source!r}")
        self.training(Part("train", 1))  # its own checks

    def parts(self) -> list[Part]:
        """All parts in the order in which they are done."""
        found = []
        for number in range(self.rounds + 1):
            if number:
                found.append(Part("clean", number))
            for control in (False, True) if self.control and number else (False,):
                found.append(Part("train", number, control))
                if self.judge is not None:
                    found.append(Part("judge", number, control))
        return found

    def folder(self, part: Part) -> Path:
        return self.first.out / part.name

    def data(self, number: int) -> Path:
        """The folder of D_``number``."""
        return self.folder(Part("clean", number)) if number else self.first.data

    def model(self, number: int, control: bool = False) -> Path:
        """The weights of R_``number``, or of the control; both begin as R_0."""
        return self.folder(Part("train", number, control and number > 0)) / "model.safetensors"

    def training(self, part: Part) -> TrainSettings:
        """The settings of one training part."""
        own = replace(self.first, out=self.folder(part))
        if not part.round:
            return own
        least = self.round_min_native_px
        return replace(
            own,
            data=self.data(0 if part.control else part.round),
            steps=self.round_steps,
            learning_rate=self.round_learning_rate,
            min_native_px=own.min_native_px if least is None else least,
            init_from=self.model(part.round - 1, part.control),
            seed=own.seed + part.round,
        )

    def lasting(self, faces: list[FaceFile]) -> dict[str, Any]:
        """What decides the weights of every round, as plain values; the data (``faces``) and R_0 by their content."""
        start = self.first.init_from
        left_out = _FREE | _BY_CONTENT | (_FIRST_ONLY if start is not None else set())
        first = {name: value for name, value in self.first.to_dict().items() if name not in left_out}
        return (
            first
            | fingerprint(faces, self.first.data)
            | {
                "init_from": None if start is None else f"sha256 {digest(start)[:12]}",
                "round_steps": self.round_steps,
                "round_learning_rate": self.round_learning_rate,
                "round_min_native_px": self.training(Part("train", 1)).min_native_px,
                "from": self.source,
                "clean": self.clean.lasting(),
            }
        )


@dataclass
class Ledger:
    """``rounds.json``: a run's ``settings``, and under ``done`` what each finished part ended with, by its folder."""

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, out: Path, settings: dict[str, Any]) -> Ledger:
        """That of the run in ``out``, begun if there is none. ``IdmFastError`` for other settings or other contents."""
        path = out / "rounds.json"
        if not path.exists():
            foreign = [*out.glob("round-*"), *out.glob("data-*"), *out.glob("control-*"), *out.glob("state.pt")]
            if foreign:
                raise IdmFastError(
                    f"{out}: must be a new folder or one with rounds.json, got {foreign[0].name} of another run"
                )
            ledger = cls(path, settings)
            ledger._write()
            return ledger
        try:
            kept = json.loads(path.read_text())
            whole = kept["format"] == FORMAT and isinstance(kept["settings"], dict)
            whole = whole and all(_is_record(name, facts) for name, facts in kept["done"].items())
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            whole = False
        if not whole:
            raise IdmFastError(f"{path}: must be a whole record of rounds (format {FORMAT}), got something else")
        check_unchanged(path, kept["settings"], settings)
        return cls(path, kept["settings"], kept["done"])

    def finish(self, part: Part, facts: dict[str, Any]) -> None:
        """Says for good that ``part`` is finished, with what."""
        self.done[part.name] = facts
        self._write()

    def check_model(self, part: Part, path: Path) -> str:
        """The checksum of the model that ``part`` ended with; ``IdmFastError`` where ``path`` is not that file."""
        expected = self.done[part.name]["sha256"]
        found = digest(path) if path.is_file() else "no file"
        if found != expected:
            raise IdmFastError(
                f"{path}: must be the model that {part.name} ended with = sha256 {expected[:12]}, got {found[:12]}; "
                f"put it back, or begin again with another --out"
            )
        return found

    def _write(self) -> None:
        document = {"format": FORMAT, "settings": self.settings, "done": self.done}
        with atomic(self.path) as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n")


def _is_record(name: str, facts: dict[str, Any]) -> bool:
    """Whether a finished part says what later parts ask of it."""
    if name.startswith("data-"):
        return all(isinstance(facts[key], str) for key in ("faces", "source", "model"))
    return isinstance(facts["sha256"], str) and isinstance(facts["hours"], float) and "start" in facts


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise IdmFastError(f"{path}: must be a readable file, got {error.strerror or error}") from None
