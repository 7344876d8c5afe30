"""The order of KV heads in runs with head budgets."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from dga_jax import HeadBudgets, SinkWindow
from dga_jax.model import Decoder
from dga_jax.model.apply_budgets import arrange_heads
from dga_jax.sharding import make_mesh, MeshConfig
from train.config import TrainConfig
from train.head_order import given_budgets
from train.init_from import find_initial, load_params

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


def test_budgets_of_the_config_follow_heads_that_an_earlier_run_moved(
  config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
  unsorted = HeadBudgets(("full", SinkWindow(8)), ((1, 0), (0, 1)))
  own = {"num_heads": 2, "num_kv_heads": 2, "attention": "head_budgets", "head_budgets": unsorted}
  model = Decoder(dataclasses.replace(config.model, **own), rngs=nnx.Rngs(0))
  moved = arrange_heads(model, unsorted)
  assert moved.config.head_budgets.assignment == ((0, 1), (0, 1))
  # Heads that are in the order are not copied.
  again = arrange_heads(moved, moved.config.head_budgets)
  assert again.layers.attention.value[...] is moved.layers.attention.value[...]

  monkeypatch.setattr("train.init_from.load_model", lambda *_, **__: (moved, None, None))
  second = dataclasses.replace(config, model=model.config, init_from="first")
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  got = load_params(second, mesh, given_budgets(second))
  want = nnx.to_pure_dict(nnx.state(moved, nnx.Param))
  jax.tree.map(np.testing.assert_array_equal, got, want)
  others = HeadBudgets(unsorted.settings, ((0, 0), (0, 1)))
  with pytest.raises(ValueError, match=r"config\.model\.head_budgets differs from"):
    load_params(second, mesh, others)
