"""The last stage of a picture: pasted, measured, judged, written, and told of in a record."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from idm_fast.clean.folder import parts_folder
from idm_fast.clean.listing import Task, content_digest
from idm_fast.clean.manifest import DiskError, Record
from idm_fast.clean.measure import Identity, estimates, look
from idm_fast.clean.rule import Verdict, judge
from idm_fast.errors import IdmFastError
from idm_fast.faces.pipeline import paste_faces
from idm_fast.faces.sharpness import FloatArray
from idm_fast.images import encode_image

if TYPE_CHECKING:
    from idm_fast.clean.work import Setup, Work

_numbers = itertools.count()
_HERE = secrets.token_hex(4)  # a process on another machine may have the same number


@dataclass
class Finished:
    """The records of a group's pictures, up to the one that the disk had no room for."""

    records: list[Record] = field(default_factory=list)
    error: DiskError | None = None


class Finisher:
    """Finishes the pictures of one worker."""

    def __init__(self, setup: Setup, identity: Identity | None) -> None:
        self.setup, self.options, self.identity = setup, setup.options, identity

    def finish(self, group: Sequence[Work]) -> Finished:
        """Their records, each after its file; faces of all of them are recognised together."""
        done = Finished()
        try:
            self._finish(group, done.records)
        except DiskError as error:  # what was written before it stays true
            done.error = error
        return done

    def _finish(self, group: Sequence[Work], records: list[Record]) -> None:
        pasted: list[tuple[Work, FloatArray]] = []
        for work in group:
            if work.error is not None:
                records.append(failed(work.task, work.error))
            elif not work.task.restore:
                records.append(self._copied(work.task, "not of the training split"))
            elif not work.faces:
                records.append(self._copied(work.task, "no face found"))
            else:
                pasted.append((work, self._paste(work, self.options.blend)))
        before = [look(work.picture.pixels, face) for work, _ in pasted for face in work.faces if work.picture]
        after = [look(pixels, face) for work, pixels in pasted for face in work.faces]
        verdicts = judge(before, after, self.options, self.identity)
        first = 0
        for work, pixels in pasted:
            mine = verdicts[first : first + len(work.faces)]
            first += len(work.faces)
            records.append(self._written(work, pixels, mine))

    def _paste(self, work: Work, blend: float | list[float]) -> FloatArray:
        assert work.picture is not None
        crops = [crop for crop in work.restored if crop is not None]
        pasted = paste_faces(
            work.picture, work.faces, crops, originals=work.crops, blend=blend, aligned=self.setup.aligned
        )
        return pasted.pixels

    def _written(self, work: Work, pixels: FloatArray, verdicts: list[Verdict]) -> Record:
        assert work.picture is not None
        shares = [verdict.share for verdict in verdicts]
        if not any(shares):
            record = self._copied(work.task, "beyond the bounds")
            if record["result"] == "failed":  # the original is gone since
                return record
            record["result"] = "rejected"
            pixels = work.picture.pixels
        else:
            if min(shares) < 1.0 and len(set(shares)) == 1:  # exactly what was judged
                pixels = work.picture.pixels + np.float32(shares[0]) * (pixels - work.picture.pixels)
            elif min(shares) < 1.0:
                pixels = self._paste(work, [self.options.blend * share for share in shares])
            result = "kept" if min(shares) == 1.0 else "blended"
            try:
                data = encode_image(work.picture.with_pixels(pixels), work.task.output)
            except IdmFastError as error:  # the format cannot hold it
                return failed(work.task, str(error))
            written = place(self.setup.out, work.task.output, data)
            record = _record(work.task, result, digest=work.digest, output=work.task.output, output_bytes=written)
        record["faces"] = [
            self._face(work, k, verdict, pixels) for k, verdict in enumerate(verdicts)
        ]  # after the write, which may fail
        return record

    def _face(self, work: Work, k: int, verdict: Verdict, pixels: FloatArray) -> dict[str, Any]:
        assert work.picture is not None
        face = work.faces[k]
        before, after = (estimates(each, face) for each in (work.picture.pixels, pixels))
        return {
            "box": [round(value, 1) for value in face.face.box],
            "native_px": round(face.native_px),
            "model": work.models[k].config.name,
            "blend": round(self.options.blend * verdict.share, 4),
            "recognition_distance": _rounded(verdict.distance),
            "low_frequency": _rounded(verdict.low_frequency),
            "restored_recognition_distance": _rounded(verdict.restored_distance),
            "restored_low_frequency": _rounded(verdict.restored_low_frequency),
            "sharpness_before": _rounded(before[0]),
            "sharpness": _rounded(after[0]),
            "noise_before": _rounded(before[1]),
            "noise": _rounded(after[1]),
        }

    def _copied(self, task: Task, why: str) -> Record:
        source = self.setup.source / task.name
        try:
            data = source.read_bytes()
        except OSError as error:
            return failed(task, f"{source}: must be readable, got {error.strerror or error}")
        written = place(self.setup.out, task.name, data)
        return _record(task, "copied", digest=content_digest(data), output=task.name, output_bytes=written, reason=why)


def failed(task: Task, why: str) -> Record:
    return _record(task, "failed", reason=why)


def repeated(setup: Setup, task: Task, first: str, result: str, output: str | None) -> Record:
    """The record of a picture with the bytes of ``first``, after a copy of what became of that one."""
    if output is None:
        return failed(task, f"{setup.source / task.name}: has the bytes of {first}, which failed")
    original, made = setup.source / task.name, setup.out / output
    try:
        digest, data = content_digest(original.read_bytes()), made.read_bytes()
    except OSError as error:
        return failed(task, f"{error.filename}: must be readable, got {error.strerror or error}")
    mine = task.name if output == first else task.output
    written = place(setup.out, mine, data)
    return _record(
        task, "duplicate", digest=digest, output=mine, output_bytes=written, duplicate_of=first, first=result
    )


def place(out: Path, output: str, data: bytes) -> int:
    """Puts the bytes of a file at its place ``output`` below ``out``, whole; returns their number.

    It is made in the folder for unfinished files, so that a kill leaves nothing torn among the pictures. Raises
    ``DiskError`` where it cannot be written.
    """
    target = out / output
    part = parts_folder(out) / f"{_HERE}-{os.getpid()}-{next(_numbers)}{PurePosixPath(output).suffix}"
    try:
        part.write_bytes(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, target)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise DiskError(f"{target}: cannot be written: {error.strerror or error}") from None
    return len(data)


def _record(task: Task, result: str, **more: Any) -> Record:
    about = {"asked": task.asked, "bytes": task.length, "mtime_ns": task.mtime_ns}
    return {"file": task.name, "result": result} | about | more


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
