"""The compiled autoencoder against its plain modules, and what else it promises."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace

import pytest
import torch
from test_engine_graph import FakeRuntime
from torch import Tensor

from idm_fast.config_vqgan import VqganConfig, vqgan_preset
from idm_fast.engine import EngineOptions, autoencoder
from idm_fast.engine.autoencoder import AutoencoderEngine
from idm_fast.engine.buffers import Arena
from idm_fast.engine.memory import OutOfMemory
from idm_fast.errors import IdmFastError
from idm_fast.models.vqgan import Vqgan

TINY = VqganConfig(
    image_size=16, model_channels=16, channel_mult=(1, 2), num_res_blocks=(1, 1), attention_levels=(1,), norm_groups=4,
    codebook_size=64,
)  # fmt: skip
SHAPE = (2, 16, 24)


def _network(config: VqganConfig = TINY, seed: int = 0) -> Vqgan:
    """Every weight counts, and the codes lie where the latents are."""
    torch.manual_seed(seed)
    module = Vqgan(config).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 1:
                parameter.normal_(0, 0.1)
        module.codebook.weight.normal_()
    return module


def _small(name: str) -> VqganConfig:
    """The preset's layout with fewer channels and codes."""
    c = vqgan_preset(name)
    return replace(c, model_channels=32, norm_groups=8, codebook_size=128)


def _pictures(shape: tuple[int, int, int] = SHAPE) -> Tensor:
    n, height, width = shape
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def _rms(error: Tensor) -> float:
    return error.float().square().mean().sqrt().item()


EXACT = 5e-6  # 2.3e-6 is the most that was seen; a kernel that is not turned gives 0.5


@pytest.mark.parametrize("config", [_small("vq-f4"), _small("vq-face-128"), TINY], ids=["f4", "face", "attention"])
@torch.no_grad()
def test_agrees_with_the_plain_network(config: VqganConfig) -> None:
    """float32 is the truth. In bfloat16 both paths round at each layer, so our error may be twice the plain one's."""
    shape = (1, 8 * config.factor, 6 * config.factor)
    x, module = _pictures(shape), _network(config)
    engines = [AutoencoderEngine.compile(module, shape, dtype=d) for d in ("fp32", "bf16")]
    latent = module.encode(x)
    picture, as_is = module.decode(latent), module.decode(latent, quantize=False)
    rounded = copy.deepcopy(module).to(torch.bfloat16)
    low = latent.to(torch.bfloat16)
    for truth, plain, call in (
        (latent, rounded.encode(x.to(torch.bfloat16)), lambda e: e.encode(x)),
        (as_is, rounded.decode(low, quantize=False), lambda e: e.decode(latent, quantize=False)),
        # The same codes for both: where a latent was rounded, another code may be the nearest.
        (picture, rounded.decode(module.quantize(latent)[0].to(torch.bfloat16)), lambda e: e.decode(latent)),
    ):
        exact, ours = (call(engine) for engine in engines)
        assert exact.dtype == ours.dtype == torch.float32
        assert _rms(exact - truth) <= EXACT * _rms(truth)
        assert 0 < _rms(ours - truth) <= 2 * _rms(plain - truth)
    for engine in engines:  # the codebook is searched in float32 in both
        quantised, codes = engine.quantize(latent)
        assert torch.equal(codes, module.quantize(latent)[1])
        assert torch.equal(quantised, module.quantize(latent)[0])


