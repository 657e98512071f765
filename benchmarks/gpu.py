"""One command for a machine with a CUDA device: ``python benchmarks/gpu.py --out DIR --budget-seconds 480``.

Runs offline, what matters most first: build, gpu tests, operation benchmarks, a sample under compute-sanitizer. After
each stage DIR/run.json is written anew; its output is in DIR/<stage>.log. A stage that fails or runs out of its time is
recorded, and the next one runs. Without a CUDA device it says so and ends with 0.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 5.0  # a stage with less than this left is not begun
TAIL = 2000  # characters of a log that run.json repeats
# Where the time of a network goes, most first; operations that are not named here come after.
IMPORTANT = ("conv2d", "attention", "group_norm_silu", "sampler_update")


@dataclass(frozen=True)
class Stage:
    """One command with its own limit in seconds; the budget may leave it less."""

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    name: str
    status: str  # "ok", "failed", "timeout" or "skipped"
    seconds: float
    limit: float
    exit_code: int | None
    summary: str  # the last line, or why it did not run
    tail: str = ""  # of a stage that did not go well


def operations() -> list[str]:
    """The names of all operations, the important ones first, without importing any."""
    text = (ROOT / "idm_fast" / "ops.py").read_text()
    found = re.search(r"NAMES = \((.*?)\)", text, re.DOTALL)
    names = re.findall(r'"(\w+)"', found[1]) if found else []
    return sorted(names, key=lambda name: IMPORTANT.index(name) if name in IMPORTANT else len(IMPORTANT))


def stages(out: Path) -> list[Stage]:
    python = sys.executable
    build = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", str(ROOT)]
    # One line a test, so that a run that is cut off has still said something.
    tests = [python, "-m", "pytest", "-v", "--tb=short", "--maxfail=100", "-m", "gpu", "-p", "no:cacheprovider"]
    arguments = os.environ.get("IDM_FAST_CMAKE_ARGS", "")
    offline = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "IDM_FAST_REQUIRE_NATIVE": "1"}
    return [
        Stage("build", build, 240, {**offline, "IDM_FAST_CMAKE_ARGS": f"{arguments} -DIDM_FAST_CUDA=ON".strip()}),
        Stage(
            "gpu-tests",
            [*tests, "-k", "not sanitizer", f"--junitxml={out / 'gpu-tests.xml'}", str(ROOT / "tests")],
            150,
        ),
        *(
            Stage(
                f"ops-{name}",
                [
                    python, str(ROOT / "benchmarks" / "ops.py"), "--device", "cuda", "--op", name,
                    "--seconds", "0.2", "--dtypes", "float16", "--total-seconds", str(seconds),
                    "--json", str(out / f"ops-{name}.json"),
                ],
                seconds + 20,
            )
            for name in operations()
            for seconds in (25 if name in IMPORTANT else 5,)
        ),
        Stage("sanitizer", [*tests, "-k", "sanitizer", str(ROOT / "tests" / "test_gpu.py")], 120),
    ]  # fmt: skip


def run_stage(stage: Stage, out: Path, left: float) -> Result:
    """Runs a stage in a process group of its own, at most as long as its limit and what is left of the budget."""
    limit = min(stage.limit, left)
    if limit < min(LEAST_SECONDS, stage.limit):
        return Result(stage.name, "skipped", 0.0, limit, None, "no time left")
    log = out / f"{stage.name}.log"
    begin = time.monotonic()
    code: int | None = None
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                stage.command,
                cwd=ROOT,
                env={**os.environ, **stage.environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Result(stage.name, "failed", 0.0, limit, None, str(error))
        try:
            code = process.wait(limit)
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timeout"
        finally:
            if process.poll() is None:  # out of time, or we are interrupted
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = log.read_text(errors="replace")
    lines = text.strip().splitlines() or [""]
    tail = "" if status == "ok" else text[-TAIL:]
    return Result(stage.name, status, time.monotonic() - begin, limit, code, lines[-1][:200], tail)


def run(todo: list[Stage], out: Path, budget: float, about: dict[str, Any]) -> list[Result]:
    """All stages in order; DIR/run.json is whole after each."""
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    results: list[Result] = []

    def record() -> None:
        report = {**about, "budget_seconds": budget, "seconds": time.monotonic() - begin}
        fresh = out / "run.json.new"
        fresh.write_text(json.dumps({**report, "stages": [asdict(r) for r in results]}, indent=2) + "\n")
        fresh.replace(out / "run.json")

    record()
    for stage in todo:
        print(f"{stage.name} ...", flush=True)
        result = run_stage(stage, out, budget - (time.monotonic() - begin))
        results.append(result)
        print(f"{stage.name}: {result.status} after {result.seconds:.1f} s: {result.summary}", flush=True)
        record()
    return results


def output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


PROBE = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": None}
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    found |= {"device": p.name, "capability": [p.major, p.minor], "multiprocessors": p.multi_processor_count,
              "memory_bytes": p.total_memory}
try:
    import triton
    found["triton"] = triton.__version__
except ImportError as error:
    found["triton"] = str(error)
print(json.dumps(found))
"""


def machine() -> dict[str, Any]:
    """What the figures depend on. Asked in another process, so that this one holds no device while stages run."""
    probed = output_of(sys.executable, "-c", PROBE)
    return {
        **(json.loads(probed.splitlines()[-1]) if probed else {"torch": None, "device": None}),
        "python": platform.python_version(),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": (output_of("nvcc", "--version") or "").splitlines()[-1:],
        "commit": output_of("git", "rev-parse", "HEAD"),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for run.json, the logs and the figures")
    parser.add_argument("--budget-seconds", type=float, default=480.0)
    args = parser.parse_args(arguments)
    out = args.out.resolve()
    about = {"machine": machine()}
    if about["machine"]["device"] is None:
        print(f"no CUDA device: torch {about['machine']['torch']} sees none, so there is nothing to measure")
        run([], out, args.budget_seconds, about)
        return 0
    results = run(stages(out), out, args.budget_seconds, about)
    return 0 if all(result.status == "ok" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
