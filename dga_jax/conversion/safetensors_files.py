"""The tensors of a folder's safetensors files, one file or several with an index."""

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open, SafetensorError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class SafetensorsFiles:
  """Tensors by name; the files are mapped into memory, and a tensor is read when asked for.

  Args:
    folder: holds model.safetensors, or model.safetensors.index.json and the files it names.

  Attributes:
    names: of all tensors.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a file is damaged, or does not hold what the index says.
  """

  def __init__(self, folder: Path) -> None:
    index = _read_index(folder)
    files = sorted(set(index.values())) if index else [_SINGLE]
    self._files: dict[str, Any] = {}
    self._place: dict[str, str] = {}
    for file in files:
      opened = _open(folder / file, index, file)
      self._files[file] = opened
      self._place |= dict.fromkeys(opened.keys(), file)
    for name, file in index.items():
      if self._place.get(name) != file:
        raise ValueError(f"{folder / _INDEX} says that {file} holds {name}; it does not.")
    self.names: Set[str] = self._place.keys()

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of a tensor."""
    return tuple(self._slice(name).get_shape())

  def dtype(self, name: str) -> str:
    """The dtype of a tensor, by numpy's name.

    Raises:
      ValueError: it is none of float32, float16 and bfloat16.
    """
    stored = self._slice(name).get_dtype()
    if stored not in _DTYPES:
      raise ValueError(
        f"The tensor {name} is stored as {stored}; only {', '.join(_DTYPES)} can be read."
      )
    return _DTYPES[stored]

  def read(self, name: str) -> np.ndarray:
    """A copy of a tensor."""
    self.dtype(name)
    return self._files[self._place[name]].get_tensor(name)

  def _slice(self, name: str) -> Any:
    return self._files[self._place[name]].get_slice(name)


def _read_index(folder: Path) -> dict[str, str]:
  """The file of each tensor; empty where there is a single file."""
  path = folder / _INDEX
  if path.is_file():
    try:
      return dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(f"{path} is damaged: it has no readable weight_map ({error}).") from error
  if (folder / _SINGLE).is_file():
    return {}
  others = sorted(p.name for p in folder.glob("*.bin"))
  hint = f" {others[0]} is in PyTorch's own format: save it as safetensors." if others else ""
  raise FileNotFoundError(f"{folder} holds neither {_SINGLE} nor {_INDEX}.{hint}")


def _open(path: Path, index: dict[str, str], file: str) -> Any:
  if not path.is_file():
    name = next(name for name, holder in index.items() if holder == file)
    raise FileNotFoundError(f"There is no {path}, which should hold {name} among others.")
  try:
    return safe_open(path, framework="np")
  except SafetensorError as error:
    raise ValueError(f"{path} is damaged: {_what_is_cut_off(path) or error}") from error


def _what_is_cut_off(path: Path) -> str:
  """Which tensors lie beyond the end of a file; empty if its header cannot be read either.

  A file begins with the header's length, 8 bytes, and the header, JSON with each tensor's place.
  """
  with path.open("rb") as stream:
    length = int.from_bytes(stream.read(8), "little")
    size = path.stat().st_size - 8 - length
    if size < 0:
      return "it ends within its header."
    try:
      header = json.loads(stream.read(length))
      ends = {name: v["data_offsets"][1] for name, v in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, IndexError):
      return ""
  beyond = [name for name, end in ends.items() if end > size]
  if not beyond:
    return ""
  wanted = max(ends.values())
  return f"its tensors take {wanted} bytes and {size} are there; it cuts off {', '.join(beyond)}."
