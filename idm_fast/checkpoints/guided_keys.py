"""The keys of guided-diffusion's U-Net (improved-diffusion, DifFace and latent diffusion share them): what network
they are of, and which of them is which tensor of ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from idm_fast.checkpoints.format import need
from idm_fast.errors import IdmFastError
from idm_fast.models.blocks import ResBlock
from idm_fast.models.unet import Level, UNet

_RES = {"norm1": "in_layers.0", "conv1": "in_layers.2", "embed": "emb_layers.1", "norm2": "out_layers.0",
        "conv2": "out_layers.3", "skip": "skip_connection"}  # fmt: skip
_ATTENTION = {"norm": "norm", "qkv": "qkv", "out": "proj_out"}
_MOST_BLOCKS = 1000


def looks_guided(names: Mapping[str, Any] | frozenset[str]) -> bool:
    """Whether the U-Net's own names are there, without any prefix."""
    return all(name in names for name in ("time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"))


@dataclass(frozen=True)
class Structure:
    """What the shapes say: ``fields`` of ``UNetConfig``, and the width of every attention."""

    fields: dict[str, Any]
    in_channels: int  # of the first convolution: the image and its condition
    attention_widths: tuple[int, ...]


def structure(where: str, tensors: Mapping[str, Tensor]) -> Structure:
    """Reads the network off its tensors. Raises ``IdmFastError`` naming the one that does not fit."""
    _refuse_unknown_blocks(where, tensors)
    stem, in_channels = need(where, tensors, "input_blocks.0.0.weight", 4)[:2]
    hidden, time_channels = need(where, tensors, "time_embed.0.weight", 2)
    if hidden != 4 * time_channels:
        raise IdmFastError(f"{where}: time_embed.0.weight must be [4 n, n], got ({hidden}, {time_channels})")
    embed = need(where, tensors, "time_embed.2.weight", 2)[0]
    blocks, resample = _levels(where, tensors)
    widths, attention, attention_widths, position = [], [], [], 1
    for level, count in enumerate(blocks):
        first = f"input_blocks.{position}"
        widths.append(need(where, tensors, f"{first}.0.in_layers.2.weight", 4)[0])
        if f"{first}.1.qkv.weight" in tensors:
            attention.append(level)
            attention_widths.append(widths[-1])
        position += count + 1
    attention_widths.append(need(where, tensors, "middle_block.1.norm.weight", 1)[0])
    if widths[0] != stem:
        raise IdmFastError(f"{where}: the first level must be as wide as the stem = {stem}, got {widths[0]}")
    scale_shift = need(where, tensors, "input_blocks.1.0.emb_layers.1.weight", 2)[0] == 2 * widths[0]
    unit = stem if all(width % stem == 0 for width in widths) else math.gcd(*widths)
    classes = need(where, tensors, "label_emb.weight", 2)[0] if "label_emb.weight" in tensors else 0
    fields = {
        "model_channels": unit,
        "channel_mult": tuple(width // unit for width in widths),
        "num_res_blocks": tuple(blocks),
        "attention_levels": tuple(attention),
        "out_channels": need(where, tensors, "out.2.weight", 4)[0],
        "embed_channels": 0 if embed == 4 * time_channels else embed,
        "time_channels": 0 if time_channels == stem else time_channels,
        "use_scale_shift_norm": scale_shift,
        "resample": resample,
        "num_classes": classes,
    }
    return Structure(fields, in_channels, tuple(attention_widths))


def modules(unet: UNet, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(our module, theirs). Theirs keeps an up-sampling inside the block that comes before it."""
    for ours, theirs in _modules(unet):
        yield ours, prefix + theirs


def _modules(unet: UNet) -> Iterator[tuple[str, str]]:
    yield from {"time.fc1": "time_embed.0", "time.fc2": "time_embed.2", "label": "label_emb",
                "stem": "input_blocks.0.0", "out_norm": "out.0", "out_conv": "out.2"}.items()  # fmt: skip
    for i, module in enumerate(unet.down):
        assert isinstance(module, Level)
        yield from _level(f"down.{i}", module, f"input_blocks.{i + 1}.0", f"input_blocks.{i + 1}.1")
        yield f"down.{i}.block.conv", f"input_blocks.{i + 1}.0.op"
    for i, (block, attention) in enumerate((("middle_block.0", "middle_block.1"), ("middle_block.2", ""))):
        middle = unet.middle[i]
        assert isinstance(middle, Level)
        yield from _level(f"middle.{i}", middle, block, attention)
    block_index, part = -1, 0
    for i, module in enumerate(unet.up):
        assert isinstance(module, Level)
        if isinstance(module.block, ResBlock) and module.block.resize is None:
            block_index, part = block_index + 1, 2 if module.attention is not None else 1
            yield from _level(f"up.{i}", module, f"output_blocks.{block_index}.0", f"output_blocks.{block_index}.1")
        else:
            yield from _level(f"up.{i}", module, f"output_blocks.{block_index}.{part}", "")
            yield f"up.{i}.block.conv", f"output_blocks.{block_index}.{part}.conv"


def _level(ours: str, module: Level, theirs: str, attention: str) -> Iterator[tuple[str, str]]:
    if isinstance(module.block, ResBlock):
        yield from ((f"{ours}.block.{mine}", f"{theirs}.{name}") for mine, name in _RES.items())
    if module.attention is not None:
        yield from ((f"{ours}.attention.{mine}", f"{attention}.{name}") for mine, name in _ATTENTION.items())


def _levels(where: str, tensors: Mapping[str, Tensor]) -> tuple[list[int], str]:
    """Residual blocks per level, finest first, and how the resolution changes.

    The way up tells: the block that ends a level holds the up-sampling too, while on the way down a block that halves
    the resolution has the same names as any other.
    """
    counts, resample, run = [], "conv", 0
    total = _count(where, tensors, "output_blocks")
    for i in range(total):
        run += 1
        parts = {name.split(".")[2] for name in tensors if name.startswith(f"output_blocks.{i}.")} - {"0"}
        conv = any(f"output_blocks.{i}.{part}.conv.weight" in tensors for part in parts)
        inside = any(f"output_blocks.{i}.{part}.in_layers.2.weight" in tensors for part in parts)
        if conv or inside or i == total - 1:
            counts.append(run - 1)  # one more on the way up than on the way down
            run, resample = 0, "resblock" if inside else resample
    blocks = counts[::-1]
    if min(blocks) < 1:
        raise IdmFastError(
            f"{where}: output_blocks must be 2 or more for each level, got {[n + 1 for n in blocks[::-1]]}"
        )
    expected, got = sum(blocks) + len(blocks), _count(where, tensors, "input_blocks")
    if expected != got:
        raise IdmFastError(
            f"{where}: input_blocks must be {expected} for the {len(blocks)} levels that output_blocks show, got {got} "
            "(a network that changes resolution without a convolution (conv_resample=False) is not supported)"
        )
    return blocks, resample


def _count(where: str, tensors: Mapping[str, Tensor], stem: str) -> int:
    found = {int(match[1]) for name in tensors if (match := re.match(rf"{stem}\.(\d{{1,6}})\.", name))}
    if not found or found != set(range(len(found))) or len(found) > _MOST_BLOCKS:
        absent = sorted(set(range(len(found))) - found)[:3]
        raise IdmFastError(f"{where}: {stem} must be numbered from 0 without gaps, got {len(found)} without {absent}")
    return len(found)


def _refuse_unknown_blocks(where: str, tensors: Mapping[str, Tensor]) -> None:
    for name in tensors:
        if ".transformer_blocks." in name:
            raise IdmFastError(
                f"{where}: network must be unconditional, by class or by concatenation, got cross-attention in {name}"
            )
