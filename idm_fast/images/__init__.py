"""Pictures in and out of files and arrays; nothing here knows what a face is."""

from idm_fast.images.limits import MAX_PIXELS, MAX_SIDE, READABLE, WRITABLE
from idm_fast.images.picture import Picture, picture_from_array
from idm_fast.images.read import image_size, picture_from_pil, read_image
from idm_fast.images.write import copy_file, encode_image, output_format, write_image

__all__ = [
    "MAX_PIXELS",
    "MAX_SIDE",
    "READABLE",
    "WRITABLE",
    "Picture",
    "copy_file",
    "encode_image",
    "image_size",
    "output_format",
    "picture_from_array",
    "picture_from_pil",
    "read_image",
    "write_image",
]
