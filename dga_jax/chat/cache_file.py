"""The cache of a document in a file: NumPy's .npz with a header that names its model.

The arrays of a cache have a meaning only for the weights, the tokenizer and the attention settings
that made them. The header has all three, and `load_cache` refuses a file of others. The zip format
has a CRC-32 of every array; a file whose bytes have changed is refused.
"""

import contextlib
import functools
import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dga_jax.chat.conversation import DocumentReader
from dga_jax.chat.session import Session
from dga_jax.chat.template import ChatTemplate
from dga_jax.files.whole_file import whole_file
from dga_jax.model import Decoder, ModelConfig
from dga_jax.model.config import ATTENTION_SETTINGS
from dga_jax.tokenizer import Tokenizer

_FORMAT, _VERSION = "dga-jax cache", 1
_SAMPLE = 1024  # Values of each weight that the fingerprint covers.
_MAX_HEADER = 1 << 28  # Bytes: the header has the document's text.


class _Binding(NamedTuple):
  """What a cache belongs to, by the names that messages use."""

  model: dict[str, Any]
  weights: str
  tokenizer: str
  chat_template: str | None


def save_cache(
  path: str | os.PathLike[str],
  session: Session,
  reader: DocumentReader,
  tokenizer: Tokenizer,
  template: ChatTemplate | None,
) -> int:
  """Writes the cache of a document, whole or not at all; returns the bytes of the file.

  Args:
    path: of the file; an existing one is replaced.
    session: that has read the document and nothing else.
    reader: of the document.
    tokenizer: of the model.
    template: that the reader uses.

  Raises:
    OSError: the file cannot be written.
  """
  path = Path(path)
  header = {
    "format": _FORMAT,
    "version": _VERSION,
    **_binding(session.model, tokenizer, template)._asdict(),
    "before": reader.before,
    "after": reader.after,
  }
  arrays: dict[str, Any] = {
    "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
    "tokens": np.asarray(session.tokens, np.int32),
  }
  for i, leaf in enumerate(jax.tree.leaves(session.cache())):
    arrays[f"array_{i}"] = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
  with whole_file(path) as partial, partial.open("wb") as stream:
    np.savez(stream, allow_pickle=False, **arrays)
  return path.stat().st_size


def load_cache(
  path: str | os.PathLike[str],
  session: Session,
  tokenizer: Tokenizer,
  template: ChatTemplate | None,
) -> DocumentReader:
  """Restores the document of a file into a session, and returns its reader.

  Args:
    path: a file of `save_cache`.
    session: of the model that made the file; its tokens are replaced.
    tokenizer: of the model.
    template: that the reader used.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is damaged or no cache, or belongs to another model, tokenizer, chat
      template or attention setting; the message names the difference.
  """
  path = Path(path)
  header = _read_header(path)
  _check_binding(path, header, _binding(session.model, tokenizer, template))
  with _damage_errors(path), zipfile.ZipFile(path) as archive:
    count = archive.getinfo("tokens.npy").file_size // 4
    tokens = _member(archive, "tokens", np.int32, 4 * count).tolist()
    shapes = jax.eval_shape(functools.partial(session.model.init_cache, 1, len(tokens)))
    leaves = []
    for i, leaf in enumerate(jax.tree.leaves(shapes)):
      stored = _member(archive, f"array_{i}", np.uint8, leaf.size * leaf.dtype.itemsize)
      leaves.append(jnp.asarray(stored.view(leaf.dtype).reshape(leaf.shape)))
    before, after = str(header["before"]), str(header["after"])
  session.restore(tokens, jax.tree.unflatten(jax.tree.structure(shapes), leaves))
  return DocumentReader(session, tokenizer, template, before=before, after=after)


def stored_attention(path: str | os.PathLike[str]) -> str:
  """The attention kind of the cache in a file; errors as for `load_cache`."""
  path = Path(path)
  header = _read_header(path)
  with _damage_errors(path):
    return str(header["model"]["attention"])


