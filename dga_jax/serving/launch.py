"""The `serve` command without its flags: loads models and makes their engines."""

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import jax
from flax import nnx
from jax.sharding import Mesh

from dga_jax.choices import AttentionName, CacheDtypeName, DtypeName, WeightName
from dga_jax.generation import Engine, Request
from dga_jax.generation.cache_shapes import CacheShapes, dense_bytes
from dga_jax.generation.compile_jobs import Progress
from dga_jax.generation.weights import compute_weights, fits_weights
from dga_jax.head_budgets import HeadBudgets
from dga_jax.loading import load_with_facts, Loaded
from dga_jax.model.sharded_attention import splits_heads
from dga_jax.serving.served_model import ServedModel
from dga_jax.sharding import make_mesh, MeshConfig

_MAX_LENGTH = 4096  # Where the context of the training is unknown.


@dataclasses.dataclass(frozen=True)
class LaunchSettings:
  """Settings of the engines; see `Engine` for their meaning.

  Attributes:
    slots: requests that run at once.
    max_length: None for the context that the model was trained on.
    max_waiting: requests that may wait.
    prompt_chunk: tokens of a prompt that are read between two decode chunks.
    decode_chunk: tokens that are decoded at once.
    cache_bytes: of all caches on the device; None for as many kept caches as slots.
    host_bytes: of kept caches on the host.
    mesh: devices; None for one.
  """

  slots: int
  max_length: int | None
  max_waiting: int
  prompt_chunk: int
  decode_chunk: int
  cache_bytes: int | None
  host_bytes: int
  mesh: Mesh | None


def load_models(
  workdir: str,
  step: int | None,
  *,
  name: str | None,
  attentions: Sequence[AttentionName | None],
  dtype: DtypeName | None,
  budgets: Mapping[str, HeadBudgets] | None = None,
  weights: WeightName | None = None,
  cache_dtype: CacheDtypeName | None = None,
  settings: LaunchSettings,
  progress: Progress,
) -> list[ServedModel]:
  """The models of a checkpoint, one for each attention kind, or for each of several head budgets.

  Kinds with the same parameters share the weights. Head budgets have an order of heads of their
  own, so a kind shares weights only with kinds of equal budgets.

  Args:
    workdir: the folder with the checkpoint.
    step: of the checkpoint; None for the newest.
    name: of the model; None for the name of the workdir. Of several attention kinds or budgets,
      each adds its own name to it.
    attentions: attention kinds; None for the checkpoint's.
    dtype: of the activations; None for the checkpoint's.
    budgets: the setting of each KV head by name, in place of attention kinds; None for none.
    weights: the dtype of weights in 8 bits; None for weights in `dtype`.
    cache_dtype: of caches in 8 bits, see `dga_jax.load`; None for that of the model or of budgets.
    settings: of the engines.
    progress: shows the compilation.

  Raises:
    CheckpointError: the checkpoint is missing or damaged.
    ValueError: an attention kind is unknown, given twice, reads prompts whole or has no cache in 8
      bits, or the caches do not fit.
  """
  for attention in attentions:
    if attention is not None and attention not in get_args(AttentionName):
      raise ValueError(f"attention is {attention!r}; it must be one of {get_args(AttentionName)}.")
  if len(set(attentions)) < len(attentions):
    raise ValueError(f"attention is {list(attentions)!r}; name each kind once.")
  base = name or Path(workdir).resolve().name
  models: list[ServedModel] = []
  shared: nnx.State | None = None
  arranged: HeadBudgets | None = None  # The budgets whose order the KV heads of `shared` have.
  kinds: list[tuple[str, AttentionName | None, HeadBudgets | None]]
  kinds = [(str(attention), attention, None) for attention in attentions]
  if budgets:  # `load_with_facts` refuses an attention kind beside budgets.
    kinds = [(own, attentions[0], heads) for own, heads in budgets.items()]
  for label, attention, heads in kinds:
    loaded = load_with_facts(
      workdir,
      step=step,
      attention=attention,
      dtype=dtype,
      budgets=heads,
      weights=weights,
      cache_dtype=cache_dtype,
      parts=1 if settings.mesh is None else settings.mesh.shape["tensor"],
    )
    own = loaded.model.config.head_budgets
    if shared is None or arranged != own or not fits_weights(loaded.model, shared):
      shared, arranged = compute_weights(loaded.model, settings.mesh), own
    engine = _make_engine(loaded, shared, settings, progress)
    allocate(engine)
    models.append(
      ServedModel(
        name=base if len(kinds) == 1 else f"{base}-{label}",
        engine=engine,
        tokenizer=loaded.tokenizer,
        template=loaded.tokenizer.chat_template,
        created=int(time.time()),
        trained_length=loaded.trained_length,
      )
    )
  return models


