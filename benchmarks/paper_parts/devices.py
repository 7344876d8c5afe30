"""The device that a part of benchmarks/paper.py needs."""

import jax


def has_gpu(part: str, needs: str) -> bool:
  """Whether the first device is a GPU. Otherwise prints what the part needs.

  Args:
    part: name of the part.
    needs: the device and the memory that the part needs.
  """
  platform = jax.devices()[0].platform
  if platform == "gpu":
    return True
  print(f"Part {part} is left out: it needs {needs}; the device is a {platform.upper()}.")
  return False
