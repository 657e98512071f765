"""Layouts of public files that the shared cases do not show: full size, classes, Lightning files, averages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from idm_fast import checkpoints
from idm_fast.checkpoints import guided_keys, sr3
from idm_fast.checkpoints.format import modules_to_names
from idm_fast.checkpoints.guided_diffusion import DIFFACE, GUIDED_DIFFUSION
from idm_fast.checkpoints.settings import Settings
from idm_fast.checkpoints.source import Source
from idm_fast.checkpoints.sr3 import SR3
from idm_fast.config import DiffusionConfig, UNetConfig, preset
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet

Tensors = dict[str, Tensor]
TINY = UNetConfig(
    16, 32, (1, 2), (1, 1), (1,), num_head_channels=32, qkv_order="heads_qkv", out_channels=6,
)  # fmt: skip


def random_network(config: UNetConfig) -> UNet:
    torch.manual_seed(0)
    unet = UNet(config).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return unet


def as_guided(unet: UNet, prefix: str = "") -> Tensors:
    """Under the family's names; its 1x1 convolutions of attention are 1-D."""
    table = modules_to_names(unet, guided_keys.modules(unet, prefix))
    state = unet.state_dict()
    flat = ("qkv.weight", "attention.out.weight")
    return {
        theirs: state[ours].squeeze(-1) if ours.endswith(flat) else state[ours] for ours, (theirs,) in table.items()
    }


