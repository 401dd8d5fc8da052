"""Reads tensors out of GGUF and ONNX files, the two formats in which packages carry published weights."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[np.float32]]

_GGUF_ALIGNMENT = 32  # bytes
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # by value type
_TEXT, _ARRAY = 8, 9
# Blocks of 32 weights by tensor type; Q4_1 and Q8_0 are llama.cpp's names.
_F32, _Q4_1, _Q8_0 = 0, 3, 8
_BLOCKS = {
    _F32: np.dtype([("values", "<f4", 32)]),
    _Q4_1: np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("nibbles", "u1", 16)]),
    _Q8_0: np.dtype([("scale", "<f2"), ("values", "i1", 32)]),
}


class Gguf(NamedTuple):
    """Content of a GGUF file.

    Attributes:
        values: Metadata by key, such as `llama.block_count`.
        tensors: Dequantized tensors by name.
    """

    values: dict[str, Any]
    tensors: Tensors


def read_gguf(file: Traversable) -> Gguf:
    """Reads a GGUF file whose tensors are F32, Q8_0 or Q4_1.

    Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    Raises:
        ValueError: It is no GGUF file, or a tensor has another type.
    """
    cursor = _Cursor(file.read_bytes())
    if cursor.take(4) != b"GGUF":
        raise ValueError(f"{file} is not a GGUF file")
    # Behind the magic: version (uint32), number of tensors, and number of metadata entries (uint64).
    _, num_tensors, num_values = cursor.unpack("IQQ")
    values = {cursor.text(): cursor.value(cursor.unpack("I")[0]) for _ in range(num_values)}
    entries = []
    for _ in range(num_tensors):
        name, (rank,) = cursor.text(), cursor.unpack("I")
        entries.append((name, cursor.unpack(f"{rank}Q")[::-1], *cursor.unpack("IQ")))  # sizes begin with the last axis
    # The data follow the header, aligned; a tensor's offset counts from there.
    start = -(-cursor.position // _GGUF_ALIGNMENT) * _GGUF_ALIGNMENT
    tensors = {name: _dequantize(cursor.data, start + offset, shape, kind) for name, shape, kind, offset in entries}
    return Gguf(values, tensors)


class _Cursor:
    """Reads little-endian values one after another."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def take(self, size: int) -> bytes:
        self.position += size
        return self.data[self.position - size : self.position]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{layout}", self.take(struct.calcsize(f"<{layout}")))

    def text(self) -> str:
        return self.take(self.unpack("Q")[0]).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            # An array has one type for all its entries.
            inner, length = self.unpack("IQ")
            return [self.value(inner) for _ in range(length)]
        return self.unpack(_SCALARS[kind])[0]


def _dequantize(data: bytes, start: int, shape: tuple[int, ...], kind: int) -> NDArray[np.float32]:
    if kind not in _BLOCKS:
        raise ValueError(f"GGUF tensor type {kind} is not supported, only {sorted(_BLOCKS)}")
    blocks = np.frombuffer(data, _BLOCKS[kind], int(np.prod(shape)) // 32, start)
    if kind == _F32:
        return blocks["values"].reshape(shape)
    scale = blocks["scale"].astype(np.float32)[:, None]
    if kind == _Q8_0:
        return (blocks["values"] * scale).reshape(shape)
    # The low halves of the 16 bytes are weights 0 to 15, the high halves weights 16 to 31.
    nibbles = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1)  # (blocks, 32)
    return (nibbles * scale + blocks["minimum"].astype(np.float32)[:, None]).reshape(shape)


class Node(NamedTuple):
    """An operation of an ONNX graph.

    Attributes:
        operator: Type, such as `MatMul`.
        name: Path of the module that it came from, such as `/encoder/query/MatMul`.
        inputs: Names of its inputs.
    """

    operator: str
    name: str
    inputs: list[str]


def read_onnx(file: Traversable) -> tuple[Tensors, list[Node]]:
    """Returns the float32 initializers of an ONNX file by name, and the operations that use them.

    Source of the field numbers: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
    """
    # Field 7 of `ModelProto` is its graph; in `GraphProto`, 1 are nodes and 5 initializers.
    graph = next(value for number, value in _fields(memoryview(file.read_bytes())) if number == 7)
    tensors, nodes = {}, []
    for number, message in _fields(graph):
        if number == 1:
            parts = list(_fields(message))
            # `NodeProto`: 1 inputs, 3 name, 4 operator.
            inputs, names, operators = ([bytes(v).decode() for n, v in parts if n == wanted] for wanted in (1, 3, 4))
            nodes.append(Node(operators[0], (names or [""])[0], inputs))
        elif number == 5:
            parts = list(_fields(message))
            entry = dict(parts)
            # `TensorProto`: 1 sizes, 2 data type, 8 name, 9 raw data.
            if entry[2] == 1 and 9 in entry:  # float32, as raw bytes
                shape = [size for number, value in parts if number == 1 for size in _sizes(value)]
                tensors[bytes(entry[8]).decode()] = np.frombuffer(entry[9], "<f4").reshape(shape)
    return tensors, nodes


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Yields number and value of each field of a Protocol Buffers message: an integer, or the bytes of other types."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        # A key is the field's number and, in its lowest three bits, the wire type.
        kind = key & 7
        if kind == 0:
            number, position = _varint(message, position)
            yield key >> 3, number
            continue
        # Wire types 1 and 5 have fixed sizes in bytes; 2 begins with its size.
        size = {1: 8, 5: 4}.get(kind, -1)
        if size < 0:
            size, position = _varint(message, position)
        yield key >> 3, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Returns an integer of seven bits per byte and the position behind it."""
    value = shift = 0
    while True:
        byte = message[position]
        # the lowest seven bits come first
        value, shift, position = value | (byte & 127) << shift, shift + 7, position + 1
        if byte < 128:  # the highest bit is set in all bytes but the last
            return value, position


def _sizes(value: int | memoryview) -> Iterator[int]:
    """Yields the sizes of a shape, which is one integer per field or one packed field."""
    if isinstance(value, int):
        yield value
        return
    position = 0
    while position < len(value):
        size, position = _varint(value, position)
        yield size
