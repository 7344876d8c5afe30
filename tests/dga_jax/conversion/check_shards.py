"""Checks that an import onto four devices equals one onto one; test_hugging_face.py runs it."""

import sys
from pathlib import Path

import jax
import numpy as np

from dga_jax.conversion.hugging_face import HuggingFaceFolder
from dga_jax.conversion.importing import import_params
from dga_jax.conversion.sharding import parse_mesh, shardings


def check(folder: Path) -> None:
  source = HuggingFaceFolder(folder)
  config = source.config()
  layout = shardings(config, parse_mesh("fsdp=2,tensor=2"))
  params = import_params(source, config, layout)
  jax.tree.map(np.testing.assert_array_equal, params, import_params(source, config))
  for array, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(layout), strict=True):
    assert array.sharding.is_equivalent_to(sharding, array.ndim)
  query = params["layers"]["attention"]["query"]
  assert {shard.data.shape for shard in query.addressable_shards} == {(2, 16, 2, 8)}


if __name__ == "__main__":
  check(Path(sys.argv[1]))
