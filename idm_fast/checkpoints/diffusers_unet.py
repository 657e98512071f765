"""A folder of diffusers that holds a ``UNet2DModel``, alone or in a pipeline with its scheduler: how it is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from idm_fast.checkpoints.diffusers_scheduler import SCHEDULER_SETTINGS, chain
from idm_fast.checkpoints.format import Format, Reading
from idm_fast.checkpoints.settings import Setting, Settings
from idm_fast.checkpoints.source import Source, read_json
from idm_fast.config import ModelConfig, from_dict
from idm_fast.config import UNetConfig as Config
from idm_fast.errors import IdmFastError
from idm_fast.models.blocks import ResBlock
from idm_fast.models.unet import Level, UNet

CLASS = "UNet2DModel"
# Blocks by name -> (with attention, how they change the resolution; None: as the config's own word says).
DOWN = {"DownBlock2D": (False, "conv"), "AttnDownBlock2D": (True, None), "ResnetDownsampleBlock2D": (False, "resnet")}
UP = {"UpBlock2D": (False, "conv"), "AttnUpBlock2D": (True, None), "ResnetUpsampleBlock2D": (False, "resnet")}
DEFAULTS: dict[str, Any] = {
    "sample_size": None, "in_channels": 3, "out_channels": 3, "center_input_sample": False, "freq_shift": 0,
    "time_embedding_type": "positional", "time_embedding_dim": None, "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D"] + 3 * ["AttnDownBlock2D"], "mid_block_type": "UNetMidBlock2D",
    "up_block_types": 3 * ["AttnUpBlock2D"] + ["UpBlock2D"], "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2, "mid_block_scale_factor": 1, "downsample_padding": 1, "downsample_type": "conv",
    "upsample_type": "conv", "dropout": 0.0, "act_fn": "silu", "attention_head_dim": 8, "norm_num_groups": 32,
    "attn_norm_num_groups": None, "norm_eps": 1e-5, "resnet_time_scale_shift": "default", "add_attention": True,
    "class_embed_type": None, "num_class_embeds": None, "num_train_timesteps": None,
}  # fmt: skip
# Fields that must have these values: others are another network.
_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"), "time_embedding_type": ("positional",), "mid_block_type": ("UNetMidBlock2D",),
    "class_embed_type": (None,), "resnet_time_scale_shift": ("default", "scale_shift"),
    "downsample_type": ("conv", "resnet"), "upsample_type": ("conv", "resnet"), "downsample_padding": (0, 1),
}  # fmt: skip
_RES = {"norm1": "norm1", "conv1": "conv1", "embed": "time_emb_proj", "norm2": "norm2", "conv2": "conv2",
        "skip": "conv_shortcut"}  # fmt: skip
_TODAY = ("to_q", "to_k", "to_v", "to_out.0")
_BEFORE = ("query", "key", "value", "proj_attn")


def names(unet: UNet, old: bool = False) -> dict[str, tuple[str, ...]]:
    """Our tensor -> theirs: q, k and v are stacked. ``old``: the attention's names of early versions."""
    q, k, v, out = _BEFORE if old else _TODAY
    table = dict(_modules(unet))
    made: dict[str, tuple[str, ...]] = {}
    for name in unet.state_dict():
        owner, _, leaf = name.rpartition(".")
        block, _, part = owner.rpartition(".")
        if part == "qkv":
            made[name] = tuple(f"{table[block]}.{each}.{leaf}" for each in (q, k, v))
        elif block.endswith("attention"):
            made[name] = (f"{table[block]}.{'group_norm' if part == 'norm' else out}.{leaf}",)
        else:
            made[name] = (f"{table[owner]}.{leaf}",)
    return made


def _modules(unet: UNet) -> Iterator[tuple[str, str]]:
    """(our module, theirs), of attentions and blocks by level: they number blocks inside a level, we go straight on."""
    yield from {"time.fc1": "time_embedding.linear_1", "time.fc2": "time_embedding.linear_2",
                "label": "class_embedding", "stem": "conv_in", "out_norm": "conv_norm_out",
                "out_conv": "conv_out"}.items()  # fmt: skip
    for way, resampler in (("down", "downsamplers"), ("up", "upsamplers")):
        level, index = 0, 0
        for i, module in enumerate(getattr(unet, way)):
            assert isinstance(module, Level)
            here, there = f"{way}.{i}", f"{way}_blocks.{level}"
            if isinstance(module.block, ResBlock) and module.block.resize is None:
                yield from _level(here, there, index)
                index += 1
            else:
                yield f"{here}.block.conv", f"{there}.{resampler}.0.conv"
                yield from ((f"{here}.block.{ours}", f"{there}.{resampler}.0.{name}") for ours, name in _RES.items())
                level, index = level + 1, 0
    for i in range(2):
        yield from _level(f"middle.{i}", "mid_block", i)


def _level(here: str, there: str, index: int) -> Iterator[tuple[str, str]]:
    yield from ((f"{here}.block.{ours}", f"{there}.resnets.{index}.{name}") for ours, name in _RES.items())
    yield f"{here}.attention", f"{there}.attentions.{index}"


def _read(source: Source, settings: Settings, averaged: bool | None) -> Reading:
    where = f"{source.path}: config.json"
    unet = _config(where, source.config, settings)
    diffusion, sampler, steps = chain(source, settings)
    with torch.device("meta"):
        module = UNet(unet)
    old = any(".query." in name or ".proj_attn." in name for name in source.tensors)
    config = ModelConfig(source.path.resolve().name, unet, diffusion, sampler, steps, latent=_latent(source.path))
    return Reading(config, module, names(module, old), source.tensors)


