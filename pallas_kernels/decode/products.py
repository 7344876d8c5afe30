"""Products of a few rows with large weights, with the elementwise work of a decoder layer."""

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels import dispatch

_MOST_ROWS = 64  # More rows do not fit a program's registers.
_LEAST_DIVISOR = 16  # The tile of a weight has at least 16 rows and columns.


def add_product(
  x: Float[Array, "B E"],
  y: Float[Array, "B F"],
  weight: Float[Array, "F E"],
  *,
  implementation: dispatch.Implementation = None,
) -> Float[Array, "B E"]:
  """x + y·W, a residual stream with the output of a projection.

  The "triton" backend adds in float32; "xla" rounds the product first.

  Args:
    x: one row for each sequence, in any float dtype, the dtype of all arrays.
    y: the input of the projection.
    weight: of the projection.
    implementation: "triton" (Ampere and newer GPUs) or "xla" (any device); a tuple of names in
      order of preference; None for the first that can run the call.

  Raises:
    ValueError: if a name is unknown.
    NotImplementedError: if no named implementation can run this call; the message says why not.
  """
  out: Array = dispatch.run("add_product", implementation, x, y, weight)
  return out


def normed_swiglu(
  x: Float[Array, "B E"],
  scale: Float[Array, "E"],
  gate: Float[Array, "E F"],
  up: Float[Array, "E F"],
  *,
  epsilon: float,
  implementation: dispatch.Implementation = None,
) -> Float[Array, "B F"]:
  """silu(y·W_gate) ⊙ y·W_up with y = x·scale/√(mean x² + ε): RMSNorm and the start of SwiGLU.

  RMSNorm is computed in float32.

  Args:
    x: one row for each sequence, in any float dtype, the dtype of the weights.
    scale: of RMSNorm, any float dtype.
    gate: W_gate.
    up: W_up.
    epsilon: ε.
    implementation: see `add_product`, as the errors.
  """
  out: Array = dispatch.run("normed_swiglu", implementation, x, scale, gate, up, epsilon=epsilon)
  return out


def normed_qkv(
  x: Float[Array, "B E"],
  scale: Float[Array, "E"],
  query: Float[Array, "E HD"],
  key: Float[Array, "E ND"],
  value: Float[Array, "E ND"],
  cos: Float[Array, "B C"],
  sin: Float[Array, "B C"],
  *,
  epsilon: float,
  implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "B HD"], Float[Array, "B ND"], Float[Array, "B ND"]]:
  """RoPE(y·W_q), RoPE(y·W_k) and y·W_v with y = x·scale/√(mean x² + ε).

  RMSNorm and RoPE are computed in float32. RoPE rotates channel c with channel c + D/2 of a head.

  Args:
    x: one row for each sequence, in any float dtype, the dtype of the weights.
    scale: of RMSNorm, any float dtype.
    query: W_q, the heads side by side.
    key: W_k.
    value: W_v.
    cos: cosines of the angles of each row's position, float32, C = D/2.
    sin: sines of the same angles.
    epsilon: ε.
    implementation: see `add_product`, as the errors.
  """
  arrays = (x, scale, query, key, value, cos, sin)
  out: tuple[Array, Array, Array] = dispatch.run(
    "normed_qkv", implementation, *arrays, epsilon=epsilon
  )
  return out


def refusal(x: Array, *arrays: Array, **options: Any) -> str | None:
  """Why the Triton kernels cannot run a call of this file; None if they can."""
  del options
  if str(x.dtype) not in ("bfloat16", "float32"):
    # In float16 the product of x and the scale of RMSNorm could overflow.
    return f"dtype is {x.dtype}; it must be bfloat16 or float32"
  if len(x) > _MOST_ROWS:
    return f"there are {len(x)} rows; at most {_MOST_ROWS} fit a program's registers"
  sizes = {size for array in arrays if array.ndim == 2 for size in array.shape[1:]}
  odd = sorted(size for size in sizes | {x.shape[1]} if size % _LEAST_DIVISOR)
  if odd:
    return f"sizes are {odd}; {_LEAST_DIVISOR} must divide them"
  return None
