"""The GGUF reader on files written byte by byte: valid files, and files that are refused."""

import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from dga_jax.conversion.errors import ConversionError
from dga_jax.conversion.gguf_reader import GGUFContent
from tests.dga_jax.conversion.fuzz import peak_memory

UINT8, BOOL, STRING, ARRAY = 0, 7, 8, 9
F32, Q8_0 = 0, 8


def text(content: bytes | str) -> bytes:
  raw = content.encode() if isinstance(content, str) else content
  return struct.pack("<Q", len(raw)) + raw


def entry(key: bytes | str, kind: int, value: bytes) -> bytes:
  return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, value: bytes = b"") -> bytes:
  return struct.pack("<IQ", kind, count) + value


def tensor(name: str, shape: list[int], kind: int = F32, offset: int = 0) -> bytes:
  return (
    text(name)
    + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    + struct.pack("<IQ", kind, offset)
  )


def whole(
  entries: list[bytes] | None = None,
  tensors: list[bytes] | None = None,
  data: bytes = bytes(256),
  **counts: int,
) -> bytes:
  entries, tensors = entries or [], tensors or []
  head = b"GGUF" + struct.pack(
    "<IQQ",
    counts.get("version", 3),
    counts.get("tensor_count", len(tensors)),
    counts.get("entry_count", len(entries)),
  )
  table = head + b"".join(entries + tensors)
  return table + bytes(-len(table) % 32) + data


def read(content: bytes, tmp_path: Path) -> GGUFContent:
  path = tmp_path / "model.gguf"
  path.write_bytes(content)
  return GGUFContent(path)


