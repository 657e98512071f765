"""The list of fused operations: ``OPS`` maps a name to its table of backends.

The operations themselves live in ``idm_fast.kernels``, one folder each, and are re-exported here.
"""

from __future__ import annotations

from importlib import import_module

from idm_fast.kernels import (
    BACKENDS,
    BackendError,
    ChannelStats,
    ContractError,
    PackedWeight,
    attention,
    attention_block,
    bind_conv2d,
    bind_conv2d_fp8,
    bind_conv2d_int8,
    channel_stats,
    conv2d,
    conv2d_fp8,
    conv2d_fp8_stats,
    conv2d_int8,
    conv2d_int8_stats,
    conv2d_stats,
    dynamic_threshold,
    group_norm_silu,
    norm_coefficients,
    phase_weights,
    philox_normal,
    resample2x,
    sampler_update,
    time_embedding,
    use_backend,
    vq_nearest,
)
from idm_fast.kernels.case import Suite
from idm_fast.kernels.dispatch import Op

NAMES = (
    "group_norm_silu",
    "channel_stats",
    "norm_coefficients",
    "attention",
    "sampler_update",
    "philox_normal",
    "dynamic_threshold",
    "time_embedding",
    "conv2d",
    "conv2d_int8",
    "conv2d_fp8",
    "resample2x",
    "vq_nearest",
)

OPS: dict[str, Op] = {name: import_module(f"idm_fast.kernels.{name}").OP for name in NAMES}


def suite(name: str) -> Suite:
    """The cases of an operation and how to judge them: what tests and benchmarks run."""
    found: Suite = import_module(f"idm_fast.kernels.{name}.cases").SUITE
    return found


__all__ = [
    "BACKENDS",
    "NAMES",
    "OPS",
    "BackendError",
    "ChannelStats",
    "ContractError",
    "PackedWeight",
    "attention",
    "attention_block",
    "bind_conv2d",
    "bind_conv2d_fp8",
    "bind_conv2d_int8",
    "channel_stats",
    "conv2d",
    "conv2d_fp8",
    "conv2d_fp8_stats",
    "conv2d_int8",
    "conv2d_int8_stats",
    "conv2d_stats",
    "dynamic_threshold",
    "group_norm_silu",
    "norm_coefficients",
    "phase_weights",
    "philox_normal",
    "resample2x",
    "sampler_update",
    "suite",
    "time_embedding",
    "use_backend",
    "vq_nearest",
]
