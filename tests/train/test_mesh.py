"""Meshes: axis sizes, the sharding of batches, and train steps on eight simulated devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from dga_jax.sharding import (
  make_mesh,
  MESH_AXES,
  MeshConfig,
  partition_spec,
  ShardingRules,
  zigzag_order,
)
from train.sharding import process_share, shard_batch

ROOT = Path(__file__).parents[2]


def run_on_eight(*arguments: str) -> None:
  """Runs check_mesh in a subprocess, because JAX fixes the number of devices when it starts."""
  flags = "--xla_force_host_platform_device_count=8"
  environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-m", "tests.train.check_mesh", *arguments]
  done = subprocess.run(
    command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-3000:]


def test_loss_and_gradients_equal_those_of_one_device() -> None:
  """Checks some shapes. `python -m tests.train.check_mesh streaming all` checks all twenty."""
  run_on_eight("streaming", "[(2, 2, 1, 2)]")


def test_a_sharded_step_gathers_only_weights_residual_and_summaries() -> None:
  run_on_eight("step")


@pytest.mark.parametrize(
  ("config", "devices", "sizes"),
  [
    (MeshConfig(), 1, (1, 1, 1, 1)),
    (MeshConfig(), 8, (8, 1, 1, 1)),
    (MeshConfig(data=2, fsdp=-1, context=2), 8, (2, 2, 1, 2)),
  ],
)
def test_an_axis_of_minus_1_takes_the_remaining_devices(
  config: MeshConfig, devices: int, sizes: tuple[int, ...]
) -> None:
  assert config.sizes(devices) == sizes


@pytest.mark.parametrize(
  ("sizes", "devices", "message"),
  [
    ((1, 3, 1, 1), 8, "fsdp=3 .* there are 8 devices"),
    ((-1, 3, 1, 1), 8, "fsdp=3 .* there are 8 devices"),
    ((2, 2, 2, 2), 8, "there are 8 devices"),
    ((-1, -1, 1, 1), 8, "at most one axis may be -1"),
    ((1, 0, 1, 1), 8, "config.mesh.fsdp is 0"),
    ((1, 1, True, 1), 8, "config.mesh.tensor is True"),
  ],
)
def test_invalid_sizes_are_errors(sizes: tuple[int, ...], devices: int, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    MeshConfig(*sizes).sizes(devices)


def abstract(*sizes: int) -> AbstractMesh:
  return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def test_rules() -> None:
  mesh, rules = abstract(2, 2, 2, 4), ShardingRules()
  names, shape = ("layers", "embed", "mlp"), (3, 16, 6)
  assert partition_spec(names, shape, mesh, rules.parameters) == jax.P(
    None, ("fsdp", "context"), "tensor"
  )
  assert partition_spec(names, (3, 6, 5), mesh, rules.parameters) == jax.P(None, "fsdp", None)
  spec = partition_spec(("batch", "length", None), (4, 8, 3), mesh, rules.activations)
  assert spec == jax.P(("data", "fsdp"), "context", None)
  whole = partition_spec(("embed", "mlp"), (4, 4), abstract(8, 1, 1, 1), rules.parameters)
  assert whole == jax.P(None, None)


def test_zigzag_order_gives_each_shard_an_early_and_a_late_chunk() -> None:
  assert zigzag_order(12) is None
  with jax.sharding.use_abstract_mesh(abstract(1, 1, 1, 3)):
    order = zigzag_order(12)
    with pytest.raises(ValueError, match="must be a multiple of 6"):
      zigzag_order(9)
  assert order is not None
  assert order.tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
  # The work of a query is proportional to its position, so all shards have equal work.
  assert len(set(order.reshape(3, -1).sum(axis=1))) == 1


def test_a_batch_is_padded_with_rows_without_loss() -> None:
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  assert process_share(mesh) == (0, 1)
  batch = {
    "inputs": np.ones((3, 5), np.int32),
    "segment_ids": np.ones((3, 5), np.int32),
    "loss_mask": np.ones((3, 5), bool),
  }
  sharded = shard_batch(batch, mesh, micro_batches=2)
  assert {x.shape for x in sharded.values()} == {(4, 5)}
  np.testing.assert_array_equal(sharded["segment_ids"][:, 0], [1, 1, 1, -1])
  np.testing.assert_array_equal(sharded["loss_mask"][:, 0], [True, True, True, False])
