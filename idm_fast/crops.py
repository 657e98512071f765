"""Restores aligned crops: a network, its schedule and a solver, on one device. Knows nothing of photographs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from idm_fast.config import ModelConfig
from idm_fast.diffusion import SamplerTable, Schedule, build_table, initial_noise, noised_start, sample
from idm_fast.errors import IdmFastError
from idm_fast.kernels.dispatch import BackendError, forced_backends, use_backend
from idm_fast.models.unet import UNet
from idm_fast.ops import OPS

USED = ("group_norm_silu", "attention", "sampler_update")  # the operations of a restoration
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Progress = Callable[[int], None]


@dataclass(frozen=True)
class SampleSettings:
    """How to walk from noise to picture; ``None`` means the model's own default.

    ``steps`` >= 1; ``sampler``: a solver's name; ``eta``: its randomness in [0, 1]; ``strength`` in (0, 1]: 1 starts
    from pure noise, less from the noised input at that part of the way.
    """

    steps: int | None = None
    sampler: str | None = None
    eta: float | None = None
    strength: float | None = None

    def resolved(self, config: ModelConfig) -> SampleSettings:
        """The same with the model's defaults filled in."""
        return SampleSettings(
            config.steps if self.steps is None else self.steps,
            config.sampler if self.sampler is None else self.sampler,
            self.eta,
            config.strength if self.strength is None else self.strength,
        )


def default_dtype(device: torch.device) -> torch.dtype:
    """fp16 on CUDA, bf16 on a CPU with bf16 instructions, else fp32."""
    if device.type == "cuda":
        return torch.float16
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return torch.bfloat16 if device.type == "cpu" and supported is not None and supported() else torch.float32


class CropRestorer:
    """x0_hat of degraded crops. ``backend`` forces kernel back ends, one or several in order of preference
    ("cpu,torch"; see ``idm-fast ops``); None leaves the choice to ``IDM_FAST_BACKEND``, or to what is fastest."""

    def __init__(
        self, config: ModelConfig, module: UNet, device: torch.device, dtype: torch.dtype, backend: str | None = None
    ) -> None:
        self.config, self.device, self.dtype, self.backend = config, device, dtype, backend
        self.size = config.unet.image_size
        self.module = module.to(device, dtype).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.schedule = Schedule.from_config(config.diffusion)
        self.table = lru_cache(maxsize=16)(self._table)

    def _table(self, settings: SampleSettings) -> SamplerTable:
        strength = 1.0 if settings.strength is None else settings.strength
        if not 0 < strength <= 1:
            raise IdmFastError(f"strength must lie in (0, 1], got {strength}")
        return build_table(
            self.schedule, self.config.diffusion.prediction, settings.sampler or "ddim", settings.steps,
            start=strength, eta=settings.eta, clamp=1.0,
        )  # fmt: skip

    def evaluations(self, settings: SampleSettings) -> int:
        """How often the network runs for one crop."""
        return self.table(settings.resolved(self.config)).evaluations

    def check_backend(self) -> None:
        """Raises ``IdmFastError`` when none of the forced back ends can run some operation here, before any work."""
        try:
            with self._forced():
                names = forced_backends()
        except BackendError as error:  # a name that no table knows
            raise IdmFastError(str(error)) from None
        for name in USED if names else ():
            op = OPS[name]
            # The update reads the network's answer, which a residual network adds to its float32 condition.
            dtype = torch.float32 if name == "sampler_update" and self.config.unet.residual else self.dtype
            reasons = [(each, op.why_not(each, self.device, dtype)) for each in names]
            if all(reason for _, reason in reasons):
                said = "; ".join(f"{each}: {reason}" for each, reason in reasons)
                raise IdmFastError(
                    f"backend must be able to run {name} on {self.device} in {str(dtype).removeprefix('torch.')}, "
                    f"got {said}; name another behind it, as in {','.join(names)},torch"
                )

    def _forced(self) -> AbstractContextManager[None]:
        return use_backend(self.backend) if self.backend is not None else nullcontext()

    @torch.inference_mode()
    def restore(self, y: Tensor, seeds: Tensor, settings: SampleSettings, progress: Progress | None = None) -> Tensor:
        """``y`` [N, 3, size, size] in [-1, 1] -> restored, float32, same shape and range, on the CPU.

        ``seeds`` int64 [N]: a crop's result depends on its own seed, not on its batch. ``progress(e)`` is called
        after network evaluation e. Raises ``IdmFastError`` for other shapes, for values that are not finite, and where
        the network's are not.
        """
        if y.ndim != 4 or tuple(y.shape[1:]) != (3, self.size, self.size) or not y.is_floating_point():
            raise IdmFastError(
                f"restore: y must be a float [N, 3, {self.size}, {self.size}], got {y.dtype} {list(y.shape)}"
            )
        if not torch.isfinite(y).all():
            raise IdmFastError("restore: y must be finite, got nan or inf")
        settings = settings.resolved(self.config)
        table = self.table(settings)
        # The condition stays float32: a residual network adds its answer to it, and rounding it would cost fine detail.
        y = y.to(self.device, torch.float32).contiguous(memory_format=torch.channels_last)
        seeds = seeds.to(self.device)
        start = initial_noise(seeds, y.shape, self.device) if settings.strength == 1 else noised_start(y, table, seeds)
        with self._forced():
            out = sample(
                lambda x, t: self.module(x, t, y), table, start, seeds,
                callback=None if progress is None else lambda e, x, x0: progress(e), network_dtype=self.dtype,
            )  # fmt: skip
        if not torch.isfinite(out).all():
            raise IdmFastError(
                f"{self.config.name}: network output must be finite in {self.dtype}, got inf or nan; try fp32"
            )
        return out.clamp_(-1, 1).cpu()
