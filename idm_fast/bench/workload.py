"""What is timed: one network with its weights, a batch, a walk of some steps, and the noise it starts from."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from idm_fast.bench.work import Layer, layers
from idm_fast.checkpoints import native
from idm_fast.config import PRESETS, ModelConfig
from idm_fast.config_clr_face import CLR_FACE_PRESETS, ClrFaceConfig
from idm_fast.diffusion import SamplerTable, Schedule, build_table, initial_noise, sample
from idm_fast.engine.lossy import check_reuse
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet
from idm_fast.registry import find_files, shipped

Denoise = Callable[[Tensor, Tensor], Tensor]
DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}  # fmt: skip
SHIPPED = {"idm-128": "idm-face-128", "idm-256": "idm-face-256"}  # presets whose trained weights lie in the package
PHOTOGRAPH_RMS = 0.5  # of a picture in [-1, 1], about
PSNR_MOST = 200.0  # written for results that are equal bit by bit: JSON knows no infinity
RANDOM = "random (seed 0)"  # the weights of a preset that has none
_WHOLE = (
    "preset must be a single network, got {}, a whole CLR-Face model: its prior alone is the preset clr-prior-128, and "
    "benchmarks/clr_face.py times whole restorations"
)
_BRANCHES = ("conv2.weight", "attention.out.weight")  # what a residual block or attention adds: small, or it explodes


@dataclass(frozen=True, eq=False)
class Workload:
    """``steps`` of the preset's own solver over ``batch`` pictures. The model is float32 on the CPU; it is copied,
    never changed. ``cond`` is float32 in [-1, 1], or None."""

    preset: str
    config: ModelConfig
    model: UNet
    weights: str  # "random (seed 0)" or the shipped model's name
    device: torch.device
    table: SamplerTable
    start: Tensor  # [N, C, H, W] float32 channels_last, on the device
    seeds: Tensor  # [N] int64
    cond: Tensor | None  # [N, cond_channels, H, W]

    @property
    def batch(self) -> int:
        return self.start.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        return self.start.shape[2], self.start.shape[3]

    @property
    def steps(self) -> int:
        """Network evaluations of one run."""
        return self.table.evaluations

    @property
    def trained(self) -> bool:
        """Random weights have no pictures: their walk is not clamped, or most of what they differ in would be cut."""
        return self.weights != RANDOM

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The work of one evaluation."""
        return layers(self.config.unet, self.batch, *self.size)

    def module(self, dtype: torch.dtype) -> UNet:
        """A copy of the model, channels-last, on the device."""
        made = copy.deepcopy(self.model).to(self.device, dtype)
        return made.to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload,no-any-return]

    def image_channels(self, out: Tensor) -> Tensor:
        """What the walk reads of the network's output: six channels hold a variance too (guided-diffusion)."""
        channels = self.start.shape[1]
        return out if out.shape[1] == channels else out[:, :channels].contiguous(memory_format=torch.channels_last)

    def run(self, denoise: Denoise, network_dtype: torch.dtype | None) -> Tensor:
        """The whole walk around one network, with our fused update: what every peer gets. Float32."""
        return self.picture(sample(denoise, self.table, self.start, self.seeds, network_dtype=network_dtype))

    def picture(self, out: Tensor) -> Tensor:
        """The end of a walk, of a trained network in [-1, 1]."""
        return out.clamp_(-1, 1) if self.trained else out

    def psnr(self, result: Tensor, truth: Tensor) -> float:
        """dB. Random weights make no picture: there what the network adds to the walk counts as one, by its RMS."""
        if self.trained:
            return psnr(result, truth)
        scale = PHOTOGRAPH_RMS / float((truth - self._unmoved).double().square().mean().sqrt())
        return psnr(scale * result.double(), scale * truth.double())

    @cached_property
    def _unmoved(self) -> Tensor:
        """The walk of a network that answers 0: the noise that everybody has, and gets right."""
        return self.run(lambda x, t: torch.zeros_like(x), None)


def names() -> list[str]:
    """What ``--preset`` takes, beside files: single networks."""
    return [*PRESETS, *(name for name in shipped() if name not in CLR_FACE_PRESETS)]


