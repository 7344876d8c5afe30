"""Training of gates: what moves, what stays, the mean, resuming, and the budgets that result."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dga_jax import DGAConfig
from dga_jax.checkpoint import abstract_decoder, load_model, load_model_config
from dga_jax.head_budgets import HeadBudgets, read_head_budgets, SinkWindow
from dga_jax.model.flops import mean_head_keys
from dga_jax.sharding import make_mesh
from train.config import TrainConfig
from train.gates import GATES, project
from train.init_from import find_initial, load_params
from train.metrics import read_metrics
from train.optimizer import make_optimizer
from train.setup import train
from train.step import Batch, make_functions, mean_gradient

ROOT = Path(__file__).parents[2]
COMPACT = DGAConfig(selection="streaming", group_size=3, focal_per_block=1)


@pytest.fixture
def gated(config: TrainConfig, imported: Path) -> TrainConfig:
  """A run that trains gates by distillation."""
  model = dataclasses.replace(config.model, attention="dga", dga=COMPACT, head_gates=True)
  return dataclasses.replace(
    config,
    model=model,
    init_from=str(imported),
    distillation=1.0,
    full_heads=0.5,
    learning_rate=0.1,
    eval_batches=0,
    checkpoint_every=6,
  )


@given(
  gates=hnp.arrays(np.float32, (3, 2), elements=st.floats(-2, 3, width=32)),
  mean=st.floats(0.05, 0.95),
  other=hnp.arrays(np.float32, (3, 2), elements=st.floats(0, 1, width=32)),
)
def test_projection(gates: np.ndarray, mean: float, other: np.ndarray) -> None:
  projected = np.asarray(project(jnp.asarray(gates), mean), np.float64)
  assert projected.min() >= 0
  assert projected.max() <= 1
  np.testing.assert_allclose(projected.mean(), mean, atol=1e-5)
  # The nearest point of a convex set: no feasible direction leads closer.
  blend = other.mean(dtype=np.float64)
  target = 1.0 if blend < mean else 0.0
  share = 0.0 if blend == mean else (mean - blend) / (target - blend)
  feasible = other + share * (target - other)
  assert ((gates - projected) * (feasible - projected)).sum() <= 1e-4


def test_only_gates_move_and_their_mean_stays(
  gated: TrainConfig, imported: Path, tmp_path: Path
) -> None:
  train(gated, tmp_path / "whole")
  losses = [record["loss"] for record in read_metrics(tmp_path / "whole") if "loss" in record]
  # The loss is the divergence from dense attention; a cross entropy would be above 1.
  assert 0 < losses[0] < 1
  params, before = (
    nnx.to_pure_dict(nnx.state(load_model(folder)[0], nnx.Param))
    for folder in (tmp_path / "whole", imported)
  )
  gates = params.pop(GATES)
  assert np.abs(gates - 0.5).max() > 0.1
  assert gates.min() >= 0
  assert gates.max() <= 1
  assert gates.mean() == pytest.approx(0.5, abs=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.float32(b)), params, before)

  # Without the checkpoint of the last step half of the run is left; it ends alike, bit for bit.
  shutil.copytree(tmp_path / "whole", tmp_path / "halves")
  shutil.rmtree(tmp_path / "halves" / "checkpoints" / "12")
  train(gated, tmp_path / "halves")
  resumed = load_model(tmp_path / "halves")[0]
  np.testing.assert_array_equal(resumed.head_gates[...], gates)

  # Budgets of these gates.
  output = tmp_path / "budgets.json"
  done = harden(tmp_path / "whole", output, "--keys=0.8")
  assert done.returncode == 0, done.stderr[-3000:]
  budgets = read_head_budgets(output)
  assert mean_head_keys(budgets.counts(), 512) <= 0.8 * 512
  num_full = budgets.counts()["full"]
  order = np.argsort(-np.asarray(gates), axis=None, kind="stable")
  full = np.flatnonzero(np.array(budgets.assignment).ravel() == 0)
  assert set(full) == set(order[:num_full])
  assert 0 < num_full < gates.size
  stored = json.loads(output.read_text())["calibration"]
  assert stored["cost"] <= stored["share"] == 0.8
  # Other numbers of heads, by the same gates.
  other = HeadBudgets((SinkWindow(window=8), "full"), ((1, 0), (0, 0)))
  (tmp_path / "other.json").write_text(other.to_json())
  done = harden(tmp_path / "whole", tmp_path / "like.json", f"--like={tmp_path / 'other.json'}")
  assert done.returncode == 0, done.stderr[-3000:]
  like = read_head_budgets(tmp_path / "like.json")
  assert like.settings == ("full", SinkWindow(window=8))
  assert np.flatnonzero(np.array(like.assignment).ravel() == 0).tolist() == [order[0]]

  # Training that begins with this run and has no gates begins with the same weights.
  model = dataclasses.replace(load_model_config(tmp_path / "whole"), head_gates=False)
  after = dataclasses.replace(gated, model=model, init_from=str(tmp_path / "whole"))
  assert GATES not in load_params(after, make_mesh(after.mesh))

  # Training under the budgets begins with permuted heads; no gates are trained for its model.
  under_budgets = dataclasses.replace(
    gated, model=dataclasses.replace(gated.model, head_gates=False), budgets=str(output)
  )
  under_budgets = dataclasses.replace(under_budgets, num_steps=3, distillation=0.5)
  train(under_budgets, tmp_path / "budgets")
  assert load_model_config(tmp_path / "budgets").head_budgets == budgets.permute_kv_heads(
    budgets.contiguous_order()
  )
  without = harden(tmp_path / "budgets", tmp_path / "none.json")
  assert without.returncode == 1
  assert "error: the model has no gates" in without.stderr
  assert "Traceback" not in without.stderr
  again = dataclasses.replace(gated, init_from=str(tmp_path / "budgets"))
  with pytest.raises(ValueError, match="gates choose the full heads of a model without budgets"):
    load_params(again, make_mesh(again.mesh))


def harden(workdir: Path, output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
  """Runs the command."""
  command = [sys.executable, "-m", "train.harden_gates", f"--workdir={workdir}"]
  command += [*flags, "--length=512", f"--output={output}"]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  return subprocess.run(
    command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True
  )


@pytest.fixture
def batch(config: TrainConfig) -> Batch:
  """Random tokens."""
  B, L = config.batch_size, config.data.sequence_length
  inputs, targets = jax.random.randint(jax.random.key(0), (2, B, L), 0, 257)
  return {
    "inputs": inputs,
    "targets": targets,
    "segment_ids": jnp.ones((B, L), jnp.int32),
    "loss_mask": jnp.ones((B, L), bool),
  }


def test_only_gates_have_gradients_and_gates_of_1_have_none_from_distillation(
  gated: TrainConfig, batch: Batch
) -> None:
  functions = make_functions(gated)
  params = functions.init().params
  shape = params[GATES].shape
  loss, _, grads = mean_gradient(
    gated, functions.graphdef, params | {GATES: jnp.full(shape, 0.5)}, batch
  )
  assert loss > 1e-4
  assert (np.abs(grads.pop(GATES)) > 0).all()
  jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), grads)
  # With gates of 1 the model is its teacher.
  loss, _, grads = mean_gradient(
    gated, functions.graphdef, params | {GATES: jnp.ones(shape)}, batch
  )
  assert abs(loss) < 1e-6
  np.testing.assert_allclose(grads[GATES], 0, atol=1e-6)


def test_distillation_mixes_both_losses(config: TrainConfig, batch: Batch) -> None:
  model = dataclasses.replace(config.model, attention="dga", dga=COMPACT)
  config = dataclasses.replace(config, model=model)
  functions = make_functions(config)
  params = functions.init().params
  by_share = {
    share: mean_gradient(
      dataclasses.replace(config, distillation=share), functions.graphdef, params, batch
    )
    for share in (0.0, 0.25, 1.0)
  }
  expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, by_share[0.0], by_share[1.0])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), by_share[0.25], expected
  )


def test_the_optimizer_has_a_state_for_gates_alone(gated: TrainConfig) -> None:
  variables = abstract_decoder(gated.model)[1]
  optimizer = make_optimizer(gated, variables)
  state = jax.eval_shape(optimizer.init, nnx.to_pure_dict(variables))
  gates = gated.model.num_layers * gated.model.num_kv_heads
  assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == gates


@pytest.mark.invalid_arguments
def test_errors(gated: TrainConfig) -> None:
  with pytest.raises(ValueError, match=r"init_from is None; it must be a folder with a model"):
    find_initial(dataclasses.replace(gated, init_from=None), None)
  with pytest.raises(ValueError, match=r"budgets is 'b\.json'; it must be None with model\.head_g"):
    dataclasses.replace(gated, budgets="b.json")
  with pytest.raises(ValueError, match=r"TrainConfig\.distillation is 1\.5"):
    dataclasses.replace(gated, distillation=1.5)
  with pytest.raises(ValueError, match=r"TrainConfig\.full_heads is 0"):
    dataclasses.replace(gated, full_heads=0)
