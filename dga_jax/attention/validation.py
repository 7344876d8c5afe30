"""Checks of arguments while tracing. A message names the argument, its value and valid values."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dga_jax.attention.segments import IntArray, is_traced
from dga_jax.attention.streaming_blocks import StreamingBlocks
from dga_jax.config import DGAConfig
from dga_jax.head_budgets import HeadBudgets
from pallas_kernels import dispatch

# Arguments of public functions. `rows` converts lists to arrays.
Lengths = Int[IntArray, "B"] | Sequence[int]
SegmentIds = Int[IntArray, "B L"] | Sequence[Sequence[int]]
SequenceIds = Int[IntArray, "L"] | Sequence[int]  # Segment ids of arrays without a batch axis.


def query_and_key(query: Array | jax.ShapeDtypeStruct, key: Array | jax.ShapeDtypeStruct) -> None:
  """Shapes [B, L, H, D] and [B, L, N, D] with N dividing H, and one float dtype."""
  for name, x in (("query", query), ("key", key)):
    if not hasattr(x, "shape") or x.ndim != 4:
      raise ValueError(
        f"{name} has shape {np.shape(x)}; it must be [batch, length, heads, head_dim]."
      )
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{name} has dtype {x.dtype}; it must be floating point.")
  B, L, H, D = query.shape
  if min(query.shape) == 0 or key.shape[2] == 0:
    raise ValueError(f"query {query.shape} and key {key.shape} must have no empty dimension.")
  if (key.shape[0], key.shape[1], key.shape[3]) != (B, L, D):
    hint = ""
    if key.shape[1] != L and key.shape[2] == H:
      hint = (
        " The axes are [batch, length, heads, head_dim]: of arrays [batch, heads, length, head_dim]"
        " pass jnp.swapaxes(x, 1, 2)."
      )
    elif key.shape[1] != L:
      hint = " Cross-attention, with keys of other tokens, is not supported."
    raise ValueError(
      f"key has shape {key.shape}; beside query {query.shape} it must be [{B}, {L}, KV heads, {D}]."
      f"{hint}"
    )
  if H % key.shape[2]:
    raise ValueError(
      f"query has {H} heads and key {key.shape[2]}; KV heads must divide query heads."
    )
  if query.dtype != key.dtype:
    raise ValueError(f"key is {key.dtype} and query {query.dtype}; cast them to one dtype.")


def config_type(config: object, kinds: tuple[type, ...] = (DGAConfig,)) -> None:
  """The config is an object of one of these classes.

  Args:
    config: of the call.
    kinds: the classes that the function takes.
  """
  if not isinstance(config, kinds):
    got = f"the class {config.__name__}" if isinstance(config, type) else repr(config)
    raise ValueError(
      f"config is {got:.80}; it must be a {' or '.join(kind.__name__ for kind in kinds)}, for"
      " example dga_jax.DGAConfig(group_size=16)."
    )


def value_like_key(value: Array, key: Array) -> None:
  """The value has the key's shape and dtype."""
  if np.shape(value) != key.shape:
    raise ValueError(f"value has shape {np.shape(value)}; it must be the key's, {key.shape}.")
  if value.dtype != key.dtype:
    raise ValueError(f"value is {value.dtype} and key {key.dtype}; cast them to one dtype.")


def focal_scores(
  scores: Array | None, key: Array, config: DGAConfig | HeadBudgets, plan: object = None
) -> None:
  """Focal scores are float32 with one number for each vector of the key, or absent.

  Args:
    scores: of the call.
    key: [..., N, D], of the same tokens.
    config: the scores are required if its selector, or that of one of the settings, is "fitted".
    plan: of the call; a plan contains the choice.
  """
  settings = config.settings if isinstance(config, HeadBudgets) else (config,)
  is_fitted = any(isinstance(one, DGAConfig) and one.selector == "fitted" for one in settings)
  if scores is None:
    if is_fitted and plan is None:
      raise ValueError(
        "focal_scores is None and config.selector is 'fitted'; pass a float32 score for every token"
        f" and KV head, {list(key.shape[:-1])}, or use selector='last_query'."
      )
    return
  if not is_fitted or plan is not None:
    why = "config.selector is 'last_query'" if plan is None else "plan fixes the focal tokens"
    raise ValueError(
      f"focal_scores is given and {why}, so the scores would have no effect; leave them out, or use"
      " DGAConfig(selection='streaming', selector='fitted') without a plan."
    )
  if np.shape(scores) != key.shape[:-1] or jnp.result_type(scores) != jnp.float32:
    raise ValueError(
      f"focal_scores is {jnp.result_type(scores)}{list(np.shape(scores))}; beside key"
      f" {list(key.shape)} it must be float32{list(key.shape[:-1])}, one score for each token and"
      " KV head."
    )


def is_causal(config: DGAConfig, what: str) -> None:
  """Refuses bidirectional attention where each token must be final when the next one arrives.

  Args:
    config: of the call.
    what: names the function, for the message.
  """
  config_type(config)
  if not config.causal:
    raise ValueError(
      f"config.causal is False; {what} needs causal=True, since later tokens would change earlier"
      " ones. Bidirectional attention is for whole sequences: dynamic_group_attention."
    )


