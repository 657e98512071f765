"""NIQE against closed forms and against the figures of another implementation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from idm_fast.errors import IdmFastError
from idm_fast.evaluation import niqe as module
from idm_fast.evaluation.baseline import gaussian_blur
from idm_fast.evaluation.niqe import FEATURES, Pristine, authors_model, block_features, blocks_of, fitted_model, niqe


def as_batch(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def authors() -> Pristine:
    try:
        return authors_model()
    except IdmFastError as error:
        pytest.skip(str(error))


# By mmagic 1.2.0 (``niqe_core`` with its own parameters, on luma of 0.2989 R + 0.5870 G + 0.1140 B, rounded), blocks of
# 96 px side by side; its half size and windows are float64 as ours, so only the order of sums differs. Pictures without
# large flat parts: there its rounding decides on which side of zero a pixel counts.
THEIRS = {"coffee": 4.066044333498614, "chelsea": 2.5720843690334316}


@pytest.mark.parametrize("name", THEIRS)
def test_equals_another_implementation_on_photographs(name: str, authors: Pristine) -> None:
    data = pytest.importorskip("skimage.data", reason="scikit-image brings the photographs")
    assert niqe(as_batch(getattr(data, name)()), authors).item() == pytest.approx(THEIRS[name], rel=1e-6)


def test_equals_another_implementation_on_noise(authors: Pristine) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (192, 288, 3))
    assert niqe(as_batch(noise), authors).item() == pytest.approx(29.726966830118098, rel=1e-6)


def test_fit_finds_the_parameters_of_known_distributions() -> None:
    rng = np.random.default_rng(0)
    count = 400_000
    normal, laplace = rng.normal(0, 3, count), rng.laplace(0, 2, count)
    # Each side keeps its own scale, in proportion to how often it comes: an asymmetric generalised Gaussian.
    skewed = np.abs(rng.normal(0, 1, count)) * np.where(rng.random(count) < 0.75, 3.0, -1.0)
    shape, left, right = module._fit(torch.from_numpy(np.stack([normal, laplace, skewed])))
    # Standard errors of these estimates at this count are below 1 %.
    assert shape.tolist() == pytest.approx([2, 1, 2], rel=0.02)
    root = math.sqrt(2)  # exp(-(x / b)^2) has the deviation b / sqrt 2
    assert left.tolist() == pytest.approx([3 * root, 2, root], rel=0.02)
    assert right.tolist() == pytest.approx([3 * root, 2, 3 * root], rel=0.02)


def test_distance_is_that_of_the_mean_in_the_common_covariance() -> None:
    mean = torch.zeros(FEATURES, dtype=torch.float64)
    pristine = Pristine(mean, 2 * torch.eye(FEATURES, dtype=torch.float64), "hand-made")
    features = torch.zeros(3, FEATURES, dtype=torch.float64)
    assert module.distance(features, pristine).item() == 0
    features[:, 0] = 5.0  # no covariance of their own: (0 + 2) / 2 = 1 is left, and the distance is the difference
    assert module.distance(features, pristine).item() == pytest.approx(5.0)
    features[:, 1] = torch.tensor([-1.0, 0.0, 1.0])  # deviates, but its mean does not
    assert module.distance(features, pristine).item() == pytest.approx(5.0)
    features[:, 0] = torch.tensor([3.0, 5.0, 7.0])  # variance 4 joins in: (4 + 2) / 2 = 3
    features[:, 1] = 0
    assert module.distance(features, pristine).item() == pytest.approx(5 / math.sqrt(3))
    features[2, 7] = math.nan  # a block without a value does not count
    assert module.distance(features[[2]], pristine).isnan()
    assert module.distance(features[[0, 2]], pristine).isnan()


def test_half_size_sees_the_picture_mirrored() -> None:
    ramp = torch.arange(16.0, dtype=torch.float64).repeat(16, 1)[None]
    half = module._halved(ramp)
    assert half.shape == (1, 8, 8)
    torch.testing.assert_close(half[0, :, 2:-2], (2 * torch.arange(8.0, dtype=torch.float64) + 0.5)[2:-2].repeat(8, 1))
    assert module._mirrored(4, 2).tolist() == [1, 0, 0, 1, 2, 3, 3, 2]


def textured(count: int, side: int, seed: int = 0) -> Tensor:
    """Noise with a falling spectrum, as natural pictures have."""
    noise = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return (sum(gaussian_blur(noise, s) * s for s in (0.4, 1.0, 2.0, 4.0)) * 0.2).clamp(-1, 1)


def test_a_model_of_ones_own_tells_sharp_from_blurred() -> None:
    model = fitted_model(textured(24, 128), "texture")
    assert model.name == "a model fitted to texture"
    fresh = textured(4, 128, seed=1)
    sharp, blurred = niqe(fresh, model), niqe(gaussian_blur(fresh, 1.0), model)
    assert (blurred > 2 * sharp).all()
    torch.testing.assert_close(niqe(fresh[2:], model), sharp[2:])  # a picture's own, whatever its batch
    with pytest.raises(IdmFastError, match="needs blocks >= 72, got 4"):
        fitted_model(textured(1, 128), "one picture")


def test_flat_pictures_have_no_value() -> None:
    model = Pristine(torch.zeros(FEATURES), torch.eye(FEATURES), "hand-made")
    assert niqe(torch.zeros(1, 3, 128, 128), model).isnan().all()


def test_the_authors_model_says_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "niqe.npz"
    monkeypatch.setattr(module, "package_file", lambda *arguments, **options: file)
    authors_model.cache_clear()
    try:
        for content in ({"mu_pris_param": np.zeros(36)}, {"mu_pris_param": np.zeros(3), "cov_pris_param": np.eye(3)}):
            np.savez(file, **content)
            with pytest.raises(IdmFastError, match=r"niqe\.npz: (must hold NIQE's parameters|mean must be \[36\])"):
                authors_model()
        np.savez(file, mu_pris_param=np.ones((1, 36)), cov_pris_param=np.eye(36))
        assert authors_model().name == "the authors' pristine model (mmagic==1.2.0)"
        assert authors_model().mean.shape == (36,)
    finally:
        authors_model.cache_clear()


def test_blocks_fit_the_picture() -> None:
    assert [blocks_of(size) for size in (64, 127, 128, 191, 192, 256, 512)] == [
        (32, 32), (32, 32), (96, 32), (96, 32), (96, 96), (96, 96), (96, 96),
    ]  # fmt: skip
    with pytest.raises(IdmFastError, match="at least 64 px wide and high, got 63"):
        blocks_of(63)
    for size, count in ((64, 4), (128, 4), (200, 4), (288, 9)):
        assert block_features(textured(1, size), *blocks_of(size)).shape == (1, count, FEATURES)
    with pytest.raises(ValueError, match="at least 96 x 96 px"):
        block_features(torch.zeros(1, 3, 64, 64), 96, 96)
    with pytest.raises(ValueError, match="must be even"):
        block_features(torch.zeros(1, 3, 64, 64), 32, 15)