def test_a_norm_costs_no_pass_and_the_padding_no_call() -> None:
    """A change that adds a call to a block or to a down-sampling shows here: a block is four calls, one a strided
    convolution, an attention four."""
    engine = AutoencoderEngine.compile(_network(_small("vq-f4")), (1, 32, 32), dtype="fp32")
    assert len(engine.encoder.calls) == 44
    assert len(engine.decoder.calls) == 57
    assert {node.op for node in engine.nodes} == {
        "unshuffle", "shuffle", "conv2d", "norm_coefficients", "attention", "vq_nearest"
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_batch_equals_its_singles_and_a_result_stays(dtype: str) -> None:
    module, x = _network(), _pictures((3, 16, 16))
    batch = AutoencoderEngine.compile(module, (3, 16, 16), dtype=dtype)
    single = AutoencoderEngine.compile(module, (1, 16, 16), dtype=dtype)
    latent = batch.encode(x)
    kept, picture = latent.clone(), batch.decode(latent)
    assert torch.equal(latent, kept)
    for i in range(3):
        assert torch.equal(single.encode(x[i : i + 1])[0], latent[i])
        assert torch.equal(single.decode(latent[i : i + 1])[0], picture[i])
    assert torch.equal(batch.decode(latent), picture)


def test_parts_are_run_one_after_the_other_by_hand() -> None:
    """As a larger graph does it: what one part gives is copied to the next."""
    module, x = _network(), _pictures()
    engine = AutoencoderEngine.compile(module, SHAPE, dtype="fp32")
    expected = engine.decode(engine.encode(x))
    with engine.arena.turn(), torch.no_grad():
        engine.encoder.x.copy_(x)
        engine.encoder.run()
        engine.decoder.x.copy_(engine.encoder.out.clone())
        engine.decoder.run()
        assert torch.equal(engine.decoder.out, expected)


def test_what_is_set_outside_changes_nothing() -> None:
    module, x = _network(), _pictures()
    expected = AutoencoderEngine.compile(module, SHAPE, dtype="bf16").encode(x)
    for around in (lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode, torch.enable_grad):
        with around():  # type: ignore[attr-defined]
            engine = AutoencoderEngine.compile(module, SHAPE, dtype="bf16")
            assert torch.equal(engine.encode(x), expected)
            engine.swap_weights(module)
            assert torch.equal(engine.encode(x), expected)


def test_weights_are_swapped_shared_or_refused() -> None:
    first, second, x = _network(seed=0), _network(seed=1), _pictures()
    engine = AutoencoderEngine.compile(first, SHAPE, dtype="fp32")
    options = EngineOptions(weights=engine.weights, arena=engine.arena)
    shared = AutoencoderEngine.compile(first, SHAPE, dtype="fp32", options=options)
    expected = AutoencoderEngine.compile(second, SHAPE, dtype="fp32").decode(engine.encode(x))
    latent = engine.encode(x)
    engine.swap_weights(second)
    assert torch.equal(shared.decode(latent), expected)
    with pytest.raises(IdmFastError, match=r"swap_weights: .* must be of shape"):
        engine.swap_weights(_network(replace(TINY, codebook_size=32)))
    assert torch.equal(engine.decode(latent), expected)
    with pytest.raises(IdmFastError, match=r"weights must be of the model's configuration in torch\.bfloat16"):
        AutoencoderEngine.compile(first, SHAPE, dtype="bf16", options=options)


def test_what_it_refuses() -> None:
    module = _network()
    for shape in ((1, 18, 15), (0, 16, 16)):
        with pytest.raises(IdmFastError, match="H and W multiples of 2, got"):
            AutoencoderEngine.compile(module, shape)
    for dtype in ("int8", "fp8"):  # and no advice about a device that would take it
        with pytest.raises(IdmFastError, match=f"^dtype must be fp32, bf16 or fp16 for an autoencoder, got {dtype}$"):
            AutoencoderEngine.compile(module, SHAPE, dtype=dtype)
    with pytest.raises(IdmFastError, match="cache_every must be 1, got 2"):
        AutoencoderEngine.compile(module, SHAPE, options=EngineOptions(cache_every=2))
    with pytest.raises(IdmFastError, match="xformers"):
        AutoencoderEngine.compile(module, SHAPE, options=EngineOptions(backend="xformers"))
    engine = AutoencoderEngine.compile(module, SHAPE, dtype="fp32")
    with pytest.raises(IdmFastError, match=r"x must be float \[2, 3, 16, 24\], got torch.float32 \[1, 3, 16, 24\]"):
        engine.encode(_pictures((1, 16, 24)))
    for call in (engine.decode, engine.quantize):
        with pytest.raises(IdmFastError, match=r"latent must be float \[2, 3, 8, 12\], got torch.int64"):
            call(torch.zeros(2, 3, 8, 12, dtype=torch.int64))
    with pytest.raises(IdmFastError, match="cannot be pickled or copied"):
        copy.deepcopy(engine)


def test_memory_that_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked before it is taken; and in a capture, after which the engine still works."""
    with monkeypatch.context() as patched:
        patched.setattr("idm_fast.engine.memory.available", lambda device: 2**10)
        with pytest.raises(OutOfMemory, match="memory on cpu must hold the plan = 0 MiB, got 0 MiB free"):
            AutoencoderEngine.compile(_network(), SHAPE)
    runtime = FakeRuntime()
    options = EngineOptions(backend="torch", arena=Arena(torch.device("cpu"), runtime))
    engine = AutoencoderEngine.compile(_network(), SHAPE, dtype="fp32", options=options)
    runtime.exhausted = 1
    with pytest.raises(OutOfMemory, match="must hold 2 images of 16 x 24, got: Tried to allocate"):
        engine.encode(_pictures())
    expected = AutoencoderEngine.compile(_network(), SHAPE, dtype="fp32", options=EngineOptions(backend="torch"))
    assert torch.equal(engine.encode(_pictures()), expected.encode(_pictures()))


def test_another_instruction_set_is_refused() -> None:
    """Weights of avx2 and avx512 take the same room in another order: the picture would be garbage."""
    native = pytest.importorskip("idm_fast._C", reason="the native module is not built")
    before = native.cpu_isa()
    engine = AutoencoderEngine.compile(_network(), SHAPE, dtype="fp32")
    latent = engine.encode(_pictures())
    if before == "baseline":
        pytest.skip("this machine has no other")
    native.set_cpu_isa("baseline")
    try:
        for call in (lambda: engine.encode(_pictures()), lambda: engine.decode(latent)):
            with pytest.raises(IdmFastError, match=f"instruction set must be that of compile = {before}, got baseline"):
                call()
    finally:
        native.set_cpu_isa(before)
    assert torch.equal(engine.encode(_pictures()), latent)


def test_each_direction_is_one_graph() -> None:
    """On a runtime that records: captured at first, replayed on other images and weights, gone with its owner."""
    runtime = FakeRuntime()
    module, x = _network(), _pictures()
    plain = EngineOptions(backend="torch")  # what the recorder can see
    expected = AutoencoderEngine.compile(module, SHAPE, dtype="fp32", options=plain)
    arena = Arena(torch.device("cpu"), runtime)
    options = EngineOptions(backend="torch", arena=arena)
    engine = AutoencoderEngine.compile(module, SHAPE, dtype="fp32", options=options)
    assert arena.graphs.captures == 0
    latent = expected.encode(x)
    for _ in range(2):
        assert torch.equal(engine.encode(x), latent)
        assert torch.equal(engine.decode(latent), expected.decode(latent))
        assert torch.equal(engine.decode(latent, quantize=False), expected.decode(latent, quantize=False))
    assert arena.graphs.captures == runtime.warm_ups == 3
    assert torch.equal(engine.encode(-x), expected.encode(-x))
    for each in (engine, expected):
        each.swap_weights(_network(seed=1))
    assert torch.equal(engine.encode(x), expected.encode(x))
    assert arena.graphs.captures == 3
    other = AutoencoderEngine.compile(module, SHAPE, dtype="fp32", options=replace(options, graph=False))
    assert torch.equal(other.encode(x), latent)
    assert arena.graphs.captures == 3
    del engine
    gc.collect()
    assert arena.graphs.nbytes == 0
    assert runtime.alive == 0


def test_the_range_of_float16_is_looked_at_once_per_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU is not offered float16: here it stands for a GPU."""
    monkeypatch.setattr(autoencoder, "chosen_dtype", lambda dtype, device: (torch.float16, None))
    module, x = _network(), _pictures()
    engine = AutoencoderEngine.compile(module, SHAPE, options=EngineOptions(backend="torch"))
    latent = module.encode(x).detach()
    assert _rms(engine.encode(x) - latent) < 0.01 * _rms(latent)
    assert torch.equal(engine.encode(x), engine.encode(x))
    as_is = module.decode(latent, quantize=False).detach()
    assert _rms(engine.decode(latent, quantize=False) - as_is) < 0.02 * _rms(as_is)
    with torch.no_grad():
        module.decoder.stem.weight *= 1e6
    engine.swap_weights(module)
    engine.encode(x)  # the encoder has kept its range
    with pytest.raises(IdmFastError, match=r"fp16: values of decoder\.stem must stay within .*; use bf16"):
        engine.decode(latent, quantize=False)
