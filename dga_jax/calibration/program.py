"""The program that calibration runs: a decoder whose KV heads follow candidates.

The assignment of candidates to KV heads is an argument of the program, and so are the number of
sinks and the window of every candidate. Forms are static: one for full heads and all sliding
windows, and one for each block size of Dynamic Group Attention. So one compiled program serves
every assignment, and a new window compiles nothing.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dga_jax.attention.attend import attention_kwargs, merge_tokens
from dga_jax.attention.metadata import AttentionMetadata, prepare, StreamingMetadata
from dga_jax.attention.segments import find_documents
from dga_jax.attention.visibility import Visibility
from dga_jax.calibration.rows import Batch
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import HeadSetting, SinkWindow
from dga_jax.model import Decoder
from dga_jax.model.rope import rope_table
from pallas_kernels.group_merge import Entries
from pallas_kernels.grouped_attention import grouped_attention

_CHUNK = 256  # Targets of a row whose logits are computed at a time.
_ALL = 2**30  # A window that holds every earlier token.

# A form of attention, which is static: None for sinks and a sliding window, of which a full head is
# a case, or a `DGAConfig` without raw blocks.
type _Form = DGAConfig | None


class Measured(NamedTuple):
  """Of each row of a batch.

  Attributes:
    loss: mean cross entropy of the targets in nats, float32.
    divergence: mean over the targets of the Kullback-Leibler divergence of the prediction from
      dense attention's, in nats, float32. It is 0 for dense attention itself. Its noise is far
      below that of differences of losses.
    is_right: whether each target is the most likely token. Greedy decoding generates an answer
      whose tokens all are.
  """

  loss: Float[Array, "B"]
  divergence: Float[Array, "B"]
  is_right: Bool[Array, "B S"]


class _HeadSettings(NamedTuple):
  """Of each layer and KV head.

  Attributes:
    form: an index into the forms.
    sinks: first tokens that stay visible; of the form None.
    window: tokens of a sliding window, or raw blocks.
  """

  form: Int[Array, "K N"]
  sinks: Int[Array, "K N"]
  window: Int[Array, "K N"]


class AssignedDecoder:
  """A decoder whose KV heads follow the candidates that an assignment names.

  Args:
    model: its parameters are used; its own attention kind is not.
    candidates: the settings to choose from.
    later: settings that another decoder of this model will have; both then share their programs.

  Attributes:
    config: of the model.
    candidates: what an assignment counts.
  """

  def __init__(
    self, model: Decoder, candidates: Sequence[HeadSetting], later: Sequence[HeadSetting] = ()
  ) -> None:
    self.config, self.candidates = model.config, tuple(candidates)
    self._graphdef, self._params = nnx.split(model)
    forms = tuple(map(_form, candidates))
    blocks = {*forms, *map(_form, later)} - {None}
    self._forms = (None, *sorted(blocks, key=repr))
    self._most_sinks = max(map(_sinks, (*candidates, *later)))
    sinks = map(_sinks, candidates)
    # Of each candidate: form, sinks, window.
    self._settings_Cx3 = np.array(
      list(zip(map(self._forms.index, forms), sinks, map(_window, candidates), strict=True)),
      np.int32,
    )

  def compile(self, shapes: Iterable[tuple[int, int]]) -> None:
    """Compiles the layers for batches of these shapes, rows and tokens, all at the same time."""

    def run_no_layer(shape: tuple[int, int]) -> None:
      assignment = np.zeros((self.config.num_layers, self.config.num_kv_heads), int)
      self.run_layers(self.embed(np.zeros(shape, np.int32)), assignment, 0, 0)

    with concurrent.futures.ThreadPoolExecutor() as pool:
      for done in [pool.submit(run_no_layer, shape) for shape in dict.fromkeys(shapes)]:
        done.result()

  def embed(self, tokens_BxL: Int[Array | np.ndarray, "B L"]) -> Float[Array, "B L E"]:
    """The input of layer 0."""
    return embed(self._graphdef, self._params, jnp.asarray(tokens_BxL))

  def run_layers(
    self,
    x_BxLxE: Float[Array, "B L E"],
    assignment: Int[np.ndarray, "K N"],
    first: int,
    last: int,
  ) -> Float[Array, "B L E"]:
    """Runs the layers first … last − 1.

    A form that no head of a layer follows is not computed in this layer.

    Args:
      x_BxLxE: the input of layer `first`; rows are whole documents of L tokens.
      assignment: the candidate of each of N KV heads in each of K layers, an index.
      first: the first layer.
      last: the layer whose input is returned; K for the output of the last layer.
    """
    return _run_layers(
      self._graphdef,
      self._forms,
      self._most_sinks,
      self._params,
      x_BxLxE,
      _HeadSettings(*jnp.moveaxis(jnp.asarray(self._settings_Cx3[assignment]), -1, 0)),
      jnp.int32(first),
      jnp.int32(last),
    )

  def target_states(self, x_BxLxE: Float[Array, "B L E"], batch: Batch) -> Float[Array, "B S E"]:
    """The normalized output of the last layer at the positions that predict the targets."""
    return _target_states(self._graphdef, self._params, x_BxLxE, jnp.asarray(batch.position))

  def measure(
    self,
    states_BxSxE: Float[Array, "B S E"],
    dense_BxSxE: Float[Array, "B S E"],
    batch: Batch,
  ) -> Measured:
    """The losses of a batch's targets, and their divergence from dense attention.

    Args:
      states_BxSxE: from `target_states`.
      dense_BxSxE: likewise, of dense attention.
      batch: the rows.
    """
    target, weight = jnp.asarray(batch.target), jnp.asarray(batch.weight)
    return Measured(
      *_measure(self._graphdef, self._params, states_BxSxE, dense_BxSxE, target, weight)
    )


def _form(setting: HeadSetting) -> _Form:
  return dataclasses.replace(setting, local_window=0) if isinstance(setting, DGAConfig) else None


def _sinks(setting: HeadSetting) -> int:
  return setting.sinks if isinstance(setting, SinkWindow) else 0


def _window(setting: HeadSetting) -> int:
  if isinstance(setting, DGAConfig):
    return setting.local_window
  return setting.window if isinstance(setting, SinkWindow) else _ALL


@functools.partial(jax.jit, static_argnums=0)
def embed(graphdef: nnx.GraphDef, params: Any, tokens_BxL: Array) -> Array:
  """The input of the first layer, [B, L, E] in the model's dtype."""
  model = nnx.merge(graphdef, params)
  return model.embedding[...][tokens_BxL].astype(model.config.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run_layers(
  graphdef: nnx.GraphDef,
  forms: tuple[_Form, ...],
  most_sinks: int,
  params: Any,
  x_BxLxE: Array,
  settings: _HeadSettings,
  first: Array,
  last: Array,
) -> Array:
  model = nnx.merge(graphdef, params)
  config, (B, L) = model.config, x_BxLxE.shape[:2]
  documents = find_documents(B, L, None, None)
  metadata = [None if form is None else prepare(documents, form) for form in forms]
  rope = rope_table(documents.position, config.rope_frequencies())
  structure, stacked = nnx.split(model.layers)

  def attend(own: _HeadSettings, q: Array, k: Array, v: Array, scores: Array | None) -> Array:
    form_H = jnp.repeat(own.form, config.num_heads // config.num_kv_heads)
    out_BxLxHxD = jnp.zeros_like(q)
    for index, rows in enumerate(metadata):
      if rows is None:
        function = functools.partial(_attend_windows, own=own, most_sinks=most_sinks)
      else:
        function = functools.partial(_attend_blocks, own=own, rows=rows, scores=scores)
      follows_H = form_H == index
      own_BxLxHxD = jax.lax.cond(
        follows_H.any(), function, lambda q, k, v: jnp.zeros_like(q), q, k, v
      )
      out_BxLxHxD = jnp.where(follows_H[None, None, :, None], own_BxLxHxD, out_BxLxHxD)
    return out_BxLxHxD

  def run_layer(layer: Array, x_BxLxE: Array) -> Array:
    one = nnx.merge(structure, jax.tree.map(lambda array: array[layer], stacked))
    own = _HeadSettings(*(values[layer] for values in settings))

    def attend_layer(q: Array, k: Array, v: Array, scores: Array | None = None) -> Any:
      return attend(own, q, k, v, scores), None

    return one(x_BxLxE, rope, attend_layer)[0]

  return jax.lax.fori_loop(first, last, run_layer, x_BxLxE)


def _attend_windows(q: Array, k: Array, v: Array, *, own: _HeadSettings, most_sinks: int) -> Array:
  """Sinks and a sliding window of each KV head; see `SinkWindow`."""
  (B, L, _, D), N = q.shape, k.shape[2]
  i_1x1xL = jnp.arange(L, dtype=jnp.int32)[None, None]
  sinks_1xNx1, window_1xNx1 = own.sinks[None, :, None], own.window[None, :, None]
  no_key = jnp.zeros((1, N, L), jnp.int32)
  first = jnp.maximum(i_1x1xL + 1 - window_1xNx1, sinks_1xNx1)
  ranges = Visibility(
    focal_start=no_key,
    focal_end=jnp.minimum(i_1x1xL + 1, sinks_1xNx1),
    group_start=no_key,
    group_end=no_key,
    window_start=jnp.where(i_1x1xL < sinks_1xNx1, i_1x1xL + 1, first),
    window_end=i_1x1xL + 1,
  )
  visibility = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, N, L)), ranges)
  entries = Entries(k[:, :most_sinks], v[:, :most_sinks], k[:, :0], v[:, :0], k, v)
  return grouped_attention(q, visibility.sources(entries), scale=D**-0.5, max_window=L)


