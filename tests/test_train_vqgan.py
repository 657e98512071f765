"""A VQGAN's training: resumed it is the same run; codes follow latents; the judge is as loud as it is asked to be."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import stop_at, tensors
from PIL import Image
from torch import Tensor, nn

from idm_fast import checkpoints
from idm_fast.cli import main
from idm_fast.config_vqgan import VQGAN_PRESETS, VqganConfig
from idm_fast.errors import IdmFastError
from idm_fast.models.vqgan import Codebook
from idm_fast.training.codebook import CodebookAverage
from idm_fast.training.data import FacePictures, list_faces
from idm_fast.training.distributed import Group
from idm_fast.training.patch_discriminator import PatchDiscriminator
from idm_fast.training.reconstruction import measure
from idm_fast.training.vqgan import VqganTrainer
from idm_fast.training.vqgan_loss import VqganLoss, VqganLossWeights, balance
from idm_fast.training.vqgan_settings import VqganSettings

TINY = VqganConfig(
    image_size=32, model_channels=16, channel_mult=(1, 1), num_res_blocks=(1, 1), middle_attention=False, norm_groups=4,
    codebook_size=64, unshuffle=2, name="tiny-vq",
)  # fmt: skip
PLAIN = VqganLossWeights(lpips_vgg=0)  # no weights of other networks
PATCH = replace(PLAIN, adversarial=0.5, adversarial_from=3, judge_lead=2)
FEATURES = replace(PATCH, lpips_vgg=1.0, vgg_crop=16, judge="features")
ALONE = Group(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VQGAN_PRESETS, TINY.name, TINY)


@pytest.fixture
def settings(tmp_path: Path, made_up_faces: Callable[..., Path]) -> VqganSettings:
    """A run of six steps on five made-up faces."""
    data = made_up_faces(5, 2, 48)
    return VqganSettings(
        data, tmp_path / "run", preset=TINY.name, steps=6, batch_size=4, warmup=2, save_every=2, sheet_every=100,
        precision="fp32", codebook_lead=2, revive_every=3, degraded=0.25, loss=PLAIN,
    )  # fmt: skip


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("loss", [PLAIN, PATCH, FEATURES], ids=["plain", "patch", "features"])
def test_an_interrupted_run_ends_with_the_same_weights(settings: VqganSettings, loss: VqganLossWeights) -> None:
    settings = replace(settings, loss=loss, precision="bf16")
    whole = replace(settings, out=settings.out.with_name("whole"))
    VqganTrainer(whole).run()
    stop_at(VqganTrainer(settings), 5)
    VqganTrainer(settings).run()
    first, second = (tensors(torch.load(s.out / "state.pt", weights_only=True)) for s in (whole, settings))
    assert {name.split(".")[1] for name in first} >= {"model", "ema", "codebook", *(["judge"] if loss != PLAIN else [])}
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    files = [s.out / "model.safetensors" for s in (whole, settings)]
    assert files[0].read_bytes()[-1000:] == files[1].read_bytes()[-1000:]


def test_it_learns_and_reports(settings: VqganSettings) -> None:
    settings = replace(settings, steps=60, learning_rate=2e-3, sheet_every=30, degraded=0.0)
    VqganTrainer(settings).run()
    rows = _rows(settings.out / "log.csv")
    assert [int(row["step"]) for row in rows] == [20, 40, 60]
    assert float(rows[-1]["psnr"]) > float(rows[0]["psnr"]) + 1
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    found = _rows(settings.out / "reconstruction.csv")
    assert [int(row["step"]) for row in found] == [30, 60]
    assert float(found[-1]["psnr"]) > float(found[0]["psnr"])
    assert 1 < int(found[-1]["codes"]) <= TINY.codebook_size
    with Image.open(settings.out / "sheets" / "000060.png") as sheet:
        assert sheet.size == (5 * 32, 2 * 32)
    made = checkpoints.load(settings.out / "model.safetensors")
    assert replace(made.config, latent_scale=1.0) == TINY
    assert made.config.latent_scale == pytest.approx(1 / float(found[-1]["latent_deviation"]), rel=0.01)
    assert made.notes["reconstruction"]["psnr"] == pytest.approx(float(found[-1]["psnr"]), abs=1e-3)


def test_a_run_may_begin_from_a_model_file(settings: VqganSettings) -> None:
    VqganTrainer(settings).run()
    file = settings.out / "model.safetensors"
    later = VqganTrainer(replace(settings, out=settings.out.with_name("later"), init_from=file))
    for name, tensor in checkpoints.load(file).module.state_dict().items():
        assert torch.equal(later.model.state_dict()[name], tensor)
        assert torch.equal(later.ema.model.state_dict()[name], tensor)
    later.settings = replace(later.settings, learning_rate=1e-9, codebook_lead=0)
    before = later.model.codebook.weight.clone()
    next(later._steps())
    moved = (later.model.codebook.weight - before).norm(dim=1)
    assert moved.max() > 0
    assert (moved <= 0.05 * before.norm(dim=1).mean()).all()  # learned codes are kept, not drawn anew


def test_codes_are_the_means_of_those_that_chose_them() -> None:
    """With a constant assignment the code converges to the mean; a code that nobody chooses moves to a latent."""
    torch.manual_seed(0)
    book = Codebook(4, 3)
    average = CodebookAverage(book, decay=0.5, revive_below=0.1, revive_every=5)
    latent = torch.randn(2, 3, 4, 4)
    codes = torch.arange(32).view(2, 4, 4) % 3  # nobody chooses the last
    rows = latent.permute(0, 2, 3, 1).reshape(-1, 3)
    average.update(book, latent, codes, 0, seed=7, group=ALONE)
    assert all((rows == code).all(dim=1).any() for code in book.weight)  # at first all of them are latents
    for step in range(1, 30):
        average.update(book, latent, codes, step, seed=7, group=ALONE)
    for code in range(3):
        expected = rows[codes.flatten() == code].mean(dim=0)
        assert torch.allclose(book.weight[code], expected, atol=1e-5)
    assert (rows == book.weight[3]).all(dim=1).any()
    used, perplexity = average.use()
    assert 0.75 <= used <= 1.0
    assert 0.7 < perplexity <= 1.0


def test_revival_is_the_same_again_and_leaves_living_codes_alone() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        book, latent = Codebook(8, 2), torch.randn(1, 2, 4, 4)
        average = CodebookAverage(book, 0.9, 0.5, 10)
        for step in range(10):
            average.update(book, latent, torch.zeros(1, 4, 4, dtype=torch.int64), step, 3, ALONE)
        revived = average.update(book, latent, torch.zeros(1, 4, 4, dtype=torch.int64), 10, 3, ALONE)
        assert revived == 7
        assert torch.equal(book.weight[0], average.sums[0] / average.counts[0])
        rows = latent.permute(0, 2, 3, 1).reshape(-1, 2)
        assert [bool((rows == code).all(dim=1).any()) for code in book.weight] == [False] + 7 * [True]
        results.append(book.weight.detach().clone())
    assert torch.equal(*results)


def test_the_judge_is_as_loud_as_the_other_terms() -> None:
    """Equation 7 at a last layer of one number, where the gradients can be written down."""
    last = nn.Parameter(torch.tensor(2.0))
    x = torch.tensor([[1.0, -3.0]])
    made = last * x
    kept, wanted = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 4.0]])
    # d kept / d last = 1 x 1 + 1 x (-3) = -2; d wanted / d last = -12.
    assert balance(made, last, kept, wanted).item() == pytest.approx(2 / 12, rel=1e-5)
    assert balance(made, last, kept, torch.zeros(1, 2)).item() == 1e4


def test_the_gradient_is_that_of_the_sum_of_the_terms() -> None:
    """Against autograd through all of it at once; the judge is heard from its step on and not before."""
    torch.manual_seed(0)
    loss, x = VqganLoss(PATCH), torch.rand(2, 3, 32, 32) * 2 - 1
    last = nn.Parameter(torch.randn(3, 3, 1, 1))
    made = nn.functional.conv2d(x, last)
    quiet, terms = loss(made, x, last, (0, 0), 2)
    assert terms["adversarial"] == terms["adversarial_weight"] == 0
    (expected,) = torch.autograd.grad((made - x).abs().mean(), made, retain_graph=True)
    assert torch.allclose(quiet, expected, atol=1e-8)
    assert loss.hinge() is not None  # it learns already
    heard, terms = loss(made, x, last, (0, 0), 3)
    at_last = [torch.autograd.grad(made, last, g, retain_graph=True)[0].norm() for g in (quiet, heard - quiet)]
    assert at_last[1] / at_last[0] == pytest.approx(PATCH.adversarial, rel=1e-3)
    assert terms["adversarial_weight"] > 0
    loss(made, x, last, (0, 0), 0)
    assert loss.hinge() is None


def test_a_patch_discriminator_learns_to_tell() -> None:
    torch.manual_seed(0)
    judge = PatchDiscriminator(width=8)
    optimizer = torch.optim.Adam(judge.parameters(), 3e-3)
    (shape,) = (logits.shape for logits in judge([torch.zeros(1, 3, 32, 32)]))
    assert shape == (1, 1, 6, 6)
    losses = []
    for _ in range(30):
        sharp = torch.randn(4, 3, 32, 32)
        loss = judge.hinge([sharp], [nn.functional.avg_pool2d(sharp, 3, 1, 1)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_share_of_the_faces_is_degraded(settings: VqganSettings) -> None:
    faces = list_faces(settings.data, "train")
    clean, some = (FacePictures(faces, 32, 40, 0, share, 1 << 20) for share in (0.0, 0.5))
    same = sum(torch.equal(clean[i], some[i]) for i in range(40))
    assert 10 <= same <= 30
    assert torch.equal(some[7], FacePictures(faces, 32, 40, 0, 0.5, 0)[7])


def test_measures_are_those_of_the_pictures() -> None:
    """A network that gives back what it got, but for its codes, is measured as such."""

    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def encode(self, x: Tensor) -> Tensor:
            return x

        def quantize(self, z: Tensor) -> tuple[Tensor, Tensor]:
            return z + 0.2, torch.arange(z[:, 0].numel()).view_as(z[:, 0]) % 5

        def decode(self, z: Tensor, *, quantize: bool) -> Tensor:
            assert not quantize
            return z

    found = measure(Same(), torch.zeros(3, 3, 8, 8), None)  # type: ignore[arg-type]
    assert found.psnr == pytest.approx(20.0, abs=1e-4)  # an error of 0.1 on a scale of 1
    assert found.psnr_as_is == math.inf
    assert (found.count, found.codes, found.latent_deviation) == (3, 5, 0.0)
    assert math.isnan(found.lpips)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: replace(s, precision="fp16"), "precision must be fp32 or bf16 for a VQGAN, got fp16"),
        (lambda s: replace(s, degraded=1.5), r"degraded must lie in \[0, 1\), got 1\.5"),
        (lambda s: replace(s, revive_every=0), "revive_every must be >= 1, got 0"),
        (lambda s: replace(s, loss=VqganLossWeights(l1=0, lpips_vgg=0)), "l1 or lpips_vgg must be above 0"),
        (lambda s: replace(PLAIN, adversarial=1, judge="features"), "lpips_vgg must be above 0 with judge = features"),
        (lambda s: replace(PLAIN, judge="jury"), "judge must be patch or features, got 'jury'"),
        (lambda s: VqganTrainer(replace(s, preset="vq-9")), r"preset must be one of .*, got 'vq-9'"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(settings: VqganSettings, make: Callable[[VqganSettings], Any], message: str) -> None:
    with pytest.raises(IdmFastError, match=message):
        make(settings)


def test_the_command_trains_and_keeps_to_its_settings(
    settings: VqganSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    out = settings.out
    given = ["train", "vqgan", "--data", str(settings.data), "--out", str(out), "--preset", TINY.name, "--steps", "3"]
    given += ["--batch-size", "2", "--loss-lpips-vgg", "0", "--loss-judge", "patch", "--precision", "fp32"]
    assert main(given) == 0
    assert "step 3 of 3" in capsys.readouterr().err
    assert main([*given, "--loss-l1", "2"]) == 2
    assert "belongs to a run with loss.l1 = 1.0 (now 2.0)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*given, "--loss-judge", "jury"])
    assert "invalid choice: 'jury'" in capsys.readouterr().err


def test_a_model_of_another_shape_is_no_beginning(settings: VqganSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    VqganTrainer(settings).run()
    monkeypatch.setitem(VQGAN_PRESETS, "wider", replace(TINY, model_channels=32))
    other = replace(settings, preset="wider", out=settings.out.with_name("b"))
    with pytest.raises(IdmFastError, match="must hold a network of tiny-vq's shape, got another"):
        VqganTrainer(replace(other, init_from=settings.out / "model.safetensors"))


SCRIPT = """
from pathlib import Path
import torch
from idm_fast.config import from_dict
from idm_fast.config_vqgan import VQGAN_PRESETS, VqganConfig
from idm_fast.training.vqgan import VqganTrainer
from idm_fast.training.vqgan_loss import VqganLossWeights
from idm_fast.training.vqgan_settings import VqganSettings

