"""What a walk may lose: inner levels that are reused, and the range of float16 (8 bits: test_engine_quantised)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_engine import TINY, tiny_inputs, tiny_network, tiny_table
from torch import Tensor

from idm_fast.config import UNetConfig
from idm_fast.engine import Engine, EngineOptions, engine
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet

RESBLOCKS = replace(TINY, resample="resblock", unshuffle=1, residual=False, cond_channels=3)


@pytest.mark.parametrize("config", [TINY, RESBLOCKS], ids=["conv", "resblock"])
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_reused_levels_give_what_they_gave(config: UNetConfig, dtype: str) -> None:
    """The same step again, without the inner levels: whatever else ran in their memory, nothing changes."""
    options = EngineOptions(cache_every=2)
    made = Engine.compile(tiny_network(config), (2, 16, 16), tiny_table(), dtype=dtype, options=options)
    whole = Engine.compile(tiny_network(config), (2, 16, 16), tiny_table(), dtype=dtype)
    inputs = tiny_inputs(2)
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
        Engine.compile(tiny_network(), (1, 16, 16), tiny_table(), options=EngineOptions(cache_every=0))
    flat = replace(TINY, channel_mult=(1,), num_res_blocks=(1,))
    with pytest.raises(IdmFastError, match="cache_every must be 1 for a network of one level, got 2"):
        Engine.compile(tiny_network(flat), (1, 16, 16), tiny_table(), options=EngineOptions(cache_every=2))


def _fp16(monkeypatch: pytest.MonkeyPatch, module: UNet) -> Engine:
    """A CPU is not offered float16: here it stands for a GPU."""
    monkeypatch.setattr(engine, "chosen_dtype", lambda *_: (torch.float16, None))
    return Engine.compile(module, (1, 16, 16), tiny_table(), options=EngineOptions(backend="torch"))


def test_float16_must_hold_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    good, inputs = tiny_network(), tiny_inputs()
    made = _fp16(monkeypatch, good)
    expected = made.run(*inputs)
    assert torch.isfinite(expected).all()
    truth = Engine.compile(good, (1, 16, 16), tiny_table(), dtype="fp32").run(*inputs)
    assert (expected - truth).abs().max() < 0.1
    bad = tiny_network()
    with torch.no_grad():
        bad.down[0].block.conv2.bias.fill_(6.2e4)  # type: ignore[union-attr]
    made.swap_weights(bad)
    for _ in range(2):
        with pytest.raises(IdmFastError, match=r"fp16: values of down\.0\.block\.conv2 must stay .* use bf16"):
            made.run(*inputs)
    made.swap_weights(good)
    assert torch.equal(made.run(*inputs), expected)
