"""Compiles every Triton variant and every CUDA file for sm_80 and sm_90, without a device, and judges what comes out.

``python benchmarks/aot.py`` fails for a spill, for shared memory that a device has not, for a kernel that is not in the
committed tables (benchmarks/results/aot/<op>.md), and, under the compilers named there, for more registers than they
allow: registers are handed out in eights, so a figure may grow to the next multiple of 8.
``--update`` writes the tables anew. ``--op`` takes one operation. Results are cached in build/aot by what was compiled.
``--changed`` also believes the committed results (compiled.json) of the same sources under the same compilers: then a
fresh clone compiles only what has changed since.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from idm_fast.kernels.aot import Variant

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "benchmarks" / "results" / "aot"
COMPILED = TABLES / "compiled.json"
CACHE = ROOT / "build" / "aot"
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # bytes a block can have; CUDA C++ sees its static ones only
NVCC_FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-Xptxas", "-v")
TRITON_ARCHS, CUDA_ARCHS = ("sm_80", "sm_90"), ("sm_80", "sm_90a")
UNIT = 8  # registers are handed out to a thread in units of


@dataclass(frozen=True)
class Row:
    """What one kernel takes on one architecture."""

    kernel: str
    arch: str
    registers: int
    shared: int  # bytes; of CUDA C++ the static ones
    spills: int  # bytes stored and loaded
    stack: int  # bytes; not always a spill: the sine of a large angle needs an array
    losses: tuple[str, ...] = ()  # what ptxas calls a potential performance loss

    @property
    def key(self) -> tuple[str, str]:
        return self.kernel, self.arch

    def faults(self) -> list[str]:
        found = list(self.losses)
        if self.spills:
            found.append(f"spills {self.spills} bytes")
        if self.shared > SHARED[self.arch.removesuffix("a")]:
            found.append(f"takes {self.shared} bytes of shared memory, {self.arch} has less")
        return found


def parse_ptxas(log: str) -> dict[str, tuple[int, int, int, int, tuple[str, ...]]]:
    """Mangled name -> (registers, shared bytes, spilled bytes, stack bytes, losses) from the words of ``ptxas -v``."""
    found = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        name = part[: part.index("'")]
        used = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        if used is None or memory is None:
            raise ValueError(f"ptxas says nothing of {name}:\n{part}")
        losses = tuple(dict.fromkeys(re.findall(r"Potential Performance Loss: ([^\n]*)", part)))
        stack, stores, loads = map(int, memory.groups())
        found[name] = (int(used[1]), int(shared[1]) if shared else 0, stores + loads, stack, losses)
    return found


Compiled = tuple[str, list[Row]]  # the digest of what was compiled and how, and what came out


def cached(key: str, believed: bool, compute: functools.partial[list[Row]]) -> Compiled:
    """``compute()``, or what it gave when the same was compiled before; ``believed``: also by whoever committed it."""
    digest = hashlib.sha256(key.encode()).hexdigest()
    file = CACHE / f"{digest}.json"
    if file.exists():
        return digest, from_json(json.loads(file.read_text()))
    if believed and digest in (known := committed()):
        return digest, known[digest]
    rows = compute()
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=CACHE, delete=False) as fresh:
        json.dump([asdict(row) for row in rows], fresh)
    os.replace(fresh.name, file)
    return digest, rows


def from_json(rows: list[dict[str, Any]]) -> list[Row]:
    return [Row(**{**row, "losses": tuple(row["losses"])}) for row in rows]


@functools.cache
def committed() -> dict[str, list[Row]]:
    if not COMPILED.exists():
        return {}
    return {digest: from_json(rows) for digest, rows in json.loads(COMPILED.read_text()).items()}


def variants(op: str) -> list[Variant]:
    """What the operation declares; a triton_kernel.py without a list is a mistake."""
    module = importlib.import_module(f"idm_fast.kernels.{op}.triton_kernel")
    found: list[Variant] = module.AOT
    return found


def compile_triton(op: str, index: int, arch: str, believed: bool) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant = variants(op)[index]
    source = ASTSource(variant.kernel, variant.signature(), dict(variant.constants), variant.attributes())

    def compute() -> list[Row]:
        log = io.StringIO()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(log):
            os.environ.update(TRITON_CACHE_DIR=folder, TRITON_DUMP_PTXAS_LOG="1")
            target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
            compiled = triton.compile(source, target=target, options=dict(variant.options))
        ((registers, _, *rest),) = parse_ptxas(log.getvalue()).values()
        return [Row(variant.name, arch, registers, compiled.metadata.shared, *rest)]

    key = f"{triton.__version__} {arch} {variant.name} {variant.options} {source.hash()}"
    return cached(key, believed, functools.partial(compute))


def includes(file: Path, seen: dict[Path, bytes]) -> dict[Path, bytes]:
    """``file`` and every header of csrc that it includes, with their contents."""
    if file not in seen and file.is_file():
        seen[file] = file.read_bytes()
        for name in re.findall(rb'#\s*include\s*"([^"]+)"', seen[file]):
            includes(ROOT / "csrc" / name.decode(), seen)
    return seen


def compile_cuda(nvcc: str, file: Path, arch: str, believed: bool) -> Compiled:
    def compute() -> list[Row]:
        command = [nvcc, *NVCC_FLAGS, f"-I{ROOT / 'csrc'}", f"-arch={arch}", "-cubin", "-o", os.devnull, str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{file.relative_to(ROOT)} does not compile for {arch}:\n{done.stderr[-4000:]}")
        found = parse_ptxas(done.stdout + done.stderr)
        return [Row(name, arch, *found[key]) for key, name in demangled(list(found)).items()]

    key = f"{version(nvcc)} {arch} {NVCC_FLAGS} {list(includes(file, {}).values())}"
    return cached(key, believed, functools.partial(compute))


def demangled(names: list[str]) -> dict[str, str]:
    """Mangled name -> kernel<arguments>, without the name that nvcc makes of a file's anonymous namespace."""
    plain = [re.sub(r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_\w+?_cu_[0-9a-f]{8}", "12_GLOBAL__N_1", name) for name in names]
    done = subprocess.run(["c++filt"], input="\n".join(plain), capture_output=True, text=True, check=True)
    short = {}
    for name, text in zip(names, done.stdout.splitlines(), strict=True):
        text = re.sub(r"\bidm::|\(anonymous namespace\)::|^void ", "", text)
        depth, end = 0, len(text)
        for i, letter in enumerate(text):  # the parameters begin at the first bracket outside of <>
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0:
                end = i
                break
        short[name] = text[:end]
    return short


def version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V([\d.]+)", text)
    return found[1] if found else text


def find_nvcc() -> str | None:
    for candidate in (os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc"):
        if candidate and (found := shutil.which(candidate)):
            return found
    return None


# ---- the committed tables ----

HEAD = "| kernel | architecture | registers | shared bytes | spilled bytes | stack bytes |\n|---|---|---|---|---|---|\n"


def write_table(op: str, tools: dict[str, str], rows: list[Row]) -> None:
    lines = [f"| `{r.kernel}` | {r.arch} | {r.registers} | {r.shared} | {r.spills} | {r.stack} |" for r in rows]
    made = ", ".join(f"{name} {number}" for name, number in tools.items())
    TABLES.mkdir(parents=True, exist_ok=True)
    text = f"# {op}: what its kernels take\n\nWritten by `python benchmarks/aot.py --update`. Compilers: {made}.\n\n"
    (TABLES / f"{op}.md").write_text(text + HEAD + "\n".join(lines) + "\n")


def read_table(op: str) -> tuple[dict[str, str], dict[tuple[str, str], Row]]:
    file = TABLES / f"{op}.md"
    if not file.exists():
        return {}, {}
    text = file.read_text()
    made = re.search(r"Compilers: (.*)\.\n", text)
    tools = dict(pair.split(" ") for pair in made[1].split(", ")) if made else {}
    rows = [
        Row(kernel, arch, *map(int, figures))
        for kernel, arch, *figures in re.findall(
            r"^\| `(.*)` \| (\w+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE
        )
    ]
    return tools, {row.key: row for row in rows}


def compare(rows: list[Row], budget: dict[tuple[str, str], Row], same_compiler: bool) -> list[str]:
    """What is worse than the committed table allows."""
    faults = []
    for row in rows:
        found = row.faults()
        allowed = budget.get(row.key)
        if allowed is None:
            found.append("is not in the table")
        elif same_compiler and row.registers > -(-allowed.registers // UNIT) * UNIT:
            found.append(f"takes {row.registers} registers, the table has {allowed.registers}")
        elif same_compiler and row.stack > allowed.stack:
            found.append(f"takes {row.stack} bytes of stack, the table has {allowed.stack}")
        faults += [f"{row.kernel} on {row.arch} {fault}" for fault in found]
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="only this operation or folder of csrc (may be repeated)")
    parser.add_argument("--update", action="store_true", help="write the tables instead of comparing with them")
    parser.add_argument("--changed", action="store_true", help="compile only what the committed results do not have")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # under which a kernel is not one that can be compiled

    tools: dict[str, str] = {}
    jobs: list[tuple[str, str, functools.partial[Compiled]]] = []  # (operation, compiler, work)
    wanted = set(args.op) if args.op else None
    try:
        import triton
    except ImportError as error:
        print(f"Triton kernels are left out: {error}")
    else:
        tools["triton"] = triton.__version__
        for file in sorted((ROOT / "kernels").glob("*/triton_kernel.py")):
            op = file.parent.name
            for index, variant in enumerate(variants(op) if wanted is None or op in wanted else []):
                jobs += [
                    (op, "triton", functools.partial(compile_triton, op, index, a, args.changed))
                    for a in TRITON_ARCHS
                    if int(a.removeprefix("sm_")) >= variant.least
                ]
    nvcc = find_nvcc()
    if nvcc is None:
        print("CUDA files are left out: nvcc was not found")
    else:
        tools["nvcc"] = version(nvcc)
        for file in sorted((ROOT / "csrc").glob("*/*.cu")):
            op = file.parent.name
            if wanted is None or op in wanted:
                jobs += [(op, "nvcc", functools.partial(compile_cuda, nvcc, file, a, args.changed)) for a in CUDA_ARCHS]

    results: dict[tuple[str, str], list[Row]] = {}
    compiled: dict[str, list[Row]] = {}
    failures = []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for (op, tool, _), future in [(job, pool.submit(job[2])) for job in jobs]:
            try:
                digest, rows = future.result()
                compiled[digest] = rows
                results.setdefault((op, tool), []).extend(rows)
            except Exception as error:  # the others are compiled and reported all the same
                failures.append(f"{op}: {type(error).__name__}: {error}")

    if args.update:
        kept = compiled if wanted is None else committed() | compiled
        lines = [f'"{digest}": {json.dumps([asdict(row) for row in kept[digest]])}' for digest in sorted(kept)]
        COMPILED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for op in sorted({op for op, _ in results}):
        if args.update:
            write_table(op, tools, [row for name in tools for row in results.get((op, name), [])])
        made, budget = read_table(op)
        for tool, number in tools.items():
            rows = results.get((op, tool), [])
            if rows and not args.update and made.get(tool) != number:
                print(f"{op}: registers are not compared, the table is of {tool} {made.get(tool)}, this is {number}")
            failures += [f"{op}: {fault}" for fault in compare(rows, budget, made.get(tool) == number)]
    count = sum(map(len, results.values()))
    print(f"{count} kernels compiled by {tools}, {len(failures)} faults", *failures, sep="\n  ")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
