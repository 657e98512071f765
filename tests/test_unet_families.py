"""The one U-Net reproduces each public family's own network code, from its own weights to its own outputs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from idm_fast.config import UNetConfig
from idm_fast.models.blocks import ResBlock
from idm_fast.models.unet import Level, UNet

TOLERANCE = 1e-5  # of the output's largest value, in float32

_GUIDED_RES = {"norm1": "in_layers.0", "conv1": "in_layers.2", "embed": "emb_layers.1", "norm2": "out_layers.0",
               "conv2": "out_layers.3", "skip": "skip_connection"}  # fmt: skip
_SR3_RES = {"norm1": "block1.block.0", "conv1": "block1.block.3", "embed": "noise_func.noise_func.0",
            "norm2": "block2.block.0", "conv2": "block2.block.3", "skip": "res_conv"}  # fmt: skip


def _guided_modules(unet: UNet) -> Iterator[tuple[str, str]]:
    """(our module, their module). Theirs keeps an up-sampling inside the block that comes before it."""

    def level(ours: str, module: Level, theirs: str, attention: str) -> Iterator[tuple[str, str]]:
        if isinstance(module.block, ResBlock):
            yield from ((f"{ours}.block.{mine}", f"{theirs}.{name}") for mine, name in _GUIDED_RES.items())
        if module.attention is not None:
            parts = {"norm": "norm", "qkv": "qkv", "out": "proj_out"}
            yield from ((f"{ours}.attention.{mine}", f"{attention}.{name}") for mine, name in parts.items())

    yield from {"time.fc1": "time_embed.0", "time.fc2": "time_embed.2", "label": "label_emb",
                "stem": "input_blocks.0.0", "out_norm": "out.0", "out_conv": "out.2"}.items()  # fmt: skip
    for i, module in enumerate(unet.down):
        yield from level(f"down.{i}", module, f"input_blocks.{i + 1}.0", f"input_blocks.{i + 1}.1")
        yield f"down.{i}.block.conv", f"input_blocks.{i + 1}.0.op"
    yield from level("middle.0", unet.middle[0], "middle_block.0", "middle_block.1")
    yield from level("middle.1", unet.middle[1], "middle_block.2", "")
    block, part = -1, 0
    for i, module in enumerate(unet.up):
        if isinstance(module.block, ResBlock) and module.block.resize is None:
            block, part = block + 1, 2 if module.attention is not None else 1
            yield from level(f"up.{i}", module, f"output_blocks.{block}.0", f"output_blocks.{block}.1")
        else:
            yield from level(f"up.{i}", module, f"output_blocks.{block}.{part}", "")
            yield f"up.{i}.block.conv", f"output_blocks.{block}.{part}.conv"


def _sr3_modules(unet: UNet) -> Iterator[tuple[str, str]]:
    yield from {"time.fc1": "noise_level_mlp.1", "time.fc2": "noise_level_mlp.3", "stem": "downs.0",
                "out_norm": "final_conv.block.0", "out_conv": "final_conv.block.3"}.items()  # fmt: skip
    for ours, theirs, shift in (("down", "downs", 1), ("middle", "mid", 0), ("up", "ups", 0)):
        for i in range(len(unet.get_submodule(ours))):
            place = f"{theirs}.{i + shift}"
            yield f"{ours}.{i}.block.conv", f"{place}.conv"
            yield from ((f"{ours}.{i}.block.{mine}", f"{place}.res_block.{name}") for mine, name in _SR3_RES.items())
            yield from ((f"{ours}.{i}.attention.{name}", f"{place}.attn.{name}") for name in ("norm", "qkv", "out"))


def _filled(config: UNetConfig, modules: Any, theirs: dict[str, Tensor]) -> UNet:
    """A U-Net that took every tensor of ``theirs``, and nothing else."""
    unet = UNet(config).eval()
    own = unet.state_dict()
    names = dict(modules(unet))
    taken = {}
    for name, tensor in own.items():
        module, _, leaf = name.rpartition(".")
        taken[name] = theirs.pop(f"{names[module]}.{leaf}").reshape(tensor.shape)  # their 1x1 convolutions are 1-D
    assert not theirs
    unet.load_state_dict(taken)
    return unet


def _guided_config(settings: dict[str, Any]) -> UNetConfig:
    levels = len(settings["channel_mult"])
    blocks = settings["num_res_blocks"]
    rates = settings["attention_resolutions"]  # a down-sampling rate, but DifFace means a side in pixels
    if settings["format"] == "difface":
        rates = [settings["image_size"] // side for side in rates]
    return UNetConfig(
        image_size=settings["image_size"],
        model_channels=settings["model_channels"],
        channel_mult=tuple(settings["channel_mult"]),
        num_res_blocks=tuple(blocks) if isinstance(blocks, list) else (blocks,) * levels,
        attention_levels=tuple(level for level in range(levels) if 2**level in rates),
        cond_channels=3 if settings.get("super_res") else 0,
        out_channels=settings["out_channels"],
        num_heads=settings.get("num_heads", 1),
        num_head_channels=settings.get("num_head_channels", 0),
        qkv_order="qkv_heads" if settings["use_new_attention_order"] else "heads_qkv",
        use_scale_shift_norm=settings["use_scale_shift_norm"],
        resample="resblock" if settings["resblock_updown"] else "conv",
    )


def _sr3_config(settings: dict[str, Any]) -> UNetConfig:
    levels = len(settings["channel_mults"])
    sides = [settings["image_size"] >> level for level in range(levels)]
    return UNetConfig(
        image_size=settings["image_size"],
        model_channels=settings["inner_channel"],
        channel_mult=tuple(settings["channel_mults"]),
        num_res_blocks=(settings["res_blocks"],) * levels,
        attention_levels=tuple(level for level in range(levels) if sides[level] in settings["attn_res"]),
        cond_channels=3, concat_order="cond_x", embedding_order="sin_cos", embed_channels=settings["inner_channel"],
        embed_silu=False, use_scale_shift_norm=False, qkv_order="heads_qkv", qkv_bias=False,
        norm_groups=settings["norm_groups"],
    )  # fmt: skip


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    weights = torch.load(folder / "checkpoint.pt", weights_only=True)
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.get("state_dict", weights).items()}
    return json.loads((folder / "settings.json").read_text()), weights, load_file(folder / "io.safetensors")


def _assert_equal(out: Tensor, expected: Tensor) -> None:
    difference = (out - expected).abs().max().item()
    scale = expected.abs().max().item()
    print(f"largest difference {difference / scale:.1e} of the output's largest value")
    assert scale > 0
    assert difference <= TOLERANCE * scale


@pytest.mark.parametrize("grad", [False, True], ids=["ops", "autograd"])
@pytest.mark.parametrize("name", ["guided_legacy_qkv", "guided_superres", "difface_small"])
def test_guided_diffusion(shared_data: Path, name: str, grad: bool) -> None:
    settings, weights, io = _read(shared_data / "checkpoints" / name)
    unet = _filled(_guided_config(settings), _guided_modules, weights)
    cond = None
    if settings.get("super_res"):
        cond = F.interpolate(io["low_res"], io["x"].shape[2:], mode="bilinear")
    with torch.set_grad_enabled(grad):
        _assert_equal(unet(io["x"], io["t"], cond), io["out"])


@pytest.mark.parametrize("grad", [False, True], ids=["ops", "autograd"])
def test_sr3(shared_data: Path, grad: bool) -> None:
    settings, weights, io = _read(shared_data / "checkpoints" / "sr3_small")
    network = {k.removeprefix("denoise_fn."): v for k, v in weights.items() if k.startswith("denoise_fn.")}
    unet = _filled(_sr3_config(settings), _sr3_modules, network)
    with torch.set_grad_enabled(grad):
        _assert_equal(unet(io["x"], io["noise_level"][:, 0], io["cond"]), io["eps"])
