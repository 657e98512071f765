"""How far from the machine's limits: T_roof = max(FLOPs / P, bytes / B), P and B measured in the same run.

B is what one large copy reads and writes a second; P what one large product of the dtype reaches. Inputs that stay in a
cache (``--warm``, or small ones) can beat B. Sums beside a product (a norm's, a softmax's) count as FLOPs too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timing import Candidate, interleaved

COPY_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}
PRODUCT_SIZE = {"cpu": 1536, "cuda": 8192}
SECONDS = 0.5


@dataclass(frozen=True)
class Ceilings:
    bytes_per_s: float
    flops_per_s: dict[torch.dtype, float]

    def seconds(self, flops: int, moved: int, dtype: torch.dtype) -> tuple[float, str]:
        """(T_roof, what sets it: "memory" or "compute")."""
        memory, compute = moved / self.bytes_per_s, flops / self.flops_per_s[dtype]
        return max(memory, compute), "memory" if memory >= compute else "compute"

    def as_json(self) -> dict[str, Any]:
        rates = {str(dtype).removeprefix("torch."): rate / 1e12 for dtype, rate in self.flops_per_s.items()}
        return {"copy_gb_per_s": self.bytes_per_s / 1e9, "product_tflop_per_s": rates}


def measure(device: str, dtypes: list[torch.dtype]) -> Ceilings:
    """One big copy, and one big square product a dtype."""
    kind = torch.device(device).type
    source = torch.ones(COPY_BYTES[kind], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = interleaved({"copy": Candidate(lambda _: target.copy_(source))}, device, SECONDS)["copy"]
    rates = {dtype: _product(device, PRODUCT_SIZE[kind], dtype) for dtype in dtypes}
    return Ceilings(2 * source.nbytes / copy.median, rates)


def _product(device: str, size: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = Candidate(lambda _: torch.mm(a, b, out=out))
    return 2 * size**3 / interleaved({"product": product}, device, SECONDS)["product"].median
