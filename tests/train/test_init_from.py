"""Training that starts from an imported model or from the model of another run."""

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

import dga_jax
from dga_jax import DGAConfig
from dga_jax.calibration.selector_weights import save_with_selector, with_selector
from dga_jax.checkpoint import CheckpointError, Checkpoints, load_config, load_model
from dga_jax.conversion.exporting import export_hugging_face
from dga_jax.head_budgets import read_head_budgets
from dga_jax.model import apply_budgets
from dga_jax.sharding import make_mesh
from train.config import make_config, to_dict, TrainConfig
from train.init_from import find_initial, load_params
from train.metrics import read_metrics
from train.setup import train

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "hugging_face"
DGA = DGAConfig(selection="streaming", group_size=6, focal_per_block=2)


def begin(config: TrainConfig, imported: Path, attention: str) -> TrainConfig:
  model = dataclasses.replace(config.model, attention=attention, dga=DGA)
  return dataclasses.replace(config, model=model, init_from=str(imported), learning_rate=3e-3)


@pytest.mark.parametrize("attention", ["dense", "dga"])
def test_training_starts_from_the_model(
  attention: str, config: TrainConfig, imported: Path, tmp_path: Path
) -> None:
  train(begin(config, imported, attention), tmp_path)
  held_out = [record["eval_loss"] for record in read_metrics(tmp_path) if "eval_loss" in record]
  model, trained, tokenizer = load_model(tmp_path)
  before, original, its_tokenizer = load_model(imported)
  assert tokenizer.to_json() == its_tokenizer.to_json()
  # The import determines the shapes. The config determines attention and dtypes.
  own = {"attention": attention, "dga": DGA, "dtype": "float32", "param_dtype": "float32"}
  assert trained == dataclasses.replace(original, **own)
  assert load_config(tmp_path)["origin"] == load_config(imported)["origin"]

  # The loss falls from that of the imported model, which is evaluated before the first step.
  assert held_out[-1] < held_out[0] - 0.1
  moved = jax.tree.map(
    lambda a, b: float(np.abs(np.float32(a) - np.float32(b)).max()),
    *(nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (model, before)),
  )
  # Twelve steps change a weight by at most the learning rate each, plus weight decay.
  assert all(0 < change < 0.1 for change in jax.tree.leaves(moved))


def test_parameters_are_loaded_in_the_param_dtype_of_the_config(
  config: TrainConfig, imported: Path
) -> None:
  before = nnx.to_pure_dict(nnx.state(load_model(imported)[0], nnx.Param))
  for dtype in ("float32", "bfloat16"):
    model = dataclasses.replace(config.model, param_dtype=dtype)
    of_import = dataclasses.replace(config, model=model, init_from=str(imported))
    params = load_params(of_import, make_mesh(config.mesh))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
    jax.tree.map(
      lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, a.dtype)), params, before
    )


def test_training_starts_with_calibrated_budgets(
  config: TrainConfig, imported: Path, tmp_path: Path
) -> None:
  """With a learning rate of 0 the weights stay those of apply_budgets; a second start resumes."""
  model, before, _ = load_model(imported)
  N = before.num_kv_heads
  window = {"window": 8, "sinks": 2}
  assignment = [[int(head == layer % N) for head in range(N)] for layer in range(before.num_layers)]
  path = tmp_path / "budgets.json"
  path.write_text(
    json.dumps({"settings": ["full", window], "assignment": assignment, "calibration": {"keys": 1}})
  )
  config = dataclasses.replace(
    config, init_from=str(imported), budgets=str(path), learning_rate=0.0, eval_batches=0
  )
  want = apply_budgets(model, read_head_budgets(path))
  for num_steps in (3, 3):
    train(dataclasses.replace(config, num_steps=num_steps), tmp_path / "run")
    got, trained, _ = load_model(tmp_path / "run")
    assert trained.attention == "head_budgets"
    assert trained.head_budgets == want.config.head_budgets
    jax.tree.map(
      lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, a.dtype)),
      *(nnx.to_pure_dict(nnx.state(one, nnx.Param)) for one in (got, want)),
    )
  # The export is whole in a folder of its own: weights, tokenizer and budgets.
  export_hugging_face(tmp_path / "run", tmp_path / "exported")
  moved = shutil.move(tmp_path / "exported", tmp_path / "elsewhere")
  loaded, _ = dga_jax.load(moved)
  tokens = np.arange(48).reshape(2, 24)
  np.testing.assert_allclose(loaded(tokens), got(tokens), rtol=1e-5, atol=1e-5)
  assert loaded.config.head_budgets == trained.head_budgets
  # Another file at the same path is another run.
  path.write_text(json.dumps({"settings": ["full"], "assignment": [[0] * N] * before.num_layers}))
  with pytest.raises(ValueError, match=r"whose budgets differ .* Restore the file"):
    train(dataclasses.replace(config, num_steps=4), tmp_path / "run")
  with pytest.raises(ValueError, match=r"TrainConfig\.budgets is 3"):
    dataclasses.replace(config, budgets=3)


