"""GGUF files: the metadata and the table of tensors, checked before anything is allocated.

The reader of the `gguf` package makes an array for each element of the metadata before it has
compared a count with the size of the file, so that a small damaged file can take all memory. This
module reads the same format with every count checked first; the package gives the numbers of the
types and dequantizes.

Layout: magic, version, number of tensors, number of metadata entries, the entries (key, type,
value), the tensors (name, dimensions, type, offset), padding, and the tensors' bytes.
"""

import struct
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from dga_jax.conversion.errors import ConversionError, shown
from dga_jax.conversion.json_files import check_not_lfs_pointer

# Elements of all arrays of the metadata: the largest vocabularies have 2^18 tokens, and a text, a
# score, a type and two merges for each.
_MAX_ELEMENTS = 1 << 22
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
_TYPES = gguf.GGUFValueType
_SCALARS = {
  _TYPES.UINT8: "<u1",
  _TYPES.INT8: "<i1",
  _TYPES.UINT16: "<u2",
  _TYPES.INT16: "<i2",
  _TYPES.UINT32: "<u4",
  _TYPES.INT32: "<i4",
  _TYPES.FLOAT32: "<f4",
  _TYPES.UINT64: "<u8",
  _TYPES.INT64: "<i8",
  _TYPES.FLOAT64: "<f8",
  _TYPES.BOOL: "<u1",
}
_FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


class TensorInfo(NamedTuple):
  """A tensor's place in the file.

  Attributes:
    kind: how its values are stored.
    shape: as numpy has it: the last axis is contiguous.
    start: of its bytes in the file.
    size: in bytes.
  """

  kind: gguf.GGMLQuantizationType
  shape: tuple[int, ...]
  start: int
  size: int


class GGUFContent:
  """The content of a GGUF file.

  Args:
    path: the file.

  Attributes:
    metadata: values by key: numbers, booleans, strings, lists of strings and numpy arrays.
    tensors: by name.

  Raises:
    FileNotFoundError: there is no such file.
    ConversionError: it is no GGUF file, damaged, big-endian, or of an unknown version.
  """

  def __init__(self, path: Path) -> None:
    if not path.is_file():
      raise FileNotFoundError(f"There is no {path}.")
    with path.open("rb") as stream:
      check_not_lfs_pointer(path, stream.read(200))
    self._path = path
    size = path.stat().st_size
    self._data = np.memmap(path, mode="r") if size else np.zeros(0, np.uint8)
    cursor = _Cursor(path, memoryview(self._data))
    tensor_count, entry_count = _read_preamble(cursor)
    self.metadata = _read_metadata(cursor, entry_count)
    self.tensors = _read_tensors(cursor, tensor_count, self.metadata)

  def stored(self, name: str) -> np.ndarray:
    """A tensor as `gguf.dequantize` takes it: floats in its shape, or rows of packed bytes."""
    tensor = self.tensors[name]
    raw = self._data[tensor.start : tensor.start + tensor.size]
    if tensor.kind.name in _FLOATS:
      return raw.view(_FLOATS[tensor.kind.name]).reshape(tensor.shape)
    return raw.reshape(*tensor.shape[:-1], -1)


class _Cursor:
  """Reads values one after another, and never beyond the end."""

  def __init__(self, path: Path, data: memoryview) -> None:
    self.path, self.data, self.position = path, data, 0

  def left(self) -> int:
    return len(self.data) - self.position

  def error(self, problem: str) -> ConversionError:
    return ConversionError(f"{self.path} is no whole GGUF file: {problem}.")

  def take(self, size: int, what: str) -> memoryview:
    if size > self.left():
      raise self.error(f"its {what} takes {size} bytes, and {self.left()} are left")
    start, self.position = self.position, self.position + size
    return self.data[start : self.position]

  def integer(self, form: str, what: str) -> int:
    value: int = struct.unpack(form, self.take(struct.calcsize(form), what))[0]
    return value

  def string(self, what: str) -> str:
    content = bytes(self.take(self.integer("<Q", what), what))
    try:
      return content.decode("utf-8")
    except UnicodeDecodeError as error:
      raise self.error(f"its {what} is not UTF-8") from error

  def count(self, form: str, what: str, least_size: int) -> int:
    """A number of things, each of which takes at least so many bytes."""
    count = self.integer(form, f"number of {what}")
    if count * least_size > self.left():
      raise self.error(f"it has room for less than its {count} {what}")
    return count


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
  """The number of tensors, and that of metadata entries."""
  if bytes(cursor.take(min(4, cursor.left()), "magic")) != b"GGUF":
    raise cursor.error("it does not begin with GGUF")
  version = cursor.integer("<I", "version")
  if version & 0xFFFF == 0:
    raise ConversionError(
      f"{cursor.path} is a big-endian GGUF file; make it little-endian with gguf-convert-endian of "
      "the gguf package."
    )
  if version not in (2, 3):
    raise ConversionError(f"{cursor.path} has GGUF version {version}; supported are 2 and 3.")
  tensor_count = cursor.count("<Q", "tensors", 24)
  return tensor_count, cursor.count("<Q", "metadata entries", 13)


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
  metadata: dict[str, Any] = {}
  room = _MAX_ELEMENTS
  for _ in range(count):
    key = cursor.string("metadata key")
    if key in metadata:
      raise cursor.error(f"it has the key {shown(key)} twice")
    value = _read_value(cursor, key, room)
    room -= len(value) if isinstance(value, list | np.ndarray) else 0
    metadata[key] = value
  return metadata


