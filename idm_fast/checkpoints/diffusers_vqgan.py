"""A folder of diffusers that holds a ``VQModel``: read and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from idm_fast.checkpoints.format import Format, Reading
from idm_fast.checkpoints.settings import Settings
from idm_fast.checkpoints.source import Source
from idm_fast.checkpoints.vqgan_names import foreign, level_widths, names
from idm_fast.config import from_dict
from idm_fast.config_vqgan import VqganConfig
from idm_fast.errors import IdmFastError
from idm_fast.files import atomic
from idm_fast.models.vqgan import Vqgan

_CLASS = "VQModel"
_DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}  # name -> with attention
_UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
# Names of older files, and today's.
_OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
# Fields that must have these values: others are another network.
_FIXED = {"act_fn": ("silu", "swish"), "norm_type": ("group",), "lookup_from_codebook": (False,)}
_IGNORED = {"force_upcast", "sample_size", "scaling_factor"}


def _read(source: Source, settings: Settings, averaged: bool | None) -> Reading:
    where = str(source.path)
    config = _config(where, source.config, source.path.name)
    with torch.device("meta"):
        module = Vqgan(config)
    table = names(config, "diffusers")
    if any(name.endswith(".query.weight") for name in source.tensors):
        table = {ours: tuple(_older(name) for name in theirs) for ours, theirs in table.items()}
    return Reading(config, module, table, source.tensors)


def _older(name: str) -> str:
    for new, old in _OLD.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


def _config(where: str, values: Mapping[str, Any], name: str) -> VqganConfig:
    """``config.json`` as ours; fields that it leaves out have the defaults of diffusers."""
    given = {key: value for key, value in values.items() if not key.startswith("_")}
    defaults: dict[str, Any] = {
        "in_channels": 3, "out_channels": 3, "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"], "block_out_channels": [64], "layers_per_block": 1,
        "latent_channels": 3, "sample_size": 32, "num_vq_embeddings": 256, "norm_num_groups": 32,
        "vq_embed_dim": None, "scaling_factor": 0.18215, "mid_block_add_attention": True,
    }  # fmt: skip
    unknown = sorted(set(given) - set(defaults) - set(_FIXED) - _IGNORED)
    if unknown:
        raise IdmFastError(f"{where}: config.json must hold fields of a {_CLASS}, got {unknown}")
    for key, allowed in _FIXED.items():
        if given.get(key, allowed[0]) not in allowed:
            raise IdmFastError(f"{where}: {key} must be {' or '.join(map(str, allowed))}, got {given[key]!r}")
    c = defaults | given
    widths, layers = c["block_out_channels"], c["layers_per_block"]
    if not isinstance(widths, list | tuple) or not widths or not all(_whole(width) for width in [*widths, layers]):
        raise IdmFastError(f"{where}: block_out_channels and layers_per_block must be whole numbers, got {widths}")
    down, up = _blocks(where, "down_block_types", _DOWN, c), _blocks(where, "up_block_types", _UP, c)[::-1]
    if down != up:
        raise IdmFastError(
            f"{where}: up_block_types must mirror down_block_types = {c['down_block_types']}, got {c['up_block_types']}"
        )
    factor = 2 ** (len(widths) - 1)
    sample_size = c["sample_size"] if _whole(c["sample_size"]) else 1
    made = {
        **level_widths(widths[0], widths), "num_res_blocks": [layers] * len(widths),
        "image_size": -(-sample_size // factor) * factor,  # a hint: the library does not hold a network to it
        "attention_levels": [level for level, attends in enumerate(down) if attends],
        "middle_attention": c["mid_block_add_attention"], "in_channels": c["in_channels"],
        "out_channels": c["out_channels"], "z_channels": c["latent_channels"],
        "embed_channels": c["vq_embed_dim"] or c["latent_channels"], "codebook_size": c["num_vq_embeddings"],
        "norm_groups": c["norm_num_groups"], "latent_scale": c["scaling_factor"], "name": name,
    }  # fmt: skip
    return from_dict(VqganConfig, made, f"{where}: config.json")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _blocks(where: str, key: str, known: dict[str, bool], config: Mapping[str, Any]) -> list[bool]:
    """Which levels have attention."""
    given, count = config[key], len(config["block_out_channels"])
    if not isinstance(given, list | tuple):
        raise IdmFastError(f"{where}: {key} must be a list of {count} names, got {given!r:.60}")
    wrong = [block for block in given if not isinstance(block, str) or block not in known]
    if wrong or len(given) != count:
        raise IdmFastError(f"{where}: {key} must be {count} of {', '.join(known)}, got {wrong or given}")
    return [known[block] for block in given]


def write(folder: str | Path, module: Vqgan, dtype: torch.dtype = torch.float32) -> None:
    """``module`` as a folder that ``diffusers.VQModel.from_pretrained`` reads: config.json and weights of ``dtype``.

    Raises ``IdmFastError`` for a network that diffusers has not: one with an unshuffle, levels of unequal depth, a
    first level wider than the stem, or another eps.
    """
    folder, c = Path(folder), module.config
    layers = set(c.num_res_blocks)
    stem = c.model_channels * c.channel_mult[0]
    said = {
        "unshuffle = 1": c.unshuffle == 1,
        "equal num_res_blocks": len(layers) == 1,
        "norm_eps = 1e-6": c.norm_eps == 1e-6,
    }
    said[f"a stem of {stem} channels"] = c.stem_width == stem
    lacking = [what for what, true in said.items() if not true]
    if lacking:
        raise IdmFastError(f"{folder}: a network for diffusers must have {', '.join(lacking)}, got {c.name} without")
    attends = [level in c.attention_levels for level in range(len(c.channel_mult))]
    downs, ups = ({attends: block for block, attends in known.items()} for known in (_DOWN, _UP))
    config = {
        "_class_name": _CLASS, "act_fn": "silu", "norm_type": "group", "sample_size": c.image_size,
        "down_block_types": [downs[each] for each in attends], "up_block_types": [ups[each] for each in attends[::-1]],
        "block_out_channels": [c.model_channels * mult for mult in c.channel_mult], "layers_per_block": layers.pop(),
        "in_channels": c.in_channels, "out_channels": c.out_channels, "latent_channels": c.z_channels,
        "vq_embed_dim": c.embed_channels, "num_vq_embeddings": c.codebook_size, "norm_num_groups": c.norm_groups,
        "scaling_factor": c.latent_scale, "mid_block_add_attention": c.middle_attention,
    }  # fmt: skip
    tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in module.state_dict().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IdmFastError(f"{folder}: cannot be written: {error.strerror or error}") from None
    with atomic(folder / "diffusion_pytorch_model.safetensors") as temporary:
        save_file(foreign(tensors, c, "diffusers"), temporary, metadata={"format": "pt"})
    with atomic(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")


DIFFUSERS_VQGAN = Format(
    "diffusers-vqmodel",
    f"{_CLASS} of diffusers (a VQGAN)",
    lambda source: source.config.get("_class_name") == _CLASS,
    _read,
)
