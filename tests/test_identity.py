"""Identity guidance: its gradient against finite differences, its mask, and what is left of it when it breaks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from idm_fast.config_vqgan import VqganConfig
from idm_fast.diffusion import Guidance, Schedule, build_table, initial_noise, sample
from idm_fast.errors import IdmFastError
from idm_fast.identity import IdentityGradient, unit_rms
from idm_fast.models.latent_mask import LatentMask
from idm_fast.models.light_decoder import LightDecoder
from idm_fast.models.vqgan import Vqgan

TINY = VqganConfig(
    image_size=32, model_channels=8, channel_mult=(1, 1), num_res_blocks=(1, 1), middle_attention=False, norm_groups=4,
    codebook_size=16, unshuffle=2, z_channels=4, embed_channels=4, latent_scale=1.7, name="tiny-vq",
)  # fmt: skip
SHAPE = (2, 4, 8, 8)


class Embedding(nn.Module):
    """Smooth, of any size and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 5, stride=4)

    def embed_aligned(self, x: Tensor) -> Tensor:
        embedding: Tensor = torch.tanh(2 * self.conv(x)).mean(dim=(2, 3)) + 0.1
        return embedding


@pytest.fixture
def parts() -> tuple[Vqgan, Embedding, Tensor, Tensor]:
    """(autoencoder, embedding, targets, latents)."""
    torch.manual_seed(0)
    vqgan = Vqgan(TINY).eval().requires_grad_(False)
    return vqgan, Embedding().requires_grad_(False), torch.randn(2, 6), torch.randn(SHAPE)


def test_it_is_the_gradient_by_finite_differences(parts: Any) -> None:
    """Central differences in float64; then scaled to the root mean square 1, of each image by itself."""
    vqgan, embedding, target, z = (part.double() for part in parts)
    found = IdentityGradient(vqgan, embedding, target)
    gradient = found(z)
    assert gradient.dtype == torch.float64
    torch.testing.assert_close(gradient.square().mean((1, 2, 3)), torch.ones(2).double())
    rng, h = torch.Generator().manual_seed(1), 1e-5
    along = [torch.randn(SHAPE, generator=rng).double() for _ in range(2)] + [gradient]
    with torch.no_grad():
        slopes = torch.stack([(found.distance(z + h * d) - found.distance(z - h * d)) / (2 * h) for d in along])
    products = torch.stack([(gradient * d).sum((1, 2, 3)) for d in along])
    rms = slopes[-1] / products[-1]  # of the gradient before it was scaled
    assert (rms > 0).all()
    torch.testing.assert_close(slopes, products * rms, rtol=1e-6, atol=1e-12)


def test_steps_against_it_bring_the_picture_nearer(parts: Any) -> None:
    found, z = IdentityGradient(*parts[:3]), parts[3]
    before = found.distance(z)
    for _ in range(5):
        z = z - 0.05 * found(z)
    assert (found.distance(z) < before - 1e-3).all()


def test_a_face_is_not_carried_past_its_target(parts: Any) -> None:
    """Near it steps of one length lead away; those that know their scale end where the distance would. Far from it
    they are the same steps; at it there is none."""
    vqgan, embedding, far, z = (part.double() for part in parts)
    moved = 0.01 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    target = embedding.embed_aligned(vqgan.decode((z + moved) / TINY.latent_scale, quantize=False))
    fixed, held = (IdentityGradient(vqgan, embedding, target, scale=scale) for scale in (None, 0.3))
    before = held.distance(z)
    assert (fixed.distance(z - 0.3 * fixed(z)) > 2 * before).all()
    assert (held.distance(z - 0.3 * held(z)) < 0.5 * before).all()
    torch.testing.assert_close(
        IdentityGradient(vqgan, embedding, far, scale=1e-4)(z), IdentityGradient(vqgan, embedding, far)(z)
    )
    there = embedding.embed_aligned(vqgan.decode(z / TINY.latent_scale, quantize=False))
    assert IdentityGradient(vqgan, embedding, there, scale=0.3)(z).abs().max() < 1e-4


def test_repeated_steps_are_walked_one_by_one(parts: Any) -> None:
    """Each along the gradient where it begins, and so nearer the target than one step as long as all of them."""
    vqgan, embedding, target, z = (part.double() for part in parts)
    mask = torch.rand(SHAPE[1:], generator=torch.Generator().manual_seed(2))
    one, three = (IdentityGradient(vqgan, embedding, target, mask, scale=0.2, repeats=k) for k in (1, 3))
    by_hand = z
    for _ in range(3):
        by_hand = by_hand - 0.2 * one(by_hand)
    got = three(z)
    torch.testing.assert_close(z - 0.2 * got, by_hand)
    assert (one.distance(by_hand) < one.distance(z - 0.6 * one(z))).all()


def test_what_the_mask_leaves_out_stays(parts: Any) -> None:
    vqgan, embedding, target, z = parts
    mask = LatentMask(*SHAPE[1:])
    with torch.no_grad():
        mask.logits[1], mask.logits[:, :3] = -200, -200
        whole = IdentityGradient(vqgan, embedding, target)(z)
        masked = IdentityGradient(vqgan, embedding, target, mask())(z)
    assert mask().min() == 0
    assert (masked[:, 1] == 0).all()
    assert (masked[:, :, :3] == 0).all()
    torch.testing.assert_close(masked[:, 0, 3:], whole[:, 0, 3:] / 2)


