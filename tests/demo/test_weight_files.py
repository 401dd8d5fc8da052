"""GGUF and ONNX files, written here byte by byte from the formats' descriptions, are read as they were meant."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from vlmcap.demo.weight_files import read_gguf, read_onnx


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def write_gguf(path: Path, tensors: list[tuple[str, tuple[int, ...], int, bytes]]) -> Path:
    """A file with one value of several types; sizes are given slowest axis first, and stored the other way around."""
    values = [
        (text("general.name") + struct.pack("<I", 8) + text("작은 모델")),
        (text("llama.block_count") + struct.pack("<II", 4, 30)),
        (text("rope") + struct.pack("<If", 6, 0.5)),
        (text("flag") + struct.pack("<I?", 7, True)),
        (text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("Ġa") + text("b")),
        (text("types") + struct.pack("<IIQ3i", 9, 5, 3, 1, -2, 3)),
    ]
    head, data = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)) + b"".join(values), b""
    for name, shape, kind, content in tensors:
        head += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", kind, len(data))
        data += content + b"\0" * (-len(content) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


def test_values_and_tensors_of_a_gguf_file(tmp_path: Path) -> None:
    plain = np.arange(64, dtype="<f4").reshape(2, 32)
    eight = [(0.5, list(range(-16, 16))), (-2.0, [1] * 32)]  # scale and 32 integers of each block
    four = (0.25, -3.0, [index % 16 for index in range(32)])  # scale, minimum and 32 numbers from 0 to 15
    nibbles = bytes(low | high << 4 for low, high in zip(four[2][:16], four[2][16:], strict=True))
    file = write_gguf(
        tmp_path / "model.gguf",
        [
            ("plain", (2, 32), 0, plain.tobytes()),
            ("eight", (64,), 8, b"".join(struct.pack("<e32b", scale, *numbers) for scale, numbers in eight)),
            ("four", (1, 32), 3, struct.pack("<ee", *four[:2]) + nibbles),
        ],
    )
    values, tensors = read_gguf(file)
    assert values == {
        "general.name": "작은 모델",
        "llama.block_count": 30,
        "rope": 0.5,
        "flag": True,
        "tokens": ["Ġa", "b"],
        "types": [1, -2, 3],
    }
    assert np.array_equal(tensors["plain"], plain)
    assert tensors["eight"].tolist() == [scale * number for scale, numbers in eight for number in numbers]
    assert tensors["four"].tolist() == [[0.25 * number - 3.0 for number in four[2]]]
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("바다")
    with pytest.raises(ValueError, match=r"text\.gguf is not a GGUF file"):
        read_gguf(tmp_path / "text.gguf")
    file = write_gguf(tmp_path / "other.gguf", [("w", (256,), 12, bytes(144))])
    with pytest.raises(ValueError, match="tensor type 12 is not supported"):
        read_gguf(file)


def varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def field(number: int, content: int | bytes | str) -> bytes:
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    content = content.encode() if isinstance(content, str) else content
    return varint(number << 3 | 2) + varint(len(content)) + content


@pytest.mark.parametrize("is_packed", [False, True])
def test_tensors_and_operations_of_an_onnx_file(tmp_path: Path, is_packed: bool) -> None:
    weights = np.arange(600, dtype="<f4").reshape(3, 200)  # more than 127 bytes, and a size beyond 127
    shape = field(1, varint(3) + varint(200)) if is_packed else field(1, 3) + field(1, 200)
    tensor = shape + field(2, 1) + field(8, "onnx::MatMul_1") + field(9, weights.tobytes())
    other = field(1, 1) + field(2, 7) + field(8, "an int64") + field(9, bytes(8))
    node = field(1, "x") + field(1, "onnx::MatMul_1") + field(2, "y") + field(3, "/query/MatMul") + field(4, "MatMul")
    graph = field(1, node) + field(2, "main") + field(5, tensor) + field(5, other)
    fixed = varint(15 << 3 | 5) + bytes(4) + varint(14 << 3 | 1) + bytes(8)  # fields of other kinds are passed over
    (tmp_path / "model.onnx").write_bytes(field(1, 8) + fixed + field(7, graph))
    tensors, nodes = read_onnx(tmp_path / "model.onnx")
    assert tensors.keys() == {"onnx::MatMul_1"}
    assert np.array_equal(tensors["onnx::MatMul_1"], weights)
    assert nodes == [("MatMul", "/query/MatMul", ["x", "onnx::MatMul_1"])]
