"""The order of KV heads in runs with head budgets."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dga_jax import HeadBudgets
from dga_jax.sharding import MeshConfig
from train.config import TrainConfig
from train.init_from import find_initial

ROOT = Path(__file__).parents[2]


def test_devices_that_split_heads_have_equal_shares_and_the_losses_of_one_device(
  tmp_path: Path,
) -> None:
  """Devices are counted when jax starts, so this takes a process of its own."""
  flags = "--xla_force_host_platform_device_count=4"
  environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  golden = ROOT / "tests" / "golden" / "hugging_face" / "llama2"
  done = subprocess.run(
    [sys.executable, "-m", "tests.train.check_head_order", golden, tmp_path],
    check=False,
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]


def test_a_mesh_that_does_not_divide_the_heads_is_refused(
  config: TrainConfig, tmp_path: Path
) -> None:
  path = tmp_path / "budgets.json"
  path.write_text(HeadBudgets(("full",), ((0, 0, 0),) * 2).to_json())
  config = dataclasses.replace(config, budgets=str(path), mesh=MeshConfig(data=1, tensor=2))
  with pytest.raises(ValueError, match=r"config\.mesh\.tensor is 2; it must divide the 3 KV heads"):
    find_initial(config, None, devices=2)
