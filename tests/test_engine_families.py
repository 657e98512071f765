"""Public checkpoints by the engine: the same walk as their plain network, in float32 and in bfloat16."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from idm_fast import checkpoints
from idm_fast.diffusion import SamplerTable, Schedule, build_table, initial_noise, sample
from idm_fast.engine import Engine
from idm_fast.models.unet import UNet

CASES = ["guided_legacy_qkv", "guided_superres", "difface_small", "sr3_small"]
EXACT = 5e-6  # of the truth's root mean square: float32 sums in another order
Inputs = tuple[Tensor, Tensor, Tensor | None]


def walked(
    module: UNet, table: SamplerTable, dtype: torch.dtype, x: Tensor, seeds: Tensor, cond: Tensor | None
) -> Tensor:
    """The torch path: modules in ``dtype``, one after the other."""
    channels = x.shape[1]

    def network(x: Tensor, t: Tensor) -> Tensor:
        return module(x, t, cond)[:, :channels].contiguous(memory_format=torch.channels_last)

    with torch.inference_mode():
        return sample(network, table, x, seeds, network_dtype=dtype)


def rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


def compare(load: Callable[[], Any], inputs: Inputs) -> None:
    """float32 is the truth. In bfloat16 both paths round at each layer, so our error may be twice the plain one's."""
    loaded = load()
    # Two steps, without a clamp: with random weights most of the picture would lie on it, whatever the network says.
    table = build_table(Schedule.from_config(loaded.config.diffusion), loaded.config.diffusion.prediction, "ddim", 2)
    x = inputs[0]
    shape = (x.shape[0], x.shape[2], x.shape[3])
    exact, low = (Engine.compile(loaded.module, shape, table, dtype=each).run(*inputs) for each in ("fp32", "bf16"))
    truth = walked(loaded.module, table, torch.float32, *inputs)
    plain = walked(load().module.to(torch.bfloat16), table, torch.bfloat16, *inputs)
    print(f"fp32 {rms(exact - truth) / rms(truth):.1e}, bf16 {rms(low - truth) / rms(plain - truth):.2f} of plain's")
    assert rms(exact - truth) <= EXACT * rms(truth)
    assert 0 < rms(low - truth) <= 2 * rms(plain - truth)


@pytest.mark.parametrize("name", CASES)
def test_a_public_checkpoint(name: str, shared_data: Path) -> None:
    folder = shared_data / "checkpoints" / name
    settings, io = json.loads((folder / "settings.json").read_text()), load_file(folder / "io.safetensors")
    cond = io.get("cond")
    if "low_res" in io:
        cond = F.interpolate(io["low_res"], io["x"].shape[2:], mode="bilinear")
    seeds = torch.arange(io["x"].shape[0])
    start = initial_noise(seeds, tuple(io["x"].shape), "cpu")  # type: ignore[arg-type]
    compare(lambda: checkpoints.load(folder / "checkpoint.pt", settings), (start, seeds, cond))


@pytest.mark.parametrize(
    "change",
    [
        {"freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0, "attention_head_dim": None},
        {"downsample_padding": 0, "in_channels": 6, "resnet_time_scale_shift": "scale_shift"},
    ],
    ids=["ddpm", "with a condition"],
)
def test_a_network_of_diffusers(change: dict[str, Any], tmp_path: Path) -> None:
    """Padding below and to the right, frequencies that are shifted, and a middle attention without a norm."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(32, 64, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), **change,
    )  # fmt: skip
    network.save_pretrained(tmp_path)
    channels = change.get("in_channels", 3) - 3
    seeds = torch.arange(2)
    cond = torch.rand(2, channels, 32, 16) * 2 - 1 if channels else None
    inputs = initial_noise(seeds, (2, 3, 32, 16), "cpu"), seeds, cond
    compare(lambda: checkpoints.load(tmp_path, {"cond_channels": channels}), inputs)