def head_budgets(budgets: HeadBudgets, key: Array, plan: object) -> None:
  """Budgets are of one layer with the key's KV heads, and there is no plan."""
  if budgets.num_layers != 1 or budgets.num_kv_heads != key.shape[2]:
    raise ValueError(
      f"config is HeadBudgets of {budgets.num_layers} layers with {budgets.num_kv_heads} KV heads; "
      f"beside key {key.shape} it must be of one layer with {key.shape[2]} KV heads. Pass "
      "budgets.layer(index) for the layer of these arrays."
    )
  if plan is not None:
    raise ValueError(
      "plan is given and config is HeadBudgets; a plan fixes the groups of one DGAConfig. Leave "
      "the plan out, or pass a DGAConfig."
    )


def rows(
  batch: int, length: int, lengths: Lengths | None, segment_ids: SegmentIds | SequenceIds | None
) -> tuple[IntArray | None, IntArray | None]:
  """lengths, as int32, and segment_ids as arrays, or None where they are None.

  Args:
    batch: B.
    length: L, tokens of a row.
    lengths: int [B] within 0..L, an array or a list.
    segment_ids: int [B, L], an array or a list of lists.

  Raises:
    ValueError: a wrong shape or dtype, or lengths outside 0..L where they are known.
  """
  lengths = _int_array("lengths", lengths, (batch,))
  segment_ids = _int_array("segment_ids", segment_ids, (batch, length))
  if lengths is None:
    return None, segment_ids
  if not is_traced(lengths):
    values = np.asarray(lengths)
    if values.min() < 0 or values.max() > length:
      raise ValueError(
        f"lengths has values from {values.min()} to {values.max()}; they must be within"
        f" 0..{length}, the length of the arrays. Cut the lengths, or pad the arrays."
      )
  # Small dtypes overflow in sums, and 64 bits would become the dtype of the cache's lengths.
  return lengths.astype(np.int32), segment_ids


def _int_array(name: str, x: Any, shape: tuple[int, ...]) -> IntArray | None:
  if x is None or isinstance(x, (jax.Array, np.ndarray)):
    array = x
  else:
    try:
      array = np.asarray(x)
    except ValueError as error:
      raise ValueError(f"{name} is a ragged list; it must be int{list(shape)}.") from error
  if array is None:
    return None
  if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.integer):
    raise ValueError(f"{name} is {array.dtype}{list(array.shape)}; it must be int{list(shape)}.")
  return array


def softmax_scale(scale: float | Array | None) -> None:
  """A scale is a positive number, or a traced scalar."""
  if scale is None or is_traced(scale):
    return
  if np.ndim(scale) != 0 or not np.isfinite(scale) or scale <= 0:
    raise ValueError(f"scale is {scale!r}; it must be a positive number.")


def implementation(choice: dispatch.Implementation) -> None:
  """None, a backend of grouped attention, or a tuple of them."""
  dispatch.check_implementation("grouped_attention", choice)


def focal_mask(mask: Array) -> None:
  """The focal mask is bool [B, N, L] without an empty dimension."""
  if np.ndim(mask) != 3 or jnp.result_type(mask) != jnp.bool_ or 0 in np.shape(mask):
    raise ValueError(
      f"focal_mask is {jnp.result_type(mask)}{list(np.shape(mask))}; it must be"
      " bool[batch, KV heads, length] without an empty dimension."
    )


def focal_bound(count_BxN: Int[Array, "B N"], max_focal: int | None) -> int:
  """The static size of the list of focal tokens: `max_focal`, or the largest count.

  Raises:
    ValueError: a count exceeds `max_focal`, or counts are traced and `max_focal` is None.
  """
  if is_traced(count_BxN):
    if max_focal is None:
      raise ValueError(
        "focal_mask is traced, as under jit, so it cannot be counted, and max_focal is None. Set"
        " max_focal to the most focal tokens of a row and KV head."
      )
    return max_focal
  most = int(count_BxN.max())
  if max_focal is not None and most > max_focal:
    raise ValueError(
      f"focal_mask has {most} focal tokens in a row and KV head; max_focal is {max_focal}. Set"
      f" max_focal to at least {most}."
    )
  return most if max_focal is None else max_focal


def focal_in_blocks(
  mask_BxNxL: Bool[Array, "B N L"], blocks: StreamingBlocks, config: DGAConfig
) -> None:
  """Every complete streaming block has exactly f focal tokens.

  Raises:
    ValueError: some block has more or fewer, or the mask is traced.
  """
  if is_traced(mask_BxNxL):
    raise ValueError(
      "focal_mask is traced, as under jit, but with selection='streaming' the focal tokens of its"
      " blocks must be counted. Call from_focal_mask outside jit, or use plan_groups."
    )
  mask, f = np.asarray(mask_BxNxL), config.focal_in_block
  for row, start in np.argwhere(np.asarray(blocks.is_complete & (blocks.offset == 0))):
    counts = mask[row, :, start : start + config.block_size].sum(axis=-1)
    if (counts != f).any():
      raise ValueError(
        f"focal_mask has {counts.tolist()} focal tokens by KV head in the block at row {row},"
        f" position {start}; with selection='streaming' it must have {f} in each KV head."
      )
