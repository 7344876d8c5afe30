"""Cross entropy in chunks of the sequence, so that no [B, L, V] float32 logits exist."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dga_jax.sharding import constrain, context_size

Unembed = Callable[[Float[Array, "*S E"]], Float[Array, "*S V"]]


def token_losses(
  unembed: Unembed,
  hidden_BxLxE: Float[Array, "B L E"],
  targets_BxL: Int[Array, "B L"],
  *,
  chunk: int,
) -> tuple[Float[Array, "B L"], Bool[Array, "B L"]]:
  """-log softmax(logits)[target] of every token, in float32.

  The logits of a chunk are computed, used and dropped, and computed once more in the backward
  pass: at most [B, chunk, V] of them live at a time.

  Args:
    unembed: from hidden states to float32 logits.
    hidden_BxLxE: the decoder's last hidden states.
    targets_BxL: int32 token to predict at each position.
    chunk: tokens of a sequence to a chunk on one device; a last chunk may be shorter.

  Returns:
    (loss in nats, float32; whether the target is the most likely token), both [B, L].
  """
  B, L = targets_BxL.shape
  # A chunk takes tokens from every device that holds a part of the sequence.
  pieces = context_size()
  length = L // pieces
  chunk = min(chunk, length)
  num_chunks = -(-length // chunk)

  def to_chunks(x: Array) -> Array:
    padding = [(0, 0)] * (x.ndim + 1)
    padding[2] = (0, num_chunks * chunk - length)
    x = jnp.pad(x.reshape(B, pieces, length, *x.shape[2:]), padding)
    x = x.reshape(B, pieces, num_chunks, chunk, *x.shape[3:])
    names = ("batch", "length", None, None, *[None] * (x.ndim - 4))
    return jnp.moveaxis(constrain(x, *names), 2, 0)

  def from_chunks(x: Array) -> Array:
    x = jnp.moveaxis(x, 0, 2).reshape(B, pieces, num_chunks * chunk)
    return x[:, :, :length].reshape(B, L)

  @jax.checkpoint
  def chunk_losses(arguments: tuple[Array, Array]) -> tuple[Array, Array]:
    hidden_BxPxCxE, targets_BxPxC = arguments
    logits_BxPxCxV = unembed(hidden_BxPxCxE).astype(jnp.float32)
    # A sum of one logit: the gradient of a lookup would be a scatter into another array of logits.
    token_1x1x1xV = jnp.arange(logits_BxPxCxV.shape[-1])[None, None, None]
    is_target_BxPxCxV = token_1x1x1xV == targets_BxPxC[..., None]
    target_logits_BxPxC = jnp.sum(logits_BxPxCxV, axis=-1, where=is_target_BxPxCxV)
    loss_BxPxC = jax.nn.logsumexp(logits_BxPxCxV, axis=-1) - target_logits_BxPxC
    return loss_BxPxC, jnp.argmax(logits_BxPxCxV, axis=-1) == targets_BxPxC

  loss, correct = jax.lax.map(chunk_losses, (to_chunks(hidden_BxLxE), to_chunks(targets_BxL)))
  return from_chunks(loss), from_chunks(correct)
