"""Fits the selector: which tokens later outputs need, as a linear function of key and value.

The target of a token is the logarithm of a·‖v‖: a is the mean attention that queries beyond the raw
window pay to it under dense attention, v is its value. So it is the size of what the token adds to
their outputs. Each KV head has weights of its own, for the features of
`dga_jax.model.focal_selector`. They minimise the cross entropy of `selector_loss`, from a start by
ridge regression. The choice compares tokens of one block, so the regression centres features and
targets in each block.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import nnx
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from dga_jax.attention.streaming_blocks import cache_layout
from dga_jax.calibration.program import embed
from dga_jax.calibration.selector_loss import minimise_cross_entropy
from dga_jax.config import DGAConfig
from dga_jax.model import Decoder
from dga_jax.model.focal_selector import features
from dga_jax.model.rope import apply_rope, rope_table, RopeTable
from pallas_kernels.products import einsum_float32

RIDGE = 1e-3  # Added to the diagonal, as a share of its mean.
_CHUNK = 128  # Queries whose attention to all keys is in memory at a time.


class FitBlocks(NamedTuple):
  """The blocks of a row that some query sees by their compact entries alone.

  Attributes:
    start: position of the first block's first token.
    blocks: how many.
    size: tokens of a block.
    reach: tokens from the beginning of a block to the first query beyond its raw window.
  """

  start: int
  blocks: int
  size: int
  reach: int

  @classmethod
  def of_row(cls, length: int, config: DGAConfig) -> Self:
    """The blocks of a row of `length` tokens.

    Raises:
      ValueError: the selection is not streaming, or there are no such blocks.
    """
    if config.selection != "streaming":
      raise ValueError(
        f"DGAConfig.selection is {config.selection!r}; a selector chooses in blocks, so it must be "
        "'streaming'."
      )
    layout = cache_layout(config)
    start, size, reach = config.sink_tokens, layout.block_size, layout.raw_size
    count = -(-(length - start - reach) // size)
    if count < 1:
      raise ValueError(
        f"rows have {length} tokens; with {start} sinks, blocks of {size} tokens and "
        f"{config.local_window} raw blocks before a query's own, they must have more than "
        f"{start + reach}. Use longer rows, or a smaller local_window."
      )
    return cls(start, count, size, reach)


def fit_selector(
  model: Decoder, config: DGAConfig, rows: Int[np.ndarray, "rows L"], *, ridge: float = RIDGE
) -> Float[np.ndarray, "K N S"]:
  """The weights of the selector of every KV head.

  Runs dense attention over the rows, layer by layer. Memory beyond the model: attention of 128
  queries, and for each token of the rows the input of a layer, E numbers, and up to three copies of
  the features of a layer, float32, N·S numbers with S = 2·D + 2.

  Args:
    model: the decoder, whose layers are stacked; its own attention kind is not used.
    config: blocks, sinks and raw window under which the selector will be used.
    rows: token ids; each row is a document.
    ridge: of the start; added to the diagonal of the normal equations, as a share of its mean.

  Returns:
    float32, for `selector_weights.with_selector`.

  Raises:
    ValueError: the selection is not streaming, or rows are too short.
    FloatingPointError: a target is NaN or infinite.
  """
  blocks = FitBlocks.of_row(rows.shape[1], config)
  by_layer = zip(*(layer_samples(model, blocks, row) for row in rows), strict=True)
  layers = tqdm(
    by_layer, total=model.config.num_layers, desc="selector", unit="layer", disable=None
  )
  return np.stack([fit_layer(samples, blocks, ridge) for samples in layers])


def fit_layer(
  samples: Sequence["LayerSamples"], blocks: FitBlocks, ridge: float
) -> Float[np.ndarray, "N S"]:
  """The weights of one layer, from its samples of all rows; see `fit_selector`."""
  N, S = samples[0].features.shape[1:]
  start_NxS = ridge_weights(samples, blocks, ridge)
  features = jnp.concatenate([one.features for one in samples])
  target = jnp.concatenate([one.target for one in samples])
  features_NxgxsxS = features.reshape(-1, blocks.size, N, S).transpose(2, 0, 1, 3)
  target_Nxgxs = target.reshape(-1, blocks.size, N).transpose(2, 0, 1)
  return np.asarray(minimise_cross_entropy(start_NxS, features_NxgxsxS, target_Nxgxs))


def ridge_weights(
  samples: Sequence["LayerSamples"], blocks: FitBlocks, ridge: float
) -> Float[Array, "N S"]:
  """The weights of one layer by ridge regression of the centred targets, float32."""
  N, S = samples[0].features.shape[1:]
  gram_NxSxS, moment_NxS = np.zeros((N, S, S)), np.zeros((N, S))
  for one in samples:
    x_NxTxS, y_NxT = one.centred(blocks)
    gram_NxSxS += x_NxTxS.swapaxes(1, 2) @ x_NxTxS
    moment_NxS += (x_NxTxS.swapaxes(1, 2) @ y_NxT[..., None])[..., 0]
  weights = [solve_ridge(*each, ridge) for each in zip(gram_NxSxS, moment_NxS, strict=True)]
  return jnp.asarray(np.stack(weights), jnp.float32)


def solve_ridge(
  gram: Float[np.ndarray, "S S"], moment: Float[np.ndarray, "S"], ridge: float
) -> Float[np.ndarray, "S"]:
  """The solution w of (G + ridge · mean(diag G) · I) w = moment; zeros for a zero matrix."""
  diagonal = np.mean(np.diag(gram))
  if diagonal == 0:
    return np.zeros_like(moment)
  solution: Any = scipy.linalg.solve(
    gram + ridge * diagonal * np.eye(len(gram)), moment, assume_a="pos"
  )
  return np.asarray(solution)


class LayerSamples(NamedTuple):
  """Of one row and layer.

  Attributes:
    features: of the tokens of the fit's blocks.
    target: the logarithm of the mean attention of queries beyond the raw window, times the norm of
      the value.
  """

  features: Float[Array, "T N S"]
  target: Float[Array, "T N"]

  def centred(
    self, blocks: FitBlocks
  ) -> tuple[Float[np.ndarray, "N T S"], Float[np.ndarray, "N T"]]:
    """Features and targets without the mean of their block, float64.

    Raises:
      FloatingPointError: a target is NaN or infinite.
    """

    def centre(x: Array) -> np.ndarray:
      wide = np.asarray(x, np.float64)
      if not np.isfinite(wide).all():
        raise FloatingPointError(
          "a feature, or the logarithm of attention times the norm of a value, is NaN or infinite; "
          "the selector cannot be fitted to this model with these rows."
        )
      by_block = wide.reshape(blocks.blocks, blocks.size, *wide.shape[1:])
      return (by_block - by_block.mean(axis=1, keepdims=True)).reshape(wide.shape)

    return centre(self.features).swapaxes(0, 1), centre(self.target).T


def layer_samples(
  model: Decoder, blocks: FitBlocks, row: Int[np.ndarray, "L"]
) -> Iterator[LayerSamples]:
  """Yields the `LayerSamples` of each layer under dense attention.

  Args:
    model: with stacked layers.
    blocks: of the row.
    row: token ids of one document.
  """
  graphdef, params = nnx.split(model)
  x_1xLxE = embed(graphdef, params, jnp.asarray(row)[None])
  for layer in range(model.config.num_layers):
    x_1xLxE, samples = _run_layer(graphdef, blocks, params, x_1xLxE, jnp.int32(layer))
    yield samples


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_layer(
  graphdef: nnx.GraphDef, blocks: FitBlocks, params: Any, x_1xLxE: Array, layer: Array
) -> tuple[Array, LayerSamples]:
  model = nnx.merge(graphdef, params)
  structure, stacked = nnx.split(model.layers)
  one = nnx.merge(structure, jax.tree.map(lambda array: array[layer], stacked))
  L = x_1xLxE.shape[1]
  rope = rope_table(jnp.arange(L)[None], model.config.rope_frequencies())
  inverse = RopeTable(rope.cos, -rope.sin)
  tokens = slice(blocks.start, blocks.start + blocks.blocks * blocks.size)

  def attend(q: Array, k: Array, v: Array, *_: Array) -> tuple[Array, LayerSamples]:
    out_1xLxHxD, rated_1xLxN = attend_and_rate(q, k, v, beyond_window(L, blocks))
    inputs_1xLxNxS = features(apply_rope(k.astype(jnp.float32), inverse), v)
    size_1xLxN = inputs_1xLxNxS[..., -1]  # ‖v‖, 0 for values of 0.
    target_1xLxN = rated_1xLxN + jnp.log(jnp.maximum(size_1xLxN, jnp.finfo(jnp.float32).tiny))
    return out_1xLxHxD, LayerSamples(inputs_1xLxNxS[0, tokens], target_1xLxN[0, tokens])

  return one(x_1xLxE, rope, attend)


def beyond_window(length: int, blocks: FitBlocks) -> Int[np.ndarray, "L"]:
  """For each token the first query that does not see it raw, at least 0 and at most `length`."""
  block_L = (np.arange(length) - blocks.start) // blocks.size
  return np.clip(blocks.start + block_L * blocks.size + blocks.reach, 0, length).astype(np.int32)


def attend_and_rate(
  q_BxLxHxD: Float[Array, "B L H D"],
  k_BxLxNxD: Float[Array, "B L N D"],
  v_BxLxNxD: Float[Array, "B L N D"],
  first_query_L: Int[Array | np.ndarray, "L"],
) -> tuple[Float[Array, "B L H D"], Float[Array, "B L N"]]:
  """Causal dense attention, and the logarithm of the mean attention that later queries pay.

  The mean of token j is over the queries i ≥ first_query_j and the query heads of a KV head. It is
  summed in the logarithm, since attention weights may be smaller than float32 can hold.

  Args:
    q_BxLxHxD: queries; float32 softmax for any dtype.
    k_BxLxNxD: keys.
    v_BxLxNxD: values.
    first_query_L: for each token, a position after it; L for no query.

  Returns:
    The output in the query's dtype, and float32 numbers, −∞ for tokens without a query.
  """
  B, L, H, D = q_BxLxHxD.shape
  N, chunks = k_BxLxNxD.shape[2], -(-L // _CHUNK)
  padding = ((0, 0), (0, chunks * _CHUNK - L), (0, 0), (0, 0))
  q_chunks = jnp.pad(q_BxLxHxD, padding).reshape(B, chunks, _CHUNK, N, H // N, D).swapaxes(0, 1)
  position_L, first_L = jnp.arange(L), jnp.asarray(first_query_L)

  def step(rated_BxNxL: Array, chunk: tuple[Array, Array]) -> tuple[Array, Array]:
    q_BxCxNxRxD, start = chunk
    i_C = start + jnp.arange(_CHUNK)
    logits_BxNxRxCxL = einsum_float32("bcnrd,blnd->bnrcl", q_BxCxNxRxD, k_BxLxNxD)
    causal_CxL = i_C[:, None] >= position_L[None]
    logits_BxNxRxCxL = jnp.where(causal_CxL[None, None, None], logits_BxNxRxCxL * D**-0.5, -jnp.inf)
    weights_log = jax.nn.log_softmax(logits_BxNxRxCxL, axis=-1)
    counts_CxL = (i_C[:, None] >= first_L[None]) & (i_C < L)[:, None]
    counted = jnp.where(counts_CxL[None, None, None], weights_log, -jnp.inf)
    rated_BxNxL = jnp.logaddexp(rated_BxNxL, jax.nn.logsumexp(counted, axis=(2, 3)))
    out_BxCxNxRxD = jnp.einsum(
      "bnrcl,blnd->bcnrd", jnp.exp(weights_log).astype(v_BxLxNxD.dtype), v_BxLxNxD
    )
    return rated_BxNxL, out_BxCxNxRxD

  none_BxNxL = jnp.full((B, N, L), -jnp.inf, jnp.float32)
  starts = jnp.arange(chunks) * _CHUNK
  rated_BxNxL, out = jax.lax.scan(step, none_BxNxL, (q_chunks, starts))
  out_BxLxHxD = out.swapaxes(0, 1).reshape(B, -1, H, D)[:, :L]
  count_L = jnp.maximum(L - first_L, 1) * (H // N)
  mean_BxNxL = rated_BxNxL - jnp.log(count_L.astype(jnp.float32))[None, None]
  return out_BxLxHxD.astype(q_BxLxHxD.dtype), mean_BxNxL.swapaxes(1, 2)
