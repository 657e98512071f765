"""The VQGAN of taming-transformers and of latent diffusion: a Lightning file, of the network alone or of an LDM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from idm_fast.checkpoints.format import Format, Reading, need
from idm_fast.checkpoints.settings import Setting, Settings
from idm_fast.checkpoints.source import Source
from idm_fast.checkpoints.vqgan_names import level_widths, names
from idm_fast.config_vqgan import VqganConfig
from idm_fast.errors import IdmFastError
from idm_fast.models.vqgan import Vqgan

_FIRST_STAGE = "first_stage_model."
_EMA = "model_ema."  # LDM's averaged copies, whose names have lost their dots
_CODES = "quantize.embedding.weight"
_SETTINGS = (
    Setting("resolution", "whole number", "side in pixels the network was trained at", 256),
    Setting("ddconfig", "anything", "the table of that name in the family's yaml; compared with the tensors"),
    Setting("embed_dim", "whole number", "channels of a code", inferred=True),
    Setting("n_embed", "whole number", "number of codes", inferred=True),
)
# What else stands under ``params`` in the family's yaml, and means nothing here.
_ASIDE = frozenset(
    {
        "format", "lossconfig", "monitor", "image_key", "ckpt_path", "ignore_keys", "colorize_nlabels", "remap",
        "sane_index_shape", "batch_resize_range", "scheduler_config", "lr_g_factor", "use_ema",
    }
)  # fmt: skip


def _prefix(tensors: Mapping[str, Tensor]) -> str | None:
    """Where the network's names begin; None: nowhere."""
    return next((prefix for prefix in ("", _FIRST_STAGE) if f"{prefix}encoder.conv_in.weight" in tensors), None)


def _matches(source: Source) -> bool:
    prefix = _prefix(source.tensors)
    return prefix is not None and f"{prefix}encoder.down.0.block.0.norm1.weight" in source.tensors


def _read(source: Source, settings: Settings, averaged: bool | None) -> Reading:
    where, every = str(source.path), source.tensors
    prefix = _prefix(every)
    if prefix is None:
        raise IdmFastError(f"{where}: tensor encoder.conv_in.weight must be there, got none")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in every.items() if name.startswith(prefix)}
    config = _config(where, tensors, settings, source.path.stem)
    with torch.device("meta"):
        module = Vqgan(config)
    table = names(config, "taming")
    has_average = f"{_EMA}{_flat('encoder.conv_in.weight')}" in tensors
    if averaged and not has_average:
        raise IdmFastError(f"{where}: averaged weights must be there as {_EMA}..., got none; take those it has")
    taken = has_average if averaged is None else averaged
    if taken:
        table = {ours: tuple(_EMA + _flat(name) for name in theirs) for ours, theirs in table.items()}
        used = {name for theirs in table.values() for name in theirs}
        dropped = frozenset(name for name in tensors if not name.startswith(_EMA) or name not in used)
    else:
        dropped = frozenset(name for name in tensors if name.startswith((_EMA, "loss.")))
    return Reading(config, module, table, tensors, dropped, taken if has_average else None)


def _flat(name: str) -> str:
    return name.replace(".", "")


def _config(where: str, tensors: Mapping[str, Tensor], settings: Settings, name: str) -> VqganConfig:
    """What the shapes tell; the resolution, which they do not, from the settings."""
    if _CODES not in tensors:
        kind = "a VQGAN with Gumbel codes" if "quantize.embed.weight" in tensors else "an autoencoder without codes"
        raise IdmFastError(f"{where}: must be a VQGAN = tensor {_CODES}, got {kind}")
    width, in_channels = need(where, tensors, "encoder.conv_in.weight", 4)[:2]
    codes, embed = need(where, tensors, _CODES, 2)
    levels = 1 + max(_numbers(tensors, r"encoder\.down\.(\d{1,6})\."), default=-1)
    if levels == 0:
        raise IdmFastError(f"{where}: encoder.down must hold levels, got none")
    widths, blocks, attention = [], [], []
    for level in range(levels):
        widths.append(need(where, tensors, f"encoder.down.{level}.block.0.conv1.weight", 4)[0])
        blocks.append(1 + max(_numbers(tensors, rf"encoder\.down\.{level}\.block\.(\d{{1,6}})\.")))
        if f"encoder.down.{level}.attn.0.q.weight" in tensors:
            attention.append(level)
    ddconfig = _table(where, settings.given.get("ddconfig", {}))
    fields = {
        **level_widths(width, widths), "num_res_blocks": tuple(blocks), "attention_levels": tuple(attention),
        "image_size": ddconfig["resolution"] if "resolution" in ddconfig else settings.ask("resolution", 256),
        "middle_attention": "encoder.mid.attn_1.q.weight" in tensors, "in_channels": in_channels,
        "out_channels": need(where, tensors, "decoder.conv_out.weight", 4)[0],
        "z_channels": need(where, tensors, "encoder.conv_out.weight", 4)[0], "embed_channels": embed,
        "codebook_size": codes, "name": name,
    }  # fmt: skip
    try:
        config = VqganConfig(**fields)
    except IdmFastError as error:
        raise IdmFastError(f"{where}: {error}") from None
    settings.agree("embed_dim", embed)
    settings.agree("n_embed", codes)
    _agree(where, ddconfig, config)
    return config


def _numbers(tensors: Mapping[str, Tensor], pattern: str) -> set[int]:
    return {int(match[1]) for name in tensors if (match := re.match(pattern, name))}


def _table(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise IdmFastError(f"{where}: setting ddconfig must be a table, got {value!r:.60}")
    resolution = value.get("resolution", 256)
    if not isinstance(resolution, int) or isinstance(resolution, bool):
        raise IdmFastError(f"{where}: setting ddconfig.resolution must be a whole number, got {resolution!r:.60}")
    return value


def _agree(where: str, ddconfig: dict[str, Any], config: VqganConfig) -> None:
    """The yaml must describe the network that the tensors are of."""
    sides = [config.image_size >> level for level in range(len(config.channel_mult))]
    found = {
        "double_z": False, "z_channels": config.z_channels, "in_channels": config.in_channels,
        "out_ch": config.out_channels, "ch": config.stem_width, "ch_mult": _multiples(config),
        "num_res_blocks": config.num_res_blocks[0], "attn_resolutions": [sides[i] for i in config.attention_levels],
    }  # fmt: skip
    for key, value in found.items():
        given = ddconfig.get(key, value)
        if isinstance(value, list) and isinstance(given, list | tuple):
            # A resolution that no level has means nothing to the family.
            given = [item for item in given if key != "attn_resolutions" or item in sides]
            value, given = (sorted(value), sorted(given)) if key == "attn_resolutions" else (value, given)
        if given != value:
            raise IdmFastError(f"{where}: setting ddconfig.{key} must be what the tensors say = {value}, got {given}")


def _multiples(config: VqganConfig) -> list[float]:
    return [config.model_channels * mult / config.stem_width for mult in config.channel_mult]


VQGAN = Format(
    "vqgan",
    "VQGAN of taming-transformers, or the first stage of a latent diffusion model",
    _matches,
    _read,
    _SETTINGS,
    _ASIDE,
)
