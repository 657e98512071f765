"""One workload, everybody who runs it, in turns: the rows of the results file."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from idm_fast.bench import ours
from idm_fast.bench.machine import used_bytes
from idm_fast.bench.peers import PEERS, Peer
from idm_fast.bench.peers.public_peer import public
from idm_fast.bench.plain import plain
from idm_fast.bench.roofline import Ceilings
from idm_fast.bench.timing import Candidate, Spread, interleaved
from idm_fast.bench.work import total_flops
from idm_fast.bench.workload import DTYPES, Workload
from idm_fast.engine.lossy import TIERS
from idm_fast.errors import IdmFastError

OURS = "idm_fast"
PAUSE = 0.02  # seconds: longer than the thread pools of these libraries spin
ROUNDING_DB = 6.0  # our error may be twice that of plain torch in the same dtype ...
SOUND_DB = 80.0  # ... or below a ten-thousandth of the range
EXACT_DB = 110.0  # float32 on a CPU: 136 to 145 dB are usual, a tenth more in an attention's scale gives 85
Say = Callable[[str], None]


@dataclass(frozen=True)
class Runner:
    """One who runs the workload: ``run()`` is a whole walk. ``psnr``: against float32, None for another network."""

    name: str
    dtype: str
    run: Callable[[], Tensor]
    launches: int | None
    psnr: float | None
    note: str
    gflop: float
    memory: int | None
    engine_memory: dict[str, int] | None
    build_seconds: float
    lossy: bool = False
    whole: bool = True  # the whole network runs at each evaluation


@dataclass
class Measured:
    rows: list[dict[str, Any]] = field(default_factory=list)
    absent: list[dict[str, str]] = field(default_factory=list)  # who did not run, and why


@dataclass(frozen=True)
class Asked:
    """``dtypes`` of ours (fp32, bf16, fp16, int8, fp8); ``peers`` by name; ``seconds`` for all runners of a workload;
    ``least`` >= 2 timed walks each; ``cache_every`` of ours, as in ``EngineOptions``."""

    dtypes: Sequence[str]
    peers: Sequence[str] = ()
    seconds: float = 5.0
    least: int = 5
    warm_up: int = 1
    threads: int = 1
    backend: str | None = None
    cache_every: int = 1


@torch.no_grad()
def measure(workload: Workload, asked: Asked, ceilings: Ceilings, say: Say = lambda text: None) -> Measured:
    """Builds every runner, judges it, and times those that are right in turns."""
    device, found = workload.device, Measured()
    truth = _walk(workload, "fp32")
    gflop = total_flops(workload.layers) / 1e9
    runners: list[Runner] = []

    def attempt(name: str, dtype: str, make: Callable[[], Runner]) -> None:
        say(f"{workload.preset} batch {workload.batch}: preparing {name} {dtype}")
        try:
            runners.append(make())
        except Exception as error:  # a peer may fail in any way; the others still run
            text = " ".join(str(error).split())[:300] or type(error).__name__
            found.absent.append({"name": name, "preset": workload.preset, "dtype": dtype, "reason": text})

    for dtype in asked.dtypes:
        attempt(OURS, dtype, lambda: _ours(workload, dtype, asked, truth, gflop))  # noqa: B023
    floats = [dtype for dtype in asked.dtypes if dtype not in TIERS]
    for peer in PEERS:
        if peer.name not in asked.peers:
            continue
        reason = peer.why_not(device)
        if reason is not None:
            found.absent.append({"name": peer.name, "preset": workload.preset, "dtype": "", "reason": reason})
            continue
        for dtype in peer.runs_at(floats, device):
            attempt(peer.name, dtype, lambda: _peer(peer, workload, dtype, asked, truth, gflop))  # noqa: B023
    if runners:
        say(f"{workload.preset} batch {workload.batch}: timing {len(runners)} in turns")
        spreads = interleaved(
            {f"{i}": Candidate(lambda _, run=runner.run: run()) for i, runner in enumerate(runners)},  # type: ignore[misc]
            str(device), asked.seconds, least=asked.least, warm_up=asked.warm_up, wall=True, pause=PAUSE,
        )  # fmt: skip
        for i, runner in enumerate(runners):
            found.rows.append(_row(workload, runner, spreads[f"{i}"], ceilings))
    return found


def check_peers(names: Sequence[str]) -> list[str]:
    """The names themselves, all for none; ``IdmFastError`` for one that nobody has."""
    known = [peer.name for peer in PEERS]
    for name in names:
        if name not in known:
            raise IdmFastError(f"--peers must be some of {', '.join(known)}, got {name!r}")
    return list(names) or known


def _ours(workload: Workload, dtype: str, asked: Asked, truth: Tensor, gflop: float) -> Runner:
    before, began = used_bytes(workload.device), time.perf_counter()
    made = ours.engine(workload, dtype, asked.backend, cache_every=asked.cache_every)
    built_in = time.perf_counter() - began
    result = ours.run(made, workload)
    memory, held = _grown(before, workload.device), made.memory()
    quality, reuse = workload.psnr(result, truth), asked.cache_every
    if dtype not in TIERS and reuse == 1:
        _judge(workload, dtype, quality, truth, asked)
    note = "" if reuse == 1 else f"lossy: inner levels at every {reuse}. evaluation"
    parts = {"weights": held.weights, "workspace": held.workspace, "graph_pool": held.graph_pool}
    return Runner(
        OURS, dtype, lambda: ours.run(made, workload), made.launches, quality, note, gflop, memory, parts, built_in,
        lossy=dtype in TIERS or reuse > 1, whole=reuse == 1,
    )  # fmt: skip


def _judge(workload: Workload, dtype: str, quality: float, truth: Tensor, asked: Asked) -> None:
    """Raises where our result is wrong, so that it is not timed."""
    if dtype == "fp32":
        allowed = EXACT_DB if workload.device.type == "cpu" else SOUND_DB
        if quality < allowed:  # a deep network: no more can be asked than torch gives that sums in another order
            again = public(workload, dtype, asked.threads)
            reached = workload.psnr(workload.run(again.denoise, again.network_dtype), truth)
            allowed = min(allowed, reached - ROUNDING_DB)
    else:
        allowed = min(workload.psnr(_walk(workload, dtype), truth) - ROUNDING_DB, SOUND_DB)
    if not quality >= allowed:
        raise IdmFastError(f"wrong, so it is not timed: PSNR to fp32 must be >= {allowed:.1f} dB, got {quality:.1f}")


def _peer(peer: Peer, workload: Workload, dtype: str, asked: Asked, truth: Tensor, gflop: float) -> Runner:
    before, began = used_bytes(workload.device), time.perf_counter()
    built = peer.build(workload, dtype, asked.threads)
    built_in = time.perf_counter() - began
    result = workload.run(built.denoise, built.network_dtype)
    if not bool(torch.isfinite(result).all()):
        raise IdmFastError("its result is not finite")
    return Runner(
        peer.name, dtype, lambda: workload.run(built.denoise, built.network_dtype), built.launches,
        workload.psnr(result, truth) if built.gflop is None else None, built.note, built.gflop or gflop,
        _grown(before, workload.device), None, built_in,
    )  # fmt: skip


def _walk(workload: Workload, dtype: str) -> Tensor:
    """Plain torch's own result; float32 means that, and not cuDNN's default of TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        network = plain(workload.module(DTYPES[dtype]))
        return workload.run(lambda x, t: workload.image_channels(network(x, t, workload.cond)), DTYPES[dtype])
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _grown(before: int | None, device: torch.device) -> int | None:
    after = used_bytes(device)
    return None if before is None or after is None else max(0, after - before)


