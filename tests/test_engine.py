"""The engine against the plain network: every preset, both dtypes, and what else it promises."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from idm_fast.config import PRESETS, UNetConfig, preset
from idm_fast.diffusion import SamplerTable, Schedule, build_table, initial_noise, sample
from idm_fast.engine import Engine, EngineOptions
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet

TINY = UNetConfig(
    image_size=16, model_channels=16, channel_mult=(1, 2), num_res_blocks=(1, 1), cond_channels=3, norm_groups=4,
    num_head_channels=16, unshuffle=2, residual=True, embed_channels=32,
)  # fmt: skip


def _network(config: UNetConfig, seed: int = 0) -> UNet:
    """Every weight counts (fresh networks have zeros where blocks and network end)."""
    torch.manual_seed(seed)
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


def _small(name: str) -> UNetConfig:
    """The preset's layout with an eighth of its channels."""
    c = preset(name).unet
    return replace(
        c, model_channels=c.model_channels // 8, norm_groups=c.norm_groups // 8,
        num_head_channels=c.num_head_channels // 8, embed_channels=c.embed_channels // 8,
    )  # fmt: skip


def _table(name: str, steps: int = 2, solver: str = "ddim") -> SamplerTable:
    diffusion = preset(name).diffusion
    return build_table(Schedule.from_config(diffusion), diffusion.prediction, solver, steps, clamp=1.0)


def _inputs(config: UNetConfig, batch: int, side: int) -> tuple[Tensor, Tensor, Tensor | None]:
    seeds = torch.arange(5, 5 + batch)
    generator = torch.Generator().manual_seed(1)
    c = config
    cond = torch.rand(batch, c.cond_channels, side, side, generator=generator) * 2 - 1 if c.cond_channels else None
    return initial_noise(seeds, (batch, c.in_channels, side, side), "cpu"), seeds, cond


@torch.inference_mode()
def _plain(
    module: UNet, table: SamplerTable, dtype: torch.dtype, x: Tensor, seeds: Tensor, cond: Tensor | None
) -> Tensor:
    """The torch path: modules in ``dtype``, one after the other."""
    module = module.to(dtype)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return module(x, t, cond)[:, : x.shape[1]].contiguous(memory_format=torch.channels_last)

    return sample(network, table, x, seeds, network_dtype=dtype)


def _rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


EXACT = 5e-6  # 6e-7 is the most that was seen; an attention's scale off by a tenth gives 2e-3
# One for each convolution, norm's coefficients and attention, three for the step (time row, update, counter), and in
# gd-256 5 norms and 15 pools and repeats of blocks that change resolution inside; a change that adds a pass shows here.
LAUNCHES = {
    "gen-64": 52,
    "idm-64": 66,
    "idm-128": 66,
    "idm-256": 66,
    "clr-prior-128": 60,
    "sr3-128": 146,
    "sr3-512": 86,
    "gd-256": 253,
    "difface-512": 270,
}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_agrees_with_the_plain_network(name: str) -> None:
    """float32 is the truth. In bfloat16 both paths round at each layer, so our error may be twice the plain one's."""
    config, diffusion = _small(name), preset(name).diffusion
    # Without a clamp: with random weights nine tenths of the picture would lie on it, whatever the network says.
    table = build_table(Schedule.from_config(diffusion), diffusion.prediction, "ddim", 2)
    side = max(32, config.size_multiple)
    inputs = _inputs(config, 1, side)
    engines = [Engine.compile(_network(config), (1, side, side), table, dtype=d) for d in ("fp32", "bf16")]
    exact, low = (engine.run(*inputs) for engine in engines)
    truth = _plain(_network(config), table, torch.float32, *inputs)
    # float32 sums of up to 9 x 1024 products in another order, over some hundred layers.
    assert _rms(exact - truth) <= EXACT * _rms(truth)
    plain = _plain(_network(config), table, torch.bfloat16, *inputs)
    assert 0 < _rms(low - truth) <= 2 * _rms(plain - truth)
    assert engines[0].launches == LAUNCHES[name]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_batch_equals_its_singles(dtype: str) -> None:
    module, table = _network(TINY), _table("idm-128", 3)
    x, seeds, cond = _inputs(TINY, 3, 16)
    assert cond is not None
    batch = Engine.compile(module, (3, 16, 16), table, dtype=dtype).run(x, seeds, cond)
    single = Engine.compile(module, (1, 16, 16), table, dtype=dtype)
    for i in range(3):
        assert torch.equal(single.run(x[i : i + 1], seeds[i : i + 1], cond[i : i + 1])[0], batch[i])


