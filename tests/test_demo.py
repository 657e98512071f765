"""The demo, with a model that takes no time."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from idm_fast import demo
from idm_fast.images import image_size


def test_the_default_picture_is_spoiled_and_restored(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("skimage", reason="needs scikit-image, which ships the picture")
    assert demo.main(["--model", str(tiny_model), "--steps", "1", "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "1 face," in said
    assert "ms in the network (tiny, 1 step a face," in said
    assert "steps per second" in said
    sizes = {path.name: image_size(path) for path in (tmp_path / "out").iterdir()}
    assert sizes["input.png"] == sizes["restored.png"] == (512, 512)
    assert sizes["side_by_side.png"][0] > 1024


def test_a_picture_without_a_face_is_said(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(tmp_path / "wall.png")
    arguments = ["--model", str(tiny_model), "--input", str(tmp_path / "wall.png"), "-o", str(tmp_path / "out")]
    assert demo.main(arguments) == 0
    said = capsys.readouterr().out
    assert "no face found" in said
    assert "0 faces" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--input", "gone.jpg"], "gone.jpg"),
        (["--model", "nothing"], "nothing"),
        (["--steps", "0"], "steps"),
        (["-o", "file"], "file"),
        ([], "scikit-image"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str],
    said: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "skimage", None)  # as if it were not installed
    (tmp_path / "file").write_text("")
    model = [] if "--model" in arguments else ["--model", str(tiny_model)]
    assert demo.main([*model, *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1
