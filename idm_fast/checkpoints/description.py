"""What a model file is, as plain data; its weights are not read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from idm_fast.checkpoints import native
from idm_fast.checkpoints.kinds import kind_of
from idm_fast.checkpoints.opening import is_native, open_foreign, refuse_answers


def describe(
    path: str | Path, settings: Mapping[str, Any] | None = None, format: str = "auto", *, averaged: bool | None = None
) -> dict[str, Any]:
    """Keys ``file``, ``bytes``, ``format``, ``family``, ``kind``, ``parameters``, ``tensors``, ``config``, ``notes``,
    ``license``, ``source``, ``missing`` (settings that had to be assumed: name, assumed, allowed, decides).

    Arguments and errors as for ``load``.
    """
    path = Path(path)
    if is_native(path):
        refuse_answers(path, settings, format, averaged)
        made = native.inspect(path)
        said = {"file": str(path), "bytes": path.stat().st_size, "format": "native", "family": "a file of this project"}
        return said | _network(made.module, made.config) | {
            "notes": made.notes, "license": made.license, "source": made.source, "missing": [],
        }  # fmt: skip
    opened = open_foreign(path, settings, format, averaged=averaged, lenient=True)
    family = f"{opened.format.title} ({opened.source.container})"
    said = {"file": str(path), "bytes": opened.source.bytes, "format": opened.format.name, "family": family}
    return said | _network(opened.reading.module, opened.reading.config) | {
        "notes": {}, "license": opened.source.metadata.get("license", ""), "source": opened.provenance(),
        "missing": opened.settings.missing(),
    }  # fmt: skip


def _network(module: nn.Module, config: Any) -> dict[str, Any]:
    count = sum(parameter.numel() for parameter in module.parameters())
    return {
        "kind": kind_of(config).name, "parameters": count, "tensors": len(module.state_dict()),
        "config": config.to_dict(),
    }  # fmt: skip
