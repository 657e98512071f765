"""DifFace's method and its estimators, on networks that have learnt nothing, and what each is refused."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from idm_fast import checkpoints
from idm_fast.checkpoints import native
from idm_fast.cli import main
from idm_fast.config import DiffusionConfig, ModelConfig, UNetConfig
from idm_fast.crops import CropRestorer, SampleSettings
from idm_fast.difface import DifFace
from idm_fast.diffusion import Schedule, initial_noise, respace, sample
from idm_fast.errors import IdmFastError
from idm_fast.estimators import Bicubic, OneStep, Regression
from idm_fast.images import read_image
from idm_fast.kernels import philox_normal
from idm_fast.models.swinir import SwinIR, SwinIRConfig
from idm_fast.models.unet import UNet
from idm_fast.registry import Method, Target, load_estimator, load_models
from idm_fast.restorer import Restorer

CPU = torch.device("cpu")
SIDE = 32
SEEDS = torch.tensor([5, 6])
PRIOR = UNetConfig(
    image_size=SIDE, model_channels=32, channel_mult=(1, 2), num_res_blocks=(1, 1), attention_levels=(1,),
    out_channels=6, num_head_channels=32, qkv_order="heads_qkv",
)  # fmt: skip
CONFIG = ModelConfig("prior", PRIOR, DiffusionConfig(variance="learned"), "ddpm", 250)


def prior(config: UNetConfig = PRIOR) -> UNet:
    torch.manual_seed(0)
    module = UNet(config).eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            torch.nn.init.xavier_normal_(parameter, gain=0.7)
    return module


def saved(path: Path, config: ModelConfig, module: UNet) -> Path:
    native.save(path, module, config, {}, torch.float32)
    return path


@pytest.fixture(scope="module")
def prior_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("prior") / "prior.safetensors", CONFIG, prior())


def crops(count: int = 2, side: int = SIDE) -> Tensor:
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(2)) * 1.6 - 0.8
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(-1, 1)


def halved(y: Tensor, seeds: Tensor) -> Tensor:
    return 0.5 * y


def difface(**given: Any) -> DifFace:
    return DifFace(CONFIG, prior(), CPU, torch.float32, **{"estimator": halved, **given})


# ---- the method ------------------------------------------------------------------------------------------------


def test_its_chain_is_the_public_one() -> None:
    model, chain = difface(), respace(1000, "ddim250")
    table = model.table(SampleSettings().resolved(model.config))
    assert (table.solver, table.eta, table.evaluations) == ("ddim", 0.5, 100)
    assert table.network_time.tolist() == chain[:100][::-1].tolist() == list(range(396, -1, -4))
    assert (table.alpha_start, table.sigma_start) == tuple(Schedule.linear().alpha_sigma(400))
    first = model.table(SampleSettings(respacing="250", sampler="ddpm").resolved(model.config))
    assert first.learned_variance
    assert first.network_time.tolist() == respace(1000, "250")[:100][::-1].tolist()


def test_a_walk_by_hand() -> None:
    """The estimate noised to index 3, then DDIM over 2, 1, 0, from the formulas."""
    model, y = difface(start_index=3), crops()
    got = model.restore(y, SEEDS, SampleSettings())
    bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    network = prior()
    x = np.sqrt(bars[12]) * 0.5 * y.double() + np.sqrt(1 - bars[12]) * initial_noise(SEEDS, (2, 3, SIDE, SIDE), CPU)
    for e, t in enumerate((8, 4, 0)):
        eps = network(x.float(), torch.full((2,), float(t)))[:, :3].double()
        bar, previous = bars[t], bars[t - 4] if t else 1.0
        x0 = ((x - np.sqrt(1 - bar) * eps) / np.sqrt(bar)).clamp(-1, 1)
        eps = (x - np.sqrt(bar) * x0) / np.sqrt(1 - bar)
        deviation = 0.5 * np.sqrt((1 - previous) / (1 - bar) * (1 - bar / previous))
        noise = philox_normal(SEEDS, (2, 3, SIDE, SIDE), e, CPU).double()
        x = np.sqrt(previous) * x0 + np.sqrt(1 - previous - deviation**2) * eps + deviation * noise
    torch.testing.assert_close(got.double(), x.clamp(-1, 1), rtol=0, atol=1e-4)


def test_fewer_steps_end_where_the_chain_does() -> None:
    model = difface()
    table = model.table(SampleSettings(steps=5).resolved(model.config))
    assert table.network_time.tolist() == [396, 316, 236, 156, 76]
    assert table.alpha_start == Schedule.linear().alpha_sigma(400)[0]
    assert (model.steps(SampleSettings(steps=5)), model.steps(SampleSettings())) == (5, 100)
    with pytest.raises(IdmFastError, match="steps must be at most the schedule's 100, got 101"):
        model.evaluations(SampleSettings(steps=101))


@pytest.mark.parametrize("settings", [SampleSettings(3), SampleSettings(3, "ddpm"), SampleSettings(3, "dpmpp_2m")])
def test_a_batch_equals_its_singles_and_the_plain_modules(settings: SampleSettings) -> None:
    model, y = difface(), crops()
    batch = model.restore(y, SEEDS, settings)
    for i in range(2):
        single = model.restore(y[i : i + 1], SEEDS[i : i + 1], settings)
        torch.testing.assert_close(single[0], batch[i], rtol=0, atol=1e-4)
    plain = difface(engine=False).restore(y, SEEDS, settings)
    torch.testing.assert_close(plain, batch, rtol=0, atol=1e-3)
    assert (model.restore(y, SEEDS + 1, settings) - batch).abs().max() > 0.01


def test_the_estimate_is_what_it_begins_with() -> None:
    """Little noise and a network that says nothing: the estimate comes back."""
    silent = UNet(PRIOR).eval()  # a fresh network's last convolution is zero
    y = crops()
    model = DifFace(CONFIG, silent, CPU, torch.float32, estimator=halved, start_index=1)
    noise = initial_noise(SEEDS, (2, 3, SIDE, SIDE), CPU)
    alpha, sigma = Schedule.linear().alpha_sigma(4)
    x0 = (float(alpha) * 0.5 * y + float(sigma) * noise) / Schedule.linear().alpha_sigma(0)[0]
    torch.testing.assert_close(model.restore(y, SEEDS, SampleSettings()), x0.clamp(-1, 1), rtol=0, atol=1e-5)


class Known(torch.nn.Module):
    """The exact denoiser of faces that are all known: eps from their mean, weighed by how well each explains x."""

    def __init__(self, faces: Tensor) -> None:
        super().__init__()
        self.faces = faces
        self.bars = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))

    def forward(self, x: Tensor, t: Tensor, cond: None) -> Tensor:
        bar, flat = float(self.bars[int(t[0])]), self.faces.flatten(1)
        distance = (x.flatten(1)[:, None] - bar**0.5 * flat).square().sum(-1)
        x0 = ((-distance / (2 * (1 - bar))).softmax(1) @ flat).view_as(x)
        return (x - bar**0.5 * x0) / (1 - bar) ** 0.5


@pytest.mark.parametrize("settings", [SampleSettings(), SampleSettings(steps=10), SampleSettings(sampler="ddpm")])
def test_with_the_exact_denoiser_the_clean_face_comes_back(settings: SampleSettings) -> None:
    """The estimate is a blurred face; the prior knows twelve sharp ones."""
    faces = crops(12) + 0.4 * torch.sin(9 * crops(12))
    config = ModelConfig("known", PRIOR, DiffusionConfig(), "ddpm", 250)
    model = DifFace(config, UNet(PRIOR), CPU, torch.float32, engine=False, estimator=Bicubic())
    model.module = Known(faces)  # type: ignore[assignment]
    small = torch.nn.functional.interpolate(faces[:2], (6, 6), mode="bicubic", antialias=True)
    blurred = torch.nn.functional.interpolate(small, (SIDE, SIDE), mode="bicubic")
    assert (blurred - faces[:2]).square().mean() > 0.01
    torch.testing.assert_close(model.restore(blurred, SEEDS, settings), faces[:2].clamp(-1, 1), rtol=0, atol=0.02)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_restores_the_same(copied: Callable[[DifFace], DifFace]) -> None:
    model, y = difface(start_index=2), crops(1)
    again = copied(model)
    assert again.start_index == 2
    expected = model.restore(y, SEEDS[:1], SampleSettings())
    assert torch.equal(again.restore(y, SEEDS[:1], SampleSettings()), expected)


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ({"start_index": 250}, SampleSettings(), r"start index must lie in 1\.\.249 of the chain, got 250"),
        ({"start_index": 0}, SampleSettings(), r"start index must lie in 1\.\.249 of the chain, got 0"),
        ({}, SampleSettings(respacing="25"), r"start index must lie in 1\.\.24 of the chain, got 100"),
        ({}, SampleSettings(strength=0.5), "strength must be left out with difface"),
        ({}, SampleSettings(steps=5, respacing="250"), "respacing must not be given with steps, got '250' and 5"),
        ({}, SampleSettings(respacing="ddim7,3"), "sections must be one count behind 'ddim', got 'ddim7,3'"),
    ],
)
def test_what_it_refuses(given: dict[str, Any], settings: SampleSettings, message: str) -> None:
    with pytest.raises(IdmFastError, match=message):
        difface(**given).evaluations(settings)


# ---- estimators ------------------------------------------------------------------------------------------------


def test_estimators_by_name_and_file(tiny_model: Path, prior_file: Path, tmp_path: Path) -> None:
    target = Target("cpu", "fp32")
    y = crops(2, 64)
    assert load_estimator("bicubic", target)(y, SEEDS) is y
    ours = load_estimator(tiny_model, target)
    assert isinstance(ours, OneStep)
    assert isinstance(load_models(tiny_model, target)[0], CropRestorer)
    model = ours.models[0]
    small = torch.nn.functional.interpolate(y, (32, 32), mode="bicubic", antialias=True).clamp(-1, 1)
    restored = model.restore(small, SEEDS + 2**62, SampleSettings(steps=1))  # not the chain's noise once more
    expected = torch.nn.functional.interpolate(restored, (64, 64), mode="bicubic", antialias=True)
    torch.testing.assert_close(ours(y, SEEDS), expected.clamp(-1, 1), rtol=0, atol=1e-5)
    torch.manual_seed(0)
    swinir = SwinIR(SwinIRConfig(12, (1,), (2,), 4, 20, 2, 8)).eval()
    torch.save({"params": swinir.state_dict()}, tmp_path / "swinir.pth")
    read = load_estimator(tmp_path / "swinir.pth", target)
    assert isinstance(read, Regression)
    with torch.no_grad():
        torch.testing.assert_close(read(y, SEEDS), swinir((y + 1) / 2) * 2 - 1, rtol=0, atol=1e-6)
    with pytest.raises(
        IdmFastError, match=r"estimator must be bicubic, a restorer .* or a SwinIR, got a UNet that is nei"
    ):
        load_estimator(prior_file, target)
    with pytest.raises(
        IdmFastError, match=r"estimator must be bicubic or a model, and a model must be .*, got 'nobody'"
    ):
        load_estimator("nobody", target)
    with pytest.raises(IdmFastError, match="diffusion U-Net or a CLR-Face to restore with, got a SwinIR"):
        load_models(tmp_path / "swinir.pth", target)


def test_the_largest_restorer_that_a_crop_fills_is_taken() -> None:
    class Counted:
        def __init__(self, size: int) -> None:
            self.size, self.seen = size, 0

        def restore(self, y: Tensor, seeds: Tensor, settings: SampleSettings) -> Tensor:
            self.seen += 1
            assert (y.shape[-1], settings.steps) == (self.size, 1)
            return y

    models = [Counted(16), Counted(32), Counted(64)]
    estimate = OneStep(models)  # type: ignore[arg-type]
    for side, chosen in ((64, 2), (48, 1), (8, 0)):
        assert estimate(crops(1, side), SEEDS[:1]).shape[-1] == side
        assert [each.seen for each in models] == [int(i == chosen) for i in range(3)]
        models[chosen].seen = 0
    assert Bicubic()(crops(), SEEDS).shape == (2, 3, SIDE, SIDE)


# ---- what a user types -----------------------------------------------------------------------------------------


def test_a_public_prior_restores_a_picture(tmp_path: Path, prior_file: Path) -> None:
    """DifFace's own layout, read without conversion, from Python and from the command line."""
    face = (np.random.default_rng(0).random((48, 48, 3)) * 255).astype(np.uint8)
    given: dict[str, Any] = {"device": "cpu", "dtype": "fp32", "method": "difface", "estimator": "bicubic"}
    restorer = Restorer.from_pretrained(prior_file, start_index=4, **given)
    result = restorer.restore(face, aligned=True, output_type="np", seed=3)
    assert (result.steps, result.faces[0].model, result.image.shape) == (4, "prior", (48, 48, 3))
    assert np.abs(result.image.astype(int) - face).max() > 0
    source, target = tmp_path / "face.png", tmp_path / "out.png"
    Image.fromarray(face).save(source)
    command = [
        "restore",
        str(source),
        "-o",
        str(target),
        "--aligned",
        "--model",
        str(prior_file),
        "--method",
        "difface",
    ]
    options = ["--estimator", "bicubic", "--start-index", "4", "--seed", "3", "--device", "cpu", "--dtype", "fp32"]
    assert main([*command, *options]) == 0
    assert np.array_equal(read_image(target).to_array(8), result.image)


