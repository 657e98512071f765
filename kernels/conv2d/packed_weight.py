"""A weight for many calls, with what native backends made of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from idm_fast.kernels import check
from idm_fast.kernels.extension import native

# (weight, room for the result or None: new) -> the weight in a backend's own order
Pack = Callable[[Tensor, Tensor | None], Tensor]


class PackedWeight(Tensor):
    """A weight that is packed once for each native kernel and instruction set, and then used by any number of calls.

    It takes the place of the weight (quantised ones, phases and shortcut weights too): it *is* that tensor, of the same
    memory, without its gradient. The first call of each kind packs. Other than with a plain tensor that holds under
    ``torch.inference_mode`` as well, where no counter tells of changes in place: ``load`` new values then.
    Packed memory never moves, so that native code may keep its address for as long as this object lives.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as Parameter's
    _kept: dict[tuple[Pack, str], tuple[int, Tensor]]

    @staticmethod
    def __new__(cls, weight: Tensor) -> PackedWeight:
        made: PackedWeight = torch.Tensor._make_subclass(cls, weight.detach())
        made._kept = {}
        return made

    def packed(self, pack: Pack, isa: str) -> Tensor:
        """``pack``'s result for the instruction set in use; made anew, in place, when the weight has changed."""
        version = 0 if self.is_inference() else self._version
        kept = self._kept.get((pack, isa))
        if kept is None or kept[0] != version:
            kept = self._kept[pack, isa] = (version, pack(self, None if kept is None else kept[1]))
        return kept[1]

    def load(self, weight: Tensor) -> None:
        """Takes over the values of ``weight`` and packs them to where the old ones are. Not while a call is running.

        Raises ``ContractError``, before anything is written, for another shape, dtype or device.
        """
        check.shape_is("PackedWeight.load", "weight", weight, "of the shape of the old one", tuple(self.shape))
        check.dtype_in("PackedWeight.load", "weight", weight, (self.dtype,))
        check.device_is("PackedWeight.load", "weight", weight, self.device)
        with torch.inference_mode():
            self.copy_(weight)
        isa = "" if native is None else native.cpu_isa()
        self._kept = {key: kept for key, kept in self._kept.items() if key[1] == isa}
        version = 0 if self.is_inference() else self._version
        for (pack, _), (_, room) in self._kept.items():
            self._kept[pack, isa] = (version, pack(self, room))

    @property
    def packed_bytes(self) -> int:
        """Memory beyond that of the weight itself."""
        return sum(room.nbytes for _, room in self._kept.values())
