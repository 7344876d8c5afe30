"""Caches of prompts and answers, kept for later requests that begin with the same tokens.

Threads copy caches between device and host, so that the engine's thread waits for no copy unless
the device has no room.
"""

import collections
import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor

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
    moving: becomes `on_host` while a thread copies the cache to the host.
    host_bytes: bytes of `on_host`, also while it is moving.
  """

  tokens: np.ndarray
  logits: Float[Array, "1 V"] | np.ndarray | None
  row: DecoderCache | None
  on_host: list[np.ndarray] | None = None
  moving: Future[list[np.ndarray]] | None = None
  host_bytes: int = 0

  def settle(self) -> None:
    """Ends the move to the host; waits for the copy."""
    if self.moving is not None:
      self.on_host, self.moving, self.row = self.moving.result(), None, None


class KeptCaches:
  """Kept caches within a budget of bytes, the least recently used first.

  A cache that leaves the device moves to the host; one that leaves the host is gone. The move
  begins while the device has room for one more cache, if it has room for several.

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
    self._copies = ThreadPoolExecutor(2, "copies of caches")
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

  def load(self, kept: KeptCache) -> Future[DecoderCache]:
    """A copy of a kept cache on the device, which can be donated."""
    if kept.row is not None:
      done: Future[DecoderCache] = Future()
      done.set_result(self._programs.copy_row(kept.row))
      return done
    arrays, programs = kept.on_host, self._programs
    assert arrays is not None
    return self._copies.submit(lambda: programs.load_row(programs.shapes.pad(arrays)))

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
    """Moves or drops the least recently used caches, until the others and reservations fit."""
    for kept in self._kept.values():
      if kept.moving is not None and kept.moving.done():
        kept.settle()
    spare = int(self._most_on_device > 1 and self._host_budget > 0)
    for key in self._over(self._most_on_device - spare, moving=False):
      self._leave_device(key)
    for key in self._over(self._most_on_device, moving=True):
      self._kept[key].settle()
    host_bytes = sum(kept.host_bytes for kept in self._kept.values())
    for key, kept in list(self._kept.items()):
      if host_bytes > self._host_budget and kept.on_host is not None:
        host_bytes -= kept.host_bytes
        del self._kept[key]
    on_device = sum(kept.row is not None for kept in self._kept.values())
    self.device_bytes, self.host_bytes = on_device * self._row_bytes, host_bytes

  def _over(self, most: int, *, moving: bool) -> list[bytes]:
    """The keys of the caches that exceed `most` rows on the device, least recently used first.

    Args:
      most: rows, reservations included.
      moving: whether caches that are moving to the host count, and are the ones to return. Else
        they do not count.
    """
    resident = [key for key, kept in self._kept.items() if kept.row is not None]
    moves = [key for key in resident if self._kept[key].moving is not None]
    counted = len(resident) if moving else len(resident) - len(moves)
    candidates = moves if moving else [key for key in resident if key not in moves]
    return candidates[: max(0, counted + self._reserved - most)]

  def _leave_device(self, key: bytes) -> None:
    """Begins the move of a cache to the host, or drops a cache that exceeds the host's budget."""
    kept, shapes = self._kept[key], self._programs.shapes
    kept.host_bytes = shapes.trimmed_bytes(len(kept.tokens))
    if kept.host_bytes > self._host_budget:
      del self._kept[key]
      return
    row, logits = kept.row, kept.logits
    kept.logits = None if logits is None else np.asarray(logits)
    kept.moving = self._copies.submit(
      lambda: shapes.trim(jax.device_get(jax.tree.leaves(row)), len(kept.tokens))
    )


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
