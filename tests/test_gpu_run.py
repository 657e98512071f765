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
import torch

from idm_fast.ops import NAMES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gpu(load_file: Callable[[str, Path], ModuleType]) -> ModuleType:
    return load_file("gpu", ROOT / "benchmarks" / "gpu.py")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def statuses(out: Path) -> dict[str, str]:
    return {stage["name"]: stage["status"] for stage in json.loads((out / "run.json").read_text())["stages"]}


def ended(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    for _ in range(100):  # killed is not yet gone
        if not stat.exists() or stat.read_text().split()[2] in "ZX":
            return True
        time.sleep(0.1)
    return False


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
    assert ended(int(child.read_text())), "the child of a stage outlives it"


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
    important = [f"ops-{name}" for name in gpu.IMPORTANT]
    first = ["build", "gpu-tests", "graphs", "steps-sr3-128", *important, "steps-compile", "waterfall"]
    assert names[: len(first)] == first
    assert [stage.name for stage in gpu.stages(tmp_path, ["steps", "graphs"])] == [
        name for name in names if name.startswith(("steps", "graphs"))
    ]
    assert sorted(name.removeprefix("ops-") for name in names if name.startswith("ops-")) == sorted(NAMES)
    assert {"--no-build-isolation", "--no-deps", "--no-index"} <= set(todo[0].command)
    assert todo[0].environment["IDM_FAST_CMAKE_ARGS"].endswith("-DIDM_FAST_CUDA=ON")
    for stage in todo:  # what they run exists and takes these arguments
        scripts = [part for part in stage.command if part.endswith(".py")]
        assert all(Path(part).exists() for part in scripts), stage.command
    for name in ("graphs", "steps-sr3-128", "ops-conv2d", "waterfall", "profile-sr3-128"):
        stage = todo[names.index(name)]
        assert stage.report is None or str(stage.report) in stage.command
        first = stage.command.index("--device")
        done = subprocess.run([*stage.command[:first], "--help"], capture_output=True, text=True, timeout=120)
        assert all(part in done.stdout for part in stage.command[first:] if part.startswith("--")), done.stderr


def test_an_unknown_stage_is_wrong_usage(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "machine", lambda: {"device": "a device", "torch": "2"})
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--out", str(tmp_path), "--stages", "nonsense"])
    assert ended.value.code == 2


def test_graphs_against_calls(
    load_file: Callable[[str, Path], ModuleType], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = load_file("graphs", ROOT / "benchmarks" / "graphs.py")
    report = tmp_path / "graphs.json"
    quick = ["--preset", str(tiny_model), "--device", "cpu", "--seconds", "0", "--json", str(report)]
    assert graphs.main([*quick, "--batch", "1", "2"]) == 0
    rows = json.loads(report.read_text())["rows"]
    assert [(row["batch"], row["equal"], row["captures"]) for row in rows] == [(1, True, 0), (2, True, 0)]
    assert all(row["graph"]["ms_per_step"] > 0 for row in rows)
    noise = (torch.full((1, 3, 32, 32), float(i)) for i in range(9))
    monkeypatch.setattr(graphs.ours, "run", lambda made, work: next(noise))
    assert graphs.main(quick) == 1
    assert json.loads(report.read_text())["rows"][0]["largest_difference"] == 1.0
    assert graphs.main(["--preset", "nobody", "--device", "cpu"]) == 2


def test_run_json_holds_the_figures(gpu: ModuleType, tmp_path: Path) -> None:
    """Of a benchmark that was cut off too; not those of a run before."""
    report = tmp_path / "ops-x.json"
    report.write_text("[0]")
    writes = f"import time; open({str(report)!r}, 'w').write('[1, 2]'); time.sleep(60)"
    todo = [
        gpu.Stage("ops-x", python(writes), 4, report=report),
        gpu.Stage("ops-y", python(f"open({str(report)!r}, 'w').write('[1,')"), 60, report=report),
        gpu.Stage("ops-z", python(""), 60, report=report),
    ]
    assert [r.status for r in gpu.run(todo, tmp_path, 300, {})] == ["timeout", "ok", "ok"]
    cut_off, broken, none = [s["report"] for s in json.loads((tmp_path / "run.json").read_text())["stages"]]
    assert (cut_off, none) == ([1, 2], None)
    assert "ops-x.json" in broken


def test_nothing_but_skipped_tests_is_no_success(gpu: ModuleType, tmp_path: Path) -> None:
    pattern = next(stage.passes for stage in gpu.stages(tmp_path) if stage.name == "sanitizer")
    last = {"a": "== 2 skipped, 9 deselected in 1.2s ==", "b": "== 10 passed, 2 skipped in 1.2s =="}
    todo = [gpu.Stage(name, python(f"print({line!r})"), 60, passes=pattern) for name, line in last.items()]
    assert [r.status for r in gpu.run(todo, tmp_path, 300, {})] == ["skipped", "ok"]


def test_the_rest_runs_where_the_build_fails(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a script of benchmarks/ and as a module, from the checkout; -S: what is installed here is not seen."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path.endswith("site-packages")))
    show = (  # their ends only: a summary is short
        "import os, idm_fast, idm_fast.kernels.check as c; "
        f"print(*(os.path.relpath(each.__file__, {str(tmp_path)!r}) for each in (idm_fast, c)))"
    )
    program = tmp_path / "sources" / "program.py"
    todo = [
        gpu.Stage("build", python("raise SystemExit(1)"), 60),
        gpu.Stage("code", [sys.executable, "-S", "-W", "ignore", "-c", show], 60),
        gpu.Stage("write", python(f"open({str(program)!r}, 'w').write({show!r})"), 60),
        gpu.Stage("script", [sys.executable, "-S", "-W", "ignore", str(program)], 60),
        gpu.Stage("ops", [sys.executable, "-S", str(ROOT / "benchmarks" / "ops.py"), "--help"], 60),
    ]
    results = gpu.run(todo, tmp_path, 300, {})
    assert [r.status for r in results] == ["failed", "ok", "ok", "ok", "ok"], results
    folder = Path("sources", "idm_fast")
    for result in (results[1], results[3]):
        assert result.summary == f"{folder / '__init__.py'} {folder / 'kernels' / 'check.py'}"


def test_a_driver_without_a_device_is_no_success(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A torch that breaks, or is slow to import, must not look like a machine that has no GPU."""
    monkeypatch.setattr(gpu, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(gpu, "has_driver", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert "there is an NVIDIA driver" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "has_driver", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 0


@pytest.mark.usefixtures("no_xdist")
def test_a_lost_device_ends_the_test_run(tmp_path: Path) -> None:
    """The test that lost it is the only failure."""
    (tmp_path / "test_lost.py").write_text(
        "import torch\n"
        "def broken(): raise RuntimeError('an illegal memory access')\n"
        "def test_one(): pass\n"
        "def test_two(monkeypatch):\n"
        "    torch.cuda.is_initialized, torch.cuda.synchronize = (lambda: True), broken\n"
        "    broken()\n"
        "def test_three(): broken()\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "-p", "tests.conftest", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stdout
    assert "1 failed, 1 passed" in done.stdout
    assert "the CUDA context is lost after" in done.stdout


def test_the_end_of_the_command_ends_its_stage(tmp_path: Path) -> None:
    """SIGTERM, as a job's limit sends it: the stage under way must not keep the device."""
    child = tmp_path / "child"
    body = f"import os, time; open({str(child)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        "import pathlib, sys; import gpu; gpu.end_on_sigterm();"
        f"gpu.run([gpu.Stage('one', [sys.executable, '-c', {body!r}], 60)], pathlib.Path({str(tmp_path)!r}), 60, {{}})"
    )
    process = subprocess.Popen(python(code), cwd=ROOT / "benchmarks", stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (child.exists() and child.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.terminate()
        assert process.wait(30) == 143
    finally:
        process.kill()
    assert ended(int(child.read_text())), "the stage outlives the command"


def test_a_failed_stage_is_not_success(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "machine", lambda: {"device": "a device", "torch": "2"})
    monkeypatch.setattr(gpu, "stages", lambda out, only: [gpu.Stage("one", python("raise SystemExit(1)"), 60)])
    assert gpu.main(["--out", str(tmp_path)]) == 1
    monkeypatch.setattr(gpu, "stages", lambda out, only: [gpu.Stage("one", python(""), 60)])
    assert gpu.main(["--out", str(tmp_path)]) == 0


def test_without_cuda_it_says_so(tmp_path: Path) -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(tmp_path / "new" / "folder")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "no CUDA device" in done.stdout
    assert statuses(tmp_path / "new" / "folder") == {}
