"""Weights in the order in which the native CPU kernels read them, kept for as long as the weight itself lives."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from idm_fast.kernels.conv2d.packed_weight import Pack, PackedWeight
from idm_fast.kernels.extension import _CODES, require_native, view

native = require_native()

Entry = tuple[tuple[int, int, str], Tensor]  # (address, version, instruction set) of the weight, packed


class PackedCache:
    """``pack`` once per weight, until its memory, its version or the instruction set changes.

    The key is the tensor object: a caller that slices or reshapes its weight in every call packs it in every call. The
    version counter sees every in-place change that autograd sees; ``weight.data`` goes behind its back and must not be
    written. Inference tensors have no counter and are packed in every call, unless they are a ``PackedWeight``.
    """

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        self._entries: MutableMapping[Tensor, Entry] = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, weight: Tensor) -> Tensor:
        if isinstance(weight, PackedWeight):
            return weight.packed(self._pack, native.cpu_isa())
        if weight.is_inference():
            return self._pack(weight, None)
        state = (weight.data_ptr(), weight._version, native.cpu_isa())
        entry = self._entries.get(weight)
        if entry is None or entry[0] != state:
            with torch.inference_mode(False):
                entry = (state, self._pack(weight, None))
            self._entries[weight] = entry
        return entry[1]


def pack_weight(
    weight: Tensor,  # [Cout, C, k, k] channels_last, phase weights [4, Cout, C, 2, 2] or [Cout, Cs]
    room: Tensor | None = None,
) -> Tensor:
    """Strips of output channels, zero-padded: [phase][strip][tap][word of channels][output channel][channel in word].

    Bytes for the instruction set in use and ``weight``'s dtype (see csrc/conv2d), written to ``room`` if given.
    """
    code, sizes = _CODES[weight.dtype], extents(weight)
    if room is None:
        room = torch.empty(native.conv2d_packed_bytes(code, *sizes), dtype=torch.int8, device=weight.device)
    native.conv2d_pack(view(weight), *sizes, view(room))
    return room


def extents(weight: Tensor) -> tuple[int, int, int, int]:
    """(matrices, output channels, taps, input channels) of ``pack_weight``'s argument."""
    if weight.dim() == 5:
        return weight.shape[0], weight.shape[1], weight.shape[3] * weight.shape[4], weight.shape[2]
    taps = weight.shape[2] * weight.shape[3] if weight.dim() == 4 else 1
    return 1, weight.shape[0], taps, weight.shape[1]
