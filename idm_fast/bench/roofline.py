"""How far from the machine's limits, which are measured in the same run.

An operation: T_roof = max(FLOPs / P, bytes / B). A network: the sum over its layers of
max(FLOPs / P, weight bytes / B, activation bytes / B_cache), since a layer finds its input in a cache where it fits.
P is what one large product of the dtype reaches (on a CPU, where torch's matrix product and its convolution come from
two libraries, the better of both), B what one large copy reads and writes a second, B_cache the same of a copy that
stays in the last-level cache; each by its fastest call, since a limit is what the machine can do undisturbed. Inputs
that stay in a cache (small ones, or ``--warm``) can beat B. Sums beside a product (a norm's, a softmax's) count as
FLOPs too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from idm_fast.bench.timing import Candidate, interleaved
from idm_fast.bench.work import Layer

COPY_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}
CACHED_BYTES = {"cpu": 2**20, "cuda": 8 * 2**20}  # source and target together stay in the last-level cache
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}  # on a CPU a few milliseconds: less than a time slice of a busy one
SECONDS = 0.5


@dataclass(frozen=True)
class Ceilings:
    bytes_per_s: float
    flops_per_s: dict[torch.dtype, float]
    cached_bytes_per_s: float | None = None  # None: not measured, the copy's rate holds

    def seconds(self, flops: int, moved: int, dtype: torch.dtype) -> tuple[float, str]:
        """Of an operation: (T_roof, what sets it: "memory" or "compute")."""
        memory, compute = moved / self.bytes_per_s, flops / self.flops_per_s[dtype]
        return max(memory, compute), "memory" if memory >= compute else "compute"

    def layer(self, layer: Layer, dtype: torch.dtype) -> tuple[float, str]:
        """Of one layer of a network: (T_roof, "compute", "weights" or "activations")."""
        cached = max(self.bytes_per_s, self.cached_bytes_per_s or 0.0)
        terms = {
            "compute": layer.flops / self.flops_per_s[dtype],
            "weights": layer.weight_elements * dtype.itemsize / self.bytes_per_s,
            "activations": layer.activation_elements * dtype.itemsize / cached,
        }
        bound = max(terms, key=lambda name: terms[name])
        return terms[bound], bound

    def network(self, layers: Iterable[Layer], dtype: torch.dtype) -> float:
        """T_roof of one evaluation, seconds."""
        return sum(self.layer(layer, dtype)[0] for layer in layers)

    def as_json(self) -> dict[str, Any]:
        rates = {str(dtype).removeprefix("torch."): rate / 1e12 for dtype, rate in self.flops_per_s.items()}
        found: dict[str, Any] = {"copy_gb_per_s": self.bytes_per_s / 1e9, "product_tflop_per_s": rates}
        if self.cached_bytes_per_s is not None:
            found["cached_copy_gb_per_s"] = self.cached_bytes_per_s / 1e9
        return found


def measure(device: str, dtypes: list[torch.dtype], *, cached: bool = False) -> Ceilings:
    """One big copy, one big square product a dtype, and with ``cached`` one small copy."""
    kind = torch.device(device).type
    rates = {dtype: _product(device, PRODUCT_SIZE[kind], dtype) for dtype in dtypes}
    small = _copy(device, CACHED_BYTES[kind]) if cached else None
    return Ceilings(_copy(device, COPY_BYTES[kind]), rates, small)


def _copy(device: str, size: int) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = interleaved({"copy": Candidate(lambda _: target.copy_(source))}, device, SECONDS)["copy"]
    return 2 * source.nbytes / copy.best


def _product(device: str, size: int, dtype: torch.dtype) -> float:
    calls = [EIGHT_BITS.get(dtype, _float_product)(device, size, dtype)]
    if torch.device(device).type == "cpu" and dtype not in EIGHT_BITS:
        calls.append(_convolution(dtype))
    found = interleaved({f"{i}": Candidate(call.run) for i, call in enumerate(calls)}, device, SECONDS)
    return max(call.flops / found[f"{i}"].best for i, call in enumerate(calls))


class _Call(NamedTuple):
    flops: int
    run: Callable[[int], Any]


def _float_product(device: str, size: int, dtype: torch.dtype) -> _Call:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return _Call(2 * size**3, lambda _: torch.mm(a, b, out=out))


def _int8_product(device: str, size: int, _: torch.dtype) -> _Call:
    a, b = (torch.randint(-127, 128, (size, size), device=device).to(torch.int8) for _ in range(2))
    return _Call(2 * size**3, lambda _: torch._int_mm(a, b))


def _e4m3_product(device: str, size: int, dtype: torch.dtype) -> _Call:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    one = torch.ones((), device=device)
    return _Call(2 * size**3, lambda _: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16))


# Products that torch has under names of their own.
EIGHT_BITS = {torch.int8: _int8_product, torch.float8_e4m3fn: _e4m3_product}


def _convolution(dtype: torch.dtype) -> _Call:
    x = torch.randn(1, 192, 64, 64).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(192, 192, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def run(_: int) -> Any:
        return torch.conv2d(x, weight, padding=1)

    return _Call(2 * x.numel() * 9 * 192, run)
