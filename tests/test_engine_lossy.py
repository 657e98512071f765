"""What a walk may lose: inner levels that are reused, and the range of float16 (8 bits: test_engine_quantised)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from idm_fast.config import UNetConfig, preset
from idm_fast.diffusion import SamplerTable, Schedule, build_table, initial_noise
from idm_fast.engine import Engine, EngineOptions, engine
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet

TINY = UNetConfig(
    image_size=16, model_channels=16, channel_mult=(1, 2), num_res_blocks=(1, 1), cond_channels=3, norm_groups=4,
    num_head_channels=16, unshuffle=2, residual=True, embed_channels=32,
)  # fmt: skip


def _network(config: UNetConfig = TINY, seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    unet = UNet(config).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim > 1:
                torch.nn.init.xavier_normal_(parameter)
            else:
                parameter.uniform_(0.5, 1.5)
    return unet


def _table(steps: int = 3, solver: str = "dpmpp_2m") -> SamplerTable:
    diffusion = preset("idm-128").diffusion
    return build_table(Schedule.from_config(diffusion), diffusion.prediction, solver, steps, clamp=1.0)


def _inputs(batch: int = 1, seed: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    seeds = torch.arange(seed, seed + batch)
    cond = torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return initial_noise(seeds, (batch, 3, 16, 16), "cpu"), seeds, cond


RESBLOCKS = replace(TINY, resample="resblock", unshuffle=1, residual=False, cond_channels=3)


@pytest.mark.parametrize("config", [TINY, RESBLOCKS], ids=["conv", "resblock"])
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_reused_levels_give_what_they_gave(config: UNetConfig, dtype: str) -> None:
    """The same step again, without the inner levels: whatever else ran in their memory, nothing changes."""
    options = EngineOptions(cache_every=2)
    made = Engine.compile(_network(config), (2, 16, 16), _table(), dtype=dtype, options=options)
    whole = Engine.compile(_network(config), (2, 16, 16), _table(), dtype=dtype)
    inputs = _inputs(2)
    steps: list[Tensor] = []
    for reuse in (False, True, True):
        made.load(*inputs)
        made._plan.step(reuse)
        made._loop.moved(-1)
        steps.append(made._plan.x.clone())
    whole.load(*inputs)
    whole.step(0)
    assert all(torch.equal(step, whole._plan.x) for step in steps)
    begin, end = made._plan.lowered.inner
    assert end - begin > 0.3 * made.launches
    exact, lossy = whole.run(*inputs), made.run(*inputs)
    assert 0 < (exact - lossy).abs().max() < 1


def test_what_reuse_refuses() -> None:
    with pytest.raises(IdmFastError, match="cache_every must be a whole number >= 1, got 0"):
        Engine.compile(_network(), (1, 16, 16), _table(), options=EngineOptions(cache_every=0))
    flat = replace(TINY, channel_mult=(1,), num_res_blocks=(1,))
    with pytest.raises(IdmFastError, match="cache_every must be 1 for a network of one level, got 2"):
        Engine.compile(_network(flat), (1, 16, 16), _table(), options=EngineOptions(cache_every=2))


def _fp16(monkeypatch: pytest.MonkeyPatch, module: UNet) -> Engine:
    """A CPU is not offered float16: here it stands for a GPU."""
    monkeypatch.setattr(engine, "chosen_dtype", lambda *_: (torch.float16, None))
    return Engine.compile(module, (1, 16, 16), _table(), options=EngineOptions(backend="torch"))


def test_float16_must_hold_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    good, inputs = _network(), _inputs()
    made = _fp16(monkeypatch, good)
    expected = made.run(*inputs)
    assert torch.isfinite(expected).all()
    truth = Engine.compile(good, (1, 16, 16), _table(), dtype="fp32").run(*inputs)
    assert (expected - truth).abs().max() < 0.1
    bad = _network()
    with torch.no_grad():
        bad.down[0].block.conv2.bias.fill_(6.2e4)  # type: ignore[union-attr]
    made.swap_weights(bad)
    for _ in range(2):
        with pytest.raises(IdmFastError, match=r"fp16: values of down\.0\.block\.conv2 must stay .* use bf16"):
            made.run(*inputs)
    made.swap_weights(good)
    assert torch.equal(made.run(*inputs), expected)