def test_a_public_prior_is_judged(tmp_path: Path, prior_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "faces").mkdir()
    Image.fromarray((np.random.default_rng(0).random((32, 32, 3)) * 255).astype(np.uint8)).save(
        tmp_path / "faces/a.png"
    )
    options = ["--size", "32", "--levels", "mild", "--metrics", "psnr", "--no-baseline", "--dtype", "fp32"]
    command = ["eval", "--data", str(tmp_path / "faces"), "--model", str(prior_file), "--device", "cpu", *options]
    found = tmp_path / "found.json"
    how = ["--method", "difface", "--estimator", "bicubic", "--start-index", "3", "--json", str(found)]
    assert main([*command, *how]) == 0
    report = json.loads(found.read_text())
    assert [(row["name"], row["steps"]) for row in report["rows"]][-1] == ("prior", 3)
    assert report["conditions"]["settings"]["estimator"] == "bicubic"
    assert main([*command, "--start-index", "3"]) == 2
    assert "--start-index must come with --method difface" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "method", "message"),
    [
        ({}, "conditional", r"conditioned on a picture = 3 condition channels, .* method difface \(--method difface\)"),
        ({"cond_channels": 3}, "difface", "model must be unconditional for difface"),
        ({"num_classes": 10}, "difface", "model must have no classes, since nobody says of which class a face is"),
        ({"in_channels": 4, "out_channels": 4}, "difface", "model must work on pictures = 3 input"),
    ],
)
def test_models_that_do_not_fit_the_method(changes: dict[str, Any], method: str, message: str, tmp_path: Path) -> None:
    unet = UNetConfig(**{**vars(PRIOR), **changes})
    path = saved(tmp_path / "other.safetensors", ModelConfig("other", unet), UNet(unet))
    with pytest.raises(IdmFastError, match=message):
        load_models(path, Target("cpu", "fp32"), Method(method, "bicubic"))
    with pytest.raises(IdmFastError, match="method must be one of conditional, difface, got 'ddrm'"):
        Method("ddrm")


