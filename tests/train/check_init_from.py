"""Checks that loading a model for training puts only its shards on each of four devices.

test_init_from.py runs this module.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from dga_jax.checkpoint import load_model
from dga_jax.conversion.hugging_face import HuggingFaceFolder
from dga_jax.conversion.importing import import_model
from dga_jax.sharding import make_mesh, MeshConfig
from tests.train.tiny import tiny_config
from train.init_from import load_params

_MAKERS = ("device_put", "make_array_from_callback", "make_array_from_single_device_arrays")


@contextmanager
def largest_shards() -> Iterator[dict[tuple[int, ...], int]]:
  """Records the largest shard, in elements, that JAX puts on a device, by shape of the array."""
  largest: dict[tuple[int, ...], int] = {}

  def noting(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, **options: Any) -> Any:
      result = make(*args, **options)
      for array in jax.tree.leaves(result):
        if isinstance(array, jax.Array):
          size = max(shard.data.size for shard in array.addressable_shards)
          largest[array.shape] = max(size, largest.get(array.shape, 0))
      return result

    return made

  original = {name: getattr(jax, name) for name in _MAKERS}
  try:
    for name, make in original.items():
      setattr(jax, name, noting(make))
    yield largest
  finally:
    for name, make in original.items():
      setattr(jax, name, make)


def check(folder: Path, workdir: Path) -> None:
  source = HuggingFaceFolder(folder)
  import_model(source, source.config(), workdir)
  config = dataclasses.replace(tiny_config(folder, workdir), init_from=str(workdir))
  mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))

  with largest_shards() as seen:
    params = jax.tree.leaves(load_params(config, mesh))
  split = [x for x in params if not x.sharding.is_fully_replicated]
  assert sum(x.size for x in split) > 0.9 * sum(x.size for x in params)
  for x in split:
    assert seen[x.shape] == x.addressable_shards[0].data.size < x.size

  # A positive control: on one device the largest shard is the whole parameter.
  with largest_shards() as seen:
    model, _, _ = load_model(workdir)
  assert all(seen[x.shape] == x.size for x in split)
  whole = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
  for a, b in zip(params, whole, strict=True):
    np.testing.assert_array_equal(a, np.asarray(b, a.dtype))


if __name__ == "__main__":
  check(Path(sys.argv[1]), Path(sys.argv[2]))
