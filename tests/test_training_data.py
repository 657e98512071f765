"""Pairs for training: item i depends on the seed and i alone, and a folder's faults are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

from idm_fast.errors import IdmFastError
from idm_fast.training.data import FaceFile, FacePairs, UnreadableError, fingerprint, list_faces, load_crop, to_tensor


def _save(path: Path, width: int, height: int = 0, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    coarse.resize((width, height or width), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def faces(tmp_path: Path) -> list[FaceFile]:
    """Five crops of 48 pixels."""
    return [FaceFile(_save(tmp_path / f"{i}.png", 48, seed=i), 200, "") for i in range(5)]


def _equal(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_an_item_depends_on_seed_and_position_alone(faces: list[FaceFile]) -> None:
    forward, backward = FacePairs(faces, 32, 12, seed=3), FacePairs(faces, 32, 50, seed=3, cache_bytes=0)
    np.random.seed(1)  # noqa: NPY002 (global states must not matter)
    items = [forward[i] for i in range(12)]
    assert len(forward) == 12
    assert all(_equal(backward[i], items[i]) for i in reversed(range(12)))
    other = FacePairs(faces, 32, 12, seed=4)
    assert not any(_equal(other[i], items[i]) for i in range(12))
    for x0, y in items:
        assert x0.shape == y.shape == (3, 32, 32)
        assert x0.dtype == y.dtype == torch.float32
        assert max(x0.abs().max(), y.abs().max()) <= 1


def test_every_picture_comes_once_an_epoch_in_another_order(tmp_path: Path) -> None:
    faces = []
    for i in range(8):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (32, 32), (30 * i, 30 * i, 30 * i)).save(path)
        faces.append(FaceFile(path, 0, ""))
    pairs = FacePairs(faces, 32, 24, seed=0)
    seen = [round(float((pairs[i][0].mean() + 1) * 127.5) / 30) for i in range(24)]
    epochs = [seen[:8], seen[8:16], seen[16:]]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # torch, where there is one core
def test_loading_processes_change_nothing(faces: list[FaceFile]) -> None:
    def batches(workers: int) -> list[torch.Tensor]:
        part = Subset(FacePairs(faces, 32, 12, seed=3), range(2, 12))
        return [torch.stack(batch) for batch in DataLoader(part, 4, num_workers=workers)]

    for alone, shared in zip(batches(0), batches(2), strict=True):
        assert torch.equal(alone, shared)


def test_the_cache_is_bounded(faces: list[FaceFile]) -> None:
    pairs = FacePairs(faces, 32, 10, seed=0, cache_bytes=2 * 48 * 48 * 3 + 1)
    for i in range(10):
        pairs[i]
    assert len(pairs._cache) == 2


def test_jitter_is_small_and_leaves_no_border(tmp_path: Path) -> None:
    """A white picture stays white at every corner, whether it is turned (large) or shifted (small)."""
    for side in (32, 96):
        path = tmp_path / f"{side}.png"
        Image.new("RGB", (side, side), (255, 255, 255)).save(path)
        pairs = FacePairs([FaceFile(path, 0, "")], 32, 40, seed=0)
        assert all(torch.equal(pairs[i][0], torch.ones(3, 32, 32)) for i in range(40))


def test_without_jitter_an_item_is_the_picture_or_its_mirror_image(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.png", 32)
    x0 = load_crop(path, 32)
    pairs = FacePairs([FaceFile(path, 0, "")], 32, 8, seed=0, jitter=0)
    mirrored = [not torch.equal(pairs[i][0], x0) for i in range(8)]
    assert 0 < sum(mirrored) < 8
    assert all(torch.equal(pairs[i][0], x0.flip(2)) for i in range(8) if mirrored[i])


def test_an_unreadable_file_is_named_once_and_replaced(
    faces: list[FaceFile], capsys: pytest.CaptureFixture[str]
) -> None:
    faces[2].path.write_bytes(faces[2].path.read_bytes()[:100])
    faces[4].path.unlink()
    pairs = FacePairs(faces, 32, 15, seed=0)
    items = [pairs[i] for i in range(15)]
    said = capsys.readouterr().err
    assert said.count("2.png: cannot be read as a picture") == said.count("4.png: cannot be read as a picture") == 1
    again = FacePairs(faces, 32, 15, seed=0)
    assert all(_equal(again[i], items[i]) for i in (14, 3, 7))
    for face in faces:
        face.path.write_bytes(b"")
    with pytest.raises(IdmFastError, match="none of the 5 pictures can be read"):
        FacePairs(faces, 32, 15, seed=0)[0]


def test_a_photograph_is_not_squeezed_into_a_square(tmp_path: Path) -> None:
    path = _save(tmp_path / "wide.png", 64, 48)
    with pytest.raises(IdmFastError, match=r"wide.png: must be an aligned crop = square, got 64 x 48; .*--align"):
        load_crop(path, 32)
    with pytest.raises(IdmFastError, match="must be an aligned crop"):
        FacePairs([FaceFile(path, 0, "")], 32, 1, seed=0)[0]


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"text"])
def test_files_that_are_no_pictures(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(IdmFastError, match=r"bad.png: cannot be read as a picture: ") as caught:
        load_crop(path, 32)
    assert "\n" not in str(caught.value)
    with pytest.raises(IdmFastError, match="cannot be read"):
        load_crop(tmp_path, 32)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_other_kinds_of_pixels_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (16, 16), (200, 200, 200)).convert(mode).save(path)
    assert load_crop(path, 8).shape == (3, 8, 8)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif"])
def test_sixteen_bits_are_not_clipped(tmp_path: Path, name: str) -> None:
    levels = np.tile(np.arange(0, 256, 4, dtype=np.uint16) * 257, (64, 1))
    Image.fromarray(levels).save(tmp_path / name)
    Image.fromarray((levels // 257).astype(np.uint8)).save(tmp_path / "eight.png")
    assert torch.equal(load_crop(tmp_path / name, 64), load_crop(tmp_path / "eight.png", 64))


def test_a_turned_crop_is_set_upright(tmp_path: Path) -> None:
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen, it must be turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(load_crop(tmp_path / "turned.png", 32), load_crop(tmp_path / "upright.png", 32))


def test_a_torn_picture_of_sixteen_bits_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "torn.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 65536, (64, 64), dtype=np.uint16)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UnreadableError, match=r"torn\.png"):
        load_crop(path, 64)


def test_hidden_files_are_no_faces(tmp_path: Path) -> None:
    """What a Mac leaves beside each picture, and what a killed ``idm-fast clean`` leaves unfinished."""
    for name in ("a.png", "._a.png", ".clean/parts/1-0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert [face.path.name for face in list_faces(tmp_path, "train")] == ["a.png"]


def test_pixels_become_minus_one_to_one() -> None:
    x = to_tensor(Image.new("RGB", (8, 8), (0, 255, 51)), 8)
    assert x[:, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])


def test_a_table_chooses_split_and_size(tmp_path: Path) -> None:
    (tmp_path / "faces.csv").write_text(
        "file,split,native_px,source\na.png,train,100,x\nb.png,train,300,y\nc.png,val,300,z\n"
    )
    assert [face.path.name for face in list_faces(tmp_path, "train")] == ["a.png", "b.png"]
    assert list_faces(tmp_path, "train", 250) == [FaceFile(tmp_path / "b.png", 300, "y")]
    assert [face.path.name for face in list_faces(tmp_path, "val")] == ["c.png"]
    with pytest.raises(IdmFastError, match="no face of split 'val' with native_px >= 400"):
        list_faces(tmp_path, "val", 400)


def test_a_table_that_a_spreadsheet_saved(tmp_path: Path) -> None:
    """They put a byte-order mark first, which would become part of the first column's name."""
    (tmp_path / "faces.csv").write_text("file,split,native_px\r\na.png,train,300\r\n", encoding="utf-8-sig")
    assert list_faces(tmp_path, "train") == [FaceFile(tmp_path / "a.png", 300, "")]


