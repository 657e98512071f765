"""``Walk``: one batch on its way from noise to picture."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from idm_fast.diffusion import SamplerTable
from idm_fast.engine.buckets import padded
from idm_fast.engine.engine import Callback
from idm_fast.sampling import SampleSettings


@dataclass(frozen=True, eq=False)
class Walk:
    """N images on a model's device, and how they are walked.

    ``x`` [N, C, h, w]: where the walk begins; ``cond`` [N, ...]: what the network is shown, None of an unconditional
    one. Both are the degraded crops until the kind of model has put in their place what it makes of them. ``seeds``
    int64 [N]. ``settings`` leave nothing open, and ``table`` is theirs. ``report(e, x, x0_hat)`` after evaluation e.
    ``fill``: so many of the images, the last, only make up a batch.
    """

    x: Tensor
    cond: Tensor | None
    seeds: Tensor
    table: SamplerTable
    settings: SampleSettings
    report: Callback | None = None
    fill: int = 0

    @property
    def whole(self) -> bool:
        """Whether it begins at pure noise."""
        return self.settings.strength == 1

    def __len__(self) -> int:
        return len(self.x)

    def part(self, which: slice) -> Walk:
        """Of some of the images."""
        cond = None if self.cond is None else self.cond[which]
        return replace(self, x=self.x[which], cond=cond, seeds=self.seeds[which])

    def padded(self, size: int) -> Walk:
        """With the last image again and again, until there are ``size``."""
        cond = None if self.cond is None else padded(self.cond, size)
        x, seeds = padded(self.x, size), padded(self.seeds, size)
        return replace(self, x=x, cond=cond, seeds=seeds, fill=self.fill + size - len(self))
