"""Fused operations, one folder each, with one contract and several backends. See README.md beside this file."""

from __future__ import annotations

if __name__ != "idm_fast.kernels":
    # PyPI's `kernels` is somebody else's package; under that name ours would shadow it or half work.
    raise ImportError(f"this folder is the package idm_fast.kernels and must not be imported as {__name__!r}")

from idm_fast.kernels import extension as extension  # warns once where the native module is missing
from idm_fast.kernels.attention import attention
from idm_fast.kernels.attention.block import attention_block
from idm_fast.kernels.channel_stats import ChannelStats, channel_stats
from idm_fast.kernels.check import ContractError
from idm_fast.kernels.conv2d import PackedWeight, bind_conv2d, conv2d, conv2d_stats, phase_weights
from idm_fast.kernels.conv2d_fp8 import bind_conv2d_fp8, conv2d_fp8, conv2d_fp8_stats
from idm_fast.kernels.conv2d_int8 import bind_conv2d_int8, conv2d_int8, conv2d_int8_stats
from idm_fast.kernels.dispatch import BACKENDS, BackendError, use_backend
from idm_fast.kernels.dynamic_threshold import dynamic_threshold
from idm_fast.kernels.group_norm_silu import group_norm_silu
from idm_fast.kernels.norm_coefficients import norm_coefficients
from idm_fast.kernels.philox_normal import philox_normal
from idm_fast.kernels.resample2x import resample2x
from idm_fast.kernels.sampler_update import sampler_update
from idm_fast.kernels.time_embedding import time_embedding
from idm_fast.kernels.vq_nearest import vq_nearest

__all__ = [
    "BACKENDS",
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
    "time_embedding",
    "use_backend",
    "vq_nearest",
]
