"""Zigzag sharding: which positions of a sequence each device of a mesh axis holds."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from dga_jax.attention.segments import Documents


@dataclasses.dataclass(frozen=True)
class ZigzagShards:
  """A sequence of 2C chunks of n tokens on C devices; device c holds chunks c and 2C - 1 - c.

  The arrays of a device hold P = 2n tokens: its early chunk, then its late chunk, as in
  `dga_jax.sharding.zigzag_order`. All methods run inside a `jax.shard_map` over the mesh axis.

  Attributes:
    axis_name: the mesh axis.
    devices: C.
    chunk: n.
  """

  axis_name: str
  devices: int
  chunk: int

  @classmethod
  def from_local_length(cls, axis_name: str, tokens: int) -> "ZigzagShards":
    """The shards of a sequence of which every device holds `tokens` tokens."""
    return cls(axis_name, jax.lax.axis_size(axis_name), tokens // 2)

  @property
  def length(self) -> int:
    """L, of the whole sequence."""
    return 2 * self.devices * self.chunk

  @property
  def chunk_ids(self) -> Int[Array, "2"]:
    """The two chunks of this device."""
    device = jax.lax.axis_index(self.axis_name)
    return jnp.stack([device, 2 * self.devices - 1 - device])

  @property
  def chunk_starts(self) -> Int[Array, "2"]:
    """Position of the first token of each of this device's chunks."""
    return self.chunk_ids * self.chunk

  @property
  def positions(self) -> Int[Array, "P"]:
    """Position in the sequence of each of this device's tokens."""
    offset_1xn = jnp.arange(self.chunk, dtype=jnp.int32)[None]
    return (self.chunk_starts[:, None] + offset_1xn).reshape(-1)

  def local_index(self, position: Int[Array, "*S"]) -> Int[Array, "*S"]:
    """Index among this device's tokens of a position in the sequence; P if it is elsewhere."""
    index = jnp.full_like(position, 2 * self.chunk)
    for half in (0, 1):
      offset = position - self.chunk_starts[half]
      is_here = (offset >= 0) & (offset < self.chunk)
      index = jnp.where(is_here, half * self.chunk + offset, index)
    return index

  def local_part(self, x: Shaped[Array, "*S L"]) -> Shaped[Array, "*S P"]:
    """This device's part of an array that every device holds for the whole sequence."""
    starts = self.chunk_starts
    parts = [
      jax.lax.dynamic_slice_in_dim(x, starts[half], self.chunk, axis=x.ndim - 1) for half in (0, 1)
    ]
    return jnp.concatenate(parts, axis=-1)

  def zero_padding(self, documents: Documents, *arrays: Array) -> tuple[Array, ...]:
    """This device's parts [B, P, ...] with zeros in the padding, as `attend.zero_padding`."""
    if documents.rows == "whole":
      return arrays
    is_token_BxPx1x1 = self.local_part(documents.is_token)[..., None, None]
    return tuple(jnp.where(is_token_BxPx1x1, array, 0) for array in arrays)

  def split_chunks(self, x: Shaped[Array, "B P *S"]) -> Shaped[Array, "B 2 n *S"]:
    """The tokens of this device's two chunks on an axis of their own."""
    return x.reshape(x.shape[0], 2, self.chunk, *x.shape[2:])

  def halo_exchange(self, x: Shaped[Array, "B P *S"], size: int) -> Shaped[Array, "B 2 {size} *S"]:
    """The last `size` tokens before each of this device's chunks; zeros before the first chunk.

    Each device sends to its two neighbours only.
    """
    tails = self.split_chunks(x)[:, :, self.chunk - size :]
    up = [(device, device + 1) for device in range(self.devices - 1)]
    down = [(device + 1, device) for device in range(self.devices - 1)]
    before_early = jax.lax.ppermute(tails[:, 0], self.axis_name, up)
    # The two chunks of the last device are adjacent.
    is_last = jax.lax.axis_index(self.axis_name) == self.devices - 1
    before_late = jax.lax.ppermute(tails[:, 1], self.axis_name, down)
    return jnp.stack([before_early, jnp.where(is_last, tails[:, 0], before_late)], axis=1)

  def all_gather(self, x: Shaped[Array, "B 2 *S"]) -> Shaped[Array, "B chunks *S"]:
    """The x of every device, which has one entry for each chunk, in the order of the chunks."""
    gathered = jax.lax.all_gather(x, self.axis_name, axis=1, tiled=True)
    gathered = gathered.reshape(x.shape[0], self.devices, 2, *x.shape[2:])
    return jnp.concatenate([gathered[:, :, 0], gathered[:, ::-1, 1]], axis=1)
