"""The one U-Net: sizes of the presets, both ways through it, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from idm_fast.config import PRESETS, UNetConfig, preset
from idm_fast.errors import IdmFastError
from idm_fast.models.blocks import Attention, NormSiLU, ResBlock, TimeEmbedding
from idm_fast.models.group_norm_grad import group_norm
from idm_fast.models.unet import UNet

TINY = UNetConfig(
    image_size=16, model_channels=8, channel_mult=(1, 2), num_res_blocks=(1, 1), cond_channels=3, norm_groups=4,
    num_head_channels=8,
)  # fmt: skip


def _random(config: UNetConfig) -> UNet:
    """A network whose every weight counts (fresh ones have zeros where blocks and network end)."""
    torch.manual_seed(0)
    unet = UNet(config).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.xavier_normal_(parameter)
            elif "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.1)
    return unet


def _inputs(config: UNetConfig, batch: int = 2, side: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    side = side or max(16, config.size_multiple)
    x = torch.randn(batch, config.in_channels, side, side, generator=generator)
    cond = torch.rand(batch, config.cond_channels, side, side, generator=generator) * 2 - 1
    return x, torch.linspace(10, 990, batch), cond if config.cond_channels else None


def _close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    scale = b.abs().max().item()
    assert scale > 0
    assert (a - b).abs().max().item() <= tolerance * scale


def _quarter(name: str) -> UNetConfig:
    """The preset with a quarter of its channels everywhere, so that it keeps its layout and runs at once."""
    c = preset(name).unet
    return replace(
        c, model_channels=c.model_channels // 4, norm_groups=c.norm_groups // 4,
        num_head_channels=c.num_head_channels // 4, embed_channels=c.embed_channels // 4,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "millions", "tensors"),
    [
        ("sr3-128", 97.81, 362),  # the public checkpoints' own counts
        ("sr3-512", 155.33, 229),
        ("difface-512", 159.79, 630),
        ("gd-256", 138.29, 566),
        ("gen-64", 3.45, 132),
        ("idm-64", 7.58, 172),
        ("idm-128", 7.58, 172),
        ("idm-256", 7.64, 172),
    ],
)
def test_parameter_counts(name: str, millions: float, tensors: int) -> None:
    with torch.device("meta"):
        state = UNet(preset(name).unet).state_dict()
    assert len(state) == tensors
    assert sum(tensor.numel() for tensor in state.values()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("name", ["idm-128", "idm-256"])
def test_our_networks_fit_their_file(name: str) -> None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in UNet(preset(name).unet).parameters())
    assert parameters * 2 < 16e6 - 100_000  # fp16, and room for the header


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_both_ways_through_a_network_agree(name: str) -> None:
    """With gradients plain torch runs, without them the fused operations do."""
    config = _quarter(name)
    unet, (x, t, cond) = _random(config), _inputs(config)
    with torch.enable_grad():
        plain = unet(x, t, cond)
    assert plain.requires_grad
    with torch.no_grad():
        fused = unet(x, t, cond)
    assert fused.shape == (2, config.out_channels, *x.shape[2:])
    _close(fused, plain.detach())


@pytest.mark.parametrize("name", ["idm-128", "gd-256"])
def test_gradients_of_both_group_norms_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _quarter(name)
    unet, (x, t, cond) = _random(config), _inputs(config)

    def gradients() -> list[Tensor]:
        unet.zero_grad()
        unet(x, t, cond).square().mean().backward()
        return [p.grad for p in unet.parameters() if p.grad is not None]

    ours = gradients()
    monkeypatch.setattr("idm_fast.models.blocks.group_norm", F.group_norm)
    for mine, theirs in zip(ours, gradients(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item() + 1e-9)


@pytest.mark.parametrize("grad", [False, True])
def test_the_memory_format_of_the_input_does_not_matter(grad: bool) -> None:
    unet, (x, t, cond) = _random(TINY), _inputs(TINY)
    assert cond is not None
    with torch.set_grad_enabled(grad):
        expected = unet(x, t, cond)
        last = unet(
            x.contiguous(memory_format=torch.channels_last), t, cond.contiguous(memory_format=torch.channels_last)
        )
        strided = unet(torch.cat([x, x], dim=3)[..., : x.shape[3]], t, cond)
    _close(last.detach(), expected.detach())
    _close(strided.detach(), expected.detach())


@pytest.mark.parametrize("name", ["idm-128", "sr3-512", "gd-256"])
def test_a_batch_equals_its_singles(name: str) -> None:
    config = _quarter(name)
    unet, (x, t, cond) = _random(config), _inputs(config, batch=3)
    with torch.no_grad():
        batch = unet(x, t, cond)
        for i in range(3):
            _close(unet(x[i : i + 1], t[i : i + 1], None if cond is None else cond[i : i + 1])[0], batch[i])


@pytest.mark.parametrize(("name", "side"), [("idm-128", 128), ("idm-256", 256)])
def test_our_networks_at_their_own_size(name: str, side: int) -> None:
    """Whole size: the unshuffled stem leaves 64 x 64 positions at both, and a fresh network changes nothing."""
    config = preset(name).unet
    torch.manual_seed(0)
    unet = UNet(config).eval()
    x, t, cond = _inputs(config, batch=1, side=side)
    assert cond is not None
    seen: list[torch.Size] = []
    unet.stem.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with torch.no_grad():
        assert torch.equal(unet(x, t, cond), cond)
    assert seen == [(1, 64, 64, 64)]


def test_a_picture_need_not_be_square_nor_of_the_trained_size() -> None:
    unet = _random(TINY)
    with torch.no_grad():
        out = unet(torch.randn(1, 3, 24, 10), torch.ones(1), torch.randn(1, 3, 24, 10))
    assert out.shape == (1, 3, 24, 10)


def test_the_order_of_the_inputs_and_of_qkv_matters() -> None:
    x, t, cond = _inputs(TINY)
    with torch.no_grad():
        expected = _random(TINY)(x, t, cond)
        for change in ({"concat_order": "cond_x"}, {"qkv_order": "heads_qkv"}, {"embedding_order": "sin_cos"}):
            config = replace(TINY, **change)  # type: ignore[arg-type]
            other = _random(config)(x, t, cond)
            assert (other - expected).abs().max() > 1e-3, change


def test_labels() -> None:
    unet, (x, t, cond) = _random(replace(TINY, num_classes=5)), _inputs(TINY)
    with torch.no_grad():
        first, second = unet(x, t, cond, torch.tensor([0, 1])), unet(x, t, cond, torch.tensor([0, 4]))
    assert torch.equal(first[0], second[0])
    assert not torch.allclose(first[1], second[1])


def test_a_residual_network_adds_to_the_exact_condition() -> None:
    """In bf16 too: the condition comes in float32 and is not rounded on its way out."""
    config = replace(TINY, residual=True)
    unet = UNet(config).to(torch.bfloat16).eval()
    x, t, cond = _inputs(config)
    with torch.no_grad():
        assert torch.equal(unet(x.bfloat16(), t, cond), cond)


def test_bf16_stays_near_fp32() -> None:
    unet, (x, t, cond) = _random(_quarter("idm-128")), _inputs(_quarter("idm-128"))
    with torch.no_grad():
        exact = unet(x, t, cond)
        rounded = unet.to(torch.bfloat16)(x.bfloat16(), t, cond)
    _close(rounded.float(), exact, 0.05)


def test_the_time_embedding_does_not_round_the_time() -> None:
    """Noise levels near 1 differ in digits that bf16 has not got."""
    torch.manual_seed(0)
    embedding = TimeEmbedding(32, 64, "sin_cos")
    levels = torch.tensor([0.9990, 0.9995])
    with torch.no_grad():
        apart = embedding(levels).diff(dim=0)
        rounded = embedding.to(torch.bfloat16)(levels).diff(dim=0)
    assert rounded.dtype == torch.float32
    _close(rounded, apart, 0.1)


@pytest.mark.parametrize("shape", [(2, 8, 3, 5), (1, 6, 1, 1), (3, 4, 4, 2)])
@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
def test_group_norm_gradients(shape: tuple[int, ...], last: bool) -> None:
    torch.manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format
    x = (torch.randn(shape, dtype=torch.float64) + 0.7).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(shape[1], dtype=torch.float64, requires_grad=True)
    assert torch.equal(group_norm(x, 2, weight, bias, 1e-5), F.group_norm(x, 2, weight, bias, 1e-5))
    assert torch.autograd.gradcheck(lambda *args: group_norm(args[0], 2, args[1], args[2], 1e-5), (x, weight, bias))


def test_group_norm_gradients_in_bf16_stay_near_exact_ones() -> None:
    torch.manual_seed(0)
    x64 = (torch.randn(2, 16, 16, 16, dtype=torch.float64) + 2).bfloat16().double().requires_grad_()
    weight, upstream = torch.rand(16, dtype=torch.float64) + 0.5, torch.randn(2, 16, 16, 16).bfloat16().double()
    F.group_norm(x64, 4, weight).backward(upstream)
    x16 = x64.detach().bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    weight32, bias32 = weight.float().requires_grad_(), torch.zeros(16, requires_grad=True)
    group_norm(x16, 4, weight32, bias32, 1e-5).backward(upstream.bfloat16())
    assert x16.grad is not None
    assert x16.grad.dtype == torch.bfloat16
    assert x64.grad is not None
    _close(x16.grad.double(), x64.grad, 0.01)
    assert weight32.grad is not None
    assert weight32.grad.dtype == torch.float32


def test_group_norm_is_differentiable_once() -> None:
    x = torch.randn(1, 4, 2, 2, requires_grad=True)
    out = group_norm(x, 2, torch.ones(4, requires_grad=True), torch.zeros(4, requires_grad=True), 1e-5)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("x", "t", "cond", "message"),
    [
        ((2, 3, 15, 16), (2,), (2, 3, 15, 16), r"x must be \[N, 3, H, W\] with H and W multiples of 2, got \(2, 3, 15"),
        ((2, 3, 16, 17), (2,), (2, 3, 16, 17), "multiples of 2"),
        ((2, 4, 16, 16), (2,), (2, 3, 16, 16), r"x must be \[N, 3, H, W\]"),
        ((3, 16, 16), (3,), None, "x must be"),
        ((0, 3, 16, 16), (0,), (0, 3, 16, 16), "x must be"),
        ((2, 3, 16, 16), (1,), (2, 3, 16, 16), r"t must be \[N\] = \(2,\), got \(1,\)"),
        ((2, 3, 16, 16), (2, 2), (2, 3, 16, 16), r"t must be \[N\] = \(2,\), got \(2, 2\)"),
        ((2, 3, 16, 16), (2,), None, r"cond must be \(2, 3, 16, 16\), got None"),
        ((2, 3, 16, 16), (2,), (1, 3, 16, 16), r"cond must be \(2, 3, 16, 16\), got \(1, 3, 16, 16\)"),
    ],
)
def test_wrong_shapes_are_refused(
    x: tuple[int, ...], t: tuple[int, ...], cond: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(IdmFastError, match=message):
        UNet(TINY)(torch.zeros(x), torch.zeros(t), None if cond is None else torch.zeros(cond))


def test_conditions_and_labels_nobody_asked_for_are_refused() -> None:
    x, t, cond = _inputs(TINY)
    with pytest.raises(IdmFastError, match="cond must be None, got"):
        UNet(replace(TINY, cond_channels=0))(x, t, cond)
    with pytest.raises(IdmFastError, match="labels must be given exactly when num_classes = 0 is above 0"):
        UNet(TINY)(x, t, cond, torch.zeros(2, dtype=torch.int64))
    classes = UNet(replace(TINY, num_classes=3))
    with pytest.raises(IdmFastError, match="labels must be given"):
        classes(x, t, cond)
    with pytest.raises(IdmFastError, match=r"labels must be \[N\] = \(2,\), got \(1,\)"):
        classes(x, t, cond, torch.zeros(1, dtype=torch.int64))


def test_channels_that_do_not_divide_are_refused() -> None:
    with pytest.raises(IdmFastError, match="multiple of norm_groups = 5, got 8"):
        NormSiLU(8, 5, 1e-5)
    with pytest.raises(IdmFastError, match="multiple of num_head_channels = 8, got 12"):
        Attention(12, TINY)
    with pytest.raises(IdmFastError, match="multiple of num_heads = 3, got 16"):
        Attention(16, replace(TINY, num_head_channels=0, num_heads=3))


def test_a_fresh_block_is_its_skip() -> None:
    block = ResBlock(8, 8, TINY)
    x = torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        assert torch.equal(block(x.contiguous(memory_format=torch.channels_last), torch.randn(1, 32)), x)
