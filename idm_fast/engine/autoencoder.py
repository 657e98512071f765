"""``AutoencoderEngine``: a compiled VQGAN."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import NoReturn

import torch
from torch import Tensor

from idm_fast.config_vqgan import VqganConfig
from idm_fast.engine.autotune import Autotuner
from idm_fast.engine.buffers import Arena, images
from idm_fast.engine.checks import check_instruction_set, check_same, check_shape, check_shared, instruction_set
from idm_fast.engine.engine import EngineOptions, Memory
from idm_fast.engine.graph_pool import GraphPool
from idm_fast.engine.lossy import TIERS
from idm_fast.engine.lower_vqgan import LoweredPart, lower_decoder, lower_encoder
from idm_fast.engine.memory import exhausted, require
from idm_fast.engine.nodes import Node
from idm_fast.engine.plan import laid_out
from idm_fast.engine.precision import check_range, chosen_device, chosen_dtype
from idm_fast.engine.surroundings import shielded
from idm_fast.engine.weights import PackedWeights
from idm_fast.engine.writer import Shape
from idm_fast.errors import IdmFastError
from idm_fast.kernels.dispatch import BackendError, use_backend
from idm_fast.kernels.program import joined
from idm_fast.models.vqgan import Vqgan

_WHO = "AutoencoderEngine"


class Part:
    """An encoder or a decoder on fixed memory: ``run`` reads ``x`` and writes ``out``, float32 images of the arena.

    Nothing else is allocated or decided, so a graph may hold it beside other parts and walks of the same arena, in
    any order. They share its memory: what one gives must be copied out before the next runs.
    """

    def __init__(self, lowered: LoweredPart, weights: PackedWeights, arena: Arena, tuner: Autotuner) -> None:
        def none(dtype: torch.dtype) -> Tensor:  # nothing here depends on a step
            return torch.zeros(1, 1, dtype=dtype, device=weights.device)

        row, count = none(torch.float32), none(torch.int64)[0]
        laid = laid_out(
            lowered.nodes, weights, arena, tuner, row=row, rows=row, coefficients=row, step=count, seeds=count
        )
        self.weights, self.calls, self.stats_nbytes = weights, laid.calls, laid.stats_nbytes
        self._tensors = tensors = laid.buffers.tensors
        self.x, self.out = tensors[lowered.x], tensors[lowered.out]
        self.quantised = None if lowered.quantised is None else tensors[lowered.quantised]
        self.codes = None if lowered.codes is None else tensors[lowered.codes]
        self._all = joined([bound.call for bound in self.calls])
        self._behind_codebook = joined([bound.call for bound in self.calls[1:]])
        self._checked = -1  # the version of the weights whose float16 values are known to fit

    def run(self, quantize: bool = True) -> None:
        """``quantize=False``, of a decoder: what lies in ``quantised`` is decoded, whatever ``x`` holds."""
        for call in self._all if quantize else self._behind_codebook:
            call()

    @property
    def range_known(self) -> bool:
        """Whether float16 holds all that these weights give, as far as one batch of images has shown."""
        return self.weights.dtype != torch.float16 or self._checked == self.weights.version

    def check_range(self, quantize: bool) -> bool:
        """At the first images of new weights in float16: whether it has run, and written over its input."""
        if self.range_known:
            return False
        check_range(self.calls if quantize else self.calls[1:], self._tensors)
        self._checked = self.weights.version
        return True


class AutoencoderEngine:
    """Made by ``AutoencoderEngine.compile``. One call at a time: another thread's waits.

    ``encoder`` and ``decoder`` are its parts, for whoever builds a larger graph of them, within ``arena.turn()``.
    """

    def __init__(self, config: VqganConfig, weights: PackedWeights, arena: Arena, parts: tuple[Part, Part]) -> None:
        self.config, self.weights, self.arena = config, weights, arena
        self.encoder, self.decoder = parts
        self._isa = instruction_set()
        self._graphs, self._owner = False, -1

    def __reduce__(self) -> NoReturn:
        raise IdmFastError(
            f"{_WHO}: a compiled plan has addresses in it and cannot be pickled or copied; compile it anew"
        )

    @classmethod
    @shielded
    def compile(
        cls,
        model: Vqgan,
        shape: Shape,  # N, H, W of the pictures
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        options: EngineOptions | None = None,
    ) -> AutoencoderEngine:
        """The plans of ``model`` for N pictures of H x W pixels; ``options`` as for ``Engine``, but no ``cache_every``.

        Raises ``IdmFastError`` for a shape the network cannot take, an unknown dtype, device or back end, and back
        ends of which none can run some call; ``OutOfMemory`` with the need and what there is.
        """
        options = options or EngineOptions()
        place = chosen_device(device)
        if dtype in TIERS:  # said before the device is asked, whose advice would be of no use
            raise IdmFastError(f"dtype must be fp32, bf16 or fp16 for an autoencoder, got {dtype}")
        kind, _ = chosen_dtype(dtype, place)
        check_shape(_WHO, shape, model.config.factor)
        if options.cache_every != 1:
            raise IdmFastError(f"{_WHO}: cache_every must be 1, got {options.cache_every}")
        check_shared(_WHO, options.weights, options.arena, model.config, kind, place)
        weights = options.weights or PackedWeights(model, kind, place)
        tuner = Autotuner(options.autotune, options.cache)
        arena = options.arena or Arena(place)
        lowered = lower_encoder(model, shape, kind), lower_decoder(model, shape, kind)
        try:
            with nullcontext() if options.backend is None else use_backend(options.backend), arena.turn():
                need = max(images(part.nodes)[1] for part in lowered)
                if need > arena.nbytes:
                    require(need, place)
                arena.take(need)  # grown once, so that both lie in it
                encoder, decoder = (Part(part, weights, arena, tuner) for part in lowered)
        except BackendError as error:
            raise IdmFastError(str(error)) from None
        except torch.OutOfMemoryError as error:
            raise exhausted(shape, error) from None
        tuner.save()
        engine = cls(model.config, weights, arena, (encoder, decoder))
        if options.graph and arena.runtime.captures:
            engine._capture_later(arena.graphs)
        return engine

    @shielded
    def encode(self, x: Tensor) -> Tensor:
        """The latent [N, D, h, w] of pictures [N, C, H, W] in [-1, 1]: float32, channels_last, not quantised."""
        with self.arena.turn():
            self._run("encode", self.encoder, self.encoder.x, x)
            return self.encoder.out.clone()

    @shielded
    def decode(self, latent: Tensor, *, quantize: bool = True) -> Tensor:
        """The pictures [N, C, H, W] of latents [N, D, h, w]: float32, channels_last. ``quantize`` as in ``Vqgan``."""
        part = self.decoder
        assert part.quantised is not None
        with self.arena.turn():
            if quantize:
                self._run("decode", part, part.x, latent)
            else:
                self._run("decode_as_is", part, part.quantised, latent)
            return part.out.clone()

    @shielded
    def quantize(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """(nearest codes as an image of ``latent``'s shape in float32, their numbers int64 [N, h, w])."""
        part = self.decoder
        assert part.quantised is not None
        assert part.codes is not None
        check_instruction_set(_WHO, self._isa)
        check_same(_WHO, "latent", latent, part.x)
        with self.arena.turn():
            part.x.copy_(latent)
            part.calls[0].call()
            return part.quantised.clone(), part.codes.clone()

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The calls of the encoder and then of the decoder, with layer, operation, backend, FLOPs and bytes of each."""
        return tuple(bound.node for part in (self.encoder, self.decoder) for bound in part.calls)

    @shielded
    def swap_weights(self, model: Vqgan) -> None:
        """Another network's weights in the same memory. Raises ``IdmFastError`` for one of another shape."""
        with self.arena.turn():
            self.weights.swap(model)

    def release_graphs(self) -> None:
        """Forgets all captured graphs of the arena; the next call captures its own anew, as torch is set then."""
        with self.arena.turn():
            self.arena.graphs.release()

    def memory(self) -> Memory:
        workspace = self.arena.nbytes + self.encoder.stats_nbytes + self.decoder.stats_nbytes
        return Memory(self.weights.nbytes, workspace, self.arena.graphs.nbytes)

    def _run(self, key: str, part: Part, place: Tensor, given: Tensor) -> None:
        check_instruction_set(_WHO, self._isa)
        check_same(_WHO, "x" if part is self.encoder else "latent", given, place)
        quantize = key != "decode_as_is"
        place.copy_(given)
        if part.check_range(quantize):
            place.copy_(given)
        if not self._graphs:
            part.run(quantize)
            return
        graphs, name = self.arena.graphs, (key, 0)
        if not graphs.has(self._owner, [name]):
            try:
                self.arena.runtime.warm_up(lambda: part.run(quantize))
                graphs.capture(self._owner, {name: lambda: part.run(quantize)})
            except torch.OutOfMemoryError as error:
                n, _, height, width = self.encoder.x.shape
                raise exhausted((n, height, width), error) from None
            place.copy_(given)
        graphs.replay(self._owner, name)

    def _capture_later(self, graphs: GraphPool) -> None:
        """Each direction becomes a graph at its first call."""
        self._graphs, self._owner = True, graphs.new_owner()
        weakref.finalize(self, graphs.abandon, self._owner).atexit = False
