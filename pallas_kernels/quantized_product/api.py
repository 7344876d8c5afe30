"""The product of rows with weights in 8 bits, and its dispatch."""

from typing import Any

import jax
from jaxtyping import Array, Float, Shaped

from pallas_kernels import dispatch

MOST_ROWS = 16  # With more rows, arithmetic takes longer than reading the weights.
LEAST_DIVISOR = 16  # The tile of a weight has at least 16 channels and 16 inputs.


def quantized_product(
  x: Float[Array, "B K"],
  numbers: Shaped[Array, "T K"],
  scale: Float[Array, "T"],
  *,
  norm_scale: Float[Array, "K"] | None = None,
  epsilon: float = 0.0,
  swiglu: bool = False,
  residual: Float[Array, "B U"] | None = None,
  implementation: dispatch.Implementation = None,
) -> Float[Array, "B U"]:
  """The product of rows with a weight in 8 bits, and elementwise operations of a layer around it.

  With n = norm_scale · x / √(mean x² + ε) (RMSNorm) or n = x, the product is

      y_bt = scale_t · Σ_k n_bk · numbers_tk

  in float32. The result is residual + y, or with `swiglu` residual + silu(y_gate) ⊙ y_up, where the
  first half of the output channels is the gate. Every number of the two types is exact in bfloat16,
  float16 and float32, so y is the product with the weights scale_t · numbers_tk, up to the order of
  the sums.

  Args:
    x: rows, for example one token of each sequence; bfloat16, float16 or float32.
    numbers: int8 or float8_e4m3fn, one row for each of the T output channels.
    scale: of each output channel, float32.
    norm_scale: of RMSNorm; None for no norm.
    epsilon: ε of RMSNorm.
    swiglu: whether the output channels are gates and values of SwiGLU; the result has U = T/2
      channels, else U = T.
    residual: added to the result, in the dtype of x; None for no sum.
    implementation: "triton" (GPUs; reads the weights in 8 bits; at most 16 rows) or "xla" (any
      device; may write a copy of the weights in the dtype of x); a tuple of names in order of
      preference; None for the first that can run the call.

  Returns:
    [B, U] in the dtype of x.

  Raises:
    ValueError: if a name is unknown.
    NotImplementedError: if no named implementation can run this call; the message says why not.
  """
  options = {
    "norm_scale": norm_scale,
    "epsilon": epsilon,
    "swiglu": swiglu,
    "residual": residual,
  }
  out: Array = dispatch.run("quantized_product", implementation, x, numbers, scale, **options)
  return out


def refusal(x: jax.Array, numbers: jax.Array, *arrays: Any, **options: Any) -> str | None:
  """Why the Triton kernel cannot run a call; None if it can."""
  del arrays, options
  if str(x.dtype) not in ("bfloat16", "float16", "float32"):
    return f"dtype is {x.dtype}; it must be bfloat16, float16 or float32"
  if x.shape[0] > MOST_ROWS:
    return f"there are {x.shape[0]} rows; the kernel is for at most {MOST_ROWS}"
  T, K = numbers.shape
  if T % (2 * LEAST_DIVISOR) or K % LEAST_DIVISOR:
    return (
      f"the weight has {T} outputs and {K} inputs; {2 * LEAST_DIVISOR} must divide the outputs and"
      f" {LEAST_DIVISOR} the inputs"
    )
  capability = dispatch.find_target(x).capability or 0
  if str(numbers.dtype) == "float8_e4m3fn" and capability < 8.9:
    return "float8_e4m3fn needs a GPU of compute capability 8.9 or newer"
  return None
