"""Restores aligned crops: a network, its schedule and a solver, on one device. Knows nothing of photographs."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from idm_fast.config import ModelConfig
from idm_fast.diffusion import (
    CORRECTOR_SNR,
    SamplerTable,
    Schedule,
    build_table,
    initial_noise,
    noised_start,
    respace,
    sample,
)
from idm_fast.diffusion.spacing import Array
from idm_fast.engine import Engine, EngineOptions, Memory
from idm_fast.engine.buckets import bucket, padded
from idm_fast.engine.buffers import Arena
from idm_fast.engine.engine import Callback
from idm_fast.engine.lossy import check_reuse
from idm_fast.engine.memory import OutOfMemory
from idm_fast.engine.precision import chosen_dtype
from idm_fast.engine.weights import PackedWeights, check_held
from idm_fast.errors import IdmFastError
from idm_fast.kernels.dispatch import BackendError, forced_backends, use_backend
from idm_fast.models.unet import UNet
from idm_fast.ops import OPS

# The operations of a restoration: of the modules, and of the engine.
USED = ("group_norm_silu", "attention", "sampler_update")
USED_BY_ENGINE = ("conv2d", "norm_coefficients", "attention", "sampler_update")
MOST_ENGINES = 4  # batch sizes whose plans are kept; they share weights and memory
Progress = Callable[[int], None]


@dataclass(frozen=True)
class SampleSettings:
    """How to walk from noise to picture; ``None`` means the model's own default.

    ``steps`` >= 1; ``sampler``: a solver's name; ``eta``: its randomness in [0, 1]; ``strength`` in (0, 1]: 1 starts
    from pure noise, less from the noised input at that part of the way. ``respacing``, in the place of ``steps``: the
    training steps that are walked, in guided-diffusion's notation ("ddim250", "250", "10,15,20"). ``corrector_steps``
    and ``corrector_snr``: the Langevin steps between those of the solver, as ``build_table`` takes them.
    """

    steps: int | None = None
    sampler: str | None = None
    eta: float | None = None
    strength: float | None = None
    respacing: str | None = None
    corrector_steps: int = 0
    corrector_snr: float = CORRECTOR_SNR

    def resolved(self, config: ModelConfig) -> SampleSettings:
        """The same with the model's defaults filled in; either ``steps`` or ``respacing`` is None then."""
        if self.steps is not None and self.respacing is not None:
            raise IdmFastError(f"respacing must not be given with steps, got {self.respacing!r} and {self.steps}")
        respacing = self.respacing if self.respacing is not None or self.steps is not None else config.respacing or None
        steps = config.steps if self.steps is None else self.steps
        return SampleSettings(
            steps if respacing is None else None,
            config.sampler if self.sampler is None else self.sampler,
            self.eta,
            config.strength if self.strength is None else self.strength,
            respacing,
            self.corrector_steps,
            self.corrector_snr,
        )


