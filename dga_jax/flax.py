"""Dynamic Group Attention as the attention function of `flax.nnx.MultiHeadAttention`.

A layer with causal self-attention:

    from flax import nnx
    from dga_jax import DGAConfig
    from dga_jax.flax import attention_fn

    layer = nnx.MultiHeadAttention(
      num_heads=8, in_features=512, decode=False, rngs=nnx.Rngs(0),
      attention_fn=attention_fn(DGAConfig(selection="streaming")),
    )
    y = layer(x, is_causal=True)
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.nnx.nn.dtypes import promote_dtype
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Num, Shaped

from dga_jax.api import dynamic_group_attention
from dga_jax.attention.segments import IntArray
from dga_jax.attention.validation import config_type
from dga_jax.config import DGAConfig
from pallas_kernels.dispatch import Implementation

__all__ = ["attention_fn"]


def attention_fn(
  config: DGAConfig,
  *,
  sharding: NamedSharding | None = None,
  implementation: Implementation = None,
) -> Callable[..., Array]:
  """The `attention_fn` argument of `flax.nnx.MultiHeadAttention` for self-attention.

  The returned function computes `dga_jax.dynamic_group_attention`. It takes the arguments that the
  module passes: query [..., L, H, D], key and value [..., L, N, D], and a mask. It honours:

  - `is_causal=True` without a mask: causal attention over whole rows.
  - `is_causal=True` with a mask [..., 1, 1, L] over the keys that hides padding at the left, at the
    right, or at both ends of a row.
  - a mask [..., 1, L, L] that is causal, with or without such padding; `is_causal` may then be
    False, which is the module's default.
  - `is_causal=True` with `key_value_seq_lengths`, int [...]: the tokens of right-padded rows, as
    in `jax.nn.dot_product_attention`, for callers of the function itself: the module passes masks.

  With `config.causal=False` it honours `is_causal=False` instead: without a mask; with a mask
  [..., 1, 1, L] over the keys, or [..., 1, L, L], that hides padding at the ends of a row; or with
  `key_value_seq_lengths`.

  A padded query's output is 0. Masks may be boolean or, as `nnx.make_causal_mask` returns them,
  numbers. A mask of another form raises ValueError if its values are known. Under jit its values
  are unknown, and the output of a row with such a mask is NaN.

  Every other argument that DGA cannot honour raises ValueError with its name: attention that is
  causal or not against `config.causal`, cross-attention, the module's decode cache, bias, dropout,
  precision, sown attention weights and input positions.

  Args:
    config: of the op.
    sharding: as for `dynamic_group_attention`: of the query [B, L, H, D] on a mesh with Auto axes,
      where all batch axes are one axis B.
    implementation: as for `dynamic_group_attention`.

  Raises:
    ValueError: config is no DGAConfig, or its selector is "fitted", which needs focal scores.
  """
  return _AttentionFn(config, sharding, implementation)


@dataclasses.dataclass(frozen=True)
class _AttentionFn:
  """A callable that compares by value, so that equal modules share a compiled program."""

  config: DGAConfig
  sharding: NamedSharding | None
  implementation: Implementation

  def __post_init__(self) -> None:
    config_type(self.config)
    if self.config.selector == "fitted":
      raise ValueError(
        "config.selector is 'fitted'; it must be 'last_query', since nnx.MultiHeadAttention passes"
        " no focal scores. Call dynamic_group_attention(..., focal_scores=...) for them."
      )

  def __call__(
    self,
    query: Float[Array, "*B L H D"],
    key: Float[Array, "*B S N D"],
    value: Float[Array, "*B S N D"],
    bias: Num[Array, "..."] | None = None,
    mask: Shaped[Array, "..."] | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
    input_positions: Int[Array, "..."] | None = None,
    key_value_seq_lengths: Int[IntArray, "*B"] | None = None,
  ) -> Float[Array, "*B L H D"]:
    del broadcast_dropout, dropout_rng
    L, S = query.shape[-3], key.shape[-3]
    if S != L:
      raise ValueError(
        f"key has {S} tokens and query has {L}; DGA is self-attention over whole sequences."
        " Cross-attention and the decode cache of nnx.MultiHeadAttention are not supported: decode"
        " with dga_jax.cache, or with dga_jax.model.Decoder."
      )
    dropout = dropout_rate if not deterministic else 0.0
    _refuse(bias=bias, precision=precision, module=module, input_positions=input_positions)
    if dropout > 0:
      raise ValueError(
        f"dropout_rate is {dropout} with deterministic=False; DGA has no attention dropout: pass"
        " dropout_rate=0 or deterministic=True."
      )
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    rows = math.prod(query.shape[:-3])
    config, fits_B = self.config, None
    lengths_B, segment_ids_BxL = None, None
    if key_value_seq_lengths is not None:
      if mask is not None:
        raise ValueError(
          "mask and key_value_seq_lengths are given; pass one of them. A mask hides padding, too."
        )
      lengths_B = jnp.asarray(key_value_seq_lengths).reshape(-1)
    if is_causal and not config.causal:
      raise ValueError(
        "is_causal is True and config.causal is False; call the module with is_causal=False, or"
        " make the function with DGAConfig(causal=True)."
      )
    if mask is not None:
      masks_BxQxL = _as_rows(mask, query.shape)
      segment_ids_BxL, fits_B = _padding(masks_BxQxL, is_causal=is_causal, causal=config.causal)
      config = dataclasses.replace(config, max_documents=1)
    elif config.causal and not is_causal:
      raise ValueError(
        "is_causal is False and mask is None; DGA is causal: call the module with is_causal=True,"
        " pass a causal mask, or make the function with DGAConfig(causal=False)."
      )
    out_BxLxHxD = dynamic_group_attention(
      query.reshape(rows, *query.shape[-3:]),
      key.reshape(rows, *key.shape[-3:]),
      value.reshape(rows, *value.shape[-3:]),
      config=config,
      lengths=lengths_B,
      segment_ids=segment_ids_BxL,
      sharding=self.sharding,
      implementation=self.implementation,
    )
    if fits_B is not None:
      out_BxLxHxD = jnp.where(fits_B[:, None, None, None], out_BxLxHxD, jnp.nan)
    return out_BxLxHxD.reshape(query.shape)


_WHY = {
  "bias": "DGA adds no bias to its logits",
  "precision": "set jax.default_matmul_precision instead",
  "module": "DGA has no attention weights for each pair of tokens; pass sow_weights=False",
  "input_positions": "apply RoPE to query and key before attention",
}


def _refuse(**arguments: Any) -> None:
  for name, argument in arguments.items():
    if argument is not None:
      raise ValueError(f"{name} is given; it must be None: {_WHY[name]}.")


def _as_rows(mask: Shaped[Array, "..."], query_shape: tuple[int, ...]) -> Bool[Array, "B Q L"]:
  """A mask with one batch axis and without the head axis; Q is 1 or L.

  Raises:
    ValueError: the shape does not broadcast to [..., H, L, L], or heads have masks of their own.
  """
  *batch, L, _, _ = query_shape
  shape = (1,) * max(0, len(batch) + 3 - mask.ndim) + mask.shape
  *leading, heads, queries, keys = shape
  fits = len(leading) == len(batch) and all(
    a in (1, b) for a, b in zip(leading, batch, strict=True)
  )
  if not fits or queries not in (1, L) or keys != L:
    raise ValueError(
      f"mask has the shape {mask.shape}; it must broadcast to the batch axes {tuple(batch)} and be"
      f" [..., 1, 1, {L}] (keys) or [..., 1, {L}, {L}] (causal)."
    )
  if heads != 1:
    raise ValueError(
      f"mask has {heads} heads; DGA masks all heads alike: the head axis must have size 1."
    )
  whole = jnp.broadcast_to(mask.reshape(shape), (*batch, 1, queries, L))
  return whole.reshape(-1, queries, L) != 0


def _padding(
  mask_BxQxL: Bool[Array, "B Q L"], *, is_causal: bool, causal: bool
) -> tuple[Int[Array, "B L"], Bool[Array, "B"]]:
  """Segment ids, 0 for tokens and -1 for padding, and whether each row's mask can be honoured.

  It can be honoured if the tokens are contiguous, and every token sees all of them, or with
  `causal` those up to itself.

  Raises:
    ValueError: the values of the mask are known, and it cannot be honoured.
  """
  _, Q, L = mask_BxQxL.shape
  if Q != L and causal and not is_causal:
    raise ValueError(
      "is_causal is False and mask has one row for all queries; DGA is causal: call the module with"
      " is_causal=True."
    )
  index_L = jnp.arange(L)
  valid_BxL = mask_BxQxL[:, 0] if Q != L else jnp.diagonal(mask_BxQxL, axis1=1, axis2=2)
  start_B = jnp.argmax(valid_BxL, axis=-1)
  end_B = start_B + jnp.sum(valid_BxL, axis=-1, dtype=jnp.int32)
  is_token_BxL = (index_L[None] >= start_B[:, None]) & (index_L[None] < end_B[:, None])
  fits_B = jnp.all(valid_BxL == is_token_BxL, axis=-1)
  if Q == L:
    causal_LxL = index_L[None] <= index_L[:, None]
    visible_LxL = causal_LxL | (not causal)
    # The masks of padded queries have no effect, since the op returns 0 for padded queries. With
    # is_causal the module's own causal mask hides later keys.
    wanted_BxLxL = visible_LxL[None] & is_token_BxL[:, None]
    differs_BxLxL = (mask_BxQxL != wanted_BxLxL) & is_token_BxL[:, :, None]
    if is_causal:
      differs_BxLxL &= causal_LxL[None]
    fits_B &= ~jnp.any(differs_BxLxL, axis=(1, 2))
  if not isinstance(fits_B, jax.core.Tracer) and not np.all(fits_B):
    row = int(np.argmin(fits_B))
    kind = "causal" if causal else "full"
    raise ValueError(
      f"mask of row {row} is not {kind} attention with padding at the ends of the row; DGA supports"
      " no other mask. Pack documents with dynamic_group_attention(segment_ids=...)."
    )
  return jnp.where(is_token_BxL, 0, -1), fits_B
