"""Faces in a picture: found, cut out in the FFHQ framing, and put back without a seam.

The functions ``align.align`` and ``paste.paste`` are not repeated here: they would hide the modules of their name.
"""

from idm_fast.faces.align import TEMPLATE, AlignedFace, crop_face, locate
from idm_fast.faces.detect import Face, FaceDetector, shared_detector
from idm_fast.faces.pipeline import crop_of, crops_of, find_faces, paste_faces, upscaled, whole_picture

__all__ = [
    "TEMPLATE",
    "AlignedFace",
    "Face",
    "FaceDetector",
    "crop_face",
    "crop_of",
    "crops_of",
    "find_faces",
    "locate",
    "paste_faces",
    "shared_detector",
    "upscaled",
    "whole_picture",
]
