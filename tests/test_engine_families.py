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