def test_a_folder_without_a_table_is_all_for_training(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    _save(tmp_path / "deep" / "b.PNG", 8)
    _save(tmp_path / "a.jpg", 8)
    (tmp_path / "readme.txt").write_text("")
    assert [face.path.name for face in list_faces(tmp_path, "train", 128)] == ["a.jpg", "b.PNG"]
    with pytest.raises(IdmFastError, match="no face of split 'val'"):
        list_faces(tmp_path, "val")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,split\na.png,train\n", r"faces.csv: columns must include \['file', 'native_px', 'split'\], got"),
        ("file,split,native_px\na.png,train,large\n", "faces.csv: native_px must be a whole number in every row"),
        ("file,split,native_px\na.png,train\n", "faces.csv: native_px must be a whole number in every row"),
        ("file,split,native_px\n", "no face of split 'train'"),
        ("", "no face of split 'train'"),
        ("\x00\xff", "faces.csv: cannot be read as a table"),
    ],
)
def test_a_broken_table_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "faces.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(IdmFastError, match=message):
        list_faces(tmp_path, "train")


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(IdmFastError, match="none: must be a folder of aligned faces or photographs, got nothing"):
        list_faces(tmp_path / "none", "train")


def test_faces_outside_of_their_tables_folder(tmp_path: Path) -> None:
    """A table may name its pictures from the root: a run that is resumed knows them by that."""
    (tmp_path / "table").mkdir()
    inner, outer = _save(tmp_path / "table" / "a.png", 16), _save(tmp_path / "b.png", 16, seed=1)
    (tmp_path / "table" / "faces.csv").write_text(f"file,split,native_px\na.png,train,200\n{outer},train,200\n")
    faces = list_faces(tmp_path / "table", "train")
    assert [face.path for face in faces] == [inner, outer]
    before = fingerprint(faces, tmp_path / "table")
    _save(outer, 20)
    after = fingerprint(faces, tmp_path / "table")
    assert before["faces"] == after["faces"]
    assert before["bytes"] != after["bytes"]
