"""Checks runs with head budgets on meshes of four devices; test_head_order.py runs this module."""

import dataclasses
import shutil
import sys
from pathlib import Path

import jax
import numpy as np

import dga_jax
from dga_jax import HeadBudgets, SinkWindow
from dga_jax.conversion.hugging_face import HuggingFaceFolder
from dga_jax.conversion.importing import import_model
from dga_jax.head_budgets import FULL, split_row
from dga_jax.loading import load_with_facts
from dga_jax.sharding import make_mesh, MeshConfig
from tests.train.tiny import tiny_config, write_corpus
from train.config import TrainConfig
from train.init_from import find_initial, load_params
from train.metrics import read_metrics
from train.setup import train

# With the heads of a setting side by side, one of two devices would have every full head.
BUDGETS = HeadBudgets((FULL, SinkWindow(8, sinks=2)), ((0, 0, 1, 1), (1, 0, 1, 0)))
BALANCED = ((0, 1, 0, 1), (0, 1, 0, 1))
SPLIT = MeshConfig(data=1, tensor=2, context=2)


def losses(workdir: Path) -> dict[int, float]:
  return {each["step"]: each["loss"] for each in read_metrics(workdir) if "loss" in each}


def run(config: TrainConfig, mesh: MeshConfig, workdir: Path) -> dict[int, float]:
  assert train(dataclasses.replace(config, mesh=mesh), workdir)
  return losses(workdir)


def check_start(config: TrainConfig) -> None:
  """Every device has its share of every setting, and no device receives all heads."""
  config = dataclasses.replace(config, mesh=MeshConfig(data=2, tensor=2))
  initial = find_initial(config, config.init_from)
  assert initial.config.model.head_budgets.assignment == BALANCED
  for row in BALANCED:
    parts = split_row(row, 2)
    assert [part.count(0) for part in parts] == [1, 1]
  params = load_params(config, make_mesh(config.mesh), initial.budgets)
  value = params["layers"]["attention"]["value"]
  assert {shard.data.shape for shard in value.addressable_shards} == {(2, 32, 2, 8)}
  one = load_params(config, make_mesh(MeshConfig(), jax.devices()[:1]))
  source = one["layers"]["attention"]["value"]
  order = np.array([[0, 2, 1, 3], [1, 0, 3, 2]])
  np.testing.assert_array_equal(value, np.take_along_axis(source, order[:, None, :, None], axis=2))


def check_runs(config: TrainConfig, workdir: Path) -> None:
  """A run on a mesh that splits heads and sequences has the losses of one that splits rows alone.

  So has a run that continues on another mesh: parameters and moments follow their heads.
  """
  want = run(config, MeshConfig(), workdir / "rows")
  assert len(want) == config.num_steps
  split = run(config, SPLIT, workdir / "split")
  shutil.copytree(workdir / "rows", workdir / "moved")
  shutil.rmtree(workdir / "moved" / "checkpoints" / str(config.num_steps))
  moved = run(config, SPLIT, workdir / "moved")
  for step, loss in want.items():
    np.testing.assert_allclose([split[step], moved[step]], loss, rtol=1e-5)
  # `load` restores the order for one device.
  tokens = np.arange(48).reshape(2, 24)
  outputs = []
  for name in ("rows", "moved"):
    model, _ = dga_jax.load(workdir / name)
    assert model.config.head_budgets.assignment == ((0, 0, 1, 1),) * 2
    for parts, wanted in ((2, BALANCED), (4, ((0, 0, 1, 1),) * 2)):  # Two heads of a setting.
      loaded = load_with_facts(workdir / name, parts=parts).model
      assert loaded.config.head_budgets.assignment == wanted
    outputs.append(model(tokens))
  np.testing.assert_allclose(*outputs, atol=1e-3)


def main(folder: Path, workdir: Path) -> None:
  source = HuggingFaceFolder(folder)
  import_model(source, source.config(), workdir / "imported")
  write_corpus(workdir)
  tiny = tiny_config(workdir, workdir / "data")
  own = {"num_heads": 4, "num_kv_heads": 4, "attention": "head_budgets", "head_budgets": BUDGETS}
  model = dataclasses.replace(tiny.model, **own)
  config = dataclasses.replace(
    tiny,
    model=model,
    init_from=str(workdir / "imported"),
    num_steps=4,
    checkpoint_every=2,
    log_every=1,
    eval_batches=0,
    grad_accumulation=1,
  )
  check_start(config)
  path = workdir / "budgets.json"
  path.write_text(BUDGETS.to_json())
  check_runs(dataclasses.replace(config, model=tiny.model, budgets=str(path)), workdir)


if __name__ == "__main__":
  jax.config.update("jax_numpy_rank_promotion", "raise")
  jax.config.update("jax_disable_most_optimizations", True)
  main(Path(sys.argv[1]), Path(sys.argv[2]))
