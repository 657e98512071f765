"""What several commands ask of their arguments before any work. All that is wrong ends in exit code 2."""

from __future__ import annotations

import argparse

from idm_fast.errors import IdmFastError
from idm_fast.kernels.dispatch import BackendError, use_backend

MOST_THREADS = 1024


def check_threads(count: int) -> None:
    if not 1 <= count <= MOST_THREADS:
        raise IdmFastError(f"--threads must be {'>= 1' if count < 1 else f'<= {MOST_THREADS}'}, got {count}")


def check_backend(names: str | None) -> None:
    """That tables know the names; whether one can run here is asked call by call."""
    try:
        with use_backend(names):
            pass
    except BackendError as error:
        raise IdmFastError(f"--{error}") from None


def number_or_none(text: str) -> float | None:
    """A bound as it is typed."""
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or none, got {text!r}") from None


def add_bounds(
    parser: argparse._ActionsContainer, prefix: str, identity_distance: float | None, low_frequency: float | None
) -> None:
    """The cleaner's two bounds as options that begin with ``prefix``, with their defaults."""
    parser.add_argument(
        f"{prefix}max-identity-distance", type=number_or_none, default=identity_distance, metavar="D",
        help="recognition distance to the original, or 'none' to go without recognition (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        f"{prefix}max-low-frequency", type=number_or_none, default=low_frequency, metavar="D",
        help="difference of 16 x 16 thumbnails, 0..1, or 'none' (default: %(default)s)",
    )  # fmt: skip