class CropRestorer:
    """x0_hat of degraded crops. ``dtype``: a torch type, a short name, "int8" or "fp8". ``backend`` forces kernel back
    ends, one or several in order of preference ("cpu,torch"; see ``idm-fast ops``); None leaves the choice to
    ``IDM_FAST_BACKEND``, or to what is fastest. ``engine=False``: the network's plain modules, the numerical truth.
    ``cache_every``: as in ``EngineOptions``, lossy above 1."""

    def __init__(
        self,
        config: ModelConfig,
        module: UNet,
        device: torch.device,
        dtype: torch.dtype | str,
        backend: str | None = None,
        engine: bool = True,
        cache_every: int = 1,
    ) -> None:
        self.config, self.device, self.backend, self.cache_every = config, device, backend, cache_every
        self.dtype, self.quantised = chosen_dtype(dtype, device, backend)
        check_held("CropRestorer", module.state_dict())
        check_reuse(config.unet, cache_every)
        self.size = config.unet.image_size
        self.module = module.eval()
        self._engines: OrderedDict[object, Engine] | None = OrderedDict() if engine else None
        if engine:  # it packs the weights as they come, and rounds them once
            self._arena, self._weights = Arena(device), PackedWeights(module, self.dtype, device)
        elif self.quantised:
            raise IdmFastError(f"dtype must be fp32, bf16 or fp16 without the engine, got {self.quantised}")
        elif cache_every > 1:
            raise IdmFastError(f"cache_every must be 1 without the engine, got {cache_every}")
        else:
            module.to(device, self.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.schedule = Schedule.from_config(config.diffusion)
        self.table = lru_cache(maxsize=16)(self._table)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or one in another process, compiles its own engines."""
        dtype, engine = self.quantised or self.dtype, self._engines is not None
        return CropRestorer, (self.config, self.module, self.device, dtype, self.backend, engine, self.cache_every)

    def _table(self, settings: SampleSettings) -> SamplerTable:
        strength = 1.0 if settings.strength is None else settings.strength
        if not 0 < strength <= 1:
            raise IdmFastError(f"strength must lie in (0, 1], got {strength}")
        chain = None if settings.respacing is None else self._chain(settings.respacing)
        if chain is not None:  # its part of the way, downwards
            chain = chain[chain < strength * (self.schedule.size or 0)][::-1]
        return build_table(
            self.schedule, self.config.diffusion.prediction, settings.sampler or "ddim", settings.steps,
            spacing=self.config.spacing, start=strength, eta=settings.eta, clamp=1.0, timesteps=chain,
            variance=self.config.diffusion.variance, corrector_steps=settings.corrector_steps,
            corrector_snr=settings.corrector_snr,
        )  # fmt: skip

    def _chain(self, respacing: str) -> Array:
        """The training steps of a respaced chain, rising."""
        if self.schedule.size is None:
            raise IdmFastError(
                f"respacing must be left out: {self.config.name} has no training steps, got {respacing!r}"
            )
        return respace(self.schedule.size, respacing)

    def steps(self, settings: SampleSettings) -> int:
        """Steps of the walk; heun evaluates the network twice in each."""
        return self.table(settings.resolved(self.config)).steps

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
        used: tuple[str, ...] = USED if self._engines is None else USED_BY_ENGINE
        if self._engines is not None and self.config.unet.resample == "resblock":
            used += ("group_norm_silu", "resample2x")
        if self.quantised:
            used += (f"conv2d_{self.quantised}",)
        for name in used if names else ():
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
        if not len(y):
            raise IdmFastError(f"restore: y must hold at least one crop, got {list(y.shape)}")
        if not torch.isfinite(y).all():
            raise IdmFastError("restore: y must be finite, got nan or inf")
        settings = settings.resolved(self.config)
        table = self.table(settings)
        # The condition stays float32: a residual network adds its answer to it, and rounding it would cost fine detail.
        y = y.to(self.device, torch.float32).contiguous(memory_format=torch.channels_last)
        seeds = seeds.to(self.device)
        report: Callback | None = None if progress is None else lambda e, x, x0: progress(e)
        # Kernels start on the current device, whichever the tensors are on.
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            start, cond = self._beginning(y, seeds, table, settings)
            with self._forced():
                out = self._walk(start, seeds, cond, table, report)
        if not torch.isfinite(out).all():
            raise IdmFastError(
                f"{self.config.name}: network output must be finite in {self.dtype}, got inf or nan; try fp32"
            )
        return out.clamp_(-1, 1).cpu()

    def _beginning(
        self, y: Tensor, seeds: Tensor, table: SamplerTable, settings: SampleSettings
    ) -> tuple[Tensor, Tensor | None]:
        """(what the walk begins with, what the network is shown beside it), of degraded crops on the device."""
        whole = settings.strength == 1
        start = initial_noise(seeds, y.shape, self.device) if whole else noised_start(y, table, seeds)
        return start, self._condition(y)

    def _condition(self, y: Tensor) -> Tensor:
        """What the network is shown: of a super-resolution network, what is left of the crop at the size it knows."""
        enlarge = self.config.unet.cond_resize
        low_res = self.config.low_res or (self.size // 4 if enlarge == "bilinear" else 0)
        if not 0 < low_res < self.size:
            return y
        # As the families were trained: guided-diffusion on torch's area and bilinear, SR3 on Pillow's bicubic.
        bicubic: dict[str, Any] = {"mode": "bicubic", "antialias": True}
        down, up = ({"mode": "area"}, {"mode": "bilinear"}) if enlarge == "bilinear" else (bicubic, bicubic)
        small = interpolate(y, (low_res, low_res), **down).clamp_(-1, 1)
        large = interpolate(small, (self.size, self.size), **up)
        return large.clamp_(-1, 1).contiguous(memory_format=torch.channels_last)

    def _walk(
        self, start: Tensor, seeds: Tensor, cond: Tensor | None, table: SamplerTable, report: Callback | None
    ) -> Tensor:
        if self._engines is None:
            return sample(
                lambda x, t: self.module(x, t, cond), table, start, seeds, callback=report, network_dtype=self.dtype
            )
        count = len(start)
        size = bucket(count) if self._arena.runtime.captures else count  # a CPU gains nothing by it
        try:
            with self._arena.lock:
                x, keys = padded(start, size), padded(seeds, size)
                hint = None if cond is None else padded(cond, size)
                return self._engine(size, table).run(x, keys, hint, report)[:count]
        except OutOfMemory as error:
            if count == 1:
                raise
            half = count // 2
            warnings.warn(f"{error}; goes on with batches of {half}", RuntimeWarning, stacklevel=2)
            parts = [slice(0, half), slice(half, None)]
            hints = [None if cond is None else cond[p] for p in parts]
            walks = [self._walk(start[p], seeds[p], hint, table, report) for p, hint in zip(parts, hints, strict=True)]
            return torch.cat(walks)

    def _engine(self, batch: int, table: SamplerTable) -> Engine:
        """The engine for ``batch`` images, with ``table`` in it."""
        assert self._engines is not None
        key = (batch, forced_backends(), table.learned_variance)
        engine = self._engines.pop(key, None)
        if engine is None or engine.capacity < table.evaluations:
            options = EngineOptions(weights=self._weights, arena=self._arena, cache_every=self.cache_every)
            generation = self._arena.generation
            engine = Engine.compile(
                self.module, (batch, self.size, self.size), table,
                dtype=self.quantised or self.dtype, device=self.device, options=options,
            )  # fmt: skip
            if self._arena.generation != generation:  # the others hold memory that is no longer shared
                self._engines.clear()
        else:
            engine.use_table(table)
        self._engines[key] = engine
        if len(self._engines) > MOST_ENGINES:
            self._engines.popitem(last=False)
        return engine

    def memory(self) -> Memory:
        """Bytes held by the engines of all batch sizes together."""
        if self._engines is None:
            return Memory(sum(p.nbytes for p in self.module.parameters()), 0)
        own = sum(engine.memory().workspace - engine.arena.nbytes for engine in self._engines.values())
        return Memory(self._weights.nbytes, self._arena.nbytes + own, self._arena.graphs.nbytes)