def _row(workload: Workload, runner: Runner, spread: Spread, ceilings: Ceilings) -> dict[str, Any]:
    steps, batch = workload.steps, workload.batch
    roof = ceilings.network(workload.layers, DTYPES[runner.dtype])
    step = spread.median / steps
    other = runner.psnr is None or not runner.whole
    return {
        "name": runner.name,
        "preset": workload.preset,
        "weights": workload.weights,
        "dtype": runner.dtype,
        "lossy": runner.lossy,
        "batch": batch,
        "height": workload.size[0],
        "width": workload.size[1],
        "steps": steps,
        "ms_per_step": 1e3 * step,
        "p20_ms": 1e3 * spread.p20 / steps,
        "p80_ms": 1e3 * spread.p80 / steps,
        "walks": spread.calls,
        "steps_per_second": 1 / step,
        "faces_per_second": batch / spread.median,
        "launches": runner.launches,
        "gflop": runner.gflop,
        # Another network has another roof, and so has one that does not run as a whole.
        "roofline_ms": None if other else 1e3 * roof,
        "roofline_fraction": None if other else roof / step,
        "psnr_to_fp32": runner.psnr,
        "memory_bytes": runner.memory,
        "engine_memory": runner.engine_memory,
        "build_seconds": runner.build_seconds,
        "note": runner.note,
    }
