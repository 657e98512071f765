"""``clean``: one run over a folder, from the first look at it to the summary."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from idm_fast.clean import manifest
from idm_fast.clean.finish import repeated
from idm_fast.clean.folder import FACES_CSV, MANIFEST, check_apart, check_places, model_files, opened
from idm_fast.clean.listing import Listing, Task, content_digest, list_pictures, with_duplicates
from idm_fast.clean.manifest import Record
from idm_fast.clean.options import CleanOptions, CleanSummary
from idm_fast.clean.pool import run_workers
from idm_fast.clean.work import Cleaner, Setup
from idm_fast.errors import IdmFastError
from idm_fast.files import atomic

Progress = Callable[[int, int, CleanSummary, Record | None], None]
Runner = Callable[[Setup, Sequence[Task]], Iterator[Record]]
_VERSION = 1  # of what a set of settings makes of a picture
FACE_COLUMNS = ("cleaned", "blend", "recognition_distance", "low_frequency")


def clean(
    source: Path,
    out: Path,
    model: str | Path,
    options: CleanOptions,
    *,
    workers: int = 1,
    progress: Progress | None = None,
    ray: bool = False,
) -> CleanSummary:
    """Enhances every picture of the folder ``source`` into ``out``, under the same names; says what became of them.

    ``source``: aligned crops (with a ``faces.csv`` only its rows, and rows of another split than 'train' are copied
    as they are) or photographs, whose faces are found first. ``model``: as in ``Restorer.from_pretrained``.
    ``workers``: processes on this machine, each with a model of its own; with ``ray`` actors of a Ray cluster, which
    must see both folders under the same paths. ``progress(done, total, summary, record)`` is called after each picture,
    and once at first with no record.

    A run that was stopped, even killed, goes on where it was when it is started again: a picture is either in its place
    and in the manifest, or done again. A broken picture is counted as failed and does not end the run; failed ones are
    tried again by the next run.

    Raises ``IdmFastError`` for wrong folders, options or models, for an output folder made with other settings and for
    a manifest that was edited; its subclass ``DiskError`` where nothing more can be written, after which the run can
    go on.
    """
    source, out = Path(source), Path(out)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise IdmFastError(f"workers must be a whole number >= 1, got {workers!r}")
    check_apart(source, out)
    listing = list_pictures(source, options.aligned, options.ext, options.limit)
    check_places(out, [place for task in listing.tasks for place in (task.output, task.name)])
    setup = Setup(Path(os.path.realpath(source)), Path(os.path.realpath(out)), str(model), options, listing.aligned)
    settings = {"version": _VERSION, "source": str(setup.source), "model": model_files(model)}
    settings["options"] = options.lasting() | {"aligned": listing.aligned}
    runner = _runner(workers, ray)
    with opened(out, settings):
        summary = CleanSummary(str(out), str(out / MANIFEST), taken_as=listing.taken_as, total=len(listing.tasks))
        _Run(setup, listing, runner, summary, progress).run()
        if listing.columns:
            summary.faces_csv = str(out / FACES_CSV)
            _write_table(out, listing)
    return summary


class _Run:
    """The pictures that are left: done by the runner, written down here and nowhere else."""

    def __init__(
        self, setup: Setup, listing: Listing, runner: Runner, summary: CleanSummary, progress: Progress | None
    ) -> None:
        self.setup, self.tasks, self.runner, self.summary, self.progress = (
            setup, listing.tasks, runner, summary, progress,
        )  # fmt: skip
        self.path = setup.out / MANIFEST
        self.results: dict[str, tuple[str, str | None]] = {}  # result and output, by picture: all that is remembered

    def run(self) -> None:
        summary = self.summary
        self._resume()
        self._tell(None)
        left = [task for task in self.tasks if task.name not in self.results]
        if not left:
            return
        with manifest.Writer(self.path) as writer:
            tasks = with_duplicates(self.setup.source, self.tasks)
            firsts = [task for task in tasks if task.name not in self.results and task.duplicate_of is None]
            started = time.perf_counter()
            records = self.runner(self.setup, firsts) if firsts else iter(())
            try:
                for record in self._with_repeats(records, tasks):
                    writer.append(record)
                    self._note(record)
                    summary.seconds = time.perf_counter() - started
                    self._tell(record)
            finally:
                if hasattr(records, "close"):
                    records.close()  # threads and workers end before the output folder is given up

    def _with_repeats(self, records: Iterator[Record], tasks: list[Task]) -> Iterator[Record]:
        yield from records
        for task in tasks:
            if task.duplicate_of is not None and task.name not in self.results:
                yield repeated(self.setup, task, task.duplicate_of, *self.results[task.duplicate_of])

    def _resume(self) -> None:
        """Takes over what earlier runs did, as far as it is still true; the rest is taken out of the manifest."""
        tasks = {task.name: task for task in self.tasks}
        stale: set[str] = set()
        held: set[str] = set()
        outdated: set[str] = set()
        for record in manifest.scan(self.path):
            task = tasks.get(record["file"])
            there = record["result"] != "failed" and self._is_there(record)
            changed = there and task is not None and self._is_changed(record, task)
            if there and not changed:
                held.add(record["output"])
                if task is not None:
                    self._note(record)
                continue
            stale.add(record["file"])
            if changed and task is not None and task.length >= 0:  # and not just out of reach
                outdated.add(record["output"])
        # What is made of an original now may have another name, or fail; gone before the manifest forgets it.
        for output in outdated - held:
            self._remove(output)
        if stale:
            manifest.rewrite(self.path, stale)
        self.summary.before = self.summary.done

    def _is_there(self, record: Record) -> bool:
        """Whether a record's file is as it says."""
        try:
            return (self.setup.out / str(record["output"])).stat().st_size == int(record["output_bytes"])
        except OSError:
            return False

    def _is_changed(self, record: Record, task: Task) -> bool:
        """Whether a picture is another one than when its record was written, or is to be treated otherwise."""
        if (record.get("bytes"), record.get("asked")) != (task.length, task.asked):
            return True
        if record.get("mtime_ns", task.mtime_ns) == task.mtime_ns:  # a record of before has none
            return False
        try:  # written since, or a copy of the whole folder: only then is it read
            return content_digest((self.setup.source / task.name).read_bytes()) != record.get("digest")
        except OSError:  # what cannot be read now was not seen to change
            return False

    def _remove(self, output: str) -> None:
        place = PurePosixPath(output)
        if place.is_absolute() or ".." in place.parts:
            return
        try:
            (self.setup.out / place).unlink(missing_ok=True)
        except OSError as error:
            why = error.strerror or error
            raise manifest.DiskError(
                f"{self.setup.out / place}: cannot be removed, and is of an original that changed: {why}"
            ) from None

    def _note(self, record: Record) -> None:
        self.results[record["file"]] = (record["result"], record.get("output"))
        self.summary.count(record["result"])

    def _tell(self, record: Record | None) -> None:
        if self.progress is not None:
            self.progress(self.summary.done, self.summary.total, self.summary, record)


