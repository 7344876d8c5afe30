"""Where parameters lie on a mesh: rules from the names of their axes to the mesh's."""

import math

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from dga_jax.checkpoint import abstract_decoder
from dga_jax.model import ModelConfig

# Heads, the MLP's inner width and the vocabulary are split over "model", the residual width over
# "data". Axes that have no rule are whole on every device.
RULES = {
  "heads": "model",
  "kv_heads": "model",
  "mlp": "model",
  "vocab": "model",
  "embed": "data",
}


def parse_mesh(text: str) -> Mesh:
  """The mesh of a description such as "data=2,model=4".

  Raises:
    ValueError: an unknown axis, a size that is no number, or more devices than there are.
  """
  sizes: dict[str, int] = {}
  for part in text.split(","):
    name, _, size = part.partition("=")
    if name not in RULES.values() or not size.isdecimal() or int(size) < 1 or name in sizes:
      raise ValueError(f"--mesh={text} has {part!r}; write data=N, model=N or both with a comma.")
    sizes[name] = int(size)
  wanted = math.prod(sizes.values())
  if wanted > jax.device_count():
    raise ValueError(f"--mesh={text} takes {wanted} devices; there are {jax.device_count()}.")
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
    devices=jax.devices()[:wanted],
  )


def shardings(config: ModelConfig, mesh: Mesh) -> PyTree[NamedSharding]:
  """The sharding of every parameter; an axis that the mesh does not divide stays whole."""
  variables = abstract_decoder(config)[1]
  names = nnx.to_pure_dict(nnx.get_partition_spec(variables))
  shapes = nnx.to_pure_dict(variables)

  def place(axes: PartitionSpec, array: jax.ShapeDtypeStruct) -> NamedSharding:
    split = []
    for axis, size in zip(axes, array.shape, strict=True):
      rule = RULES.get(axis)
      fits = rule in mesh.shape and size % mesh.shape[rule] == 0
      split.append(rule if fits else None)
    return NamedSharding(mesh, PartitionSpec(*split))

  return jax.tree.map(place, names, shapes, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
