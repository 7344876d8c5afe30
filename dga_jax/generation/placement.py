"""Where the weights and caches of generation are: one device, or a mesh that splits heads."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from dga_jax.model.config import ModelConfig
from dga_jax.model.sharded_attention import has_heads, splits_heads
from dga_jax.sharding import constrain


class Placement:
  """The sharding of every array of a cache, and of what all devices hold whole.

  Args:
    mesh: with the axis "tensor"; None for one device.
    batch_axes: the batch axis of every array of a cache, see `CacheShapes`.
    config: of the model.
  """

  def __init__(self, mesh: Mesh | None, batch_axes: list[int | None], config: ModelConfig) -> None:
    self._mesh, self._batch_axes, self._num_kv_heads = mesh, batch_axes, config.num_kv_heads
    parts = 1 if mesh is None else mesh.shape["tensor"]
    self._kind = config.make_attention()
    self._splits_heads = splits_heads(self._kind, config.num_kv_heads, parts)

  def cache_shapes(self, cache: Any) -> Any:
    """The shapes of a cache with their shardings."""
    leaves, structure = jax.tree.flatten(cache)
    placed = [
      jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
      for leaf, sharding in zip(leaves, self._cache_shardings(leaves), strict=True)
    ]
    return jax.tree.unflatten(structure, placed)

  def cache(self, cache: Any) -> Any:
    """A traced cache, split over the mesh."""
    if self._mesh is None:
      return cache
    leaves, structure = jax.tree.flatten(cache)
    pairs = zip(leaves, self._cache_shardings(leaves), strict=True)
    placed = [jax.lax.with_sharding_constraint(leaf, sharding) for leaf, sharding in pairs]
    return jax.tree.unflatten(structure, placed)

  def logits(self, logits_BxV: Array) -> Array:
    """Traced logits, whole on every device.

    Each device computes the logits of its part of the vocabulary. Without the first constraint the
    compiler would gather the table of the unembedding instead of the logits.
    """
    return self.whole(constrain(logits_BxV, None, "vocab"))

  def whole(self, tree: Any) -> Any:
    """Traced arrays, whole on every device of the mesh."""
    if self._mesh is None:
      return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(self._mesh, PartitionSpec()))

  def _cache_shardings(self, leaves: list[Any]) -> list[NamedSharding | None]:
    """KV heads are split over the mesh axis "tensor" where `splits_heads` is true."""
    if self._mesh is None:
      return [None] * len(leaves)
    shardings: list[NamedSharding | None] = []
    for leaf, axis in zip(leaves, self._batch_axes, strict=True):
      spec = PartitionSpec()
      if (
        axis is not None
        and self._splits_heads
        and has_heads(self._kind, leaf.shape[axis + 1 :], self._num_kv_heads)
      ):
        spec = PartitionSpec(*[None] * (axis + 1), "tensor")
      shardings.append(NamedSharding(self._mesh, spec))
    return shardings
