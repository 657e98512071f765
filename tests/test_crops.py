"""A crop's result depends on the crop and its own seed: not on the batch, and hardly on the arithmetic."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from idm_fast.config import DiffusionConfig, ModelConfig, UNetConfig
from idm_fast.crops import CropRestorer, SampleSettings
from idm_fast.diffusion import SOLVERS
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet

CPU = torch.device("cpu")
UNET = UNetConfig(
    image_size=32, model_channels=16, channel_mult=(1, 2), num_res_blocks=(1, 1), cond_channels=3, unshuffle=2,
    residual=True, norm_groups=4, num_head_channels=16, embed_channels=32,
)  # fmt: skip
CONFIG = ModelConfig("tiny", UNET, DiffusionConfig("cosine_continuous", "x0"), steps=3)


def _restorer(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32, gain: float = 0.3) -> CropRestorer:
    torch.manual_seed(0)
    module = UNet(config.unet)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                torch.nn.init.xavier_normal_(parameter)
        module.out_conv.weight.mul_(gain)
    return CropRestorer(config, module, CPU, dtype)


def _crops(count: int) -> Tensor:
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(2)) * 1.6 - 0.8
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(-1, 1)


def _psnr(a: Tensor, b: Tensor) -> float:
    return 10 * float(torch.log10(4 / (a - b).square().mean()))


SEEDS = torch.tensor([7, 8, 2**40 + 1])


@pytest.mark.parametrize(
    "settings",
    [SampleSettings(), SampleSettings(steps=4, sampler="dpmpp_2m_sde"), SampleSettings(steps=4, strength=0.5)],
    ids=["ddim", "dpmpp_2m_sde", "strength"],
)
def test_a_batch_equals_its_singles(settings: SampleSettings) -> None:
    restorer, y = _restorer(), _crops(3)
    batch = restorer.restore(y, SEEDS, settings)
    assert batch.shape == y.shape
    assert batch.dtype == torch.float32
    assert batch.abs().max() <= 1
    for i in range(3):
        single = restorer.restore(y[i : i + 1], SEEDS[i : i + 1], settings)
        assert (single[0] - batch[i]).abs().max() < 1e-4


@pytest.mark.parametrize("sampler", sorted(SOLVERS))
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_the_seed_decides_with_every_sampler(sampler: str, strength: float) -> None:
    restorer, y = _restorer(), _crops(2)
    settings = SampleSettings(steps=3, sampler=sampler, strength=strength)
    first = restorer.restore(y, SEEDS[:2], settings)
    assert torch.isfinite(first).all()
    assert torch.equal(restorer.restore(y, SEEDS[:2], settings), first)
    other = restorer.restore(y, SEEDS[1:], settings)
    assert (other - first).abs().amax(dim=(1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_restores_the_same(copied: Callable[[CropRestorer], CropRestorer]) -> None:
    restorer, y = _restorer(), _crops(1)
    expected = restorer.restore(y, SEEDS[:1], SampleSettings())
    assert torch.equal(copied(restorer).restore(y, SEEDS[:1], SampleSettings()), expected)


def test_the_input_is_not_changed_and_its_layout_does_not_matter() -> None:
    restorer, y = _restorer(), _crops(2)
    kept = y.clone()
    expected = restorer.restore(y, SEEDS[:2], SampleSettings())
    assert torch.equal(y, kept)
    last = restorer.restore(y.contiguous(memory_format=torch.channels_last), SEEDS[:2], SampleSettings())
    assert (last - expected).abs().max() < 1e-5


def test_settings_fall_back_to_the_model_s_own() -> None:
    config = replace(CONFIG, sampler="heun", steps=4, strength=0.5)
    restorer, y = _restorer(config), _crops(1)
    assert SampleSettings().resolved(config) == SampleSettings(4, "heun", None, 0.5)
    assert restorer.evaluations(SampleSettings()) == 7  # two a step, one in the last
    assert restorer.evaluations(SampleSettings(steps=5, sampler="ddim")) == 5
    assert restorer.evaluations(SampleSettings(steps=3, sampler="ddim", corrector_steps=2)) == 3 + 2 * 2
    own = restorer.restore(y, SEEDS[:1], SampleSettings())
    assert torch.equal(own, restorer.restore(y, SEEDS[:1], SampleSettings(4, "heun", None, 0.5)))
    assert not torch.equal(own, restorer.restore(y, SEEDS[:1], SampleSettings(4, "heun", None, 1.0)))


def test_eta_adds_noise_to_ddim() -> None:
    restorer, y = _restorer(), _crops(1)
    results = [restorer.restore(y, SEEDS[:1], SampleSettings(steps=3, eta=eta)) for eta in (None, 0.0, 0.7)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_network_that_changes_nothing_gives_the_input_back() -> None:
    """Strength, samplers and dtypes notwithstanding: the condition is added unrounded."""
    y = _crops(2)
    for dtype in (torch.float32, torch.bfloat16):
        restorer = CropRestorer(CONFIG, UNet(UNET), CPU, dtype)  # a fresh residual network predicts no change
        for settings in (SampleSettings(1), SampleSettings(3, "dpmpp_2m"), SampleSettings(4, strength=0.4)):
            assert (restorer.restore(y, SEEDS[:2], settings) - y).abs().max() < 1e-6


def test_bf16_stays_near_fp32() -> None:
    y = _crops(3)
    exact = _restorer().restore(y, SEEDS, SampleSettings(4))
    rounded = _restorer(dtype=torch.bfloat16).restore(y, SEEDS, SampleSettings(4))
    assert _psnr(exact, y) < 30  # the network does something
    assert _psnr(rounded, exact) > 35
    assert not torch.equal(rounded, exact)


@pytest.mark.parametrize("backend", ["torch", "reference", "cpu,torch"])
def test_backends_agree(backend: str) -> None:
    if backend.startswith("cpu"):
        pytest.importorskip("idm_fast._C", reason="the native module is not built")
    y, settings = _crops(2), SampleSettings(3, "dpmpp_2m_sde")
    expected = _restorer().restore(y, SEEDS[:2], settings)
    forced = _restorer()
    forced.backend = backend
    assert (forced.restore(y, SEEDS[:2], settings) - expected).abs().max() < 1e-4


def test_progress_counts_evaluations() -> None:
    seen: list[int] = []
    restorer = _restorer()
    restorer.restore(_crops(1), SEEDS[:1], SampleSettings(3, "heun"), seen.append)
    assert seen == list(range(restorer.evaluations(SampleSettings(3, "heun"))))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.zeros(1, 3, 32, 33), r"y must be a float \[N, 3, 32, 32\], got torch.float32 \[1, 3, 32, 33\]"),
        (torch.zeros(1, 1, 32, 32), r"y must be a float \[N, 3, 32, 32\]"),
        (torch.zeros(3, 32, 32), r"y must be a float \[N, 3, 32, 32\]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "got torch.uint8"),
        (torch.zeros(0, 3, 32, 32), r"y must hold at least one crop, got \[0, 3, 32, 32\]"),
        (torch.full((1, 3, 32, 32), torch.nan), "y must be finite, got nan or inf"),
    ],
)
def test_wrong_crops_are_refused(y: Tensor, message: str) -> None:
    with pytest.raises(IdmFastError, match=message):
        _restorer().restore(y, SEEDS[:1], SampleSettings())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SampleSettings(steps=0), "steps must be an integer >= 1, got 0"),
        (SampleSettings(sampler="plms"), "solver must be one of ddpm, .*, got 'plms'"),
        (SampleSettings(strength=0.0), r"strength must lie in \(0, 1\], got 0.0"),
        (SampleSettings(strength=1.2), r"strength must lie in \(0, 1\], got 1.2"),
        (SampleSettings(eta=2.0), r"eta must be inside \[0, 1\], got 2.0"),
        (SampleSettings(sampler="heun", eta=0.5), "eta of heun must be 0"),
    ],
)
def test_wrong_settings_are_refused(settings: SampleSettings, message: str) -> None:
    with pytest.raises(IdmFastError, match=message):
        _restorer().restore(_crops(1), SEEDS[:1], settings)


def test_wrong_seeds_are_refused() -> None:
    for seeds in (SEEDS, SEEDS[:1].int()):
        with pytest.raises(IdmFastError, match=r"seeds must be int64 \[N\] = \[1\]"):
            _restorer().restore(_crops(1), seeds, SampleSettings())


def test_a_network_that_overflows_is_an_error_and_no_picture() -> None:
    restorer = _restorer()
    with torch.no_grad():
        restorer.module.stem.weight.fill_(torch.nan)
    with pytest.raises(IdmFastError, match=r"tiny: network output must be finite in torch.float32"):
        restorer.restore(_crops(1), SEEDS[:1], SampleSettings(2))
