"""A gate for each KV head mixes full attention into another kind; large gates mark full heads.

The output of a head is g·full + (1 − g)·compact, where `full` is causal dense attention, `compact`
the attention kind of the model, and g in [0, 1] the gate of its KV head. This form is that of
DuoAttention (Xiao et al., arXiv 2410.10819), whose compact heads have sinks and a window.
The trainer learns the gates of a model whose other weights stay fixed (train/gates.py);
`dga_jax.calibration.hardening` makes `HeadBudgets` of them.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dga_jax.model.run_layers import LayerAttend


def mix_with_full(
  compact: LayerAttend, full: LayerAttend, gates_KxN: Float[Array, "K N"]
) -> LayerAttend:
  """An attention function of layers that mixes the outputs of two; see the module.

  The mix is computed in float32. It equals `full` exactly where the gate is 1, and `compact`
  exactly where the gate is 0.

  Args:
    compact: attention of a layer, without caches.
    full: likewise.
    gates_KxN: of each layer and KV head.
  """

  # The backward pass stores both outputs in their own dtype, not in float32.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def mix(gate_N: Array, full_BxLxHxD: Array, compact_BxLxHxD: Array) -> Array:
    ratio = full_BxLxHxD.shape[2] // len(gate_N)
    gate_1x1xHx1 = jnp.repeat(gate_N.astype(jnp.float32), ratio)[None, None, :, None]
    mixed_BxLxHxD = gate_1x1xHx1 * full_BxLxHxD + (1 - gate_1x1xHx1) * compact_BxLxHxD
    return mixed_BxLxHxD.astype(compact_BxLxHxD.dtype)

  def attend(
    q: Array, k: Array, v: Array, caches: None, layer: Array, scores: Array | None = None
  ) -> tuple[Array, None]:
    outputs = [one(q, k, v, caches, layer, scores)[0] for one in (full, compact)]
    return mix(gates_KxN[layer], *outputs), None

  return attend
