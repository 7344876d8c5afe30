"""The product of rows with weights in 8 bits, and its dispatch."""

import jax
from jaxtyping import Array, Float, Shaped

from pallas_kernels import dispatch

MOST_ROWS = 16  # More rows take their time to compute, not to read the weights.
LEAST_DIVISOR = 16  # The tile of a weight has at least 16 rows and columns.


def quantized_product(
  x: Float[Array, "B K"],
  numbers: Shaped[Array, "T K"],
  scale: Float[Array, "T"],
  *,
  implementation: dispatch.Implementation = None,
) -> Float[Array, "B T"]:
  """y_bt = scale_t · Σ_k x_bk · numbers_tk, summed in float32.

  Every number of the two types is exact in bfloat16, float16 and float32, so the result is that of
  a product with the weights scale_t · numbers_tk, up to the order of the sums.

  Args:
    x: rows, for example one token of each sequence; bfloat16, float16 or float32.
    numbers: int8 or float8_e4m3fn, one row for each output channel.
    scale: of each output channel, float32.
    implementation: "triton" (GPUs; reads the weights in 8 bits; at most 16 rows) or "xla" (any
      device; may write a copy of the weights in the dtype of x); a tuple of names in order of
      preference; None for the first that can run the call.

  Returns:
    [B, T] in the dtype of x.

  Raises:
    ValueError: if a name is unknown.
    NotImplementedError: if no named implementation can run this call; the message says why not.
  """
  out_BxT: Array = dispatch.run("quantized_product", implementation, x, numbers, scale)
  return out_BxT


def refusal(x: jax.Array, numbers: jax.Array, scale: jax.Array) -> str | None:
  """Why the Triton kernel cannot run a call; None if it can."""
  del scale
  if str(x.dtype) not in ("bfloat16", "float16", "float32"):
    return f"dtype is {x.dtype}; it must be bfloat16, float16 or float32"
  if x.shape[0] > MOST_ROWS:
    return f"there are {x.shape[0]} rows; the kernel is for at most {MOST_ROWS}"
  if odd := [size for size in numbers.shape if size % LEAST_DIVISOR]:
    return f"sizes of the weight are {odd}; {LEAST_DIVISOR} must divide them"
  capability = dispatch.find_target(x).capability or 0
  if str(numbers.dtype) == "float8_e4m3fn" and capability < 8.9:
    return "float8_e4m3fn needs a GPU of compute capability 8.9 or newer"
  return None