def _attend_blocks(
  q: Array,
  k: Array,
  v: Array,
  *,
  own: _HeadSettings,
  rows: AttentionMetadata,
  scores: Array | None,
) -> Array:
  """Dynamic Group Attention with the raw blocks of each KV head."""
  assert isinstance(rows.by_selection, StreamingMetadata)
  assert rows.by_selection.visibility is not None  # Causal streaming selection has it.
  config, (L, N) = rows.config, k.shape[1:3]
  fitted = config.selector == "fitted"
  merged = merge_tokens(q, k, v, rows, focal_scores=scores if fitted else None)
  visibility = with_raw_blocks(rows.by_selection.visibility, config, own.window, N)
  merged_sources = [
    source._replace(start=start, end=end)
    for source, (start, end) in zip(merged.sources, visibility.ranges, strict=True)
  ]
  return grouped_attention(
    merged.query,
    type(merged.sources)(*merged_sources),
    **attention_kwargs(merged.query, config, None) | {"max_window": L},
  )


def with_raw_blocks(
  visibility: Visibility, config: DGAConfig, blocks_N: Int[Array, "N"], kv_heads: int
) -> Visibility:
  """The visibility of streaming selection with raw blocks, a number of them for each KV head.

  Args:
    visibility: of `config`, which has none: `local_window` is 0. All heads see the same.
    config: block size and focal tokens.
    blocks_N: raw blocks before a query's own.
    kv_heads: N.
  """
  seen_BxnxL = visibility.group_end - visibility.group_start
  raw_BxNxL = jnp.minimum(seen_BxnxL, blocks_N[None, :, None])
  changed = visibility._replace(
    focal_end=visibility.focal_end - config.focal_in_block * raw_BxNxL,
    group_end=visibility.group_end - raw_BxNxL,
    window_start=visibility.window_start - config.block_size * raw_BxNxL,
  )
  B, _, L = seen_BxnxL.shape
  return jax.tree.map(lambda x: jnp.broadcast_to(x, (B, kv_heads, L)), changed)


