"""A node on its buffers -> a call without arguments: views, checks and the choice of a backend are made beforehand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from idm_fast.diffusion.table import COLUMNS
from idm_fast.engine import nodes
from idm_fast.engine.autotune import Autotuner
from idm_fast.engine.buffers import Buffers
from idm_fast.engine.nodes import Node, Value
from idm_fast.engine.weights import PackedWeights
from idm_fast.kernels import dispatch
from idm_fast.kernels.channel_stats import ChannelStats
from idm_fast.kernels.extension import native
from idm_fast.kernels.program import bind_advance, bind_table_row
from idm_fast.ops import OPS

Call = Callable[[], object]
Arguments = tuple[Any, ...]  # of an implementation, in its order


@dataclass(frozen=True)
class BoundNode:
    node: Node
    call: Call


class Binder:
    """Binds the nodes of one plan. Raises ``BackendError`` where none of the allowed backends can run a node."""

    def __init__(self, buffers: Buffers, weights: PackedWeights, tuner: Autotuner) -> None:
        self._buffers, self._weights, self._tuner = buffers, weights, tuner

    def bind(self, node: Node) -> BoundNode:
        copy = _COPIES.get(type(node))
        if copy is not None:
            name, call = copy(node, self._buffers)
            return BoundNode(replace(node, backend=name), call)
        name, run, arguments = self._chosen(node)
        return BoundNode(replace(node, backend=name), dispatch.bound(run, *arguments))

    def pieces(self, node: nodes.Conv) -> int:
        """Into how many pieces the statistics of ``node`` are cut."""
        _, run, arguments = self._chosen(node)
        return dispatch.pieces(run, *arguments)

    def _chosen(self, node: Node) -> tuple[str, Callable[..., Any], Arguments]:
        """(name of the backend, its implementation, what that takes)."""
        dtype, arguments = arguments_of(node, self._buffers, self._weights)
        device = self._weights.device
        wanted = self._tuner.choose(node.op, device, dtype, arguments)
        op = OPS[node.op]
        with nullcontext() if wanted is None else dispatch.use_backend(wanted):
            run = op.choose(device, dtype, *arguments)
        for name, row in op.backends.items():
            if row.why_not(device, dtype, forced=True) is None and row.run is run:
                return name, run, arguments
        raise AssertionError("what was chosen is a row of the table")


def arguments_of(node: Node, buffers: Buffers, weights: PackedWeights) -> tuple[torch.dtype, Arguments]:
    """(the type that chooses the backend, what the implementation takes)."""
    make: Any = _ARGUMENTS[type(node)]
    found: tuple[torch.dtype, Arguments] = make(node, buffers, weights)
    return found


def _coefficients(node: nodes.Coefficients, b: Buffers, weights: PackedWeights) -> tuple[torch.dtype, Arguments]:
    gamma, beta = weights.norm(node.norm)
    skip_stats = None if node.skip_stats is None else b.stats[node.skip_stats]
    scale, shift = b.columns(node.scale), b.columns(node.shift)
    out = b.tensors[node.out]
    return torch.float32, (b.stats[node.stats], node.groups, gamma, beta, node.eps, scale, shift, skip_stats, out)


def _conv(node: nodes.Conv, b: Buffers, weights: PackedWeights) -> tuple[torch.dtype, Arguments]:
    def get(value: Value | None) -> Tensor | None:
        return None if value is None else b.tensors[value]

    x, bias = b.tensors[node.x], weights.total(node.bias)
    same = (node.stride, node.upsample, get(node.skip), get(node.coefficients), node.silu)
    # Without room for them yet: somebody asks how much they need.
    stats: ChannelStats | None = None if node.out_stats is None else b.stats.get(node.out_stats)
    ends = (b.columns(node.time_shift), get(node.residual), node.out_stats is not None, b.tensors[node.out], stats)
    if node.quantised is not None and node.activation is not None:
        weight, scale = weights.quantised(node.weight, node.quantised)
        return x.dtype, (x, weight, scale, b.row[:, slice(*node.activation)], bias, *same, *ends)
    shortcut_weight = None if node.shortcut_weight is None else weights.get(node.shortcut_weight)
    shortcut = (get(node.shortcut), get(node.shortcut_skip), shortcut_weight)
    return x.dtype, (x, weights.get(node.weight), bias, *same, *shortcut, *ends)


def _norm(node: nodes.Norm, b: Buffers, weights: PackedWeights) -> tuple[torch.dtype, Arguments]:
    gamma, beta = weights.norm(node.norm)
    x, out, stats = b.tensors[node.x], b.tensors[node.out], b.stats[node.stats]
    return x.dtype, (x, node.groups, gamma, beta, node.eps, None, None, True, None, stats, None, out)


def _attend(node: nodes.Attend, b: Buffers, _: PackedWeights) -> tuple[torch.dtype, Arguments]:
    n, c, h, w = node.out.shape
    width = c // node.heads
    qkv = b.tensors[node.qkv].permute(0, 2, 3, 1)  # [N, H, W, 3 C], dense
    if node.order == "qkv_heads":
        q, k, v = qkv.view(n, h * w, 3, node.heads, width).unbind(2)
    else:
        q, k, v = qkv.view(n, h * w, node.heads, 3, width).unbind(3)
    out = b.tensors[node.out].permute(0, 2, 3, 1).view(n, h * w, node.heads, width)
    return q.dtype, (q, k, v, width**-0.5, out)


def _update(node: nodes.Update, b: Buffers, _: PackedWeights) -> tuple[torch.dtype, Arguments]:
    x, history, entry = (b.tensors[value] for value in (node.out_x, node.out_history, node.out_input))
    answer, base = b.tensors[node.answer], None if node.base is None else b.tensors[node.base]
    return answer.dtype, (x, answer, history, b.coefficients, b.step, b.seeds, entry, None, node.unshuffle, base)


def _resample(node: nodes.Resample, b: Buffers, _: PackedWeights) -> tuple[torch.dtype, Arguments]:
    x = b.tensors[node.x]
    return x.dtype, (x, node.up, b.tensors[node.out])


def _nearest(node: nodes.Nearest, b: Buffers, weights: PackedWeights) -> tuple[torch.dtype, Arguments]:
    x, out, codes = (b.tensors[value] for value in (node.x, node.out, node.out_codes))
    return x.dtype, (x, weights.get(node.codebook), codes, out)


_ARGUMENTS: dict[type[Node], Any] = {
    nodes.Coefficients: _coefficients,
    nodes.Conv: _conv,
    nodes.Norm: _norm,
    nodes.Attend: _attend,
    nodes.Resample: _resample,
    nodes.Update: _update,
    nodes.Nearest: _nearest,
}


# What no operation does: moves, and counting. (name of who does it, call)


def _time_row(_: Any, b: Buffers) -> tuple[str, Call]:
    if _native(b):
        return "cpu", bind_table_row(b.rows, b.step, b.row)
    return "torch", partial(torch.index_select, b.rows, 0, b.step, out=b.row)


def _advance(_: Any, b: Buffers) -> tuple[str, Call]:
    return ("cpu", bind_advance(b.step)) if _native(b) else ("torch", partial(b.step.add_, 1))


def _native(b: Buffers) -> bool:
    forced = dispatch.forced_backends()
    return b.step.device.type == "cpu" and native is not None and (not forced or "cpu" in forced)


def _unshuffle(node: nodes.Unshuffle, b: Buffers) -> tuple[str, Call]:
    x, out, f = b.tensors[node.x], b.tensors[node.out], node.factor
    n, c, h, w = x.shape

    def cells(image: Tensor) -> Tensor:
        """[n, h, f, w, f, C] -> channels (C, f, f): pixel_unshuffle's order."""
        seen = image.permute(0, 2, 3, 1).view(-1, h // f, f, w // f, f, c).permute(0, 1, 3, 5, 2, 4)
        return seen.flip(1, 2) if node.turned else seen

    if _slow_to_copy(node, x):
        return "torch", _by_number(x, out, cells)
    inner = out.permute(0, 2, 3, 1).view(n, h // f, w // f, c, f, f)
    if node.turned:  # no view of torch runs backwards
        return "torch", lambda: inner.copy_(cells(x))
    return "torch", partial(inner.copy_, cells(x))


def _shuffle(node: nodes.Shuffle, b: Buffers) -> tuple[str, Call]:
    x, out, f = b.tensors[node.x], b.tensors[node.out], node.factor
    n, c, h, w = out.shape

    def cells(image: Tensor) -> Tensor:
        """[n, h, w, C, f, f] -> rows (h, f) and columns (w, f)."""
        seen = image.permute(0, 2, 3, 1).view(-1, h // f, w // f, c, f, f).permute(0, 1, 4, 2, 5, 3)
        return seen.flip(1, 3) if node.turned else seen

    if _slow_to_copy(node, x):
        return "torch", _by_number(x, out, cells)
    outer = out.permute(0, 2, 3, 1).view(n, h // f, f, w // f, f, c)
    if node.turned:
        return "torch", lambda: outer.copy_(cells(x))
    return "torch", partial(outer.copy_, cells(x))


def _slow_to_copy(node: nodes.Unshuffle | nodes.Shuffle, x: Tensor) -> bool:
    """A CPU copies runs of a few elements: an image of 128 px takes it 0.23 ms, and element by element 0.02 ms."""
    return x.device.type == "cpu" and (node.factor > 1 or node.turned)


def _by_number(x: Tensor, out: Tensor, cells: Callable[[Tensor], Tensor]) -> Call:
    """``out`` = ``cells(x)``, whose elements lie in ``out``'s order, by their numbers in an image of ``x``."""
    _, c, h, w = x.shape
    numbers = torch.arange(c * h * w, dtype=torch.int32, device=x.device).view(1, h, w, c).permute(0, 3, 1, 2)
    order = cells(numbers).reshape(-1)
    rounded = torch.empty(c * h * w, dtype=out.dtype, device=x.device)
    # An image at a time, so that what is held besides does not grow with the batch.
    images = [(x[i].permute(1, 2, 0).view(-1), out[i].permute(1, 2, 0).view(-1)) for i in range(len(x))]

    def call() -> None:
        for source, target in images:
            torch.index_select(rounded.copy_(source), 0, order, out=target)

    return call


def _turn(node: nodes.Turn, b: Buffers) -> tuple[str, Call]:
    x, out = b.tensors[node.x], b.tensors[node.out]
    return "torch", lambda: out.copy_(x.flip(2, 3))


def _spread_noise(node: nodes.SpreadNoise, b: Buffers) -> tuple[str, Call]:
    v, history, scratch = (b.tensors[value] for value in (node.v, node.out_history, node.out_scratch))
    drawing = torch.zeros_like(b.coefficients)  # a row for each step: the update's noise is that of the row's number
    drawing[:, COLUMNS.index("s")] = 1
    arguments = (history, v, scratch, drawing, b.step, b.seeds, None, None, node.unshuffle, None)
    draw = dispatch.bound(OPS["sampler_update"].choose(v.device, v.dtype, *arguments), *arguments)
    n, c, h, w = history.shape
    f = node.unshuffle
    # As v's channels (C, f, f) lie in the image.
    cells = history.permute(0, 2, 3, 1).view(n, h // f, f, w // f, f, c).permute(0, 1, 3, 5, 2, 4)
    log_gain = v.permute(0, 2, 3, 1).view(n, h // f, w // f, c, f, f)

    def call() -> None:
        history.zero_()  # drawing adds to 0 times what was there, which at first may be anything
        draw()
        spread = b.coefficients.index_select(0, b.step)[0, COLUMNS.index("spread")]
        cells.mul_(torch.exp(spread * log_gain.float()))

    return "torch", call


_COPIES: dict[type[Node], Any] = {
    nodes.SpreadNoise: _spread_noise,
    nodes.TimeRow: _time_row,
    nodes.Advance: _advance,
    nodes.Unshuffle: _unshuffle,
    nodes.Shuffle: _shuffle,
    nodes.Turn: _turn,
}
