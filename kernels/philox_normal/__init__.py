"""Standard normal noise that depends on an image's own seed, the step and the place alone."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels import check
from idm_fast.kernels.dispatch import FLOATS, Backend, Op
from idm_fast.kernels.interpreter import samples_reason, triton_condition

NAME = "philox_normal"


def philox_normal(
    seeds: Tensor,  # [N] int64
    shape: tuple[int, int, int, int],  # N, C, H, W
    step: int = -1,
    device: torch.device | str | None = None,
) -> Tensor:
    """The standard normal noise of ``step`` (-1: the initial noise of a chain): float32 [N, C, H, W] channels_last.

    The numbers depend on the seed, the step and the element's place in NHWC order alone, not on batch, device or
    backend (up to float32 rounding). ``device``: where the noise is wanted, None for that of ``seeds``.

    Raises ``ContractError`` for arguments outside the contract and ``BackendError`` where no backend can run.
    Source: Salmon et al., SC 2011; Box & Muller, 1958; the mapping is that of reference.py.
    """
    if len(shape) != 4 or min(shape) < 0:
        check.fail(NAME, "shape", "4 sizes", "(N, C, H, W)", tuple(shape))
    seeds_are(NAME, seeds, shape[0])
    if not check.is_index(step) or not -1 <= step < 2**32 - 1:
        check.fail(NAME, "step", "a 32-bit counter", "-1 <= step < 2**32 - 1", step)
    place = torch.device(device) if device is not None else seeds.device
    if 0 in shape:
        return torch.empty(shape, dtype=torch.float32, device=place, memory_format=torch.channels_last)
    noise: Tensor = OP.run(place, torch.float32, seeds.to(place), tuple(shape), step)
    return noise


def seeds_are(op: str, seeds: Tensor, n: int) -> None:
    """The check of a ``seeds`` argument, shared by every operation that draws noise."""
    check.dtype_in(op, "seeds", seeds, (torch.int64,))
    check.shape_is(op, "seeds", seeds, "[N]", (n,))
    if not seeds.is_contiguous():
        check.fail(op, "seeds", "contiguous", "stride 1", f"stride {seeds.stride(0)}")


# The noise is float32; asked for any network's dtype (idm-fast ops), the answer is the same.
OP = Op(
    NAME,
    "n ~ N(0, 1) from (seed, step, element)",
    [
        Backend(
            "triton",
            f"{__name__}.triton_kernel:philox_normal",
            frozenset({"cuda", "cpu"}),
            FLOATS,
            min_capability=(8, 0),
            limits=lambda seeds, shape, step: samples_reason(len(seeds)),
            condition=triton_condition,
        ),
        Backend("cuda", f"{__name__}.cuda:philox_normal", frozenset({"cuda"}), FLOATS, min_capability=(8, 0)),
        Backend("cpu", f"{__name__}.native:philox_normal", frozenset({"cpu"}), FLOATS),
        Backend("torch", f"{__name__}.torch_backend:philox_normal", frozenset({"cpu", "cuda"}), FLOATS),
        Backend("reference", f"{__name__}.reference:philox_normal", frozenset({"cpu", "cuda"}), FLOATS),
    ],
)
