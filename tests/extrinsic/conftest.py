"""A small run of rounds, and what its tests ask of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from idm_fast.checkpoints import native
from idm_fast.clean import CleanOptions
from idm_fast.config import PRESETS, DiffusionConfig, ModelConfig, UNetConfig
from idm_fast.models.unet import UNet
from idm_fast.training.losses import LossWeights
from idm_fast.training.rounds import RoundSettings
from idm_fast.training.settings import TrainSettings

PLAIN = LossWeights(lpips_vgg=0, lpips_alex=0, identity=0)  # no weights of other networks
UNBOUND = CleanOptions(steps=1, max_identity_distance=None, aligned=True, dtype="fp32", batch_size=3)
TINY = ModelConfig(
    "tiny-32",
    UNetConfig(
        image_size=32, model_channels=8, channel_mult=(1, 2), num_res_blocks=(1, 1), cond_channels=3, unshuffle=2,
        residual=True, norm_groups=4, embed_channels=16,
    ),
    DiffusionConfig("cosine_continuous", "x0"), steps=2,
)  # fmt: skip
PARTS = ["round-0", "data-1", "round-1", "control-1", "data-2", "round-2", "control-2"]


SCRIPT = """
import sys

import torch

import idm_fast.config as config
from idm_fast.cli import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    tiny = config.from_dict(config.ModelConfig, {tiny!r})
    config.PRESETS[tiny.name] = tiny
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As in ``SCRIPT``: sums come bit for bit from the same number of threads only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, TINY.name, TINY)


@pytest.fixture
def settings(tmp_path: Path, made_up_faces: Callable[..., Path]) -> RoundSettings:
    """Two rounds of four steps on seven made-up faces; two more of them are for validation."""
    data = made_up_faces(7, 2, 40, lambda i: 100 + 50 * (i % 3))
    first = TrainSettings(
        data, tmp_path / "run", preset="tiny-32", steps=5, batch_size=4, learning_rate=1e-2, warmup=1, save_every=2,
        sheet_every=100, precision="fp32", loss=PLAIN, pure_noise=0.25, rollout=0.25, min_native_px=0,
    )  # fmt: skip
    return RoundSettings(first, round_steps=4, round_learning_rate=5e-3, control=True, clean=UNBOUND, judge=None)


@pytest.fixture
def given(settings: RoundSettings, tmp_path: Path) -> RoundSettings:
    """A round that begins from a model file."""
    torch.manual_seed(0)
    module = UNet(TINY.unet)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                torch.nn.init.xavier_normal_(parameter)
    native.save(tmp_path / "start.safetensors", module, TINY, {}, torch.float16)
    first = replace(settings.first, init_from=tmp_path / "start.safetensors")
    return replace(settings, first=first, rounds=1, control=False)


class Kit:
    """What the tests of rounds ask of a run."""

    PARTS = PARTS

    @staticmethod
    def script() -> str:
        """A program that is ``idm-fast`` and knows the tiny preset."""
        return SCRIPT.format(tiny=TINY.to_dict())

    @staticmethod
    def elsewhere(settings: RoundSettings, name: str) -> RoundSettings:
        return replace(settings, first=replace(settings.first, out=settings.first.out.with_name(name)))

    @staticmethod
    def weights(settings: RoundSettings, name: str) -> dict[str, Tensor]:
        return native.load(settings.first.out / name / "model.safetensors").module.state_dict()

    @staticmethod
    def pixels(settings: RoundSettings, name: str) -> dict[str, bytes]:
        folder = settings.first.out / name
        return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}

    @staticmethod
    def check_same(a: RoundSettings, b: RoundSettings) -> None:
        for name in PARTS:
            if name.startswith("data"):
                assert Kit.pixels(a, name) == Kit.pixels(b, name), name
            else:
                one, two = Kit.weights(a, name), Kit.weights(b, name)
                assert [key for key in one if not torch.equal(one[key], two[key])] == [], name

    @staticmethod
    def ledger(settings: RoundSettings) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((settings.first.out / "rounds.json").read_text())
        return found

    @staticmethod
    def differ(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
        return any(not torch.equal(one[key], two[key]) for key in one)

    @staticmethod
    def command(settings: RoundSettings) -> list[str]:
        """The command that asks for these settings, with a single round and R_0 given."""
        s = settings.first
        numbers = {
            "rounds": 1, "round-steps": settings.round_steps, "round-learning-rate": settings.round_learning_rate,
            "batch-size": s.batch_size, "warmup": s.warmup, "save-every": s.save_every, "sheet-every": s.sheet_every,
            "pure-noise": s.pure_noise, "rollout": s.rollout, "min-native-px": 0, "loss-lpips-vgg": 0,
            "loss-lpips-alex": 0, "loss-identity": 0, "clean-steps": 1, "clean-batch-size": 3,
        }  # fmt: skip
        words = {
            "data": s.data, "out": s.out, "init-from": s.init_from, "precision": "fp32", "clean-dtype": "fp32",
            "clean-max-identity-distance": "none",
        }  # fmt: skip
        flags = [f"--{name}={value}" for name, value in (numbers | words).items()]
        return ["train", "extrinsic", "--no-eval", *flags]


@pytest.fixture
def kit() -> type[Kit]:
    return Kit
