"""The VQGAN: sizes of its presets, what its three methods promise, gradients, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from idm_fast.config import from_dict
from idm_fast.config_vqgan import VQGAN_PRESETS, VqganConfig, vqgan_preset
from idm_fast.errors import IdmFastError
from idm_fast.models.vqgan import Vqgan

TINY = VqganConfig(
    image_size=16, model_channels=8, channel_mult=(1, 2), num_res_blocks=(1, 2), attention_levels=(1,), norm_groups=4,
    unshuffle=2, z_channels=4, embed_channels=5, codebook_size=32,
)  # fmt: skip


def _network(config: VqganConfig = TINY, seed: int = 0) -> Vqgan:
    torch.manual_seed(seed)
    module = Vqgan(config).eval()
    torch.nn.init.normal_(module.codebook.weight)
    return module


def _pictures(n: int = 2, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("name", "count"), [("vq-f4", 55_322_782), ("vq-face-128", 2_512_760)])
def test_presets_have_their_size(name: str, count: int) -> None:
    """vq-f4: what LDM's own code makes of its published configuration."""
    with torch.device("meta"):
        module = Vqgan(vqgan_preset(name))
    assert sum(parameter.numel() for parameter in module.parameters()) == count
    assert module.config.factor == 4


def test_encode_does_not_quantise_and_decode_does() -> None:
    module, x = _network(), _pictures()
    with torch.no_grad():
        latent = module.encode(x)
        quantised, codes = module.quantize(latent)
        assert latent.shape == quantised.shape == (2, 5, 4, 6)
        assert codes.shape == (2, 4, 6)
        assert torch.equal(quantised, module.codebook.weight[codes].permute(0, 3, 1, 2))
        distance = torch.cdist(latent.permute(0, 2, 3, 1).reshape(-1, 5), module.codebook.weight)
        assert torch.equal(codes.flatten(), distance.argmin(dim=1))
        assert not torch.equal(latent, quantised)
        assert torch.equal(module.decode(latent), module.decode(quantised, quantize=False))
        assert not torch.equal(module.decode(latent), module.decode(latent, quantize=False))
        assert module(x).shape == x.shape


def test_gradients_pass_the_codes_straight_through() -> None:
    """The picture's gradient reaches latent and encoder as if the codes were not there; the codebook gets none."""
    module = _network()
    latent = torch.randn(1, 5, 4, 4, generator=torch.Generator().manual_seed(2), requires_grad=True)
    codes = module.quantize(latent)[0].detach().requires_grad_()
    module.decode(latent).square().sum().backward()
    module.decode(codes, quantize=False).square().sum().backward()
    assert latent.grad is not None
    assert codes.grad is not None
    assert torch.allclose(latent.grad, codes.grad, rtol=1e-3, atol=1e-5 * codes.grad.abs().max().item())
    assert module.codebook.weight.grad is None
    module(_pictures()).mean().backward()
    assert all(parameter.grad is not None for parameter in module.encoder.parameters())


def test_with_and_without_gradients_is_the_same_picture() -> None:
    module, x = _network(), _pictures()
    with torch.no_grad():
        plain = module.decode(module.encode(x), quantize=False)
    assert torch.allclose(module.decode(module.encode(x), quantize=False), plain, atol=1e-5)


def test_the_downsampling_pads_below_and_to_the_right() -> None:
    """A change in the last row and column reaches the last position, one in the first not more than its own window."""
    module = _network(replace(TINY, unshuffle=1, attention_levels=(), middle_attention=False))
    conv = module.encoder.down[1]
    x = torch.zeros(1, 8, 8, 8)
    x[0, :, 0, 0] = 1.0
    with torch.no_grad():
        apart = (conv(x) - conv(torch.zeros_like(x))).abs().sum(dim=1)[0]
        expected = conv.conv.weight[:, :, 0, 0].sum(dim=1)  # type: ignore[union-attr,index]
        assert torch.allclose((conv(x) - conv(torch.zeros_like(x)))[0, :, 0, 0], expected, atol=1e-6)
    assert apart[0, 0] > 0
    assert apart.count_nonzero() == 1


def test_a_config_survives_json_and_says_what_is_wrong() -> None:
    for config in (TINY, *VQGAN_PRESETS.values()):
        values = {key: list(v) if isinstance(v, tuple) else v for key, v in config.to_dict().items()}
        assert from_dict(VqganConfig, values) == config
    for changed, message in (
        ({"channel_mult": ()}, "channel_mult must be 1 to 8"),
        ({"num_res_blocks": (1,)}, "one entry in 1..64 per level of channel_mult = 2"),
        ({"attention_levels": (2,)}, r"attention_levels must lie in 0\.\.1, got \[2\]"),
        ({"image_size": 18}, "image_size must be a multiple of 4, got 18"),
        ({"codebook_size": 0}, "codebook_size must lie in 1"),
        ({"latent_scale": 0.0}, "latent_scale must be > 0"),
    ):
        with pytest.raises(IdmFastError, match=message):
            replace(TINY, **changed)  # type: ignore[arg-type]
    with pytest.raises(IdmFastError, match=r"preset must be one of .*vq-f4.*, got 'vq-f5'"):
        vqgan_preset("vq-f5")
    with pytest.raises(IdmFastError, match="multiple of norm_groups = 3, got 8"):
        Vqgan(replace(TINY, norm_groups=3))


def test_what_it_refuses() -> None:
    module = _network()
    for shape in ((1, 3, 18, 16), (1, 4, 16, 16), (0, 3, 16, 16), (3, 16, 16)):
        with pytest.raises(IdmFastError, match=r"x must be .* multiples of 4, got"):
            module.encode(torch.zeros(shape))
    for call in (module.decode, module.quantize):
        with pytest.raises(IdmFastError, match=r"latent must be \[N, 5, h, w\], got \(1, 3, 4, 4\)"):
            call(torch.zeros(1, 3, 4, 4))
