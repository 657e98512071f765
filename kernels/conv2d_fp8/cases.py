"""Inputs of conv2d_fp8: those of conv2d_int8 in e4m3."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels.conv2d_fp8 import activation_scale, conv2d_fp8, quantise_weight
from idm_fast.kernels.conv2d_fp8.quantise import LARGEST
from idm_fast.kernels.conv2d_fp8.reference import conv2d_fp8 as reference
from idm_fast.kernels.conv2d_int8.cases import Quantised, quantised_suite


def range_of(x: Tensor) -> Tensor:
    """The factor that brings the largest of x to the largest e4m3 number."""
    return (x.abs().max().float() / LARGEST).reshape(1, 1)


def spacings(a: Tensor, activation: Tensor) -> Tensor:
    v = (a / activation[:, :, None, None]).clamp(-LARGEST, LARGEST)
    return v / torch.exp2(v.abs().clamp_min(2.0**-6).log2().floor() - 3)  # three bits behind the first


SUITE = quantised_suite(
    Quantised(conv2d_fp8, reference, quantise_weight, activation_scale, range_of, spacings, sigmas=8.0)
)
