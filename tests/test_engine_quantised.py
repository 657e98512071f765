"""The lossy tiers int8 and fp8: which layers they take, on which devices, and what they cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_engine import TINY, tiny_inputs, tiny_network, tiny_table
from torch import Tensor

from idm_fast.checkpoints import native
from idm_fast.config import UNetConfig, preset
from idm_fast.crops import CropRestorer
from idm_fast.diffusion import Schedule, build_table, initial_noise
from idm_fast.engine import Engine, EngineOptions, precision
from idm_fast.engine.lossy import TIERS
from idm_fast.engine.lower import lower
from idm_fast.engine.nodes import Conv, EightBit
from idm_fast.engine.precision import chosen_dtype
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet
from idm_fast.ops import OPS
from idm_fast.registry import WEIGHTS

SCALED = replace(TINY, use_scale_shift_norm=True)


def _compile(
    dtype: str, backend: str | None = None, batch: int = 1, config: UNetConfig = SCALED, steps: int = 2
) -> Engine:
    options = EngineOptions(backend=backend)
    return Engine.compile(
        tiny_network(config), (batch, 16, 16), tiny_table(steps, "ddim", None), dtype=dtype, options=options
    )


def _psnr(a: Tensor, b: Tensor) -> float:
    return 10 * float(torch.log10(4 / (a - b).square().mean()))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", ["idm-128", "sr3-128", "gd-256"])
def test_convolutions_behind_a_norm_are_quantised_but_for_the_ends(name: str, tier: EightBit) -> None:
    config = preset(name).unet
    with torch.device("meta"):
        module = UNet(config)
        lowered = lower(module, (1, config.image_size, config.image_size), torch.bfloat16, quantised=tier)
    convolutions = [node for node in lowered.step if isinstance(node, Conv)]
    for node in convolutions:
        ends, eight = node.layer in ("stem", "out_conv"), node.quantised == tier
        assert eight == (node.quantised is not None) == (node.coefficients is not None and not ends), node.layer
        assert eight == (node.op == f"conv2d_{tier}") == (node.activation is not None)
        assert node.shortcut is None or not eight  # a shortcut is a convolution of its own
    flops = Counter({True: 0, False: 0})
    for node in convolutions:
        flops[node.quantised is not None] += node.flops
    assert flops[True] > 0.8 * flops.total()
    columns = sorted(node.activation for node in convolutions if node.activation is not None)
    assert columns == sorted(each.columns for each in lowered.ranges)
    begin = sum(m.embed.out_features for m in module.modules() if hasattr(m, "embed"))
    for first, last in columns:  # one behind the other, from the projections' end on
        assert (first, last) == (begin, begin + TIERS[tier].columns)
        begin = last


@pytest.fixture
def exact_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 between the convolutions: what is left is e4m3 alone, and that is the same for everybody."""
    monkeypatch.setattr(precision, "default_dtype", lambda device: torch.float32)


@pytest.mark.usefixtures("exact_between")
@pytest.mark.parametrize("config", [SCALED, TINY], ids=["scale-shift", "add"])
def test_fp8_is_the_same_on_torch_and_by_the_judge(config: UNetConfig) -> None:
    inputs = tiny_inputs(2)
    found = {name: _compile("fp8", name, batch=2, config=config) for name in ("torch", "reference")}
    results = {name: made.run(*inputs) for name, made in found.items()}
    assert Counter(node.op for node in found["torch"].nodes)["conv2d_fp8"] == 17
    exact = Engine.compile(tiny_network(config), (2, 16, 16), tiny_table(2, "ddim", None), dtype="fp32").run(*inputs)
    assert 0 < (results["reference"] - exact).square().mean().sqrt() < 0.05
    torch.testing.assert_close(results["torch"], results["reference"], rtol=0, atol=1e-4)
    assert torch.equal(found["torch"].run(*inputs), results["torch"])