def _read_header(path: Path) -> dict[str, Any]:
  with _damage_errors(path), zipfile.ZipFile(path) as archive:
    header: dict[str, Any] = json.loads(_member(archive, "header", np.uint8, _MAX_HEADER).tobytes())
    if header.get("format") != _FORMAT:
      raise _NoCacheError
    version = header["version"]
  if version != _VERSION:
    raise ValueError(
      f"{path} has version {version} of the cache format; this program reads version {_VERSION}."
      " Read the document again."
    )
  return header


class _NoCacheError(Exception):
  """The file is an .npz of another program."""


@contextlib.contextmanager
def _damage_errors(path: Path) -> Iterator[None]:
  """Turns the errors of reading a file of unknown content into a ValueError that names it."""
  try:
    yield
  except (_NoCacheError, FileNotFoundError, IsADirectoryError, PermissionError) as error:
    if isinstance(error, _NoCacheError):
      raise ValueError(f"{path} is not a cache that --save_cache wrote.") from error
    raise
  except Exception as error:  # Readers of zip files and arrays raise errors of many kinds.
    raise ValueError(
      f"{path} is damaged, or not a cache that --save_cache wrote ({error}). Read the document"
      " again."
    ) from error


def _member(archive: zipfile.ZipFile, name: str, dtype: Any, max_bytes: int) -> np.ndarray:
  """A flat array of the archive, whose size is bounded before it is read."""
  info = archive.getinfo(f"{name}.npy")
  if info.file_size > max_bytes + 1024:
    raise ValueError(f"{name} has {info.file_size} bytes")
  with archive.open(info) as stream:
    array = np.lib.format.read_array(stream, allow_pickle=False)
  if array.ndim != 1 or array.dtype != dtype:
    raise ValueError(f"{name} is {array.dtype}{list(array.shape)}")
  return array


def _binding(model: Decoder, tokenizer: Tokenizer, template: ChatTemplate | None) -> _Binding:
  return _Binding(
    model=_settings(model.config),
    weights=_fingerprint(model),
    tokenizer=_digest(tokenizer.to_json().encode()),
    chat_template=None if template is None else _digest(template.source.encode()),
  )


def _settings(config: ModelConfig) -> dict[str, Any]:
  """The fields of a config that the content of a cache depends on."""
  unused = {"remat", "unroll_layers", "param_dtype", *ATTENTION_SETTINGS} - {config.attention}
  values = {name: value for name, value in config.to_dict().items() if name not in unused}
  settings: dict[str, Any] = json.loads(json.dumps(values))
  return settings


def _fingerprint(model: Decoder) -> str:
  """A hash of evenly spaced values of every weight."""
  digest = hashlib.blake2b(digest_size=16)
  for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)):
    digest.update(np.asarray(_evenly_spaced(leaf)).tobytes())
  return digest.hexdigest()


@jax.jit
def _evenly_spaced(weight: jax.Array) -> jax.Array:
  flat = weight.reshape(-1)
  return flat[:: max(1, flat.size // _SAMPLE)]


def _check_binding(path: Path, header: Mapping[str, Any], own: _Binding) -> None:
  """Raises ValueError with the first difference."""
  with _damage_errors(path):
    found = _Binding(*(header[name] for name in _Binding._fields))
    stored, wanted = _flat(found.model), _flat(own.model)
  for name in sorted(stored.keys() | wanted.keys()):
    if stored.get(name) != wanted.get(name):
      raise ValueError(
        f"{path} belongs to a model with {name} {stored.get(name)!r}; this model has"
        f" {wanted.get(name)!r}. Load the model of the file, with the same --attention, --budgets,"
        " --dtype and --cache_dtype, or read the document again."
      )
  for name in ("weights", "tokenizer", "chat_template"):
    if getattr(found, name) != getattr(own, name):
      hint = " Pass --chat as it was passed with --save_cache." if name == "chat_template" else ""
      raise ValueError(
        f"{path} belongs to a model with another {name.replace('_', ' ')}.{hint} Load the model of"
        " the file, or read the document again."
      )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for name, value in values.items():
    flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
  return flat


def _digest(content: bytes) -> str:
  return hashlib.blake2b(content, digest_size=16).hexdigest()
