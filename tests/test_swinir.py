"""SwinIR against the same formulas written from coordinates, in float64: no windows are cut and nothing is rolled."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from idm_fast import checkpoints
from idm_fast.errors import IdmFastError
from idm_fast.models.swinir import SwinIR, SwinIRConfig

TINY = SwinIRConfig(embed_dim=12, depths=(2, 3), heads=(2, 3), window=4, hidden=20, scale=2, features=8)
State = dict[str, Tensor]


def network(config: SwinIRConfig = TINY, seed: int = 0) -> SwinIR:
    torch.manual_seed(seed)
    module = SwinIR(config).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape) * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2))
    return module


def attention(w: State, at: str, x: Tensor, heads: int, side: int, shift: int) -> Tensor:
    """x [h, w, C]: a position attends to those of its own cell of a grid that is moved by ``shift``."""
    height, width, c = x.shape
    places = [(i, j) for i in range(height) for j in range(width)]
    q, k, v = F.linear(x.reshape(-1, c), w[f"{at}.qkv.weight"], w[f"{at}.qkv.bias"]).split(c, dim=1)
    out = torch.zeros(len(places), c, dtype=x.dtype)
    for p, (i, j) in enumerate(places):
        cell = ((i - shift) // side, (j - shift) // side)
        near = [n for n, (a, b) in enumerate(places) if ((a - shift) // side, (b - shift) // side) == cell]
        rows = [(i - places[n][0] + side - 1) * (2 * side - 1) + j - places[n][1] + side - 1 for n in near]
        for head in range(heads):
            part = slice(head * c // heads, (head + 1) * c // heads)
            logits = k[near, part] @ q[p, part] / math.sqrt(c / heads)
            logits = logits + w[f"{at}.relative_position_bias_table"][rows, head]
            out[p, part] = logits.softmax(0) @ v[near, part]
    return F.linear(out, w[f"{at}.proj.weight"], w[f"{at}.proj.bias"]).view(height, width, c)


def norm(w: State, at: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{at}.weight"] + w[f"{at}.bias"]


def conv(w: State, at: str, x: Tensor) -> Tensor:
    return F.conv2d(x, w[f"{at}.weight"], w[f"{at}.bias"], padding=1)


def leaky(x: Tensor, slope: float) -> Tensor:
    return torch.where(x > 0, x, slope * x)


def written_out(w: State, c: SwinIRConfig, image: Tensor) -> Tensor:
    """One image [3, H, W]."""
    mean = torch.tensor([0.4488, 0.4371, 0.4040], dtype=image.dtype)[:, None, None]
    part = image - mean
    small = torch.stack([part[:, i :: c.scale, j :: c.scale] for i in range(c.scale) for j in range(c.scale)], 1)
    first = conv(w, "conv_first.1", small.flatten(0, 1)[None])
    x = norm(w, "patch_embed.norm", first[0].permute(1, 2, 0))
    for g, (depth, heads) in enumerate(zip(c.depths, c.heads, strict=True)):
        h = x
        for i in range(depth):
            at = f"layers.{g}.residual_group.blocks.{i}"
            shift = c.window // 2 if i % 2 else 0
            h = h + attention(w, f"{at}.attn", norm(w, f"{at}.norm1", h), heads, c.window, shift)
            inner = F.linear(norm(w, f"{at}.norm2", h), w[f"{at}.mlp.fc1.weight"], w[f"{at}.mlp.fc1.bias"])
            inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
            h = h + F.linear(inner, w[f"{at}.mlp.fc2.weight"], w[f"{at}.mlp.fc2.bias"])
        x = x + conv(w, f"layers.{g}.conv", h.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    deep = norm(w, "norm", x).permute(2, 0, 1)[None]
    h = leaky(conv(w, "conv_before_upsample.0", conv(w, "conv_after_body", deep) + first), 0.01)
    for i in range(1, c.scale.bit_length()):
        h = leaky(conv(w, f"conv_up{i}", h.repeat_interleave(2, 2).repeat_interleave(2, 3)), 0.2)
    return conv(w, "conv_last", leaky(conv(w, "conv_hr", h), 0.2))[0] + mean


@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 16), (8, 8)])  # the last is one window
def test_it_is_what_the_paper_says(height: int, width: int) -> None:
    module = network().double()
    x = torch.rand(2, 3, height, width, dtype=torch.float64)
    weights = dict(module.state_dict())
    expected = torch.stack([written_out(weights, TINY, image) for image in x])
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-9)


def parameters(c: SwinIRConfig) -> int:
    """Counted by hand."""
    d, f = c.embed_dim, c.features
    block = 4 * d + (3 * d * d + 3 * d) + (d * d + d) + (2 * d * c.hidden + c.hidden + d)
    tables = sum(depth * heads * (2 * c.window - 1) ** 2 for depth, heads in zip(c.depths, c.heads, strict=True))
    groups = sum(c.depths) * block + tables + len(c.depths) * (9 * d * d + d)
    ends = (27 * c.scale**2 * d + d) + 4 * d + (9 * d * d + d) + (9 * d * f + f)
    return groups + ends + int(math.log2(c.scale) + 1) * (9 * f * f + f) + (27 * f + 3)


def test_the_published_size() -> None:
    """DifFace's configs/sample/iddpm_ffhq512_swinir.yaml: embed_dim 180, 8 groups of 6 with 6 heads, window 8, sf 8."""
    with torch.device("meta"):
        module = SwinIR(SwinIRConfig())
    count = sum(parameter.numel() for parameter in module.parameters())
    assert count == parameters(SwinIRConfig()) == 15_792_587
    assert len(module.state_dict()) == 660
    assert SwinIRConfig().size_multiple == 64


