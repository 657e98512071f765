"""benchmarks/spoil.py: a training set with something to clean, and the truth beside it."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from idm_fast.errors import IdmFastError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def spoil() -> ModuleType:
    spec = importlib.util.spec_from_file_location("spoil", ROOT / "benchmarks" / "spoil.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["spoil"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    folder = tmp_path / "faces"
    rng = np.random.default_rng(0)
    rows = []
    for number in range(24):
        split = "val" if number % 4 == 0 else "train"
        name = f"{split}/{number:05d}.png"
        (folder / split).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / name)
        rows.append((name, split, "drawn", 100 if number == 1 else 256))
    with (folder / "faces.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "split", "source", "native_px"), *rows])
    return folder


def _set(folder: Path) -> dict[str, tuple[dict[str, str], np.ndarray]]:
    with (folder / "faces.csv").open(newline="") as file:
        return {row["file"]: (row, np.asarray(Image.open(folder / row["file"]))) for row in csv.DictReader(file)}


def test_half_of_the_training_faces_are_spoiled(spoil: ModuleType, faces: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    counts = spoil.run(spoil.parse(["--data", str(faces), "--out", str(out), "--size", "32", "--seed", "3"]))
    original, spoiled = _set(out / "original"), _set(out / "spoiled")
    assert original.keys() == spoiled.keys()
    assert len(original) == 23, "only the small one is left out"
    changed = {name for name in original if not np.array_equal(original[name][1], spoiled[name][1])}
    assert changed == {name for name, (row, _) in spoiled.items() if row["spoiled"] == "1"}
    assert 4 <= len(changed) <= 13
    assert counts == {"spoiled": len(changed), "kept": 17 - len(changed), "val": 6}
    assert all(name.startswith("train/") for name in changed)
    assert all(row["spoiled"] == "0" for row, _ in original.values())
    name = next(iter(original))
    assert np.array_equal(original[name][1], np.asarray(Image.open(faces / name))), "a crop of its own size is itself"


def test_the_same_seed_spoils_the_same_faces_alike(spoil: ModuleType, faces: Path, tmp_path: Path) -> None:
    sets = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        out = tmp_path / name
        spoil.run(spoil.parse(["--data", str(faces), "--out", str(out), "--size", "32", "--seed", str(seed)]))
        sets.append({file: pixels.tobytes() for file, (_, pixels) in _set(out / "spoiled").items()})
    assert sets[0] == sets[1] != sets[2]


def test_what_is_wrong_is_said(
    spoil: ModuleType, faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert spoil.main(["--data", str(faces), "--out", str(faces)]) == 1
    assert "must be a new folder" in capsys.readouterr().err
    assert spoil.main(["--data", str(faces), "--out", str(tmp_path / "x"), "--share", "1.5"]) == 1
    assert "--share must lie in [0, 1], got 1.5" in capsys.readouterr().err
    assert spoil.main(["--data", str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == 1
    assert "must be a folder of aligned faces" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_two_faces_of_one_name_are_refused(spoil: ModuleType, faces: Path, tmp_path: Path) -> None:
    """One would be written over the other, and its truth would be another person."""
    (faces / "other").mkdir()
    Image.new("RGB", (32, 32)).save(faces / "other" / "00002.png")
    with (faces / "faces.csv").open("a", newline="") as file:
        csv.writer(file).writerow(("other/00002.png", "train", "drawn", 256))
    with pytest.raises(IdmFastError, match=r"other/00002\.png: must have a name of its own, but .*train/00002\.png"):
        spoil.run(spoil.parse(["--data", str(faces), "--out", str(tmp_path / "out"), "--size", "32"]))
