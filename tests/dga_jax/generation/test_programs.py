"""The compiler options of decoding on each device."""

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from dga_jax.generation.programs import decode_options


def options_for(kind: str, platform: str) -> dict[str, bool | int]:
  device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
  mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    return decode_options()


@pytest.mark.parametrize(
  ("kind", "platform", "merged"),
  [
    ("NVIDIA H100 80GB HBM3", "gpu", True),
    ("NVIDIA A100-SXM4-40GB", "gpu", True),
    ("Tesla V100-SXM2-16GB", "gpu", False),  # XLA has no Triton products for it
    ("TPU v5", "tpu", False),
  ],
)
def test_products_are_merged_on_gpus_from_ampere_on(kind: str, platform: str, merged: bool):
  assert bool(options_for(kind, platform)) is merged


def test_xla_knows_the_options():
  options = options_for("NVIDIA H100 80GB HBM3", "gpu")
  compiled = jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options=options)
  assert compiled(1.0) == 2.0
