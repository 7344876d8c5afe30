"""Chunked cross entropy equals plain cross entropy, and stores one chunk of logits at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array

from train.loss import token_losses, weighted_loss

B, L, E, V = 2, 12, 8, 20


def make_inputs() -> tuple[Array, Array, Array]:
  keys = jax.random.split(jax.random.key(0), 3)
  hidden_BxLxE = jax.random.normal(keys[0], (B, L, E))
  table_ExV = jax.random.normal(keys[1], (E, V))
  targets_BxL = jax.random.randint(keys[2], (B, L), 0, V)
  return hidden_BxLxE, table_ExV, targets_BxL


def chunked(hidden_BxLxE: Array, table_ExV: Array, targets_BxL: Array, chunk: int):
  return token_losses(lambda x: x @ table_ExV, hidden_BxLxE, targets_BxL, chunk=chunk)


# Chunks that divide the length or not, one token less than it, as long as it, and longer.
@pytest.mark.parametrize("chunk", [1, 5, 6, 11, L, L + 3])
def test_losses_and_gradients_equal_those_of_plain_cross_entropy(chunk: int) -> None:
  hidden_BxLxE, table_ExV, targets_BxL = make_inputs()
  weights_BxL = jnp.linspace(0.0, 1.0, B * L).reshape(B, L)

  def plain(hidden: Array, table: Array) -> Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ table, targets_BxL)
    return jnp.sum(losses * weights_BxL)

  def ours(hidden: Array, table: Array) -> Array:
    unembed = lambda x: x @ table  # noqa: E731
    # A factor after the sum: the gradients are computed before it is known.
    return 3.0 * weighted_loss(unembed, hidden, targets_BxL, weights_BxL, chunk=chunk)[0] / 3.0

  expected = jax.value_and_grad(plain, argnums=(0, 1))(hidden_BxLxE, table_ExV)
  got = jax.value_and_grad(ours, argnums=(0, 1))(hidden_BxLxE, table_ExV)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), got, expected)
  loss_BxL, correct_BxL = chunked(hidden_BxLxE, table_ExV, targets_BxL, chunk)
  np.testing.assert_allclose(jnp.sum(loss_BxL * weights_BxL), expected[0], rtol=2e-5)
  most_likely_BxL = jnp.argmax(hidden_BxLxE @ table_ExV, -1)
  np.testing.assert_array_equal(correct_BxL, most_likely_BxL == targets_BxL)
  unembed = lambda x: x @ table_ExV  # noqa: E731
  counted = weighted_loss(unembed, hidden_BxLxE, most_likely_BxL, weights_BxL, chunk=chunk)[1]
  assert counted == B * L - 1  # The first weight is 0.


@pytest.mark.parametrize("chunk", [5, L])
def test_distillation_is_the_divergence_from_the_teacher(chunk: int) -> None:
  hidden_BxLxE, table_ExV, targets_BxL = make_inputs()
  teacher_BxLxE = jax.random.normal(jax.random.key(1), (B, L, E))
  weights_BxL = jnp.linspace(0.0, 1.0, B * L).reshape(B, L)
  # The teacher's table is an argument without a gradient.
  teacher_logits = teacher_BxLxE @ table_ExV

  def plain(hidden: Array, table: Array) -> Array:
    logits = hidden @ table
    kl = optax.losses.kl_divergence(jax.nn.log_softmax(logits), jax.nn.softmax(teacher_logits))
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets_BxL)
    return jnp.sum((0.3 * nats + 0.7 * kl) * weights_BxL)

  def ours(hidden: Array, table: Array) -> Array:
    options = {"chunk": chunk, "teacher_BxLxE": teacher_BxLxE, "distillation": 0.7}
    unembed = lambda x: x @ table  # noqa: E731
    return weighted_loss(unembed, hidden, targets_BxL, weights_BxL, **options)[0]

  expected = jax.value_and_grad(plain, argnums=(0, 1))(hidden_BxLxE, table_ExV)
  got = jax.value_and_grad(ours, argnums=(0, 1))(hidden_BxLxE, table_ExV)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), got, expected)


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
    weights = jnp.ones(targets.shape)
    return weighted_loss(lambda x: x @ table, hidden, targets, weights, chunk=chunk)[0]

  compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, table, targets).compile()
  one_chunk_of_logits = chunk * vocab * 4
  temporary = compiled.memory_analysis().temp_size_in_bytes
  # A few chunks exist at the same time. All logits would be 2048 / 256 = 8 small chunks.
  assert temporary < 4 * one_chunk_of_logits + 2**20
  assert f"[1,{length},{vocab}]" not in compiled.as_text()


def test_a_token_of_weight_zero_changes_nothing() -> None:
  hidden_BxLxE, table_ExV, targets_BxL = make_inputs()
  weights_BxL = jnp.ones((B, L)).at[1, 3].set(0.0)

  def loss(hidden: Array) -> Array:
    return weighted_loss(lambda x: x @ table_ExV, hidden, targets_BxL, weights_BxL, chunk=4)[0]

  # The loss of this token is infinite.
  overflowing = hidden_BxLxE.at[1, 3].set(jnp.finfo(jnp.float32).max * jnp.sign(table_ExV[:, 0]))
  assert loss(overflowing) == loss(hidden_BxLxE)
  assert jnp.all(jax.grad(loss)(hidden_BxLxE)[1, 3] == 0)


def test_the_logits_are_computed_once() -> None:
  hidden_BxLxE, table_ExV, targets_BxL = make_inputs()

  def loss(hidden: Array, table: Array) -> Array:
    weights = jnp.ones(targets_BxL.shape)
    return weighted_loss(lambda x: x @ table, hidden, targets_BxL, weights, chunk=L)[0]

  text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden_BxLxE, table_ExV).as_text()
  assert text.count("dot_general") == 3  # The logits and two gradients.
