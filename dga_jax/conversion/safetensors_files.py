"""The tensors of a folder's safetensors files, one file or several with an index."""

from collections.abc import Mapping, Set
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from safetensors import safe_open, SafetensorError

from dga_jax.conversion.errors import ConversionError, shown
from dga_jax.conversion.json_files import check_not_lfs_pointer, parse_json, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SELECTOR = "focal_selector.safetensors"  # Weights of the fitted selector; transformers ignores it.
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Bytes. Each tensor takes about 100 of them.
_MAX_HEADER_BYTES = 8 << 20


class SafetensorsFiles:
  """Tensors by name; the files are mapped into memory, and a tensor is read when asked for.

  As in transformers, model.safetensors prevails over an index beside it. With an index, each tensor
  is read from the file that the index names, whatever else the files hold. The tensors of
  focal_selector.safetensors join them.

  Args:
    folder: holds model.safetensors, or model.safetensors.index.json and the files it names.

  Attributes:
    names: of all tensors.

  Raises:
    FileNotFoundError: a file is missing.
    ConversionError: a file is damaged, does not hold what the index says, or holds a tensor of
      another file, or the index names a file outside the folder.
  """

  def __init__(self, folder: Path) -> None:
    self._folder = folder
    if (folder / SINGLE).is_file():
      self._files = {SINGLE: _open(folder / SINGLE)}
      self._file_of = dict.fromkeys(self._files[SINGLE].keys(), SINGLE)
    else:
      self._file_of = _read_index(folder)
      self._files = {}
      for name, file in self._file_of.items():
        if file not in self._files:
          if not (folder / file).is_file():
            raise FileNotFoundError(
              f"There is no {folder / file}, which should hold {shown(name)} among others."
            )
          self._files[file] = _open(folder / file)
      held = {file: set(opened.keys()) for file, opened in self._files.items()}
      for name, file in self._file_of.items():
        if name not in held[file]:
          raise ConversionError(
            f"{folder / INDEX} says that {file} holds {shown(name)}; it does not."
          )
    if self.has_selector:
      self._files[SELECTOR] = _open(folder / SELECTOR)
      added = dict.fromkeys(self._files[SELECTOR].keys(), SELECTOR)
      if twice := sorted(added.keys() & self._file_of.keys()):
        raise ConversionError(
          f"{folder / SELECTOR} and {self._file_of[twice[0]]} both hold {shown(twice[0])}."
        )
      self._file_of |= added
    self.names: Set[str] = self._file_of.keys()

  @property
  def has_selector(self) -> bool:
    """Whether the folder has weights of the fitted selector."""
    return (self._folder / SELECTOR).is_file()

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of a tensor."""
    return tuple(self._slice(name).get_shape())

  def dtype(self, name: str) -> str:
    """The dtype of a tensor, by numpy's name.

    Raises:
      ConversionError: it is none of float32, float16 and bfloat16.
    """
    stored = self._slice(name).get_dtype()
    if stored not in _DTYPES:
      raise ConversionError(
        f"{self._folder / self._file_of[name]}: the tensor {name} is stored as {stored}; only "
        f"{', '.join(_DTYPES)} can be read."
      )
    return _DTYPES[stored]

  def read(self, name: str) -> np.ndarray:
    """A copy of a tensor."""
    self.dtype(name)
    return self._files[self._file_of[name]].get_tensor(name)

  def _slice(self, name: str) -> Any:
    return self._files[self._file_of[name]].get_slice(name)


def _read_index(folder: Path) -> dict[str, str]:
  """The file of each tensor."""
  path = folder / INDEX
  if not path.is_file():
    others = sorted(p.name for p in folder.glob("*.bin"))
    hint = f" {others[0]} is in PyTorch's own format: save it as safetensors." if others else ""
    raise FileNotFoundError(f"{folder} holds neither {SINGLE} nor {INDEX}.{hint}")
  file_of = read_json(path).get("weight_map")
  if not isinstance(file_of, dict) or not file_of:
    raise ConversionError(f"{path} is damaged: it has no weight_map with the file of each tensor.")
  for file in file_of.values():
    if not isinstance(file, str) or not _is_file_name(file):
      raise ConversionError(f"{path} names the file {shown(file)}; it must be in the same folder.")
  return file_of


def _is_file_name(text: str) -> bool:
  """Whether a text is the name of a file of safetensors, and no path."""
  return (
    PurePosixPath(text).name == text
    and "\\" not in text
    and text.isprintable()
    and len(text.encode(errors="replace")) < 256
    and text.endswith(".safetensors")
  )


def _open(path: Path) -> Any:
  _check_header(path)
  try:
    return safe_open(path, framework="np")
  except SafetensorError as error:
    raise ConversionError(f"{path} is damaged: {error}") from error


def _check_header(path: Path) -> None:
  """Refuses a file whose header is no table of tensors within the file.

  A file begins with the header's length, 8 bytes, and the header, JSON with the dtype, shape and
  byte range of each tensor. The library checks that dtypes and shapes fill the byte ranges.
  """
  size = path.stat().st_size
  with path.open("rb") as stream:
    prefix = stream.read(200)
    check_not_lfs_pointer(path, prefix)
    length = int.from_bytes(prefix[:8], "little")
    if size < 8 or length > size - 8:
      raise ConversionError(f"{path} is damaged: it ends within its header.")
    if length > _MAX_HEADER_BYTES:
      raise ConversionError(f"{path} is damaged: its header has {length} bytes.")
    stream.seek(8)
    text = stream.read(length).decode("utf-8", errors="replace")
  header = parse_json(text, path)
  ends = {name: _end(name, value, path) for name, value in header.items() if name != "__metadata__"}
  wanted, held = max(ends.values(), default=0), size - 8 - length
  if beyond := [name for name, end in ends.items() if end > held]:
    raise ConversionError(
      f"{path} is damaged: its tensors take {wanted} bytes and {held} are there; it cuts off "
      f"{', '.join(map(str, beyond[:5]))}{' and more' if len(beyond) > 5 else ''}."
    )


def _end(name: str, value: Any, path: Path) -> int:
  """Where the bytes of a tensor end."""
  offsets = value.get("data_offsets") if isinstance(value, Mapping) else None
  if (
    not isinstance(offsets, list)
    or len(offsets) != 2
    or not all(type(offset) is int and offset >= 0 for offset in offsets)
  ):
    raise ConversionError(f"{path} is damaged: the tensor {shown(name)} has no byte range.")
  return int(offsets[1])
