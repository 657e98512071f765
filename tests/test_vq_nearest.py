"""vq_nearest where the right code is known exactly, and what is not finite."""

from __future__ import annotations

import pytest
import torch

from idm_fast.kernels import extension
from idm_fast.ops import BackendError, ContractError, use_backend, vq_nearest

BACKENDS = ("triton", "cpu", "torch", "reference")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def run(backend: str, z: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """z is [positions, D] here. Returns codes [positions] and rows [positions, D]; skips with the backend's reason."""
    image = z.reshape(1, 1, *z.shape).permute(0, 3, 1, 2)
    try:
        with use_backend(backend):
            codes, quantised = vq_nearest(image, codebook)
    except BackendError as error:
        pytest.skip(str(error))
    return codes.flatten(), quantised.permute(0, 2, 3, 1).reshape(z.shape)


def lattice(side: int, d: int) -> torch.Tensor:
    """[side**d, d]: all whole-numbered points, the last coordinate fastest."""
    return torch.cartesian_prod(*[torch.arange(float(side))] * d).reshape(-1, d)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_lattice(backend: str, dtype: torch.dtype) -> None:
    """Every sum is exact in float32, so the code is, and a point halfway between two takes the lower index."""
    codebook = lattice(5, 3).to(dtype)
    codes, rows = run(backend, codebook, codebook)
    assert torch.equal(codes, torch.arange(125))
    assert torch.equal(rows, codebook)
    codes, rows = run(backend, codebook[:100] + 0.25, codebook)
    assert torch.equal(codes, torch.arange(100))
    assert torch.equal(rows, codebook[:100])
    halfway = lattice(4, 3) + 0.5
    codes, _ = run(backend, halfway.to(dtype), codebook)
    assert torch.equal(codes.float(), halfway.floor() @ torch.tensor([25.0, 5.0, 1.0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [3, 40])
def test_equal_codes_take_the_lowest_index(backend: str, d: int) -> None:
    codebook = torch.randint(-4, 5, (7, d), generator=torch.Generator().manual_seed(0)).float().repeat(40, 1)
    codes, _ = run(backend, codebook[100:160], codebook)
    assert torch.equal(codes, torch.arange(100, 160) % 7)


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("size", "positions"), [(1, 1), (65, 3), (256, 47), (257, 49), (1025, 101), (2049, 2)])
def test_few_channels(size: int, positions: int, d: int) -> None:
    """The native kernel keeps short codes in registers, run by run. Whole numbers: distances are exact, ties abound."""
    generator = torch.Generator().manual_seed(size)
    codebook = torch.randint(-9, 10, (size, d), generator=generator)
    z = torch.randint(-9, 10, (positions, d), generator=generator)
    distances = (z[:, None] - codebook).square().sum(dim=2)
    expected = (distances * size + torch.arange(size)).argmin(dim=1)  # of equal ones the lowest index
    codes, rows = run("cpu", z.float(), codebook.float())
    assert torch.equal(codes, expected)
    assert torch.equal(rows, codebook[expected].float())


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")  # Triton's interpreter is numpy
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [3, 40])
def test_what_is_no_number(backend: str, d: int) -> None:
    codebook = torch.randn(90, d, generator=torch.Generator().manual_seed(0))
    z = codebook[[5, 70, 80]].clone()
    z[1, 2] = float("nan")
    codebook[80, 1] = float("nan")
    codes, rows = run(backend, z, codebook)
    assert codes[0] == 5
    assert codes[1] == 0, "a position with a NaN"
    assert torch.equal(rows[1], codebook[0])
    assert codes[2] != 80, "a code with a NaN"
    z = torch.full((2, d), float("nan"))
    assert run(backend, z, codebook)[0].tolist() == [0, 0]
    huge = torch.full((3, d), 1e30)  # every |c|^2 is infinite: no distance is less than another
    assert run(backend, torch.ones(1, d), huge)[0].tolist() == [0]


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_are_rounded_to_nearest(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(300, 21, generator=generator)
    z = torch.randn(50, 21, generator=generator).to(dtype)
    codes, rows = run(backend, z, codebook)
    assert torch.equal(rows, codebook[codes].to(dtype))


@pytest.mark.skipif(extension.native is None, reason=str(extension.missing))
def test_every_instruction_set() -> None:
    assert extension.native is not None
    try:
        for isa in extension.native.cpu_isas():
            extension.native.set_cpu_isa(isa)
            test_lattice("cpu", torch.bfloat16)
            for d in (3, 40):  # short codes have a search of their own
                test_equal_codes_take_the_lowest_index("cpu", d)
                test_what_is_no_number("cpu", d)
            for d in (1, 4):
                test_few_channels(257, 49, d)
    finally:
        extension.native.set_cpu_isa("")


def test_returns_what_it_was_given_and_takes_nothing() -> None:
    z = torch.zeros(2, 4, 3, 5).contiguous(memory_format=torch.channels_last)
    codes, quantised = torch.empty(2, 3, 5, dtype=torch.int64), torch.empty_like(z)
    found = vq_nearest(z, torch.ones(3, 4), out_codes=codes, out_quantised=quantised)
    assert found[0] is codes
    assert found[1] is quantised
    codes, quantised = vq_nearest(z[:0], torch.ones(3, 4))
    assert codes.shape == (0, 3, 5)
    assert quantised.shape == (0, 4, 3, 5)


def test_refusals() -> None:
    z = torch.zeros(1, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    book = torch.zeros(6, 4)
    refused = [
        (lambda: vq_nearest(z[0], book), r"z must be 4-dimensional = \[N, D, H, W\], got \[4, 3, 3\]"),
        (lambda: vq_nearest(z.long(), book), r"z must be of a float dtype"),
        (lambda: vq_nearest(z.contiguous(), book), r"z must be in torch.channels_last format"),
        (lambda: vq_nearest(z, book[:0]), r"codebook must be of at least one code and channel = \[K, D\], got \[0, 4"),
        (lambda: vq_nearest(z, book[:, :3]), r"codebook must be \[K, D\] = \[6, 4\], got \[6, 3\]"),
        (lambda: vq_nearest(z, book.half()), r"codebook must be of dtype = float32, got float16"),
        (lambda: vq_nearest(z, book.T.contiguous().T), r"codebook must be contiguous = True, got False"),
        (lambda: vq_nearest(z, book, out_codes=torch.zeros(1, 3, 3)), r"out_codes must be of dtype = int64, got"),
        (lambda: vq_nearest(z, book, out_codes=torch.zeros(9).long()), r"out_codes must be \[N, H, W\] = \[1, 3, 3\]"),
        (lambda: vq_nearest(z, book, out_quantised=z), r"out_quantised must be apart from z = no overlap"),
        (lambda: vq_nearest(z, book, out_quantised=z.half()), r"out_quantised must be of dtype = float32"),
        (lambda: vq_nearest(z, book.clone().requires_grad_()), r"no input must require grad"),
    ]
    for call, message in refused:
        with pytest.raises(ContractError, match=message):
            call()


@pytest.mark.skipif(extension.native is None, reason=str(extension.missing))
def test_native_refusals() -> None:
    assert extension.native is not None
    z = torch.zeros(1, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    book, codes, view = torch.zeros(6, 4), torch.zeros(1, 3, 3, dtype=torch.int64), extension.view
    call = extension.native.vq_nearest
    with pytest.raises(ValueError, match="z must be a float tensor in NHWC order"):
        call(view(z.contiguous()), view(book), view(codes), view(z), 1)
    with pytest.raises(ValueError, match="quantised must be as z"):
        call(view(z), view(book), view(codes), view(z.half()), 1)
    with pytest.raises(ValueError, match=r"codebook must be \[K, D\]"):
        call(view(z), view(book[:, :3]), view(codes), view(z.clone()), 1)
    with pytest.raises(ValueError, match="codes must be int64"):
        call(view(z), view(book), view(codes.int()), view(z.clone()), 1)
