"""Products of a few rows with large weights, with the elementwise work of a decoder layer.

A decoder layer for one token of each sequence is, with `scale` of the following norm,

    q, k, v = normed_qkv(n, ...)                 n: `norm_input` of the first layer
    x, n = add_product(x, attention, W_out, scale)
    x, n = add_product(x, normed_swiglu(n, ...), W_down, scale)
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch

# At one row of LLaMA2-7B's shapes a token takes 3 % less time than with XLA's products, at four
# rows 2 % more (H200). Narrower layers are not measured.
_MOST_ROWS, _LEAST_WIDTH = 1, 4096
_LEAST_DIVISOR = 16  # The tile of a weight has at least 16 rows and columns.


class NormInput(NamedTuple):
  """Rows x before RMSNorm, y = x·s/√(mean x² + ε), as the products of y take them.

  Attributes:
    scaled: x·s, in the dtype of x.
    squares: parts of the sum of x² of each row.
  """

  scaled: Float[Array, "B E"]
  squares: Float[Array, "parts B"]


class LayerWeights(NamedTuple):
  """The weights of a decoder layer as matrices [inputs, outputs]; heads are side by side."""

  query: Float[Array, "E HD"]
  key: Float[Array, "E ND"]
  value: Float[Array, "E ND"]
  out: Float[Array, "HD E"]
  gate: Float[Array, "E F"]
  up: Float[Array, "E F"]
  down: Float[Array, "F E"]


def norm_input(x: Float[Array, "B E"], scale: Float[Array, "E"]) -> NormInput:
  """The rows x before the norm with this scale."""
  wide_BxE = x.astype(jnp.float32)
  scaled_BxE = (wide_BxE * scale.astype(jnp.float32)[None]).astype(x.dtype)
  return NormInput(scaled_BxE, jnp.sum(wide_BxE * wide_BxE, axis=1)[None])


def add_product(
  x: Float[Array, "B E"],
  y: Float[Array, "B F"],
  weight: Float[Array, "F E"],
  scale: Float[Array, "E"],
  *,
  implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "B E"], NormInput]:
  """x + y·W, a residual stream with the output of a projection, and its `norm_input`.

  Args:
    x: one row for each sequence, in any float dtype, the dtype of all arrays.
    y: the input of the projection.
    weight: of the projection.
    scale: of the norm that follows, any float dtype.
    implementation: "triton" (Ampere and newer GPUs) or "xla" (any device); a tuple of names in
      order of preference; None for the first that can run the call.

  Returns:
    The sum, added in float32, and the input of the norm.

  Raises:
    ValueError: if a name is unknown.
    NotImplementedError: if no named implementation can run this call; the message says why not.
  """
  out: tuple[Array, NormInput] = dispatch.run("add_product", implementation, x, y, weight, scale)
  return out


def normed_swiglu(
  x: NormInput,
  gate: Float[Array, "E F"],
  up: Float[Array, "E F"],
  *,
  epsilon: float,
  implementation: dispatch.Implementation = None,
) -> Float[Array, "B F"]:
  """silu(y·W_gate) ⊙ y·W_up with y = RMSNorm(x), in float32 until the result.

  Args:
    x: one row for each sequence.
    gate: W_gate, in the dtype of x.
    up: W_up.
    epsilon: ε of RMSNorm.
    implementation: see `add_product`, as the errors.
  """
  out: Array = dispatch.run("normed_swiglu", implementation, x, gate, up, epsilon=epsilon)
  return out


def normed_qkv(
  x: NormInput,
  query: Float[Array, "E HD"],
  key: Float[Array, "E ND"],
  value: Float[Array, "E ND"],
  cos: Float[Array, "B C"],
  sin: Float[Array, "B C"],
  *,
  epsilon: float,
  implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "B HD"], Float[Array, "B ND"], Float[Array, "B ND"]]:
  """RoPE(y·W_q), RoPE(y·W_k) and y·W_v with y = RMSNorm(x), in float32 until the results.

  RoPE rotates channel c with channel c + D/2 of a head.

  Args:
    x: one row for each sequence.
    query: W_q, the heads side by side, in the dtype of x.
    key: W_k.
    value: W_v.
    cos: cosines of the angles of each row's position, float32, C = D/2.
    sin: sines of the same angles.
    epsilon: ε of RMSNorm.
    implementation: see `add_product`, as the errors.
  """
  arrays = (x, query, key, value, cos, sin)
  out: tuple[Array, Array, Array] = dispatch.run(
    "normed_qkv", implementation, *arrays, epsilon=epsilon
  )
  return out


def has_kernels(x: Float[Array, "B E"], cos: Float[Array, "B C"], weights: LayerWeights) -> bool:
  """Whether the Triton kernels run all products of layers with these shapes and dtypes."""
  normed = norm_input(x, jnp.ones(x.shape[1]))
  calls = {
    "normed_qkv": (normed, weights.query, weights.key, weights.value, cos, cos),
    "normed_swiglu": (normed, weights.gate, weights.up),
    "add_product": (x, weights.out, weights.down),
  }
  return all(dispatch.choose(op, None, *args) == "triton" for op, args in calls.items())


def refusal(x: Array | NormInput, *arrays: Array, **_: float) -> str | None:
  """Why the Triton kernels cannot run a call of this file; None if they can."""
  rows = x.scaled if isinstance(x, NormInput) else x
  if str(rows.dtype) not in ("bfloat16", "float32"):
    # In float16 the product of x and the scale of RMSNorm could overflow.
    return f"dtype is {rows.dtype}; it must be bfloat16 or float32"
  if rows.shape[0] > _MOST_ROWS:
    return f"there are {rows.shape[0]} rows; XLA is faster above {_MOST_ROWS}"
  if rows.shape[1] < _LEAST_WIDTH:
    return f"the width is {rows.shape[1]}; the kernels are for {_LEAST_WIDTH} and more"
  sizes = {rows.shape[1], *(array.shape[-1] for array in arrays)}
  odd = sorted(size for size in sizes if size % _LEAST_DIVISOR)
  if odd:
    return f"sizes are {odd}; {_LEAST_DIVISOR} must divide them"
  return None
