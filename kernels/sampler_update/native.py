"""CPU kernel: csrc/sampler_update."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from idm_fast.kernels.extension import Prepared, binder, layout, optional_view, require_native, view
from idm_fast.kernels.sampler_update import contract

native = require_native()


def prepare(
    x: Tensor,  # [N, C, H, W] channels_last
    model_output: Tensor,  # [N, C, H, W] or [N, C f^2, H / f, W / f] channels_last
    history: Tensor,  # [N, C, H, W] channels_last
    table: Tensor,  # [T, 8]
    step: int | Tensor,
    seeds: Tensor,  # [N]
    network_input: Tensor | None = None,  # [N, C f^2, H / f, W / f] channels_last, or channels of such a tensor
    threshold: Tensor | None = None,  # [N]
    unshuffle: int = 1,
    base: Tensor | None = None,  # [N, C, H, W] channels_last
) -> Prepared:
    arguments = (
        view(x),
        view(model_output),
        view(history),
        view(table),
        0 if isinstance(step, Tensor) else step,
        view(step.reshape(1)) if isinstance(step, Tensor) else None,
        view(seeds),
        optional_view(network_input),
        optional_view(threshold),
        optional_view(base),
        unshuffle,
        torch.get_num_threads(),
    )
    return Prepared(arguments)


def sampler_update(
    x: Tensor,
    model_output: Tensor,
    history: Tensor,
    table: Tensor,
    step: int | Tensor,
    seeds: Tensor,
    network_input: Tensor | None = None,
    threshold: Tensor | None = None,
    unshuffle: int = 1,
    base: Tensor | None = None,
) -> None:
    call = prepare(x, model_output, history, table, step, seeds, network_input, threshold, unshuffle, base)
    native.sampler_update(*call.arguments)


def _prepare(
    run: Callable[..., None],
    x: Tensor,
    model_output: Tensor,
    history: Tensor,
    table: Tensor,
    step: int | Tensor,
    seeds: Tensor,
    network_input: Tensor | None,
    threshold: Tensor | None,
    unshuffle: int,
    base: Tensor | None,
) -> Callable[..., bool]:
    """``sampler_update`` for arguments that look the same: native code asks the rest, in a tenth of Python's time."""
    if isinstance(step, Tensor) or threshold is not None:
        known = (table, step, seeds, network_input, threshold, unshuffle, base)
        return contract.prepare(run, x, model_output, history, *known)
    of_x, of_output, of_history, of_table, of_seeds = map(layout, (x, model_output, history, table, seeds))
    of_input = None if network_input is None else layout(network_input)
    of_base = None if base is None else layout(base)
    call, threads = native.sampler_update, torch.get_num_threads

    def again(
        x: Tensor,
        model_output: Tensor,
        history: Tensor,
        table: Tensor,
        step: int,
        seeds: Tensor,
        network_input: Tensor | None,
        threshold: None,
        unshuffle: int,
        base: Tensor | None,
    ) -> bool:
        try:
            call(
                (x.data_ptr(), of_x),
                (model_output.data_ptr(), of_output),
                (history.data_ptr(), of_history),
                (table.data_ptr(), of_table),
                step,
                None,
                (seeds.data_ptr(), of_seeds),
                None if network_input is None else (network_input.data_ptr(), of_input),
                None,
                None if base is None else (base.data_ptr(), of_base),
                unshuffle,
                threads(),
            )
        except (ValueError, TypeError):  # nothing is written; the checks in Python say it better
            return False
        return True

    return again


sampler_update.prepare = _prepare  # type: ignore[attr-defined]  # what the public function asks a backend for
sampler_update.bind = binder(native.sampler_update, prepare)  # type: ignore[attr-defined]  # and dispatch.bound
