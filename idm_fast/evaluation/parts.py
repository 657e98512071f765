"""Finished parts of an evaluation on disk, so that one that was interrupted goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from idm_fast.errors import IdmFastError
from idm_fast.files import atomic

Part = dict[str, Tensor]


class Parts:
    """A folder of named parts, each a whole file or absent, that belong to one ``settings``.

    Raises ``IdmFastError`` when the folder holds parts of other settings, which would mix two answers.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        settings = json.loads(json.dumps(settings))  # as it comes back from the file
        file = folder / "settings.json"
        others = [path for path in folder.glob("*") if path != file and not path.name.startswith(".")]  # or unfinished
        if not others:  # nothing is finished, so there is nothing to mix
            with atomic(file) as path:
                path.write_text(json.dumps(settings, indent=1) + "\n")
        elif file.is_file():
            self._check(file, settings)
        else:
            raise IdmFastError(f"{folder}: must hold unfinished parts with their settings.json, got other files")

    def get_or(self, name: str, make: Callable[[], Part]) -> Part:
        """The part ``name``, from disk where it is finished, else from ``make`` and then on disk."""
        file = self.folder / f"{name}.safetensors"
        if file.is_file():
            try:
                return load_file(file)
            except (OSError, safetensors.SafetensorError) as error:
                raise IdmFastError(f"{file}: must be a finished part, got {error}; remove it") from None
        part = {key: tensor.cpu().contiguous() for key, tensor in make().items()}
        with atomic(file) as path:
            save_file(part, path)
        return part

    def remove(self) -> None:
        """Once the results are written: the parts are in them."""
        shutil.rmtree(self.folder)

    def _check(self, file: Path, settings: dict[str, Any]) -> None:
        again = f"remove {file.parent} to begin anew"
        try:
            before = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise IdmFastError(f"{file}: cannot be read: {error}; {again}") from None
        if before == settings:
            return
        if not isinstance(before, dict):
            raise IdmFastError(f"{file}: must hold settings, got {type(before).__name__}; {again}")
        key = next(key for key in [*settings, *before] if settings.get(key) != before.get(key))
        raise IdmFastError(
            f"{file.parent}: holds an unfinished evaluation with other settings: {key} must be "
            f"{_short(before.get(key))}, got {_short(settings.get(key))}; {again}"
        )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
