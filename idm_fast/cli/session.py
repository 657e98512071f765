"""One run over many pictures: grouped for the network, reported one by one."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from idm_fast.cli.inputs import Job
from idm_fast.compare import side_by_side
from idm_fast.errors import IdmFastError
from idm_fast.images import READABLE, Picture, copy_file, image_size, output_format, read_image, write_image
from idm_fast.restorer import Restorer, Result

# Pictures that share the network's batches: enough to fill them, few enough to bound memory (24 bytes a pixel).
_GROUP_FILES, _GROUP_PIXELS = 8, 30_000_000


@dataclass(frozen=True)
class _Read:
    """A picture in memory, and how long it took to get there."""

    number: int
    job: Job
    picture: Picture
    ms: float


class Session:
    """``run`` does the jobs; whatever goes wrong with one is recorded and does not end the others."""

    def __init__(
        self,
        jobs: list[Job],
        restorer: Restorer,
        options: dict[str, Any],
        *,
        compare: bool = False,
        skip_existing: bool = False,
        halt_on_error: bool = False,
        debug: bool = False,
    ) -> None:
        self.jobs, self.restorer, self.options = jobs, restorer, options
        self.compare, self.skip_existing, self.halt_on_error, self.debug = compare, skip_existing, halt_on_error, debug
        self.items: dict[int, dict[str, Any]] = {}  # by the job's number: they are not done in order
        self.failed = self.skipped = self.faces = 0
        self.bar = tqdm(total=len(jobs), unit="picture", file=sys.stderr, disable=None)

    @property
    def halted(self) -> bool:
        return bool(self.failed and self.halt_on_error)

    def run(self) -> None:
        for group in self._groups():
            self._do(group)
            group.clear()  # the next pictures are read before the loop's variable lets go of these

    def close(self, *, as_json: bool) -> None:
        """Ends the progress bar, says on standard error what was done, and prints the document if asked for."""
        self.bar.close()
        done = len(self.items) - self.failed - self.skipped
        said = [f"{done} of {len(self.jobs)} pictures done, {self.faces} faces restored"]
        said += [f"{self.skipped} already there"] if self.skipped else []
        said += [f"{self.failed} failed"] if self.failed else []
        print(f"idm-fast: {', '.join(said)}", file=sys.stderr)
        if as_json:
            print(json.dumps({"items": [self.items[number] for number in sorted(self.items)]}, indent=1))

    def _groups(self) -> Iterator[list[_Read]]:
        """Reads pictures and yields them in groups bounded in number and pixels; unreadable ones are recorded here."""
        group: list[_Read] = []
        pixels = 0.0
        for number, job in enumerate(self.jobs):
            if self.skip_existing and job.target.is_file():
                self.skipped += 1
                self._record(number, 0, 0.0)
                continue
            started = time.perf_counter()
            try:
                width, height = image_size(job.source)  # before decoding: it decides whether there is room for more
                size = width * height * max(1.0, float(self.options.get("upscale", 1.0))) ** 2
                if group and (len(group) == _GROUP_FILES or pixels + size > _GROUP_PIXELS):
                    yield group
                    group, pixels = [], 0.0
                    if self.halted:
                        return
                    started = time.perf_counter()
                picture = read_image(job.source)
            except IdmFastError as error:
                if group and self.halt_on_error:  # those before it come first
                    yield group
                    group = []
                if not self.halted:
                    self._record(number, 0, 0.0, error)
                if self.halted:
                    return
                continue
            group.append(_Read(number, job, picture, 1000 * (time.perf_counter() - started)))
            pixels += size
        if group:
            yield group

    def _do(self, group: list[_Read]) -> None:
        """Restores and writes a group; if it fails as a whole, each picture is tried alone and the guilty is named."""
        failure: Exception | None = None
        try:
            results = self.restorer.restore([each.picture for each in group], progress=self._progress, **self.options)
        except Exception as error:
            failure = error
            if len(group) > 1:  # the traceback holds the group's tensors, which the pictures alone may need room for
                failure.__traceback__ = None
        if failure is None:
            for each, result in zip(group, results, strict=True):
                if not self.halted:
                    self._write(each, result)
        elif len(group) == 1:
            self._record(group[0].number, 0, 0.0, failure)
        else:
            for each in group:
                if not self.halted:
                    self._do([each])

    def _write(self, each: _Read, result: Result) -> None:
        started = time.perf_counter()
        job = each.job
        try:
            _make_folder(job)
            if not result.changed and READABLE.get(job.source.suffix.lower()) == output_format(job.target):
                # What reading changes (orientation, animation, CMYK) is kept by a copy, so its notes do not apply.
                copy_file(job.source, job.target)
                notes = ["no face found; the file was copied as it is"]
            else:
                notes = list(result.notes) + write_image(result.picture, job.target)
            if self.compare:
                write_image(side_by_side(each.picture, result.picture), job.sheet)
        except Exception as error:
            self._record(each.number, 0, 0.0, error)
            return
        for note in notes:
            tqdm.write(f"idm-fast: {job.source}: note: {note}", file=sys.stderr)
        ms = each.ms + sum(result.milliseconds.values()) + 1000 * (time.perf_counter() - started)
        self._record(each.number, len(result.faces), ms)

    def _record(self, number: int, faces: int, ms: float, error: Exception | None = None) -> None:
        job, said = self.jobs[number], None
        if error is not None:
            said = " ".join(str(error).split()) or type(error).__name__
            said = said if isinstance(error, IdmFastError) else f"{type(error).__name__}: {said}"
            said = said if str(job.source) in said or str(job.target) in said else f"{job.source}: {said}"
            self.failed += 1
            tqdm.write(f"idm-fast: error: {said}", file=sys.stderr)
            if self.debug:
                traceback.print_exception(error)
        self.items[number] = {
            "input": str(job.source), "output": None if said else str(job.target), "faces": faces, "ms": round(ms, 1),
            "error": said,
        }  # fmt: skip
        self.faces += faces
        self.bar.set_postfix_str("")
        self.bar.update()

    def _progress(self, done: int, total: int) -> None:
        self.bar.set_postfix_str(f"network {done}/{total}")


def _make_folder(job: Job) -> None:
    try:
        job.target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IdmFastError(f"{job.target}: expected a writable output folder, got {error.strerror or error}") from None
