"""Where a plan's values lie, and a restorer's engines: shared memory that does not grow, batches that do not fit."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from idm_fast.config import DiffusionConfig, ModelConfig, UNetConfig, preset
from idm_fast.crops import MOST_ENGINES, CropRestorer, SampleSettings
from idm_fast.engine import Engine, EngineOptions, memory
from idm_fast.engine.buffers import Arena, images, lifetimes
from idm_fast.engine.lower import lower
from idm_fast.engine.nodes import Value
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet

CPU = torch.device("cpu")
UNET = UNetConfig(
    image_size=16, model_channels=16, channel_mult=(1, 2), num_res_blocks=(1, 1), cond_channels=3, unshuffle=2,
    residual=True, norm_groups=4, num_head_channels=16, embed_channels=32,
)  # fmt: skip
CONFIG = ModelConfig("tiny", UNET, DiffusionConfig("cosine_continuous", "x0"), steps=3)


def _module() -> UNet:
    torch.manual_seed(0)
    module = UNet(UNET)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                torch.nn.init.xavier_normal_(parameter)
    return module


def _crops(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, 16, 16, generator=generator) * 2 - 1, torch.arange(count)


@pytest.mark.parametrize("name", ["idm-128", "gd-256"])
def test_values_that_live_at_once_lie_apart(name: str) -> None:
    """Of the full presets; the plan needs far less than one buffer for each value."""
    config = preset(name).unet
    with torch.device("meta"):
        lowered = lower(UNet(config), (1, config.image_size, config.image_size), torch.bfloat16)
    nodes = (*lowered.setup, *lowered.step)
    places, total = images(nodes)
    lives = lifetimes(nodes, Value)
    for a, b in combinations(places, 2):
        if lives[a][0] <= lives[b][1] and lives[b][0] <= lives[a][1]:
            assert places[a] + a.nbytes <= places[b] or places[b] + b.nbytes <= places[a], (a.name, b.name)
    assert total < 0.5 * sum(value.nbytes for value in places)
    assert all(offset % 256 == 0 for offset in places.values())


def test_a_walk_reads_nothing_that_it_has_not_written() -> None:
    """Whatever lay in the memory before, the result is the same."""
    restorer = CropRestorer(CONFIG, _module(), CPU, torch.float32)
    y, seeds = _crops(1)
    expected = restorer.restore(y, seeds, SampleSettings())
    arena = restorer._arena
    arena.take(arena.nbytes).view(torch.float32).fill_(torch.nan)
    assert torch.equal(restorer.restore(y, seeds, SampleSettings()), expected)


def test_many_pictures_do_not_grow_it() -> None:
    restorer = CropRestorer(CONFIG, _module(), CPU, torch.bfloat16)
    sizes = []
    for _ in range(3):
        for count in (6, 1, 2, 3, 5, 4):
            restorer.restore(*_crops(count), SampleSettings())
        sizes.append(restorer.memory())
    assert restorer._engines is not None
    assert len(restorer._engines) == MOST_ENGINES
    assert sizes[0] == sizes[1] == sizes[2]
    assert restorer._arena.generation == 1


def test_engines_of_one_arena_take_turns() -> None:
    module, table = _module(), CropRestorer(CONFIG, _module(), CPU, "fp32").table(SampleSettings(3, "ddim"))
    arena = Arena(CPU)
    options = EngineOptions(arena=arena)
    large, small = (Engine.compile(module, (n, 16, 16), table, options=options) for n in (2, 1))
    y, seeds = _crops(2)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    both = large.run(x, seeds, y)
    one = small.run(x[1:], seeds[1:], y[1:])
    assert torch.equal(both[1:], one)
    assert torch.equal(large.run(x, seeds, y), both)
    assert large.memory().workspace < 2 * arena.nbytes


def test_the_engine_is_what_restores_and_can_be_left_out() -> None:
    y, seeds = _crops(2)
    results = []
    for engine in (True, False):
        restorer = CropRestorer(CONFIG, _module(), CPU, "fp32", engine=engine)
        assert (restorer._engines is not None) == engine
        seen: list[int] = []
        results.append(restorer.restore(y, seeds, SampleSettings(), seen.append))
        assert seen == [0, 1, 2]
    assert (results[0] - results[1]).abs().max() < 1e-5
    with pytest.raises(IdmFastError, match="without the engine, got int8"):
        CropRestorer(CONFIG, _module(), CPU, "int8", engine=False)


def test_a_batch_that_does_not_fit_is_halved_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    y, seeds = _crops(4)
    expected = CropRestorer(CONFIG, _module(), CPU, "fp32").restore(y, seeds, SampleSettings())
    restorer = CropRestorer(CONFIG, _module(), CPU, "fp32")
    two = CropRestorer(CONFIG, _module(), CPU, "fp32")
    two.restore(y[:2], seeds[:2], SampleSettings())
    monkeypatch.setattr(memory, "available", lambda device: two._arena.nbytes)
    with pytest.warns(RuntimeWarning, match=r"must hold the plan = .* MiB, got .* MiB free; goes on with batches of 2"):
        got = restorer.restore(y, seeds, SampleSettings())
    assert torch.equal(got, expected)
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    with (
        pytest.warns(RuntimeWarning, match="goes on with batches of 1"),
        pytest.raises(IdmFastError, match="memory on cpu must hold the plan"),
    ):
        CropRestorer(CONFIG, _module(), CPU, "fp32").restore(y[:2], seeds[:2], SampleSettings())
