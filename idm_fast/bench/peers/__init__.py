"""The competitors, one file a library: the same network from the same weights (diffusers: its nearest), the same walk.

Every peer gets our fused sampler update, so that what differs is the network alone. One that is not installed, or
fails, is named with its reason; there is no silent gap in a table. ``no_engine`` is this package with its engine off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, util

import torch

from idm_fast.bench.workload import Denoise, Workload


@dataclass(frozen=True)
class Built:
    """A network that is ready to run. ``launches``: kernels (CUDA) or operators (CPU) of one evaluation, where they can
    be counted. ``gflop``: of one evaluation, where it is not the workload's own network. ``note``: what to know."""

    denoise: Denoise
    network_dtype: torch.dtype | None
    launches: int | None = None
    note: str = ""
    gflop: float | None = None


Builder = Callable[[Workload, str, int], Built]  # (workload, dtype's name, threads)


@dataclass(frozen=True)
class Peer:
    """``function``: "module:function", a ``Builder``, imported when asked for. ``dtypes``: by device, best first."""

    name: str
    function: str
    dtypes: dict[str, tuple[str, ...]]
    packages: tuple[str, ...] = ()

    def why_not(self, device: torch.device) -> str | None:
        """Why it cannot run on ``device`` at all, or None."""
        if device.type not in self.dtypes:
            return f"runs on {', '.join(self.dtypes)} only"
        absent = [name for name in self.packages if util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None

    def runs_at(self, wanted: list[str], device: torch.device) -> list[str]:
        """Those of the ``wanted`` dtypes that it knows; where it knows none of them, its own first."""
        known = self.dtypes[device.type]
        return [dtype for dtype in wanted if dtype in known] or [known[0]]

    def build(self, workload: Workload, dtype: str, threads: int) -> Built:
        module, _, function = self.function.partition(":")
        builder: Builder = getattr(import_module(module), function)
        return builder(workload, dtype, threads)


_TORCH = {"cpu": ("bf16", "fp32"), "cuda": ("fp16", "bf16", "fp32")}
PEERS: tuple[Peer, ...] = (
    Peer("no_engine", "idm_fast.bench.ours:modules", _TORCH),
    Peer("eager", f"{__name__}.torch_peers:eager", _TORCH),
    Peer("public", f"{__name__}.public_peer:public", {"cpu": ("fp32", "bf16"), "cuda": ("fp16", "fp32")}),
    Peer("torch_compile", f"{__name__}.torch_peers:compiled", _TORCH),
    Peer("diffusers", f"{__name__}.diffusers_peer:unet2d", _TORCH, ("diffusers",)),
    Peer("xformers", f"{__name__}.torch_peers:with_xformers", {"cuda": ("fp16", "bf16")}, ("xformers",)),
    Peer("openvino", f"{__name__}.openvino_peer:openvino", {"cpu": ("bf16", "fp32")}, ("openvino",)),
    Peer(
        "onnxruntime", f"{__name__}.onnx_peer:onnxruntime", {"cpu": ("fp32",)}, ("onnx", "onnxscript", "onnxruntime")
    ),
)  # fmt: skip
