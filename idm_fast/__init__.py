"""Restores faces in photographs with diffusion models, fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["IdmFastError", "Restorer", "__version__"]

from idm_fast.errors import IdmFastError

if TYPE_CHECKING:
    from idm_fast.restorer import Restorer


def __getattr__(name: str) -> Any:
    # The restorer brings torch with it; ``idm-fast --version`` and the kernels must not wait for everything.
    if name == "Restorer":
        from idm_fast.restorer import Restorer

        return Restorer
    raise AttributeError(f"module 'idm_fast' has no attribute {name!r}")
