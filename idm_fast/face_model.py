"""``FaceModel``: what restores aligned crops by a walk, on one device. Knows neither photographs nor networks."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from idm_fast.config import ModelConfig
from idm_fast.diffusion import SamplerTable, Schedule, build_table, respace
from idm_fast.diffusion.spacing import Array
from idm_fast.engine import Engine, EngineOptions, Memory
from idm_fast.engine.buckets import bucket
from idm_fast.engine.buffers import Arena
from idm_fast.engine.engine import Callback
from idm_fast.engine.lossy import check_reuse
from idm_fast.engine.memory import OutOfMemory
from idm_fast.engine.precision import chosen_dtype
from idm_fast.engine.weights import PackedWeights, check_held
from idm_fast.errors import IdmFastError
from idm_fast.kernels.dispatch import BackendError, forced_backends, use_backend
from idm_fast.ops import OPS
from idm_fast.sampling import GuidanceSettings, SampleSettings
from idm_fast.walk import Walk

MOST_ENGINES = 4  # batch sizes whose plans are kept; they share weights and memory
Progress = Callable[[int], None]


class FaceModel(ABC):
    """x0_hat of degraded crops of ``size`` pixels by a walk of ``config.name`` on ``device`` in ``dtype``.

    ``dtype``: a torch type, a short name, "int8" or "fp8". ``backend`` forces kernel back ends, one or several in order
    of preference ("cpu,torch"; see ``idm-fast ops``); None leaves the choice to ``IDM_FAST_BACKEND``, or to what is
    fastest. ``engine=False``: the networks' plain modules, the numerical truth. ``cache_every``: as in
    ``EngineOptions``, lossy above 1.
    """

    clamp: float | None = 1.0  # of x0_hat: pictures lie in [-1, 1]

    def __init__(
        self,
        config: Any,
        module: nn.Module,
        device: torch.device,
        dtype: torch.dtype | str,
        backend: str | None = None,
        engine: bool = True,
        cache_every: int = 1,
    ) -> None:
        self.config, self.device, self.backend, self.cache_every = config, device, backend, cache_every
        self.dtype, self.quantised = chosen_dtype(dtype, device, backend)
        check_held(type(self).__name__, module.state_dict())
        check_reuse(self.walked.unet, cache_every)
        self.module: Any = module.eval()
        self._engines: OrderedDict[object, Engine] | None = OrderedDict() if engine else None
        self._packed: tuple[PackedWeights, ...] = ()
        if engine:
            self._arena = Arena(device)
        elif self.quantised:
            raise IdmFastError(f"dtype must be fp32, bf16 or fp16 without the engine, got {self.quantised}")
        elif cache_every > 1:
            raise IdmFastError(f"cache_every must be 1 without the engine, got {cache_every}")
        self.schedule = Schedule.from_config(self.walked.diffusion)
        self._cached_table = lru_cache(maxsize=16)(self._table)
        self._place()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or one in another process, compiles its own engines."""
        dtype, engine = self.quantised or self.dtype, self._engines is not None
        return type(self), (self.config, self.module, self.device, dtype, self.backend, engine, self.cache_every)

    # ---- what a kind of model says of itself ----

    @property
    @abstractmethod
    def walked(self) -> ModelConfig:
        """The network that is evaluated step by step, and the model's own sampling settings."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Side in pixels of the crops."""

    @abstractmethod
    def _place(self) -> None:
        """Puts the networks where they will run: packed for engines, or the plain modules on the device."""

    @abstractmethod
    def _used(self) -> Iterator[tuple[str, torch.dtype]]:
        """(operation, the type it runs in) of a restoration."""

    @abstractmethod
    def _begun(self, walk: Walk) -> Walk:
        """The walk with its beginning and its condition, made of the degraded crops."""

    @abstractmethod
    def _walked_plainly(self, walk: Walk) -> Tensor:
        """The restored crops by the network's plain modules: the numerical truth."""

    @abstractmethod
    def _compiled(self, batch: int, table: SamplerTable, options: EngineOptions) -> Engine:
        """An engine for ``batch`` crops; it shares ``_packed``."""

    def _walked_by(self, engine: Any, walk: Walk) -> Tensor:
        """The same by what ``_compiled`` made."""
        out: Tensor = engine.run(walk.x, walk.seeds, walk.cond, walk.report)
        return out

    def resolved(self, settings: SampleSettings) -> SampleSettings:
        """``settings`` with the model's defaults filled in. Raises ``IdmFastError`` for what the model has not got."""
        if settings.guidance.given and settings.guidance != GuidanceSettings(0.0):  # none is what such a model does
            name, given = self.config.name, ", ".join(settings.guidance.given)
            raise IdmFastError(f"{given} must be left out: {name} has no identity guidance (clr-face models have)")
        return settings.resolved(self.walked)

    # ---- tables ----

    def _table(self, settings: SampleSettings) -> SamplerTable:
        strength = 1.0 if settings.strength is None else settings.strength
        if not 0 < strength <= 1:
            raise IdmFastError(f"strength must lie in (0, 1], got {strength}")
        chain = None if settings.respacing is None else self._chain(settings.respacing)
        if chain is not None:  # its part of the way, downwards
            chain = chain[chain < strength * (self.schedule.size or 0)][::-1]
        return build_table(
            self.schedule, self.walked.diffusion.prediction, settings.sampler or "ddim", settings.steps,
            spacing=self.walked.spacing, start=strength, eta=settings.eta, clamp=self.clamp, timesteps=chain,
            variance=self.walked.diffusion.variance, corrector_steps=settings.corrector_steps,
            corrector_snr=settings.corrector_snr,
        )  # fmt: skip

    def _chain(self, respacing: str) -> Array:
        """The training steps of a respaced chain, rising."""
        if self.schedule.size is None:
            raise IdmFastError(
                f"respacing must be left out: {self.config.name} has no training steps, got {respacing!r}"
            )
        return respace(self.schedule.size, respacing)

    def table(self, settings: SampleSettings) -> SamplerTable:
        """The coefficients of a walk, of settings without anything left open; the same object for the same walk."""
        return self._cached_table(replace(settings, guidance=GuidanceSettings()))

    def steps(self, settings: SampleSettings) -> int:
        """Steps of the walk; heun evaluates the network twice in each."""
        return self.table(self.resolved(settings)).steps

    def evaluations(self, settings: SampleSettings) -> int:
        """How often the network runs for one crop."""
        return self.table(self.resolved(settings)).evaluations

    def check_backend(self) -> None:
        """Raises ``IdmFastError`` when none of the forced back ends can run some operation here, before any work."""
        try:
            with self._forced():
                names = forced_backends()
        except BackendError as error:  # a name that no table knows
            raise IdmFastError(str(error)) from None
        for name, dtype in self._used() if names else ():
            op = OPS[name]
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
        self._check(y)
        settings = self.resolved(settings)
        report: Callback | None = None if progress is None else lambda e, x, x0: progress(e)
        y = self._placed(y)
        with self._on_device():
            walk = self._begun(Walk(y, y, seeds.to(self.device), self.table(settings), settings, report))
            with self._forced():
                out = self._walked(walk)
        if not torch.isfinite(out).all():
            raise IdmFastError(
                f"{self.config.name}: network output must be finite in {self.dtype}, got inf or nan; try fp32"
            )
        return out.clamp_(-1, 1).cpu()

    def _placed(self, y: Tensor) -> Tensor:
        # Float32 whatever the dtype: a residual network adds its answer to it, and rounding would cost fine detail.
        return y.to(self.device, torch.float32).contiguous(memory_format=torch.channels_last)

    def _on_device(self) -> AbstractContextManager[Any]:
        """Kernels start on the current device, whichever the tensors are on."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _check(self, y: Tensor) -> None:
        if y.ndim != 4 or tuple(y.shape[1:]) != (3, self.size, self.size) or not y.is_floating_point():
            raise IdmFastError(
                f"restore: y must be a float [N, 3, {self.size}, {self.size}], got {y.dtype} {list(y.shape)}"
            )
        if not len(y):
            raise IdmFastError(f"restore: y must hold at least one crop, got {list(y.shape)}")
        if not torch.isfinite(y).all():
            raise IdmFastError("restore: y must be finite, got nan or inf")

    def _walked(self, walk: Walk) -> Tensor:
        if self._engines is None:
            return self._walked_plainly(walk)
        count = len(walk)
        size = bucket(count) if self._arena.runtime.captures else count  # a CPU gains nothing by it
        try:
            with self._arena.lock:
                return self._walked_by(self._engine(size, walk.table), walk.padded(size))[:count]
        except OutOfMemory as error:
            if count == 1:
                raise
            half = count // 2
            warnings.warn(f"{error}; goes on with batches of {half}", RuntimeWarning, stacklevel=2)
            return torch.cat([self._walked(walk.part(which)) for which in (slice(0, half), slice(half, None))])

    def _engine(self, batch: int, table: SamplerTable) -> Engine:
        """The engine for ``batch`` images, with ``table`` in it."""
        assert self._engines is not None
        key = (batch, forced_backends(), table.learned_variance)
        engine = self._engines.pop(key, None)
        if engine is None or engine.capacity < table.evaluations:
            options = EngineOptions(weights=self._packed[0], arena=self._arena, cache_every=self.cache_every)
            generation = self._arena.generation
            engine = self._compiled(batch, table, options)
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
        weights = sum(packed.nbytes for packed in self._packed)
        return Memory(weights, self._arena.nbytes + own, self._arena.graphs.nbytes)
