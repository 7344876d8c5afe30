"""A `Source` to a checkpoint of this project: one tensor at a time, into any sharding."""

import difflib
import functools
from collections.abc import Collection, Iterator
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
from dga_jax.conversion.casting import cast, CastReport
from dga_jax.conversion.checkpoint_reader import NO_CHOICES, Source, TokenizerChoices
from dga_jax.conversion.errors import ConversionError
from dga_jax.conversion.gguf_file import GGUFFile
from dga_jax.conversion.hugging_face import HuggingFaceFolder
from dga_jax.conversion.param_map import tensor_specs, TensorSpec
from dga_jax.conversion.sharding import parse_mesh, shardings
from dga_jax.files.lock import hold_workdir
from dga_jax.hub_names import check_exists
from dga_jax.model import ModelConfig
from dga_jax.tokenizer import Tokenizer


def open_source(path: Path, ignored_keys: Collection[str] = ()) -> Source:
  """A Hugging Face folder if `path` is a folder, else a GGUF file.

  Args:
    path: the folder or file.
    ignored_keys: unknown keys of config.json or of GGUF metadata that change nothing.

  Raises:
    FileNotFoundError: there is nothing at `path`, or files are missing.
    ConversionError: a damaged file, or one of another kind.
  """
  check_exists(path, "Hugging Face folder or GGUF file")
  if path.is_dir():
    return HuggingFaceFolder(path, ignored_keys)
  return GGUFFile(path, ignored_keys)


def import_model(
  source: Source,
  config: ModelConfig,
  workdir: Path,
  *,
  choices: TokenizerChoices = NO_CHOICES,
  mesh: str | None = None,
) -> str:
  """Writes a source's model as checkpoint 0 of `workdir`, all of it or nothing.

  Args:
    source: what to import.
    config: how to store and use it.
    workdir: a folder without checkpoints; it is made if need be.
    choices: about the tokenizer, in place of what the source's files say.
    mesh: a description for `parse_mesh`; None for one device.

  Returns:
    A summary of a few sentences.

  Raises:
    ConversionError: the source cannot be imported.
    ValueError: `workdir` has a checkpoint, or `mesh` makes no sense.
    CheckpointError: the checkpoint could not be written.
  """
  if list_steps(workdir):
    raise ValueError(f"{workdir} has a checkpoint already; name another --workdir.")
  tokenizer = source.tokenizer(choices)
  check_vocabulary(source, config, tokenizer)
  origin = dict(source.origin())
  report = CastReport()
  placed = None if mesh is None else shardings(config, parse_mesh(mesh))
  params = import_params(source, config, placed, report)
  with hold_workdir(workdir), Checkpoints(workdir, keep=1) as checkpoints:
    checkpoints.save(
      0,
      params=params,
      training={"step": jnp.int32(0)},
      data=None,
      config={"model": config.to_dict(), "origin": origin},
      tokenizer=tokenizer,
    )
  return (
    f"{workdir} holds the model: {config.num_layers} layers of width {config.embed_dim}, "
    f"vocabulary {config.vocab_size}, weights in {config.param_dtype}, attention "
    f"{config.attention}.{report.summary(config.param_dtype)}"
  )


def check_vocabulary(source: Source, config: ModelConfig, tokenizer: Tokenizer) -> None:
  """Raises ConversionError if the embedding lacks a row for a token."""
  if tokenizer.vocab_size > config.vocab_size:
    raise ConversionError(
      f"{source.where}: the tokenizer has {tokenizer.vocab_size} tokens, and the model's embedding "
      f"has {config.vocab_size} rows; each token must have a row."
    )


