"""What is made of results: tables and pictures of them, and the waterfall, on a network that takes no time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from idm_fast.bench import ours, plot
from idm_fast.bench.roofline import Ceilings
from idm_fast.bench.workload import DTYPES, psnr, workload
from idm_fast.engine.nodes import Conv, Resample

ROOT = Path(__file__).resolve().parents[1]
Load = Callable[[str, Path], ModuleType]


@pytest.fixture
def report(load_file: Load) -> ModuleType:
    return load_file("bench_report", ROOT / "benchmarks" / "report.py")


@pytest.fixture
def waterfall(load_file: Load, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Without the big copy and the big product."""
    ceilings = Ceilings(1e10, dict.fromkeys(DTYPES.values(), 1e11), 2e10)
    monkeypatch.setattr("idm_fast.bench.roofline.measure", lambda device, dtypes, cached: ceilings)
    threads = torch.get_num_threads()
    yield load_file("waterfall", ROOT / "benchmarks" / "waterfall.py")
    torch.set_num_threads(threads)


def row(name: str = "idm_fast", dtype: str = "bf16", **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": name, "preset": "idm-128", "weights": "idm-face-128", "dtype": dtype, "batch": 1, "height": 128,
        "width": 128, "steps": 4, "ms_per_step": 10.0, "p20_ms": 9.0, "p80_ms": 11.0, "launches": 67,
        "roofline_fraction": 0.7, "psnr_to_fp32": 60.0, "memory_bytes": 10**7, "note": "",
    }  # fmt: skip
    found |= more
    found["steps_per_second"] = 1e3 / found["ms_per_step"]
    found["faces_per_second"] = found["batch"] * found["steps_per_second"] / found["steps"]
    return found


def results(folder: Path, name: str, rows: list[dict[str, Any]], **machine: Any) -> Path:
    about = {"device": "a CPU", "threads": 2, "commit": "abc", "versions": {"torch": "2"}, **machine}
    absent = [{"name": "xformers", "dtype": "", "preset": "idm-128", "reason": "runs on cuda only"}]
    path = folder / name
    path.write_text(json.dumps({"machine": about, "ceilings": {}, "rows": rows, "absent": absent}))
    return path


def test_runs_are_not_mixed(report: ModuleType, tmp_path: Path) -> None:
    """The same workload in two files is two runs: their rows did not take turns."""
    first = results(tmp_path, "a.json", [row(), row("openvino", ms_per_step=15.0)])
    second = results(tmp_path, "b.json", [row(ms_per_step=30.0), row(batch=2, ms_per_step=31.0)])
    found = report.load([first, second])
    text = report.markdown(found, [])
    assert text.count("idm-128, 128 x 128, batch 1, 4 steps") == 2
    assert "1.50x" in text
    assert "3.00x" not in text
    drawn: dict[str, Any] = {}
    plot_bars = report.plot.bars
    try:
        report.plot.bars = lambda path, groups, *rest: drawn.update(groups)
        assert report.peers(found["rows"], tmp_path / "peers.png")
    finally:
        report.plot.bars = plot_bars
    assert drawn["idm-128"] == {"idm_fast bf16": pytest.approx(100), "openvino bf16": pytest.approx(1e3 / 15)}


