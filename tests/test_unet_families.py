"""The one U-Net reproduces each public family's own network code, from its own file to its own outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from idm_fast import checkpoints

TOLERANCE = 1e-5  # of the output's largest value, in float32
CASES = ["guided_legacy_qkv", "guided_superres", "difface_small", "sr3_small"]


class Case:
    """One family's file, its settings as they came with it, and its own network's inputs and output."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "checkpoint.pt"
        self.settings: dict[str, Any] = json.loads((folder / "settings.json").read_text())
        self.io = load_file(folder / "io.safetensors")
        self.expected = self.io.get("out", self.io.get("eps"))

    def run(self, module: nn.Module) -> Tensor:
        if "eps" in self.io:
            out: Tensor = module(self.io["x"], self.io["noise_level"], self.io["cond"])
        elif "low_res" in self.io:
            out = module(self.io["x"], self.io["t"], self.io["low_res"])
        else:
            out = module(self.io["x"], self.io["t"])
        return out

    def check(self, module: nn.Module, tolerance: float = TOLERANCE) -> None:
        out = self.run(module)
        difference, scale = (out - self.expected).abs().max().item(), self.expected.abs().max().item()
        print(f"largest difference {difference / scale:.1e} of the output's largest value")
        assert scale > 0
        assert difference <= tolerance * scale


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, shared_data: Path) -> Case:
    return Case(shared_data / "checkpoints" / request.param)


@pytest.mark.parametrize("grad", [False, True], ids=["ops", "autograd"])
def test_loaded(case: Case, grad: bool) -> None:
    loaded = checkpoints.load(case.file, settings=case.settings)
    assert not loaded.module.training
    assert {parameter.dtype for parameter in loaded.module.parameters()} == {torch.float32}
    with torch.set_grad_enabled(grad):
        case.check(loaded.module)


def test_converted_and_loaded_again(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "converted.safetensors"
    checkpoints.convert(case.file, out, settings=case.settings, license="random weights")
    again = checkpoints.load(out)
    assert again.config == checkpoints.load(case.file, settings=case.settings).config
    assert again.license == "random weights"
    assert len(again.source["sha256"]) == 64
    case.check(again.module)


def test_half_precision_files(case: Case, tmp_path: Path) -> None:
    """The weights are bfloat16 values of moderate size: fp16 keeps nearly all of their eight digits."""
    half = tmp_path / "half.pt"
    stored = torch.load(case.file, weights_only=True)
    tensors = stored.get("state_dict", stored)
    torch.save({name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}, half)
    case.check(checkpoints.load(half, settings=case.settings).module, 1e-3)
    checkpoints.convert(half, tmp_path / "a.safetensors", settings=case.settings, dtype="fp16")
    case.check(checkpoints.load(tmp_path / "a.safetensors").module, 1e-2)


def test_another_setting_is_another_network(case: Case) -> None:
    """What the keys cannot tell matters: the wrong choice must not pass for the right one."""
    wrong = {
        "guided_legacy_qkv": {"use_new_attention_order": True},
        "guided_superres": {"use_new_attention_order": False},
        "difface_small": {"num_head_channels": 32},  # with one head, the order of q, k and v says nothing
        "sr3_small": {"norm_groups": 16},
    }[case.file.parent.name]
    out = case.run(checkpoints.load(case.file, settings=case.settings | wrong).module)
    assert (out - case.expected).abs().max() > 10 * TOLERANCE * case.expected.abs().max()
