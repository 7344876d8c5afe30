"""The state of all slots on the device, and the end of a slot's sequence."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dga_jax.generation.cache_shapes import hold_lengths
from dga_jax.generation.requests import MAX_STOP_IDS, Request
from dga_jax.generation.sampling import NOT_FINITE, Sampling, SamplingParams

if TYPE_CHECKING:
  from dga_jax.model.decoder import DecoderCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotSettings:
  """The settings of the request in each slot.

  Attributes:
    sampling: how tokens are sampled.
    max_new_tokens: bound on the tokens of the continuation; 0 in a slot without a request.
    stop_ids: tokens that end the continuation. Unused entries are `NOT_FINITE`, which ends a
      continuation too.
  """

  sampling: SamplingParams
  max_new_tokens: Int[Array, "B"]
  stop_ids: Int[Array, "B S"]

  @classmethod
  def from_request(cls, request: Request) -> "SlotSettings":
    """NumPy arrays of one row."""
    stop_ids = np.full((1, MAX_STOP_IDS), NOT_FINITE, np.int32)
    stop_ids[0, : len(request.stop_ids)] = list(request.stop_ids)
    sampling = SamplingParams.from_samplings([request.sampling])
    max_new_tokens = np.array([request.max_new_tokens], np.int32)
    return cls(sampling, max_new_tokens, stop_ids)  # type: ignore[arg-type]  # JAX takes NumPy.

  @classmethod
  def empty(cls, slots: int) -> "SlotSettings":
    """Arrays of slots without a request."""
    # Greedy: decoding sorts the vocabulary if any slot has a temperature.
    sampling = SamplingParams.from_samplings([Sampling(temperature=0.0)] * slots)
    return cls(
      jax.tree.map(jnp.asarray, sampling),
      jnp.zeros(slots, jnp.int32),
      jnp.full((slots, MAX_STOP_IDS), NOT_FINITE, jnp.int32),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchState:
  """The state of all slots, on the device.

  A continuation that has ended keeps its cache: later decode steps change neither its number of
  tokens nor the entries of these tokens. Therefore the cache can be copied after the host has
  learned of the end. The cache of a slot without a request has no meaning.

  Attributes:
    cache: one row a slot.
    token: the last token of each slot; the cache does not contain it yet.
    sampled: tokens sampled so far in each slot.
    settings: of the request in each slot.
  """

  cache: "DecoderCache"
  token: Int[Array, "B"]
  sampled: Int[Array, "B"]
  settings: SlotSettings

  def without_requests(
    self, empty_B: Bool[Array, "B"], batch_axes: Sequence[int | None]
  ) -> "BatchState":
    """The state with some slots emptied: no tokens in the cache, and the settings of no request.

    Args:
      empty_B: the slots to empty.
      batch_axes: of the cache, see `CacheShapes.batch_axes`.
    """
    zeros = jax.tree.map(jnp.zeros_like, self.cache)

    def choose(empty: Array, own: Array) -> Array:
      return jnp.where(empty_B.reshape(-1, *[1] * (own.ndim - 1)), empty, own)

    empty = SlotSettings.empty(empty_B.shape[0])
    return dataclasses.replace(
      self,
      cache=hold_lengths(zeros, self.cache, batch_axes, empty_B),
      settings=jax.tree.map(choose, empty, self.settings),
    )

  def ended(self) -> Bool[Array, "B"]:
    """Whether each slot's continuation has its last token, or the slot has no request."""
    is_stop_B = (self.token[:, None] == self.settings.stop_ids).any(axis=1)
    return is_stop_B | (self.sampled >= self.settings.max_new_tokens)
