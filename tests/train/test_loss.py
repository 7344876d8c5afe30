"""Chunked cross entropy equals plain cross entropy without storing all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Array

from train.loss import token_losses

B, L, E, V = 2, 12, 8, 20


def make_inputs() -> tuple[Array, Array, Array]:
  keys = jax.random.split(jax.random.key(0), 3)
  hidden_BxLxE = jax.random.normal(keys[0], (B, L, E))
  table_ExV = jax.random.normal(keys[1], (E, V))
  targets_BxL = jax.random.randint(keys[2], (B, L), 0, V)
  return hidden_BxLxE, table_ExV, targets_BxL


def chunked(hidden_BxLxE: Array, table_ExV: Array, targets_BxL: Array, chunk: int):
  return token_losses(lambda x: x @ table_ExV, hidden_BxLxE, targets_BxL, chunk=chunk)


@given(chunk=st.integers(1, L + 3))
def test_losses_and_gradients_equal_those_of_plain_cross_entropy(chunk: int) -> None:
  hidden_BxLxE, table_ExV, targets_BxL = make_inputs()
  weights_BxL = jnp.linspace(0.0, 1.0, B * L).reshape(B, L)

  def plain(hidden: Array, table: Array) -> Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ table, targets_BxL)
    return jnp.sum(losses * weights_BxL)

  def ours(hidden: Array, table: Array) -> Array:
    return jnp.sum(chunked(hidden, table, targets_BxL, chunk)[0] * weights_BxL)

  expected = jax.value_and_grad(plain, argnums=(0, 1))(hidden_BxLxE, table_ExV)
  got = jax.value_and_grad(ours, argnums=(0, 1))(hidden_BxLxE, table_ExV)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), got, expected)
  correct_BxL = chunked(hidden_BxLxE, table_ExV, targets_BxL, chunk)[1]
  np.testing.assert_array_equal(
    correct_BxL, jnp.argmax(hidden_BxLxE @ table_ExV, -1) == targets_BxL
  )


def test_loss_is_float32_for_low_precision_states() -> None:
  hidden_BxLxE, table_ExV, targets_BxL = make_inputs()
  loss_BxL, _ = chunked(hidden_BxLxE.astype(jnp.bfloat16), table_ExV, targets_BxL, 4)
  assert loss_BxL.dtype == jnp.float32


@pytest.mark.parametrize("chunk", [256, 1024])
def test_memory_is_proportional_to_the_chunk(chunk: int) -> None:
  length, vocab = 2048, 4096
  hidden = jax.ShapeDtypeStruct((1, length, E), jnp.float32)
  table = jax.ShapeDtypeStruct((E, vocab), jnp.float32)
  targets = jax.ShapeDtypeStruct((1, length), jnp.int32)

  def loss(hidden: Array, table: Array, targets: Array) -> Array:
    return jnp.sum(chunked(hidden, table, targets, chunk)[0])

  compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, table, targets).compile()
  one_chunk_of_logits = chunk * vocab * 4
  temporary = compiled.memory_analysis().temp_size_in_bytes
  # A few chunks exist at the same time. All logits would be 2048 / 256 = 8 small chunks.
  assert temporary < 4 * one_chunk_of_logits + 2**20
  assert f"[1,{length},{vocab}]" not in compiled.as_text()
