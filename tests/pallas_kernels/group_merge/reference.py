"""Group merging in plain jax.numpy: the oracle of the backends, which shares no code with them.

Call it under `jax.enable_x64(True)` on float64 arrays.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def merge_reference(query: Array, key: Array, value: Array, scale: float) -> tuple[Array, Array]:
  """Merges groups by Eq. 14 of the paper; queries are [*k, R, D], members [*k, m, D]."""
  logits = scale * (query[..., :, None, :] * key[..., None, :, :]).sum(axis=-1)
  weights = jax.nn.softmax(logits, axis=-1).mean(axis=-2)[..., None]
  return (weights * key).sum(axis=-2), (weights * value).sum(axis=-2)


def groups_reference(
  query: Array,
  key: Array,
  value: Array,
  focal_index: np.ndarray,
  member_index: np.ndarray,
  group_query: np.ndarray,
  *,
  scale: float,
  reorder_window: bool,
) -> tuple[Array, ...]:
  """The query and the six arrays that `merge_groups` returns."""
  B, L, N, D = key.shape
  query_BxLxNxRxD = query.reshape(B, L, N, -1, D)
  row, head = np.arange(B)[:, None, None], np.arange(N)[None, :, None]

  def take(x: Array, index_BxNxS: np.ndarray) -> Array:
    """Gathers rows [B, N, S, ...] by index. The index L gives zeros."""
    padded = jnp.concatenate([x, jnp.zeros_like(x[:, :1])], axis=1)
    return padded[row, index_BxNxS, head]

  flat = member_index.reshape(B, N, -1)
  members = [take(x, flat) for x in (key, value)]
  grouped = [x.reshape(*member_index.shape, D) for x in members]
  merged = merge_reference(take(query_BxLxNxRxD, group_query), *grouped, scale)
  focal = [take(x, focal_index) for x in (key, value)]
  heads_first = [*focal, *merged, *(members if reorder_window else [])]
  arrays = [x.swapaxes(1, 2) for x in heads_first]
  return query, *arrays, *(() if reorder_window else (key, value))


def indices_of_blocks(
  start: np.ndarray, chosen: np.ndarray, members: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The index arrays of `merge_groups` from block starts and offsets of focal tokens."""
  B, N, k, f = chosen.shape
  focal = np.full((B, N, k, f), length)
  member = np.full((B, N, k, members), length)
  last = np.full((B, N, k), length)
  for b, n, g in np.ndindex(B, N, k):
    first = int(start[b, g])
    if first < length:
      kept = [int(x) for x in chosen[b, n, g]]
      focal[b, n, g] = [first + x for x in kept]
      member[b, n, g] = [first + x for x in range(members + f) if x not in kept]
      last[b, n, g] = first + members + f - 1
  return focal.reshape(B, N, k * f), member, last
