"""Lowering and compiling for an H100 on a machine without one."""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import pytest

from benchmarks._aot_gpu import abstract_mesh, compile_for_h100

__all__ = ["abstract_mesh", "compile_for_h100", "lower_for_h100", "needs_cuda_compiler"]

needs_cuda_compiler = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None,
  reason="needs jax-cuda13-plugin and jax-cuda13-pjrt (no GPU)",
)


def lower_for_h100(function: Callable[..., Any], *args: Any, devices: int = 1) -> str:
  """The StableHLO text of a function lowered for H100s. Its kernels are lowered, not compiled."""
  with jax.sharding.use_abstract_mesh(abstract_mesh(devices)):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
