"""idm-fast bench and profile: what is counted, who is timed, what the files hold; on a network that takes no time."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from idm_fast.bench import ours, peers, rows, workload
from idm_fast.bench.peers import PEERS, Built, Peer
from idm_fast.bench.plain import plain
from idm_fast.bench.profile import by_op, of_engine, of_modules
from idm_fast.bench.profile_files import call_table, op_table, write_roofline
from idm_fast.bench.roofline import Ceilings
from idm_fast.bench.rows import Asked, measure
from idm_fast.bench.text import table
from idm_fast.bench.timing import Candidate, interleaved
from idm_fast.bench.work import layers, total_flops
from idm_fast.bench.workload import Workload, psnr
from idm_fast.cli import main
from idm_fast.config import PRESETS
from idm_fast.engine import bind, nodes
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet

CEILINGS = Ceilings(1e10, dict.fromkeys(workload.DTYPES.values(), 100000000000.0), 2e10)
QUICK = Asked(["fp32"], seconds=0.0, least=2, warm_up=0)


@pytest.fixture
def tiny(tiny_model: Path) -> Workload:
    return workload.workload(str(tiny_model), steps=2)


@pytest.fixture
def no_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the big copy and the big product."""
    monkeypatch.setattr("idm_fast.bench.roofline.measure", lambda device, dtypes, cached: CEILINGS)


def peer(monkeypatch: pytest.MonkeyPatch, build: Any, name: str = "other") -> None:
    """A competitor of our own making, alone."""
    made = Peer(name, "nowhere:build", {"cpu": ("fp32",)})
    monkeypatch.setattr(Peer, "build", lambda self, work, dtype, threads: build(work))
    monkeypatch.setattr(rows, "PEERS", (made,))


@pytest.mark.parametrize(
    ("name", "gflop", "milliseconds"),
    [("sr3-128", 92.4, 0.122), ("sr3-512", 1246, 1.31), ("gd-256", 564, 0.62), ("difface-512", 378, 0.457)],
)
def test_work_of_the_known_networks(name: str, gflop: float, milliseconds: float) -> None:
    """As DESIGN's reference table has them, at an H100's nominal limits."""
    side = PRESETS[name].unet.image_size
    found = layers(PRESETS[name].unet, 1, side, side)
    assert total_flops(found) / 1e9 == pytest.approx(gflop, rel=2e-3)
    h100 = Ceilings(3.35e12, {torch.float16: 989e12}, 7e12)
    assert 1e3 * h100.network(found, torch.float16) == pytest.approx(milliseconds, rel=0.02)


def test_work_grows_with_the_batch(tiny: Workload) -> None:
    two = layers(tiny.config.unet, 2, *tiny.size)
    assert total_flops(two) == 2 * total_flops(tiny.layers)
    assert [layer.weight_elements for layer in two] == [layer.weight_elements for layer in tiny.layers]