torch.set_num_threads(1)
VQGAN_PRESETS["tiny-vq"] = from_dict(VqganConfig, {tiny!r})
values = {values!r}
values |= {{"data": Path(values["data"]), "out": Path({out!r}), "batch_size": 2}}
VqganTrainer(VqganSettings(**values | {{"loss": VqganLossWeights(**values["loss"])}})).run()
"""


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(settings: VqganSettings, tmp_path: Path) -> None:
    """But for the codes of step 0, which are latents of process 0: the means count the latents of both."""
    one = replace(settings, steps=3, revive_every=100, save_every=1)
    VqganTrainer(one).run()
    script, out = tmp_path / "train.py", tmp_path / "both"
    script.write_text(SCRIPT.format(tiny=TINY.to_dict(), values=one.to_dict(), out=str(out)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    first, second = (torch.load(folder / "state.pt", weights_only=True) for folder in (one.out, out))
    assert first["step"] == second["step"] == 3
    chosen = [float(state["codebook"]["counts"].sum()) for state in (first, second)]
    assert chosen[0] == pytest.approx(chosen[1], rel=1e-4)
    moved = (first["model"]["encoder.stem.weight"] - second["model"]["encoder.stem.weight"]).norm()
    assert moved <= 0.05 * first["model"]["encoder.stem.weight"].norm()
