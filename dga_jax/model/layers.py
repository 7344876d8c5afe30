"""The parts of one decoder layer: weights with logical axis names, SelfAttention, SwiGLU."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from dga_jax.model.config import ModelConfig
from dga_jax.model.focal_selector import focal_scores, selector_features
from dga_jax.model.rope import apply_rope, RopeTable
from dga_jax.sharding import constrain, fsdp_all_gather
from pallas_kernels.rms_norm import rms_norm as normalise_sum

# (q_BxLxHxD, k_BxLxNxD, v_BxLxNxD), rotated by position, and the focal scores [B, L, N] of a layer
# with a selector -> (o_BxLxHxD, updated cache or None).
Attend = Callable[..., tuple[Array, Any]]


# The backward pass stores the inputs of elementwise operations alone, whatever `remat` is: the
# intermediate values, some of them float32, would take half of a layer's memory, and more time to
# write and read than to recompute. Layers run in a scan, so XLA cannot merge the recomputation with
# the forward pass, and preventing it would only cost time. With `ModelConfig.unroll_layers` XLA may
# merge them where it has the memory.
_recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


def axis_names(*names: str) -> dict[str, Any]:
  """Parameter metadata that names each axis; `dga_jax.sharding` maps the names to mesh axes.

  Parameters are not sharded on creation ("eager" in Flax), so that creating a model needs no mesh.
  `nnx.get_partition_spec` reads the names.
  """
  return {"out_sharding": names, "eager_sharding": False}


def weight(
  config: ModelConfig,
  shape: tuple[int, ...],
  names: tuple[str, ...],
  *,
  inputs: tuple[int, ...],
  variance: float = 1.0,
  rngs: nnx.Rngs,
) -> nnx.Param[Array]:
  """A weight drawn from a normal truncated at two deviations, of variance `variance`/fan_in.

  Args:
    config: its param_dtype is the dtype of the weight.
    shape: of the weight.
    names: the logical name of each axis.
    inputs: the axes that the product sums over; fan_in is their size.
    variance: of an output whose inputs have variance 1.
    rngs: source of the `params` key.
  """
  init = jax.nn.initializers.variance_scaling(
    variance,
    "fan_in",
    "truncated_normal",
    in_axis=inputs,
    out_axis=tuple(axis for axis in range(len(shape)) if axis not in inputs),
  )
  value = init(rngs.params(), shape, jnp.dtype(config.param_dtype))
  return nnx.Param(value, **axis_names(*names))


def bias(config: ModelConfig, shape: tuple[int, ...], names: tuple[str, ...]) -> nnx.Param[Array]:
  """A bias, initialised to 0, with the logical name of each axis."""
  return nnx.Param(jnp.zeros(shape, jnp.dtype(config.param_dtype)), **axis_names(*names))


def gather_weight(parameter: nnx.Param[Array], dtype: DTypeLike) -> Array:
  """A weight in the compute dtype, gathered over the mesh axes that only shard its storage.

  Heads and the MLP's width stay sharded. The cast precedes the communication.
  """
  value = parameter[...].astype(dtype)
  # The weights of one of the stacked layers lack the axis "layers", which is named first.
  names = parameter.get_metadata()["out_sharding"][-value.ndim :]
  return fsdp_all_gather(value, tuple(names))


def constrain_residual(x_BxLxE: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
  """The residual stream, sharded as it is stored between layers for the backward pass."""
  return constrain(x_BxLxE, "batch", "residual_length", None)


def residual_variance(config: ModelConfig) -> float:
  """Variance of the projections that write to the residual stream: 1/(2·num_layers).

  The stream is the sum of 2·num_layers such outputs. With this variance the sum has variance 1 at
  any depth (Radford et al., 2019, GPT-2).
  """
  return 1.0 / (2 * config.num_layers)


def rms_norm(
  config: ModelConfig, axis: Literal["embed", "head_dim"] = "embed", *, rngs: nnx.Rngs
) -> nnx.RMSNorm:
  """RMSNorm (Zhang and Sennrich, arXiv 1910.07467), y = x/√(mean x² + ε)·scale.

  Statistics and result are float32; the caller casts the result.

  Args:
    config: ε, the dtype of the stored scale and the size of the axis.
    axis: the name of the last axis, over which the mean is taken.
    rngs: required by Flax; nothing is drawn.
  """
  return nnx.RMSNorm(
    config.embed_dim if axis == "embed" else config.head_dim,
    epsilon=config.norm_eps,
    dtype=jnp.float32,
    param_dtype=jnp.dtype(config.param_dtype),
    scale_metadata=axis_names(axis),
    rngs=rngs,
  )


class SelfAttention(nnx.Module):
  """Projections around attention: query, key, value and output.

  In this order: biases are added to query, key and value (config.qkv_bias), query and key are
  normalised over the channels of each head (config.qk_norm), the selector scores the tokens
  (config.focal_selector, see `focal_scores`), and query and key are rotated by position.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
    self.config = config
    self.dtype = jnp.dtype(config.dtype)
    E, H, N, D = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    kv_names = ("embed", "kv_heads", "head_dim")
    self.query = weight(config, (E, H, D), ("embed", "heads", "head_dim"), inputs=(0,), rngs=rngs)
    self.key = weight(config, (E, N, D), kv_names, inputs=(0,), rngs=rngs)
    self.value = weight(config, (E, N, D), kv_names, inputs=(0,), rngs=rngs)
    self.out = weight(
      config,
      (H, D, E),
      ("heads", "head_dim", "embed"),
      inputs=(0, 1),
      variance=residual_variance(config),
      rngs=rngs,
    )
    if config.qkv_bias:
      self.query_bias = bias(config, (H, D), ("heads", "head_dim"))
      self.key_bias = bias(config, (N, D), kv_names[1:])
      self.value_bias = bias(config, (N, D), kv_names[1:])
    if config.qk_norm:
      self.query_norm = rms_norm(config, "head_dim", rngs=rngs)
      self.key_norm = rms_norm(config, "head_dim", rngs=rngs)

    if config.focal_selector:
      zeros = jnp.zeros((N, selector_features(D)), jnp.dtype(config.param_dtype))
      self.selector = nnx.Param(zeros, **axis_names("kv_heads", "selector"))

  def __call__(
    self, x_BxLxE: Float[Array, "B L E"], rope: RopeTable, attend: Attend
  ) -> tuple[Float[Array, "B L E"], Any]:
    """Projects, rotates, attends, and projects back; also returns the second result of `attend`."""
    q_BxLxHxD = jnp.einsum("BLE,EHD->BLHD", x_BxLxE, gather_weight(self.query, self.dtype))
    k_BxLxNxD = jnp.einsum("BLE,END->BLND", x_BxLxE, gather_weight(self.key, self.dtype))
    v_BxLxNxD = jnp.einsum("BLE,END->BLND", x_BxLxE, gather_weight(self.value, self.dtype))
    o_BxLxHxD, cache = self.mix(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, rope, attend)
    out_BxLxE = jnp.einsum("BLHD,HDE->BLE", o_BxLxHxD, gather_weight(self.out, self.dtype))
    return out_BxLxE, cache

  def mix(
    self,
    q_BxLxHxD: Float[Array, "B L H D"],
    k_BxLxNxD: Float[Array, "B L N D"],
    v_BxLxNxD: Float[Array, "B L N D"],
    rope: RopeTable,
    attend: Attend,
  ) -> tuple[Float[Array, "B L H D"], Any]:
    """Adds biases to the products, normalises, rotates and attends; see `__call__`."""
    if self.config.qkv_bias:
      q_BxLxHxD = q_BxLxHxD + gather_weight(self.query_bias, self.dtype)[None, None]
      k_BxLxNxD = k_BxLxNxD + gather_weight(self.key_bias, self.dtype)[None, None]
      v_BxLxNxD = v_BxLxNxD + gather_weight(self.value_bias, self.dtype)[None, None]
    if self.config.qk_norm:
      q_BxLxHxD = self.query_norm(q_BxLxHxD).astype(self.dtype)
      k_BxLxNxD = self.key_norm(k_BxLxNxD).astype(self.dtype)
    scores = []
    if self.config.focal_selector:
      scores = [focal_scores(k_BxLxNxD, v_BxLxNxD, gather_weight(self.selector, jnp.float32))]
    q_BxLxHxD, k_BxLxNxD = apply_rope(q_BxLxHxD, rope), apply_rope(k_BxLxNxD, rope)
    return attend(q_BxLxHxD, k_BxLxNxD, v_BxLxNxD, *scores)