def test_it_works_under_inference_mode(parts: Any) -> None:
    vqgan, embedding, target, z = parts
    expected = IdentityGradient(vqgan, embedding, target)(z)
    with torch.inference_mode():
        got = IdentityGradient(vqgan, embedding, target.clone(), torch.ones(SHAPE[1:]))(z.clone())
    assert torch.equal(got, expected)
    assert not got.requires_grad
    assert not z.requires_grad


def test_a_reduced_one_moves_whole_cells(parts: Any) -> None:
    vqgan, embedding, target, z = parts
    got = IdentityGradient(vqgan, embedding, target, factor=2)(z)
    cells = got[:, :, ::2, ::2]
    assert torch.equal(got, cells.repeat_interleave(2, 2).repeat_interleave(2, 3))
    small = IdentityGradient(vqgan, embedding, target)(nn.functional.avg_pool2d(z, 2))
    torch.testing.assert_close(cells, small)


def test_what_is_not_finite_never_reaches_the_picture(parts: Any) -> None:
    """A whole guided walk: the image whose target is broken goes as if unguided, and each time is counted."""
    vqgan, embedding, target, z = parts
    seeds, table = torch.tensor([1, 2]), build_table(Schedule.continuous_cosine(), "x0", "ddim", 3, clamp=None)

    def walk(guidance: Guidance | None) -> Tensor:
        with torch.inference_mode():
            return sample(lambda x, t: 0.5 * x + z, table, initial_noise(seeds, SHAPE, "cpu"), seeds, guidance=guidance)

    broken = target.clone()
    broken[1, 3] = torch.nan
    guidance = Guidance(IdentityGradient(vqgan, embedding, broken), 0.1)
    x, free, guided = walk(guidance), walk(None), walk(Guidance(IdentityGradient(vqgan, embedding, target), 0.1))
    assert guidance.skipped == 3
    assert torch.equal(x[1], free[1])
    torch.testing.assert_close(x[0], guided[0])
    assert (x[0] - free[0]).abs().max() > 0.01


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e30])
def test_the_scale_of_a_gradient_does_not_matter(size: float) -> None:
    g = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    scaled = unit_rms(g * size)
    torch.testing.assert_close(scaled, g / g.square().mean((1, 2, 3), keepdim=True).sqrt(), rtol=1e-5, atol=1e-6)
    assert torch.equal(unit_rms(torch.zeros(1, 2, 2, 2)), torch.zeros(1, 2, 2, 2))


def test_the_light_decoder_is_the_best_linear_one(parts: Any) -> None:
    """Of a decoder that is one: exactly it; of the real one: no other choice of its weights comes nearer."""
    vqgan, embedding, target, z = parts
    faces = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    linear = LightDecoder(4, 3, 4)
    with torch.no_grad():
        exact = LightDecoder.fit(_Decoding(vqgan, linear), faces)  # type: ignore[arg-type]
        torch.testing.assert_close(exact(z), linear(z), rtol=1e-3, atol=1e-3)
        light, latent = LightDecoder.fit(vqgan, faces), vqgan.encode(faces)
        decoded = vqgan.decode(latent, quantize=False)
        best = (light(latent) - decoded).square().mean()
        for parameter in light.parameters():
            for sign in (0.02, -0.02):
                moved = sign * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
                parameter += moved
                assert (light(latent) - decoded).square().mean() > best
                parameter -= moved
    gradient = IdentityGradient(vqgan, embedding, target, light=light)(z)
    torch.testing.assert_close(gradient.square().mean((1, 2, 3)), torch.ones(2))


class _Decoding(nn.Module):
    """An autoencoder that decodes by ``decoder``."""

    def __init__(self, vqgan: Vqgan, decoder: nn.Module) -> None:
        super().__init__()
        self.config, self.encode, self.decoder = vqgan.config, vqgan.encode, decoder

    def decode(self, latent: Tensor, *, quantize: bool) -> Tensor:
        assert not quantize
        decoded: Tensor = self.decoder(latent)
        return decoded


def test_what_does_not_fit_is_named(parts: Any) -> None:
    vqgan, embedding, target, z = parts

    def refused(message: str, latent: Tensor = z, **settings: Any) -> None:
        given = {"target": target} | settings
        with pytest.raises(IdmFastError, match=re.escape(f"identity guidance: {message}")):
            IdentityGradient(vqgan, embedding, **given)(latent)

    refused("factor must be >= 1, got 0", factor=0)
    refused("repeats must be >= 1, and 1 without a scale, got 0", repeats=0, scale=1.0)
    refused("repeats must be >= 1, and 1 without a scale, got 2", repeats=2)
    refused("target must be [N, E], got [6]", target=target[0])
    refused("x0_hat must be [2, 4, h, w] = one latent a target, got [1, 4, 8, 8]", z[:1])
    refused("x0_hat must be [2, 4, h, w] = one latent a target, got [2, 3, 8, 8]", z[:, :3])
    refused("x0_hat must be of the mask's shape = [4, 16, 16], got [4, 8, 8]", mask=torch.ones(4, 16, 16))
    refused("factor must divide the latent's 8 x 8, got 3", factor=3)
