"""What a profile leaves behind: tables, a results file, a Chrome trace and a roofline picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from idm_fast.bench import plot
from idm_fast.bench.profile import Call, Profile, by_op
from idm_fast.bench.roofline import Ceilings
from idm_fast.bench.text import markdown
from idm_fast.files import atomic

CALLS = ("layer", "op", "backend", "us", "share", "MFLOP", "KB", "GFLOP/s", "of roof", "bound")
GROUPS = ("op", "backend", "launches", "us", "share", "GFLOP", "MB", "GFLOP/s", "GB/s", "of roof")


def call_table(profile: Profile, ceilings: Ceilings, most: int | None = None) -> str:
    """One line a call, the longest first."""
    calls = sorted(profile.calls, key=lambda call: -call.seconds)[:most]
    whole = sum(call.seconds for call in profile.calls)
    return markdown(CALLS, [_call_line(call, whole, ceilings) for call in calls], left=3)


def op_table(profile: Profile, ceilings: Ceilings) -> str:
    """One line an operation and backend, and the sum."""
    whole = sum(call.seconds for call in profile.calls)
    lines = [_group_line(*key, calls, whole, ceilings) for key, calls in by_op(profile.calls).items()]
    return markdown(GROUPS, [*lines, _group_line("all", "", profile.calls, whole, ceilings)], left=2)


def write_json(path: Path, profile: Profile, ceilings: Ceilings, about: dict[str, Any]) -> None:
    report = {
        **about, "what": profile.what, "ceilings": ceilings.as_json(), "ms_per_step": 1e3 * profile.step,
        "launches": profile.launches, "outside_of_calls": profile.between,
        "calls": [call.as_json(ceilings) for call in profile.calls],
    }  # fmt: skip
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")


def write_trace(path: Path, profile: Profile) -> None:
    """The calls one behind the other, with their medians, for chrome://tracing or ui.perfetto.dev."""
    events: list[dict[str, Any]] = []
    at = 0.0
    for call in profile.calls:
        about = {"backend": call.backend, "flops": call.flops, "bytes": call.bytes}
        events.append(
            {"name": f"{call.layer} {call.op}", "cat": call.op, "ph": "X", "ts": at, "dur": 1e6 * call.seconds,
             "pid": 0, "tid": 0, "args": about}
        )  # fmt: skip
        at += 1e6 * call.seconds
    with atomic(path) as temporary:
        temporary.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")


def write_roofline(path: Path, profile: Profile, ceilings: Ceilings, title: str) -> None:
    """FLOP/s over FLOPs per byte, one dot a call that computes products, one colour an operation."""
    points: plot.Series = {}
    for call in profile.calls:
        if call.flops and call.bytes:
            points.setdefault(call.op, []).append((call.flops / call.bytes, call.flops / call.seconds))
    fastest = max(ceilings.flops_per_s[dtype] for dtype in {call.compute for call in profile.calls})
    with atomic(path) as temporary:
        plot.roofline(temporary, points, fastest, ceilings.bytes_per_s, title)


def _call_line(call: Call, whole: float, ceilings: Ceilings) -> list[str]:
    roof, bound = call.roof(ceilings)
    return [
        call.layer, call.op, call.backend, f"{1e6 * call.seconds:.1f}", f"{call.seconds / whole:.1%}",
        f"{call.flops / 1e6:.1f}", f"{call.bytes / 1e3:.0f}", f"{call.flops / call.seconds / 1e9:.1f}",
        f"{roof / call.seconds:.0%}", bound,
    ]  # fmt: skip


def _group_line(op: str, backend: str, calls: Sequence[Call], whole: float, ceilings: Ceilings) -> list[str]:
    seconds, flops, moved = (sum(getattr(call, name) for call in calls) for name in ("seconds", "flops", "bytes"))
    roof = sum(call.roof(ceilings)[0] for call in calls)
    return [
        op, backend, str(sum(call.launches for call in calls)), f"{1e6 * seconds:.1f}", f"{seconds / whole:.1%}",
        f"{flops / 1e9:.2f}", f"{moved / 1e6:.1f}", f"{flops / seconds / 1e9:.1f}", f"{moved / seconds / 1e9:.1f}",
        f"{roof / seconds:.0%}",
    ]  # fmt: skip