def import_params(
  source: Source,
  config: ModelConfig,
  placed: PyTree[Sharding] | None = None,
  report: CastReport | None = None,
) -> dict[str, Any]:
  """The decoder's parameters in `config.param_dtype`, as a nested dict.

  Each tensor is read once and takes its own size in host memory; a stacked parameter is filled in
  place. So only the shards hold the whole model.

  Args:
    source: the checkpoint.
    config: of the decoder, as `source.config()` gave it or with other dtypes.
    placed: the sharding of every parameter, in the same nesting; None for the first device.
    report: counts the numbers that a cast makes 0.

  Raises:
    ConversionError: missing or extra tensors, a wrong shape, a number that is not finite or that
      `config.param_dtype` or `config.dtype` cannot hold; the message names the tensor.
  """
  check_tensors(source, config)
  report = CastReport() if report is None else report
  shapes = nnx.to_pure_dict(abstract_decoder(config)[1])
  specs = tensor_specs(config)
  count = sum(config.num_layers if spec.in_layers else 1 for spec in specs)
  params: dict[str, Any] = {}
  with tqdm(total=count, desc="reading tensors", unit="tensor", disable=None) as progress:
    for spec in specs:
      one_device = SingleDeviceSharding(jax.devices()[0])
      sharding = one_device if placed is None else _at(placed, spec.path)
      shape = _at(shapes, spec.path).shape
      _put(params, spec.path, _read(source, spec, config, shape, sharding, progress, report))
  return params


def check_tensors(source: Source, config: ModelConfig) -> None:
  """Raises ConversionError unless the files hold just the decoder's tensors, in their shapes."""
  if config.num_layers > len(source.names):
    raise ConversionError(
      f"{source.where} has {len(source.names)} tensors, too few for {config.num_layers} layers."
    )
  wanted = {
    spec.name(source.naming, layer): spec.stored_shape(config)
    for spec, layer in _all_tensors(config)
  }
  extra = sorted(source.names - wanted.keys())
  missing = sorted(wanted.keys() - source.names)
  if missing:
    similar = [name for name in extra[:1000] if len(name) < 200]
    close = difflib.get_close_matches(missing[0], similar, n=1)
    hint = f" (there is {close[0]})" if close else ""
    raise ConversionError(f"{source.where} lacks {_list(missing)}{hint}.")
  extra = [name for name in extra if not _is_the_tied_table(source, name, config)]
  if extra:
    raise ConversionError(f"{source.where}: the decoder has no parameter for {_list(extra)}.")
  for name, shape in wanted.items():
    if source.shape(name) != shape:
      raise ConversionError(
        f"{source.where}: the tensor {name} is {list(source.shape(name))}; by the model's config "
        f"it must be {list(shape)}."
      )


def _all_tensors(config: ModelConfig) -> Iterator[tuple[TensorSpec, int | None]]:
  for spec in tensor_specs(config):
    layers: Any = range(config.num_layers) if spec.in_layers else [None]
    yield from ((spec, layer) for layer in layers)


def _is_the_tied_table(source: Source, name: str, config: ModelConfig) -> bool:
  """Whether a tensor is an unembedding that equals the embedding of a model that ties them."""
  table = "model.embed_tokens.weight"
  if not config.tie_embeddings or name != "lm_head.weight":
    return False
  if source.shape(name) != source.shape(table) or not np.array_equal(
    source.read(name), source.read(table)
  ):
    raise ConversionError(
      f"{source.where}: the tensor {name} differs from {table}, but config.json ties them "
      "(tie_word_embeddings)."
    )
  return True


def _read(
  source: Source,
  spec: TensorSpec,
  config: ModelConfig,
  shape: tuple[int, ...],
  sharding: Sharding,
  progress: tqdm,
  report: CastReport,
) -> Array:
  """One parameter, of all layers."""
  dtype = jnp.dtype(config.param_dtype)

  def tensor(layer: int | None, sharding: Sharding) -> Array:
    name = spec.name(source.naming, layer)
    ours = cast(
      spec.from_stored(source.read(name), config),
      config.param_dtype,
      config.dtype,
      what=f"{source.where}: the tensor {name}",
      report=report,
    )
    progress.update()
    return jax.device_put(ours, sharding)

  if not spec.in_layers:
    return tensor(None, sharding)
  stacked = _zeros(shape, dtype, sharding)
  of_a_layer = _without_first_axis(sharding)
  for layer in range(config.num_layers):
    stacked = _set_layer(stacked, tensor(layer, of_a_layer), jnp.int32(layer))
    # Without this wait, reading runs ahead of copying, and tensors pile up in host memory.
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
  first = ", ".join(name[:200] for name in names[:5])
  return f"{'the tensors' if len(names) > 1 else 'the tensor'} {first}{more}"
