"""The layers of a network with their FLOPs (2 x multiply-add) and elements moved, counted from shapes alone.

The network as its family defines it: a nearest 2x with its convolution counts in full, although it can be computed with
4/9 of that; a convolution over the condition counts at every step. What depends on the time alone does not count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from idm_fast.config import UNetConfig
from idm_fast.config_vqgan import VqganConfig
from idm_fast.models.blocks import Attention
from idm_fast.models.unet import UNet
from idm_fast.models.vqgan import Vqgan

ONCE_A_RUN = ("time.", "label", ".embed")  # functions of the time, for all steps at once before the first


@dataclass(frozen=True)
class Layer:
    """``name``: the module's path; ``op``: "conv3x3", "conv1x1", "linear" or "attention". Elements, not bytes: the
    dtype comes later. Activations are read and written once each."""

    name: str
    op: str
    flops: int
    weight_elements: int
    activation_elements: int


def layers(config: UNetConfig, batch: int, height: int, width: int) -> tuple[Layer, ...]:
    """Every layer of one evaluation of our U-Net, in the order of execution."""
    with torch.device("meta"), torch.enable_grad():  # with gradients off our operations run, which no meta tensor has
        model = UNet(config)
        x = torch.empty(batch, config.in_channels, height, width)
        cond = torch.empty(batch, config.cond_channels, height, width) if config.cond_channels else None
        labels = torch.empty(batch, dtype=torch.int64) if config.num_classes else None
        found = count(model, x, torch.empty(batch), cond, labels)
    return tuple(layer for layer in found if not any(part in layer.name for part in ONCE_A_RUN))


def count(model: nn.Module, *inputs: Any) -> tuple[Layer, ...]:
    """The layers that one call of any module runs; attention is found in our own networks only."""
    found: list[Layer] = []
    hooks = []
    for name, module in model.named_modules():
        kind = {nn.Conv2d: _conv, nn.Linear: _linear, Attention: _attention}.get(type(module))
        if kind is not None:

            def hook(m: Any, args: tuple[Tensor, ...], out: Tensor, name: str = name, kind: Any = kind) -> None:
                found.append(kind(name, m, args[0], out))

            hooks.append(module.register_forward_hook(hook))
    try:
        model(*inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return tuple(found)


def autoencoder_layers(config: VqganConfig, batch: int, height: int, width: int) -> tuple[Layer, ...]:
    """Every layer of encoding and decoding once; the search of the codes is none."""
    with torch.device("meta"), torch.enable_grad():
        model, side = Vqgan(config), (height // config.factor, width // config.factor)
        x = torch.empty(batch, config.in_channels, height, width)
        z, latent = (torch.empty(batch, c, *side) for c in (config.z_channels, config.embed_channels))
        parts = ("encoder", x), ("to_latent", z), ("from_latent", latent), ("decoder", z)
        found = [count(getattr(model, name), given) for name, given in parts]
    return tuple(layer for part in found for layer in part)


def total_flops(found: Iterable[Layer]) -> int:
    return sum(layer.flops for layer in found)


def _conv(name: str, module: nn.Conv2d, x: Tensor, out: Tensor) -> Layer:
    weights = module.weight.numel()
    flops = 2 * out.shape[0] * out.shape[2] * out.shape[3] * weights
    op = "conv{}x{}".format(*module.kernel_size)
    return Layer(name, op, flops, weights, x.numel() + out.numel())


def _linear(name: str, module: nn.Linear, x: Tensor, out: Tensor) -> Layer:
    weights = module.weight.numel()
    rows = out.numel() // module.out_features
    return Layer(name, "linear", 2 * rows * weights, weights, x.numel() + out.numel())


def _attention(name: str, module: Attention, x: Tensor, out: Tensor) -> Layer:
    """q k^T and the product with v; the projections are convolutions of their own."""
    n, channels, height, width = x.shape
    positions = height * width
    return Layer(f"{name}.attend", "attention", 4 * n * positions**2 * channels, 0, 4 * n * positions * channels)
