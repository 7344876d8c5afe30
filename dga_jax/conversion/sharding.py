"""The mesh and the shardings of an import, from the command line."""

import math

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from dga_jax.checkpoint import abstract_decoder
from dga_jax.model import ModelConfig
from dga_jax.sharding import make_mesh, MeshConfig, parameter_shardings

_AXES = ("fsdp", "tensor")


def parse_mesh(text: str) -> Mesh:
  """The mesh of a description such as "fsdp=2,tensor=4"; see `dga_jax.sharding`.

  Raises:
    ValueError: an unknown axis, a size that is no number, or more devices than there are.
  """
  sizes: dict[str, int] = {}
  for part in text.split(","):
    name, _, size = part.partition("=")
    if name not in _AXES or not size.isdecimal() or int(size) < 1 or name in sizes:
      raise ValueError(f"--mesh={text} has {part!r}; write fsdp=N, tensor=N or both with a comma.")
    sizes[name] = int(size)
  wanted = math.prod(sizes.values())
  if wanted > jax.device_count():
    raise ValueError(f"--mesh={text} takes {wanted} devices; there are {jax.device_count()}.")
  return make_mesh(MeshConfig(data=1, **sizes), jax.devices()[:wanted])


def shardings(config: ModelConfig, mesh: Mesh) -> PyTree[NamedSharding]:
  """The sharding of every parameter; an axis that the mesh does not divide stays whole."""
  return parameter_shardings(abstract_decoder(config)[1], mesh)
