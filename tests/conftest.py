"""What every test runs under: strict broadcasting, no deadlines, repeatable examples in CI."""

import os

import hypothesis
import jax
import pytest

# Else the first of several test processes takes three quarters of the GPU's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests compile much and run little.
jax.config.update("jax_disable_most_optimizations", True)

# A first call compiles, which no deadline of an example can allow for.
hypothesis.settings.register_profile("dga", deadline=None, print_blob=True)
hypothesis.settings.register_profile(
  "dga_ci", hypothesis.settings.get_profile("dga"), derandomize=True, database=None
)
hypothesis.settings.load_profile("dga_ci" if os.environ.get("CI") else "dga")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Skips tests marked `gpu` where jax has no GPU."""
  marked = [item for item in items if item.get_closest_marker("gpu")]
  if marked and jax.default_backend() != "gpu":
    for item in marked:
      item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
