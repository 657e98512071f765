"""Extrinsic iterative enhancement: the restorer cleans its own training targets and learns from them (IDM, 2307.08996).

    R_0 = train(D_0);   D_(r+1) = clean(D_0 by R_r);   R_(r+1) = fine-tune(R_r on D_(r+1))

Published pictures called clean are often soft, compressed and noisy, and a restorer can be no better than its targets.
Training is the intrinsic loop (intrinsic.py), cleaning keeps identity and content (idm_fast.clean).
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from idm_fast.checkpoints import native
from idm_fast.clean import CleanSummary, clean
from idm_fast.clean.folder import check_apart
from idm_fast.config import PRESETS
from idm_fast.diffusion import Schedule, build_table
from idm_fast.errors import IdmFastError
from idm_fast.files import atomic, clear_unfinished
from idm_fast.registry import find_files
from idm_fast.training import distributed, judging, round_table
from idm_fast.training.data import fingerprint, list_faces
from idm_fast.training.intrinsic import Trainer, trainable
from idm_fast.training.rounds import Ledger, Part, RoundSettings, digest
from idm_fast.training.settings import TrainSettings

_LEAST_MINUTES = 1e-9  # a budget that is used up still buys one step, so that every call comes forward


class _OutOfTimeError(Exception):
    """Raised from a progress callback: what is done so far is kept."""


def _stopper(minutes: float | None) -> Callable[[], None]:
    """To be called now and then: raises when ``minutes`` from now have passed."""
    end = None if minutes is None else time.monotonic() + 60 * minutes

    def stop() -> None:
        if end is not None and time.monotonic() > end:
            raise _OutOfTimeError

    return stop


class Rounds:
    """One run of rounds: ``Rounds(settings).run()``. Goes on where an earlier call with the same settings stopped.

    Every process of a group makes one; process 0 alone cleans and judges. Raises ``IdmFastError`` before any work for
    data, models or settings that do not fit.
    """

    def __init__(self, settings: RoundSettings) -> None:
        first = settings.first
        if first.out.exists() and not first.out.is_dir():
            raise IdmFastError(f"{first.out}: must be a folder or a new name, got a file")
        self.settings = settings
        find_start(None if first.init_from is None else str(first.init_from), first.preset)
        self.config = trainable(first.preset) if first.init_from is None else native.load(first.init_from).config
        self.faces = list_faces(first.data, "train")
        for number in (0, 1):  # of the first and of a later training, that a face is left
            list_faces(first.data, "train", settings.training(Part("train", number)).min_native_px)
        self._check_cleaning()
        if settings.judge is not None:
            judging.check(settings.judge, first.data)
        self.ledger = Ledger(first.out / "rounds.json")  # that of process 0 is the one that counts
        self.group = distributed.Group(0, 1, distributed.own_device())

    def _check_cleaning(self) -> None:
        """What the cleaner will refuse, before the hours that R_0 may take."""
        check_apart(self.settings.first.data, self.settings.first.out)
        s, d = self.settings.clean.sampling.resolved(self.config), self.config.diffusion
        if s.strength is None or not 0 < s.strength <= 1:
            raise IdmFastError(f"cleaning: strength must lie in (0, 1], got {s.strength}")
        build_table(Schedule.from_config(d), d.prediction, s.sampler or "ddim", s.steps, start=s.strength)

    def run(self, budget_minutes: float | None = None) -> bool:
        """Does all parts that are not finished; False when ``budget_minutes`` were over before (run it again)."""
        self.group = distributed.join(patient=True)
        self.group.on_main(self._open)
        started, worked, finished = time.monotonic(), False, True
        for part in self.settings.parts():
            if self.group.agree(int(self.group.is_main and self._is_finished(part))):
                continue
            left = None if budget_minutes is None else budget_minutes - (time.monotonic() - started) / 60
            over = worked and left is not None and left <= 0
            if self.group.agree(int(over)) or not self._do(part, left):
                self._say(f"stopped before the end of {part.kind} {part.name}; the same command goes on")
                finished = False
                break
            worked = True
        if finished:
            self.group.on_main(self._write_table)
            self._say(f"{self.settings.rounds} rounds finished, see table.md")
        self.group.leave()
        return finished

    def _say(self, text: str) -> None:
        if self.group.is_main:
            print(f"{self.settings.first.out}: {text}", file=sys.stderr, flush=True)

    def _open(self) -> None:
        self.ledger = Ledger.open(self.settings.first.out, self.settings.lasting(self.faces))
        for part in self.settings.parts():
            if part.kind == "train" and part.name in self.ledger.done:
                self._drop_state(part)  # of a run that was killed between its last two acts

    def _drop_state(self, part: Part) -> None:
        """The next training starts from the model alone, and the state is eight times as large."""
        state = self.settings.folder(part) / "state.pt"
        state.unlink(missing_ok=True)
        clear_unfinished(state)

    def _is_finished(self, part: Part) -> bool:
        return self._figures(part) is not None if part.kind == "judge" else part.name in self.ledger.done

    def _do(self, part: Part, minutes: float | None) -> bool:
        """Does ``part``, or what ``minutes`` of time allow of it; whether it is finished."""
        if part.kind == "train":
            return self._load(part) if self._is_given(part) else self._train(part, minutes)
        return self._clean(part, minutes) if part.kind == "clean" else self._judge(part, minutes)

    def _is_given(self, part: Part) -> bool:
        return part.round == 0 and self.settings.first.init_from is not None

    def _load(self, part: Part) -> bool:
        """R_0 is a model that there is already."""
        start, path = self.settings.first.init_from, self.settings.model(0)
        assert start is not None

        def work() -> None:
            with atomic(path) as temporary:
                shutil.copyfile(start, temporary)
            self.ledger.finish(part, {"steps": 0, "hours": 0.0, "start": start.name, "sha256": digest(path)})

        self._say(f"{part.name}: R_0 is {start.name}")
        self.group.on_main(work)
        return True

    def _train(self, part: Part, minutes: float | None) -> bool:
        settings = self.settings.training(part)
        self.group.on_main(lambda: self._check_inputs(part))
        self._say(f"{part.name}: training on {settings.data.name}, {settings.steps} steps")
        trainer = Trainer(settings, self.group, self.config)
        trainer.run(minutes if minutes is None else max(minutes, _LEAST_MINUTES))
        if trainer.step < settings.steps:
            return False

        def close() -> None:
            path = self.settings.model(part.round, part.control)
            hours, before = round(trainer.seconds / 3600, 4), self.settings.model(part.round - 1, part.control)
            start = before.parent.name if part.round else None
            facts = {"steps": trainer.step, "hours": hours, "start": start, "data": settings.data.name}
            self.ledger.finish(part, facts | {"sha256": digest(path)})
            self._drop_state(part)

        self.group.on_main(close)
        return True

    def _check_inputs(self, part: Part) -> None:
        """That what the parts before left for this one is still what it was."""
        if part.round:
            control = part.control and part.round > 1
            self.ledger.check_model(
                Part("train", part.round - 1, control), self.settings.model(part.round - 1, control)
            )
        if part.round and part.kind == "train" and not part.control:
            made = Part("clean", part.round)
            folder = self.settings.folder(made)
            done = self.ledger.done[made.name]
            for name, got in fingerprint(list_faces(folder, "train"), folder).items():
                expected = done.get(name, got)  # a record of before has no "bytes"
                if got != expected:
                    raise IdmFastError(
                        f"{folder}: must hold the faces that cleaning ended with, {name} = {expected}, got {got}"
                    )

    def _clean(self, part: Part, minutes: float | None) -> bool:
        s = self.settings
        source = s.data(0 if s.source == "original" else part.round - 1)
        model, folder = s.model(part.round - 1), s.folder(part)
        self._say(f"{part.name}: R_{part.round - 1} cleans {source.name}")

        def work() -> None:
            self._check_inputs(part)
            stop = _stopper(minutes)
            with tqdm(total=0, unit="picture", disable=None) as bar:

                def progress(done: int, total: int, summary: CleanSummary, record: dict[str, Any] | None) -> None:
                    bar.total = total
                    bar.update(done - bar.n)
                    if record is not None:  # a call with no record comes before the first picture
                        stop()

                summary = clean(source, folder, model, s.clean, workers=s.clean_workers, progress=progress)
            faces = fingerprint(list_faces(folder, "train"), folder)
            facts = {name: getattr(summary, name) for name in round_table.COUNTS}
            self.ledger.finish(part, {"source": source.name, "model": model.parent.name} | faces | facts)

        return self._within_time(work)

    def _key(self, part: Part) -> dict[str, Any]:
        """What the figures of a trained part are to be made of."""
        assert self.settings.judge is not None
        model, first = (self.ledger.done[each.name]["sha256"] for each in (part, Part("train", 0)))
        return judging.key(self.settings.judge, self.settings.first.data, model, first if part.round else None)

    def _figures(self, part: Part) -> judging.Figures | None:
        """What the model of ``part`` was judged to be, where that was done as it is asked for now."""
        return judging.read(self.settings.folder(part), self._key(part)) if part.name in self.ledger.done else None

    def _judge(self, part: Part, minutes: float | None) -> bool:
        s = self.settings

        def work() -> None:
            assert s.judge is not None
            self.ledger.check_model(part, s.model(part.round, part.control))
            first = s.folder(Part("train", 0)) if part.round else None
            judging.judge(
                s.folder(part), round_table.label(part.name), s.judge, s.first.data, self._key(part),
                device=self.group.device, first=first, between=_stopper(minutes),
            )  # fmt: skip
            self._write_table()

        self._say(f"{part.name}: judging")
        return self._within_time(work)

    def _within_time(self, work: Callable[[], None]) -> bool:
        """Process 0 does ``work``; whether it was not out of time before the end."""
        stopped = False

        def tried() -> None:
            nonlocal stopped
            try:
                work()
            except _OutOfTimeError:
                stopped = True

        self.group.on_main(tried)
        return not self.group.agree(int(stopped))

    def _write_table(self) -> None:
        """The table of what there is so far."""
        parts = self.settings.parts()
        figures = [found for part in parts if part.kind == "judge" and (found := self._figures(part)) is not None]
        done = {part.name: facts for part in parts if (facts := self.ledger.done.get(part.name)) is not None}
        round_table.write_table(self.settings.first.out, done, figures)


def find_start(model: str | None, preset: str | None) -> tuple[Path | None, str]:
    """The file of the model that is to be R_0 (a shipped name or a file; None: R_0 will be trained), and its preset.

    Raises ``IdmFastError`` for one that is not of ``preset``, or of none that can be trained.
    """
    if model is None:
        return None, preset or TrainSettings.preset
    files = find_files(model)
    found = [native.load(file).config for file in files]
    fits = [
        (file, name)
        for file, config in zip(files, found, strict=True)
        for name, known in PRESETS.items()
        if (known.unet, known.diffusion) == (config.unet, config.diffusion) and preset in (None, name)
    ]
    if len(fits) != 1:
        said = ", ".join(f"{config.name} for {config.unet.image_size} px" for config in found)
        raise IdmFastError(f"{model}: R_0 must be one model of preset {preset or 'that can be trained'}, got {said}")
    return fits[0]
