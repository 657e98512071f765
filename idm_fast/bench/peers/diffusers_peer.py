"""diffusers' UNet2DModel in the nearest shape that its options allow; what differs is said in the row's note."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idm_fast.bench.peers import Built
from idm_fast.bench.peers.torch_peers import built
from idm_fast.bench.work import count, total_flops
from idm_fast.bench.workload import DTYPES, Workload
from idm_fast.config import UNetConfig


class InPixels(nn.Module):
    """Concatenation and pixel-unshuffle around a diffusers network, with the signature of ours."""

    def __init__(self, network: nn.Module, config: UNetConfig) -> None:
        super().__init__()
        self.network, self.config = network, config

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        c = self.config
        h = x if cond is None else torch.cat([x, cond.to(x.dtype)], dim=1)
        h = F.pixel_unshuffle(h, c.unshuffle) if c.unshuffle > 1 else h
        out: Tensor = self.network(h.contiguous(memory_format=torch.channels_last), t, return_dict=False)[0]
        out = F.pixel_shuffle(out, c.unshuffle) if c.unshuffle > 1 else out
        return out + cond if c.residual and cond is not None else out


def unet2d(workload: Workload, dtype: str, threads: int) -> Built:
    """Random weights: the pictures are not ours, so there is no PSNR."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    config = workload.config.unet
    side = tuple(s // config.unshuffle for s in workload.size)
    tried: dict[int, tuple[float, nn.Module]] = {}
    for blocks in sorted({min(config.num_res_blocks), max(config.num_res_blocks)}):
        theirs: Any = UNet2DModel(sample_size=side, **options(config, blocks))  # type: ignore[no-untyped-call]
        network: nn.Module = InPixels(theirs, config).eval()
        tried[blocks] = (_gflop(network, workload), network)
    ours = total_flops(workload.layers) / 1e9
    blocks = min(tried, key=lambda key: abs(tried[key][0] - ours))
    gflop, network = tried[blocks]
    made: Any = network.to(workload.device, DTYPES[dtype])
    made = made.to(memory_format=torch.channels_last).requires_grad_(False)
    parts = built(workload, dtype, made)
    note = f"{gflop:.1f} GFLOP, ours {ours:.1f}; " + "; ".join(differences(config, blocks))
    return Built(parts.denoise, parts.network_dtype, parts.launches, note, gflop)


def options(config: UNetConfig, blocks: int) -> dict[str, Any]:
    """UNet2DModel's own words for our settings."""
    levels = range(len(config.channel_mult))
    area = config.unshuffle**2
    down = ["AttnDownBlock2D" if level in config.attention_levels else "DownBlock2D" for level in levels]
    channels = [config.model_channels * mult for mult in config.channel_mult]
    return {
        "in_channels": (config.in_channels + config.cond_channels) * area,
        "out_channels": config.out_channels * area,
        "block_out_channels": tuple(channels),
        "layers_per_block": blocks,
        "down_block_types": tuple(down),
        "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(down)),
        # One width for all of its attentions; None: a single head.
        "attention_head_dim": config.num_head_channels or None,
        "norm_num_groups": config.norm_groups,
        "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if config.use_scale_shift_norm else "default",
        "downsample_type": "conv" if config.resample == "conv" else "resnet",
        "upsample_type": "conv" if config.resample == "conv" else "resnet",
        "flip_sin_to_cos": config.embedding_order == "cos_sin",
    }


def differences(config: UNetConfig, blocks: int) -> list[str]:
    """What its options cannot say of this network."""
    found = ["other weights"]
    if set(config.num_res_blocks) != {blocks}:
        found.append(f"{blocks} residual blocks in every level, ours {config.num_res_blocks}")
    if (config.embed_channels or 4 * config.model_channels) != 4 * config.model_channels:
        found.append(f"time embedding {4 * config.model_channels} wide, ours {config.embed_width}")
    without = set(range(len(config.channel_mult))) - set(config.attention_levels)
    if config.resample == "resblock" and without:
        found.append("resolution changes by one convolution where a level has no attention, ours by residual blocks")
    if not config.qkv_bias:
        found.append("q, k and v with bias")
    if not config.num_head_channels and config.num_heads != 1:
        found.append(f"one attention head, ours {config.num_heads}")
    return found


def _gflop(network: nn.Module, workload: Workload) -> float:
    """Of its convolutions and linear layers, and of its attentions by their query projection: 4 N L^2 C."""
    config, (height, width) = workload.config.unet, workload.size
    x = torch.empty(workload.batch, config.in_channels, height, width, device="meta")
    cond = None if workload.cond is None else torch.empty(workload.cond.shape, device="meta")
    found = count(copy.deepcopy(network).to("meta"), x, torch.ones(workload.batch, device="meta"), cond)
    kept = [layer for layer in found if not any(part in layer.name for part in ("time_emb", "time_embedding"))]
    attended = 0
    for layer in kept:
        if layer.name.endswith("to_q"):
            channels = int(layer.weight_elements**0.5)
            positions = layer.activation_elements // (2 * channels * workload.batch)
            attended += 4 * workload.batch * positions**2 * channels
    return (total_flops(kept) + attended) / 1e9
