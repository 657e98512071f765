"""A network of ours as a folder that diffusers loads: ``unet/``, ``scheduler/`` and ``model_index.json``."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from idm_fast.checkpoints.diffusers_scheduler import written
from idm_fast.checkpoints.diffusers_unet import CLASS, names
from idm_fast.config import ModelConfig, UNetConfig
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet

_WEIGHTS = "diffusion_pytorch_model.safetensors"


def write(folder: str | Path, module: UNet, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
    """Writes ``folder``, which must not be there; it appears whole or not at all.

    ``UNet2DModel.from_pretrained(folder, subfolder="unet")`` gives the same network; without a condition,
    ``DDPMPipeline.from_pretrained(folder)`` the whole chain. Raises ``IdmFastError`` naming what the library cannot
    say: a pixel-unshuffle, a residual network, levels of unequal depth, heads of unequal width, noise levels.
    """
    folder = Path(folder)
    if folder.exists():
        raise IdmFastError(f"{folder}: must not be there yet")
    files = {"unet/config.json": _config(str(folder), config.unet)}
    files["scheduler/scheduler_config.json"] = written(config.diffusion, config.sampler, str(folder))
    if not config.unet.cond_channels:
        scheduler = files["scheduler/scheduler_config.json"]["_class_name"]
        pipeline = "DDPMPipeline" if scheduler == "DDPMScheduler" else "DDIMPipeline"
        parts = {"scheduler": ["diffusers", scheduler], "unet": ["diffusers", CLASS]}
        files["model_index.json"] = {"_class_name": pipeline, **parts}
    tensors = _tensors(module, dtype)
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name[:40]}.", dir=folder.parent))
        for name, content in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, temporary / "unet" / _WEIGHTS, metadata={"format": "pt"})
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except OSError as error:
        raise IdmFastError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            with suppress(OSError):
                shutil.rmtree(temporary)


def _config(where: str, c: UNetConfig) -> dict[str, Any]:
    widths = [c.model_channels * mult for mult in c.channel_mult]
    attends = [level in c.attention_levels for level in range(len(widths))]
    head = _head_width(c, widths)
    scaled = c.use_scale_shift_norm
    said = {
        "unshuffle = 1": c.unshuffle == 1,
        "residual = False": not c.residual,
        "equal num_res_blocks": len(set(c.num_res_blocks)) == 1,
        "embed_silu = True": c.embed_silu,
        "a time embedding of 4 times the stem": c.time_width == c.stem_width and c.embed_width == 4 * c.stem_width,
        "heads of one width": head != 0,
        "a norm before the middle's attention": c.middle_attention != "no_norm" or scaled,
    }
    if lacking := [what for what, true in said.items() if not true]:
        raise IdmFastError(f"{where}: a network for diffusers must have {', '.join(lacking)}, got one without")
    resnet = c.resample == "resblock"
    kinds = {True: "AttnDownBlock2D", False: "ResnetDownsampleBlock2D" if resnet else "DownBlock2D"}
    downs = [kinds[each] for each in attends]
    ups = [name.replace("Downsample", "Upsample").replace("Down", "Up") for name in reversed(downs)]
    resampling = "resnet" if resnet else "conv"
    return {
        "_class_name": CLASS, "sample_size": c.image_size, "in_channels": c.in_channels + c.cond_channels,
        "out_channels": c.out_channels, "center_input_sample": c.center_input, "time_embedding_type": "positional",
        "freq_shift": int(c.freq_shift) if c.freq_shift == int(c.freq_shift) else c.freq_shift,
        "flip_sin_to_cos": c.embedding_order == "cos_sin", "down_block_types": downs, "up_block_types": ups,
        "block_out_channels": widths, "layers_per_block": c.num_res_blocks[0],
        "mid_block_scale_factor": c.middle_scale, "downsample_padding": c.downsample_padding,
        "downsample_type": resampling, "upsample_type": resampling, "dropout": c.dropout, "act_fn": "silu",
        "attention_head_dim": head, "norm_num_groups": c.norm_groups, "norm_eps": c.norm_eps,
        "attn_norm_num_groups": c.norm_groups if scaled and c.middle_attention == "norm" else None,
        "resnet_time_scale_shift": "scale_shift" if scaled else "default",
        "add_attention": c.middle_attention != "none", "class_embed_type": None,
        "num_class_embeds": c.num_classes or None,
    }  # fmt: skip


def _head_width(c: UNetConfig, widths: list[int]) -> int | None:
    """The one width of all heads; None: one head each; 0: there is no such width."""
    if c.num_head_channels:
        return c.num_head_channels
    if c.num_heads == 1:
        return None
    attended = {widths[level] for level in c.attention_levels} | (
        {widths[-1]} if c.middle_attention != "none" else set()
    )
    return attended.pop() // c.num_heads if len(attended) == 1 else 0


def _tensors(module: UNet, dtype: torch.dtype) -> dict[str, Tensor]:
    """Under the library's names: q, k and v apart, an absent bias as zeros, x before the condition."""
    c, state = module.config, module.state_dict()
    made: dict[str, Tensor] = {}
    for name, theirs in names(module).items():
        tensor = state[name].detach()
        if name == "stem.weight" and c.cond_channels and c.concat_order == "cond_x":
            tensor = torch.cat([tensor[:, c.cond_channels :], tensor[:, : c.cond_channels]], dim=1)
        if len(theirs) == 3:
            parts = _apart(tensor, _heads(c, tensor.shape[0] // 3), c.qkv_order)
            made |= dict(zip(theirs, parts, strict=True))
            if not c.qkv_bias:
                made |= {part.removesuffix("weight") + "bias": torch.zeros(tensor.shape[0] // 3) for part in theirs}
        else:
            made[theirs[0]] = tensor.flatten(1) if ".attention.out.weight" in name else tensor
    return {name: tensor.to("cpu", dtype).contiguous() for name, tensor in made.items()}


def _heads(c: UNetConfig, channels: int) -> int:
    return channels // c.num_head_channels if c.num_head_channels else c.num_heads


def _apart(stacked: Tensor, heads: int, order: str) -> tuple[Tensor, ...]:
    """q, k and v of a joint projection [3 C, ...]: matrices [C, C] or vectors [C]."""
    rows = stacked.flatten(1) if stacked.ndim > 1 else stacked
    if order == "qkv_heads":
        return rows.chunk(3)
    grouped = rows.reshape(heads, 3, -1, *rows.shape[1:])
    return tuple(grouped[:, i].reshape(-1, *rows.shape[1:]) for i in range(3))
