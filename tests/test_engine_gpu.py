"""The engine on a CUDA device: what the recording runtime of test_engine_graph.py can only promise."""

from __future__ import annotations

from dataclasses import replace
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from idm_fast.config import PRESETS, UNetConfig, preset
from idm_fast.crops import CropRestorer, SampleSettings
from idm_fast.diffusion import SamplerTable, Schedule, build_table, initial_noise
from idm_fast.engine import Engine, EngineOptions, graph
from idm_fast.engine.buffers import Arena
from idm_fast.engine.memory import OutOfMemory
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")
    return torch.device("cuda", torch.cuda.current_device())


def _config(name: str) -> UNetConfig:
    """The preset's layout with a quarter of its channels."""
    c = preset(name).unet
    return replace(
        c, model_channels=c.model_channels // 4, norm_groups=c.norm_groups // 4,
        num_head_channels=c.num_head_channels // 4, embed_channels=c.embed_channels // 4,
    )  # fmt: skip


def _network(name: str = "idm-128", seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    unet = UNet(_config(name)).eval()
    with torch.no_grad():
        for key, parameter in unet.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.xavier_normal_(parameter)
            elif "norm" in key and key.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.1)
    return unet


def _table(steps: int = 3, solver: str = "ddpm", name: str = "idm-128") -> SamplerTable:
    diffusion = preset(name).diffusion
    return build_table(Schedule.from_config(diffusion), diffusion.prediction, solver, steps, clamp=1.0)


def _inputs(device: torch.device, batch: int = 1, side: int = 32, name: str = "idm-128") -> tuple[Any, ...]:
    seeds = torch.arange(5, 5 + batch, device=device)
    u, cond = preset(name).unet, None
    if u.cond_channels:
        shape = (batch, u.cond_channels, side, side)
        cond = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1).to(device)
    return initial_noise(seeds, (batch, u.in_channels, side, side), device), seeds, cond


def _compile(device: torch.device, batch: int = 1, **options: Any) -> Engine:
    made = EngineOptions(**options)
    return Engine.compile(_network(), (batch, 32, 32), _table(), dtype="fp16", device=device, options=made)


# Kernels of one type take Triton's compiler long enough.
@pytest.mark.parametrize(
    ("name", "dtype"), [("idm-128", "bf16"), ("idm-128", "fp32"), *((name, "fp16") for name in sorted(PRESETS))]
)
def test_replay_equals_the_calls_bit_for_bit(device: torch.device, name: str, dtype: str) -> None:
    module, table = _network(name), _table(name=name)
    side = max(32, module.config.size_multiple)
    inputs = _inputs(device, 2, side, name)
    results = []
    for options in (EngineOptions(graph=False), EngineOptions()):
        made = Engine.compile(module, (2, side, side), table, dtype=dtype, device=device, options=options)
        results += [made.run(*inputs), made.run(*inputs)]
    assert torch.isfinite(results[0]).all()
    assert all(torch.equal(result, results[0]) for result in results)
    assert made.arena.graphs.captures == 1


@pytest.mark.parametrize("name", ["idm-128", "gd-256", "sr3-128"])
def test_agrees_with_a_cpu(device: torch.device, name: str) -> None:
    """float32 on both: the same noise, sums in another order, and products that may be rounded to TF32."""
    module, table = _network(name), _table(name=name)
    side = max(32, module.config.size_multiple)
    inputs = _inputs(torch.device("cpu"), 1, side, name)
    truth = Engine.compile(module, (1, side, side), table, dtype="fp32").run(*inputs)
    there = [None if tensor is None else tensor.to(device) for tensor in inputs]
    found = Engine.compile(module, (1, side, side), table, dtype="fp32", device=device).run(*there).cpu()
    assert (found - truth).square().mean().sqrt() <= 5e-3 * truth.square().mean().sqrt()


def test_a_batch_equals_its_singles(device: torch.device) -> None:
    x, seeds, cond = _inputs(device, 3)
    batch, single = _compile(device, 3).run(x, seeds, cond), _compile(device)
    for i in range(3):
        one = single.run(x[i : i + 1], seeds[i : i + 1], cond[i : i + 1])[0]
        # Another batch may be another tile, and so another order of sums: an ulp or two, not another picture.
        assert (one - batch[i]).abs().max() < 2e-2


