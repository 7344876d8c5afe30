"""`attention_fn` in nnx.MultiHeadAttention equals the op and refuses unsupported arguments."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dga_jax import DGAConfig, dynamic_group_attention
from dga_jax.flax import attention_fn

CONFIG = DGAConfig(group_size=4, selection="streaming", focal_per_block=2)
B, L, H, N, E = 3, 23, 4, 2, 32
X = jax.random.normal(jax.random.key(0), (B, L, E))
LENGTHS = jnp.array([23, 9, 1])
KEYS = (jnp.arange(L)[None] < LENGTHS[:, None])[:, None, None]  # [B, 1, 1, L]


def layer(**options: Any) -> nnx.MultiHeadAttention:
  defaults = {"attention_fn": attention_fn(CONFIG), "decode": False, "num_kv_heads": N}
  return nnx.MultiHeadAttention(
    num_heads=H, in_features=E, rngs=nnx.Rngs(1), **(defaults | options)
  )


@nnx.jit
def expected(module: nnx.MultiHeadAttention, x: jax.Array, lengths: Any = None) -> jax.Array:
  """The output of the op between the projections of the module."""
  q, k, v = module.query(x), module.key(x), module.value(x)
  return module.out(dynamic_group_attention(q, k, v, config=CONFIG, lengths=lengths))


@functools.partial(nnx.jit, static_argnames="is_causal")
def call(module: nnx.MultiHeadAttention, x: jax.Array, mask: Any = None, is_causal: bool = True):
  return module(x, mask=mask, is_causal=is_causal)


def test_forward_and_gradients_equal_the_op() -> None:
  def loss(function: Any) -> Any:
    return lambda module, x: jnp.sum(jnp.sin(function(module, x)))

  ours = loss(lambda module, x: module(x, is_causal=True))
  module = layer()
  got = nnx.jit(nnx.value_and_grad(ours, argnums=(0, 1)))(module, X)
  want = nnx.jit(nnx.value_and_grad(loss(expected), argnums=(0, 1)))(module, X)
  assert len(jax.tree.leaves(got)) == 10
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


@pytest.mark.parametrize(
  "config", [DGAConfig(importance_rate=1.0, min_focal_tokens=0), DGAConfig(min_focal_tokens=64)]
)
def test_with_all_tokens_focal_it_equals_flax_attention(config: DGAConfig) -> None:
  modules = (layer(attention_fn=f) for f in (attention_fn(config), nnx.dot_product_attention))
  got, want = (call(module, X) for module in modules)
  np.testing.assert_allclose(got, want, atol=1e-5)


MASKS = {
  "keys": (KEYS, True),
  "causal and keys": (nnx.combine_masks(nnx.make_causal_mask(X[..., 0]), KEYS), False),
  "both flags": (nnx.combine_masks(nnx.make_causal_mask(X[..., 0]), KEYS), True),
  "pairs of tokens": (nnx.make_attention_mask(KEYS[:, 0, 0], KEYS[:, 0, 0]), True),
}


@pytest.mark.parametrize("name", MASKS)
def test_right_padding_is_applied(name: str) -> None:
  mask, is_causal = MASKS[name]
  module = layer()
  want = expected(module, X, LENGTHS)
  np.testing.assert_allclose(call(module, X, mask, is_causal), want, atol=1e-5)
  if name != "causal and keys":
    return
  functions = (attention_fn(DGAConfig(min_focal_tokens=64)), nnx.dot_product_attention)
  dense, flax = (call(layer(attention_fn=f), X, mask, is_causal) for f in functions)
  for row, length in enumerate(LENGTHS.tolist()):
    np.testing.assert_allclose(dense[row, :length], flax[row, :length], atol=1e-5)


def test_padding_at_the_left_and_at_both_ends_is_honoured() -> None:
  module = layer()
  shift_B = jnp.array([0, 14, 5])  # The row of 9 tokens ends at L; the one token is inside.
  at_BxL = (jnp.arange(L)[None] - shift_B[:, None]) % L
  x = jnp.take_along_axis(X, at_BxL[..., None], axis=1)
  keys = jnp.take_along_axis(KEYS[:, 0, 0], at_BxL, axis=1)[:, None, None]
  causal = nnx.combine_masks(nnx.make_causal_mask(X[..., 0]), keys)
  want = expected(module, X, LENGTHS)
  for mask, is_causal in ((keys, True), (causal, False)):
    for out in (call(module, x, mask, is_causal), module(x, mask=mask, is_causal=is_causal)):
      for row, (shift, length) in enumerate(zip(shift_B, LENGTHS, strict=True)):
        own = out[row, shift : shift + length]
        np.testing.assert_allclose(own, want[row, :length], atol=1e-5)


def test_padding_on_the_left_with_global_selection() -> None:
  module = layer(attention_fn=attention_fn(DGAConfig(group_size=3, min_focal_tokens=2)))
  keys = jnp.arange(L)[None, None, None] >= 6
  out = call(module, X[:1], keys)
  np.testing.assert_allclose(out[:, 6:], call(module, X[:1, 6:]), atol=1e-5)


def test_lengths_of_keys_are_honoured() -> None:
  module, attend = layer(), attention_fn(CONFIG)
  q, k, v = module.query(X), module.key(X), module.value(X)
  out = module.out(attend(q, k, v, is_causal=True, key_value_seq_lengths=LENGTHS))
  np.testing.assert_allclose(out, expected(module, X, LENGTHS), atol=1e-5)
  with pytest.raises(ValueError, match="mask and key_value_seq_lengths are given"):
    attend(q, k, v, mask=KEYS, is_causal=True, key_value_seq_lengths=LENGTHS)


@pytest.mark.parametrize("shape", [(), (3, 1)])
def test_any_number_of_batch_axes(shape: tuple[int, ...]) -> None:
  module = layer()
  x = X.reshape(3, 1, L, E) if shape else X[0]
  causal = nnx.make_causal_mask(x[..., 0])
  got = call(module, x, causal, is_causal=False)
  assert got.shape == (*shape, L, E)
  want = expected(module, X)[: 3 if shape else 1]
  np.testing.assert_allclose(got.reshape(-1, L, E), want, atol=1e-5)


def test_dtype_of_the_module() -> None:
  out = call(layer(dtype=jnp.bfloat16), X)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(out, call(layer(), X), atol=0.03)


BAD_MASKS = {  # Each with the rows in which it is wrong.
  "a hole": (KEYS.at[0, 0, 0, 3].set(False), [0]),
  "a window": (jnp.tril(jnp.ones((L, L), bool)) & ~jnp.tril(jnp.ones((L, L), bool), -5), [0, 1, 2]),
  "packed documents": (
    nnx.combine_masks(
      nnx.make_causal_mask(X[..., 0]),
      nnx.make_attention_mask(jnp.arange(L) // 8, jnp.arange(L) // 8, jnp.equal)[None],
    ),
    [0, 1, 2],
  ),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_other_masks_are_refused_and_give_nan_under_jit(name: str) -> None:
  module, (mask, wrong) = layer(), BAD_MASKS[name]
  with pytest.raises(
    ValueError, match=f"mask of row {wrong[0]} is not causal attention with padding"
  ):
    module(X, mask=mask, is_causal=True)
  out = call(module, X, mask)
  assert np.flatnonzero(jnp.isnan(out).all(axis=(1, 2))).tolist() == wrong
  assert np.flatnonzero(jnp.isnan(out).any(axis=(1, 2))).tolist() == wrong


def test_a_mask_that_is_not_causal_is_refused_without_is_causal() -> None:
  with pytest.raises(ValueError, match="not causal attention with padding"):
    layer()(X, mask=jnp.ones((B, 1, L, L), bool))


BOTH_WAYS = DGAConfig(causal=False, group_size=4, selection="streaming", focal_per_block=2)
FULL_MASKS = {
  "keys": KEYS,
  "pairs of tokens": nnx.make_attention_mask(KEYS[:, 0, 0], KEYS[:, 0, 0]),
}


@pytest.mark.parametrize("name", FULL_MASKS)
def test_bidirectional_attention_of_padded_rows(name: str) -> None:
  module = layer(attention_fn=attention_fn(BOTH_WAYS))
  out = call(module, X, FULL_MASKS[name], is_causal=False)
  for row, length in enumerate(LENGTHS.tolist()):
    alone = call(module, X[row : row + 1, :length], is_causal=False)
    np.testing.assert_allclose(out[row, :length], alone[0], atol=1e-5)
  assert not np.allclose(out[0], call(layer(), X)[0], atol=1e-3)


def test_bidirectional_attention_refuses_causal_calls() -> None:
  module = layer(attention_fn=attention_fn(BOTH_WAYS))
  with pytest.raises(ValueError, match=r"is_causal is True and config\.causal is False"):
    module(X, is_causal=True)
  with pytest.raises(ValueError, match="mask of row 0 is not full attention with padding"):
    module(X, mask=nnx.make_causal_mask(X[..., 0]))


@pytest.mark.parametrize(
  ("options", "call", "message"),
  [
    ({}, {}, "is_causal is False and mask is None"),
    ({}, {"mask": KEYS}, "is_causal is False and mask has one row"),
    ({}, {"mask": KEYS, "inputs_k": X[:, :9]}, "key has 9 tokens and query has 23"),
    ({}, {"mask": jnp.ones((B, H, 1, L), bool)}, "mask has 4 heads"),
    ({}, {"mask": jnp.ones((2, 1, 1, L), bool)}, r"mask has the shape \(2, 1, 1, 23\)"),
    ({"dropout_rate": 0.1}, {"deterministic": False}, r"dropout_rate is 0\.1"),
    ({"precision": "highest"}, {}, "precision is given"),
    ({}, {"sow_weights": True}, "module is given.*sow_weights=False"),
    ({}, {"input_positions": jnp.arange(L)}, "input_positions is given"),
  ],
)
def test_unsupported_arguments_are_errors_with_the_name(
  options: dict, call: dict, message: str
) -> None:
  with pytest.raises(ValueError, match=message):
    layer(**options)(X, **call)


def test_a_bias_is_refused() -> None:
  q = jnp.zeros((1, 4, 1, 8))
  with pytest.raises(ValueError, match="bias is given"):
    attention_fn(CONFIG)(q, q, q, bias=jnp.zeros((1, 1, 4, 4)), is_causal=True)


def test_the_decode_cache_of_the_module_is_refused() -> None:
  module = layer(decode=True)
  module.init_cache((B, L, E))
  with pytest.raises(ValueError, match=r"key has 23 tokens and query has 1.*decode cache"):
    module(X[:, :1])


def test_dropout_is_allowed_if_it_is_deterministic() -> None:
  module = layer(dropout_rate=0.1, deterministic=True)
  np.testing.assert_array_equal(call(module, X), call(layer(), X))


def test_a_mesh_with_auto_axes() -> None:
  mesh = jax.make_mesh((1, 1), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)
  sharding = NamedSharding(mesh, PartitionSpec("rows", None, "heads"))
  module = layer(attention_fn=attention_fn(CONFIG, sharding=sharding))
  with jax.set_mesh(mesh):
    got = call(module, X)
  np.testing.assert_allclose(got, expected(layer(), X), atol=1e-5)


def test_functions_compare_by_value() -> None:
  assert attention_fn(CONFIG) == attention_fn(DGAConfig(**vars(CONFIG)))
  assert hash(attention_fn(CONFIG)) != hash(attention_fn(DGAConfig()))