def _latent(folder: Path) -> bool:
    """Whether a pipeline's folder has an autoencoder beside its network, or names one that was not fetched."""
    index = folder / "model_index.json"
    parts = set(read_json(index)) if index.is_file() else set()
    return any(name in parts or (folder / name).is_dir() for name in ("vqvae", "vae"))


def _config(where: str, values: Mapping[str, Any], settings: Settings) -> Config:
    given = {key: value for key, value in values.items() if not key.startswith("_")}
    if unknown := sorted(set(given) - set(DEFAULTS)):
        raise IdmFastError(f"{where}: must hold fields of a {CLASS}, got {unknown[:5]}")
    c = DEFAULTS | given
    for key, allowed in _FIXED.items():
        if c[key] not in allowed or isinstance(c[key], bool):
            raise IdmFastError(f"{where}: {key} must be {' or '.join(map(str, allowed))}, got {c[key]!r:.60}")
    widths, layers = c["block_out_channels"], c["layers_per_block"]
    if not isinstance(widths, list) or not widths or not all(_whole(number) for number in [*widths, layers]):
        raise IdmFastError(
            f"{where}: block_out_channels and layers_per_block must be whole numbers from 1 up, got {widths!r:.60} and "
            f"{layers!r:.20}"
        )
    if c["time_embedding_dim"] not in (None, 4 * widths[0]):
        raise IdmFastError(f"{where}: time_embedding_dim must be {4 * widths[0]}, got {c['time_embedding_dim']!r:.60}")
    attention, resample = _blocks(where, c)
    unit = widths[0] if all(width % widths[0] == 0 for width in widths) else math.gcd(*widths)
    multiple = 2 ** (len(widths) - 1)
    side = c["sample_size"] if _whole(c["sample_size"]) else multiple
    head = c["attention_head_dim"]
    cond = settings.ask("cond_channels", 0) if _whole(c["in_channels"]) and c["in_channels"] > 3 else 0
    made = {
        "image_size": -(-side // multiple) * multiple,  # a hint: the library does not hold a network to it
        "model_channels": unit, "channel_mult": [width // unit for width in widths],
        "num_res_blocks": [layers] * len(widths), "attention_levels": attention,
        "in_channels": c["in_channels"] - cond if _whole(c["in_channels"]) else c["in_channels"],
        "cond_channels": cond, "out_channels": c["out_channels"],
        "num_head_channels": 0 if head is None else head,  # a width; without it one head
        "embedding_order": "cos_sin" if c["flip_sin_to_cos"] else "sin_cos", "freq_shift": c["freq_shift"],
        "use_scale_shift_norm": c["resnet_time_scale_shift"] == "scale_shift", "resample": resample,
        "norm_groups": c["norm_num_groups"], "norm_eps": c["norm_eps"], "dropout": c["dropout"],
        "num_classes": 0 if c["num_class_embeds"] is None else c["num_class_embeds"],
        "downsample_padding": c["downsample_padding"] if resample == "conv" else 1,
        "middle_attention": _middle(where, c), "middle_scale": c["mid_block_scale_factor"],
        "center_input": c["center_input_sample"],
    }  # fmt: skip
    return from_dict(Config, made, where)


def _blocks(where: str, c: Mapping[str, Any]) -> tuple[list[int], str]:
    """Levels with attention, and how the resolution changes."""
    count = len(c["block_out_channels"])
    ways = []
    for key, known in (("down_block_types", DOWN), ("up_block_types", UP)):
        given = c[key]
        if not isinstance(given, list) or not all(isinstance(block, str) for block in given):
            raise IdmFastError(f"{where}: {key} must be a list of names, got {given!r:.60}")
        given = [block.removeprefix("UNetRes") for block in given]
        if wrong := [block for block in given if block not in known]:
            raise IdmFastError(f"{where}: {key} must be among {', '.join(known)}, got the unknown block {wrong[0]}")
        if len(given) != count:
            raise IdmFastError(f"{where}: {key} must be {count}, one for each of block_out_channels, got {len(given)}")
        own = c["downsample_type" if known is DOWN else "upsample_type"]
        ways.append([(known[block][0], known[block][1] or own) for block in given])
    down, up = ways[0], ways[1][::-1]
    if [attends for attends, _ in down] != [attends for attends, _ in up]:
        raise IdmFastError(
            f"{where}: up_block_types must have attention at the same levels as down_block_types = "
            f"{c['down_block_types']}, got {c['up_block_types']}"
        )
    # The coarsest level of the way down changes nothing, nor does the finest of the way up.
    kinds = {kind for _, kind in [*down[:-1], *up[1:]]}
    if len(kinds) > 1:
        raise IdmFastError(
            f"{where}: all levels must change the resolution alike = by a convolution or by a residual block, "
            f"got both in {c['down_block_types']} and {c['up_block_types']}"
        )
    return [level for level, (attends, _) in enumerate(down) if attends], "resblock" if "resnet" in kinds else "conv"


def _middle(where: str, c: Mapping[str, Any]) -> str:
    """The middle's attention has a norm unless the time scales and shifts and nobody says how many groups."""
    if not c["add_attention"]:
        return "none"
    groups = c["attn_norm_num_groups"]
    if groups not in (None, c["norm_num_groups"]):
        raise IdmFastError(
            f"{where}: attn_norm_num_groups must be norm_num_groups = {c['norm_num_groups']}, got {groups}"
        )
    return "no_norm" if groups is None and c["resnet_time_scale_shift"] != "default" else "norm"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


DIFFUSERS = Format(
    "diffusers",
    f"{CLASS} of diffusers",
    lambda source: source.config.get("_class_name") == CLASS,
    _read,
    (Setting("cond_channels", "whole number", "input channels that are a condition", 0), *SCHEDULER_SETTINGS),
    frozenset({"format"}),
)
