"""diffusers' own networks, of many configurations, and ours of their folders; and back."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from idm_fast import checkpoints
from idm_fast.checkpoints import diffusers_write
from idm_fast.config import DiffusionConfig, ModelConfig, UNetConfig
from idm_fast.diffusion import Schedule
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet

TOLERANCE = 1e-5  # of the output's largest value, in float32
SMALL: dict[str, Any] = {
    "sample_size": 16, "block_out_channels": (32, 64), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1,
}  # fmt: skip
RESNET = {"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"), "downsample_type": "resnet",
          "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"), "upsample_type": "resnet"}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "ddpm": {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "attention_head_dim": None,
             "norm_eps": 1e-6},
    "three levels": {"block_out_channels": (32, 48, 64), "norm_num_groups": 16,
                     "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
                     "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"), "layers_per_block": 2},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift", "attention_head_dim": 16},
    "scale and shift, normed middle": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32},
    "centred, divided": {"center_input_sample": True, "mid_block_scale_factor": 1.4142, "in_channels": 1,
                         "out_channels": 2},
    "no attention": {"add_attention": False, "down_block_types": ("DownBlock2D",) * 2,
                     "up_block_types": ("UpBlock2D",) * 2},
    "residual resampling": RESNET,
    "classes": {"num_class_embeds": 5, "attention_head_dim": 32, "dropout": 0.1},
    "one level": {"block_out_channels": (32,), "down_block_types": ("AttnDownBlock2D",),
                  "up_block_types": ("AttnUpBlock2D",)},
}  # fmt: skip


def library() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers")


def made(folder: Path, **options: Any) -> nn.Module:
    """A random network by the library, saved by the library."""
    torch.manual_seed(0)
    network: nn.Module = library().UNet2DModel(**(SMALL | options)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    return network


def inputs(network: Any, side: int = 16) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(1)
    classes = network.config.num_class_embeds
    x = torch.randn(2, network.config.in_channels, side, side)
    return x, torch.tensor([7, 903]), torch.tensor([1, 4]) if classes else None


def check(ours: nn.Module, theirs: Any, tolerance: float = TOLERANCE) -> None:
    x, t, labels = inputs(theirs)
    with torch.no_grad():
        expected = theirs(x, t, class_labels=labels).sample
        out = ours(x, t, labels=labels)
    difference, scale = (out - expected).abs().max().item(), expected.abs().max().item()
    print(f"largest difference {difference / scale:.1e} of the output's largest value")
    assert scale > 0
    assert difference <= tolerance * scale


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_is_the_same_network(name: str, tmp_path: Path) -> None:
    network = made(tmp_path / "unet", **CONFIGS[name])
    loaded = checkpoints.load(tmp_path / "unet")
    check(loaded.module, network)
    assert sum(p.numel() for p in loaded.module.parameters()) == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_written_and_loaded_by_the_library(name: str, tmp_path: Path) -> None:
    network = made(tmp_path / "unet", **CONFIGS[name])
    loaded = checkpoints.load(tmp_path / "unet")
    diffusers_write.write(tmp_path / "again", loaded.module, loaded.config)
    again = library().UNet2DModel.from_pretrained(tmp_path / "again", subfolder="unet").eval()
    check(loaded.module, again)
    state = again.state_dict()
    assert list(state) == list(network.state_dict())
    assert all(torch.equal(state[key], tensor) for key, tensor in network.state_dict().items())
    assert checkpoints.load(tmp_path / "again").config.unet == loaded.config.unet


def test_fp16_bin_files_and_the_names_of_early_versions(tmp_path: Path) -> None:
    network = made(tmp_path / "unet").half().float()
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in load_file(file).items():
        for today, before in names.items():
            name = name.replace(f".{today}.", f".{before}.")
        old[name] = tensor.half()
    assert any(".query." in name for name in old)
    save_file(old, file.with_suffix(".safetensors"))
    check(checkpoints.load(tmp_path / "unet").module, network)
    file.unlink()
    torch.save(old, file.with_suffix(".bin"))
    check(checkpoints.load(tmp_path / "unet").module, network)


SCHEDULERS: dict[str, dict[str, Any]] = {
    "ddpm": {},
    "cosine, v": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "latent": {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195},
    "sigmoid": {"beta_schedule": "sigmoid", "variance_type": "fixed_large"},
    "trained": {"trained_betas": [0.001 * 1.004**i for i in range(500)], "num_train_timesteps": 500},
    "no signal at the end": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_scheduler_of_a_pipeline(name: str, tmp_path: Path) -> None:
    network = made(tmp_path / "own")
    scheduler = library().DDPMScheduler(**SCHEDULERS[name])
    library().DDPMPipeline(unet=network, scheduler=scheduler).save_pretrained(tmp_path / "pipeline")
    config = checkpoints.load(tmp_path / "pipeline").config
    assert config.sampler == "ddpm"
    expected = {"epsilon": "eps", "v_prediction": "v"}[scheduler.config.prediction_type]
    assert config.diffusion.prediction == expected
    assert config.diffusion.variance == ("large" if name == "sigmoid" else "small")
    table = torch.tensor(Schedule.from_config(config.diffusion).alphas_cumprod)
    assert torch.allclose(table, scheduler.alphas_cumprod.double(), rtol=2e-4, atol=1e-7)  # theirs is float32
    assert config.diffusion.train_steps == scheduler.config.num_train_timesteps
    loaded = checkpoints.load(tmp_path / "pipeline")
    diffusers_write.write(tmp_path / "again", loaded.module, loaded.config)
    again = library().DDPMPipeline.from_pretrained(tmp_path / "again")
    assert torch.allclose(again.scheduler.alphas_cumprod, scheduler.alphas_cumprod, rtol=2e-4, atol=1e-7)
    assert again.scheduler.config.variance_type == scheduler.config.variance_type
    check(loaded.module, again.unet)


def test_a_converted_folder(tmp_path: Path) -> None:
    network = made(tmp_path / "unet", **CONFIGS["ddpm"])
    checkpoints.convert(tmp_path / "unet", tmp_path / "c.safetensors")
    check(checkpoints.load(tmp_path / "c.safetensors").module, network)


def test_networks_of_other_families_are_written_too(tmp_path: Path) -> None:
    """Heads with q, k, v inside, no bias, and the condition first: none of it is diffusers' own way."""
    unet = UNetConfig(
        16, 32, (1, 2), (1, 1), (1,), cond_channels=3, concat_order="cond_x", qkv_order="heads_qkv", qkv_bias=False,
        num_head_channels=16,
    )  # fmt: skip
    torch.manual_seed(0)
    module = UNet(unet).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    diffusers_write.write(tmp_path / "folder", module, ModelConfig("x", unet, DiffusionConfig()))
    theirs = library().UNet2DModel.from_pretrained(tmp_path / "folder", subfolder="unet").eval()
    x, cond, t = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16), torch.tensor([3, 500])
    with torch.no_grad():
        expected, out = module(x, t, cond), theirs(torch.cat([x, cond], 1), t).sample
    assert (out - expected).abs().max() <= TOLERANCE * expected.abs().max()
    with torch.no_grad():
        again = checkpoints.load(tmp_path / "folder", {"cond_channels": 3}).module(x, t, cond)
    assert (again - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]}, "the unknown block SkipDownBlock2D"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type must be positional, got 'fourier'"),
        ({"act_fn": "gelu"}, "act_fn must be silu or swish, got 'gelu'"),
        ({"class_embed_type": "timestep"}, "class_embed_type must be None, got 'timestep'"),
        ({"cross_attention_dim": 768}, r"must hold fields of a UNet2DModel, got \['cross_attention_dim'\]"),
        ({"block_out_channels": "all"}, "must be whole numbers from 1 up, got 'all'"),
        ({"block_out_channels": [32, 0]}, "must be whole numbers from 1 up"),
        ({"block_out_channels": [32]}, "down_block_types must be 1, one for each of block_out_channels, got 2"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "must have attention at the same levels"),
        ({"norm_num_groups": 5}, "must be a multiple of norm_groups = 5"),
        ({"norm_num_groups": None}, "norm_groups must be int, got None"),
        ({"attn_norm_num_groups": 8}, "attn_norm_num_groups must be norm_num_groups = 32, got 8"),
        ({"in_channels": "3"}, "in_channels must be int, got '3'"),
        ({"block_out_channels": [32, 128]}, r"down_blocks.1.* must be \(128, 32, 3, 3\), got \(64, 32, 3, 3\)"),
        ({"_class_name": "UNet2DConditionModel"}, "must be of a known format = .* got .*UNet2DConditionModel"),
    ],
)
def test_a_config_that_is_another_network(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    made(tmp_path / "unet")
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(IdmFastError, match=message) as caught:
        checkpoints.load(tmp_path / "unet")
    assert str(tmp_path) in str(caught.value)


def test_a_folder_that_is_not_whole(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(IdmFastError, match=message):
            checkpoints.load(tmp_path)

    refused(r"must be a diffusers folder with config.json or unet/config.json, got \[\]")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    refused("must hold diffusion_pytorch_model.safetensors or")
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    refused("weights must be one file = diffusion_pytorch_model.safetensors, got several shards")
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    refused("tensors missing: ")
    for broken in ("{", "[1]", '{"a": ' + "[" * 100_000):
        (tmp_path / "config.json").write_text(broken)
        refused(r"config.json: must (be JSON|hold a JSON object)")


def test_a_network_that_the_library_cannot_say(tmp_path: Path) -> None:
    base = UNetConfig(16, 8, (1, 2), (1, 1), norm_groups=4)
    for change, message in (
        ({"unshuffle": 2}, "must have unshuffle = 1"),
        ({"num_res_blocks": (1, 2)}, "must have equal num_res_blocks"),
        ({"embed_silu": False}, "must have embed_silu = True"),
        ({"num_heads": 4, "attention_levels": (0,)}, "must have heads of one width"),
        ({"embed_channels": 8}, "must have a time embedding of 4 times the stem"),
    ):
        unet = replace(base, **change)  # type: ignore[arg-type]
        with pytest.raises(IdmFastError, match=message):
            diffusers_write.write(tmp_path / "out", UNet(unet), ModelConfig("x", unet))
    ours = ModelConfig("x", base, DiffusionConfig("cosine_continuous"))
    with pytest.raises(IdmFastError, match="must have a table that is walked by index, got cosine_continuous"):
        diffusers_write.write(tmp_path / "out", UNet(base), ours)
    (tmp_path / "out").mkdir()
    with pytest.raises(IdmFastError, match="out: must not be there yet"):
        diffusers_write.write(tmp_path / "out", UNet(base), ModelConfig("x", base))
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
