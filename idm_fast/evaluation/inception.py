"""The features of FID: the Inception network of clean-fid or torch-fidelity, where the user has it and its weights.

Neither library nor weights come with this package, and nothing is downloaded: both libraries would fetch the weights
by themselves, so the file is looked for first. FID: Heusel et al., NeurIPS 2017; how pictures are resized to 299 px
differs between the two (clean-fid: Parmar et al., CVPR 2022), so the label says which one it was.
"""

from __future__ import annotations

import importlib
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from idm_fast.errors import IdmFastError

LIBRARIES = ("clean-fid", "torch-fidelity")
_FILES = {"clean-fid": "inception-2015-12-05.pt", "torch-fidelity": "weights-inception-2015-12-05-6726825d.pth"}
_URLS = {
    "clean-fid": "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/",
    "torch-fidelity": "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/",
}
_SIDE = 299


class Inception:
    """``self(images)``: 2048 features of each image, by the named library.

    ``weights``: the file, default where the library keeps it. Raises ``IdmFastError`` where one of both is missing.
    """

    def __init__(self, library: str, weights: Path | None = None, device: str | torch.device = "cpu") -> None:
        if library not in LIBRARIES:
            raise IdmFastError(f"FID: library must be one of {', '.join(LIBRARIES)}, got {library!r}")
        self.device = device
        try:
            version = metadata.version(library)
            module = importlib.import_module(_MODULES[library])
        except (metadata.PackageNotFoundError, ImportError) as error:
            raise IdmFastError(
                f"FID needs {library}, which cannot be imported ({error}): pip install {library}"
            ) from None
        file = weights or _usual_place(library)
        if not file.is_file():
            raise IdmFastError(
                f"FID by {library} needs its weights in {file}, which is not there and is not downloaded: "
                f"get {_URLS[library]}{_FILES[library]} and put it there, or name it with --fid-weights"
            )
        self.name = f"{library} {version}"
        try:
            self.network: Any = (_clean_fid if library == "clean-fid" else _torch_fidelity)(module, file).to(device)
        except Exception as error:  # whatever unpickling a wrong file may raise
            raise IdmFastError(f"{file}: must hold the weights of {library}'s Inception network, got {error}") from None
        self.resizes = library == "torch-fidelity"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features [N, 2048] float32 of ``images`` [N, 3, H, W] in [-1, 1], seen as 8-bit pictures."""
        pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        if self.resizes:
            features: Tensor = self.network(pixels.to(self.device))[0]
        else:
            features = self.network(torch.stack([_resized(picture) for picture in pixels.cpu()]).to(self.device))
        return features.float()


_MODULES = {"clean-fid": "cleanfid.inception_torchscript", "torch-fidelity": "torch_fidelity"}


def _usual_place(library: str) -> Path:
    """Where the library itself would look, and otherwise put its download."""
    folder = Path(tempfile.gettempdir()) if library == "clean-fid" else Path(torch.hub.get_dir()) / "checkpoints"
    return folder / _FILES[library]


def _clean_fid(module: Any, file: Path) -> Any:
    if file.name == _FILES["clean-fid"]:
        return module.InceptionV3W(str(file.parent), download=False, resize_inside=False)
    with tempfile.TemporaryDirectory() as folder:  # the library insists on the file's name
        (Path(folder) / _FILES["clean-fid"]).symlink_to(file.resolve())
        return module.InceptionV3W(folder, download=False, resize_inside=False)


def _torch_fidelity(module: Any, file: Path) -> Any:
    return module.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(file))


def _resized(picture: Tensor) -> Tensor:
    """A picture uint8 [3, H, W] as float32 [3, 299, 299] in 0 .. 255, by an antialiased cubic, as clean-fid does it."""
    planes = [Image.fromarray(plane.float().numpy()) for plane in picture]
    shown = [np.asarray(plane.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)) for plane in planes]
    return torch.from_numpy(np.stack(shown)).clamp(0, 255)
