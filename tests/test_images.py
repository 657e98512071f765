"""Reading and writing pictures: every mode survives or is noted, and every bad file is one clear line."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from idm_fast.errors import IdmFastError
from idm_fast.images import (
    copy_file,
    encode_image,
    image_size,
    picture_from_array,
    picture_from_pil,
    read_image,
    write_image,
)
from idm_fast.images.limits import MAX_SIDE

RNG = np.random.default_rng(5)


def noise(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


@pytest.mark.parametrize("extension", ["png", "tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [0, 2, 3, 4], ids=["grey", "grey+alpha", "rgb", "rgba"])
def test_lossless_formats_return_every_sample(tmp_path: Path, extension: str, dtype: Any, channels: int) -> None:
    samples = noise(37, 53, *([channels] if channels else []), dtype=dtype)
    path = tmp_path / f"x.{extension}"
    assert write_image(picture_from_array(samples), path) == []
    picture = read_image(path)
    if extension == "tif" and dtype == np.uint16 and channels == 2:  # written as RGBA, which programs can read
        samples = samples[..., [0, 0, 0, 1]]
    assert picture.to_array().dtype == dtype
    np.testing.assert_array_equal(picture.to_array(), samples)
    assert picture.bit_depth == np.dtype(dtype).itemsize * 8
    assert picture.notes == []


def test_files_of_other_programs_in_16_bit(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    samples = noise(33, 21, 3, dtype=np.uint16)
    for number, options in enumerate([{}, {"compression": "zlib"}, {"byteorder": ">"}, {"rowsperstrip": 4}]):
        path = tmp_path / f"{number}.tif"
        tifffile.imwrite(path, samples, photometric="rgb", **options)
        np.testing.assert_array_equal(read_image(path).to_array(), samples)
    path = tmp_path / "ours.tif"
    write_image(picture_from_array(samples), path)
    np.testing.assert_array_equal(tifffile.imread(path), samples)


def test_interlaced_16_bit_png(tmp_path: Path) -> None:
    """A 1 x 1 picture has the same bytes with and without interlacing, so only the header differs."""
    path = tmp_path / "x.png"
    write_image(picture_from_array(noise(1, 1, 3, dtype=np.uint16)), path)
    data = bytearray(path.read_bytes())
    data[28] = 1
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    expected = read_image(path).to_array()
    path.write_bytes(bytes(data))
    np.testing.assert_array_equal(read_image(path).to_array(), expected)


@pytest.mark.parametrize("shape", [(1, 1, 3), (9, 7), (9, 7, 2), (40, 33, 3), (5, 6, 4), (700, 600, 3)])
def test_quick_png_loses_nothing(shape: tuple[int, ...]) -> None:
    """Of noise and of a smooth picture, so that every filter is the best of some row; the last in two strips."""
    ramp = np.indices(shape[:2]).sum(0) % 256
    smooth = ramp if len(shape) == 2 else np.repeat(ramp[..., None], shape[2], 2)
    half = np.arange(shape[0])[:, None] % 3 == 0 if len(shape) == 2 else np.arange(shape[0])[:, None, None] % 3 == 0
    samples = np.where(half, noise(*shape), smooth.astype(np.uint8))
    packed = encode_image(picture_from_array(samples), "x.png")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(packed))), samples)


def test_what_an_encoder_refuses_is_of_its_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cleaner goes on with the others: an ``OSError`` would pass for a full disk, or end the run."""

    def refuse(*args: object, **options: object) -> None:
        raise OSError("encoder error -2")

    monkeypatch.setattr(Image.Image, "save", refuse)
    with pytest.raises(IdmFastError, match=r"^x\.jpg: cannot be encoded as JPEG: encoder error -2$"):
        encode_image(picture_from_array(noise(4, 4, 3)), "x.jpg")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_reset(tmp_path: Path, orientation: int) -> None:
    upright = noise(5, 7, 3)
    image = Image.fromarray(upright)
    # Pillow's transpose operations that a camera with this orientation has applied to the upright scene.
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = image.transpose(undo[orientation]) if orientation > 1 else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "Maker"
    stored.save(tmp_path / "x.png", exif=exif)
    picture = read_image(tmp_path / "x.png")
    np.testing.assert_array_equal(picture.to_array(), upright)
    for name in ("out.png", "out.jpg", "out.webp", "out.tif"):
        write_image(picture, tmp_path / name)
        with Image.open(tmp_path / name) as written:
            assert written.getexif().get(0x0112, 1) == 1
            assert written.getexif()[0x010F] == "Maker"