def test_two_runs_are_equal_bit_for_bit_and_a_result_stays() -> None:
    table = _table("idm-128", 3)
    engine = Engine.compile(_network(TINY), (1, 16, 16), table)
    inputs = _inputs(TINY, 1, 16)
    seen: list[int] = []
    first = engine.run(*inputs, callback=lambda e, x, x0: seen.append(e))
    kept = first.clone()
    assert torch.equal(engine.run(*inputs), first)
    engine.run(-inputs[0], *inputs[1:])
    assert torch.equal(first, kept)
    assert seen == [0, 1, 2]
    assert first.is_contiguous(memory_format=torch.channels_last)


def test_steps_one_by_one_in_any_order() -> None:
    table = _table("idm-128", 3)
    engine, other = (Engine.compile(_network(TINY), (1, 16, 16), table) for _ in range(2))
    inputs = _inputs(TINY, 1, 16)
    expected = engine.run(*inputs)
    engine.load(*inputs)
    engine.step(2)  # a benchmark may; the walk begins anew at the next load
    got: list[Tensor] = []
    other.run(*inputs, callback=lambda e, x, x0: got.append(x.clone()))
    engine.load(*inputs)
    for e in range(3):
        engine.step(e)
    assert torch.equal(got[-1], expected)
    with pytest.raises(IdmFastError, match=r"step must lie in 0\.\.2, got 3"):
        engine.step(3)


def test_two_threads_with_two_engines() -> None:
    table = _table("idm-128", 3)
    first, second = _network(TINY, 0), _network(TINY, 1)
    engines = [Engine.compile(module, (1, 16, 16), table) for module in (first, second)]
    inputs = _inputs(TINY, 1, 16)
    expected = [engine.run(*inputs) for engine in engines]
    wrong: list[int] = []

    def walk(index: int) -> None:
        wrong.extend(index for _ in range(5) if not torch.equal(engines[index].run(*inputs), expected[index]))

    threads = [Thread(target=walk, args=(index,)) for index in (0, 1, 0)]  # the first engine from two threads
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_another_table_needs_no_other_engine() -> None:
    long, short = _table("idm-128", 4), _table("idm-128", 2, "dpmpp_2m")
    engine = Engine.compile(_network(TINY), (1, 16, 16), long)
    inputs = _inputs(TINY, 1, 16)
    expected = Engine.compile(_network(TINY), (1, 16, 16), short).run(*inputs)
    engine.use_table(short)
    assert torch.equal(engine.run(*inputs), expected)
    with pytest.raises(IdmFastError, match="at most 4 evaluations"):
        engine.use_table(_table("idm-128", 5))
    assert torch.equal(engine.run(*inputs), expected)


def test_a_walk_is_the_same_in_tables_of_any_capacity() -> None:
    """A matrix product's rows may depend on how many there are."""
    module, inputs = _network(TINY), _inputs(TINY, 1, 16)
    large = Engine.compile(module, (1, 16, 16), _table("idm-128", 50), dtype="fp32")
    for steps in (1, 2, 3, 20):
        table = _table("idm-128", steps)
        large.use_table(table)
        assert torch.equal(large.run(*inputs), Engine.compile(module, (1, 16, 16), table, dtype="fp32").run(*inputs))


