"""What a caller may ask of the cleaner, checked before any work."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any

from idm_fast.errors import IdmFastError
from idm_fast.images import WRITABLE
from idm_fast.sampling import GuidanceSettings, SampleSettings

# Chosen by measurement: see docs/clean.md.
MAX_IDENTITY_DISTANCE = 0.5
MAX_LOW_FREQUENCY = 0.03
_SEEDS = 2**62

# Where the network runs and how it is fed does not decide what becomes of a picture, so a run may go on elsewhere.
_FREE = frozenset({"device", "batch_size", "limit"})


@dataclass(frozen=True)
class CleanOptions:
    """How pictures are enhanced, and how far from its original one may go.

    - ``steps``, ``sampler``, ``strength``: as in ``Restorer.restore``; None is the model's own default. ``strength`` in
      (0, 1] is where the walk starts: 1 from pure noise, less from the noised original, and so nearer to it.
    - ``seed`` in [0, 2^62): of the noise. Each picture draws its own, from the seed and its name.
    - ``max_identity_distance``: largest recognition distance of a face to its original (0.6 is what two pictures of one
      person may have). None leaves the rule out, and with it the recognition network.
    - ``max_low_frequency``: largest low-frequency difference to the original (0..1; see ``measure.low_frequency``).
      None leaves the rule out.
    - ``blend`` in [0, 1]: how much of the restored face is taken where it is within the bounds. Beyond them three
      quarters, a half and a quarter of it are tried, and then the original is kept.
    - ``aligned``: each picture is itself one aligned crop, as FFHQ frames it. None: yes for a folder with a
      ``faces.csv``, and for one whose pictures are square and of one size.
    - ``ext``: extension of the pictures written: "png", ..., or "auto", the original's. None: png for aligned crops
      (JPEG would spoil them again), auto for photographs. A rejected picture keeps its own, with its bytes.
    - ``batch_size``: faces a network call. ``device``, ``dtype``: as in ``Restorer.from_pretrained``.
    - ``limit``: only the first so many pictures.
    - ``guidance_scale``: of a CLR-Face model, as in ``Restorer.restore``; 0: without.

    Raises ``IdmFastError`` naming the option, what it must be and what it was.
    """

    steps: int | None = None
    sampler: str | None = None
    strength: float | None = None
    seed: int = 0
    max_identity_distance: float | None = MAX_IDENTITY_DISTANCE
    max_low_frequency: float | None = MAX_LOW_FREQUENCY
    blend: float = 1.0
    aligned: bool | None = None
    ext: str | None = None
    batch_size: int = 16
    device: str | None = None
    dtype: str | None = None
    limit: int | None = None
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        for name, kind, words in (
            ("steps", Integral, "a whole number"),
            ("strength", Real, "a number"),
            ("seed", Integral, "a whole number"),
            ("max_identity_distance", Real, "a number"),
            ("max_low_frequency", Real, "a number"),
            ("blend", Real, "a number"),
            ("batch_size", Integral, "a whole number"),
            ("limit", Integral, "a whole number"),
        ):
            value: Any = getattr(self, name)
            optional = name not in ("seed", "blend", "batch_size")
            if (value is None and optional) or (isinstance(value, kind) and value is not True and value is not False):
                continue
            raise IdmFastError(f"{name} must be {words}{' or None' if optional else ''}, got {value!r}")
        GuidanceSettings(self.guidance_scale)  # says what is wrong with it
        for name in ("steps", "batch_size", "limit"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise IdmFastError(f"{name} must be >= 1, got {number}")
        for name in ("max_identity_distance", "max_low_frequency"):
            if (bound := getattr(self, name)) is not None and not (bound >= 0 and math.isfinite(bound)):
                raise IdmFastError(f"{name} must be >= 0 (None: no bound), got {bound}")
        if not 0 <= self.blend <= 1:
            raise IdmFastError(f"blend must lie in [0, 1], got {self.blend}")
        if not 0 <= self.seed < _SEEDS:
            raise IdmFastError(f"seed must lie in [0, 2^62), got {self.seed}")
        if self.aligned is not None and not isinstance(self.aligned, bool):
            raise IdmFastError(f"aligned must be True, False or None, got {self.aligned!r}")
        if self.ext is not None and self.ext != "auto" and f".{self.ext}" not in WRITABLE:
            known = " ".join(name[1:] for name in WRITABLE)
            raise IdmFastError(f"ext must be auto or one of {known}, got {self.ext!r}")

    @property
    def sampling(self) -> SampleSettings:
        guidance = GuidanceSettings(self.guidance_scale)
        return SampleSettings(self.steps, self.sampler, strength=self.strength, guidance=guidance)

    def lasting(self) -> dict[str, Any]:
        """What decides how a picture comes out: an output folder must not be gone on with under other values."""
        # A folder from before models had guidance says nothing of it.
        free = _FREE | ({"guidance_scale"} if self.guidance_scale is None else set())
        return {name: value for name, value in asdict(self).items() if name not in free}


@dataclass
class CleanSummary:
    """What became of the pictures of an output folder, over all its runs.

    ``kept``: the restored picture was taken; ``blended``: a face of it only in part; ``rejected``: the original was
    copied, because no part of the restored one was within the bounds; ``copied``: nothing to restore (no face, or not
    of the training split); ``duplicate``: the bytes of another picture, whose result was copied; ``failed``: nothing
    was written. ``before``: how many of them were done by earlier runs; ``seconds`` of this run, without loading.
    ``taken_as``: aligned crops or photographs, and why.
    """

    out: str = ""
    manifest: str = ""
    faces_csv: str | None = None
    taken_as: str = ""
    total: int = 0
    kept: int = 0
    blended: int = 0
    rejected: int = 0
    copied: int = 0
    duplicate: int = 0
    failed: int = 0
    before: int = 0
    seconds: float = 0.0

    def count(self, result: str, by: int = 1) -> None:
        setattr(self, result, getattr(self, result) + by)

    @property
    def done(self) -> int:
        return self.kept + self.blended + self.rejected + self.copied + self.duplicate + self.failed

    @property
    def pictures_per_second(self) -> float:
        """Of this run; 0 where it had nothing to do."""
        return (self.done - self.before) / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"pictures_per_second": round(self.pictures_per_second, 3)}