def test_each_line_is_of_one_run(report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one file, preset and number of steps, and its name says so where they differ."""
    drawn: list[dict[str, Any]] = []
    monkeypatch.setattr(report.plot, "lines", lambda path, series, *rest, **more: drawn.append(series))

    def batches(**more: Any) -> list[dict[str, Any]]:
        return [row(batch=n, **more) for n in (1, 2)]

    files = [results(tmp_path, "a.json", batches()), results(tmp_path, "b.json", batches(ms_per_step=30.0))]
    for each, names in (
        (files[:1], ["idm_fast bf16"]),
        (files, ["idm_fast bf16, file 1", "idm_fast bf16, file 2"]),
        (
            [results(tmp_path, "c.json", [*batches(steps=1), *batches(), *batches(preset="sr3-128")])],
            [f"idm_fast bf16, {rest}" for rest in ("idm-128, steps 1", "idm-128, steps 4", "sr3-128, steps 4")],
        ),
    ):
        assert report.growth(report.load(each)["rows"], "batch", "", "", tmp_path / "batch.png")
        assert {name: len(points) for name, points in drawn.pop().items()} == dict.fromkeys(names, 2)


def test_a_report(report: ModuleType, tmp_path: Path) -> None:
    first = results(tmp_path, "a.json", [row(), row("openvino", ms_per_step=15.0, note="OpenVINO 1")])
    rest = [row(batch=n, ms_per_step=9.0 * n) for n in (2, 4)]
    rest += [row(height=side, width=side, ms_per_step=side / 10) for side in (64, 256)]
    rest += [row(steps=n) for n in (8, 16)]
    second = results(tmp_path, "b.json", rest, commit="def")
    assert report.main([str(first), str(second), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "a CPU, 2 threads" in text
    assert "commit abc, def" in text
    assert report.load([first, second])["rows"][-1]["file"] == 1
    assert "| openvino | bf16" in text.replace("  ", " ")
    assert "1.50x" in text
    assert text.count("- xformers (idm-128): runs on cuda only") == 1
    for name in ("peers", "batch", "size", "steps"):
        assert f"![{name}]({name}.png)" in text
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert picture.size == plot.SIZE
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 3  # something is drawn


def test_a_report_draws_only_what_it_has(report: ModuleType, tmp_path: Path) -> None:
    file = results(tmp_path, "a.json", [row()])
    assert report.main([str(file), "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.md"]


def test_files_of_another_machine_or_kind(
    report: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, other = results(tmp_path, "a.json", [row()]), results(tmp_path, "b.json", [row()], device="a GPU")
    assert report.main([str(mine), str(other)]) == 2
    assert "device must be that of the other files = a CPU, got a GPU" in capsys.readouterr().err
    (tmp_path / "c.json").write_text("[]")
    assert report.main([str(tmp_path / "c.json")]) == 2
    assert report.main([str(tmp_path / "none.json")]) == 2
    assert "must be written by idm-fast bench --json" in capsys.readouterr().err


def test_axes() -> None:
    axis = plot.axis_of([3.0, 40.0])
    assert axis.low == 0
    assert axis.ticks() == [0, 10, 20, 30, 40]
    log = plot.axis_of([1.0, 64.0], log=True)
    assert log.place(log.low) == 0
    assert log.place(log.high) == pytest.approx(1)
    assert {1, 10} <= set(log.ticks())
    assert plot.axis_of([0.0]).high > 0


def test_what_is_switched_off_changes_no_result(waterfall: ModuleType, tiny_model: Path) -> None:
    """Phases, hoisting and the backend of the convolutions: other calls, the same pictures."""
    work = workload(str(tiny_model), steps=2)
    plain = ours.engine(work, "fp32")
    expected = ours.run(plain, work)
    assert any(isinstance(node, Conv) and node.upsample for node in plain.nodes)
    for rewrites, options in (
        ([waterfall.without_phases], {}),
        ([waterfall.without_hoisting], {}),
        ([waterfall.without_phases, waterfall.without_hoisting], {"torch_convs": True}),
    ):
        made = waterfall.engine(*rewrites, **options)(work, "fp32")
        assert psnr(made.run(), expected) > 100
    phases = sum(isinstance(node, Conv) and node.upsample for node in plain.nodes)
    assert waterfall.engine(waterfall.without_phases)(work, "fp32").launches == plain.launches + phases
    again = ours.engine(work, "fp32")  # everything is switched on again
    assert [node.backend for node in again.nodes] == [node.backend for node in plain.nodes]
    assert not any(isinstance(node, Resample) for node in again.nodes)
    assert ours.run(again, work).equal(expected)


def test_the_waterfall(
    waterfall: ModuleType, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.json"
    quick = ["--steps", "1", "--seconds", "0", "--walks", "2", "--threads", "1", "--device", "cpu"]
    assert waterfall.main(["--preset", str(tiny_model), *quick, "--json", str(target)]) == 0
    found = json.loads(target.read_text())["rows"]
    assert [each["name"] for each in found] == [stage.name for stage in waterfall.STAGES]
    assert {each["name"]: each["note"] for each in found if each["note"]} == {"fp8 (lossy)": "not on cpu"}
    timed = [each for each in found if not each["note"]]
    assert all(each["psnr_to_fp32"] > 20 for each in timed)
    roofs = [each["name"] for each in timed if each["roofline_fraction"] is None]
    assert roofs == ["inner levels every second step (lossy)"]
    said = capsys.readouterr().out
    assert said.count("\n| ") == len(timed) + 1
    assert "so far" in said
    assert waterfall.main(["--preset", "nobody"]) == 2


def test_a_stage_that_fails_is_named(
    waterfall: ModuleType, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(work: Any, low: str) -> Any:
        raise RuntimeError("no room")

    def wrong(work: Any, low: str) -> Any:
        return waterfall.Made(lambda: torch.full_like(work.start, torch.nan), None, low)

    stages = (
        *waterfall.STAGES[:2], waterfall.Stage("bad", fails), waterfall.Stage("gpu", fails, ("cuda",)),
        waterfall.Stage("odd", wrong),
    )  # fmt: skip
    monkeypatch.setattr(waterfall, "STAGES", stages)
    quick = ["--steps", "1", "--seconds", "0", "--walks", "2", "--device", "cpu"]
    assert waterfall.main(["--preset", str(tiny_model), *quick]) == 0
    said = capsys.readouterr().out
    assert "bad: no room" in said
    assert "odd: wrong, so it is not timed: its result is not finite" in said
    assert "gpu: not on cpu" in said


@pytest.mark.usefixtures("no_xdist")
def test_through_pytest_benchmark() -> None:
    pytest.importorskip("pytest_benchmark")
    file = ROOT / "benchmarks" / "test_steps_benchmark.py"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        str(file),
        "--benchmark-only",
        "-k",
        "idm-128-idm_fast and not int8",
    ]
    options = ["--benchmark-max-time=0.01", "--benchmark-min-rounds=1", "--benchmark-warmup=off"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
