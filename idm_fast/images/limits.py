"""Size limits and file extensions, in one place so that reading, writing and folder scans agree."""

from __future__ import annotations

from idm_fast.errors import IdmFastError

MAX_SIDE = 65_535  # a larger side fits in no format that pictures are exchanged in
# Just below Pillow's own hard limit (2 x 89,478,485); 175 megapixels are 2.1 GB as float32 RGB.
MAX_PIXELS = 175_000_000

# extension -> Pillow format name. Left out on purpose: scripts (Pillow would run
# Ghostscript) and formats without a signature, which take any file for a picture.
READABLE = {
    ".png": "PNG",
    ".apng": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".mpo": "MPO",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
    ".dib": "DIB",
    ".gif": "GIF",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".pbm": "PPM",
    ".pnm": "PPM",
    ".jp2": "JPEG2000",
    ".avif": "AVIF",
}
WRITABLE = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}


def check_size(width: int, height: int, name: str) -> None:
    """Raises ``IdmFastError`` unless 1 <= sides <= ``MAX_SIDE`` and the area is at most ``MAX_PIXELS``."""
    if width < 1 or height < 1:
        raise IdmFastError(f"{name}: picture must have at least 1 x 1 pixels, got {width} x {height}")
    if max(width, height) > MAX_SIDE:
        raise IdmFastError(f"{name}: sides must be at most {MAX_SIDE:,} pixels, got {width:,} x {height:,}")
    if width * height > MAX_PIXELS:
        raise IdmFastError(
            f"{name}: picture must have at most {MAX_PIXELS:,} pixels, got {width:,} x {height:,} = {width * height:,}"
        )