@pytest.mark.usefixtures("exact_between")
def test_fp8_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself, interpreted, inside a plan of torch's operations."""
    op = OPS["conv2d_fp8"]
    if op.why_not("triton", torch.device("cpu"), torch.float32) is not None:
        pytest.skip(str(op.why_not("triton", torch.device("cpu"), torch.float32)))
    inputs, expected = tiny_inputs(), _compile("fp8", "torch", steps=1)
    with monkeypatch.context() as only, op.substituted(op.backends["torch"]):
        only.setattr(op, "backends", {"triton": op.backends["triton"]})
        made = _compile("fp8", "torch,triton", steps=1)
    assert {node.backend for node in made.nodes if node.op == "conv2d_fp8"} == {"triton"}
    torch.testing.assert_close(made.run(*inputs), expected.run(*inputs), rtol=0, atol=1e-4)


def test_fp8_weights_are_swapped_in_place() -> None:
    made, inputs = _compile("fp8", "torch"), tiny_inputs()
    before = made.run(*inputs)
    made.swap_weights(tiny_network(SCALED, 1))
    options = EngineOptions(backend="torch")
    fresh = Engine.compile(
        tiny_network(SCALED, 1), (1, 16, 16), tiny_table(2, "ddim", None), dtype="fp8", options=options
    )
    assert torch.equal(made.run(*inputs), fresh.run(*inputs))
    made.swap_weights(tiny_network(SCALED))
    assert torch.equal(made.run(*inputs), before)


@pytest.mark.parametrize(("tier", "steps", "least"), [("int8", 2, 40.0), ("fp8", 1, 35.0)])
def test_what_a_tier_costs_on_a_model_that_ships(tier: str, steps: int, least: float) -> None:
    """bfloat16 has some 70 dB to float32, int8 some 50, fp8 some 40."""
    pytest.importorskip("idm_fast._C", reason="the native module is not built")
    loaded = native.load(WEIGHTS / "idm-face-128.safetensors")
    diffusion = loaded.config.diffusion
    table = build_table(Schedule.from_config(diffusion), diffusion.prediction, "ddim", steps, clamp=1.0)
    seeds = torch.tensor([3])
    start = initial_noise(seeds, (1, 3, 64, 64), "cpu")
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    y = torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic").clamp(-1, 1)
    backends = {"fp8": "torch"}
    results = {
        dtype: Engine.compile(
            loaded.module, (1, 64, 64), table, dtype=dtype, options=EngineOptions(backend=backends.get(dtype))
        ).run(start, seeds, y)
        for dtype in ("fp32", "bf16", tier)
    }
    assert _psnr(results["fp32"], y) < 35  # the network does something
    assert _psnr(results[tier], results["fp32"]) > least
    assert _psnr(results["bf16"], results["fp32"]) > _psnr(results[tier], results["fp32"]) + 3


class _Device:
    """``torch.cuda`` of a machine that has one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_where_the_tiers_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert chosen_dtype("int8", cpu)[1] == "int8"
    assert chosen_dtype("fp8", cpu, "torch")[1] == "fp8"
    _Device(monkeypatch, (9, 0))
    assert chosen_dtype("fp8", cuda) == (torch.float16, "fp8")
    _Device(monkeypatch, (8, 0))
    refusals: list[tuple[Any, ...]] = [
        ("int8", cuda, "int8 needs a CPU, got cuda:0"),
        ("fp8", cpu, r"fp8 needs a CUDA device of sm_90 or later \(on a CPU a forced .*\), got cpu"),
        ("fp8", cuda, "fp8 needs a CUDA device of sm_90 or later, got cuda:0 of sm_80"),
    ]
    for tier, device, message in refusals:
        with pytest.raises(IdmFastError, match=f"dtype must be one that the device has: {message}"):
            chosen_dtype(tier, device)
    with pytest.raises(IdmFastError, match="conv2d_fp8"):
        _compile("fp8", "cpu")


@pytest.mark.parametrize("tier", TIERS)
def test_without_the_engine_there_are_none(tier: str) -> None:
    config = replace(preset("idm-128"), unet=SCALED)
    with pytest.raises(IdmFastError, match=f"without the engine, got {tier}"):
        CropRestorer(config, tiny_network(SCALED), torch.device("cpu"), tier, "torch", engine=False)
