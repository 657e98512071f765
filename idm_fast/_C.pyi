# The native module. A View is (data_ptr, dtype code, shape, strides in elements): see kernels/extension.py.
# Every function checks its arguments (ValueError) before it writes, and releases the GIL while it computes.

View = tuple[int, int, tuple[int, ...], tuple[int, ...]]

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
    seeds: View,
    network_input: View | None,
    threads: int,
    /,
) -> None: ...
def philox_normal(out: View, seeds: View, step: int, threads: int, /) -> None: ...
def cpu_isa() -> str: ...
def cpu_isas() -> list[str]: ...
def set_cpu_isa(name: str, /) -> None: ...
def threads_runtime() -> str: ...
