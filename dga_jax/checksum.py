"""A checksum of arrays that does not depend on how they are spread over devices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, UInt32


@jax.jit
def checksum(tree: PyTree[Array]) -> UInt32[Array, ""]:
  """Σ (2i + 1)·word_i mod 2³² over each array's words in row-major order, combined over the arrays.

  Integer sums do not depend on their order, so the value is the same however the arrays are
  sharded, and only sums travel between devices; odd factors are invertible, so no change of a
  single word goes unnoticed.
  """
  total = jnp.uint32(0)
  for leaf in jax.tree.leaves(tree):
    words = _words(leaf)
    weighted = words * (2 * _row_major_index(words.shape) + 1)
    total = total * jnp.uint32(31) + jnp.sum(weighted, dtype=jnp.uint32)
  return total


def _words(array: Array) -> UInt32[Array, "..."]:
  """An array's bits as 32-bit words, one or more to an element."""
  bits = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
  return jax.lax.bitcast_convert_type(array, bits).astype(jnp.uint32)


def _row_major_index(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
  """Each element's number, mod 2³²: by axes, for a flat array would be gathered from its shards."""
  index = jnp.zeros(shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(len(shape))):
    steps = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    index += steps * jnp.uint32(stride % 2**32)
    stride *= shape[axis]
  return index
