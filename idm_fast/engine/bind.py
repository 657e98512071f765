"""A node on its buffers -> a call without arguments: views, checks and the choice of a backend are made beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from idm_fast.engine import nodes
from idm_fast.engine.buffers import Buffers
from idm_fast.engine.nodes import Node, StatsValue, Value
from idm_fast.engine.weights import PackedWeights
from idm_fast.kernels.dispatch import Op
from idm_fast.ops import OPS

Call = Callable[[], object]


@dataclass(frozen=True)
class Bound:
    node: Node
    call: Call


def bind(node: Node, buffers: Buffers, weights: PackedWeights) -> Bound:
    """Raises ``BackendError`` where none of the allowed backends can run the node."""
    make: Any = _BINDERS[type(node)]
    backend, call = make(node, buffers, weights)
    return Bound(replace(node, backend=backend), call)


def _chosen(op: Op, device: torch.device, dtype: torch.dtype, *arguments: Any) -> tuple[str, Callable[..., Any]]:
    run = op.choose(device, dtype, *arguments)
    for name, row in op.backends.items():
        if row.why_not(device, dtype, forced=True) is None and row.run is run:
            return name, run
    raise AssertionError("what was chosen is a row of the table")


def _time_row(node: nodes.TimeRow, b: Buffers, _: PackedWeights) -> tuple[str, Call]:
    return "torch", partial(torch.index_select, b.rows, 0, b.step, out=b.row)


def _coefficients(node: nodes.Coefficients, b: Buffers, weights: PackedWeights) -> tuple[str, Call]:
    gamma, beta = weights.norm(node.norm)
    out, scale, shift = b.tensors[node.out], b.columns(node.scale), b.columns(node.shift)
    stats, skip_stats = b.stats[node.stats], None if node.skip_stats is None else b.stats[node.skip_stats]
    arguments = (stats, node.groups, gamma, beta, node.eps, scale, shift, skip_stats, out)
    name, run = _chosen(OPS["norm_coefficients"], out.device, torch.float32, *arguments)
    return name, partial(run, *arguments)


def _conv(node: nodes.Conv, b: Buffers, weights: PackedWeights) -> tuple[str, Call]:
    get = _getter(b)
    x, out = b.tensors[node.x], b.tensors[node.out]
    bias, with_stats = weights.total(node.bias), node.out_stats is not None
    arguments: tuple[Any, ...]
    if node.quantised:
        weight, scale = weights.quantised(node.weight)
        arguments = (
            x, weight, scale, b.row[:, slice(*node.activation)], bias, node.stride, node.upsample, get(node.skip),
            get(node.coefficients), node.silu, b.columns(node.time_shift), get(node.residual), with_stats, out,
        )  # fmt: skip
        name, run = _chosen(OPS["conv2d_int8"], x.device, x.dtype, *arguments)
        return name, _with_stats(partial(run, *arguments), node.out_stats, b)
    weight = weights.get(node.weight)
    shortcut_weight = None if node.shortcut_weight is None else weights.get(node.shortcut_weight)
    arguments = (
        x, weight, bias, node.stride, node.upsample, get(node.skip), get(node.coefficients), node.silu,
        get(node.shortcut), get(node.shortcut_skip), shortcut_weight, b.columns(node.time_shift), get(node.residual),
        with_stats, out,
    )  # fmt: skip
    name, run = _chosen(OPS["conv2d"], x.device, x.dtype, *arguments)
    return name, _with_stats(partial(run, *arguments), node.out_stats, b)


def _with_stats(call: Call, value: StatsValue | None, b: Buffers) -> Call:
    if value is None:
        return call
    first: Any = call()
    b.stats[value] = first[1]

    def run() -> None:
        made: Any = call()
        b.stats[value].partials.copy_(made[1].partials)

    return run


def _norm(node: nodes.Norm, b: Buffers, weights: PackedWeights) -> tuple[str, Call]:
    gamma, beta = weights.norm(node.norm)
    x, out = b.tensors[node.x], b.tensors[node.out]
    stats = b.stats[node.stats]
    arguments = (x, node.groups, gamma, beta, node.eps, None, None, True, None, stats, None, out)
    name, run = _chosen(OPS["group_norm_silu"], x.device, x.dtype, *arguments)
    return name, partial(run, *arguments)


def _attend(node: nodes.Attend, b: Buffers, _: PackedWeights) -> tuple[str, Call]:
    n, c, h, w = node.out.shape
    qkv = b.tensors[node.qkv].permute(0, 2, 3, 1)  # [N, H, W, 3 C], dense
    if node.order == "qkv_heads":
        q, k, v = qkv.reshape(n, h * w, 3, node.heads, c // node.heads).unbind(2)
    else:
        q, k, v = qkv.reshape(n, h * w, node.heads, 3, c // node.heads).unbind(3)
    out = b.tensors[node.out].permute(0, 2, 3, 1).reshape(n, h * w, node.heads, c // node.heads)
    arguments = (q, k, v, (c // node.heads) ** -0.5, out)
    name, run = _chosen(OPS["attention"], q.device, q.dtype, *arguments)
    return name, partial(run, *arguments)


def _pool(node: nodes.Pool, b: Buffers, _: PackedWeights) -> tuple[str, Call]:
    return "torch", partial(torch.ops.aten.avg_pool2d.out, b.tensors[node.x], [2, 2], out=b.tensors[node.out])


def _nearest(node: nodes.Nearest, b: Buffers, _: PackedWeights) -> tuple[str, Call]:
    x = b.tensors[node.x]
    n, c, h, w = x.shape
    cells = b.tensors[node.out].permute(0, 2, 3, 1).view(n, h, 2, w, 2, c)
    source = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(n, h, 2, w, 2, c)
    return "torch", partial(cells.copy_, source)


def _unshuffle(node: nodes.Unshuffle, b: Buffers, _: PackedWeights) -> tuple[str, Call]:
    x, out, f = b.tensors[node.x], b.tensors[node.out], node.factor
    n, c, h, w = x.shape
    # [N, h, f, w, f, C] -> channels (C, f, f): pixel_unshuffle's order.
    cells = x.permute(0, 2, 3, 1).view(n, h // f, f, w // f, f, c).permute(0, 1, 3, 5, 2, 4)
    return "torch", partial(out.permute(0, 2, 3, 1).view(n, h // f, w // f, c, f, f).copy_, cells)


def _update(node: nodes.Update, b: Buffers, _: PackedWeights) -> tuple[str, Call]:
    get = b.tensors
    answer, base = get[node.answer], None if node.base is None else get[node.base]
    arguments = (
        get[node.out_x], answer, get[node.out_history], b.coefficients, b.step, b.seeds, get[node.out_input], None,
        node.unshuffle, base,
    )  # fmt: skip
    name, run = _chosen(OPS["sampler_update"], answer.device, answer.dtype, *arguments)
    return name, partial(run, *arguments)


def _advance(node: nodes.Advance, b: Buffers, _: PackedWeights) -> tuple[str, Call]:
    return "torch", partial(b.step.add_, 1)


def _getter(b: Buffers) -> Callable[[Value | None], Tensor | None]:
    return lambda value: None if value is None else b.tensors[value]


_BINDERS: dict[type[Node], Any] = {
    nodes.TimeRow: _time_row,
    nodes.Coefficients: _coefficients,
    nodes.Conv: _conv,
    nodes.Norm: _norm,
    nodes.Attend: _attend,
    nodes.Pool: _pool,
    nodes.Nearest: _nearest,
    nodes.Unshuffle: _unshuffle,
    nodes.Update: _update,
    nodes.Advance: _advance,
}