def test_a_folder_is_no_picture_and_said_once(tmp_path: Path) -> None:
    with pytest.raises(IdmFastError) as caught:
        read_image(tmp_path)
    assert str(caught.value) == f"{tmp_path}: expected a picture file, got a directory"


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("extension", ["png", "tif"])
@pytest.mark.parametrize("channels", [0, 2, 3, 4], ids=["grey", "grey+alpha", "rgb", "rgba"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_exif_with_its_parts_is_kept(tmp_path: Path, dtype: Any, channels: int, extension: str, endian: str) -> None:
    exif, place = Image.Exif(), 0x8825
    exif.endian = endian
    exif[0x010F], exif[0x0132] = "Maker", "2020:01:02 03:04:05"
    exif.get_ifd(0x8769).update({0x9003: "2020:01:02 03:04:05", 0x829A: 0.005, 0x927C: b"maker's own \0\1"})
    exif.get_ifd(place).update({1: "N", 2: (47.0, 30.0, 15.5)})
    samples = noise(5, 7, *([channels] if channels else []), dtype=dtype)
    picture = picture_from_array(samples)
    picture.exif, picture.icc = exif.tobytes(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = tmp_path / f"x.{extension}"
    assert write_image(picture, path) == []
    with Image.open(path) as image:
        written = image.getexif()
        assert (written[0x010F], written[0x0132]) == ("Maker", "2020:01:02 03:04:05")
        below, gps = written.get_ifd(0x8769), written.get_ifd(place)
        assert (below[0x9003], below[0x829A], below[0x927C]) == ("2020:01:02 03:04:05", 0.005, b"maker's own \0\1")
        assert (gps[1], gps[2]) == ("N", (47.0, 30.0, 15.5))
    again = read_image(path)
    assert (again.bit_depth, again.icc) == (picture.bit_depth, picture.icc)
    assert again.exif is not None


def test_icc_profile_is_kept(tmp_path: Path) -> None:
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for dtype in (np.uint8, np.uint16):
        picture = picture_from_array(noise(8, 8, 3, dtype=dtype))
        picture.icc = icc
        for name in ("x.png", "x.jpg", "x.tif"):
            write_image(picture, tmp_path / name)
            assert read_image(tmp_path / name).icc == icc


def test_jpeg_is_written_without_chroma_subsampling(tmp_path: Path) -> None:
    write_image(picture_from_array(noise(16, 16, 3)), tmp_path / "x.jpg")
    with Image.open(tmp_path / "x.jpg") as image:
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("mode", "channels", "note"),
    [("CMYK", 3, "CMYK"), ("P", 3, None), ("1", 0, None), ("YCbCr", 3, "YCbCr"), ("HSV", 3, None), ("LAB", 3, "LAB")],
)
def test_other_modes_are_converted(tmp_path: Path, mode: str, channels: int, note: str | None) -> None:
    source = Image.fromarray(noise(9, 11, 3))
    image = source.convert(mode) if mode != "LAB" else Image.frombytes("LAB", (11, 9), noise(9, 11, 3).tobytes())
    picture = picture_from_pil(image)
    assert picture.to_array().shape == ((9, 11, channels) if channels else (9, 11))
    assert note is None or any(note in text for text in picture.notes)


def test_cmyk_file_and_palette_transparency(tmp_path: Path) -> None:
    Image.fromarray(noise(9, 11, 4), "CMYK").save(tmp_path / "x.jpg")
    assert read_image(tmp_path / "x.jpg").notes == ["converted from CMYK to RGB"]
    palette = Image.fromarray(noise(9, 11, 3)).quantize(16)
    palette.save(tmp_path / "x.gif", transparency=3)
    assert read_image(tmp_path / "x.gif").alpha is not None


def test_animation_gives_its_first_frame_with_a_note(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    picture = read_image(tmp_path / "x.gif")
    assert abs(float(picture.pixels.mean()) * 255 - 10) < 2
    assert "2 frames" in picture.notes[0]


def test_losses_of_the_output_format_are_noted(tmp_path: Path) -> None:
    deep = picture_from_array(noise(8, 8, 4, dtype=np.uint16))
    notes = write_image(deep, tmp_path / "x.jpg")
    assert any("8 bits" in note for note in notes)
    assert any("transparency" in note for note in notes)
    assert read_image(tmp_path / "x.jpg").alpha is None
    assert deep.alpha is not None  # the input is not changed


def test_wrong_extension_with_good_content_is_read_with_a_note(tmp_path: Path) -> None:
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.jpg")
    picture = read_image(tmp_path / "x.jpg")
    assert picture.notes == ["the name ends in .jpg but the content is PNG"]


def jpeg_bytes() -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(file, "JPEG")
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.jpg", b"", "empty file"),
        ("text.jpg", b"hello", "text"),
        ("page.png", b"<html>", "web page"),
        ("doc.png", b"%PDF-1.7", "PDF"),
        ("truncated.jpg", jpeg_bytes()[:600], "complete picture"),
        ("header.png", png_header(10, 10)[:40], "complete picture|expected a picture"),
        ("short.png", png_header(300, 300), "complete picture"),
        ("huge.png", png_header(30_000, 30_000), "at most 175,000,000 pixels"),
        ("wide.png", png_header(70_000, 10), f"at most {MAX_SIDE:,}"),
        ("binary.bin", b"\x00\x01\x02\x03" * 9, "begins with the bytes 00 01"),
    ],
)
def test_bad_files_are_one_line_that_names_the_file(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(IdmFastError, match=expected) as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_directory_and_unreadable(tmp_path: Path) -> None:
    with pytest.raises(IdmFastError, match="no such file"):
        read_image(tmp_path / "missing.jpg")
    with pytest.raises(IdmFastError, match="got a directory"):
        read_image(tmp_path)
    with pytest.raises(IdmFastError, match="expected a readable"):
        read_image(tmp_path / "nul\0.jpg")
    if os.geteuid() != 0:  # root reads everything
        secret = tmp_path / "secret.jpg"
        secret.write_bytes(jpeg_bytes())
        secret.chmod(0)
        with pytest.raises(IdmFastError, match="permission denied"):
            read_image(secret)


def test_30000_pixels_wide(tmp_path: Path) -> None:
    picture = picture_from_array(noise(2, 30_000, 3))
    write_image(picture, tmp_path / "x.png")
    assert image_size(tmp_path / "x.png") == (30_000, 2)
    assert read_image(tmp_path / "x.png").width == 30_000
    with pytest.raises(IdmFastError, match="WEBP holds at most 16,383"):
        write_image(picture, tmp_path / "x.webp")


def test_failed_writes_leave_nothing(tmp_path: Path) -> None:
    picture = picture_from_array(noise(8, 8, 3))
    with pytest.raises(IdmFastError, match="No such file"):
        write_image(picture, tmp_path / "missing" / "x.png")
    (tmp_path / "x.png").mkdir()
    with pytest.raises(IdmFastError, match="Is a directory"):
        write_image(picture, tmp_path / "x.png")
    with pytest.raises(IdmFastError, match="extension must be one of"):
        write_image(picture, tmp_path / "x.psd")
    picture.pixels[3, 2, 1] = np.nan
    kept = tmp_path / "kept.png"
    kept.write_bytes(b"old")
    with pytest.raises(IdmFastError, match="row 3, column 2"):
        write_image(picture, kept)
    assert kept.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.png", "x.png"]


def test_copy_file_and_permissions(tmp_path: Path) -> None:
    source = tmp_path / "a.jpg"
    source.write_bytes(b"data")
    copy_file(source, tmp_path / "b.jpg")
    assert (tmp_path / "b.jpg").read_bytes() == b"data"
    assert (tmp_path / "b.jpg").stat().st_mode & 0o777 == source.stat().st_mode & 0o777


def test_arrays_are_checked() -> None:
    bad = np.full((4, 5, 3), 0.5, dtype=np.float32)
    bad[2, 1, 0] = np.nan
    bad[3, 3, 2] = np.inf
    cases: list[tuple[Any, str]] = [
        (bad, "2 bad values, the first .nan. at row 2, column 1"),
        (np.full((4, 4, 3), 200, np.float32), "must be in 0..1, got 200 to 200"),
        (np.zeros((4, 4, 3)), "dtype must be .* got float64"),
        (np.zeros((4, 4, 5), np.uint8), r"shape must be .* got \[4, 4, 5\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), "shape must be"),
        (np.zeros((0, 4, 3), np.uint8), "at least 1 x 1"),
        ([[1, 2]], "must be a numpy array, got list"),
    ]
    for array, expected in cases:
        with pytest.raises(IdmFastError, match=expected):
            picture_from_array(array)
    assert picture_from_array(np.zeros((1, 1), np.uint8)).is_grey


def test_rounding_is_to_nearest() -> None:
    values = np.array([[0.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.0]], dtype=np.float32)
    assert picture_from_array(values).to_array().tolist() == [[0, 0, 1, 255, 255]]
    assert picture_from_array(values).to_array(16).tolist() == [[0, 103, 154, 65432, 65535]]