def test_a_diffusers_folder(tmp_path: Path) -> None:
    """A pipeline that the library writes is a prior without conversion; one with an autoencoder is refused."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=SIDE, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler(clip_sample=True)).save_pretrained(tmp_path / "prior")
    how = Method("difface", "bicubic", 3)
    (model,) = load_models(tmp_path / "prior", Target("cpu", "fp32"), how)
    assert (model.config.name, model.size, model.steps(SampleSettings())) == ("prior", SIDE, 3)
    assert model.restore(crops(1), SEEDS[:1], SampleSettings()).isfinite().all()
    (tmp_path / "prior" / "vqvae").mkdir()
    with pytest.raises(
        IdmFastError, match="must work on pictures, got prior, which works on the latents of an autoenc"
    ):
        load_models(tmp_path / "prior", Target("cpu", "fp32"), how)


# ---- the shared cases, as a user meets them ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method", "side"),
    [("difface_small", "difface", 64), ("guided_superres", "conditional", 32), ("sr3_small", "conditional", 32)],
)
def test_shared_checkpoints_restore_without_conversion(name: str, method: str, side: int, shared_data: Path) -> None:
    folder = shared_data / "checkpoints" / name
    settings = {key: value for key, value in json.loads((folder / "settings.json").read_text()).items() if key != "t"}
    how = Method(method, "bicubic", 3)
    (model,) = load_models(folder / "checkpoint.pt", Target("cpu", "fp32"), how, settings)
    assert model.size == side
    out = model.restore(crops(1, side), SEEDS[:1], SampleSettings(steps=3))
    assert out.isfinite().all()
    (plain,) = load_models(folder / "checkpoint.pt", Target("cpu", "fp32", engine=False), how, settings)
    torch.testing.assert_close(
        plain.restore(crops(1, side), SEEDS[:1], SampleSettings(steps=3)), out, rtol=0, atol=2e-3
    )


def test_super_resolution_is_shown_what_is_left_of_a_small_picture(shared_data: Path) -> None:
    """The module enlarges a low resolution picture itself; the engine is given it enlarged: the same walk."""
    path = shared_data / "checkpoints" / "guided_superres" / "checkpoint.pt"
    loaded = checkpoints.load(path, {"image_size": 32, "num_heads": 4, "use_new_attention_order": True})
    model = CropRestorer(loaded.config, loaded.module, CPU, torch.float32)
    assert (loaded.config.diffusion.variance, loaded.config.respacing) == ("large", "250")
    y, settings = crops(1), SampleSettings(respacing="10")
    low = torch.nn.functional.interpolate(y, (8, 8), mode="area")  # what it was trained to see
    table = model.table(settings.resolved(loaded.config))
    assert table.network_time.tolist() == respace(1000, "10")[::-1].tolist()
    start = initial_noise(SEEDS[:1], (1, 3, 32, 32), CPU)
    expected = sample(lambda x, t: loaded.module(x, t, low), table, start, SEEDS[:1]).clamp(-1, 1)
    torch.testing.assert_close(model.restore(y, SEEDS[:1], settings), expected, rtol=0, atol=1e-3)
