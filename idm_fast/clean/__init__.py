"""The data-set cleaner: originals in, the enhanced set out, with a record of what became of each picture.

It is the extrinsic half of IDM (arXiv 2307.08996): a restorer enhances the pictures that the next one is trained on.
"""

from idm_fast.clean.manifest import DiskError
from idm_fast.clean.options import CleanOptions, CleanSummary
from idm_fast.clean.session import clean

__all__ = ["CleanOptions", "CleanSummary", "DiskError", "clean"]
