# The native module. A View is (data_ptr, dtype code, shape, strides in elements), or (data_ptr, Layout): see
# kernels/extension.py.
# Every function checks its arguments (ValueError) before it writes, and releases the GIL while it computes.

class Layout:
    def __init__(self, view: tuple[int, int, tuple[int, ...], tuple[int, ...]], /) -> None: ...

View = tuple[int, int, tuple[int, ...], tuple[int, ...]] | tuple[int, Layout]

class Program:
    # Every function below that returns nothing and is no conv2d*_pack is also a method here, which records the call.
    def __init__(self) -> None: ...
    def run(self, repeats: int = 1, threads: int = 0) -> None: ...
    def __len__(self) -> int: ...
    @property
    def names(self) -> list[str]: ...
    def table_row(self, table: View, counter: View, out: View, /) -> None: ...
    def advance(self, counter: View, by: int, /) -> None: ...

def attention(q: View, k: View, v: View, out: View, scale: float, threads: int, /) -> None: ...
def group_norm_silu(
    x: View,
    out: View,
    weight: View | None,
    bias: View | None,
    scale: View | None,
    shift: View | None,
    skip: View | None,
    partials: View | None,
    counts: View | None,
    skip_partials: View | None,
    skip_counts: View | None,
    groups: int,
    eps: float,
    silu: bool,
    threads: int,
    /,
) -> None: ...
def channel_stats(x: View, partials: View, counts: View, piece_rows: int, threads: int, /) -> None: ...
def norm_coefficients(
    partials: View,
    counts: View,
    skip_partials: View | None,
    skip_counts: View | None,
    weight: View | None,
    bias: View | None,
    scale: View | None,
    shift: View | None,
    groups: int,
    eps: float,
    out: View,
    threads: int,
    /,
) -> None: ...
def sampler_update(
    x: View,
    model_output: View,
    history: View,
    table: View,
    step: int,
    counter: View | None,
    seeds: View,
    network_input: View | None,
    threshold: View | None,
    base: View | None,
    unshuffle: int,
    threads: int,
    /,
) -> None: ...
def dynamic_threshold(
    x: View,
    model_output: View,
    table: View,
    step: int,
    counter: View | None,
    quantile: float,
    out: View,
    threads: int,
    /,
) -> None: ...
def table_row(table: View, counter: View, out: View, /) -> None: ...
def advance(counter: View, by: int, /) -> None: ...
def philox_normal(out: View, seeds: View, step: int, threads: int, /) -> None: ...
def conv2d(
    x: View,
    skip: View | None,
    coefficients: View | None,
    silu: bool,
    weight: View,
    kernel: int,
    stride: int,
    upsample: bool,
    bias: View | None,
    shortcut: View | None,
    shortcut_skip: View | None,
    shortcut_weight: View | None,
    time_shift: View | None,
    residual: View | None,
    out: View,
    partials: View | None,
    counts: View | None,
    threads: int,
    /,
) -> None: ...
def conv2d_pack(weight: View, matrices: int, cout: int, taps: int, channels: int, packed: View, /) -> None: ...
def conv2d_packed_bytes(dtype: int, matrices: int, cout: int, taps: int, channels: int, /) -> int: ...
def conv2d_block_rows(dtype: int, rows: int, cols: int, channels: int, kernel: int, stride: int, /) -> int: ...
def resample2x(x: View, up: bool, out: View, threads: int, /) -> None: ...
def vq_nearest(z: View, codebook: View, codes: View, quantised: View, threads: int, /) -> None: ...
def conv2d_int8(
    x: View,
    skip: View | None,
    coefficients: View | None,
    silu: bool,
    weight: View,
    weight_scale: View,
    activation: View,
    kernel: int,
    stride: int,
    upsample: bool,
    bias: View | None,
    time_shift: View | None,
    residual: View | None,
    out: View,
    partials: View | None,
    counts: View | None,
    threads: int,
    /,
) -> None: ...
def conv2d_int8_pack(weight: View, matrices: int, cout: int, taps: int, channels: int, packed: View, /) -> None: ...
def conv2d_int8_packed_bytes(matrices: int, cout: int, taps: int, channels: int, /) -> int: ...
def conv2d_int8_block_rows(rows: int, cols: int, channels: int, kernel: int, stride: int, /) -> int: ...
def huge_pages(address: int, bytes: int, /) -> None: ...
def cpu_isa() -> str: ...
def cpu_isas() -> list[str]: ...
def set_cpu_isa(name: str, /) -> None: ...
def threads_runtime() -> str: ...

# What the CUDA kernels were compiled for; "" where there are none, and then csrc/cuda_bindings.h is not bound either.
cuda_architectures: str

def attention_cuda(
    q: View, k: View, v: View, out: View, workspace: View | None, scale: float, stream: int, /
) -> None: ...
def attention_cuda_splits(samples: int, length: int, heads: int, d: int, keys: int, /) -> int: ...
def selftest_shuffles(out: View, stream: int, /) -> None: ...
def selftest_row_sums(x: View, out: View, stream: int, /) -> None: ...
def selftest_matmul(a: View, b: View, out: View, transposed: bool, stream: int, /) -> None: ...
