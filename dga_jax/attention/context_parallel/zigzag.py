"""The geometry of a sequence that is split over the devices of a mesh axis."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


@dataclasses.dataclass(frozen=True)
class ZigzagShards:
  """A sequence of 2C chunks of n tokens on C devices; device c holds chunks c and 2C - 1 - c.

  A device's arrays hold its two chunks one after the other, see `dga_jax.sharding.zigzag_order`.
  All methods run inside a `jax.shard_map` over the axis.

  Attributes:
    axis_name: of the mesh.
    count: C.
    chunk: n.
  """

  axis_name: str
  count: int
  chunk: int

  @classmethod
  def of(cls, axis_name: str, tokens: int) -> "ZigzagShards":
    """The pieces of a sequence of which this device holds that many tokens."""
    return cls(axis_name, jax.lax.axis_size(axis_name), tokens // 2)

  @property
  def length(self) -> int:
    """L, of the whole sequence."""
    return 2 * self.count * self.chunk

  @property
  def chunk_starts(self) -> Int[Array, "2"]:
    """Position of the first token of each of this device's chunks."""
    own = jax.lax.axis_index(self.axis_name)
    return jnp.stack([own, 2 * self.count - 1 - own]) * self.chunk

  @property
  def positions(self) -> Int[Array, "P"]:
    """Position in the sequence of each of this device's tokens."""
    offset_1xn = jnp.arange(self.chunk, dtype=jnp.int32)[None]
    return (self.chunk_starts[:, None] + offset_1xn).reshape(-1)

  def place(self, position: Int[Array, "*S"]) -> Int[Array, "*S"]:
    """Where among this device's tokens a position of the sequence lies; P for another device's."""
    place = jnp.full_like(position, 2 * self.chunk)
    for slot in (0, 1):
      inside = position - self.chunk_starts[slot]
      here = (inside >= 0) & (inside < self.chunk)
      place = jnp.where(here, slot * self.chunk + inside, place)
    return place

  def own(self, x: Shaped[Array, "*S L"]) -> Shaped[Array, "*S P"]:
    """This device's part of what every device holds for the whole sequence."""
    starts = self.chunk_starts
    parts = [
      jax.lax.dynamic_slice_in_dim(x, starts[slot], self.chunk, axis=x.ndim - 1) for slot in (0, 1)
    ]
    return jnp.concatenate(parts, axis=-1)

  def split(self, x: Shaped[Array, "B P *S"]) -> Shaped[Array, "B 2 n *S"]:
    """The two chunks apart."""
    return x.reshape(x.shape[0], 2, self.chunk, *x.shape[2:])

  def halo_exchange(self, x: Shaped[Array, "B P *S"], size: int) -> Shaped[Array, "B 2 {size} *S"]:
    """The last `size` tokens before each of this device's chunks; zeros before the first.

    Each device sends to its two neighbours, and no further.
    """
    tails = self.split(x)[:, :, self.chunk - size :]
    up = [(device, device + 1) for device in range(self.count - 1)]
    down = [(device + 1, device) for device in range(self.count - 1)]
    low = jax.lax.ppermute(tails[:, 0], self.axis_name, up)
    # The last device's chunks are neighbours of each other.
    is_last = jax.lax.axis_index(self.axis_name) == self.count - 1
    high = jax.lax.ppermute(tails[:, 1], self.axis_name, down)
    return jnp.stack([low, jnp.where(is_last, tails[:, 0], high)], axis=1)

  def gather(self, x: Shaped[Array, "B 2 *S"]) -> Shaped[Array, "B chunks *S"]:
    """Every device's x, which has an entry for each of its chunks, in the order of the chunks."""
    every = jax.lax.all_gather(x, self.axis_name, axis=1, tiled=True)
    every = every.reshape(x.shape[0], self.count, 2, *x.shape[2:])
    return jnp.concatenate([every[:, :, 0], every[:, ::-1, 1]], axis=1)
