"""RMSNorm with the residual sum before it, and its dispatch."""

from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels import dispatch

MOST_ROWS = 64  # With more rows, XLA's kernels are limited by memory, not by their launches.
MOST_CHANNELS = 16384  # A program holds a row in registers.


def rms_norm(
  x: Float[Array, "*S E"],
  scale: Float[Array, "E"],
  *,
  epsilon: float,
  update: Float[Array, "*S E"] | None = None,
  implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "*S E"], Float[Array, "*S E"]]:
  """The sum y = x + update and RMSNorm of it (Zhang and Sennrich, arXiv 1910.07467).

  y is rounded to the dtype of x. RMSNorm, y/√(mean y² + ε)·scale, is computed in float32.

  Args:
    x: the residual stream; bfloat16, float16 or float32.
    scale: of each channel, any floating-point dtype.
    epsilon: ε.
    update: added to x, in its dtype; None for y = x.
    implementation: "triton" (GPUs; one kernel; at most 64 rows) or "xla" (any device); a tuple of
      names in order of preference; None for the first that can run the call.

  Returns:
    (y, RMSNorm of y), in the dtype of x.

  Raises:
    ValueError: if a name is unknown.
    NotImplementedError: if no named implementation can run this call; the message says why not.
  """
  results: tuple[Array, Array] = dispatch.run(
    "rms_norm", implementation, x, scale, epsilon=epsilon, update=update
  )
  return results


def refusal(x: jax.Array, scale: jax.Array, **options: Any) -> str | None:
  """Why the Triton kernel cannot run a call; None if it can."""
  del scale, options
  *_, channels = x.shape
  rows = x.size // max(1, channels)
  if str(x.dtype) not in ("bfloat16", "float16", "float32"):
    return f"dtype is {x.dtype}; it must be bfloat16, float16 or float32"
  if not 1 <= rows <= MOST_ROWS:
    return f"there are {rows} rows; the kernel is for 1 to {MOST_ROWS}"
  if channels > MOST_CHANNELS:
    return f"there are {channels} channels; the kernel is for at most {MOST_CHANNELS}"
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size > 1 and not mesh.are_all_axes_manual:
    return "the compiler partitions the arrays over several devices"
  return None
