"""Lowering and compiling for TPUs on a machine without one."""

from collections.abc import Callable
from typing import Any

import jax

from benchmarks._aot_tpu import abstract_mesh, CHIPS, compile_for_tpu

__all__ = ["TOPOLOGIES", "abstract_mesh", "compile_for_tpu", "lower_for_tpu"]

TOPOLOGIES = tuple(CHIPS)


def lower_for_tpu(
  function: Callable[..., Any], *args: Any, device_kind: str = "TPU v5 lite", devices: int = 1
) -> str:
  """The StableHLO text of a function lowered for TPUs, without libtpu. Kernels are not compiled."""
  with jax.sharding.use_abstract_mesh(abstract_mesh(device_kind, devices=devices)):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
