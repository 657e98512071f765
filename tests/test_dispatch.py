"""The choice of a backend: automatic, forced, impossible; and the refusals of every operation's contract."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from idm_fast.kernels import extension
from idm_fast.kernels.dispatch import Backend, Op, forced_backends
from idm_fast.ops import (
    BACKENDS,
    OPS,
    BackendError,
    ContractError,
    attention,
    group_norm_silu,
    sampler_update,
    use_backend,
)

CPU = frozenset({"cpu"})
FLOAT = frozenset({torch.float32})
HERE = torch.device("cpu")


def fast(value: int) -> str:
    return "fast"


def slow(value: int) -> str:
    return "slow"


def toy(**fast_facts: Any) -> Op:
    facts = {"name": "cpu", "function": f"{__name__}:fast", "devices": CPU, "dtypes": FLOAT, **fast_facts}
    return Op("toy", "x", [Backend(**facts), Backend("reference", f"{__name__}:slow", CPU, FLOAT)])


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(fast=fast, slow=slow))  # type: ignore[arg-type]
    monkeypatch.delenv("IDM_FAST_BACKEND", raising=False)


def test_first_that_can_run_is_taken() -> None:
    assert toy().run(HERE, torch.float32, 1) == "fast"
    assert toy(dtypes=frozenset({torch.bfloat16})).run(HERE, torch.float32, 1) == "slow"
    assert toy(devices=frozenset({"cuda"})).run(HERE, torch.float32, 1) == "slow"
    assert toy(function="idm_fast.no_such_module:fast").run(HERE, torch.float32, 1) == "slow"
    limited = toy(limits=lambda value: None if value < 3 else "takes values < 3")
    assert [limited.run(HERE, torch.float32, value) for value in (1, 3)] == ["fast", "slow"]


def test_only_import_error_means_not_available() -> None:
    with pytest.raises(AttributeError):
        toy(function="idm_fast.errors:no_such_function").run(HERE, torch.float32, 1)


def test_forced_and_impossible_lists_every_backend() -> None:
    op = toy(limits=lambda value: None if value < 3 else f"takes values < 3, not {value}")
    with use_backend("cpu"), pytest.raises(BackendError) as error:
        op.run(HERE, torch.float32, 7)
    lines = str(error.value).splitlines()
    assert "toy: forced backend 'cpu' cannot run this call on cpu in float32" in lines[0]
    assert [line.split(":")[0].strip() for line in lines[1:]] == list(BACKENDS)
    assert "  cpu: takes values < 3, not 7" in lines
    assert "  reference: yes" in lines
    assert "  triton: not written for this operation" in lines
    with use_backend("cpu,reference"):
        assert op.run(HERE, torch.float32, 7) == "slow"


def test_unknown_backend() -> None:
    expected = "backend must be one of = triton, cuda, cpu, xformers, torch, reference, got 'tpu'"
    with pytest.raises(BackendError, match=expected), use_backend("tpu"):
        pass


def test_environment_and_context(monkeypatch: pytest.MonkeyPatch) -> None:
    from idm_fast.kernels import dispatch

    monkeypatch.setattr(dispatch, "_from_environment", dispatch._from_environment.__wrapped__)
    monkeypatch.setenv("IDM_FAST_BACKEND", "reference")
    assert forced_backends() == ("reference",)
    with use_backend("torch"):
        assert forced_backends() == ("torch",)
        with use_backend(None):
            assert forced_backends() == ()
        assert forced_backends() == ("torch",)
    assert forced_backends() == ("reference",)
    monkeypatch.setenv("IDM_FAST_BACKEND", "nonsense")
    with pytest.raises(BackendError, match="nonsense"):
        forced_backends()


def test_choice_belongs_to_the_thread() -> None:
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(forced_backends()))
        thread.start()
        thread.join()
    assert seen == [()]


def test_tables() -> None:
    for name, op in OPS.items():
        assert op.name == name
        table = op.table("cpu", torch.float32)
        assert list(table) == list(BACKENDS)
        assert table["torch"] is None
        assert table["reference"] is None
        assert table["cuda"] is not None
        expected = "cpu" if "cpu" in op.backends and extension.native else "torch"
        assert op.automatic("cpu", torch.float32) == expected
    assert "float64" in str(OPS["group_norm_silu"].why_not("triton", "cpu", torch.float64))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_a_reason() -> None:
    for op in OPS.values():
        assert op.automatic("cuda", torch.float16) is None
        reasons = op.table("cuda", torch.float16)
        for name in {"torch", "triton"} & op.backends.keys():
            assert reasons[name] == "needs a CUDA device, and torch sees none", (op.name, name)


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["group_norm_silu"]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in str(op.why_not("triton", "cpu", torch.float32))
    assert op.backends["triton"].why_not(HERE, torch.float32) is not None


def image(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(*shape, **options).contiguous(memory_format=torch.channels_last)


X = image(2, 8, 4, 4)
Q = torch.zeros(1, 4, 2, 8)
SEEDS = torch.zeros(2, dtype=torch.int64)
EXPANDED = torch.zeros(2, 8, 1, 1).expand(2, 8, 4, 4)
TABLE = torch.zeros(3, 8)


def grad(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone().requires_grad_()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_norm_silu(X[0], 2), r"x must be 4-dimensional = \[N, C, H, W\], got \[8, 4, 4\]"),
        (
            lambda: group_norm_silu(X.contiguous(), 2),
            r"x must be in torch.channels_last format = strides .*, got strides",
        ),
        (lambda: group_norm_silu(X.long(), 2), r"x must be of a float dtype = .*, got int64"),
        (lambda: group_norm_silu(X, 3), r"num_groups must be a divisor of C = divisor of 8, got 3"),
        (lambda: group_norm_silu(X, 0), r"num_groups must be a divisor of C = divisor of 8, got 0"),
        (lambda: group_norm_silu(X, 2, torch.ones(7)), r"weight must be \[C\] = \[8\], got \[7\]"),
        (lambda: group_norm_silu(X, 2, torch.ones(8).double()), r"weight must be of dtype = float32, got float64"),
        (lambda: group_norm_silu(X, 2, scale=torch.ones(2, 8)), r"scale and shift must be given together"),
        (lambda: group_norm_silu(X, 2, scale=torch.ones(8), shift=torch.ones(8)), r"scale must be \[N, C\] = \[2, 8\]"),
        (lambda: group_norm_silu(X, 2, out=image(2, 8, 4, 5)), r"out must be of x's shape = \[2, 8, 4, 4\]"),
        (lambda: group_norm_silu(X, 2, out=X.bfloat16()), r"out must be of dtype = float32, got bfloat16"),
        (
            lambda: group_norm_silu(X[:1], 2, out=X.flatten()[0].expand(1, 8, 4, 4)),
            r"out must be in torch.channels_last",
        ),
        (lambda: group_norm_silu(grad(X), 2), r"no input must require grad = False, got True"),
        (lambda: attention(Q[0], Q, Q), r"q must be 4-dimensional = \[N, L, heads, d\], got \[4, 2, 8\]"),
        (lambda: attention(Q, Q[..., :4], Q), r"k must be \[N, S, heads, d\] = \[1, 4, 2, 8\], got \[1, 4, 2, 4\]"),
        (lambda: attention(Q, Q, Q[:, :3]), r"v must be of k's shape"),
        (lambda: attention(Q, Q[:, :0], Q[:, :0]), r"k must be of at least one position"),
        (lambda: attention(Q, Q.half(), Q), r"k must be of dtype = float32, got float16"),
        (lambda: attention(Q.transpose(1, 3), Q, Q), r"must be"),
        (lambda: attention(Q, Q, Q, out=Q), r"out must be apart from q = no overlap"),
        (lambda: attention(grad(Q), Q, Q), r"no input must require grad"),
        (
            lambda: sampler_update(X, X + 0, X + 0, TABLE, 3, SEEDS),
            r"step must be a row of table = 0 <= step < 3, got 3",
        ),
        (lambda: sampler_update(X, X + 0, X + 0, TABLE, -1, SEEDS), r"step must be a row of table"),
        (lambda: sampler_update(X, X + 0, X, TABLE, 0, SEEDS), r"history must be apart from x = no overlap"),
        (lambda: sampler_update(X, X, X + 0, TABLE, 0, SEEDS), r"x must be apart from model_output"),
        (lambda: sampler_update(X, X + 0, X + 0, TABLE[:, :7], 0, SEEDS), r"table must be contiguous = \[T, 8\]"),
        (lambda: sampler_update(X, X + 0, X + 0, TABLE, 0, SEEDS[:1]), r"seeds must be \[N\] = \[2\], got \[1\]"),
        (lambda: sampler_update(X, X + 0, X + 0, TABLE, 0, SEEDS.int()), r"seeds must be of dtype = int64, got int32"),
        (lambda: sampler_update(X.half(), X, X + 0, TABLE, 0, SEEDS), r"x must be of dtype = float32, got float16"),
        (
            lambda: sampler_update(X, X + 0, X + 0, TABLE, 0, SEEDS, network_input=X),
            r"network_input must be apart from x",
        ),
        (
            lambda: sampler_update(X, X + 0, X[:, :1].expand(2, 8, 4, 4), TABLE, 0, SEEDS),
            r"history must be expanded in no dimension",
        ),
        (
            lambda: sampler_update(X, X + 0, X + 0, TABLE, 0, SEEDS, network_input=EXPANDED),
            r"network_input must be expanded in no dimension",
        ),
        (lambda: sampler_update(X, X + 0, X + 0, grad(TABLE), 0, SEEDS), r"no input must require grad"),
        (lambda: sampler_update(X, X + 0, X + 0, TABLE[:0], SEEDS[:1], SEEDS), r"table must be contiguous = \[T, 8\]"),
        (
            lambda: sampler_update(X, X + 0, X + 0, TABLE, SEEDS, SEEDS),
            r"step must be one element = \[\] or \[1\], got \[2\]",
        ),
        (
            lambda: sampler_update(X, X + 0, X + 0, TABLE, SEEDS[:1].int(), SEEDS),
            r"step must be of dtype = int64, got int32",
        ),
        (
            lambda: sampler_update(X, X + 0, X + 0, TABLE, 0, SEEDS, threshold=torch.ones(3)),
            r"threshold must be \[N\] = \[2\], got \[3\]",
        ),
        (
            lambda: sampler_update(X, X + 0, X + 0, TABLE, 0, SEEDS, threshold=torch.ones(2).double()),
            r"threshold must be of dtype = float32, got float64",
        ),
        (
            lambda: sampler_update(X, X + 0, X + 0, TABLE, 0, SEEDS, threshold=torch.ones(4)[::2]),
            r"threshold must be contiguous = stride 1, got stride 2",
        ),
        (
            lambda: sampler_update(X, X + 0, X + 0, TABLE, 0, SEEDS, network_input=X + 0, unshuffle=3),
            r"unshuffle must be a divisor of height and width = divisor of 4 and 4, got 3",
        ),
        (
            lambda: sampler_update(X, X + 0, X + 0, TABLE, 0, SEEDS, network_input=X + 0, unshuffle=2),
            r"network_input must be of pixel_unshuffle\(x\)'s shape = \[2, 32, 2, 2\], got \[2, 8, 4, 4\]",
        ),
        (
            lambda: sampler_update(X, X + 0, X + 0, TABLE, 0, SEEDS, unshuffle=2),
            r"unshuffle must be the layout of a network_input or of model_output = 1 without one of them, got 2",
        ),
        (
            lambda: sampler_update(X, X[:, :2], X + 0, TABLE, 0, SEEDS, unshuffle=2),
            r"model_output must be of pixel_unshuffle\(x\)'s shape = \[2, 32, 2, 2\], got \[2, 2, 4, 4\]",
        ),
        (
            lambda: sampler_update(X, X + 0, X + 0, TABLE, 0, SEEDS, base=X[:1]),
            r"base must be of x's shape = \[2, 8, 4, 4\], got \[1, 8, 4, 4\]",
        ),
        (
            lambda: sampler_update(X, X + 0, X + 0, TABLE, 0, SEEDS, base=X.half()),
            r"base must be of dtype = float32, got float16",
        ),
        (lambda: sampler_update(X, X + 0, X + 0, TABLE, 0, SEEDS, base=X), r"x must be apart from base = no overlap"),
        (lambda: group_norm_silu(X, 2, out=grad(X)), r"no input must require grad"),
    ],
)
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        call()


def test_a_sampler_update_that_ran_before_is_still_checked() -> None:
    """The checks are not repeated for shapes and types that kept the contract once; the rest is asked every time."""
    x, output, history = X + 0, X + 0, X + 0
    for backend in ("cpu", "torch"):
        try:
            with use_backend(backend):
                for _ in range(2):
                    sampler_update(x, output, history, TABLE, 0, SEEDS)
                refused = {
                    r"step must be a row of table": (x, output, history, TABLE, 3, SEEDS),
                    r"x must be apart from model_output": (x, x, history, TABLE, 0, SEEDS),
                    r"history must be apart from x": (x, output, x, TABLE, 0, SEEDS),
                    r"no input must require grad": (x, grad(output), history, TABLE, 0, SEEDS),
                    r"table must be contiguous": (x, output, history, TABLE.T.contiguous().T, 0, SEEDS),
                }
                for message, arguments in refused.items():
                    with pytest.raises(ContractError, match=message):
                        sampler_update(*arguments)
        except BackendError:
            continue


def test_gradients_are_refused_only_where_they_would_flow() -> None:
    with torch.no_grad():
        group_norm_silu(grad(X), 2)
        attention(grad(Q), Q, Q)


def test_in_place_and_empty() -> None:
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    expected = group_norm_silu(x, 2)
    assert group_norm_silu(x, 2, out=x) is x
    assert torch.equal(x, expected)
    assert group_norm_silu(image(0, 8, 4, 4), 2).shape == (0, 8, 4, 4)
    assert attention(Q[:0], Q[:0], Q[:0]).shape == (0, 4, 2, 8)


def test_nan_stays_in_its_group() -> None:
    for backend in ("cpu", "torch", "reference", "triton"):
        x = torch.randn(2, 24, 4, 4).contiguous(memory_format=torch.channels_last)
        x[0, 9, 1, 1] = float("nan")
        try:
            with use_backend(backend):
                y = group_norm_silu(x, 3)
        except BackendError:
            continue
        assert y[0, 8:16].isnan().all()
        assert y[0, :8].isfinite().all()
        assert y[0, 16:].isfinite().all()
        assert y[1].isfinite().all()


def test_sampler_keeps_a_nan_of_the_network() -> None:
    row = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0]])
    for backend in ("cpu", "torch", "reference", "triton"):
        x, output, history = image(1, 3, 4, 4), image(1, 3, 4, 4), image(1, 3, 4, 4)
        output[0, 1, 2, 3] = float("nan")
        try:
            with use_backend(backend):
                sampler_update(x, output, history, row, 0, SEEDS[:1])
        except BackendError:
            continue
        assert x.isnan().sum() == 1, backend
        assert history.isnan().sum() == 1, backend


def test_a_substituted_row_serves_calls_that_were_seen_before() -> None:
    from dataclasses import replace

    x = torch.randn(1, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    op = OPS["group_norm_silu"]

    def zeros(*arguments: Any) -> None:
        arguments[-1].zero_()

    with use_backend("torch"):
        seen = group_norm_silu(x, 2)
        row = replace(op.backends["torch"], function=f"{__name__}:fast")
        from idm_fast.kernels import dispatch

        dispatch._load.cache_clear()
        import sys

        sys.modules[__name__].fast = zeros  # type: ignore[attr-defined]
        with op.substituted(row):
            assert not group_norm_silu(x, 2).any()
        assert torch.equal(group_norm_silu(x, 2), seen)
    dispatch._load.cache_clear()
