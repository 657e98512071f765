"""What the modules of a VQGAN are called here, in taming-transformers and LDM, and in diffusers.

All three have the same modules. Only an attention differs in shape: one joint projection here, three elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from idm_fast.config_vqgan import VqganConfig

Family = Literal["taming", "diffusers"]
LEAVES = ("weight", "bias")


@dataclass(frozen=True)
class Module:
    """One module with parameters: its ``name`` here, and those of its parts elsewhere, which are stacked.

    ``linear``: diffusers keeps it as a matrix, not as a 1x1 convolution.
    """

    name: str
    taming: tuple[str, ...]
    diffusers: tuple[str, ...]
    leaves: tuple[str, ...] = LEAVES
    linear: bool = False

    def parts(self, family: Family) -> tuple[str, ...]:
        return self.taming if family == "taming" else self.diffusers


def modules(config: VqganConfig) -> list[Module]:
    """Every module of the network that ``config`` describes; one with an unshuffle has no name elsewhere."""
    levels, last = range(len(config.channel_mult)), len(config.channel_mult) - 1
    widths = [config.model_channels * mult for mult in config.channel_mult]
    found = [
        _same("to_latent", "quant_conv"),
        _same("from_latent", "post_quant_conv"),
        Module("codebook", ("quantize.embedding",), ("quantize.embedding",), ("weight",)),
    ]
    for side in ("encoder", "decoder"):
        found.append(_same(f"{side}.stem", f"{side}.conv_in"))
        found += _block(f"{side}.middle.0", f"{side}.mid.block_1", f"{side}.mid_block.resnets.0")
        if config.middle_attention:
            found += _attention(f"{side}.middle.1", f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0")
        second = 2 if config.middle_attention else 1
        found += _block(f"{side}.middle.{second}", f"{side}.mid.block_2", f"{side}.mid_block.resnets.1")
        found.append(Module(f"{side}.out_norm", (f"{side}.norm_out",), (f"{side}.conv_norm_out",)))
        found.append(_same(f"{side}.out_conv", f"{side}.conv_out"))

    index, before = 0, config.stem_width
    for level in levels:
        path = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        stage, index = _stage("encoder.down", index, path, config.num_res_blocks[level], level, before, config)
        found, before = found + stage, widths[level]
        if level != last:
            here = f"encoder.down.{index}.conv"
            found.append(Module(here, (f"{path[0]}.downsample.conv",), (f"{path[1]}.downsamplers.0.conv",)))
            index += 1

    index, before = 0, widths[last]
    for level in reversed(levels):  # taming counts levels from the finest, diffusers from the coarsest
        path = f"decoder.up.{level}", f"decoder.up_blocks.{last - level}"
        stage, index = _stage("decoder.up", index, path, config.num_res_blocks[level] + 1, level, before, config)
        found, before = found + stage, widths[level]
        if level:
            here = f"decoder.up.{index}.conv"
            found.append(Module(here, (f"{path[0]}.upsample.conv",), (f"{path[1]}.upsamplers.0.conv",)))
            index += 1
    return found


def _stage(
    here: str, index: int, path: tuple[str, str], blocks: int, level: int, before: int, config: VqganConfig
) -> tuple[list[Module], int]:
    """The blocks of one level from position ``index`` of the list ``here`` on, and the position behind them."""
    found: list[Module] = []
    taming, diffusers = path
    changes = before != config.model_channels * config.channel_mult[level]
    for block in range(blocks):
        shortcut = changes and block == 0
        found += _block(f"{here}.{index}", f"{taming}.block.{block}", f"{diffusers}.resnets.{block}", shortcut)
        index += 1
        if level in config.attention_levels:
            found += _attention(f"{here}.{index}", f"{taming}.attn.{block}", f"{diffusers}.attentions.{block}")
            index += 1
    return found, index


def _same(name: str, elsewhere: str) -> Module:
    return Module(name, (elsewhere,), (elsewhere,))


def _block(name: str, taming: str, diffusers: str, shortcut: bool = False) -> list[Module]:
    inside = ("norm1", "conv1", "norm2", "conv2")
    found = [Module(f"{name}.{part}", (f"{taming}.{part}",), (f"{diffusers}.{part}",)) for part in inside]
    if shortcut:
        found.append(Module(f"{name}.skip", (f"{taming}.nin_shortcut",), (f"{diffusers}.conv_shortcut",)))
    return found


def _attention(name: str, taming: str, diffusers: str) -> list[Module]:
    each = ("q", "k", "v")
    qkv = tuple(f"{taming}.{part}" for part in each), tuple(f"{diffusers}.to_{part}" for part in each)
    return [
        Module(f"{name}.norm", (f"{taming}.norm",), (f"{diffusers}.group_norm",)),
        Module(f"{name}.qkv", *qkv, linear=True),
        Module(f"{name}.out", (f"{taming}.proj_out",), (f"{diffusers}.to_out.0",), linear=True),
    ]


def names(config: VqganConfig, family: Family) -> dict[str, tuple[str, ...]]:
    """Our tensor -> theirs, which are stacked along their first dimension."""
    return {
        f"{module.name}.{leaf}": tuple(f"{part}.{leaf}" for part in module.parts(family))
        for module in modules(config)
        for leaf in module.leaves
    }


def level_widths(stem: int, widths: Sequence[int]) -> dict[str, Any]:
    """The fields of ``VqganConfig`` for a stem and levels, finest first, of so many channels."""
    unit = math.gcd(stem, *widths)
    return {
        "model_channels": unit, "channel_mult": tuple(width // unit for width in widths),
        "stem_channels": 0 if stem == unit else stem,
    }  # fmt: skip


def foreign(state: Mapping[str, Tensor], config: VqganConfig, family: Family) -> dict[str, Tensor]:
    """Our state dict as one of ``family``."""
    found = {}
    for module in modules(config):
        parts = module.parts(family)
        for leaf in module.leaves:
            tensor = state[f"{module.name}.{leaf}"]
            if module.linear and leaf == "weight" and family == "diffusers":
                tensor = tensor.flatten(1)
            for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True):
                found[f"{part}.{leaf}"] = piece.contiguous()
    return found
