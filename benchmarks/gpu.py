"""One command for a machine with a CUDA device: ``python benchmarks/gpu.py --out DIR --budget-seconds 480``.

Runs offline, what matters most first: build, gpu tests, graphs against calls, steps a second against peers, benchmarks
of the important operations, the waterfall, 8-bit floats, a profile, the other networks, a sample under
compute-sanitizer, the rest. What the budget cuts off, ``--stages`` runs later: names, or how they begin. After each
stage DIR/run.json is written anew, with the figures of the benchmarks in it; its output is in DIR/<stage>.log. A stage
that fails or runs out of its time is recorded, and the next one runs; where the build fails, the rest runs on the
sources without the native module.
Without a CUDA device it says so and ends with 0; where there is a driver, but torch sees no device, with 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 5.0  # a stage with less than this left is not begun
PROBE_SECONDS = 120.0  # torch is slow to import from a cold disk
KILL_SECONDS = 10.0  # a process that waits for a broken device may outlive SIGKILL
TAIL = 2000  # characters of a log that run.json repeats
TEST_PROCESSES = 8  # most of a test's time is Triton's compiler
QUICK_PEERS = ("eager", "no_engine", "diffusers", "xformers")  # torch.compile takes minutes: a stage of its own
# Where the time of a network goes, most first; operations that are not named here come after.
IMPORTANT = ("conv2d", "attention", "group_norm_silu", "sampler_update")


@dataclass(frozen=True)
class Stage:
    """One command with its own limit in seconds; the budget may leave it less."""

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    report: Path | None = None  # a JSON file that it writes; run.json repeats it
    passes: str = ""  # what the last line of a success says; without it the stage has done nothing


@dataclass(frozen=True)
class Result:
    name: str
    status: str  # "ok", "failed", "timeout" or "skipped"
    seconds: float
    limit: float
    exit_code: int | None
    summary: str  # the last line, or why it did not run
    tail: str = ""  # of a stage that did not go well
    report: Any = None


def operations() -> list[str]:
    """The names of all operations, the important ones first, without importing any."""
    text = (ROOT / "idm_fast" / "ops.py").read_text()
    found = re.search(r"NAMES = \((.*?)\)", text, re.DOTALL)
    names = re.findall(r'"(\w+)"', found[1]) if found else []
    return sorted(names, key=lambda name: IMPORTANT.index(name) if name in IMPORTANT else len(IMPORTANT))


def stages(out: Path, only: Sequence[str] = ()) -> list[Stage]:
    python = sys.executable
    build = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", str(ROOT)]
    arguments = os.environ.get("IDM_FAST_CMAKE_ARGS", "")
    offline = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "IDM_FAST_REQUIRE_NATIVE": "1"}
    sanitizer = [*tests(), "-k", "sanitizer", str(ROOT / "tests" / "test_gpu.py")]
    units = [*tests(), *processes(), "-k", "not sanitizer", f"--junitxml={out / 'gpu-tests.xml'}", str(ROOT / "tests")]
    stages = [
        Stage("build", build, 240, {**offline, "IDM_FAST_CMAKE_ARGS": f"{arguments} -DIDM_FAST_CUDA=ON".strip()}),
        Stage("gpu-tests", units, 150, passes=r"\b[1-9]\d* passed"),
        script("graphs", 90, out, "--preset", "sr3-128", "idm-128", "--steps", "4", "16"),
        steps("sr3-128", 60, out, "--preset", "sr3-128", "--peers", *QUICK_PEERS),
        *(benchmark(name, 25, out) for name in operations() if name in IMPORTANT),
        steps("compile", 150, out, "--preset", "sr3-128", "--peers", "torch_compile"),
        script("waterfall", 90, out, "--preset", "sr3-128", "--seconds", "10"),
        steps("fp8", 60, out, "--preset", "sr3-128", "idm-128", "--dtype", "fp16", "fp8"),
        profile("sr3-128", 60, out),
        steps("others", 120, out, "--preset", "gd-256", "difface-512", "sr3-512", "idm-128", "--peers", "eager"),
        steps("batch", 60, out, "--preset", "idm-128", "--batch", "1", "2", "4", "8", "16"),
        Stage("sanitizer", sanitizer, 120, passes=r"\b[1-9]\d* passed"),
        *(benchmark(name, 5, out) for name in operations() if name not in IMPORTANT),
    ]
    return [stage for stage in stages if not only or stage.name.startswith(tuple(only))]


def tests() -> list[str]:
    """One line a test, so that a run that is cut off has still said something; a module that does not import and a
    warning of these versions of the libraries cost nothing else; where a test hangs is in the log."""
    options = ["-v", "-rs", "--tb=short", "--maxfail=100", "--continue-on-collection-errors", "-W", "default"]
    more = ["-o", "faulthandler_timeout=60", "-p", "no:cacheprovider", "-m", "gpu"]
    return [sys.executable, "-m", "pytest", *options, *more]


def processes() -> list[str]:
    """Tests side by side where pytest-xdist is installed."""
    count = min(TEST_PROCESSES, (os.cpu_count() or 1) // 2)
    return ["-n", str(count)] if count > 1 and importlib.util.find_spec("xdist") else []


def benchmark(name: str, seconds: int, out: Path) -> Stage:
    report = out / f"ops-{name}.json"
    script = [sys.executable, str(ROOT / "benchmarks" / "ops.py"), "--device", "cuda", "--op", name]
    options = ["--seconds", "0.2", "--dtypes", "float16", "--total-seconds", str(seconds), "--json", str(report)]
    return Stage(f"ops-{name}", [*script, *options], seconds + 20, report=report)


def script(name: str, limit: float, out: Path, *arguments: str) -> Stage:
    """A script of this folder that takes --device and --json."""
    report = out / f"{name}.json"
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--device", "cuda", "--json", str(report)]
    return Stage(name, [*command, *arguments], limit, report=report)


def steps(name: str, limit: float, out: Path, *arguments: str) -> Stage:
    """Steps a second; whatever peer is not here is named in the report with its reason."""
    report = out / f"steps-{name}.json"
    command = [sys.executable, "-m", "idm_fast", "bench", "--device", "cuda", "--json", str(report)]
    return Stage(f"steps-{name}", [*command, *arguments], limit, report=report)


def profile(preset: str, limit: float, out: Path) -> Stage:
    folder = out / f"profile-{preset}"
    command = [sys.executable, "-m", "idm_fast", "profile", "--device", "cuda", "--preset", preset]
    return Stage(f"profile-{preset}", [*command, "--out", str(folder)], limit)


def on_the_sources(out: Path) -> dict[str, str]:
    """The environment in which ``import idm_fast`` finds the sources, not installed: a folder of links."""
    package = out / "sources" / "idm_fast"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for source in [*(ROOT / "idm_fast").iterdir(), ROOT / "kernels"]:
        if not (package / source.name).is_symlink():
            (package / source.name).symlink_to(source)
    # Safe path: else the checkout, where idm_fast has no kernels, comes first.
    paths = [str(package.parent), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(KILL_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"process {process.pid} outlives its end", flush=True)


def run_stage(stage: Stage, out: Path, left: float, environment: dict[str, str]) -> Result:
    """Runs a stage in a process group of its own, at most as long as its limit and what is left of the budget."""
    limit = min(stage.limit, left)
    if limit < min(LEAST_SECONDS, stage.limit):
        return Result(stage.name, "skipped", 0.0, limit, None, "no time left")
    if stage.report is not None:
        stage.report.unlink(missing_ok=True)  # of a run before
    log = out / f"{stage.name}.log"
    begin = time.monotonic()
    code: int | None = None
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                stage.command,
                cwd=ROOT,
                env={**os.environ, **environment, **stage.environment},
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
                kill(process)
    text = log.read_text(errors="replace")
    lines = text.strip().splitlines() or [""]
    if status == "ok" and not re.search(stage.passes, lines[-1]):
        status = "skipped"  # every test said why it did not run
    tail = "" if status == "ok" else text[-TAIL:]
    seconds = time.monotonic() - begin
    return Result(stage.name, status, seconds, limit, code, lines[-1][:200], tail, read_report(stage.report))


def read_report(report: Path | None) -> Any:
    if report is None or not report.exists():
        return None
    try:
        return json.loads(report.read_text())
    except ValueError as error:
        return f"{report.name}: {error}"


def run(todo: list[Stage], out: Path, budget: float, about: dict[str, Any], begin: float | None = None) -> list[Result]:
    """All stages in order, ``budget`` seconds from ``begin`` on; DIR/run.json is whole after each."""
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic() if begin is None else begin
    results: list[Result] = []
    environment: dict[str, str] = {}

    def record() -> None:
        report = {**about, "budget_seconds": budget, "seconds": time.monotonic() - begin}
        fresh = out / "run.json.new"
        fresh.write_text(json.dumps({**report, "stages": [asdict(r) for r in results]}, indent=2) + "\n")
        fresh.replace(out / "run.json")

    record()
    for stage in todo:
        print(f"{stage.name} ...", flush=True)
        result = run_stage(stage, out, budget - (time.monotonic() - begin), environment)
        results.append(result)
        if stage.name == "build" and result.status != "ok":
            environment = on_the_sources(out)
        print(f"{stage.name}: {result.status} after {result.seconds:.1f} s: {result.summary}", flush=True)
        record()
    return results


def output_of(*command: str, seconds: float = 30.0) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def has_driver() -> bool:
    """Whether the machine looks as if it had a device, whatever torch says."""
    return Path("/dev/nvidiactl").exists() or bool(output_of("nvidia-smi", "-L"))


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
    probed = output_of(sys.executable, "-c", PROBE, seconds=PROBE_SECONDS)
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return {
        **(json.loads(probed.splitlines()[-1]) if probed else {"torch": None, "device": None}),
        "python": platform.python_version(),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": (output_of(nvcc, "--version") or "").splitlines()[-1:],
        "commit": output_of("git", "rev-parse", "HEAD"),
    }


def end_on_sigterm() -> None:
    """A stage under way ends with this process, else it would keep the device."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for run.json, the logs and the figures")
    parser.add_argument("--budget-seconds", type=float, default=480.0)
    parser.add_argument("--stages", nargs="+", default=[], metavar="NAME", help="only those that begin so")
    args = parser.parse_args(arguments)
    begin = time.monotonic()
    out = args.out.resolve()
    about = {"machine": machine()}
    if about["machine"]["device"] is None:
        run([], out, args.budget_seconds, about)
        if has_driver() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
            print("there is an NVIDIA driver, but torch does not import, sees no device or did not answer in time")
            return 1
        print(f"no CUDA device: torch {about['machine']['torch']} sees none, so there is nothing to measure")
        return 0
    todo = stages(out, args.stages)
    if not todo:
        parser.error(f"--stages must begin some of {', '.join(stage.name for stage in stages(out))}")
    results = run(todo, out, args.budget_seconds, about, begin)
    return 0 if all(result.status == "ok" for result in results) else 1


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