def _runner(workers: int, ray: bool) -> Runner:
    if ray:
        from idm_fast.clean.ray_data import check_ray, run_on_ray  # an optional package

        check_ray()
        return lambda setup, tasks: run_on_ray(setup, tasks, workers)
    if workers > 1:
        return lambda setup, tasks: run_workers(setup, tasks, workers)
    return lambda setup, tasks: Cleaner(setup).run(tasks)


def _write_table(out: Path, listing: Listing) -> None:
    """The source's ``faces.csv`` with each file's new name and what became of it; rows of failed pictures, which have
    no file, are left out."""
    found: dict[str, tuple[str, ...]] = {}
    for record in manifest.scan(out / MANIFEST):
        if record["result"] != "failed":
            face = (record.get("faces") or [{}])[0]
            became = record.get("first", record["result"])
            measured = [face.get(column) for column in FACE_COLUMNS[1:]]
            texts = ["" if value is None else str(value) for value in measured]
            found[record["file"]] = (str(record["output"]), str(became), *texts)
    columns = [*listing.columns, *(name for name in FACE_COLUMNS if name not in listing.columns)]
    with (
        atomic(out / FACES_CSV) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.DictWriter(file, columns, extrasaction="ignore", restval="")
        writer.writeheader()
        for row in listing.rows:
            if row["file"] in found:
                output, *values = found[row["file"]]
                writer.writerow(row | {"file": output} | dict(zip(FACE_COLUMNS, values, strict=True)))
