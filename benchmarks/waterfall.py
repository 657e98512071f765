"""What each optimisation is worth: ``python benchmarks/waterfall.py [--preset sr3-128] [--json FILE]``.

One row each, switched on in turn and kept; all rows take turns in one process, on the same weights and noise. Compare
rows of one run only. Rows that a device has not got (int8 on CUDA, fp8 elsewhere than on sm_90)
are named and left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from idm_fast.bench import ours, roofline
from idm_fast.bench.machine import machine
from idm_fast.bench.peers.torch_peers import eager
from idm_fast.bench.rows import PAUSE
from idm_fast.bench.text import markdown, number, percent
from idm_fast.bench.timing import Candidate, interleaved
from idm_fast.bench.workload import DTYPES, Workload, workload
from idm_fast.engine import plan as engine_plan
from idm_fast.engine.lossy import TIERS, why_not
from idm_fast.engine.lower import Lowered, lower
from idm_fast.engine.nodes import Conv, Node, Resample, Value, Weight
from idm_fast.errors import IdmFastError
from idm_fast.files import atomic
from idm_fast.ops import OPS
from idm_fast.registry import Target

HEAD = ("optimisation", "ms/step", "steps/s", "launches", "of roof", "PSNR", "so far", "this one")
Rewrite = Callable[[Lowered, Workload], Lowered]


@dataclass(frozen=True)
class Made:
    run: Callable[[], Tensor]
    launches: int | None
    dtype: str
    whole: bool = True  # the whole network runs at each evaluation: who leaves some of it out has another roof


@dataclass(frozen=True)
class Stage:
    """``make(workload, low)``: ``low`` is the low-precision dtype of the run. ``devices`` that have it."""

    name: str
    make: Callable[[Workload, str], Made]
    devices: tuple[str, ...] = ("cpu", "cuda")


def without_phases(lowered: Lowered, work: Workload) -> Lowered:
    """Every nearest 2x materialised, with the full 3x3 convolution behind it."""
    step: list[Node] = []
    for node in lowered.step:
        if isinstance(node, Conv) and node.upsample:
            n, c, h, w = node.x.shape
            large = Value(f"{node.layer}.large", (n, c, 2 * h, 2 * w), node.x.dtype)
            step.append(Resample(layer=node.layer, x=node.x, up=True, out=large))
            node = replace(node, x=large, upsample=False, weight=Weight(node.weight.name, "conv"))
        step.append(node)
    return replace(lowered, step=tuple(step))


def without_hoisting(lowered: Lowered, work: Workload) -> Lowered:
    """The stem over picture and condition at every step."""
    half = next((n for n in lowered.setup if isinstance(n, Conv)), None)
    if half is None:
        return lowered
    whole = Weight("stem.weight", "conv")
    first = work.config.unet.concat_order == "x_cond"

    def one(node: Node) -> Node:
        if not (isinstance(node, Conv) and node.residual is half.out):
            return node
        x, skip = (node.x, half.x) if first else (half.x, node.x)
        return replace(node, x=x, skip=skip, weight=whole, bias=half.bias, residual=None)

    setup = tuple(node for node in lowered.setup if node is not half)
    return replace(lowered, setup=setup, step=tuple(one(node) for node in lowered.step))


@contextmanager
def torch_convolutions() -> Iterator[None]:
    """Convolutions by torch's row of the table alone; a norm in front is then a pass of its own."""
    op = OPS["conv2d"]
    with patch.object(op, "backends", {name: op.backends[name] for name in ("torch", "reference")}):
        op._forget()
        yield
    op._forget()


def engine(
    *rewrites: Rewrite,
    torch_convs: bool = False,
    program: bool = False,
    dtype: str | None = None,
    cache_every: int = 1,
) -> Callable[[Workload, str], Made]:
    """A stage that compiles the plan with something switched off again. ``program``: the calls run without Python in
    between, as a native program on a CPU and as a graph on CUDA."""

    def make(work: Workload, low: str) -> Made:
        with ExitStack() as stack:
            if torch_convs:
                stack.enter_context(torch_convolutions())
            if not program:
                stack.enter_context(patch.object(engine_plan, "joined", list))

            def changed(*args: Any, **options: Any) -> Lowered:
                lowered = lower(*args, **options)
                for rewrite in rewrites:
                    lowered = rewrite(lowered, work)
                return lowered

            stack.enter_context(patch("idm_fast.engine.engine.lower", changed))
            compiled = ours.engine(work, dtype or low, graph=program, cache_every=cache_every)
        return Made(lambda: ours.run(compiled, work), compiled.launches, dtype or low, cache_every == 1)

    return make


def _eager(work: Workload, dtype: str) -> Made:
    built = eager(work, dtype, 1)
    return Made(lambda: work.run(built.denoise, built.network_dtype), built.launches, dtype)


def _modules(work: Workload, low: str) -> Made:
    built = ours.modules(work, low, 1)
    return Made(lambda: work.run(built.denoise, built.network_dtype), None, low)


def eight_bits(device: torch.device) -> str | None:
    """The 8-bit tier of the device."""
    return next((tier for tier in TIERS if why_not(tier, device) is None), None)


