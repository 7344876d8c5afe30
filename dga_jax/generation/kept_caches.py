"""Caches of prompts and answers, kept for later requests that begin with the same tokens."""

import collections
import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from dga_jax.generation.cache_shapes import CacheShapes
from dga_jax.generation.programs import Programs
from dga_jax.model.decoder import DecoderCache


@dataclasses.dataclass
class KeptCache:
  """The cache of a sequence of tokens. It is on the device or on the host.

  Attributes:
    tokens: int32, the tokens in the cache.
    logits: of the next token, float32 [1, V]; None where they are unknown, after an answer.
    row: the cache on the device; None while it is on the host.
    on_host: the arrays on the host, cut to the entries in use; None while it is on the device.
  """

  tokens: np.ndarray
  logits: Float[Array, "1 V"] | np.ndarray | None
  row: DecoderCache | None
  on_host: list[np.ndarray] | None = None

  @property
  def host_bytes(self) -> int:
    """Bytes on the host."""
    return sum(x.nbytes for x in self.on_host or [])


class KeptCaches:
  """Kept caches within a budget of bytes, the least recently used first.

  A cache that leaves the device moves to the host; one that leaves the host is gone.

  Args:
    programs: of the engine.
    device_bytes: budget on the device.
    host_bytes: budget on the host.

  Attributes:
    device_bytes: bytes of the caches on the device; other threads may read it.
    host_bytes: bytes of the caches on the host; likewise.
  """

  def __init__(self, programs: Programs, *, device_bytes: int, host_bytes: int) -> None:
    self._programs = programs
    self._row_bytes = programs.shapes.row_bytes
    self._most_on_device = max(0, device_bytes) // self._row_bytes
    self._host_budget = host_bytes
    self._reserved = 0  # Rows on the device that `keep` or `release` will account for.
    self._kept: collections.OrderedDict[bytes, KeptCache] = collections.OrderedDict()
    self.device_bytes = self.host_bytes = 0

  @property
  def enabled(self) -> bool:
    """Whether any cache can be kept."""
    return self._most_on_device > 0 or self._host_budget > 0

  def __len__(self) -> int:
    return len(self._kept)

  def find(self, prompt: np.ndarray) -> KeptCache | None:
    """The longest kept cache from which a prompt can be read, now the last used.

    Its tokens are the beginning of the prompt. With all tokens of the prompt, it has the logits.
    """
    fits = [
      (len(kept.tokens), key)
      for key, kept in self._kept.items()
      if common_prefix(kept.tokens, prompt) == len(kept.tokens)
      and (kept.logits is not None or len(kept.tokens) < len(prompt))
    ]
    if not fits:
      return None
    _, key = max(fits)
    self._kept.move_to_end(key)
    return self._kept[key]

  def longest_shared(self, prompt: np.ndarray) -> int:
    """Tokens that a prompt has in common with the beginning of a kept prompt, at most."""
    return max((common_prefix(kept.tokens, prompt) for kept in self._kept.values()), default=0)

  def load(self, kept: KeptCache) -> DecoderCache:
    """A copy of a kept cache on the device, which can be donated."""
    if kept.row is not None:
      return self._programs.copy_row(kept.row)
    assert kept.on_host is not None
    return self._programs.load_row(self._programs.shapes.pad(kept.on_host))

  def keep(
    self,
    tokens_L: Int[np.ndarray, "L"],
    row: DecoderCache,
    logits_1xV: Float[Array | np.ndarray, "1 V"],
  ) -> None:
    """Keeps the cache of a prompt; the caller does not donate `row` afterwards."""
    key = tokens_L.tobytes()
    self._kept.pop(key, None)
    self._kept[key] = KeptCache(tokens_L, logits_1xV, row)
    self._evict()

  def reserve(self) -> bool:
    """Makes room on the device for a row that `keep_answer` or `release` gets later.

    Returns:
      False if all kept rows on the device are reserved already.
    """
    if self._reserved >= self._most_on_device:
      return False
    self._reserved += 1
    self._evict()
    return True

  def release(self) -> None:
    """Ends a reservation without a row."""
    self._reserved -= 1

  def keep_answer(self, tokens: np.ndarray, prompt_length: int, row: DecoderCache) -> None:
    """Keeps the cache of a prompt and an answer; `reserve` has made room for it.

    The next turn continues after the answer if its tokens begin with these tokens, or else after
    the prompt. Therefore the cache of the prompt alone becomes the next to leave the device.

    Args:
      tokens: int32, of the prompt and of the answer.
      prompt_length: tokens of the longest kept beginning of the prompt.
      row: the cache; the caller does not donate it afterwards.
    """
    self.release()
    key, prompt_key = tokens.tobytes(), tokens[:prompt_length].tobytes()
    if key not in self._kept:
      self._kept[key] = KeptCache(tokens, None, row)
    self._kept.move_to_end(key)
    if prompt_key in self._kept and prompt_key != key:
      self._kept.move_to_end(prompt_key, last=False)
    self._evict()

  def clear(self) -> None:
    """Drops every kept cache and every reservation."""
    self._kept.clear()
    self._reserved = 0
    self.device_bytes = self.host_bytes = 0

  def _evict(self) -> None:
    on_device = [kept for kept in self._kept.values() if kept.row is not None]
    extra = max(0, len(on_device) + self._reserved - self._most_on_device)
    for kept in on_device[:extra]:
      self._move_to_host(kept)
    host_bytes = sum(kept.host_bytes for kept in self._kept.values())
    for key, kept in list(self._kept.items()):
      if host_bytes > self._host_budget and kept.on_host is not None:
        host_bytes -= kept.host_bytes
        del self._kept[key]
    self.device_bytes, self.host_bytes = (len(on_device) - extra) * self._row_bytes, host_bytes

  def _move_to_host(self, kept: KeptCache) -> None:
    leaves: list[np.ndarray] = jax.device_get(jax.tree.leaves(kept.row))
    kept.on_host = self._programs.shapes.trim(leaves, len(kept.tokens))
    kept.row = None
    if kept.logits is not None:
      kept.logits = np.asarray(kept.logits)


def bytes_for_kept(cache_bytes: int | None, shapes: CacheShapes, slots: int) -> int:
  """Bytes of `cache_bytes` that slots, the prompt being read and its copy leave; 0 for None.

  Raises:
    ValueError: they leave less than nothing.
  """
  if cache_bytes is None:
    return 0
  row = shapes.row_bytes
  left = cache_bytes - (slots + 2) * row
  if left < 0:
    raise ValueError(
      f"cache_bytes is {cache_bytes}, but {slots} slots and two prompts being read, of"
      f" {shapes.max_length} tokens each, take {(slots + 2) * row}. Use at most"
      f" {max(0, cache_bytes // row - 2)} slots, or a smaller max_length."
    )
  return left


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
  """The number of equal elements at the beginning of two arrays."""
  length = min(len(a), len(b))
  different = np.flatnonzero(a[:length] != b[:length])
  return int(different[0]) if different.size else length
