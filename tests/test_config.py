"""Settings of a network: what they refuse, and the named presets."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from idm_fast.config import PRESETS, DiffusionConfig, ModelConfig, UNetConfig, from_dict, preset
from idm_fast.errors import IdmFastError

SMALL: dict[str, Any] = {"image_size": 32, "model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": [1, 1]}


def test_the_named_presets() -> None:
    assert {"clr-prior-128", "idm-128", "idm-256", "sr3-128", "sr3-512", "gd-256", "difface-512"} <= set(PRESETS)
    for name, config in PRESETS.items():
        assert config.name == name
        assert preset(name) is config


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(IdmFastError, match=r"preset must be one of \['clr-prior-128', .*, got 'idm-127'"):
        preset("idm-127")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_survives_json(name: str) -> None:
    config = preset(name)
    again = from_dict(ModelConfig, json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


def test_defaults_fill_what_is_left_out() -> None:
    config = from_dict(UNetConfig, SMALL)
    assert config == UNetConfig(32, 32, (1, 2), (1, 1))
    assert config.size_multiple == 2
    assert config.embed_width == 128
    assert replace(config, unshuffle=4, embed_channels=64).size_multiple == 8
    assert replace(config, embed_channels=64).embed_width == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"atention_levels": [0]}, r"unknown UNetConfig keys \['atention_levels'\]; known are \['attention_levels'"),
        ({"concat_order": "y_x"}, r"concat_order must be one of \('x_cond', 'cond_x'\), got 'y_x'"),
        ({"qkv_order": ["qkv_heads"]}, "qkv_order must be one of"),
        ({"num_res_blocks": 2}, "num_res_blocks must be a list of whole numbers, got 2"),
        ({"num_res_blocks": [1, 1.5]}, "num_res_blocks must be int, got 1.5"),
        ({"num_res_blocks": [1]}, "num_res_blocks must have one entry"),
        ({"num_res_blocks": [1, 10**9]}, "num_res_blocks must have one entry in 1..64"),
        ({"channel_mult": []}, "channel_mult must be 1 to 10 whole numbers"),
        ({"channel_mult": [1] * 11, "num_res_blocks": [1] * 11}, "channel_mult must be 1 to 10 whole numbers"),
        ({"channel_mult": [0, 2]}, "channel_mult must be .* from 1 up"),
        ({"channel_mult": [1, 0]}, "channel_mult must be"),
        ({"attention_levels": [2]}, r"attention_levels must lie in 0..1, got \[2\]"),
        ({"model_channels": 0}, "model_channels must be >= 1, got 0"),
        ({"model_channels": True}, "model_channels must be int, got True"),
        ({"model_channels": "64"}, "model_channels must be int, got '64'"),
        ({"model_channels": 33}, "model_channels must be even"),
        ({"cond_channels": -1}, "cond_channels must be >= 0, got -1"),
        ({"norm_groups": 0}, "norm_groups must be >= 1, got 0"),
        ({"image_size": 1 << 17}, "image_size must be <= 65536, got 131072"),
        ({"image_size": 33}, "image_size must be a multiple of 2, got 33"),
        ({"residual": True}, "residual needs cond_channels = out_channels = 3, got 0"),
        ({"residual": 1}, "residual must be bool, got 1"),
        ({"norm_eps": 0}, "norm_eps must be > 0"),
        ({"norm_eps": float("nan")}, "norm_eps must be float, got nan"),
        ({"dropout": 1.0}, "dropout in"),
    ],
)
def test_a_bad_network_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(IdmFastError, match=f"^model.json: .*{message}") as caught:
        from_dict(UNetConfig, SMALL | change, "model.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "sigmoid"}, "schedule must be one of"),
        ({"prediction": "noise"}, r"prediction must be one of \('eps', 'v', 'x0'\), got 'noise'"),
        ({"train_steps": 0}, "train_steps must be >= 1"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "betas must satisfy"),
        ({"beta_end": 1}, "betas must satisfy"),
        ({"schedule": "vp_sde", "beta_start": 30, "beta_end": 20}, "betas must satisfy"),
    ],
)
def test_a_bad_diffusion_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(IdmFastError, match=message):
        from_dict(DiffusionConfig, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet": 3}, "unet: must hold a table of UNetConfig keys, got 3"),
        ({"unet": SMALL | {"extra": 1}}, r"c: unet: unknown UNetConfig keys \['extra'\]"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"strength": 1.5}, r"strength must lie in \(0, 1\], got 1.5"),
        ({"name": 1}, "name must be str, got 1"),
    ],
)
def test_a_bad_model_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(IdmFastError, match=message):
        from_dict(ModelConfig, {"name": "m", "unet": SMALL} | change, "c")


def test_missing_keys_and_other_things_than_tables() -> None:
    with pytest.raises(IdmFastError, match=r"^c: .*missing 1 required positional argument: 'unet'"):
        from_dict(ModelConfig, {"name": "m"}, "c")
    with pytest.raises(IdmFastError, match=r"^c: must hold a table of ModelConfig keys, got \[1\]"):
        from_dict(ModelConfig, [1], "c")