def test_tables_and_weights_change_without_a_capture(device: torch.device) -> None:
    made, inputs = _compile(device), _inputs(device)
    made.run(*inputs)
    other = _table(3, "dpmpp_2m")
    made.use_table(other)
    made.swap_weights(_network(seed=1))
    options = EngineOptions(graph=False)
    fresh = Engine.compile(_network(seed=1), (1, 32, 32), other, dtype="fp16", device=device, options=options)
    assert torch.equal(made.run(*inputs), fresh.run(*inputs))
    assert made.arena.graphs.captures == 1


def test_callbacks_and_long_walks_replay_steps(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, inputs = _compile(device), _inputs(device)
    expected, seen = whole.run(*inputs), []
    assert torch.equal(whole.run(*inputs, callback=lambda e, x, x0: seen.append(e)), expected)
    assert seen == [0, 1, 2]
    monkeypatch.setattr(graph, "MOST_CALLS", 1)
    assert torch.equal(_compile(device).run(*inputs), expected)


@pytest.mark.parametrize("shared", [True, False])
def test_threads_with_streams_of_their_own(device: torch.device, shared: bool) -> None:
    arena = Arena(device) if shared else None
    engines = [_compile(device, batch, arena=arena) for batch in (1, 2)]
    inputs = [_inputs(device, batch) for batch in (1, 2)]
    expected = [_compile(device, batch).run(*each) for batch, each in zip((1, 2), inputs, strict=True)]
    torch.cuda.synchronize()
    wrong: list[object] = []

    def walk(index: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream(device)):
                for _ in range(20):
                    result: Tensor = engines[index].run(*inputs[index])
                    if not torch.equal(result, expected[index]):
                        wrong.append(index)
        except Exception as error:
            wrong.append(error)

    threads = [Thread(target=walk, args=(index,)) for index in (0, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_many_pictures_do_not_grow_it(device: torch.device) -> None:
    module = _network()
    restorer = CropRestorer(
        replace(preset("idm-128"), unet=replace(module.config, image_size=32)), module, device, "fp16"
    )
    held = []
    for _ in range(4):
        for count in (1, 3, 2, 4):
            y = torch.rand(count, 3, 32, 32) * 2 - 1
            restorer.restore(y, torch.arange(count), SampleSettings(3))
        torch.cuda.synchronize()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), restorer.memory()))
    assert held[1] == held[2] == held[3]


def test_a_setting_that_is_not_the_captured_one(device: torch.device) -> None:
    made, inputs = _compile(device), _inputs(device)
    expected = made.run(*inputs)
    before = torch.backends.cudnn.deterministic
    try:
        torch.backends.cudnn.deterministic = not before
        with pytest.raises(IdmFastError, match="must be as when the graph was captured"):
            made.run(*inputs)
    finally:
        torch.backends.cudnn.deterministic = before
    assert torch.equal(made.run(*inputs), expected)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=device)  # of an empty one torch warns
        with pytest.raises(IdmFastError, match="outside the capture of a CUDA graph"):
            made.run(*inputs)
    assert torch.equal(made.run(*inputs), expected)


def test_a_failed_capture_leaves_stream_and_engine_in_order(device: torch.device) -> None:
    made, inputs = _compile(device), _inputs(device)
    calls, stream = made._plan._step, torch.cuda.current_stream()
    calls.insert(0, lambda: made._tables.step.item())
    with pytest.raises(RuntimeError):
        made.run(*inputs)
    assert torch.cuda.current_stream() == stream
    calls.pop(0)
    assert torch.equal(made.run(*inputs), _compile(device).run(*inputs))


def test_values_beyond_float16(device: torch.device) -> None:
    bad, inputs = _network(), _inputs(device)
    with torch.no_grad():
        bad.down[0].block.conv2.bias.fill_(6.2e4)  # type: ignore[union-attr]
    with pytest.raises(IdmFastError, match=r"fp16: values of down\.0\.block\.conv2 must stay .* use bf16"):
        Engine.compile(bad, (1, 32, 32), _table(), dtype="fp16", device=device).run(*inputs)
    made = Engine.compile(bad, (1, 32, 32), _table(), dtype="bf16", device=device)
    assert torch.isfinite(made.run(*inputs)).all()


def test_more_than_the_device_holds(device: torch.device) -> None:
    with pytest.raises(OutOfMemory, match=r"must hold .* got .* free"):
        Engine.compile(_network(), (10**6, 32, 32), _table(), dtype="fp16", device=device)
    inputs = _inputs(device)
    assert torch.isfinite(_compile(device).run(*inputs)).all()


def test_reused_levels(device: torch.device) -> None:
    inputs = _inputs(device)
    results = [_compile(device, graph=captured, cache_every=2).run(*inputs) for captured in (False, True)]
    assert torch.equal(*results)