@pytest.mark.parametrize(
    "around",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode,
        torch.enable_grad,
        lambda: torch.device("meta"),
    ],
    ids=["autocast", "inference_mode", "enable_grad", "device"],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_what_is_set_outside_changes_nothing(around: Callable[[], AbstractContextManager[Any]], dtype: str) -> None:
    pytest.importorskip("idm_fast._C", reason="int8 is native")
    module, table, inputs = _network(TINY), _table("idm-128", 2), _inputs(TINY, 1, 16)
    expected = Engine.compile(module, (1, 16, 16), table, dtype=dtype).run(*inputs)
    with around():
        engine = Engine.compile(module, (1, 16, 16), table, dtype=dtype)
        assert torch.equal(engine.run(*inputs), expected)
        engine.swap_weights(module)
        assert torch.equal(engine.run(*inputs), expected)
    torch_only = Engine.compile(module, (1, 16, 16), table, dtype="fp32", options=EngineOptions(backend="torch"))
    expected = torch_only.run(*inputs)
    with around():
        assert torch.equal(torch_only.run(*inputs), expected)


def test_torch_s_default_dtype_does_not_matter() -> None:
    module, table, inputs = _network(TINY), _table("idm-128", 2), _inputs(TINY, 1, 16)
    expected = Engine.compile(module, (1, 16, 16), table).run(*inputs)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(Engine.compile(module, (1, 16, 16), table).run(*inputs), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_callback_that_uses_the_engine_is_refused() -> None:
    table, inputs = _table("idm-128", 2), _inputs(TINY, 1, 16)
    engine = Engine.compile(_network(TINY), (1, 16, 16), table)
    shared = EngineOptions(weights=engine.weights, arena=engine.arena)
    other = Engine.compile(_network(TINY), (1, 16, 16), table, options=shared)
    expected = engine.run(*inputs)
    for call in (lambda: engine.run(*inputs), lambda: other.run(*inputs), lambda: engine.use_table(table)):
        with pytest.raises(IdmFastError, match="a callback must leave"):
            engine.run(*inputs, callback=lambda e, x, x0: call())  # noqa: B023
    assert torch.equal(engine.run(*inputs), expected)


def test_another_instruction_set_is_refused() -> None:
    """Weights of avx2 and avx512 take the same room in another order: the picture would be garbage."""
    native = pytest.importorskip("idm_fast._C", reason="the native module is not built")
    inputs, before = _inputs(TINY, 1, 16), native.cpu_isa()
    engine = Engine.compile(_network(TINY), (1, 16, 16), _table("idm-128", 2), dtype="fp32")
    expected = engine.run(*inputs)
    if before == "baseline":
        pytest.skip("this machine has no other")
    native.set_cpu_isa("baseline")
    try:
        with pytest.raises(IdmFastError, match=f"instruction set must be that of compile = {before}, got baseline"):
            engine.run(*inputs)
    finally:
        native.set_cpu_isa(before)
    assert torch.equal(engine.run(*inputs), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_copy_is_refused(copied: Callable[[Any], Any]) -> None:
    with pytest.raises(IdmFastError, match="cannot be pickled or copied"):
        copied(Engine.compile(_network(TINY), (1, 16, 16), _table("idm-128", 1)))


def test_weights_are_swapped_in_place_or_not_at_all() -> None:
    table = _table("idm-128", 2)
    engine = Engine.compile(_network(TINY), (1, 16, 16), table)
    shared = Engine.compile(_network(TINY), (2, 16, 16), table, options=EngineOptions(weights=engine.weights))
    inputs, two = _inputs(TINY, 1, 16), _inputs(TINY, 2, 16)
    other = _network(TINY, 1)
    expected = Engine.compile(other, (1, 16, 16), table).run(*inputs)
    before = engine.run(*inputs)
    with pytest.raises(IdmFastError, match="swap_weights"):
        engine.swap_weights(_network(replace(TINY, model_channels=32)))
    assert torch.equal(engine.run(*inputs), before)
    engine.swap_weights(other)
    assert torch.equal(engine.run(*inputs), expected)
    assert torch.equal(shared.run(*two)[:1], expected)


def test_what_it_refuses() -> None:
    module, table = _network(TINY), _table("idm-128", 2)
    for shape in ((1, 18, 16), (0, 16, 16)):
        with pytest.raises(IdmFastError, match="multiples of 4"):
            Engine.compile(module, shape, table)
    with pytest.raises(IdmFastError, match="dtype must be one of fp32, bf16, fp16, int8, fp8, got 'fp4'"):
        Engine.compile(module, (1, 16, 16), table, dtype="fp4")
    with pytest.raises(IdmFastError, match="on a CPU, got fp16"):
        Engine.compile(module, (1, 16, 16), table, dtype="fp16")
    for device in ("tpu", "cuda:77"):
        with pytest.raises(IdmFastError, match="device must be"):
            Engine.compile(module, (1, 16, 16), table, device=device)
    with pytest.raises(IdmFastError, match="triton"):
        Engine.compile(module, (1, 16, 16), table, options=EngineOptions(backend="xformers"))
    engine = Engine.compile(module, (1, 16, 16), table, dtype="bf16")
    shared = EngineOptions(weights=engine.weights)
    other = _network(replace(TINY, norm_groups=2))
    for dtype, network, message in (("fp32", module, "float32 on cpu, got .*bfloat16"), ("bf16", other, "of another")):
        with pytest.raises(IdmFastError, match=f"weights must be of the model's configuration in .*{message}"):
            Engine.compile(network, (1, 16, 16), table, dtype=dtype, options=shared)
    with pytest.raises(IdmFastError, match=r"Engine: model must have .*, got .*weight on the meta device"):
        Engine.compile(UNet(TINY).to("meta"), (1, 16, 16), table)
    with pytest.raises(IdmFastError, match=r"swap_weights: model must have .* on the meta device"):
        engine.swap_weights(UNet(TINY).to("meta"))
    x, seeds, cond = _inputs(TINY, 1, 16)
    with pytest.raises(IdmFastError, match="start must be float"):
        engine.run(x[:, :, :8], seeds, cond)
    with pytest.raises(IdmFastError, match="cond must be given"):
        engine.run(x, seeds)
    with pytest.raises(IdmFastError, match="seeds must be int64"):
        engine.run(x, torch.zeros(2, dtype=torch.int64), cond)


class _Seen(TorchDispatchMode):
    """Every operator of torch that runs, allocations among them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_is_one_program_and_allocates_nothing() -> None:
    pytest.importorskip("idm_fast._C", reason="the native module is not built")
    engine = Engine.compile(_network(TINY), (1, 16, 16), _table("idm-128", 3), dtype="bf16")
    assert len(engine._plan._step) == 1
    assert {node.backend for node in engine.nodes} == {"cpu"}
    engine.load(*_inputs(TINY, 1, 16))
    engine.step(0)
    with _Seen() as seen:
        engine.step(1)
        engine.step(2)
    assert not seen.calls  # torch neither computes nor allocates


def test_nodes_say_what_they_cost() -> None:
    engine = Engine.compile(_network(TINY), (1, 16, 16), _table("idm-128", 3), dtype="bf16")
    assert len(engine.times(1)) == len(engine.nodes) == engine.launches
    assert all(seconds > 0 for seconds in engine.times(1))
    stem = next(node for node in engine.nodes if node.layer == "stem")
    assert stem.flops == 2 * 16 * 12 * 9 * 8 * 8
    assert stem.weight_bytes == 2 * 16 * 12 * 9
    assert stem.activation_bytes == 2 * 8 * 8 * (12 + 16 + 16)  # input, the condition's half, output
    assert engine.memory().weights > 0
    assert engine.memory().graph_pool == 0
    inputs = _inputs(TINY, 1, 16)
    expected = engine.run(*inputs)
    engine.times(1)
    assert torch.equal(engine.run(*inputs), expected)
