"""Cross entropy in chunks of the sequence, so that no [B, L, V] float32 logits exist."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dga_jax.sharding import constrain, context_size
from train.distillation import divergence

Unembed = Callable[[Float[Array, "*S E"]], Float[Array, "*S V"]]
# (hidden, arrays of the unembedding, tokens) of one chunk -> its sums in `weighted_loss`.
type _ChunkLoss = Callable[[Array, list[Array], tuple[Array, ...]], tuple[Array, Array]]


def token_losses(
  unembed: Unembed,
  hidden_BxLxE: Float[Array, "B L E"],
  targets_BxL: Int[Array, "B L"],
  *,
  chunk: int,
) -> tuple[Float[Array, "B L"], Bool[Array, "B L"]]:
  """-log softmax(logits)[target] of every token, in float32; for evaluation.

  At most [B, chunk, V] logits exist at a time. The gradient would store all of them: use
  `weighted_loss` for training.

  Args:
    unembed: from hidden states to float32 logits.
    hidden_BxLxE: the decoder's last hidden states.
    targets_BxL: int32 token to predict at each position.
    chunk: tokens of a sequence to a chunk on one device; a last chunk may be shorter.

  Returns:
    (loss in nats, float32; whether the target is the most likely token), both [B, L].
  """
  L = targets_BxL.shape[1]
  chunks = (_to_chunks(hidden_BxLxE, chunk), _to_chunks(targets_BxL, chunk))
  loss, correct = jax.lax.map(
    lambda chunk: _losses(unembed(chunk[0]).astype(jnp.float32), chunk[1]), chunks
  )
  return _from_chunks(loss, L), _from_chunks(correct, L)


def weighted_loss(
  unembed: Unembed,
  hidden_BxLxE: Float[Array, "B L E"],
  targets_BxL: Int[Array, "B L"],
  weights_BxL: Float[Array, "B L"],
  *,
  chunk: int,
  teacher_BxLxE: Float[Array, "B L E"] | None = None,
  distillation: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Σ w·loss over all tokens, and how many are predicted; see `token_losses`. For training.

  With a teacher the loss of a token is (1 − d)·cross entropy + d·KL(teacher‖model), where d is
  `distillation` and both predictions have the same unembedding.

  The gradients of the hidden states and of the arrays that `unembed` closes over are computed
  beside the loss: the loss is a sum with known weights, so the backward pass only multiplies them
  by a number. The logits of a chunk are computed once, where a backward pass of its own would
  compute them again.

  Args:
    unembed: as for `token_losses`.
    hidden_BxLxE: as for `token_losses`.
    targets_BxL: as for `token_losses`.
    weights_BxL: float32 weight of each token's loss; it has no gradient.
    chunk: as for `token_losses`.
    teacher_BxLxE: the teacher's last hidden states, in the order of `hidden_BxLxE`. Neither they
      nor the teacher's unembedding has a gradient.
    distillation: d in [0, 1]; not 0 with a teacher.

  Returns:
    (the weighted sum of the losses in nats, the number of tokens of a weight other than 0 whose
    target is the most likely token), float32. The number has no gradient.
  """
  hidden = _to_chunks(hidden_BxLxE, chunk)
  by_token = (targets_BxL, weights_BxL, *(() if teacher_BxLxE is None else (teacher_BxLxE,)))
  tokens = tuple(_to_chunks(x, chunk) for x in by_token)
  pure_unembed, arrays = jax.closure_convert(unembed, hidden[0])
  chunk_loss = functools.partial(_chunk_loss, pure_unembed, distillation)
  return _weighted_loss(chunk_loss, hidden, arrays, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_loss(
  chunk_loss: _ChunkLoss, hidden: Array, arrays: list[Array], tokens: tuple[Array, ...]
) -> tuple[Array, Array]:
  def add(sums: tuple[Array, Array], chunk: Any) -> tuple[tuple[Array, Array], None]:
    return jax.tree.map(jnp.add, sums, chunk_loss(chunk[0], arrays, chunk[1])), None

  return jax.lax.scan(add, (jnp.float32(0), jnp.float32(0)), (hidden, tokens))[0]


def _forward(
  chunk_loss: _ChunkLoss, hidden: Array, arrays: list[Array], tokens: tuple[Array, ...]
) -> tuple[tuple[Array, Array], tuple[Array, list[Array]]]:
  with_gradient = jax.value_and_grad(chunk_loss, argnums=(0, 1), has_aux=True)

  def add(sums: Any, chunk: Any) -> tuple[Any, Array]:
    results, (gradient, array_gradients) = with_gradient(chunk[0], arrays, chunk[1])
    return jax.tree.map(jnp.add, sums, (results, array_gradients)), gradient

  zeros = ((jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, arrays))
  (results, array_gradients), gradients = jax.lax.scan(add, zeros, (hidden, tokens))
  return results, (gradients, array_gradients)


def _backward(
  _: _ChunkLoss, gradients: tuple[Array, list[Array]], factors: tuple[Array, Array]
) -> tuple[Array, list[Array], None]:
  scaled: tuple[Array, list[Array]] = jax.tree.map(
    lambda x: (factors[0] * x.astype(jnp.float32)).astype(x.dtype), gradients
  )
  return *scaled, None


_weighted_loss.defvjp(_forward, _backward)


def _chunk_loss(
  unembed: Callable[..., Array],
  distillation: float,
  hidden: Array,
  arrays: list[Array],
  tokens: tuple[Array, ...],
) -> tuple[Array, Array]:
  """The sums of `weighted_loss` over one chunk."""
  targets, weights, *teacher = tokens
  logits = unembed(hidden, *arrays).astype(jnp.float32)
  loss, correct = _losses(logits, targets)
  if teacher:
    teacher_logits = unembed(teacher[0], *jax.lax.stop_gradient(arrays)).astype(jnp.float32)
    loss = (1 - distillation) * loss + distillation * divergence(logits, teacher_logits)
  counts = weights != 0
  correct_tokens = jnp.sum(correct & counts, dtype=jnp.float32)
  return jnp.sum(weights * loss, where=counts), correct_tokens


def _losses(
  logits_BxPxCxV: Float[Array, "B P C V"], targets_BxPxC: Int[Array, "B P C"]
) -> tuple[Float[Array, "B P C"], Bool[Array, "B P C"]]:
  """The results of `token_losses` for one chunk."""
  # A sum of one logit: the gradient of a lookup would be a scatter into another array of logits.
  token_1x1x1xV = jnp.arange(logits_BxPxCxV.shape[-1])[None, None, None]
  is_target_BxPxCxV = token_1x1x1xV == targets_BxPxC[..., None]
  target_logits_BxPxC = jnp.sum(logits_BxPxCxV, axis=-1, where=is_target_BxPxCxV)
  loss_BxPxC = jax.nn.logsumexp(logits_BxPxCxV, axis=-1) - target_logits_BxPxC
  return loss_BxPxC, jnp.argmax(logits_BxPxCxV, axis=-1) == targets_BxPxC


def _to_chunks(x: Array, chunk: int) -> Array:
  """[B, L, ...] as [chunks, B, P, C, ...]: C tokens from each of P devices that share a sequence.

  The last chunk is padded with zeros.
  """
  (B, L), pieces = x.shape[:2], context_size()
  length = L // pieces
  chunk = min(chunk, length)
  num_chunks = -(-length // chunk)
  padding = [(0, 0)] * (x.ndim + 1)
  padding[2] = (0, num_chunks * chunk - length)
  x = jnp.pad(x.reshape(B, pieces, length, *x.shape[2:]), padding)
  x = x.reshape(B, pieces, num_chunks, chunk, *x.shape[3:])
  names = ("batch", "length", None, None, *[None] * (x.ndim - 4))
  return jnp.moveaxis(constrain(x, *names), 2, 0)


def _from_chunks(x: Array, L: int) -> Array:
  """[chunks, B, P, C] as [B, L], without the padding of the last chunk."""
  num_chunks, B, pieces, chunk = x.shape
  x = jnp.moveaxis(x, 0, 2).reshape(B, pieces, num_chunks * chunk)
  return x[:, :, : L // pieces].reshape(B, L)
