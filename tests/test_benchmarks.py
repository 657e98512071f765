"""The benchmark of the operations: what it refuses to time, and what it says of what it times."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from idm_fast.bench.roofline import Ceilings
from idm_fast.bench.timing import LEAST, interleaved

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
MODULES = ("checked", "ops")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    monkeypatch.syspath_prepend(str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture
def quick(bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Without the big copy and the big product."""
    ceilings = Ceilings(1e10, {torch.float32: 1e11})
    monkeypatch.setattr(bench["ops"], "measure", lambda device, dtypes: ceilings)
    return bench


ARGUMENTS = ["--op", "sampler_update", "--case", "latent", "--dtypes", "float32", "--seconds", "0.01"]


def run(bench: dict[str, ModuleType], tmp_path: Path, *more: str) -> tuple[int, dict[str, Any]]:
    target = tmp_path / "ops.json"
    status: int = bench["ops"].main([*ARGUMENTS, "--device", "cpu", "--json", str(target), *more])
    return status, json.loads(target.read_text())


def test_rows(quick: dict[str, ModuleType], tmp_path: Path) -> None:
    status, report = run(quick, tmp_path)
    assert status == 0
    rows = {row["backend"]: row for row in report["rows"]}
    assert {"torch", "eager"} <= set(rows)
    assert "reference" not in rows
    for row in rows.values():
        assert row["calls"] >= 5
        assert row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["of_roof"] == pytest.approx(row["roof_us"] / row["median_us"])
        assert row["bound"] == "memory"
    assert rows["eager"]["times_eager"] == 1
    assert report["ceilings"] == {"copy_gb_per_s": 10, "product_tflop_per_s": {"float32": 0.1}}
    assert {"device", "commit", "versions", "load_average"} <= set(report["machine"])


def test_what_is_wrong_is_not_timed(
    quick: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quick["checked"], "verdict", lambda *_: "error 1, allowed 0")
    status, report = run(quick, tmp_path)
    assert status == 1
    assert [row["backend"] for row in report["rows"]] == ["eager"]
    expected = {"what": "sampler_update multistep_latent float32", "backend": "torch", "wrong": "error 1, allowed 0"}
    assert expected in report["wrong"]
    assert "wrong, so it is not timed" in capsys.readouterr().err


def test_a_backend_that_raises_costs_the_others_nothing(
    quick: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kernel that does not compile on this device; and what was timed is written before the next layer."""

    def broken(_: Any) -> Any:
        raise RuntimeError("out of shared memory")

    checked = quick["checked"]
    suites = checked.suite
    monkeypatch.setattr(checked, "suite", lambda name: replace(suites(name), call=broken))
    monkeypatch.setattr(checked, "_truth", lambda *_: ({}, {}))
    status, report = run(quick, tmp_path, "--backends", "torch")
    assert status == 1
    assert report["wrong"][0]["wrong"] == "RuntimeError: out of shared memory"
    assert [row["backend"] for row in report["rows"]] == ["eager"]


def test_what_was_timed_is_kept(quick: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    rows_of = quick["ops"].rows_of

    def second_dies(*args: Any) -> Any:
        seen.append(args[1].name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return rows_of(*args)

    monkeypatch.setattr(quick["ops"], "rows_of", second_dies)
    target = tmp_path / "ops.json"
    arguments = ["--op", "sampler_update", "--dtypes", "float32", "--seconds", "0", "--device", "cpu"]
    with pytest.raises(KeyboardInterrupt):
        quick["ops"].main([*arguments, "--json", str(target)])
    assert {row["case"] for row in json.loads(target.read_text())["rows"]} == {seen[0]}


def test_out_of_time(quick: dict[str, ModuleType], tmp_path: Path) -> None:
    status, report = run(quick, tmp_path, "--total-seconds", "0")
    assert (status, report["rows"]) == (0, [])
    assert report["not_timed"] == ["sampler_update multistep_latent float32"]


def test_results_that_are_tuples(bench: dict[str, ModuleType]) -> None:
    """Operations that return several tensors, or take structures of them, are judged and timed like any other."""
    cases = {(name, case.name): case for name, case in bench["checked"].layers(["channel_stats", "dynamic_threshold"])}
    name, case = min(cases, key=lambda key: cases[key].bytes_moved(torch.float32))
    found = bench["checked"].timeable(name, cases[name, case], torch.float32, "cpu", ["torch"], warm=True)
    assert set(found.candidates) == {"torch", "eager"}
    spreads = interleaved(found.candidates, "cpu", 0.0)
    assert spreads["torch"].calls == LEAST


def test_roof() -> None:
    ceilings = Ceilings(1e9, {torch.float32: 1e12})
    assert ceilings.seconds(0, 1000, torch.float32) == (1e-6, "memory")
    assert ceilings.seconds(10**9, 1000, torch.float32) == (1e-3, "compute")


@pytest.mark.usefixtures("no_xdist")
def test_through_pytest_benchmark() -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "-q", str(FOLDER), "--benchmark-only", "-k", "multistep_latent-torch"]
    options = ["--benchmark-max-time=0.01", "--benchmark-min-rounds=2", "--benchmark-warmup=off"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, cwd=FOLDER.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_the_autoencoder_is_judged_before_it_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("autoencoder")
    small = replace(module.vqgan_preset("vq-f4"), model_channels=32, image_size=16, codebook_size=64)
    monkeypatch.setattr(module, "vqgan_preset", lambda name: small)
    given = ["--preset", "vq-f4", "--dtype", "fp32", "--device", "cpu", "--seconds", "0.01"]
    assert module.main([*given, "--json", str(tmp_path / "a.json")]) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["encode", "decode"]
    assert all(row["ms"].keys() >= {"engine", "torch"} for row in rows)
    monkeypatch.setattr(module.AutoencoderEngine, "decode", lambda self, z: torch.zeros(1, 3, 16, 16))
    assert module.main([*given, "--json", str(tmp_path / "b.json")]) == 1
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row.get("wrong") for row in rows] == [None, True]
    assert "ms" not in rows[1]
    sys.modules.pop("autoencoder")