def test_files_of_the_gguf_package_are_read(tmp_path: Path) -> None:
  path = tmp_path / "model.gguf"
  writer = gguf.GGUFWriter(path, "llama")
  values: dict[str, Any] = {
    "a.uint8": ("uint8", 200),
    "a.int8": ("int8", -3),
    "a.uint16": ("uint16", 60_000),
    "a.int16": ("int16", -30_000),
    "a.uint32": ("uint32", 2**32 - 1),
    "a.int32": ("int32", -(2**31)),
    "a.float32": ("float32", 0.5),
    "a.uint64": ("uint64", 2**64 - 1),
    "a.int64": ("int64", -(2**63)),
    "a.float64": ("float64", 1e300),
    "a.bool": ("bool", True),
    "a.string": ("string", "é\n"),
    "a.strings": ("array", ["x", "", "é"]),
    "a.integers": ("array", [1, -2, 3]),
    "a.floats": ("array", [0.5, 1.5]),
    "a.bools": ("array", [True, False]),
  }
  for key, (kind, value) in values.items():
    getattr(writer, f"add_{kind}")(key, value)
  weights = np.arange(64, dtype=np.float32).reshape(2, 32)
  kinds = gguf.GGMLQuantizationType
  stored = {kind: gguf.quantize(weights, kind) for kind in (kinds.F16, kinds.Q8_0, kinds.BF16)}
  writer.add_tensor("F32", weights)
  for kind, packed in stored.items():
    writer.add_tensor(kind.name, packed, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()

  content = GGUFContent(path)
  for key, (_, value) in values.items():
    got = content.metadata[key]
    assert (got.tolist() if isinstance(got, np.ndarray) else got) == value, key
    assert type(got) is type(value) or isinstance(got, np.ndarray), key
  library = gguf.GGUFReader(path)
  assert content.tensors.keys() == {one.name for one in library.tensors}
  for one in library.tensors:
    assert content.tensors[one.name].shape == (2, 32)
    got = gguf.dequantize(content.stored(one.name), one.tensor_type)
    np.testing.assert_array_equal(
      got.reshape(2, 32), gguf.dequantize(one.data, one.tensor_type).reshape(2, 32)
    )


def test_a_valid_file_of_these_parts_is_read(tmp_path: Path) -> None:
  entries = [
    entry("general.alignment", 4, struct.pack("<I", 8)),
    entry("s", ARRAY, array(STRING, 1, text("x"))),
  ]
  tensors = [tensor("b", [2], offset=8), tensor("a", [2])]
  content = read(whole(entries, tensors, struct.pack("<4f", 1, 2, 3, 4)), tmp_path)
  assert content.metadata == {"general.alignment": 8, "s": ["x"]}
  assert {name: content.stored(name).tolist() for name in "ab"} == {"a": [1, 2], "b": [3, 4]}


HUGE = entry("x", ARRAY, array(UINT8, 2**60))


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "takes 4 bytes|does not begin with GGUF"),
    (b"GGML" + bytes(60), "does not begin with GGUF"),
    (b"version " + bytes(60), "does not begin with GGUF"),
    (whole(version=1), "GGUF version 1; supported are 2 and 3"),
    (whole(version=2**32 - 1), "GGUF version 4294967295"),
    (whole(version=3 << 24), "is a big-endian GGUF file"),
    (whole([HUGE])[:51], "less than its 1152921504606846976 elements of 'x'"),
    (whole([entry("x", ARRAY, array(STRING, 2**60))]), "less than its 1152921504606846976"),
    (whole([entry("x", ARRAY, array(UINT8, 2**64 - 1))]), "less than its 18446744073709551615"),
    (whole([entry("x", ARRAY, array(ARRAY, 1, array(UINT8, 0)))]), "an array of arrays"),
    (
      whole([entry("x", ARRAY, array(UINT8, 2**22 + 1, bytes(2**22 + 1)))]),
      "more than 4194304 elements",
    ),
    (whole(entry_count=2**60), "less than its 1152921504606846976 metadata entries"),
    (whole(tensor_count=2**60), "less than its 1152921504606846976 tensors"),
    (whole([struct.pack("<Q", 2**63)]), "its metadata key takes 9223372036854775808 bytes"),
    (whole([entry("x", STRING, struct.pack("<Q", 2**62))]), "value of 'x' takes"),
    (whole([entry(b"\xff", UINT8, b"1")]), "its metadata key is not UTF-8"),
    (whole([entry("x", STRING, text(b"\xff"))]), "its value of 'x' is not UTF-8"),
    (whole([entry("x", 99, b"")]), "'x' has a value of the unknown type 99"),
    (whole([entry("x", BOOL, b"\x07")]), "'x' is a boolean other than 0 and 1"),
    (whole([entry("x", UINT8, b"1")] * 2), "has the key 'x' twice"),
    (whole([entry("general.alignment", UINT8, b"\x00")]), "alignment is 0, which is no power of"),
    (whole([entry("general.alignment", UINT8, b"\x03")]), "alignment is 3, which is no power of"),
    (whole([entry("general.alignment", STRING, text("8"))]), "alignment is '8', which is no"),
    (whole([], [tensor("a", [2])] * 2), "has the tensor 'a' twice"),
    (whole([], [tensor("a", [64]), tensor("b", [8], offset=32)]), "'a' and 'b' overlap"),
    (whole([], [tensor("b", [64]), tensor("a", [8])]), "'[ab]' and '[ab]' overlap"),
    (whole([], [tensor("a", [65])]), "it ends before its tensor a does"),
    (whole([], [tensor("a", [1], offset=2**60)]), "it ends before its tensor a does"),
    (whole([], [tensor("a", [1], offset=2**64 - 32)]), "it ends before its tensor a does"),
    (whole([], [tensor("a", [2**32, 2**32])]), "it ends before its tensor a does"),
    (whole([], [tensor("a", [2**63, 2])]), "it ends before its tensor a does"),
    (whole([], [tensor("a", [1], offset=4)]), "'a' is not aligned to 32 bytes"),
    (whole([], [tensor("a", [])]), "'a' has 0 dimensions"),
    (whole([], [tensor("a", [1] * 5)]), "'a' has 5 dimensions"),
    (whole([], [text("a") + struct.pack("<I", 2**31)]), "'a' has 2147483648 dimensions"),
    (whole([], [tensor("a", [4, 0])]), r"'a' has the shape \[0, 4\]"),
    (whole([], [tensor("a", [33], Q8_0)]), r"'a' has the shape \[33\], but Q8_0 packs 32"),
    (whole([], [tensor("a", [1], 77)]), "'a' has the unknown type 77"),
    (whole([], [tensor("a", [1])])[:40], "takes"),
  ],
)
def test_files_that_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
  before, begin = peak_memory(), time.process_time()
  with pytest.raises(ConversionError, match=message) as error:
    read(content, tmp_path)
  assert str(tmp_path / "model.gguf") in str(error.value)
  assert time.process_time() - begin < 1
  assert peak_memory() - before < 100 << 20


def test_a_git_lfs_pointer_is_an_error_with_the_remedy(tmp_path: Path) -> None:
  pointer = "version https://localhost/git-lfs/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
  with pytest.raises(ConversionError, match=r"model\.gguf is a Git LFS pointer"):
    read(pointer.encode(), tmp_path)
