"""Settings of all tests: annotation checks, strict broadcasting, repeatable examples in CI."""

import gc
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import compilation_cache

compilation_cache.share()  # Before jax is imported.

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402

from tests import annotations  # noqa: E402

annotations.install()  # Before our packages are imported.

# Without this setting the first of several test processes reserves 3/4 of the GPU's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests compile many programs and run each for a short time, also in their subprocesses.
jax.config.update("jax_disable_most_optimizations", True)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# A stack trace for each operation takes a fifth of the time that tracing and lowering need.
jax.config.update("jax_traceback_in_locations_limit", 0)
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# The first example includes compilation, so examples have no deadline.
hypothesis.settings.register_profile("dga", deadline=None, print_blob=True)
hypothesis.settings.register_profile(
  "dga_ci", hypothesis.settings.get_profile("dga"), derandomize=True, database=None
)
hypothesis.settings.load_profile("dga_ci" if os.environ.get("CI") else "dga")


def pytest_configure(config: pytest.Config) -> None:
  """Disables the cache of programs for `aot` tests: it cannot load those of an absent device.

  JAX reads the setting once, when it compiles its first program; importing a test file may.
  """
  if "aot" in config.option.markexpr:
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    jax.config.update("jax_enable_compilation_cache", False)


def pytest_collection_finish(session: pytest.Session) -> None:
  """Collects garbage rarely: each collection visits the objects of all modules and all programs."""
  del session
  gc.collect()
  gc.freeze()
  gc.set_threshold(100_000, 20, 50)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
  """Skips tests marked `gpu` without a GPU, and `nightly`, `wheel` and `aot` unless selected."""
  if jax.default_backend() != "gpu":
    _skip(items, "gpu", "needs an NVIDIA GPU")
  if "nightly" not in config.option.markexpr:
    _skip(items, "nightly", "slow or random: python -m pytest -m nightly")
  if "wheel" not in config.option.markexpr:
    _skip(items, "wheel", "installs packages: ./workspace test-wheel")
  if "aot" not in config.option.markexpr:
    _skip(items, "aot", "takes minutes: ./workspace test-aot")
  elif importlib.util.find_spec("libtpu") is None:
    _skip(items, "aot", "needs libtpu, which ./workspace test-aot installs")


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
  for item in items:
    if item.get_closest_marker(marker):
      item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module", autouse=True)
def _clear_caches_before_the_mapping_limit() -> Iterator[None]:
  """Clears JAX's caches, because programs use memory mappings and Linux allows 65 530 of them.

  Half the tests make about 25 000 mappings, and to clear them takes 20 seconds.
  """
  yield
  mappings = Path("/proc/self/maps")
  if mappings.exists() and mappings.read_bytes().count(b"\n") > 45_000:
    jax.clear_caches()


def pytest_runtest_setup(item: pytest.Item) -> None:
  """Annotations are checked, but in tests of the errors that wrong arguments raise."""
  unchecked = item.get_closest_marker("invalid_arguments") is not None
  jaxtyping.config.update("jaxtyping_disable", unchecked)
