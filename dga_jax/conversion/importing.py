"""A `Source` to a checkpoint of ours: one tensor at a time, into any sharding."""

import difflib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from jaxtyping import Array, PyTree
from tqdm import tqdm

from dga_jax.checkpoint import abstract_decoder, Checkpoints, list_steps
from dga_jax.conversion.checkpoint_reader import Source
from dga_jax.conversion.gguf_file import GGUFFile
from dga_jax.conversion.hugging_face import HuggingFaceFolder
from dga_jax.conversion.param_map import tensor_specs, TensorSpec
from dga_jax.conversion.sharding import parse_mesh, shardings
from dga_jax.model import ModelConfig


def open_source(path: Path) -> Source:
  """A GGUF file or a Hugging Face folder, by what `path` is.

  Raises:
    FileNotFoundError: nothing there, or files are missing.
    ValueError: a damaged file, or one of another kind.
  """
  if path.is_dir():
    return HuggingFaceFolder(path)
  return GGUFFile(path)


def import_model(
  source: Source,
  config: ModelConfig,
  workdir: Path,
  *,
  end_token: str | None = None,
  mesh: str | None = None,
) -> str:
  """Writes a source's model as checkpoint 0 of `workdir`, all of it or nothing.

  Args:
    source: what to import.
    config: how to store and use it.
    workdir: a folder without checkpoints; it is made if need be.
    end_token: in place of the end token that the source names.
    mesh: a description for `parse_mesh`; None for one device.

  Returns:
    A summary of a few words.

  Raises:
    ValueError: `workdir` has a checkpoint, or the source is not what it should be.
    CheckpointError: it could not be written.
  """
  if list_steps(workdir):
    raise ValueError(f"{workdir} has a checkpoint already; name another --workdir.")
  tokenizer = source.tokenizer(end_token)
  if tokenizer.vocab_size > config.vocab_size:
    raise ValueError(
      f"The tokenizer has {tokenizer.vocab_size} tokens; the model's embedding has "
      f"{config.vocab_size} rows, so it must have at most as many."
    )
  placed = None if mesh is None else shardings(config, parse_mesh(mesh))
  params = import_params(source, config, placed)
  with Checkpoints(workdir, keep=1) as checkpoints:
    checkpoints.save(
      0,
      params=params,
      training={"step": jnp.int32(0)},
      data=None,
      config={"model": config.to_dict(), "origin": dict(source.origin())},
      tokenizer=tokenizer,
    )
  return (
    f"{workdir} holds the model: {config.num_layers} layers of width {config.embed_dim}, "
    f"vocabulary {config.vocab_size}, weights in {config.param_dtype}, attention "
    f"{config.attention}."
  )


def import_params(
  source: Source, config: ModelConfig, placed: PyTree[Sharding] | None = None
) -> dict[str, Any]:
  """The decoder's parameters in `config.param_dtype`, as a nested dict.

  Each tensor is read once, and on its way takes its own size in host memory; a stacked parameter
  is filled in place. So the whole model lies nowhere but in its shards.

  Args:
    source: the checkpoint.
    config: of the decoder, as `source.config()` gave it or with other dtypes.
    placed: the sharding of every parameter, in the same nesting; None for the first device.

  Raises:
    ValueError: missing or extra tensors, or a wrong shape, named.
  """
  check_tensors(source, config)
  shapes = nnx.to_pure_dict(abstract_decoder(config)[1])
  specs = tensor_specs(config)
  count = sum(config.num_layers if spec.in_layers else 1 for spec in specs)
  params: dict[str, Any] = {}
  with tqdm(total=count, desc="reading tensors", unit="tensor", disable=None) as progress:
    for spec in specs:
      one_device = SingleDeviceSharding(jax.devices()[0])
      sharding = one_device if placed is None else _at(placed, spec.path)
      shape = _at(shapes, spec.path).shape
      _put(params, spec.path, _read(source, spec, config, shape, sharding, progress))
  return params


def check_tensors(source: Source, config: ModelConfig) -> None:
  """Raises ValueError unless the files hold just the tensors of the decoder, in their shapes."""
  wanted = {
    spec.name(source.naming, layer): spec.stored_shape(config)
    for spec, layer in _all_tensors(config)
  }
  extra = sorted(source.names - wanted.keys())
  missing = sorted(wanted.keys() - source.names)
  if missing:
    close = difflib.get_close_matches(missing[0], extra, n=1)
    hint = f" (there is {close[0]})" if close else ""
    raise ValueError(f"The checkpoint lacks {_list(missing)}{hint}.")
  extra = [name for name in extra if not _is_the_tied_table(source, name, config)]
  if extra:
    raise ValueError(f"The decoder has no place for {_list(extra)} of the checkpoint.")
  for name, shape in wanted.items():
    if source.shape(name) != shape:
      raise ValueError(
        f"The tensor {name} is {list(source.shape(name))}; by the checkpoint's config it must be "
        f"{list(shape)}."
      )


def _all_tensors(config: ModelConfig) -> Iterator[tuple[TensorSpec, int | None]]:
  for spec in tensor_specs(config):
    layers: Any = range(config.num_layers) if spec.in_layers else [None]
    yield from ((spec, layer) for layer in layers)


def _is_the_tied_table(source: Source, name: str, config: ModelConfig) -> bool:
  """Whether a tensor is the unembedding of a model that has none, and the same as its embedding."""
  if not config.tie_embeddings or name != "lm_head.weight":
    return False
  if not np.array_equal(source.read(name), source.read("model.embed_tokens.weight")):
    raise ValueError(
      f"The tensor {name} differs from model.embed_tokens.weight, but the checkpoint's config ties "
      "them (tie_word_embeddings)."
    )
  return True


def _read(
  source: Source,
  spec: TensorSpec,
  config: ModelConfig,
  shape: tuple[int, ...],
  sharding: Sharding,
  progress: tqdm,
) -> Array:
  """One parameter, of all layers."""
  dtype = jnp.dtype(config.param_dtype)

  def tensor(layer: int | None, sharding: Sharding) -> Array:
    stored = source.read(spec.name(source.naming, layer))
    ours = np.ascontiguousarray(spec.from_stored(stored, config).astype(dtype, copy=False))
    progress.update()
    return jax.device_put(ours, sharding)

  if not spec.in_layers:
    return tensor(None, sharding)
  stacked = _zeros(shape, dtype, sharding)
  of_a_layer = _without_first_axis(sharding)
  for layer in range(config.num_layers):
    stacked = _set_layer(stacked, tensor(layer, of_a_layer), jnp.int32(layer))
    # Reading runs ahead of copying otherwise, and tensors would pile up.
    jax.block_until_ready(stacked)
  return stacked


def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding) -> Array:
  make = functools.partial(jnp.zeros, shape, dtype)
  return jax.jit(make, out_shardings=sharding)()


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stacked: Array, tensor: Array, layer: Array) -> Array:
  return jax.lax.dynamic_update_index_in_dim(stacked, tensor, layer, 0)


def _without_first_axis(sharding: Sharding) -> Sharding:
  if isinstance(sharding, NamedSharding):
    return NamedSharding(sharding.mesh, jax.P(*sharding.spec[1:]))
  return sharding


def _at(tree: PyTree, path: tuple[str, ...]) -> Any:
  for key in path:
    tree = tree[key]
  return tree


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Array) -> None:
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = value


def _list(names: list[str]) -> str:
  more = f" and {len(names) - 5} more" if len(names) > 5 else ""
  return f"{'the tensors' if len(names) > 1 else 'the tensor'} {', '.join(names[:5])}{more}"
