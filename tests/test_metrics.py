"""Metrics against hand-made cases and against scikit-image; the report against callables with known answers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from idm_fast.errors import IdmFastError
from idm_fast.evaluation.baseline import denoise_and_sharpen, estimate_noise, gaussian_blur
from idm_fast.evaluation.environment import environment
from idm_fast.evaluation.metrics import FaceMetrics, bootstrap_mean, frechet_distance, jackknife, psnr, ssim
from idm_fast.evaluation.report import Subject, evaluate
from idm_fast.evaluation.table import FD, HEADINGS
from idm_fast.training.degradation import DEGRADATION_VERSION


def images(count: int = 3, side: int = 48, seed: int = 0) -> Tensor:
    """Smooth random images with some texture, in [-1, 1]."""
    noise = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return (gaussian_blur(noise, 3.0) * 6 + 0.1 * noise).clamp(-1, 1)


def noisy(x: Tensor, deviation: float = 0.1, seed: int = 9) -> Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return (x + deviation * noise).clamp(-1, 1)


def test_psnr_of_known_differences() -> None:
    a = torch.zeros(2, 3, 4, 4)
    # 0.2 on the scale of two is 0.1 on the scale of one: 20 dB. A step of one of 255: 48.13 dB.
    b = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 2 / 255)])
    assert psnr(a, b).tolist() == pytest.approx([20.0, 20 * math.log10(255)], rel=1e-6)
    assert psnr(a, a).tolist() == [math.inf, math.inf]


def test_ssim_of_known_pairs() -> None:
    a = images()
    assert ssim(a, a).tolist() == pytest.approx([1, 1, 1])
    # Constant images have no variance: only the luminance term is left.
    low, high = torch.full((1, 3, 16, 16), -0.5), torch.full((1, 3, 16, 16), 0.5)
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert ssim(low, high).item() == pytest.approx(expected)


def test_psnr_and_ssim_equal_scikit_image() -> None:
    skimage = pytest.importorskip("skimage.metrics", reason="scikit-image judges PSNR and SSIM here")
    a, b = images(), noisy(images())
    for n in range(3):
        x, y = ((t[n].permute(1, 2, 0).double().numpy() + 1) / 2 for t in (a, b))
        assert psnr(a, b)[n].item() == pytest.approx(skimage.peak_signal_noise_ratio(x, y, data_range=1.0), rel=1e-9)
        expected = skimage.structural_similarity(
            x,
            y,
            channel_axis=2,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert ssim(a, b)[n].item() == pytest.approx(expected, rel=1e-9)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="psnr: a must match b"):
        psnr(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 5))
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"features_a must be \[N >= 2, D\]"):
        frechet_distance(np.zeros((1, 4)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="values must be"):
        bootstrap_mean([], 0)


def test_frechet_distance_of_one_dimension_is_the_closed_form() -> None:
    a, b = np.array([[0.0], [2.0]]), np.array([[3.0], [9.0]])
    # Means 1 and 6, sample deviations sqrt 2 and sqrt 18: 25 + (sqrt 18 - sqrt 2)^2 = 33.
    assert frechet_distance(a, b) == pytest.approx(33.0)


def test_frechet_distance_of_a_shift_a_scale_and_itself() -> None:
    a = np.random.default_rng(0).normal(size=(40, 6))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, a + 0.5) == pytest.approx(6 * 0.25)
    centred = a - a.mean(axis=0)
    # N(0, S) and N(0, 4 S) lie tr(S + 4 S - 2 * 2 S) = tr S apart.
    assert frechet_distance(centred, 2 * centred) == pytest.approx(np.cov(a.T).trace())


@pytest.mark.parametrize("count", [5, 50], ids=["fewer samples than features", "more samples than features"])
def test_frechet_distance_equals_the_root_by_eigenvalues(count: int) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(count, 8)), rng.normal(size=(count + 3, 8)) @ rng.normal(size=(8, 8)) + 1
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-5)


def test_bootstrap_covers_the_mean_at_the_rate_of_the_normal_law() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = bootstrap_mean(values, seed=1)
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert bootstrap_mean(values, seed=1) == found
    constant = bootstrap_mean([2.0, 2.0, 2.0], seed=0)
    assert (constant.mean, constant.low, constant.high) == (2, 2, 2)


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=400)
    found = jackknife(lambda pick: float(values[pick].mean()), 400, seed=0, groups=400)
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std(ddof=1) / 20)


def test_noise_estimate_sees_white_and_enlarged_noise() -> None:
    noise = 0.1 * torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    assert estimate_noise(noise).item() == pytest.approx(0.1, rel=0.05)
    enlarged = torch.nn.functional.interpolate(noise[..., :64, :64], scale_factor=2, mode="bicubic")
    assert 0.05 < estimate_noise(enlarged).item() < 0.15
    assert estimate_noise(torch.zeros(1, 3, 16, 16)).item() == 0


def test_baseline_denoises_and_keeps_a_clean_edge() -> None:
    clean = torch.full((1, 3, 64, 64), -0.5)
    clean[..., 32:] = 0.5
    y = noisy(clean, 0.1)
    restored = denoise_and_sharpen(y)
    assert restored.shape == y.shape
    assert psnr(restored, clean).item() > psnr(y, clean).item() + 3
    torch.testing.assert_close(denoise_and_sharpen(clean)[..., :16], clean[..., :16], atol=0.01, rtol=0)


@pytest.fixture(scope="module")
def face_metrics() -> FaceMetrics:
    try:
        return FaceMetrics()
    except IdmFastError as error:
        pytest.skip(str(error))


def degrade(x0: Tensor, level: str, seed: int) -> Tensor:
    return noisy(x0[None], {"mild": 0.05, "severe": 0.3}[level], seed)[0]


def test_report_of_known_restorers(face_metrics: FaceMetrics) -> None:
    clean = images(5, 64)
    queue: list[int] = []

    def oracle(y: Tensor, seeds: Tensor) -> Tensor:
        return clean[seeds - 7]

    subjects = [
        Subject("degraded input", lambda y, seeds: y),
        Subject("blur", lambda y, seeds: gaussian_blur(y, 1.0)),
        Subject("oracle", oracle, steps=4),
    ]
    report = evaluate(
        clean,
        subjects,
        face_metrics,
        levels=["mild", "severe"],
        reference="random images",
        degrade=degrade,
        seed=7,
        batch_size=2,
        progress=queue.append,
    )
    assert queue == [2, 4, 5]
    assert [(row.level, row.name, row.steps) for row in report.rows][3:] == [
        ("severe", "degraded input", None),
        ("severe", "blur", None),
        ("severe", "oracle", 4),
    ]
    rows = {(row.level, row.name): row.estimates for row in report.rows}
    best = rows["severe", "oracle"]
    assert best["psnr"].mean == math.inf
    assert best["ssim"].mean == pytest.approx(1)
    for key in ("lpips_alex", "lpips_vgg", "recognition", FD):
        assert best[key].mean == pytest.approx(0, abs=1e-4)
    for key in ("lpips_alex", "lpips_vgg", FD):
        assert rows["severe", "degraded input"][key].mean > rows["mild", "degraded input"][key].mean > 0
    noise_only = torch.stack([degrade(face, "severe", 7 + i) for i, face in enumerate(clean)])
    assert rows["severe", "degraded input"]["psnr"].mean == pytest.approx(psnr(noise_only, clean).mean().item())

    document = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert document["conditions"]["degradation_version"] == DEGRADATION_VERSION
    assert document["conditions"]["faces"] == 5
    assert document["conditions"]["crop_px"] == 64
    assert document["rows"][5]["metrics"]["psnr"]["mean"] is None  # infinity has no JSON
    table = report.as_markdown()
    assert "random images, N = 5, 64 px" in table
    assert table.count("\n| ") == 1 + len(report.rows)
    assert all(heading in table for heading in HEADINGS.values())


def test_report_refuses_a_broken_restorer_and_no_faces(face_metrics: FaceMetrics) -> None:
    broken = Subject("broken", lambda y, seeds: y * math.nan)
    with pytest.raises(ValueError, match="broken: output must be finite"):
        evaluate(images(2, 64), [broken], face_metrics, levels=["mild"], reference="-", degrade=degrade)
    with pytest.raises(ValueError, match="at least one"):
        evaluate([], [broken], face_metrics, levels=["mild"], reference="-", degrade=degrade)


def test_environment_names_the_machine() -> None:
    found = environment()
    assert found["versions"]["torch"] == torch.__version__
    assert found["device"]
    assert found["commit"]
