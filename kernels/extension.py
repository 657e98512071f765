"""The native module ``_C``, where it was built, and how tensors are handed to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

native: ModuleType | None
missing: str | None
try:
    from idm_fast import _C
except ImportError as error:
    native = None
    missing = (
        f"the native module idm_fast._C is missing ({error}); build it with: pip install --no-build-isolation -e ."
    )
    warnings.warn(
        f"idm_fast runs without its native module, slower: {error}. Reinstall it where a C++ compiler is found.",
        RuntimeWarning,
        stacklevel=2,
    )
else:
    native, missing = _C, None
    _C.cpu_isa()  # an IDM_FAST_CPU_ISA that cannot run here is an error now, not in the middle of a picture

_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int64: 3,
    torch.int8: 4,
    torch.int32: 5,
    torch.float8_e4m3fn: 6,
}

Layout = Any  # _C.Layout: what a View says but for the address, checked once and kept
View = tuple[int, int, tuple[int, ...], tuple[int, ...]]


class Prepared(NamedTuple):
    """A native call made ready: what ``prepare`` beside each native implementation makes of that one's arguments.

    ``arguments`` go to the function of ``_C``, or of ``_C.Program``, of the operation's name. They are addresses: they
    hold for as long as the tensors that ``prepare`` got, ``result`` and ``keep`` live and stay where they are.
    """

    arguments: tuple[Any, ...]
    result: Any = None  # what the implementation returns
    keep: tuple[Tensor, ...] = ()  # made on the way, such as packed weights


def require_native() -> ModuleType:
    """The native module, or the ImportError that tells dispatch why its backends are not available."""
    if native is None:
        raise ImportError(missing)
    return native


cuda_stand_in: ModuleType | None = None  # the tests' CUDA-on-CPU module, while they load copies of <op>/cuda.py


def require_cuda() -> ModuleType:
    """The native module with its CUDA kernels, or the ImportError that tells dispatch why there are none."""
    if cuda_stand_in is not None:
        return cuda_stand_in
    module = require_native()
    if not module.cuda_architectures:
        raise ImportError(
            "the native module was built without CUDA (it needs nvcc and looks for a driver); force it with:"
            " IDM_FAST_CMAKE_ARGS=-DIDM_FAST_CUDA=ON pip install --no-build-isolation -e ."
        )
    return module


def cuda_stream(tensor: Tensor) -> int:
    """The current stream of the tensor's device, as the address that CUDA kernels are launched with.

    Raises RuntimeError where another device is the current one: kernels would be launched there.
    """
    if not tensor.is_cuda:
        return 0
    current = torch.cuda.current_device()
    if tensor.device.index != current:
        raise RuntimeError(f"the current CUDA device must be that of the tensors = {tensor.device}, got cuda:{current}")
    return torch.cuda.current_stream(tensor.device).cuda_stream


def view(tensor: Tensor) -> View:
    """(address, dtype code, shape, strides in elements): all that native code learns of a tensor."""
    return tensor.data_ptr(), _CODES[tensor.dtype], tensor.shape, tensor.stride()


def layout(tensor: Tensor) -> Layout:
    """What ``view`` says of a tensor but for its address, for calls that come again: (data_ptr, layout) is a view."""
    return require_native().Layout(view(tensor))


KEPT_BYTES = 32 * 2**20  # glibc gives larger blocks back to the system when they are freed, and gets them anew


def fresh(tensor: Tensor) -> Tensor:
    """A tensor that has just been made, with large pages under it where the C library keeps no such block (CPU)."""
    if native is not None and tensor.device.type == "cpu" and tensor.nbytes >= KEPT_BYTES:
        native.huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def optional_view(tensor: Tensor | None) -> View | None:
    return None if tensor is None else view(tensor)


class Bound:
    """A prepared call that is made from Python many times, or recorded by a ``Program``.

    ``arguments`` are the tensors that it is to keep alive. ``threaded``: the last prepared argument is the number of
    threads, which is asked anew at each call. Returns what the implementation would.
    """

    __slots__ = ("_held", "_told", "function", "prepared", "threaded")

    def __init__(
        self, function: Callable[..., None], prepared: Prepared, arguments: tuple[Any, ...], threaded: bool = True
    ) -> None:
        made = require_native().Layout  # read faster than a view is
        told = prepared.arguments[:-1] if threaded else prepared.arguments
        self._told = [(a[0], made(a)) if isinstance(a, tuple) else a for a in told]
        self._held, self.function, self.prepared, self.threaded = arguments, function, prepared, threaded

    def __call__(self) -> Any:
        if self.threaded:
            self.function(*self._told, torch.get_num_threads())
        else:
            self.function(*self._told)
        return self.prepared.result


def binder(function: Callable[..., None], prepare: Callable[..., Prepared]) -> Callable[..., Bound]:
    """What ``dispatch.bound`` asks an implementation for, as its ``bind``."""
    return lambda *arguments: Bound(function, prepare(*arguments), arguments)