def _read_value(cursor: _Cursor, key: str, room: int) -> Any:
  kind = _value_type(cursor, key)
  if kind == _TYPES.STRING:
    return cursor.string(f"value of {shown(key)}")
  if kind != _TYPES.ARRAY:
    value = _numbers(cursor, kind, 1, key)[0]
    return value.item()
  element = _value_type(cursor, key)
  if element == _TYPES.ARRAY:
    raise cursor.error(f"the value of {shown(key)} is an array of arrays")
  is_text = element == _TYPES.STRING
  size = 8 if is_text else np.dtype(_SCALARS[element]).itemsize
  count = cursor.count("<Q", f"elements of {shown(key)}", size)
  if count > room:
    raise cursor.error(f"its metadata has more than {_MAX_ELEMENTS} elements, {count} in {key}")
  if is_text:
    what = f"element of {shown(key)}"
    return [cursor.string(what) for _ in range(count)]
  return _numbers(cursor, element, count, key)


def _value_type(cursor: _Cursor, key: str) -> gguf.GGUFValueType:
  number = cursor.integer("<I", f"type of {shown(key)}")
  try:
    return _TYPES(number)
  except ValueError as error:
    raise cursor.error(f"{shown(key)} has a value of the unknown type {number}") from error


def _numbers(cursor: _Cursor, kind: gguf.GGUFValueType, count: int, key: str) -> np.ndarray:
  dtype = np.dtype(_SCALARS[kind])
  raw = cursor.take(count * dtype.itemsize, f"value of {shown(key)}")
  values = np.frombuffer(raw, dtype)
  if kind != _TYPES.BOOL:
    return values
  if (values > 1).any():
    raise cursor.error(f"{shown(key)} is a boolean other than 0 and 1")
  return values.astype(bool)


def _read_tensors(cursor: _Cursor, count: int, metadata: dict[str, Any]) -> dict[str, TensorInfo]:
  alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
  if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
    raise cursor.error(f"general.alignment is {shown(alignment)}, which is no power of 2")
  infos = [_read_info(cursor, alignment) for _ in range(count)]
  begin = -(-cursor.position // alignment) * alignment
  tensors: dict[str, TensorInfo] = {}
  for name, info in infos:
    if name in tensors:
      raise cursor.error(f"it has the tensor {shown(name)} twice")
    tensors[name] = info._replace(start=begin + info.start)
  end, last = begin, ""
  for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
    if info.start < end:
      raise cursor.error(f"its tensors {shown(last)} and {shown(name)} overlap")
    end, last = info.start + info.size, name
    if end > len(cursor.data):
      raise cursor.error(f"it ends before its tensor {name[:200]} does")
  return tensors


def _read_info(cursor: _Cursor, alignment: int) -> tuple[str, TensorInfo]:
  """A tensor's name and place; `start` counts from the first tensor's."""
  name = cursor.string("tensor's name")
  count = cursor.integer("<I", "number of dimensions")
  if not 1 <= count <= _MAX_DIMENSIONS:
    raise cursor.error(f"the tensor {shown(name)} has {count} dimensions")
  shape = struct.unpack(f"<{count}Q", cursor.take(8 * count, f"shape of {shown(name)}"))[::-1]
  number = cursor.integer("<I", f"type of {shown(name)}")
  try:
    kind = gguf.GGMLQuantizationType(number)
  except ValueError as error:
    raise cursor.error(f"the tensor {shown(name)} has the unknown type {number}") from error
  block, block_size = gguf.GGML_QUANT_SIZES[kind]
  if 0 in shape or shape[-1] % block:
    raise cursor.error(
      f"the tensor {shown(name)} has the shape {list(shape)}, but {kind.name} packs {block} values "
      "of a row together"
    )
  start = cursor.integer("<Q", f"offset of {shown(name)}")
  if start % alignment:
    raise cursor.error(f"the tensor {shown(name)} is not aligned to {alignment} bytes")
  values = 1
  for length in shape:
    values *= length
  return name, TensorInfo(kind, shape, start, values // block * block_size)
