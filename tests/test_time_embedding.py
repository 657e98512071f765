"""time_embedding against what the network computes block by block, and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from idm_fast.config import UNetConfig
from idm_fast.models.blocks import ResBlock
from idm_fast.models.unet import UNet
from idm_fast.ops import BackendError, ContractError, time_embedding, use_backend

FAMILIES: dict[str, dict[str, Any]] = {
    "ours": {"embed_channels": 24},
    "sr3": {"embedding_order": "sin_cos", "embed_silu": False, "use_scale_shift_norm": False, "embed_channels": 16},
    "classes": {"num_classes": 5, "resample": "resblock"},
}


def network(family: str) -> UNet:
    config = UNetConfig(
        image_size=8, model_channels=16, channel_mult=(1, 2), num_res_blocks=(1, 2), norm_groups=4, num_heads=1,
        **FAMILIES[family],
    )  # fmt: skip
    torch.manual_seed(0)
    return UNet(config).eval()


def arguments(net: UNet, label: Tensor | None) -> dict[str, Any]:
    blocks = [block for block in net.modules() if isinstance(block, ResBlock)]
    return {
        "weight1": net.time.fc1.weight,
        "bias1": net.time.fc1.bias,
        "weight2": net.time.fc2.weight,
        "bias2": net.time.fc2.bias,
        "weight": torch.cat([block.embed.weight for block in blocks]),
        "bias": torch.cat([block.embed.bias for block in blocks]),
        "order": net.config.embedding_order,
        "embed_silu": net.config.embed_silu,
        "label": label,
    }


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_are_what_the_blocks_compute(family: str, backend: str) -> None:
    net = network(family)
    t = torch.tensor([999.0, 500.5, 3.0, 0.0]) if family != "sr3" else torch.tensor([0.99, 0.98, 0.5, 0.01])
    labels = torch.full((1,), 3) if net.label is not None else None
    seen: list[Tensor] = []
    for block in net.modules():
        if isinstance(block, ResBlock):
            block.embed.register_forward_hook(lambda module, inputs, output: seen.append(output))
    rows = []
    for step in t:
        seen.clear()
        net(torch.zeros(1, 3, 8, 8), step.reshape(1), labels=labels)
        rows.append(torch.cat(seen, dim=1))
    label = None if net.label is None or labels is None else net.label(labels)
    try:
        with use_backend(backend):
            table = time_embedding(t, **arguments(net, label))
    except BackendError as error:
        pytest.skip(str(error))
    torch.testing.assert_close(table, torch.cat(rows), rtol=2e-5, atol=2e-5)


T = torch.zeros(3)
W1, B1, W2, B2, W, B = (torch.zeros(*shape) for shape in ((8, 4), (8,), (6, 8), (6,), (10, 6), (10,)))
GOOD: dict[str, Any] = {"t": T, "weight1": W1, "bias1": B1, "weight2": W2, "bias2": B2, "weight": W, "bias": B}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"t": torch.zeros(3, 1)}, r"t must be 1-dimensional = \[T\], got \[3, 1\]"),
        ({"t": T.double()}, r"t must be of dtype = float32, got float64"),
        ({"order": "sin"}, r"order must be one of = cos_sin or sin_cos, got 'sin'"),
        ({"weight1": torch.zeros(8, 3)}, r"weight1 must be \[hidden, features\] .* = even, got 3"),
        ({"weight1": torch.zeros(4, 8).T}, r"weight1 must be contiguous = dense rows, got strides \[1, 8\]"),
        ({"weight2": torch.zeros(6, 7)}, r"weight2 must be \[width, hidden\] = \[6, 8\], got \[6, 7\]"),
        ({"weight2": W2.half()}, r"weight2 must be of dtype = float32, got float16"),
        ({"weight": torch.zeros(10, 5)}, r"weight must be \[S, width\] = \[10, 6\], got \[10, 5\]"),
        ({"weight": W.long()}, r"weight must be of a float dtype"),
        ({"weight": torch.zeros(0, 6)}, r"weight must be 2-dimensional"),
        ({"bias": torch.zeros(9)}, r"bias must be of its weight's rows = \[10\], got \[9\]"),
        ({"label": torch.zeros(2, 6)}, r"label must be \[T or 1, width\] = \[3, 6\], got \[2, 6\]"),
        ({"dtype": torch.float16}, r"dtype must be that of the table = torch.float32 or torch.float32"),
        ({"out": torch.zeros(3, 9)}, r"out must be \[T, S\] = \[3, 10\], got \[3, 9\]"),
        ({"out": torch.zeros(3, 10).half()}, r"out must be of dtype = float32, got float16"),
        ({"out": torch.zeros(10, 3).T}, r"out must be contiguous"),
        ({"out": W.flatten()[:30].view(3, 10)}, r"out must be apart from weight = no overlap"),
        ({"weight": W.clone().requires_grad_()}, r"no input must require grad"),
    ],
)
def test_refusals(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=f"time_embedding: {message}"):
        time_embedding(**(GOOD | changed))


def test_no_steps() -> None:
    assert time_embedding(**(GOOD | {"t": T[:0]})).shape == (0, 10)