def equal(ours: UNet, loaded: UNet, *arguments: Tensor, **named: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(ours(*arguments, **named), loaded(*arguments, **named))


@pytest.mark.parametrize(
    "name",
    ["gd-256", "difface-512", "sr3-128", "sr3-512"],
)
def test_a_preset_is_read_off_its_keys(name: str) -> None:
    """Names and shapes alone, with no setting given, give the public network back."""
    config = preset(name)
    with torch.device("meta"):
        unet = UNet(config.unet)
    if name.startswith("sr3"):
        made, tensors = SR3, {}
        for ours, (theirs,) in modules_to_names(unet, sr3.modules(unet, "denoise_fn.")).items():
            tensors[theirs] = unet.state_dict()[ours]
    else:
        made, tensors = DIFFACE if name.startswith("difface") else GUIDED_DIFFUSION, as_guided(unet)
    source = Source(Path("x.pt"), "torch file", tensors)
    assert made.matches(source)
    reading = made.read(source, Settings("x.pt", made.settings), None)
    found: UNetConfig = reading.config.unet
    assert replace(found, time_channels=0, embed_channels=config.unet.embed_channels) == config.unet
    learned = config.unet.out_channels == 6
    assert reading.config.diffusion == replace(config.diffusion, variance="learned" if learned else "small")
    assert {name: t.shape for name, t in reading.module.state_dict().items()} == {
        name: t.shape for name, t in unet.state_dict().items()
    }
    assert GUIDED_DIFFUSION.matches(source) is not name.startswith("sr3")
    assert DIFFACE.matches(source) is (name == "difface-512")


@pytest.mark.parametrize(
    ("millions", "given", "network"),
    [
        (554, {}, {"image_size": 256}),
        (
            559,
            {"image_size": 512},
            {"model_channels": 128, "channel_mult": (1, 2, 2, 4, 4, 8, 8), "time_channels": 256},
        ),
        (422, {"image_size": 128, "num_heads": 4}, {"channel_mult": (1, 1, 2, 3, 4), "num_head_channels": 0}),
        (
            296,
            {"image_size": 64, "use_new_attention_order": True, "noise_schedule": "cosine"},
            {"model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_res_blocks": (3,) * 4, "qkv_order": "qkv_heads"},
        ),
        (312, {"num_heads": 4}, {"model_channels": 192, "num_head_channels": 0, "cond_channels": 3}),
        (
            309,
            {"image_size": 512},
            {"model_channels": 192, "cond_channels": 3, "attention_levels": (4, 5)},
        ),
    ],
    ids=["256", "512", "128", "64", "64 to 256", "128 to 512"],
)
def test_the_public_networks_with_classes(millions: int, given: dict[str, Any], network: dict[str, Any]) -> None:
    """guided-diffusion's, with what docs/checkpoints.md says to set. Sizes are those of its paper (2105.05233)."""
    fields: dict[str, Any] = {"image_size": 256, "model_channels": 256, "channel_mult": (1, 1, 2, 2, 4, 4)} | network
    fields["image_size"] = given.get("image_size", 256)
    levels = len(fields["channel_mult"])
    fields["attention_levels"] = tuple(i for i in range(levels) if fields["image_size"] >> i in (32, 16, 8))
    fields |= {"num_res_blocks": (2,) * levels, "num_head_channels": 64, "qkv_order": "heads_qkv"} | network
    fields["num_heads"] = given.get("num_heads", 1)
    fields["cond_resize"] = "bilinear" if "cond_channels" in network else "none"
    config = UNetConfig(**fields, out_channels=6, resample="resblock", use_scale_shift_norm=True, num_classes=1000)
    with torch.device("meta"):
        unet = UNet(config)
    assert round(sum(parameter.numel() for parameter in unet.parameters()) / 1e6) == millions
    tensors = as_guided(unet)
    made = GUIDED_DIFFUSION.read(
        Source(Path("x.pt"), "torch file", tensors), Settings("x.pt", GUIDED_DIFFUSION.settings, given), None
    ).config
    assert made.unet == config
    assert made.diffusion == DiffusionConfig(given.get("noise_schedule", "linear"), variance="learned")


def test_the_widest_guided_network_has_a_narrower_stem(tmp_path: Path) -> None:
    """The 512-px network's first multiplier is 0.5: its sinusoid is twice as wide as its stem."""
    unet = random_network(replace(TINY, time_channels=64, channel_mult=(1, 2, 2), num_res_blocks=(1, 1, 1)))
    torch.save(as_guided(unet), tmp_path / "a.pt")
    loaded = checkpoints.load(tmp_path / "a.pt", {"num_head_channels": 32, "image_size": 16})
    assert loaded.config.unet.time_channels == 64
    assert equal(unet, loaded.module, torch.randn(1, 3, 16, 16), torch.tensor([7]))


def test_classes(tmp_path: Path) -> None:
    unet = random_network(replace(TINY, num_classes=5))
    torch.save(as_guided(unet), tmp_path / "a.pt")
    loaded = checkpoints.load(tmp_path / "a.pt", {"num_head_channels": 32, "image_size": 16, "class_cond": True})
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([7, 8])
    assert equal(unet, loaded.module, x, t, labels=torch.tensor([0, 4]))
    with pytest.raises(IdmFastError, match="labels must be given exactly when num_classes = 5"):
        loaded.module(x, t)


def test_a_condition_of_another_size_is_enlarged_inside(tmp_path: Path) -> None:
    unet = random_network(replace(TINY, cond_channels=3, cond_resize="bilinear"))
    torch.save(as_guided(unet), tmp_path / "a.pt")
    loaded = checkpoints.load(tmp_path / "a.pt", {"num_head_channels": 32, "image_size": 16})
    x, t, small = torch.randn(1, 3, 16, 16), torch.tensor([7]), torch.randn(1, 3, 4, 4)
    large = torch.nn.functional.interpolate(small, (16, 16), mode="bilinear")
    assert equal(unet, loaded.module, x, t, small)
    with torch.no_grad():
        assert torch.equal(loaded.module(x, t, small), unet(x, t, large))


class Callback:
    """What Lightning leaves beside the weights."""

    def __init__(self) -> None:
        self.best = 1.0


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The rest of a trainer's file, whose classes are not importable when it is read."""
    module = ModuleType("pytorch_lightning")
    inner = ModuleType("pytorch_lightning.callbacks")
    monkeypatch.setitem(__import__("sys").modules, "pytorch_lightning", module)
    monkeypatch.setitem(__import__("sys").modules, "pytorch_lightning.callbacks", inner)
    monkeypatch.setattr(inner, "Callback", Callback, raising=False)
    monkeypatch.setattr(Callback, "__module__", "pytorch_lightning.callbacks")
    return {"epoch": 3, "callbacks": {Callback: Callback()}, "hyper_parameters": {"lr": 1e-4}}


def latent_file(path: Path, lightning: dict[str, Any], averaged: bool) -> tuple[UNet, UNet]:
    raw, ema = random_network(TINY), random_network(TINY)
    with torch.no_grad():
        for parameter in ema.parameters():
            parameter.mul_(0.9)
    state = as_guided(raw, "model.diffusion_model.")
    if averaged:
        ema_state = as_guided(ema, "diffusion_model.")
        state |= {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in ema_state.items()}
        state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}
    state |= {
        "first_stage_model.encoder.conv_in.weight": torch.zeros(3),
        "betas": torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64).square().float(),
        "scale_factor": torch.tensor(1.0),
    }
    torch.save({"state_dict": state} | lightning, path)
    return raw, ema


def test_latent_diffusion_in_a_lightning_file(tmp_path: Path, lightning: dict[str, Any]) -> None:
    path = tmp_path / "a.ckpt"
    raw, ema = latent_file(path, lightning, averaged=True)
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([7])
    for averaged, expected, word in ((None, ema, "averaged"), (True, ema, "averaged"), (False, raw, "raw")):
        loaded = checkpoints.load(path, {"num_heads": 2}, averaged=averaged)
        assert loaded.source["weights"] == word
        assert equal(_with_heads(expected, 2), loaded.module, x, t)
    assert loaded.config.diffusion == DiffusionConfig("scaled_linear", "eps", 1000, 0.0015, 0.0195)
    assert loaded.config.unet.image_size == 64


def _with_heads(unet: UNet, heads: int) -> UNet:
    made = UNet(replace(unet.config, num_head_channels=0, num_heads=heads)).eval()
    made.load_state_dict(unet.state_dict())
    return made


