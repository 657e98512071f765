"""How far a restored face is from its original, and how sharp and how noisy both are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from idm_fast.engine.precision import default_dtype
from idm_fast.errors import IdmFastError
from idm_fast.face_model import FaceModel
from idm_fast.faces.align import WHOLE, AlignedFace, crop_face
from idm_fast.faces.sharpness import FloatArray, face_luma, grain, sharpness
from idm_fast.models.recognition import Recognition, crop_chip

_BANDS = 16  # thumbnail in which low frequencies are compared; a paste holds those of an 8 x 8 one fixed
_LOOK_PX = 224  # crop in which a face of a photograph is looked at: dlib's chip of 150 pixels is 0.676 of it


def low_frequency(before: Tensor, after: Tensor) -> float:
    """sqrt(mean((T(after) - T(before))^2)), 0..1, with T the 16 x 16 thumbnail (area means) of a face's crop.

    ``before``, ``after``: [3, S, S] in [-1, 1] RGB. A changed expression, outline or light shows here; finer detail
    does not. Linear in the change: half of the change has half of the difference.
    """
    thumbnail = F.adaptive_avg_pool2d(((after - before) / 2)[None], min(_BANDS, before.shape[-1]))
    return float(thumbnail.square().mean().sqrt())


def look(pixels: FloatArray, face: AlignedFace) -> Tensor:
    """The face's crop [3, S, S] in [-1, 1], as the measures see it; of a picture that is itself a crop, all of it."""
    height, width = pixels.shape[:2]
    if face.method == WHOLE:
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).mul(2).sub_(1)
    return crop_face(pixels, face, min(_LOOK_PX, max(8, round(min(height, width, face.native_px)))))


def estimates(pixels: FloatArray, face: AlignedFace) -> tuple[float, float]:
    """(sharpness, noise) of the face, both 0..1: see ``faces.sharpness.sharpness`` and ``grain``."""
    luma = face_luma(pixels, face)
    return sharpness(luma), grain(luma)


class Identity:
    """Recognition embeddings of many faces at once, in the number format that the device does best.

    bf16 moves a distance by at most 0.003 on faces and takes 0.6 of the time. Raises ``IdmFastError``, with the way to
    do without, where the recognition network is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            network = Recognition()
        except IdmFastError as error:
            raise IdmFastError(f"{error}; or leave the identity rule out: --max-identity-distance none") from None
        self.device, self.dtype = device, default_dtype(device)
        self.network = network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for part in (network.stem, network.blocks):  # the projection stays exact
            part.to(self.dtype)

    @torch.inference_mode()
    def embed(self, crops: Sequence[Tensor]) -> Tensor:
        """Embeddings [N, 128] float32, on the CPU, of crops [3, S, S] in [-1, 1]; sizes may differ."""
        chips = torch.cat([crop_chip(crop[None].to(self.device)) for crop in crops])
        found: Tensor = self.network(chips.contiguous(memory_format=torch.channels_last))
        return found.cpu()


def device_of(models: Sequence[FaceModel]) -> torch.device:
    return models[0].device
