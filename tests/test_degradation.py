"""The test degradation never changes silently, and both degradations are pure functions of their seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from idm_fast.errors import IdmFastError
from idm_fast.training.degradation import DEGRADATION_VERSION, LEVELS, degrade, degrade_level, degrade_photo

# Mean, deviation and nine pixels of the red plane of `_picture(128)` at seed 7, by level. Another CPU may round a
# pixel another way before the JPEG, hence the tolerances. When these move, DEGRADATION_VERSION must rise with them.
GOLDEN_VERSION = 1
GOLDEN: dict[str, tuple[float, float, list[float]]] = {
    "mild": (0.0412, 0.3253, [-0.512, 0.021, 0.124, -0.404, 0.417, 0.2, -0.262, -0.252, 0.28]),
    "medium": (0.0420, 0.3174, [-0.499, 0.045, 0.153, -0.428, 0.431, 0.216, -0.298, -0.183, 0.261]),
    "severe": (0.0349, 0.3036, [-0.405, -0.014, 0.219, -0.406, 0.486, 0.114, -0.372, -0.107, 0.249]),
}


def _picture(size: int) -> Tensor:
    """A picture with smooth shading, edges and fine texture: [3, size, size] in [-1, 1]."""
    axis = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    shade = torch.stack([u, v, 1 - u]) - 0.5
    disk = ((u - 0.5) ** 2 + (v - 0.45) ** 2 < 0.09).double()
    texture = torch.sin(40 * u) * torch.sin(56 * v)
    return (0.8 * shade + 0.5 * disk + 0.2 * texture - 0.1).clamp(-1, 1).float()


def _psnr(a: Tensor, b: Tensor) -> float:
    return 10 * float(torch.log10(4 / (a - b).square().mean()))


def _sample(y: Tensor) -> list[float]:
    return [round(float(value), 3) for value in y[0, 16::48, 16::48].flatten()]


def test_levels_are_a_pure_function_of_picture_and_seed() -> None:
    x0 = _picture(64)
    kept = x0.clone()
    for level in LEVELS:
        y = degrade_level(x0, level, 3)
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002 (global states must not matter)
        assert torch.equal(degrade_level(x0, level, 3), y)
        assert not torch.equal(degrade_level(x0, level, 4), y)
    assert torch.equal(x0, kept)


def test_training_draws_are_a_pure_function_of_the_generator() -> None:
    x0 = _picture(64)
    ys = [degrade(x0, np.random.default_rng((5, i))) for i in range(12)]
    for i, y in enumerate(ys):
        assert torch.equal(degrade(x0, np.random.default_rng((5, i))), y)
    assert len({y.numpy().tobytes() for y in ys}) == len(ys)


def test_the_number_of_threads_does_not_matter() -> None:
    x0, threads = _picture(128), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append([degrade_level(x0, level, 1) for level in LEVELS])
            found[-1] += [degrade(x0, np.random.default_rng(i)) for i in range(4)]
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("level", LEVELS)
def test_the_test_degradation_has_not_changed(level: str) -> None:
    assert DEGRADATION_VERSION == GOLDEN_VERSION, "measure the new golden values"
    y = degrade_level(_picture(128), level, 7)
    mean, deviation, pixels = GOLDEN[level]
    assert float(y.mean()) == pytest.approx(mean, abs=1e-3)
    assert float(y.std()) == pytest.approx(deviation, abs=1e-3)
    assert _sample(y) == pytest.approx(pixels, abs=0.03)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_stronger_levels_are_worse(size: int) -> None:
    """At every working size, and about alike: blur and scale follow the size."""
    x0 = _picture(size)
    means = {level: np.mean([_psnr(degrade_level(x0, level, seed), x0) for seed in range(6)]) for level in LEVELS}
    assert means["mild"] > means["medium"] + 1 > means["severe"] + 2


def test_shape_type_and_range() -> None:
    noise = torch.rand(3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for seed in range(20):
        for y in (degrade_level(noise, "severe", seed), degrade(noise, np.random.default_rng(seed))):
            assert y.shape == noise.shape
            assert y.dtype == torch.float32
            assert y.is_contiguous()
            assert -1 <= float(y.min()) <= float(y.max()) <= 1
    assert degrade_level(noise.double(), "mild", 0).dtype == torch.float32
    assert torch.equal(degrade_level(noise.transpose(1, 2), "mild", 0), degrade_level(noise.mT.contiguous(), "mild", 0))


def test_the_smallest_picture() -> None:
    for seed in range(20):
        assert degrade(torch.zeros(3, 8, 8), np.random.default_rng(seed)).shape == (3, 8, 8)


def test_a_photograph_of_one_face_is_its_crop() -> None:
    x0 = _picture(96)
    assert torch.equal(degrade_photo(x0, "medium", 2, 96), degrade_level(x0, "medium", 2))
    wide = torch.cat([x0, x0], dim=2)
    y = degrade_photo(wide, "medium", 2, 96)
    assert y.shape == wide.shape
    assert _psnr(degrade_photo(wide, "medium", 2, 48), wide) > _psnr(y, wide)  # smaller faces bear less


@pytest.mark.parametrize(
    ("x0", "got"),
    [
        (torch.zeros(3, 8, 9), r"\[3, 8, 9\]"),
        (torch.zeros(1, 3, 8, 8), r"\[1, 3, 8, 8\]"),
        (torch.zeros(4, 8, 8), r"\[4, 8, 8\]"),
        (torch.zeros(3, 7, 7), r"\[3, 7, 7\]"),
        (torch.zeros(3, 0, 0), r"\[3, 0, 0\]"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "torch.uint8"),
    ],
)
def test_wrong_shapes_are_refused(x0: Tensor, got: str) -> None:
    message = rf"degrade: x0 must be a float \[3, S, S\] of at least 8 pixels, got .*{got}"
    with pytest.raises(IdmFastError, match=message):
        degrade_level(x0, "mild", 0)
    with pytest.raises(IdmFastError, match=message):
        degrade(x0, np.random.default_rng(2))


def test_other_bad_arguments_are_refused() -> None:
    x0 = torch.zeros(3, 16, 16)
    for call in (lambda: degrade_level(x0, "hard", 0), lambda: degrade_photo(x0, "hard", 0, 8)):
        with pytest.raises(IdmFastError, match=r"level must be one of \['medium', 'mild', 'severe'\], got 'hard'"):
            call()
    with pytest.raises(IdmFastError, match="face_px must be > 0, got 0"):
        degrade_photo(x0, "mild", 0, 0)
    with pytest.raises(IdmFastError, match="x0 must be finite"):
        degrade_level(x0.log(), "mild", 0)