def parse_mesh(text: str | None) -> Mesh | None:
  """The mesh of "tensor=N", over the first N devices; None for None.

  Raises:
    ValueError: the text has another form, or there are fewer devices.
  """
  if text is None:
    return None
  match = re.fullmatch(r"tensor=([1-9][0-9]*)", text)
  if match is None:
    raise ValueError(f"mesh is {text!r}; it must be tensor=N with a number of devices N.")
  count, devices = int(match[1]), jax.devices()
  if count > len(devices):
    raise ValueError(
      f"mesh is {text!r}, but the number of JAX's devices is {len(devices)}; use at most"
      f" tensor={len(devices)}, or leave mesh out for one device."
    )
  return make_mesh(MeshConfig(data=1, tensor=count), devices[:count])


def describe(model: ServedModel, settings: LaunchSettings) -> str:
  """One line: the model, its slots, the bytes of their caches, and what a user may not expect."""
  engine = model.engine
  slot, dense = (
    engine.programs.shapes.row_bytes,
    dense_bytes(engine.config, engine.max_length),
  )
  notes = [] if model.template else ["without a chat template: /v1/completions only"]
  if model.trained_length is not None and engine.max_length > model.trained_length:
    notes.append(f"trained on at most {model.trained_length} tokens, and may not use the rest well")
  parts = 1 if settings.mesh is None else settings.mesh.shape["tensor"]
  if not splits_heads(engine.config.make_attention(), engine.config.num_kv_heads, parts):
    notes.append(f"{parts} devices do not divide the KV heads: each has the whole cache")
  return (
    f"{model.name}: {settings.slots} slots of {engine.max_length} tokens,"
    f" {slot / 1e6:.1f} MB of cache each, dense would be {dense / 1e6:.1f} MB"
    + "".join(f"; {note}" for note in notes)
  )


def allocate(engine: Engine) -> None:
  """Runs a short request, which allocates the slots before the port opens.

  Args:
    engine: that has not started.

  Raises:
    ValueError: the device has too little memory.
  """
  engine.submit(Request([0], min(2, engine.max_length - 1), keep_at=[]))
  try:
    while engine.busy:
      engine.step()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise ValueError(
      f"slots is {engine.slots} and max_length is {engine.max_length}, and the device has too"
      " little memory for these slots beside the weights; lower one of them, or split the model"
      f" over several devices with mesh. {str(error).splitlines()[0]}"
    ) from error


def _make_engine(
  loaded: Loaded, weights: nnx.State, settings: LaunchSettings, progress: Progress
) -> Engine:
  max_length = settings.max_length or loaded.trained_length or _MAX_LENGTH
  cache_bytes = settings.cache_bytes
  if cache_bytes is None:
    cache_bytes = CacheShapes(loaded.model, max_length).row_bytes * 2 * (settings.slots + 1)
  return Engine(
    loaded.model,
    slots=settings.slots,
    max_length=max_length,
    prompt_chunk=settings.prompt_chunk,
    decode_chunk=settings.decode_chunk,
    cache_bytes=cache_bytes,
    host_bytes=settings.host_bytes,
    max_waiting=settings.max_waiting,
    logprobs=True,
    weights=weights,
    mesh=settings.mesh,
    progress=progress,
  )