def test_a_file_with_one_kind_of_weights(tmp_path: Path, lightning: dict[str, Any]) -> None:
    path = tmp_path / "a.ckpt"
    latent_file(path, lightning, averaged=False)
    assert checkpoints.load(path).source["weights"] == "the only ones"
    with pytest.raises(IdmFastError, match=r"got a file of format \w+ with one kind of weights; leave --ema"):
        checkpoints.load(path, averaged=True)


def test_averages_beside_the_weights(tmp_path: Path) -> None:
    raw, ema = random_network(TINY), random_network(replace(TINY, model_channels=32))
    with torch.no_grad():
        ema.stem.weight.mul_(2)
    torch.save({"state_dict": as_guided(raw, "module."), "ema": as_guided(ema)}, tmp_path / "a.pt")
    given = {"num_head_channels": 32, "image_size": 16}
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([7])
    assert equal(ema, checkpoints.load(tmp_path / "a.pt", given).module, x, t)
    assert equal(raw, checkpoints.load(tmp_path / "a.pt", given, averaged=False).module, x, t)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads_": 1}, r"unknown setting 'num_heads_' \(did you mean num_heads\?\)"),
        ({"num_head_channels": "many"}, "num_head_channels must be whole number, got 'many'"),
        ({"use_new_attention_order": 3}, "use_new_attention_order must be true | false, got 3"),
        ({"noise_schedule": "quadratic"}, "noise_schedule must be linear | cosine, got 'quadratic'"),
        ({"num_head_channels": 24}, "must be a multiple of num_head_channels = 24, got 64"),
        ({"model_channels": 64}, "model_channels must be what the tensors say = 32, got 64"),
        ({"num_res_blocks": 2}, r"num_res_blocks must be what the tensors say = \[1\], got \[2\]"),
        ({"attention_resolutions": [1]}, r"attention_resolutions must be what the tensors say = \[2\], got \[1\]"),
        ({"class_cond": True}, "class_cond must be what the tensors say = false, got true"),
        ({"diffusion_steps": 0}, "train_steps must be >= 1, got 0"),
        ({"timestep_respacing": "never"}, r"setting timestep_respacing: .*, got 'never'"),
        ({"image_size": 15}, "image_size must be a multiple of 2, got 15"),
        ({"format": "sr3"}, "must be of format sr3 = .*, got U-Net of guided-diffusion"),
        ({"format": "onnx"}, "format must be auto, .*, got 'onnx'"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save(as_guided(random_network(TINY)), tmp_path / "a.pt")
    with pytest.raises(IdmFastError, match=message) as caught:
        checkpoints.load(tmp_path / "a.pt", settings)
    assert str(tmp_path / "a.pt") in str(caught.value) or "format" in settings


def test_a_setting_without_a_sound_default_is_asked_for(tmp_path: Path) -> None:
    torch.save(as_guided(random_network(replace(TINY, channel_mult=(1, 3)))), tmp_path / "a.pt")
    with pytest.raises(IdmFastError, match=r"num_head_channels must be given = whole number, .* of \[96\] channels"):
        checkpoints.load(tmp_path / "a.pt")
    missing = {each["name"]: each["assumed"] for each in checkpoints.describe(tmp_path / "a.pt")["missing"]}
    assert missing["num_head_channels"] is None
    assert missing["noise_schedule"] == "linear"


@pytest.mark.parametrize("sides", [[2], [16], "16,8,4"], ids=["rates", "sides", "the flags of a command line"])
def test_settings_that_agree_with_the_tensors(sides: Any, tmp_path: Path) -> None:
    """Attention at the second level of 32 pixels: rate 2, side 16."""
    torch.save(as_guided(random_network(TINY)), tmp_path / "a.pt")
    given = {
        "image_size": 32, "num_channels": 32, "num_res_blocks": "1", "attention_resolutions": sides,
        "class_cond": "False", "learn_sigma": "True", "num_head_channels": "32", "resblock_updown": False,
        "use_scale_shift_norm": True,
    }  # fmt: skip
    assert checkpoints.load(tmp_path / "a.pt", given).config.unet.attention_levels == (1,)
    by_number = checkpoints.load(tmp_path / "a.pt", {"num_head_channels": -1, "image_size": 32})
    assert (by_number.config.unet.num_heads, by_number.source["assumed"]["num_heads"]) == (4, 4)


def test_what_is_assumed_is_said(tmp_path: Path) -> None:
    torch.save(as_guided(random_network(TINY)), tmp_path / "a.pt")
    loaded = checkpoints.load(tmp_path / "a.pt", {"noise_schedule": "cosine"})
    assert loaded.config.diffusion.schedule == "cosine"
    assert loaded.source["assumed"]["num_head_channels"] == 64
    assert "noise_schedule" not in loaded.source["assumed"]
    said = checkpoints.describe(tmp_path / "a.pt")
    assert {"name": "num_head_channels", "assumed": 64, "allowed": "whole number"}.items() <= next(
        each for each in said["missing"] if each["name"] == "num_head_channels"
    ).items()
