"""Public VQGANs: files of taming and LDM, folders of diffusers, our own format; parity with the families' own code."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from idm_fast import checkpoints
from idm_fast.checkpoints import diffusers_vqgan, native
from idm_fast.checkpoints.vqgan_names import foreign, names
from idm_fast.config_vqgan import VqganConfig
from idm_fast.engine.autoencoder import AutoencoderEngine
from idm_fast.errors import IdmFastError
from idm_fast.models.vqgan import Vqgan

TINY = VqganConfig(
    image_size=32, model_channels=32, channel_mult=(1, 2), num_res_blocks=(1, 1), attention_levels=(1,),
    embed_channels=4, codebook_size=16,
)  # fmt: skip


def _network(config: VqganConfig = TINY, seed: int = 0) -> Vqgan:
    torch.manual_seed(seed)
    module = Vqgan(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
        torch.nn.init.normal_(module.codebook.weight)
    return module


def _same(a: Vqgan, b: Vqgan) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(n == m and torch.equal(t, u) for (n, t), (m, u) in pairs)


def _within(got: Tensor, truth: Tensor, bound: float = 1e-5) -> bool:
    return (got - truth).abs().max().item() <= bound * truth.abs().max().item()


@pytest.fixture
def case(shared_data: Path) -> Path:
    folder = shared_data / "checkpoints" / "vq_f4_small"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


@torch.no_grad()
def test_parity_with_the_family_plain_converted_and_compiled(case: Path, tmp_path: Path) -> None:
    settings = json.loads((case / "settings.json").read_text())
    io = load_file(case / "io.safetensors")
    loaded = checkpoints.load(case / "checkpoint.ckpt", settings=settings)
    assert loaded.config.image_size == settings["ddconfig"]["resolution"]
    out = tmp_path / "converted.safetensors"
    checkpoints.convert(case / "checkpoint.ckpt", out, settings=settings)
    converted = checkpoints.load(out)
    assert converted.config == loaded.config
    assert _same(converted.module, loaded.module)
    for module in (loaded.module, converted.module):
        latent = module.encode(io["x"])
        assert _within(latent, io["latent"])
        quantised, codes = module.quantize(io["latent"])
        assert _within(quantised, io["quantized"])
        assert torch.equal(codes.flatten(), io["codes"])
        assert _within(module.decode(io["latent"]), io["decoded"])
        assert _within(module.decode(io["latent"], quantize=False), io["decoded_from_unquantized"])
    n, _, height, width = io["x"].shape
    engine = AutoencoderEngine.compile(loaded.module, (n, height, width), dtype="fp32")
    assert _within(engine.encode(io["x"]), io["latent"])
    assert torch.equal(engine.quantize(io["latent"])[1].flatten(), io["codes"])
    assert _within(engine.decode(io["latent"]), io["decoded"])
    low = AutoencoderEngine.compile(loaded.module, (n, height, width), dtype="bf16")
    rounded = loaded.module.to(torch.bfloat16)
    for got, plain, truth in (
        (low.encode(io["x"]), rounded.encode(io["x"].bfloat16()), io["latent"]),
        (low.decode(io["latent"]), rounded.decode(io["quantized"].bfloat16(), quantize=False), io["decoded"]),
    ):
        assert (got - truth).square().mean() <= 4 * (plain - truth).square().mean()


def test_names_cover_the_network_both_ways() -> None:
    for config in (TINY, replace(TINY, middle_attention=False, channel_mult=(2, 1), num_res_blocks=(2, 1))):
        module = _network(config)
        for family in ("taming", "diffusers"):
            table = names(config, family)  # type: ignore[arg-type]
            assert sorted(table) == sorted(module.state_dict())
            theirs = foreign(module.state_dict(), config, family)  # type: ignore[arg-type]
            assert sorted(theirs) == sorted(name for parts in table.values() for name in parts)


def _taming(module: Vqgan) -> dict[str, Tensor]:
    return foreign(module.state_dict(), module.config, "taming")


def test_a_first_stage_inside_an_ldm_and_what_is_dropped(tmp_path: Path) -> None:
    module = _network()
    inside = {f"first_stage_model.{name}": tensor for name, tensor in _taming(module).items()}
    inside |= {"first_stage_model.loss.logvar": torch.zeros(1), "cond_stage_model.weight": torch.zeros(3)}
    torch.save({"state_dict": inside, "epoch": 3}, tmp_path / "ldm.ckpt")
    found = checkpoints.load(tmp_path / "ldm.ckpt", {"resolution": 32}, "vqgan")
    assert replace(found.config, name=TINY.name) == TINY
    assert _same(found.module, module)
    torch.save({"state_dict": _taming(module) | {"loss.discriminator.0": torch.zeros(2)}}, tmp_path / "alone.ckpt")
    assert _same(checkpoints.load(tmp_path / "alone.ckpt").module, module)
    assert checkpoints.describe(tmp_path / "alone.ckpt")["missing"][0]["name"] == "resolution"


def test_averaged_weights_are_taken_unless_told_otherwise(tmp_path: Path) -> None:
    raw, averaged = _network(seed=0), _network(seed=1)
    copies = {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in _taming(averaged).items()}
    numbers = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(7)}
    torch.save({"state_dict": _taming(raw) | copies | numbers}, tmp_path / "both.ckpt")
    for choice, expected in ((None, averaged), (True, averaged), (False, raw)):
        assert _same(checkpoints.load(tmp_path / "both.ckpt", averaged=choice).module, expected)
    torch.save({"state_dict": _taming(raw)}, tmp_path / "raw.ckpt")
    with pytest.raises(IdmFastError, match=r"raw\.ckpt: averaged weights must be there"):
        checkpoints.load(tmp_path / "raw.ckpt", averaged=True)


def _without_codes(state: dict[str, Tensor]) -> None:
    del state["quantize.embedding.weight"]


def _misshaped(state: dict[str, Tensor]) -> None:
    state["decoder.up.0.block.1.conv2.weight"] = torch.zeros(32, 31, 3, 3)


def _misnamed(state: dict[str, Tensor]) -> None:
    state["decoder.mid.attn_1.kk.weight"] = state.pop("decoder.mid.attn_1.k.weight")


def _broken(state: dict[str, Tensor]) -> None:
    state["quant_conv.bias"] = torch.full((4,), torch.nan)


@pytest.mark.parametrize(
    ("damage", "settings", "message"),
    [
        (_without_codes, {}, "must be a VQGAN = tensor quantize.embedding.weight, got an autoencoder without codes"),
        (_misshaped, {}, r"decoder\.up\.0\.block\.1\.conv2\.weight must be \(32, 32, 3, 3\), got \(32, 31, 3, 3\)"),
        (_misnamed, {}, r"decoder\.mid\.attn_1\.k\.weight \(nearest: decoder\.mid\.attn_1\.kk\.weight\)"),
        (_broken, {}, r"must be finite, got inf or nan in 1 of them \['quant_conv\.bias'\]"),
        (None, {"n_embed": 17}, "setting n_embed must be what the tensors say = 16, got 17"),
        (None, {"ddconfig": {"ch_mult": [1, 4]}}, r"ddconfig\.ch_mult must be .* = \[1\.0, 2\.0\], got \[1, 4\]"),
        (None, {"ddconfig": {"resolution": 32, "attn_resolutions": [32]}}, r"attn_resolutions .* = \[16\], got \[32\]"),
        (None, {"ddconfig": {"double_z": True}}, r"ddconfig\.double_z must be what the tensors say = False, got True"),
        (None, {"ddconfig": {"resolution": "big"}}, r"ddconfig\.resolution must be a whole number, got 'big'"),
        (None, {"resolution": 33}, "image_size must be a multiple of 2, got 33"),
        (None, {"ddconfig": 3}, "setting ddconfig must be a table, got 3"),
    ],
)  # fmt: skip
def test_what_it_says_of_a_file_that_does_not_fit(
    damage: Callable[[dict[str, Tensor]], None] | None, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    state = _taming(_network())
    if damage is not None:
        damage(state)
    torch.save({"state_dict": state}, tmp_path / "some.ckpt")
    with pytest.raises(IdmFastError, match=message) as error:
        checkpoints.load(tmp_path / "some.ckpt", settings)
    assert "some.ckpt" in str(error.value)


def test_our_own_format_keeps_a_vqgan(tmp_path: Path) -> None:
    module, path = _network(), tmp_path / "own.safetensors"
    native.save(path, module, TINY, {"made": "here"}, torch.float32)
    found = checkpoints.load(path)
    assert (found.config, found.notes) == (TINY, {"made": "here"})
    assert _same(found.module, module)
    with pytest.raises(IdmFastError, match="must hold a network of kind unet, got vqgan"):
        native.load(path)


DIFFUSERS: dict[str, dict[str, Any]] = {
    "plain": {
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [32, 64], "layers_per_block": 2,
    },
    "attention": {
        "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        "block_out_channels": [16, 32, 48], "norm_num_groups": 8, "latent_channels": 4, "vq_embed_dim": 5,
        "mid_block_add_attention": False, "num_vq_embeddings": 33, "scaling_factor": 0.5, "sample_size": 30,
    },
    "one_level": {"block_out_channels": [32], "latent_channels": 6, "in_channels": 1, "out_channels": 1},
}  # fmt: skip


def _theirs(case: str) -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    model = diffusers.VQModel(**DIFFUSERS[case]).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


@pytest.mark.parametrize("case", sorted(DIFFUSERS))
@torch.no_grad()
def test_a_diffusers_folder_read_and_written(case: str, tmp_path: Path) -> None:
    """Judged by the library in float64: its own float32 is up to 1e-5 away from that, ours 3e-6."""
    model = _theirs(case)
    model.save_pretrained(tmp_path / "theirs")
    found = checkpoints.load(tmp_path / "theirs")
    x = torch.rand(2, model.config.in_channels, 24, 32) * 2 - 1
    exact = copy.deepcopy(model).double()
    latent = exact.encode(x.double()).latents
    assert _within(found.module.encode(x), latent)
    quantised = exact.decode(latent).sample
    as_is = exact.decode(latent, force_not_quantize=True).sample
    latent = latent.float()
    assert _within(found.module.decode(latent), quantised)
    assert _within(found.module.decode(latent, quantize=False), as_is)
    assert found.config.latent_scale == model.config.scaling_factor
    diffusers_vqgan.write(tmp_path / "ours", found.module)
    back = type(model).from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    theirs, ours = model.state_dict(), back.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert _same(checkpoints.load(tmp_path / "ours").module, found.module)


def test_older_names_of_a_diffusers_folder(tmp_path: Path) -> None:
    module = _network()
    diffusers_vqgan.write(tmp_path, module)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(file)
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in state.items()}
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    file.unlink()
    assert any(".proj_attn." in key for key in state)
    assert _same(checkpoints.load(tmp_path).module, module)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"down_block_types": ["DownEncoderBlock2D", "FancyBlock"]},
            r"down_block_types must be 2 .* got \['FancyBlock'\]",
        ),
        ({"up_block_types": ["UpDecoderBlock2D"] * 2}, "up_block_types must mirror down_block_types"),
        ({"down_block_types": [["x"], {}]}, r"down_block_types must be 2 of .*, got \[\['x'\], {}\]"),
        ({"up_block_types": 7}, "up_block_types must be a list of 2 names, got 7"),
        ({"sample_size": "big", "layers_per_block": 10**9}, "num_res_blocks must have one entry in 1..64 per level"),
        ({"norm_type": "spatial"}, "norm_type must be group, got 'spatial'"),
        ({"act_fn": "relu"}, "act_fn must be silu or swish, got 'relu'"),
        ({"fancy": 1}, r"config\.json must hold fields of a VQModel, got \['fancy'\]"),
        ({"block_out_channels": 32}, "block_out_channels and layers_per_block must be whole numbers, got 32"),
        ({"num_vq_embeddings": "many"}, r"config\.json: codebook_size must be int, got 'many'"),
        ({"norm_num_groups": 7}, "multiple of norm_groups = 7, got 32"),
    ],
)
def test_a_folder_with_another_config_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    diffusers_vqgan.write(tmp_path, _network())
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(IdmFastError, match=message) as error:
        checkpoints.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_what_diffusers_has_not_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(IdmFastError, match="for diffusers must have unshuffle = 1, equal num_res_blocks, got vqgan"):
        diffusers_vqgan.write(tmp_path / "x", _network(replace(TINY, unshuffle=2, num_res_blocks=(1, 2))))
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").touch()
    with pytest.raises(IdmFastError, match="file/x: cannot be written: Not a directory"):
        diffusers_vqgan.write(tmp_path / "file" / "x", _network())