@functools.partial(jax.jit, static_argnums=0)
def _target_states(
  graphdef: nnx.GraphDef, params: Any, x_BxLxE: Array, position_BxS: Array
) -> Array:
  model = nnx.merge(graphdef, params)
  x_BxSxE = jnp.take_along_axis(x_BxLxE, position_BxS[..., None], axis=1)
  return model.norm(x_BxSxE).astype(model.config.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _measure(
  graphdef: nnx.GraphDef,
  params: Any,
  states_BxSxE: Array,
  dense_BxSxE: Array,
  target_BxS: Array,
  weight_BxS: Array,
) -> tuple[Array, Array, Array]:
  model = nnx.merge(graphdef, params)

  def score(one: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    own_BxV, dense_BxV = (jax.nn.log_softmax(model.unembed(x), axis=-1) for x in one[:2])
    nats_B = -jnp.take_along_axis(own_BxV, one[2][:, None], axis=-1)[:, 0]
    divergence_B = (jnp.exp(dense_BxV) * (dense_BxV - own_BxV)).sum(axis=-1)
    return nats_B, divergence_B, jnp.argmax(own_BxV, axis=-1) == one[2]

  targets = (states_BxSxE.swapaxes(0, 1), dense_BxSxE.swapaxes(0, 1), target_BxS.T)
  nats_SxB, divergence_SxB, is_right_SxB = jax.lax.map(score, targets, batch_size=_CHUNK)
  loss_B, divergence_B = ((x.T * weight_BxS).sum(axis=1) for x in (nats_SxB, divergence_SxB))
  return loss_B, divergence_B, is_right_SxB.T
