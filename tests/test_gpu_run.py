"""benchmarks/gpu.py on a machine without a GPU: every branch, with commands in the place of its stages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from idm_fast.ops import NAMES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gpu(load_file: Callable[[str, Path], ModuleType]) -> ModuleType:
    return load_file("gpu", ROOT / "benchmarks" / "gpu.py")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def statuses(out: Path) -> dict[str, str]:
    return {stage["name"]: stage["status"] for stage in json.loads((out / "run.json").read_text())["stages"]}


def test_stages_are_recorded_as_they_go(gpu: ModuleType, tmp_path: Path) -> None:
    report = str(tmp_path / "run.json")
    seen = f"import json; print(len(json.load(open({report!r}))['stages']))"
    todo = [
        gpu.Stage("good", python("print('some'); print('42 passed')"), 60),
        gpu.Stage("bad", python("import sys; print('why'); sys.exit(3)"), 60),
        gpu.Stage("missing", [str(tmp_path / "no-such-program")], 60),
        gpu.Stage("environment", python("import os; print(os.environ['ANSWER'])"), 60, {"ANSWER": "yes"}),
        gpu.Stage("last", python(seen), 60),
    ]
    results = gpu.run(todo, tmp_path, 300, {"machine": {"device": "none"}})
    assert [r.status for r in results] == ["ok", "failed", "failed", "ok", "ok"]
    assert results[0].summary == "42 passed"
    assert results[1].exit_code == 3
    assert "why" in results[1].tail
    assert "no-such-program" in results[2].summary
    assert results[3].summary == "yes"
    assert results[4].summary == "4"  # run.json was whole after each stage before
    assert (tmp_path / "bad.log").read_text() == "why\n"
    assert json.loads((tmp_path / "run.json").read_text())["machine"] == {"device": "none"}


def test_a_stage_ends_with_its_children(gpu: ModuleType, tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time;"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"open({str(child)!r}, 'w').write(str(p.pid));"
        "print('begun', flush=True); time.sleep(60)"
    )
    begin = time.monotonic()
    (slow, after) = gpu.run([gpu.Stage("slow", python(code), 3), gpu.Stage("after", python(""), 60)], tmp_path, 300, {})
    assert (slow.status, slow.exit_code, slow.summary, after.status) == ("timeout", None, "begun", "ok")
    assert time.monotonic() - begin < 50
    for _ in range(100):  # killed is not yet gone
        stat = Path(f"/proc/{child.read_text()}/stat")
        if not stat.exists() or stat.read_text().split()[2] in "ZX":
            return
        time.sleep(0.1)
    pytest.fail("the child of a stage outlives it")


def test_the_budget_holds(gpu: ModuleType, tmp_path: Path) -> None:
    sleeps = [gpu.Stage(name, python("import time; time.sleep(60)"), 50) for name in ("one", "two")]
    begin = time.monotonic()
    results = gpu.run(sleeps, tmp_path, 6, {})
    assert time.monotonic() - begin < 20
    assert statuses(tmp_path) == {"one": "timeout", "two": "skipped"}
    assert results[0].limit <= 6
    assert results[1].summary == "no time left"


def test_the_real_stages(gpu: ModuleType, tmp_path: Path) -> None:
    """Most important first, offline, and every operation is timed."""
    todo = gpu.stages(tmp_path)
    names = [stage.name for stage in todo]
    assert names[:3] == ["build", "gpu-tests", "ops-conv2d"]
    assert names[-1] == "sanitizer"
    assert sorted(name.removeprefix("ops-") for name in names if name.startswith("ops-")) == sorted(NAMES)
    assert {"--no-build-isolation", "--no-deps", "--no-index"} <= set(todo[0].command)
    assert todo[0].environment["IDM_FAST_CMAKE_ARGS"].endswith("-DIDM_FAST_CUDA=ON")
    for stage in todo:  # what they run exists and takes these arguments
        scripts = [part for part in stage.command if part.endswith(".py")]
        assert all(Path(part).exists() for part in scripts), stage.command
    script = todo[2].command
    done = subprocess.run([*script[:2], "--help"], capture_output=True, text=True, timeout=120)
    assert all(part in done.stdout for part in script[2:] if part.startswith("--")), done.stderr


def test_a_failed_stage_is_not_success(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "machine", lambda: {"device": "a device", "torch": "2"})
    monkeypatch.setattr(gpu, "stages", lambda out: [gpu.Stage("one", python("raise SystemExit(1)"), 60)])
    assert gpu.main(["--out", str(tmp_path)]) == 1
    monkeypatch.setattr(gpu, "stages", lambda out: [gpu.Stage("one", python(""), 60)])
    assert gpu.main(["--out", str(tmp_path)]) == 0


def test_without_cuda_it_says_so(tmp_path: Path) -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(tmp_path / "new" / "folder")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "no CUDA device" in done.stdout
    assert statuses(tmp_path / "new" / "folder") == {}