def test_the_plain_network_is_the_network(tiny: Workload) -> None:
    t, module = tiny.table.times(1)[0], tiny.module(torch.float32)
    with torch.no_grad():
        expected = module(tiny.start, t, tiny.cond)
        got = plain(module)(tiny.start, t, tiny.cond)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_workload_is_reproducible_and_says_what_it_is(tiny: Workload) -> None:
    again = workload.workload("idm-128", batch=2, size=64, steps=3)
    assert (again.batch, again.size, again.steps, again.weights) == (2, (64, 64), 3, "idm-face-128")
    other = workload.workload("idm-128", batch=2, size=64, steps=3)
    assert again.start.equal(other.start)
    assert again.cond is not None
    assert again.cond.equal(other.cond)  # type: ignore[arg-type]
    random = replace(PRESETS["sr3-128"], unet=tiny.config.unet)
    first, second = workload._random(random), workload._random(random)
    assert all(a.equal(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(p.abs().max() > 0 for p in first.parameters() if p.ndim > 1)  # nothing is switched off


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "nobody"}, "preset must be one of"),
        ({"name": "idm-128", "batch": 0}, "batch and steps must be >= 1"),
        ({"name": "idm-128", "size": 100}, "size must be a multiple of 8"),
    ],
)
def test_wrong_workloads(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(IdmFastError, match=said):
        workload.workload(**arguments)
    with pytest.raises(IdmFastError, match=said):
        workload.check(**arguments)


def test_psnr_of_random_weights_is_that_of_what_they_add(tiny: Workload) -> None:
    """The noise of the walk is the same for everybody: beside it an error of a tenth would look like nothing."""
    work = replace(tiny, weights="random (seed 0)")
    truth = work.run(lambda x, t: 0.01 * x, torch.float32)
    wrong = work.run(lambda x, t: 0.011 * x, torch.float32)
    assert psnr(wrong, truth) > 40
    assert work.psnr(wrong, truth) == pytest.approx(20 + 12, abs=0.5)  # a tenth, of an RMS of a half
    assert work.psnr(truth, truth) == workload.PSNR_MOST
    assert work.picture(torch.tensor([3.0])) == 3
    assert tiny.picture(torch.tensor([3.0])) == 1


def test_rows_of_ours_and_the_torch_peers(tiny: Workload) -> None:
    found = measure(tiny, replace(QUICK, dtypes=["fp32", "int8"], peers=["no_engine", "eager"]), CEILINGS)
    assert not found.absent
    by_name = {(row["name"], row["dtype"]): row for row in found.rows}
    assert set(by_name) == {("idm_fast", "fp32"), ("idm_fast", "int8"), ("no_engine", "fp32"), ("eager", "fp32")}
    for row in found.rows:
        assert row["steps_per_second"] == pytest.approx(1e3 / row["ms_per_step"])
        assert row["faces_per_second"] == pytest.approx(row["steps_per_second"] / 2)
        assert row["p20_ms"] <= row["ms_per_step"] <= row["p80_ms"]
        assert row["roofline_fraction"] == pytest.approx(row["roofline_ms"] / row["ms_per_step"])
    mine = by_name["idm_fast", "fp32"]
    assert mine["launches"] == ours.engine(tiny, "fp32").launches
    assert mine["engine_memory"]["weights"] > 0
    assert mine["psnr_to_fp32"] > 80
    assert by_name["eager", "fp32"]["psnr_to_fp32"] == workload.PSNR_MOST
    assert by_name["eager", "fp32"]["launches"] > mine["launches"]
    text = table(found.rows)
    assert "tiny.safetensors, 32 x 32, batch 1, 2 steps" in text.replace(tiny.preset, "tiny.safetensors")
    assert text.count("\n| ") == 5


def test_who_leaves_levels_out_has_no_roof(tiny: Workload) -> None:
    row = measure(tiny, replace(QUICK, cache_every=2), CEILINGS).rows[0]
    assert (row["lossy"], row["roofline_ms"], row["roofline_fraction"]) == (True, None, None)
    assert row["note"] == "lossy: inner levels at every 2. evaluation"
    assert 20 < row["psnr_to_fp32"] < workload.PSNR_MOST


def test_a_wrong_result_of_ours_is_not_timed(tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ours.run
    monkeypatch.setattr(ours, "run", lambda made, work: run(made, work) + 0.01)
    found = measure(tiny, QUICK, CEILINGS)
    assert found.rows == []
    assert "wrong, so it is not timed" in found.absent[0]["reason"]
    monkeypatch.setattr(ours, "run", lambda made, work: run(made, work) + torch.nan)
    assert "its result is not finite" in measure(tiny, replace(QUICK, dtypes=["int8"]), CEILINGS).absent[0]["reason"]


def test_peers_that_fail_are_named(tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(work: Workload) -> Built:
        raise RuntimeError("cannot\nconvert")

    peer(monkeypatch, build)
    found = measure(tiny, replace(QUICK, peers=["other"]), CEILINGS)
    assert [row["name"] for row in found.rows] == ["idm_fast"]
    assert found.absent == [{"name": "other", "preset": tiny.preset, "dtype": "fp32", "reason": "cannot convert"}]
    peer(monkeypatch, lambda work: Built(lambda x, t: torch.full_like(x, torch.nan), None))
    found = measure(tiny, replace(QUICK, peers=["other"]), CEILINGS)
    assert found.absent[0]["reason"] == "its result is not finite"


def test_another_network_has_no_psnr_and_no_roof(tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    peer(monkeypatch, lambda work: Built(lambda x, t: torch.zeros_like(x), None, note="nothing", gflop=0.5))
    row = measure(tiny, replace(QUICK, peers=["other"]), CEILINGS).rows[-1]
    assert (row["name"], row["gflop"], row["psnr_to_fp32"], row["roofline_fraction"]) == ("other", 0.5, None, None)
    assert "other fp32: nothing" in table([row])


def test_why_a_peer_cannot_run() -> None:
    found = {each.name: each for each in PEERS}
    assert found["xformers"].why_not(torch.device("cpu")) == "runs on cuda only"
    missing = Peer("x", "m:f", {"cpu": ("fp32",)}, ("no_such_package",))
    assert missing.why_not(torch.device("cpu")) == "not installed: no_such_package"
    assert found["onnxruntime"].runs_at(["bf16"], torch.device("cpu")) == ["fp32"]
    assert found["eager"].runs_at(["fp32", "bf16"], torch.device("cpu")) == ["fp32", "bf16"]
    with pytest.raises(IdmFastError, match="--peers must be some of no_engine, eager"):
        rows.check_peers(["nobody"])
    assert rows.check_peers([]) == list(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openvino", "onnxruntime", "diffusers"])
def test_the_libraries(tiny: Workload, name: str) -> None:
    """Each computes the same pictures; diffusers' own network says how it differs."""
    (one,) = [each for each in PEERS if each.name == name]
    reason = one.why_not(torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)
    with torch.no_grad():
        made = one.build(tiny, "fp32", 1)
        got = tiny.run(made.denoise, made.network_dtype)
        again = tiny.run(made.denoise, made.network_dtype)
    assert got.equal(again)
    assert made.launches
    if name == "diffusers":
        assert made.gflop is not None
        assert "other weights" in made.note
    else:
        eager = peers.PEERS[1].build(tiny, "fp32", 1)
        assert psnr(got, tiny.run(eager.denoise, eager.network_dtype)) > 80


def test_torch_compile(tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """How it is asked, without minutes of its compiler."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", lambda network, **options: asked.update(options) or network)
    (one,) = [each for each in PEERS if each.name == "torch_compile"]
    with torch.no_grad():
        made = one.build(tiny, "fp32", 1)
        assert tiny.run(made.denoise, made.network_dtype).isfinite().all()
    assert asked == {"fullgraph": True, "dynamic": False, "options": {"freezing": True}}


def test_torch_compile_with_a_broken_cache(tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a library, left by a run that was killed, is compiled anew elsewhere; what else fails is not tried twice."""
    folders: list[str | None] = []
    said = "ImportError: /cache/x.main.so: file too short"

    def fails(network: Any, **options: Any) -> Any:
        folders.append(os.environ.get("TORCHINDUCTOR_CACHE_DIR"))
        if len(folders) == 1:
            raise RuntimeError(said)
        return network

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/cache")
    (one,) = [each for each in PEERS if each.name == "torch_compile"]
    with torch.no_grad():
        made = one.build(tiny, "fp32", 1)
        assert tiny.run(made.denoise, made.network_dtype).isfinite().all()
    assert folders[0] == os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/cache"
    assert len(folders) == 2
    assert folders[1] != "/cache"
    folders.clear()
    said = "no compiler"
    with pytest.raises(RuntimeError, match="no compiler"):
        one.build(tiny, "fp32", 1)
    assert folders == ["/cache"]


def test_the_pause_is_not_timed() -> None:
    spread = interleaved({"x": Candidate(lambda _: None)}, "cpu", 0.0, least=2, warm_up=0, pause=0.05)["x"]
    assert spread.calls == 2
    assert spread.best <= spread.p80 < 0.04


def test_the_truth_is_float32_and_no_tf32(tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's convolutions round to 10 bits unless told otherwise."""
    seen: list[bool] = []
    plain, before = rows.plain, torch.backends.cudnn.allow_tf32

    def watched(model: UNet) -> torch.nn.Module:
        seen.append(torch.backends.cudnn.allow_tf32)
        return plain(model)

    monkeypatch.setattr(rows, "plain", watched)
    rows._walk(tiny, "fp32")
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32 == before


def test_the_judge_sees_a_wrong_argument(tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that changes little: what attention is multiplied with."""
    right = bind._ARGUMENTS[nodes.Attend]

    def wrong(*args: Any) -> Any:
        dtype, (q, k, v, scale, out) = right(*args)
        return dtype, (q, k, v, 1.001 * scale, out)

    asked = Asked(["fp32"], seconds=0, least=2)
    assert measure(tiny, asked, CEILINGS).rows
    monkeypatch.setitem(bind._ARGUMENTS, nodes.Attend, wrong)
    assert "wrong, so it is not timed" in measure(tiny, asked, CEILINGS).absent[0]["reason"]


@pytest.mark.usefixtures("no_ceilings")
def test_the_bench_command(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.json"
    quick = ["--seconds", "0", "--walks", "2", "--threads", "1", "--preset", str(tiny_model), "--dtype", "fp32"]
    command = ["bench", *quick, "--batch", "1", "2", "--steps", "1", "--peers", "eager", "xformers"]
    assert main([*command, "--json", str(target)]) == 0
    report = json.loads(target.read_text())
    assert [(row["name"], row["batch"]) for row in report["rows"]] == [
        ("idm_fast", 1), ("eager", 1), ("idm_fast", 2), ("eager", 2),
    ]  # fmt: skip
    assert {"device", "commit", "versions", "threads", "load_average"} <= set(report["machine"])
    assert report["absent"][0] == {
        "name": "xformers", "preset": str(tiny_model), "dtype": "", "reason": "runs on cuda only",
    }  # fmt: skip
    captured = capsys.readouterr()
    assert captured.out.count("| idm_fast |") == 2
    assert "not timed: xformers" in captured.err
    assert main([*command[:-3], "--json", "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dtype", "fp16"], "--dtype: dtype must be fp32, bf16 or int8 on a CPU, got fp16"),
        (["--dtype", "fp8"], "--dtype: dtype must be one that the device has: fp8 needs a CUDA device of sm_90"),
        (["--cache-every", "0"], "cache_every must be a whole number >= 1, got 0"),
        (["--walks", "1"], "--walks must be >= 2, got 1"),
        (["--threads", "0"], "--threads must be >= 1, got 0"),
        (["--threads", "100000000000"], "--threads must be <= 1024, got 100000000000"),
        (["--seconds", "nan"], "--seconds must be >= 0 and finite, got nan"),
        (["--seconds", "inf"], "--seconds must be >= 0 and finite, got inf"),
        (["--backend", "nobody"], "--backend must be one of"),
        (["--json", "."], "--json must be a file, got the folder ."),
        (["--peers", "nobody"], "--peers must be some of"),
        (["--preset", "nobody"], "preset must be one of"),
        (["--size", "100"], "size must be a multiple of 8"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_profile_goes_to_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before any time is spent."""
    (tmp_path / "file").write_text("")
    assert main(["profile", "--out", str(tmp_path / "file")]) == 2
    assert "--out must be a folder that can be written, got" in capsys.readouterr().err


def test_profile_of_the_engine(tiny: Workload, tmp_path: Path) -> None:
    engine = ours.engine(tiny, "fp32")
    found = of_engine(engine, tiny, 2)
    assert [call.layer for call in found.calls] == [node.layer for node in engine.nodes]
    assert found.launches == engine.launches
    assert found.between < 1
    assert sum(call.flops for call in found.calls) == sum(node.flops for node in engine.nodes)
    assert ("conv2d", found.calls[1].backend) in by_op(found.calls)
    assert call_table(found, CEILINGS, 3).count("\n") == 4
    assert "all" in op_table(found, CEILINGS)
    write_roofline(tmp_path / "roof.png", found, CEILINGS, "tiny")
    assert (tmp_path / "roof.png").stat().st_size > 1000
    # The engine still walks as before.
    assert ours.run(engine, tiny).equal(ours.run(ours.engine(tiny, "fp32"), tiny))


def test_profile_of_plain_modules(tiny: Workload) -> None:
    found = of_modules(tiny, "fp32", 2)
    names = {call.layer: call for call in found.calls}
    assert {"stem", "out_conv", "middle.0.attention", "middle.0.attention.norm"} <= set(names)
    assert sum(call.flops for call in found.calls) == total_flops(tiny.layers)
    assert all(call.seconds > 0 for call in found.calls)


@pytest.mark.usefixtures("no_ceilings")
@pytest.mark.parametrize("more", [[], ["--no-engine"]])
def test_the_profile_command(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    command = ["profile", "--preset", str(tiny_model), "--dtype", "fp32", "--repeats", "2", "--out", str(tmp_path)]
    assert main([*command, *more, "--size", "16"]) == 0
    said = capsys.readouterr().out
    assert "of it outside of" in said
    assert "ncu --nvtx" in said
    same = f"idm-fast profile --preset {tiny_model} --batch 1 --dtype fp32 --size 16{''.join(f' {m}' for m in more)}"
    assert said.count(same) == 3
    report = json.loads((tmp_path / "profile.json").read_text())
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert len(trace) == len(report["calls"]) == report["launches"]
    assert {"layer", "op", "backend", "us", "flops", "bytes", "roofline_fraction", "launches"} <= set(
        report["calls"][0]
    )
    assert (tmp_path / "roofline.png").is_file()
    assert (tmp_path / "torch.json").is_file() == (not more)
    assert main([*command, "--no-engine", "--dtype", "int8"]) == 2


def test_what_diffusers_cannot_say() -> None:
    from idm_fast.bench.peers.diffusers_peer import differences

    said = {name: "; ".join(differences(PRESETS[name].unet, 2)) for name in ("idm-128", "sr3-128", "gd-256")}
    assert "2 residual blocks in every level, ours (1, 2, 1)" in said["idm-128"]
    assert "time embedding 256 wide, ours 128" in said["idm-128"]
    assert "q, k and v with bias" in said["sr3-128"]
    assert "ours by residual blocks" in said["gd-256"]