def workload(
    name: str, *, batch: int = 1, size: int | None = None, steps: int = 4, device: torch.device | str = "cpu"
) -> Workload:
    """Builds one by a preset's name, a shipped model's or a .safetensors file. ``size``: side in pixels, None = the
    preset's.

    A preset with trained weights in the package runs on them; others on random ones, without a clamp: there PSNR says
    how rounding grows, not what it costs in quality. Raises ``IdmFastError`` naming what is wrong.
    """
    check(name, batch=batch, size=size, steps=steps)
    device = torch.device(device)
    config, model, weights = _network(name)
    u, side = config.unet, config.unet.image_size if size is None else size
    table = build_table(
        Schedule.from_config(config.diffusion), config.diffusion.prediction, config.sampler, steps,
        spacing=config.spacing, clamp=None if weights == RANDOM else 1.0,
    )  # fmt: skip
    seeds = torch.arange(batch, device=device)
    start = initial_noise(seeds, (batch, u.in_channels, side, side), device)
    cond = _condition(batch, u.cond_channels, side).to(device) if u.cond_channels else None
    return Workload(name, config, model, weights, device, table, start, seeds, cond)


def check(name: str, *, batch: int = 1, size: int | None = None, steps: int = 4, cache_every: int = 1) -> None:
    """Raises what ``workload`` would, and an engine for ``cache_every``, without making the network."""
    if batch < 1 or steps < 1:
        raise IdmFastError(f"batch and steps must be >= 1, got {batch} and {steps}")
    config = PRESETS[name] if name in PRESETS else _network(name)[0]
    side, multiple = config.unet.image_size if size is None else size, config.unet.size_multiple
    if side < 1 or side % multiple:
        raise IdmFastError(f"size must be a multiple of {multiple} for {name}, got {side}")
    check_reuse(config.unet, cache_every)
    if config.unet.num_classes:
        raise IdmFastError(f"preset must be a network without classes, got {name} with {config.unet.num_classes}")


def psnr(result: Tensor, truth: Tensor) -> float:
    """Of pictures in [-1, 1], dB, at most ``PSNR_MOST``. Raises ``IdmFastError`` where they are not finite."""
    error = float((result.double().cpu() - truth.double().cpu()).square().mean())
    if not math.isfinite(error):
        raise IdmFastError("wrong, so it is not timed: its result is not finite")
    return PSNR_MOST if error == 0 else min(PSNR_MOST, 10 * math.log10(4 / error))


@lru_cache(maxsize=1)  # the same one for all batches, sizes and steps; nobody changes it
def _network(name: str) -> tuple[ModelConfig, UNet, str]:
    if name in PRESETS and SHIPPED.get(name) not in shipped():
        return PRESETS[name], _random(PRESETS[name]), RANDOM
    if name in CLR_FACE_PRESETS:
        raise IdmFastError(_WHOLE.format(name))
    if name not in names() and not name.endswith(".safetensors"):
        raise IdmFastError(f"preset must be one of {', '.join(names())} or a .safetensors file, got {name!r}")
    (file,) = find_files(SHIPPED.get(name, name))
    loaded = native.load_any(file)
    if isinstance(loaded.config, ClrFaceConfig):
        raise IdmFastError(_WHOLE.format(file))
    if not isinstance(loaded.module, UNet):
        raise IdmFastError(f"{file}: preset must be a U-Net, got a {type(loaded.module).__name__}")
    return loaded.config, loaded.module.float(), file.stem


def _random(config: ModelConfig) -> UNet:
    """Weights that keep the variance of what passes; layers that training starts at zero do something too."""
    made = torch.Generator().manual_seed(0)
    model = UNet(config.unet)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                gain = 0.3 if name.endswith(_BRANCHES) or name.startswith("out_conv") else 1.0
                fan_in = parameter[0].numel()
                parameter.normal_(0.0, gain / fan_in**0.5, generator=made)
            elif name.endswith("bias"):  # torch's own start is another at each call
                parameter.zero_()
    return model


def _condition(batch: int, channels: int, side: int) -> Tensor:
    """Something smooth, as a degraded picture is."""
    coarse = torch.rand(batch, channels, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    fine = F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)
    return fine.contiguous(memory_format=torch.channels_last)
