"""SwinIR (2108.10257) as an estimator of faces: DifFace's public files, and others of the same build.

The keys tell everything. Of SwinIR's variants only this one gives a picture of the size it was shown: pixel-unshuffle
at the beginning, nearest neighbours and convolutions at the end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from idm_fast.checkpoints.format import Format, Reading, need
from idm_fast.checkpoints.settings import Setting, Settings
from idm_fast.checkpoints.source import Source
from idm_fast.errors import IdmFastError
from idm_fast.models.swinir import SwinIR, SwinIRConfig

_FIRST = "layers.0.residual_group.blocks.0"
_COMPUTED = (".attn.relative_position_index", ".attn_mask")  # tables that follow from the shape
_SETTINGS = (
    Setting("embed_dim", "whole number", "width of the transformer", inferred=True),
    Setting("depths", "list of whole numbers", "blocks of each residual group", inferred=True),
    Setting("num_heads", "list of whole numbers", "heads of each group's attentions", inferred=True),
    Setting("window_size", "whole number", "side of an attention window", inferred=True),
    Setting("unshuffle_scale", "whole number", "factor of the pixel-unshuffle stem", inferred=True),
    Setting("sf", "whole number", "factor by which the end enlarges", inferred=True),
)


def _structure(where: str, tensors: Mapping[str, Tensor]) -> SwinIRConfig:
    """What the shapes tell. Raises ``IdmFastError`` naming the tensor by which it is another variant."""
    for name, variant in (
        ("conv_first.weight", "no pixel-unshuffle"), ("conv_after_body.0.weight", "three convolutions a connection"),
        ("upsample.0.weight", "pixel-shuffle at the end"), ("absolute_pos_embed", "a position embedding"),
    ):  # fmt: skip
        if name in tensors:
            raise IdmFastError(f"{where}: SwinIR must be of DifFace's build, got {variant} ({name})")
    dim, channels = need(where, tensors, "conv_first.1.weight", 4)[:2]
    scale = math.isqrt(channels // 3)
    doublings = sum(f"conv_up{i}.weight" in tensors for i in (1, 2, 3))
    if channels != 3 * scale**2 or scale != 2**doublings:
        raise IdmFastError(
            f"{where}: SwinIR must give a picture of the size it is shown, got {channels} channels of an unshuffled "
            f"picture and {doublings} doublings"
        )
    blocks: dict[int, int] = {}
    for name in tensors:
        if match := re.fullmatch(r"layers\.(\d{1,3})\.residual_group\.blocks\.(\d{1,3})\.norm1\.weight", name):
            blocks[int(match[1])] = max(blocks.get(int(match[1]), 0), int(match[2]) + 1)
    table = "attn.relative_position_bias_table"
    rows = need(where, tensors, f"{_FIRST}.{table}", 2)[0]
    window = (math.isqrt(rows) + 1) // 2
    if rows != (2 * window - 1) ** 2:
        raise IdmFastError(f"{where}: {_FIRST}.{table} must have (2 window - 1)^2 rows, got {rows}")
    heads = [need(where, tensors, f"layers.{i}.residual_group.blocks.0.{table}", 2)[1] for i in range(len(blocks))]
    return SwinIRConfig(
        dim, tuple(blocks[i] for i in sorted(blocks)), tuple(heads), window,
        need(where, tensors, f"{_FIRST}.mlp.fc1.weight", 2)[0], scale, need(where, tensors, "conv_hr.weight", 4)[0],
    )  # fmt: skip


def _read(source: Source, settings: Settings, averaged: bool | None) -> Reading:
    where = str(source.path)
    tensors = source.averaged if averaged is not False and source.averaged else source.tensors
    try:
        config = _structure(where, tensors)
    except IdmFastError as error:
        raise error if where in str(error) else IdmFastError(f"{where}: {error}") from None
    settings.agree("embed_dim", config.embed_dim)
    settings.agree("depths", list(config.depths))
    settings.agree("num_heads", list(config.heads))
    settings.agree("window_size", config.window)
    settings.agree("unshuffle_scale", config.scale)
    settings.agree("sf", config.scale)
    with torch.device("meta"):
        module = SwinIR(config)
    names = {name: (name,) for name in module.state_dict()}
    dropped = frozenset(name for name in tensors if name.endswith(_COMPUTED))
    picked = None if source.averaged is None else tensors is source.averaged
    return Reading(config, module, names, tensors, dropped, picked)


SWINIR = Format(
    "swinir",
    "SwinIR, an estimator of clean faces (DifFace)",
    lambda source: f"{_FIRST}.attn.qkv.weight" in source.tensors,
    _read,
    _SETTINGS,
    frozenset({
        "format", "img_size", "patch_size", "in_chans", "mlp_ratio", "img_range", "upsampler", "resi_connection",
        "unshuffle",
    }),
)  # fmt: skip
