"""Cross entropy in chunks of the sequence, so that no [B, L, V] float32 logits exist."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Unembed = Callable[[Float[Array, "B L E"]], Float[Array, "B L V"]]


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
    chunk: tokens of a sequence to a chunk; a last chunk may be shorter.

  Returns:
    (loss in nats, float32; whether the target is the most likely token), both [B, L].
  """
  length = hidden_BxLxE.shape[1]
  chunk = min(chunk, length)
  num_chunks = -(-length // chunk)

  def to_chunks(x: Array) -> Array:
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, num_chunks * chunk - length)
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, chunk, *x.shape[2:]), 1, 0)

  @jax.checkpoint
  def chunk_losses(arguments: tuple[Array, Array]) -> tuple[Array, Array]:
    hidden_BxCxE, targets_BxC = arguments
    logits_BxCxV = unembed(hidden_BxCxE).astype(jnp.float32)
    target_logits_BxC = jnp.take_along_axis(logits_BxCxV, targets_BxC[..., None], axis=-1)[..., 0]
    loss_BxC = jax.nn.logsumexp(logits_BxCxV, axis=-1) - target_logits_BxC
    return loss_BxC, jnp.argmax(logits_BxCxV, axis=-1) == targets_BxC

  chunked = jax.lax.map(chunk_losses, (to_chunks(hidden_BxLxE), to_chunks(targets_BxL)))
  loss_BxL, correct_BxL = (
    jnp.moveaxis(x, 0, 1).reshape(x.shape[1], num_chunks * chunk)[:, :length] for x in chunked
  )
  return loss_BxL, correct_BxL
