"""SR3 (Janspiry): the whole diffusion module, its network under ``denoise_fn.`` beside tables of the schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from idm_fast.checkpoints.format import Format, Reading, modules_to_names, need
from idm_fast.checkpoints.schedules import from_betas
from idm_fast.checkpoints.settings import Setting, Settings
from idm_fast.checkpoints.source import Source
from idm_fast.config import DiffusionConfig, ModelConfig, UNetConfig
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet

_PREFIX = "denoise_fn."
_RES = {"norm1": "block1.block.0", "conv1": "block1.block.3", "embed": "noise_func.noise_func.0",
        "norm2": "block2.block.0", "conv2": "block2.block.3", "skip": "res_conv"}  # fmt: skip
_TABLES = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip
_SETTINGS = (
    Setting("image_size", "whole number", "side in pixels of the larger picture", 128),
    Setting("norm_groups", "whole number", "groups of every norm: 32 (16 to 128 px), 16 (64 to 512 px)", 32),
    Setting("schedule", "anything", 'read from the file; without its tables ["linear", 1e-6, 0.01, 2000]'),
    Setting("in_channel", "whole number", "the condition's channels and the image's", inferred=True),
    Setting("out_channel", "whole number", "channels of the image", inferred=True),
    Setting("inner_channel", "whole number", "width of the finest level", inferred=True),
    Setting("channel_mults", "list of whole numbers", "width of each level", inferred=True),
    Setting("attn_res", "list of whole numbers", "sides in pixels with attention", inferred=True),
    Setting("res_blocks", "whole number", "per level", inferred=True),
)


def modules(unet: UNet, prefix: str) -> Iterator[tuple[str, str]]:
    """(our module, theirs); more pairs than there are modules."""
    yield from {"time.fc1": f"{prefix}noise_level_mlp.1", "time.fc2": f"{prefix}noise_level_mlp.3",
                "stem": f"{prefix}downs.0", "out_norm": f"{prefix}final_conv.block.0",
                "out_conv": f"{prefix}final_conv.block.3"}.items()  # fmt: skip
    for ours, theirs, shift in (("down", "downs", 1), ("middle", "mid", 0), ("up", "ups", 0)):
        for i in range(len(getattr(unet, ours))):
            place = f"{prefix}{theirs}.{i + shift}"
            yield f"{ours}.{i}.block.conv", f"{place}.conv"
            yield from ((f"{ours}.{i}.block.{mine}", f"{place}.res_block.{name}") for mine, name in _RES.items())
            yield from ((f"{ours}.{i}.attention.{name}", f"{place}.attn.{name}") for name in ("norm", "qkv", "out"))


def _structure(where: str, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """The fields of ``UNetConfig`` that the shapes tell."""
    inner, in_channels = need(where, tensors, f"{prefix}downs.0.weight", 4)[:2]
    out_channels = need(where, tensors, f"{prefix}final_conv.block.3.weight", 4)[0]
    if in_channels not in (out_channels, 2 * out_channels):
        raise IdmFastError(
            f"{where}: {prefix}downs.0.weight must take {out_channels} channels, or twice as many with a condition, "
            f"got {in_channels}"
        )
    numbers = {
        int(match[1]) for name in tensors if (match := re.match(rf"{re.escape(prefix)}downs\.(\d{{1,6}})\.", name))
    }
    widths: list[int] = []
    blocks, attention, fresh = [], [], True
    for i in range(1, max(numbers) + 1):
        place = f"{prefix}downs.{i}"
        if f"{place}.conv.weight" in tensors:
            fresh = True
            continue
        width = need(where, tensors, f"{place}.res_block.block1.block.3.weight", 4)[0]
        if fresh:
            widths.append(width)
            blocks.append(0)
            if f"{place}.attn.qkv.weight" in tensors:
                attention.append(len(widths) - 1)
            fresh = False
        blocks[-1] += 1
    if not widths:
        raise IdmFastError(f"{where}: {prefix}downs must hold residual blocks, got none")
    if widths[0] != inner:
        raise IdmFastError(f"{where}: the first level must be as wide as the stem = {inner}, got {widths[0]}")
    unit = inner if all(width % inner == 0 for width in widths) else math.gcd(*widths)
    time = need(where, tensors, f"{prefix}noise_level_mlp.1.weight", 2)[1]
    return {
        "model_channels": unit, "channel_mult": tuple(width // unit for width in widths),
        "num_res_blocks": tuple(blocks), "attention_levels": tuple(attention), "in_channels": out_channels,
        "cond_channels": in_channels - out_channels, "out_channels": out_channels,
        "embed_channels": need(where, tensors, f"{prefix}noise_level_mlp.3.weight", 2)[0],
        "time_channels": 0 if time == inner else time,
    }  # fmt: skip


def _read(source: Source, settings: Settings, averaged: bool | None) -> Reading:
    where = str(source.path)
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in source.tensors) else ""
    found = _structure(where, source.tensors, prefix)
    # The public files: the deep one (one block a level, up to 16 times the width) has half the groups.
    deep = max(found["channel_mult"]) >= 16
    fields = {
        **found, "image_size": settings.ask("image_size", 512 if deep else 128),
        "norm_groups": settings.ask("norm_groups", 16 if deep else 32), "concat_order": "cond_x",
        "embedding_order": "sin_cos", "embed_silu": False, "use_scale_shift_norm": False, "qkv_order": "heads_qkv",
        "qkv_bias": False,
    }  # fmt: skip
    try:
        unet = UNetConfig(**fields)
    except IdmFastError as error:
        raise IdmFastError(f"{where}: {error}") from None
    _agree(settings, unet)
    diffusion = _schedule(settings, source.tensors)
    with torch.device("meta"):
        module = UNet(unet)
    config = ModelConfig(source.path.stem, unet, diffusion, "ddpm", diffusion.train_steps)
    dropped = frozenset(name for name in source.tensors if name in _TABLES)
    return Reading(config, module, modules_to_names(module, modules(module, prefix)), source.tensors, dropped)


def _agree(settings: Settings, unet: UNetConfig) -> None:
    settings.agree("in_channel", unet.in_channels + unet.cond_channels)
    settings.agree("out_channel", unet.out_channels)
    settings.agree("inner_channel", unet.stem_width)
    settings.agree("channel_mults", list(unet.channel_mult))
    if len(set(unet.num_res_blocks)) == 1:
        settings.agree("res_blocks", unet.num_res_blocks[0])
    sides = [unet.image_size >> level for level in range(len(unet.channel_mult))]
    asked = settings.given.get("attn_res")
    if asked is not None and set(asked) & set(sides) != {sides[level] for level in unet.attention_levels}:
        settings.agree("attn_res", [sides[level] for level in unet.attention_levels])


def _schedule(settings: Settings, tensors: Mapping[str, Tensor]) -> DiffusionConfig:
    if "betas" in tensors:
        made = from_betas(settings.where, tensors["betas"], noise_level=True)
        if "schedule" in settings.given:
            _same(settings, made, _given_schedule(settings.where, settings.given["schedule"]))
        return made
    return _given_schedule(settings.where, settings.ask("schedule", ["linear", 1e-6, 0.01, 2000]))


def _given_schedule(where: str, value: Any) -> DiffusionConfig:
    """["linear", first beta, last beta, steps], or a table with the family's own words."""
    if isinstance(value, dict):
        value = [value.get(key) for key in ("schedule", "linear_start", "linear_end", "n_timestep")]
    try:
        name, start, end, steps = value
        if name != "linear" or isinstance(steps, bool) or not isinstance(steps, int):
            raise ValueError
        return DiffusionConfig("linear", "eps", steps, float(start), float(end), noise_level=True)
    except IdmFastError as error:
        raise IdmFastError(f"{where}: setting schedule: {error}") from None
    except (TypeError, ValueError):
        raise IdmFastError(
            f'{where}: setting schedule must be ["linear", first beta, last beta, steps], got {value!r:.80}'
        ) from None


def _same(settings: Settings, found: DiffusionConfig, given: DiffusionConfig) -> None:
    pairs = [
        (found.train_steps, given.train_steps),
        (found.beta_start, given.beta_start),
        (found.beta_end, given.beta_end),
    ]
    if found.schedule != given.schedule or not all(math.isclose(a, b, rel_tol=1e-4) for a, b in pairs):
        shown = [found.schedule, found.beta_start, found.beta_end, found.train_steps]
        raise IdmFastError(
            f"{settings.where}: setting schedule must be what the file's tables say = {shown}, "
            f"got {settings.given['schedule']}"
        )


SR3 = Format(
    "sr3",
    "U-Net of SR3 (Image-Super-Resolution-via-Iterative-Refinement)",
    lambda source: any(name.endswith("noise_level_mlp.1.weight") for name in source.tensors),
    _read,
    _SETTINGS,
    frozenset({"format", "t", "dropout"}),
)
