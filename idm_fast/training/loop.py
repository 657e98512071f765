"""What every training run does around its steps: resume, time budget, log, state, sheets, the model file."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from idm_fast.checkpoints import native
from idm_fast.errors import IdmFastError
from idm_fast.files import clear_unfinished
from idm_fast.training import distributed
from idm_fast.training.data import fingerprint, list_faces
from idm_fast.training.ema import Ema
from idm_fast.training.log import Log
from idm_fast.training.settings import RunSettings
from idm_fast.training.state import Stateful, load_state, save_state

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class RunConfig(Protocol):
    """What a model file says of its network: frozen settings with a name."""

    @property
    def name(self) -> str: ...

    def to_dict(self) -> dict[str, Any]: ...


Config = TypeVar("Config", bound=RunConfig)
Model = TypeVar("Model", bound=nn.Module)


class Loop(ABC, Generic[Config, Model]):
    """A run of ``settings`` that trains the network that ``build`` makes; a subclass says what a step is.

    ``config``: of the model file. ``group``: processes that have joined already and stay together after the run.
    Raises ``IdmFastError`` for an ``out`` that is a file, and for a precision that the device has not got.
    """

    def __init__(
        self,
        settings: RunSettings,
        config: Config,
        build: Callable[[], Model],
        group: distributed.Group | None = None,
    ) -> None:
        if settings.out.exists() and not settings.out.is_dir():
            raise IdmFastError(f"{settings.out}: must be a folder or a new name, got a file")
        self._run = settings
        self.faces = list_faces(settings.data, "train", settings.min_native_px)
        self._compared = settings.to_dict() | fingerprint(self.faces, settings.data)
        self.config: Config = config
        self._stays = group is not None
        self.group = group or distributed.join()
        self.device = self.group.device
        if self.device.type == "cpu" and settings.precision == "fp16":
            raise IdmFastError("precision must be fp32 or bf16 on a CPU, got fp16")
        torch.manual_seed(settings.seed)
        self.model: Model = build().to(self.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = Ema(self.model, settings.ema_decay)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.state_file = settings.out / "state.pt"
        self.step, self.seconds = 0, 0.0
        self.network: nn.Module = self.model

    def parts(self) -> dict[str, Stateful]:
        """All that a step changes, by its name in the state file."""
        return {"model": self.model, "ema": self.ema.model, "optimizer": self.optimizer, "scaler": self.scaler}

    def resume(self, network: nn.Module | None = None) -> None:
        """Goes on from ``out / state.pt`` where it is there, and spreads the network over the group.

        ``network``: a step's own way of calling the model.
        """
        if self.group.is_main:
            for path in (self.state_file, self.state_file.with_name("model.safetensors")):
                clear_unfinished(path)  # a killed run's, each as large as the whole one
        if self.state_file.exists():
            self.step, self.seconds = load_state(self.state_file, self._compared, self.parts(), self.config.name)
        if self.step > self._run.steps:
            raise IdmFastError(f"{self.state_file}: steps must be >= the {self.step} done, got {self._run.steps}")
        main = self.group.agree(self.step)
        if self.step != main:
            raise IdmFastError(
                f"{self.state_file}: every process must read the same state = step {main}, got {self.step}"
            )
        self.network = self.group.wrap(network or self.model)

    def run(self, budget_minutes: float | None = None) -> None:
        """Trains to ``settings.steps``, or until ``budget_minutes`` have passed (the state is kept: run again).

        Either way ``out / model.safetensors`` holds the averaged weights at the end.
        """
        s, main = self._run, self.group.is_main
        started, before = time.monotonic(), self.seconds
        # None: shown in a terminal only; elsewhere log.csv tells the same without a line for every redraw.
        bar = tqdm(total=s.steps, initial=self.step, unit="step", disable=None if main else True, smoothing=0.02)
        with bar, Log(s.out, main, self.step) as log:
            for terms in self._steps():
                self.step += 1
                self.seconds = before + time.monotonic() - started
                over = budget_minutes is not None and self.seconds - before > 60 * budget_minutes
                last = bool(self.group.agree(over)) or self.step == s.steps
                log.add(self.step, self.seconds, s.learning_rate_at(self.step - 1), terms, last)
                bar.update()
                bar.set_postfix(log.shown())
                if main and (last or self.step % s.save_every == 0):
                    save_state(self.state_file, self.step, self.seconds, self._compared, self.parts())
                if main and (self.step % s.sheet_every == 0 or self.step == s.steps):
                    self._draw(s.out / "sheets" / f"{self.step:06d}.png")
                if last:
                    break
        if main:
            self.export()
            more = "" if self.step == s.steps else "; the same command goes on"
            print(f"{s.out}: step {self.step} of {s.steps}, wrote model.safetensors{more}", file=sys.stderr)
        if not self._stays:
            self.group.leave()

    def export(self) -> None:
        """Writes the averaged weights as ``out / model.safetensors`` in fp16."""
        native.save(self._run.out / "model.safetensors", self.ema.model, self.config, self._notes(), torch.float16)

    def _notes(self) -> dict[str, Any]:
        """What the model file says of how it was made."""
        return {"settings": self._run.notes(), "steps": self.step, "hours": round(self.seconds / 3600, 3)}

    @abstractmethod
    def _steps(self) -> Iterator[dict[str, float]]:
        """The terms of each step from ``self.step`` to the last, which it makes when asked for the next."""

    @abstractmethod
    def _draw(self, path: Path) -> None:
        """Writes a sheet (PNG) that shows how the averaged weights are doing."""

    def _first(self) -> int:
        """Position in the run of this step's first item; process r of n has items r, r + n, r + 2n, ... of a step."""
        return self.step * self._run.batch_size * self.group.size

    def _set_rate(self) -> None:
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self._run.learning_rate_at(self.step)

    def _autocast(self) -> AbstractContextManager[None]:
        dtype = _AUTOCAST.get(self._run.precision)
        return torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None)