def public_file(path: Path, module: SwinIR, **more: Any) -> Path:
    """As the training code saves it, with the tables that follow from the shape."""
    state = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    side = module.config.window**2
    state["module.layers.0.residual_group.blocks.0.attn.relative_position_index"] = torch.zeros(side, side).long()
    state["module.layers.0.residual_group.blocks.1.attn_mask"] = torch.zeros(4, side, side)
    torch.save({"state_dict": {**state, **more}}, path)
    return path


def test_a_public_file_is_read_and_converted(tmp_path: Path) -> None:
    module = network()
    path = public_file(tmp_path / "estimator.pth", module)
    loaded = checkpoints.load(path, {"img_size": 64, "embed_dim": 12, "depths": [2, 3], "num_heads": [2, 3], "sf": 2})
    assert loaded.config == TINY
    x = torch.rand(1, 3, 16, 24)
    assert torch.equal(loaded.module(x), module(x))
    checkpoints.convert(path, tmp_path / "ours.safetensors")
    again = checkpoints.load(tmp_path / "ours.safetensors")
    assert again.config == TINY
    assert torch.equal(again.module(x), module(x))
    said = checkpoints.describe(path)
    assert (said["kind"], said["format"], said["parameters"]) == ("swinir", "swinir", parameters(TINY))


def test_averaged_weights_alone_are_the_weights(tmp_path: Path) -> None:
    """As BasicSR saves them, with the raw ones beside or without."""
    module, other = network(), network(seed=1)
    torch.save({"params_ema": module.state_dict()}, tmp_path / "one.pth")
    torch.save({"params": other.state_dict(), "params_ema": module.state_dict()}, tmp_path / "both.pth")
    x = torch.rand(1, 3, 16, 16)
    for name in ("one.pth", "both.pth"):
        assert torch.equal(checkpoints.load(tmp_path / name).module(x), module(x))
    assert torch.equal(checkpoints.load(tmp_path / "both.pth", averaged=False).module(x), other(x))


def test_another_build_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IdmFastError, match="got a position embedding"):
        checkpoints.load(public_file(tmp_path / "a.pth", network(), **{"module.absolute_pos_embed": torch.zeros(1)}))
    with pytest.raises(IdmFastError, match="setting embed_dim must be what the tensors say = 12, got 180"):
        checkpoints.load(public_file(tmp_path / "b.pth", network()), {"embed_dim": 180})
    state = {name: tensor for name, tensor in network().state_dict().items() if name != "layers.1.conv.bias"}
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(IdmFastError, match=r"1 tensors missing: layers\.1\.conv\.bias"):
        checkpoints.load(tmp_path / "c.pth")
    del state["conv_up1.weight"]
    torch.save(state, tmp_path / "d.pth")
    with pytest.raises(IdmFastError, match="got 12 channels of an unshuffled picture and 0 doublings"):
        checkpoints.load(tmp_path / "d.pth")


def test_a_picture_that_does_not_fit_is_refused() -> None:
    with pytest.raises(IdmFastError, match=r"H and W multiples of 8, got \(1, 3, 12, 16\)"):
        network()(torch.zeros(1, 3, 12, 16))
