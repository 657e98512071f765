"""Frees the fixed input size that is stored in an ONNX file, without the ``onnx`` package.

CenterFace is fully convolutional, but its file declares an input of 10 x 3 x 32 x 32, and onnxruntime refuses
every other size (``add_free_dimension_override_by_name`` only fixes free sizes, it cannot free fixed ones). The
declaration is a few bytes of protobuf, so this module rewrites just those bytes: it reads tags and lengths, never
tensors. It also drops the weights from the list of graph inputs: old exporters put them there, which stops
onnxruntime from folding batch norms into convolutions and makes it print one warning for each.

Field numbers are those of onnx.proto3: ModelProto.ir_version = 1, .graph = 7; GraphProto.initializer = 5,
.input = 11, .output = 12, .value_info = 13; TensorProto.name = 8; ValueInfoProto.name = 1, .type = 2;
TypeProto.tensor_type = 1; Tensor.elem_type = 1, .shape = 2; Shape.dim = 1; Dimension.dim_value = 1, .dim_param = 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FLOAT = 1  # TensorProto.DataType.FLOAT
_IR_VERSION_WITHOUT_WEIGHT_INPUTS = 4  # from this version on, initializers need not be listed as inputs


@dataclass(frozen=True)
class _Field:
    """One protobuf field: its number, its bytes as they stand in the file, and what they hold."""

    number: int
    encoded: bytes
    payload: bytes  # content of a length-delimited field, else empty
    integer: int  # value of a varint field, else 0


def free_image_size(model: bytes, image_input: str) -> bytes:
    """The same ONNX model with batch, height and width of ``image_input`` [N, 3, H, W] and of all outputs free.

    Raises ``ValueError`` when the bytes are not an ONNX model with that input.
    """
    parts: list[bytes] = []
    found = False
    for field in _fields(model):
        if field.number == 1:
            parts.append(_varint_field(1, max(field.integer, _IR_VERSION_WITHOUT_WEIGHT_INPUTS)))
        elif field.number == 7:
            graph, found = _free_graph(field.payload, image_input.encode())
            parts.append(_bytes_field(7, graph))
        else:
            parts.append(field.encoded)
    if not found:
        raise ValueError(f"not an ONNX model with an input named {image_input!r}")
    return b"".join(parts)


def _free_graph(graph: bytes, image_input: bytes) -> tuple[bytes, bool]:
    """The graph with free shapes and without weights among its inputs, and whether ``image_input`` was there."""
    fields = list(_fields(graph))
    weights = {_first(field.payload, 8) for field in fields if field.number == 5}
    parts: list[bytes] = []
    found = False
    for field in fields:
        if field.number == 13:
            continue  # stored shapes of inner tensors would contradict the free input size
        if field.number not in (11, 12):
            parts.append(field.encoded)
            continue
        name = _first(field.payload, 1)
        if field.number == 12:
            parts.append(_bytes_field(12, _value_info(name, [b"batch", name + b"_channels", b"out_h", b"out_w"])))
        elif name == image_input:
            found = True
            parts.append(_bytes_field(11, _value_info(name, [b"batch", 3, b"height", b"width"])))
        elif name not in weights:
            parts.append(field.encoded)
    return b"".join(parts), found


def _value_info(name: bytes, dims: list[int | bytes]) -> bytes:
    """A ValueInfoProto of a float tensor; a name among ``dims`` stands for a free size."""
    encoded = [_varint_field(1, dim) if isinstance(dim, int) else _bytes_field(2, dim) for dim in dims]
    shape = b"".join(_bytes_field(1, dim) for dim in encoded)
    tensor = _varint_field(1, _FLOAT) + _bytes_field(2, shape)
    return _bytes_field(1, name) + _bytes_field(2, _bytes_field(1, tensor))


def _fields(message: bytes) -> Iterator[_Field]:
    """The fields of one protobuf message in file order."""
    position = 0
    while position < len(message):
        start = position
        tag, position = _read_varint(message, position)
        kind = tag & 7
        payload, integer = b"", 0
        if kind == _VARINT:
            integer, position = _read_varint(message, position)
        elif kind == _BYTES:
            length, position = _read_varint(message, position)
            payload = message[position : position + length]
            position += length
        elif kind in (_FIXED64, _FIXED32):
            position += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"not a protobuf message: wire type {kind} at byte {start}")
        if position > len(message):
            raise ValueError(f"protobuf message ends early: field at byte {start} of {len(message)}")
        yield _Field(tag >> 3, message[start:position], payload, integer)


def _first(message: bytes, number: int) -> bytes:
    """Content of the first length-delimited field with this number, empty if there is none."""
    return next((field.payload for field in _fields(message) if field.number == number), b"")


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(message) or shift > 63:
            raise ValueError(f"not a protobuf message: bad integer near byte {position}")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3 | _VARINT) + _varint(value)


def _bytes_field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(payload)) + payload
