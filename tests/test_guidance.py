"""Guided walks: against their formula in float64, against a network that answers so, and on engines."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_engine import tiny_inputs, tiny_network, tiny_table
from torch import Tensor

from idm_fast.diffusion import (
    SOLVERS,
    Guidance,
    SamplerTable,
    Schedule,
    build_table,
    gradient_of,
    initial_noise,
    low_frequencies,
    sample,
)
from idm_fast.engine import Engine
from idm_fast.errors import IdmFastError
from idm_fast.kernels import philox_normal

COSINE = Schedule.continuous_cosine()
SEEDS = torch.tensor([3, -1, 2**40 + 7])
SHAPE = (3, 3, 8, 8)
REFERENCE = torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)) * 2 - 1


def network(x: Tensor, t: Tensor) -> Tensor:
    return (0.5 * x - 0.1).clamp(-1, 1) + 1e-4 * t[:, None, None, None]


def walk(table: SamplerTable, guidance: Guidance | None = None, denoise: Any = network, **settings: Any) -> Tensor:
    return sample(denoise, table, initial_noise(SEEDS, SHAPE, "cpu"), SEEDS, guidance=guidance, **settings)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("every", [1, 3])
def test_the_walk_follows_its_formula(solver: str, every: int) -> None:
    """v prediction, a clamp, noise where the solver has it: every number in float64, by hand."""
    table = build_table(Schedule.linear(), "v", solver, 6, clamp=1.0)
    guidance = Guidance(low_frequencies(REFERENCE, 4), 0.7, (0.2, 0.9), every)
    x = walk(table, guidance)
    count = table.evaluations
    inside = [e for e in range(count) if 0.2 <= e / count < 0.9]
    exact = initial_noise(SEEDS, SHAPE, "cpu").double()
    history = exact
    for e, (k_x, k_out, a, b, c, s, clamp, _) in enumerate(table.rows.tolist()):
        x0 = (k_x * exact + k_out * network(exact, table.times(3)[e].double())).clamp(-clamp, clamp)
        if e in inside[::every]:
            means = F.interpolate(F.avg_pool2d(x0 - REFERENCE.double(), 4), scale_factor=4, mode="nearest")
        if e in inside:
            x0 = (x0 - 0.7 * means).clamp(-clamp, clamp)
        exact = a * exact + b * x0 + c * history + s * philox_normal(SEEDS, SHAPE, e, "cpu").double()
        history = x0
    torch.testing.assert_close(x, exact.float(), rtol=0, atol=2e-5)
    assert (x - walk(table)).abs().max() > 0.05
    assert guidance.skipped == 0


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("clamp", [1.0, None])
def test_it_is_a_network_that_answers_so(solver: str, clamp: float | None) -> None:
    """Solvers that remember (Heun, DPM-Solver++ 2M) remember the guided estimate."""
    table, pull = build_table(COSINE, "x0", solver, 5, clamp=clamp), low_frequencies(REFERENCE, 2)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        x0 = network(x, t) if clamp is None else network(x, t).clamp(-clamp, clamp)
        return (x0 - 0.5 * pull(x0)).contiguous(memory_format=torch.channels_last)

    expected = walk(table, denoise=guided)
    torch.testing.assert_close(walk(table, Guidance(pull, 0.5)), expected, rtol=0, atol=5e-6)


def test_scale_1_takes_the_means_of_the_reference() -> None:
    x = walk(build_table(COSINE, "x0", "ddim", 4), Guidance(low_frequencies(REFERENCE, 4)))
    torch.testing.assert_close(F.avg_pool2d(x, 4), F.avg_pool2d(REFERENCE, 4), rtol=0, atol=1e-6)


def test_the_gradient_of_a_loss_by_autograd() -> None:
    """Also where the caller is under inference mode, as ``CropRestorer`` is."""

    def loss(x0_hat: Tensor) -> Tensor:
        return 8 * F.avg_pool2d(x0_hat - REFERENCE, 4).square().flatten(1).sum(1)

    table = build_table(COSINE, "x0", "dpmpp_2m", 4, clamp=1.0)
    expected = walk(table, Guidance(low_frequencies(REFERENCE, 4), 0.8))
    for around in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with around():
            got = walk(table, Guidance(gradient_of(loss), 0.8))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        assert not got.requires_grad


def test_the_network_sees_the_guided_picture_in_its_own_dtype() -> None:
    seen: list[Tensor] = []
    after: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.clone())
        return network(x, t.to(x.dtype))

    table = build_table(COSINE, "x0", "ddim", 3)
    walk(
        table, Guidance(low_frequencies(REFERENCE, 4)), denoise, network_dtype=torch.bfloat16,
        callback=lambda e, x, x0: after.append(x.clone()),
    )  # fmt: skip
    for x, entry in zip(after, seen[1:], strict=False):
        assert torch.equal(x.bfloat16(), entry)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_skipped_and_counted(bad: float) -> None:
    """Of the image that has it; the others are guided."""
    calls: list[int] = []

    def gradient(x0_hat: Tensor) -> Tensor:
        found = low_frequencies(REFERENCE, 4)(x0_hat)
        if len(calls) in (1, 2):
            found[1, 2, 7, 7] = bad
        calls.append(1)
        return found

    table = build_table(COSINE, "x0", "dpmpp_2m", 4, clamp=1.0)
    guidance, clean = Guidance(gradient, 0.5), Guidance(low_frequencies(REFERENCE, 4), 0.5)
    x, expected = walk(table, guidance), walk(table, clean)
    assert torch.isfinite(x).all()
    assert (guidance.skipped, clean.skipped, len(calls)) == (2, 0, 4)
    assert torch.equal(x[::2], expected[::2])
    assert not torch.equal(x[1], expected[1])
    huge = Guidance(lambda x0: torch.full_like(x0, 3e38), 10.0)
    assert torch.equal(walk(table, huge), walk(table))
    assert huge.skipped == 12


def test_several_threads_count_together() -> None:
    guidance, missed = Guidance(lambda x0: x0), torch.tensor([True, False, True])
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [Thread(target=lambda: [guidance._count(missed) for _ in range(500)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert guidance.skipped == 4 * 500 * 2


def test_which_evaluations_are_guided() -> None:
    def guided(evaluations: int, **settings: Any) -> tuple[int, ...]:
        return Guidance(lambda x0: x0, **settings).guided(evaluations)

    assert guided(4) == (0, 1, 2, 3)
    assert guided(10, interval=(0.3, 0.8), every=2) == (3, 4, 5, 6, 7)
    assert guided(1, interval=(0.5, 1.0)) == ()


def test_the_gradient_is_computed_at_every_kth_and_kept_for_one_walk() -> None:
    seen: list[Tensor] = []

    def gradient(x0_hat: Tensor) -> Tensor:
        seen.append(x0_hat)
        return low_frequencies(REFERENCE, 4)(x0_hat)

    guidance, table = Guidance(gradient, 0.5, (0.2, 0.9), 3), build_table(COSINE, "x0", "ddim", 10)
    first = walk(table, guidance)
    assert len(seen) == 3  # evaluations 2, 5 and 8
    assert torch.equal(walk(table, guidance), first)
    assert len(seen) == 6
    every, none = walk(table, Guidance(gradient, 0.5, (0.2, 0.9))), walk(table)
    assert 0 < (first - every).square().mean() < 0.1 * (none - every).square().mean()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": torch.nan}, "scale must be finite, got nan"),
        ({"interval": (0.5, 0.5)}, "interval must be 0 <= start < stop <= 1, got (0.5, 0.5)"),
        ({"interval": (0.0, torch.nan)}, "interval must be 0 <= start < stop <= 1, got (0.0, nan)"),
        ({"every": 0}, "every must be a whole number >= 1, got 0"),
        ({"every": 1.5}, "every must be a whole number >= 1, got 1.5"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(IdmFastError, match=re.escape(f"guidance: {message}")):
        Guidance(lambda x0: x0, **settings)
    with pytest.raises(IdmFastError, match="factor must divide the picture's 8 x 8, got 3"):
        low_frequencies(REFERENCE, 3)
    for reference, got in ((REFERENCE[0], r"torch.float32 \[3, 8, 8\]"), (REFERENCE.to(torch.uint8), "torch.uint8")):
        with pytest.raises(IdmFastError, match=rf"reference must be float \[N, C, H, W\], got {got}"):
            low_frequencies(reference, 2)


@pytest.mark.parametrize(
    ("gradient", "got"),
    [
        (lambda x0: x0[:1], r"torch.float32 \[1, 3, 8, 8\] on cpu"),
        (lambda x0: x0.long(), "torch.int64"),
        (lambda x0: x0.to("meta"), "on meta"),
    ],
)
def test_a_gradient_of_another_kind_is_refused(gradient: Callable[[Tensor], Tensor], got: str) -> None:
    with pytest.raises(IdmFastError, match=rf"gradient must be float \[3, 3, 8, 8\] on cpu, got .*{got}"):
        walk(build_table(COSINE, "x0", "ddim", 2), Guidance(gradient))


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (lambda x0: None, "gradient must be a tensor, got NoneType"),
        (gradient_of(lambda x0: torch.zeros(3)), "loss must be a tensor that depends on x0_hat"),
        (gradient_of(lambda x0: 1.0), "loss must be a tensor that depends on x0_hat"),  # type: ignore[arg-type,return-value]
        (low_frequencies(REFERENCE[:1], 4), r"reference must be \[3, 3, 8, 8\], got \[1, 3, 8, 8\]"),
        (low_frequencies(torch.zeros(3, 3, 16, 16), 4), r"reference must be \[3, 3, 8, 8\], got \[3, 3, 16, 16\]"),
    ],
)
def test_what_gives_no_gradient_is_refused(gradient: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(IdmFastError, match=f"guidance: {message}"):
        walk(build_table(COSINE, "x0", "ddim", 2), Guidance(gradient))


# ---- on engines ----


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "ddpm"])
def test_an_engine_equals_the_plain_walk(solver: str, every: int) -> None:
    table, module = tiny_table(5, solver), tiny_network()
    x, seeds, cond = tiny_inputs(2)
    seen: list[Tensor] = []
    plain: list[Tensor] = []

    def guidance() -> Guidance:
        return Guidance(low_frequencies(-cond, 4), 0.6, (0.0, 0.9), every)

    with torch.inference_mode():
        expected = sample(
            lambda x, t: module(x, t, cond), table, x, seeds, guidance=guidance(),
            callback=lambda e, x, x0: plain.append(x0.clone()),
        )  # fmt: skip
    engine = Engine.compile(module, (2, 16, 16), table, dtype="fp32")
    got = engine.run(x, seeds, cond, lambda e, x, x0: seen.append(x0.clone()), guidance())
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    for mine, theirs in zip(seen, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)
    assert torch.equal(engine.run(x, seeds, cond, guidance=guidance()), got)
    unguided = engine.run(x, seeds, cond)
    assert (got - unguided).abs().max() > 0.05
    none = Guidance(lambda x0: torch.full_like(x0, torch.nan))
    assert torch.equal(engine.run(x, seeds, cond, guidance=none), unguided)
    assert none.skipped == 10


def test_guidance_that_fails_or_uses_the_engine_leaves_it_usable() -> None:
    engine, inputs = Engine.compile(tiny_network(), (2, 16, 16), tiny_table()), tiny_inputs(2)
    expected = engine.run(*inputs)

    def fails(x0_hat: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine.run(*inputs, guidance=Guidance(fails))
    with pytest.raises(IdmFastError, match="a callback must leave"):
        engine.run(*inputs, guidance=Guidance(lambda x0: engine.run(*inputs)))
    assert torch.equal(engine.run(*inputs), expected)
