"""Model files: this project's own, and those of public model families.

``load`` reads any of them; ``convert`` makes one of ours of any of them, ``export`` a folder of diffusers; ``describe``
says what a file is.
"""

from idm_fast.checkpoints.conversion import convert, export
from idm_fast.checkpoints.description import describe
from idm_fast.checkpoints.formats import FORMATS
from idm_fast.checkpoints.native import Checkpoint
from idm_fast.checkpoints.opening import load

__all__ = ["FORMATS", "Checkpoint", "convert", "describe", "export", "load"]
