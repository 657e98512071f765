"""Reads torch's own files, which are pickles, without running anything that is in them.

torch's ``weights_only`` unpickler does the reading: it calls nothing but what rebuilds tensors. Files of Lightning
also name classes of their trainer, which it would refuse: a fixed list of such harmless names is answered by an inert
stand-in, and any other global is refused by name before the unpickler starts.
"""

from __future__ import annotations

import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch

from idm_fast.errors import IdmFastError

_ZIP = b"PK\x03\x04"
_LARGEST_PICKLE = 16 << 20  # bytes of the program itself, without the tensors; a network of 1000 tensors has 200,000
_EARLY_PICKLES = 5  # before torch 1.6: magic number, version, system, the object, names of its storages
# What the trainers of the public families leave in their files. None of it is imported, all of it is a stand-in.
_HARMLESS_PACKAGES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "ml_collections.")
_HARMLESS = {
    "typing.Any", "builtins.dict", "builtins.list", "builtins.tuple", "builtins.set", "builtins.int", "builtins.float",
    "builtins.str", "builtins.bool", "builtins.NoneType", "argparse.Namespace", "pathlib.PosixPath", "pathlib.Path",
    "pathlib.WindowsPath", "collections.defaultdict", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype",
    "_codecs.encode",
}  # fmt: skip
# What a file of nothing but tensors names.
_REBUILDS = re.compile(
    r"collections\.OrderedDict|torch\.(_utils\._rebuild_\w+|_tensor\._rebuild_\w+|(storage\.)?\w*Storage)"
)
_TABLES = {"pytorch_lightning.utilities.parsing.AttributeDict", "lightning.fabric.utilities.data.AttributeDict"}


class _StandIn:
    """Takes the place of a class of a trainer: it accepts whatever it is made of, and keeps nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> _StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def looks_like_torch(start: bytes) -> bool:
    """Whether a file that begins so is a zip (torch 1.6 and later) or a bare pickle (earlier)."""
    return start.startswith(_ZIP) or (start[:1] == b"\x80" and len(start) > 1 and start[1] <= 5)


def load_torch(path: Path) -> Any:
    """What ``torch.save`` wrote, its tensors on the CPU and mapped from disk where the file allows it.

    Raises ``IdmFastError`` naming the file, and the global when the pickle asks for one that is not admitted.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == _ZIP
    named = _globals(BytesIO(_zip_program(path))) if zipped else _bare_globals(path)
    refused = sorted(name for name in named if not _admitted(name))
    if refused:
        raise IdmFastError(
            f"{path}: refused the global {_shown(refused)}: a weights file must only rebuild tensors, "
            f"and nothing in it is run"
        )
    stand_ins: list[Any] = [
        (OrderedDict if name in _TABLES else _StandIn, name) for name in sorted(named) if _is_harmless(name)
    ]
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about storages that are deprecated
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged pickle raises nearly any type: EOFError, KeyError, RuntimeError, ...
        raise IdmFastError(f"{path}: {_reason(error, named)}") from None


def _zip_program(path: Path) -> bytes:
    """The pickle inside; refuses archives that unpack to more than they are."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            size, unpacked = path.stat().st_size, sum(entry.file_size for entry in entries)
            if unpacked > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise IdmFastError(
                    f"{path}: must be a torch file, which is not compressed = at most {size} bytes inside, "
                    f"got {unpacked} bytes inside"
                )
            programs = [
                entry for entry in entries if entry.filename.count("/") == 1 and entry.filename.endswith("/data.pkl")
            ]
            if len(programs) != 1:
                found = [entry.filename[:40] for entry in entries[:5]]
                raise IdmFastError(f"{path}: must be a torch file = an archive with one data.pkl, got {found}")
            if programs[0].file_size > _LARGEST_PICKLE:
                raise IdmFastError(
                    f"{path}: data.pkl must have at most {_LARGEST_PICKLE} bytes, got {programs[0].file_size}"
                )
            if any(entry.filename.endswith("/constants.pkl") for entry in entries):
                raise IdmFastError(f"{path}: must hold weights, got a TorchScript program, which is not run")
            return archive.read(programs[0])
    except IdmFastError:  # which is a ValueError
        raise
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, ValueError) as error:
        raise IdmFastError(f"{path}: is not a whole torch file: {error}") from None


def _bare_globals(path: Path) -> set[str]:
    with path.open("rb") as file:
        return _globals(file)


def _globals(file: IO[bytes]) -> set[str]:
    """Names ("module.name") that the pickles at the beginning of ``file`` would import; nothing is run.

    This reading is for the message and the stand-ins: what it might miss still meets torch's own refusal.
    """
    found: set[str] = set()
    with suppress(Exception):  # a damaged or unusual pickle: torch judges it
        for _ in range(_EARLY_PICKLES):
            words = [""]  # the last two texts
            memo: dict[int, str] = {}
            for opcode, argument, _position in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "INST"):
                    found.add(str(argument).replace(" ", ".", 1))
                elif opcode.name == "STACK_GLOBAL":
                    found.add(".".join(words[-2:]))
                elif "UNICODE" in opcode.name or "STRING" in opcode.name:
                    words = [*words[-1:], str(argument)]
                elif opcode.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
                    memo[len(memo) if argument is None else int(argument)] = words[-1]
                elif opcode.name in ("BINGET", "LONG_BINGET") and argument in memo:
                    words = [*words[-1:], memo[argument]]
    return {_renamed(name) for name in found}


def _renamed(name: str) -> str:
    """Python 2's name of the built-ins, which torch reads as today's."""
    return name.replace("__builtin__.", "builtins.", 1) if name.startswith("__builtin__.") else name


def _shown(names: list[str]) -> str:
    """The first of them for a message: the file chose them, so neither long nor with control characters."""
    return ", ".join(name if name.isprintable() and len(name) <= 100 else repr(name[:100]) for name in names[:3])


def _is_harmless(name: str) -> bool:
    return name in _HARMLESS or name.startswith(_HARMLESS_PACKAGES)


def _admitted(name: str) -> bool:
    """torch's own names are for torch's unpickler to judge."""
    return _is_harmless(name) or name == "collections.OrderedDict" or name.startswith("torch.")


def _reason(error: Exception, named: set[str]) -> str:
    """torch's refusal in one line. Of what it does not name itself, the likely cause."""
    text = " ".join(str(error).split())
    asked = re.search(r"(?:GLOBAL|function) (?:GLOBAL )?([\w.]+)", text)
    unusual = sorted(name for name in named if not _is_harmless(name) and not _REBUILDS.fullmatch(name))
    culprit = asked[1] if asked and ("llow" in text or "blocked" in text) else _shown(unusual)
    if culprit:
        return f"refused the global {culprit}: a weights file must only rebuild tensors, and nothing in it is run"
    text = text.rpartition("WeightsUnpickler error: ")[2].partition("Check the documentation")[0].strip()
    return f"is not a whole torch file that holds only tensors: {text[:200] or type(error).__name__}"