class SwiGLU(nnx.Module):
  """SwiGLU (Shazeer, arXiv 2002.05202): (silu(x·W_gate) ⊙ x·W_up)·W_down."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
    self.dtype = jnp.dtype(config.dtype)
    E, F = config.embed_dim, config.mlp_dim
    self.gate = weight(config, (E, F), ("embed", "mlp"), inputs=(0,), rngs=rngs)
    self.up = weight(config, (E, F), ("embed", "mlp"), inputs=(0,), rngs=rngs)
    self.down = weight(
      config,
      (F, E),
      ("mlp", "embed"),
      inputs=(0,),
      variance=residual_variance(config),
      rngs=rngs,
    )

  def __call__(self, x_BxLxE: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
    """The equation of the class, in the compute dtype."""
    gate_BxLxF = jnp.einsum("BLE,EF->BLF", x_BxLxE, gather_weight(self.gate, self.dtype))
    up_BxLxF = jnp.einsum("BLE,EF->BLF", x_BxLxE, gather_weight(self.up, self.dtype))
    return _down(gate_BxLxF, up_BxLxF, gather_weight(self.down, self.dtype))


@_recomputed
def _down(gate_BxLxF: Array, up_BxLxF: Array, down_FxE: Array) -> Array:
  inner_BxLxF = constrain(jax.nn.silu(gate_BxLxF) * up_BxLxF, "batch", "length", "mlp")
  return jnp.einsum("BLF,FE->BLE", inner_BxLxF, down_FxE)


class DecoderLayer(nnx.Module):
  """x + attention(norm(x)), then x + SwiGLU(norm(x)), in the compute dtype."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
    self.dtype = jnp.dtype(config.dtype)
    self.attention_norm = rms_norm(config, rngs=rngs)
    self.attention = SelfAttention(config, rngs=rngs)
    self.mlp_norm = rms_norm(config, rngs=rngs)
    self.mlp = SwiGLU(config, rngs=rngs)

  def __call__(
    self, x_BxLxE: Float[Array, "B L E"], rope: RopeTable, attend: Attend
  ) -> tuple[Float[Array, "B L E"], Any]:
    """The layer's output, and the second result of `attend`."""
    normed_BxLxE = self._norm(self.attention_norm, x_BxLxE)
    attended_BxLxE, cache = self.attention(normed_BxLxE, rope, attend)
    x_BxLxE = x_BxLxE + constrain_residual(attended_BxLxE)
    return x_BxLxE + constrain_residual(self.mlp(self._norm(self.mlp_norm, x_BxLxE))), cache

  def with_update(
    self,
    x_BxLxE: Float[Array, "B L E"],
    update_BxLxE: Float[Array, "B L E"] | None,
    rope: RopeTable,
    attend: Attend,
  ) -> tuple[Float[Array, "B L E"], Float[Array, "B L E"] | None, Any]:
    """The layer applied to x + update, for decoding: each sum is computed with the norm after it.

    Args:
      x_BxLxE: the residual stream without the update.
      update_BxLxE: the part of the stream that the layer before adds; None for none.
      rope: rotary angles of the tokens.
      attend: see `__call__`.

    Returns:
      The layer's output as two summands, of which the second may be None, and the second result of
      `attend`.
    """
    x_BxLxE, normed_BxLxE = self._sum_and_norm(self.attention_norm, x_BxLxE, update_BxLxE)
    attended_BxLxE, cache = self.attention(normed_BxLxE, rope, attend)
    x_BxLxE, normed_BxLxE = self._sum_and_norm(
      self.mlp_norm, x_BxLxE, constrain_residual(attended_BxLxE)
    )
    return x_BxLxE, constrain_residual(self.mlp(normed_BxLxE)), cache

  def _sum_and_norm(
    self, norm: nnx.RMSNorm, x_BxLxE: Array, update_BxLxE: Array | None
  ) -> tuple[Array, Array]:
    scale: Any = norm.scale  # Flax allows a norm without a scale.
    x_BxLxE, normed_BxLxE = normalise_sum(
      x_BxLxE, scale[...], epsilon=norm.epsilon, update=update_BxLxE
    )
    return x_BxLxE, constrain(normed_BxLxE, "batch", "length", None)

  def _norm(self, norm: nnx.RMSNorm, x_BxLxE: Array) -> Array:
    normed = _recomputed(lambda x_BxLxE: norm(x_BxLxE).astype(self.dtype))(x_BxLxE)
    # The products take arrays that are sharded by batch and length alone.
    return constrain(normed, "batch", "length", None)
