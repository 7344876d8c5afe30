"""The identity of a model: a hash of its parameters and its shape."""

import hashlib
from typing import Any

import jax
import numpy as np
from flax import nnx

from dga_jax.model import Decoder


def describe_model(model: Decoder) -> dict[str, Any]:
  """Layers, KV heads, dtype, RoPE base, and a hash of all parameters, as JSON values."""
  config = model.config
  return {
    "num_layers": config.num_layers,
    "num_kv_heads": config.num_kv_heads,
    "dtype": config.dtype,
    "rope_base": config.rope_base,
    "sha256": hash_parameters(model),
  }


def hash_parameters(model: Decoder) -> str:
  """SHA-256 of the names, dtypes, shapes and numbers of all parameters, in hexadecimal."""
  digest = hashlib.sha256()
  leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
  for path, leaf in leaves:
    array = np.ascontiguousarray(leaf)
    digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
    digest.update(array.reshape(-1).view(np.uint8))
  return digest.hexdigest()
