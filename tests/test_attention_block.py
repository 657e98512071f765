"""attention_block against the module of the U-Net that it stands for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from idm_fast.config import UNetConfig
from idm_fast.models.blocks import Attention
from idm_fast.ops import ContractError, attention_block, channel_stats, norm_coefficients, use_backend

CONFIG = UNetConfig(
    image_size=32, model_channels=16, channel_mult=(1,), num_res_blocks=(1,), norm_groups=4, num_head_channels=16
)  # fmt: skip


def module(order: str, channels: int = 48) -> Attention:
    torch.manual_seed(0)
    block = Attention(channels, replace(CONFIG, qkv_order=order))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return block.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("order", ["qkv_heads", "heads_qkv"])
@pytest.mark.parametrize("shape", [(2, 48, 6, 5), (1, 48, 1, 1)], ids=str)
def test_equals_the_module(shape: tuple[int, ...], order: str, backend: str | None) -> None:
    block = module(order)
    x = torch.randn(shape).add(-2.3).contiguous(memory_format=torch.channels_last)
    expected = block.double()(x.double())  # with gradients: plain torch
    block.float()
    with torch.no_grad(), use_backend(backend):
        norm = block.norm
        coefficients = norm_coefficients(channel_stats(x), norm.groups, norm.weight, norm.bias, eps=norm.eps)
        weights = (block.qkv.weight, block.qkv.bias, block.out.weight, block.out.bias)
        y = attention_block(x, coefficients, *weights, heads=block.heads, order=order)
        again, stats = attention_block(x, coefficients, *weights, heads=block.heads, order=order, with_stats=True)
    torch.testing.assert_close(y.double(), expected, rtol=2e-5, atol=2e-5)
    assert torch.equal(y, again)
    assert stats.counts.sum() == shape[2] * shape[3]
    mean = (stats.partials[:, :, 0] * stats.counts[:, None]).sum(1) / stats.counts.sum()
    torch.testing.assert_close(mean, y.mean(dim=(2, 3)), rtol=1e-5, atol=1e-5)


def test_refusals() -> None:
    x = torch.zeros(1, 8, 2, 2).contiguous(memory_format=torch.channels_last)
    qkv, out = torch.zeros(24, 8, 1, 1), torch.zeros(8, 8, 1, 1)
    with pytest.raises(ContractError, match="heads must be a divisor of C = divisor of 8, got 3"):
        attention_block(x, None, qkv, None, out, None, heads=3, order="qkv_heads")
    with pytest.raises(ContractError, match="order must be one of = qkv_heads, heads_qkv, got new"):
        attention_block(x, None, qkv, None, out, None, heads=2, order="new")  # type: ignore[arg-type]
    with pytest.raises(ContractError, match=r"qkv_weight must be \[3 C, C, 1, 1\] = \[24, 8, 1, 1\], got \[8, 8, 1, 1"):
        attention_block(x, None, out, None, out, None, heads=2, order="qkv_heads")
    with pytest.raises(ContractError, match=r"out_weight must be \[C, C, 1, 1\]"):
        attention_block(x, None, qkv, None, qkv, None, heads=2, order="qkv_heads")
    with pytest.raises(ContractError, match=r"x must be 4-dimensional"):
        attention_block(x[0], None, qkv, None, out, None, heads=2, order="qkv_heads")