def test_no_device_receives_a_whole_parameter(tmp_path: Path) -> None:
  """Runs in a subprocess with four simulated devices."""
  flags = "--xla_force_host_platform_device_count=4"
  environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-m", "tests.train.check_init_from", GOLDEN / "smollm", tmp_path]
  done = subprocess.run(
    command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-3000:]


def test_a_run_resumes_without_the_model_that_it_started_from(
  config: TrainConfig, imported: Path, tmp_path: Path
) -> None:
  copy = Path(shutil.copytree(imported, tmp_path / "imported"))
  config = begin(config, copy, "dense")
  train(dataclasses.replace(config, eval_batches=0), tmp_path / "whole")
  # The checkpoint of the last step is removed, so that half of the run is left.
  shutil.copytree(tmp_path / "whole", tmp_path / "halves")
  shutil.rmtree(tmp_path / "halves" / "checkpoints" / "12")
  shutil.rmtree(copy)
  train(dataclasses.replace(config, eval_batches=0), tmp_path / "halves")
  states = (nnx.state(load_model(tmp_path / name)[0]) for name in ("whole", "halves"))
  jax.tree.map(np.testing.assert_array_equal, *states)


def test_models_that_training_cannot_start_from_are_errors(
  config: TrainConfig, imported: Path, tmp_path: Path
) -> None:
  nowhere = dataclasses.replace(config, init_from=str(tmp_path / "none"))
  with pytest.raises(CheckpointError, match=r"no checkpoint in .*none"):
    train(nowhere, tmp_path / "run")
  model, _, tokenizer = load_model(imported)
  with Checkpoints(tmp_path / "fitted", keep=1) as checkpoints:  # As dga fit_selector writes it.
    checkpoints.save(
      0,
      params=nnx.to_pure_dict(nnx.state(model, nnx.Param)),
      training={"step": jnp.int32(0)},
      data=None,
      config=to_dict(config),
      tokenizer=tokenizer,
    )
  for workdir in (imported, tmp_path / "fitted"):
    with pytest.raises(ValueError, match=r"without a position.*--config\.init_from="):
      train(config, workdir)
  with pytest.raises(ValueError, match=r"TrainConfig\.init_from is 3"):
    dataclasses.replace(config, init_from=3)
  data = dataclasses.replace(config.data, kind="recall", sequence_length=128)
  with pytest.raises(ValueError, match="another vocabulary than data of kind 'recall'"):
    train(dataclasses.replace(config, init_from=str(imported), data=data), tmp_path / "recall")


def test_the_model_decides_whether_it_has_a_selector(
  config: TrainConfig, imported: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
  model, stored, tokenizer = load_model(imported)
  weights = np.zeros((stored.num_layers, stored.num_kv_heads, 2 * stored.head_dim + 2), np.float32)
  fitted = with_selector(model, DGA, weights)
  save_with_selector(fitted, load_config(imported), tokenizer, tmp_path / "selector")
  values = to_dict(begin(config, tmp_path / "selector", "dga"))
  values["model"]["dga"]["selector"] = "fitted"  # The config does not set model.focal_selector.
  begun = find_initial(make_config(values), values["init_from"]).config
  assert (begun.model.focal_selector, begun.model.dga.selector) == (True, "fitted")
  params = load_params(begun, make_mesh(begun.mesh))
  assert params["layers"]["attention"]["selector"].shape == weights.shape
  message = f"The model in {tmp_path / 'selector'} decides these keys of config.model: "
  assert message in caplog.text
  assert "rope_base is 100000.0 in place of 10000.0" in caplog.text
  assert "focal_selector" not in caplog.text
  longer = make_config({**values, "rope_base": 5e5})
  caplog.clear()
  assert find_initial(longer, longer.init_from).config.model.rope_base == 5e5
  assert "rope_base" not in caplog.text
  with pytest.raises(ValueError, match=r"rope_base is 500000\.0; .* None without init_from"):
    dataclasses.replace(config, rope_base=5e5)
  without = make_config({**values, "init_from": str(imported)})
  with pytest.raises(ValueError, match=r"focal_selector is False.*dga fit_selector"):
    find_initial(without, str(imported))
