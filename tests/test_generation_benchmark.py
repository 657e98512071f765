"""benchmarks/generation.py: the order of sets whose order is known, runs that go on, and what it refuses."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from idm_fast.config import PRESETS, DiffusionConfig, ModelConfig, UNetConfig
from idm_fast.errors import IdmFastError

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
MODULES = ("generation_report", "generation")
TINY = ModelConfig(
    "tiny-gen",
    UNetConfig(
        image_size=16, model_channels=16, channel_mult=(1,), num_res_blocks=(1,), unshuffle=4, norm_groups=4,
        num_head_channels=16, embed_channels=16,
    ),
    DiffusionConfig("cosine_continuous", "v"), "dpmpp_2m", 4,
)  # fmt: skip


@pytest.fixture
def generation(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setitem(PRESETS, "tiny-gen", TINY)
    try:
        yield importlib.import_module("generation")
    finally:
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """``good``: plain pictures of one colour, of which the reference holds others; ``noise``: of noise."""
    rng = np.random.default_rng(0)
    (tmp_path / "reference").mkdir()
    rows = ["file,split,native_px"]
    for kind in ("good", "noise", "reference"):
        (tmp_path / kind).mkdir(exist_ok=True)
        for i in range(20):
            plain = np.array([200, 120, 60], np.uint8) + rng.integers(0, 30, dtype=np.uint8)
            picture = (
                rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) if kind == "noise" else np.tile(plain, (16, 16, 1))
            )
            Image.fromarray(picture).save(tmp_path / kind / f"{i}.png")
            if kind == "reference":
                rows.append(f"{i}.png,{'val' if i % 2 else 'train'},16")
    (tmp_path / "reference" / "faces.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def command(sets: Path, *names: str) -> list[str]:
    return [
        "--sets", *(f"{name}={sets / name}" for name in names), "--reference", str(sets / "reference"),
        "--out", str(sets / "out"), "--seeds", "0", "1", "--steps", "40", "--batch-size", "8", "--samples", "12",
        "--preset", "tiny-gen", "--learning-rate", "0.01", "--precision", "fp32",
    ]  # fmt: skip


def test_the_better_set_wins_and_a_set_can_be_added(
    generation: ModuleType, sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generation.main([*command(sets, "noise"), "--seeds", "0"]) == 0
    before = (sets / "out" / "noise-0" / "model.safetensors").read_bytes()
    samples = (sets / "out" / "noise-0" / "samples.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert generation.main(command(sets, "noise", "good")) == 0
    assert (sets / "out" / "noise-0" / "model.safetensors").read_bytes() == before
    assert (sets / "out" / "noise-0" / "samples.safetensors").stat().st_mtime_ns == samples
    report = json.loads((sets / "out" / "results.json").read_text())
    rows = {(row["set"], row["seed"]): row for row in report["rows"]}
    assert set(rows) == {(name, seed) for name in ("noise", "good") for seed in (None, 0, 1)}
    for seed in (None, 0, 1):
        assert rows["good", seed]["fd_val"]["mean"] < rows["noise", seed]["fd_val"]["mean"]
        assert rows["good", seed]["fd_val"]["low"] < rows["good", seed]["fd_val"]["mean"]
    assert [step for step, _ in rows["good", 1]["curve"]] == [20, 40]
    assert rows["good", 1]["last_loss"] == rows["good", 1]["curve"][-1][1]
    assert rows["good", 0]["held_out_loss"] < rows["noise", 0]["held_out_loss"]
    assert report["conditions"]["held_out_faces"] == report["conditions"]["reference_faces"] == 10
    said = capsys.readouterr().out
    assert said.strip() == (sets / "out" / "results.md").read_text().strip()
    assert "good is below noise in 2 of 2 seeds, on average by" in said
    assert "| **good** | **mean ± deviation** |" in said
    for name in ("samples.jpg", "loss.png"):
        with Image.open(sets / "out" / name) as picture:
            assert picture.width >= 16 * 16


def test_a_set_that_was_made_again_is_not_taken_for_the_old_one(generation: ModuleType, sets: Path) -> None:
    run, size = sets / "out" / "good-0", TINY.unet.image_size
    generation.check_pictures(run, sets / "good", generation.Pictures(sets / "good", "train", size))
    generation.check_pictures(run, sets / "good", generation.Pictures(sets / "good", "train", size))
    with pytest.raises(IdmFastError, match=r"good-0: was trained on other pictures than are in .*; begin with another"):
        generation.check_pictures(run, sets / "good", generation.Pictures(sets / "noise", "train", size))


def test_a_curve_is_thinned_by_means(generation: ModuleType) -> None:
    curve = [(step, float(step)) for step in range(1, 61)]
    thinned = generation.thinned(curve)
    assert thinned[0] == (3, 2.0)
    assert thinned[-1] == (60, 59.0)
    assert len(thinned) == 20
    assert generation.thinned(curve[:25]) == curve[:25]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--sets", "good"], "--sets must be NAME=DIR .*, got 'good'"),
        (["--sets", "a=.", "a=."], "--sets must be NAME=DIR with a new NAME .*, got 'a=.'"),
        (["--sets", "../a=."], "--sets must be NAME=DIR .*, got '../a=.'"),
        (["--sets", "a=/nowhere"], "--sets a: must be a folder of aligned crops, got nothing at /nowhere"),
        (["--samples", "1"], r"--samples must be >= 2 and --seeds different, got 1 and \[0, 1\]"),
        (["--seeds", "2", "2"], r"--samples must be >= 2 and --seeds different, got 12 and \[2, 2\]"),
        (["--preset", "idm-64"], "preset must be a generator"),
        (["--learning-rate", "0"], "learning_rate must be a number above 0, got 0.0"),
    ],
)
def test_wrong_usage_is_one_line(
    generation: ModuleType, sets: Path, capsys: pytest.CaptureFixture[str], change: list[str], message: str
) -> None:
    assert generation.main([*command(sets, "good"), *change]) == 1
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    assert re.search(message, said), said
    assert not (sets / "out").exists()
