"""Runs the decoder's layers: stacked parameters in one scan, or unstacked ones in a loop."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dga_jax.model.config import RematName
from dga_jax.model.layers import Attend, constrain_residual, DecoderLayer
from dga_jax.model.rope import RopeTable

# (q, k, v, caches of all layers or None, layer, and focal scores if the layers have a selector) ->
# (output, updated caches; or where there are no caches, what is stacked over layers). The layer is
# an index, or from `AttentionKind.layer_index`.
LayerAttend = Callable[..., tuple[Array, Any]]
# (parameters of one layer, x, caches, layer) -> (x, second result of LayerAttend).
_RunLayer = Callable[[Any, Array, Any, Any], tuple[Array, Any]]

_REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def run_stacked(
  layers: DecoderLayer,
  x_BxLxE: Float[Array, "B L E"],
  rope: RopeTable,
  attend: LayerAttend,
  caches: Any,
  *,
  num_layers: int,
  remat: RematName,
  unroll: bool = False,
) -> tuple[Float[Array, "B L E"], Any]:
  """Runs layers whose parameters are stacked: one loop, or with `unroll` code for each layer.

  Args:
    layers: parameters with a leading axis of layers.
    x_BxLxE: the residual stream.
    rope: rotary angles of the tokens.
    attend: mixes positions, and updates or makes caches.
    caches: of all layers, stacked, or None. The scan carries them and updates them in place;
      scanning over them would copy them.
    num_layers: how many layers are stacked.
    remat: see `ModelConfig.remat`.
    unroll: see `ModelConfig.unroll_layers`.

  Returns:
    The residual stream, and the updated or the stacked new caches.
  """
  structure, params = nnx.split(layers)
  run_layer = _runner(structure, rope, attend)

  def step(carry: tuple[Array, Any], xs: tuple[Any, Array]) -> tuple[tuple[Array, Any], Any]:
    (x_BxLxE, caches), (layer_params, index) = carry, xs
    x_BxLxE, new = run_layer(layer_params, x_BxLxE, caches, index)
    return ((x_BxLxE, None), new) if caches is None else ((x_BxLxE, new), None)

  if remat != "none":
    # The forward and backward scans are separate loops, whose work XLA cannot merge: preventing it
    # would only cost time. Without loops XLA would merge the recomputation with the forward pass.
    step = jax.checkpoint(step, policy=_REMAT_POLICIES[remat], prevent_cse=unroll)
  layers_and_indices = (params, jnp.arange(num_layers))
  (x_BxLxE, updated), stacked = jax.lax.scan(
    step, (x_BxLxE, caches), layers_and_indices, unroll=num_layers if unroll else 1
  )
  return x_BxLxE, stacked if caches is None else updated


def run_unstacked(
  layers: Iterable[DecoderLayer],
  x_BxLxE: Float[Array, "B L E"],
  rope: RopeTable,
  attend: LayerAttend,
  caches: Any,
  layer_index: Callable[[int], Any],
) -> tuple[Float[Array, "B L E"], Any]:
  """As `run_stacked`, for layers that have parameters of their own; without remat.

  Args:
    layers: one after the other.
    x_BxLxE: the residual stream.
    rope: rotary angles of the tokens.
    attend: as for `run_stacked`.
    caches: as for `run_stacked`.
    layer_index: the layer argument of `attend`, see `AttentionKind.layer_index`.
  """
  structures, params = zip(*(nnx.split(layer) for layer in layers), strict=True)

  @jax.jit  # Traced once, for all layers with the same static part of the index.
  def run_layer(
    params: Any, x_BxLxE: Array, update_BxLxE: Array | None, caches: Any, index: Any
  ) -> tuple[Array, Array | None, Any]:
    layer = nnx.merge(structures[0], params)
    return layer.with_update(x_BxLxE, update_BxLxE, rope, _at_layer(attend, caches, index))

  made, update_BxLxE = [], None
  for index, layer_params in enumerate(params):
    # Makes the next layer wait for this layer's cache. Without it all layers' keys and values, of
    # which a cache keeps a part, could be alive at once.
    x_BxLxE, update_BxLxE, new = jax.lax.optimization_barrier(
      run_layer(layer_params, x_BxLxE, update_BxLxE, caches, layer_index(index))
    )
    if caches is None:
      made.append(new)
    else:
      caches = new
  if update_BxLxE is not None:
    x_BxLxE = constrain_residual(x_BxLxE + update_BxLxE)
  return x_BxLxE, jax.tree.map(lambda *x: jnp.stack(x), *made) if caches is None else caches


def _runner(structure: nnx.GraphDef, rope: RopeTable, attend: LayerAttend) -> _RunLayer:
  def run_layer(params: Any, x_BxLxE: Array, caches: Any, index: Any) -> tuple[Array, Any]:
    x_BxLxE, new = nnx.merge(structure, params)(x_BxLxE, rope, _at_layer(attend, caches, index))
    return constrain_residual(x_BxLxE), new

  return run_layer


def _at_layer(attend: LayerAttend, caches: Any, index: Any) -> Attend:
  """`attend` of one layer."""
  return lambda q, k, v, *scores: attend(q, k, v, caches, index, *scores)