def _reusing(work: Workload, low: str) -> Made:
    """After all that the device has."""
    dtype = eight_bits(work.device) or low
    return engine(program=True, dtype=dtype, cache_every=2)(work, low)


STAGES = (
    Stage("eager, float32", lambda work, low: _eager(work, "fp32")),
    Stage("low precision, channels-last", _eager),
    Stage("fused norms and attention", _modules),
    Stage("engine: buffers, tables, statistics", engine(without_phases, without_hoisting, torch_convs=True)),
    Stage("our convolutions, norm and sums inside", engine(without_phases, without_hoisting)),
    Stage("nearest 2x as four phases", engine(without_hoisting)),
    Stage("the condition's half once a walk", engine()),
    Stage("no Python between calls: program, graph", engine(program=True)),
    Stage("int8 (lossy)", engine(program=True, dtype="int8"), ("cpu",)),
    Stage("fp8 (lossy)", engine(program=True, dtype="fp8"), ("cuda",)),
    Stage("inner levels every second step (lossy)", _reusing),
)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="idm-128", help="see idm-fast bench --help (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, help="side in pixels (default: the preset's)")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of all rows together (default: %(default)s)")
    parser.add_argument("--walks", type=int, default=5, help="at least, of each row (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="results file to write")
    return parser.parse_args(arguments)


@torch.no_grad()
def rows(work: Workload, low: str, ceilings: roofline.Ceilings, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One a stage, in order; ``ms_per_step`` is None with the reason in ``note`` for one that did not run."""
    made: dict[str, Made] = {}
    notes: dict[str, str] = {}
    quality: dict[str, float] = {}
    truth: Tensor | None = None
    for stage in STAGES:
        if work.device.type not in stage.devices:
            notes[stage.name] = f"not on {work.device.type}"
            continue
        try:
            each = stage.make(work, low)
            result = each.run()
            truth = result if stage is STAGES[0] else truth
            if truth is not None:
                quality[stage.name] = work.psnr(result, truth)
            made[stage.name] = each
        except Exception as error:  # the others still say something
            notes[stage.name] = " ".join(str(error).split())[:200] or type(error).__name__
    spreads = interleaved(
        {name: Candidate(lambda _, run=each.run: run()) for name, each in made.items()},  # type: ignore[misc]
        str(work.device), args.seconds, least=args.walks, warm_up=1, wall=True, pause=PAUSE,
    )  # fmt: skip
    found = []
    for stage in STAGES:
        row: dict[str, Any] = {"name": stage.name, "preset": work.preset, "batch": work.batch, "steps": work.steps}
        if stage.name not in made:
            found.append({**row, "ms_per_step": None, "note": notes[stage.name]})
            continue
        each, step = made[stage.name], spreads[stage.name].median / work.steps
        roof = ceilings.network(work.layers, DTYPES[each.dtype])
        found.append(
            {
                **row, "dtype": each.dtype, "ms_per_step": 1e3 * step, "steps_per_second": 1 / step,
                "p20_ms": 1e3 * spreads[stage.name].p20 / work.steps,
                "p80_ms": 1e3 * spreads[stage.name].p80 / work.steps,
                "launches": each.launches, "note": "",
                "roofline_fraction": roof / step if each.whole else None, "psnr_to_fp32": quality.get(stage.name),
            }
        )  # fmt: skip
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """As markdown; "so far": times the first row, "this one": times the row above."""
    timed = [row for row in found if row["ms_per_step"] is not None]
    lines = []
    for i, row in enumerate(timed):
        ms, above = row["ms_per_step"], timed[max(0, i - 1)]["ms_per_step"]
        lines.append(
            [
                row["name"], number(ms), number(row["steps_per_second"], 1),
                "-" if row["launches"] is None else str(row["launches"]), percent(row["roofline_fraction"]),
                number(row["psnr_to_fp32"], 1), f"{timed[0]['ms_per_step'] / ms:.2f}x", f"{above / ms:.2f}x",
            ]
        )  # fmt: skip
    missing = [f"{row['name']}: {row['note']}" for row in found if row["ms_per_step"] is None]
    return "\n".join([markdown(HEAD, lines), *(["", "Not timed:", *missing] if missing else [])])


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    try:
        device, default = Target(args.device).resolved()
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        work = workload(args.preset, batch=args.batch, size=args.size, steps=args.steps, device=device)
    except IdmFastError as error:
        print(f"waterfall: {error}", file=sys.stderr)
        return 2
    low = next(name for name, value in DTYPES.items() if value == default)
    kinds = [DTYPES[name] for name in dict.fromkeys(["fp32", low, eight_bits(device) or low])]
    ceilings = roofline.measure(str(device), kinds, cached=True)
    found = rows(work, low, ceilings, args)
    print(f"{args.preset} {work.size[0]} x {work.size[1]}, batch {work.batch}, {work.steps} steps, {work.weights}\n")
    print(table(found))
    if args.json:
        report = {"machine": machine(device), "ceilings": ceilings.as_json(), "rows": found}
        with atomic(args.json) as path:
            path.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
