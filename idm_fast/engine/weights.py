"""Weights as the operations take them: made once per (network, dtype, device) and shared by every plan of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from idm_fast.engine.lossy import TIERS
from idm_fast.engine.nodes import EightBit, Weight
from idm_fast.errors import IdmFastError
from idm_fast.kernels import phase_weights
from idm_fast.kernels.conv2d import PackedWeight
from idm_fast.models.unet import UNet
from idm_fast.models.vqgan import Vqgan

State = Mapping[str, Tensor]
Recipe = Callable[[State], tuple[Tensor, ...]]


class PackedWeights:
    """What plans read instead of the network's parameters. Tensors keep their memory when weights are swapped.

    Convolution weights are of ``dtype``, in the order that every product takes ([Cout][kh][kw][C]); biases, norms and
    all of the time embedding are float32. Made from the parameters as they are, so a float32 network rounds once.
    """

    def __init__(self, model: UNet | Vqgan, dtype: torch.dtype, device: torch.device) -> None:
        self.config: Any = model.config  # of the network's kind
        self.dtype, self.device = dtype, device
        self._state = _state("Engine", model)
        self._made: dict[object, tuple[Recipe, tuple[Tensor, ...]]] = {}
        self._lock = Lock()
        self.range_checked = -1  # the version whose float16 values are known to fit
        self.version = 0  # one more after each swap: what was computed from weights is then made anew

    @property
    def nbytes(self) -> int:
        every = [tensor for _, tensors in self._made.values() for tensor in tensors]
        packed = sum(tensor.packed_bytes for tensor in every if isinstance(tensor, PackedWeight))
        return packed + sum(tensor.nbytes for tensor in every)

    def get(self, weight: Weight) -> Tensor:
        """The tensor of one weight, made at the first call."""
        dtype = torch.float32 if weight.form == "vector" else self.dtype
        return self.made(weight, lambda state: (_formed(state, weight).to(dtype),), weight.form != "vector")[0]

    def quantised(self, weight: Weight, tier: EightBit) -> tuple[Tensor, Tensor]:
        """(8-bit weight, its scales) of a convolution."""
        quantise = TIERS[tier].quantise_weight
        made, scale = self.made((tier, weight), lambda state: quantise(_formed(state, weight)), True)
        return made, scale

    def total(self, vectors: tuple[Weight, ...]) -> Tensor | None:
        """The sum of some biases; those the network has not count as nothing."""
        vectors = tuple(vector for vector in vectors if vector.name in self._state)
        if not vectors:
            return None
        return self.made(vectors, lambda state: (torch.stack([_formed(state, v) for v in vectors]).sum(0),))[0]

    def norm(self, path: str) -> tuple[Tensor, Tensor]:
        """(gamma, beta) of a norm."""
        gamma, beta = Weight(f"{path}.weight", "vector"), Weight(f"{path}.bias", "vector")
        return self.get(gamma), self.get(beta)

    def made(self, key: object, recipe: Recipe, packed: bool = False) -> tuple[Tensor, ...]:
        """What ``recipe`` makes of the state dict, on this device, once per key; ``packed``: the first for products."""
        with self._lock:
            if key not in self._made:
                first, *rest = self._run(recipe, self._state)
                with torch.inference_mode(False):
                    self._made[key] = (recipe, (PackedWeight(first) if packed else first, *rest))
            return self._made[key][1]

    def swap(self, model: UNet | Vqgan) -> None:
        """Other weights of the same network, written into the same memory.

        Raises ``IdmFastError``, with nothing changed, for a network of another shape.
        """
        new = _state("swap_weights", model)
        shapes = {name: tuple(tensor.shape) for name, tensor in new.items()}
        for name, tensor in self._state.items():
            if shapes.get(name) != tuple(tensor.shape):
                got = shapes.get(name, "none of that name")
                raise IdmFastError(f"swap_weights: {name} must be of shape {tuple(tensor.shape)}, got {got}")
        if model.config != self.config:
            raise IdmFastError("swap_weights: model must have the engine's configuration, got another one")
        with self._lock:
            for recipe, tensors in self._made.values():
                for old, tensor in zip(tensors, self._run(recipe, new), strict=True):
                    if isinstance(old, PackedWeight):
                        old.load(tensor)
                    else:
                        old.copy_(tensor)
            self._state = new
            self.version += 1

    def _run(self, recipe: Recipe, state: State) -> tuple[Tensor, ...]:
        # Not inference tensors, even under inference mode: swapping writes them, and packing counts their versions.
        with torch.inference_mode(False), torch.no_grad():
            return tuple(tensor.detach().to(self.device, copy=True) for tensor in recipe(state))


def check_held(where: str, state: State) -> None:
    """Raises ``IdmFastError`` for a network that has shapes and no weights."""
    for name, tensor in state.items():
        if tensor.is_meta:
            raise IdmFastError(f"{where}: model must have its weights in memory, got {name} on the meta device")


class _Turned(Mapping[str, Tensor]):
    """A state dict whose convolutions are turned by 180 degrees when they are asked for, where the name begins so."""

    def __init__(self, state: State, begins: str) -> None:
        self._upright, self._begins = state, begins

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._upright[name]
        wide = tensor.ndim == 4 and tensor.shape[2] > 1
        return tensor.flip(2, 3) if wide and name.startswith(self._begins) else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._upright)

    def __len__(self) -> int:
        return len(self._upright)


def _state(where: str, model: UNet | Vqgan) -> State:
    state: State = dict(model.state_dict())
    check_held(where, state)
    if isinstance(model, UNet):
        return _Turned(state, "") if model.config.turned else state
    return _Turned(state, "encoder.")  # which pads below and to the right: see lower_vqgan.py


def _formed(state: State, weight: Weight) -> Tensor:
    """float32, in the memory order of its form."""
    tensor = state[weight.name].float()
    if weight.rows is not None:
        tensor = tensor[slice(*weight.rows)]
    if weight.columns is not None:
        tensor = tensor[:, slice(*weight.columns)]
    if weight.form == "phases":
        return phase_weights(tensor)
    if weight.form == "matrix":
        return tensor.flatten(1).contiguous()
    return tensor.contiguous(memory_format=torch.channels_last) if weight.form == "conv" else tensor
