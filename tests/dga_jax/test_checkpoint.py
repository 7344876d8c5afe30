"""Saving and loading checkpoints: round trips, full disks, killed saves, foreign folders."""

import dataclasses
import functools
import gc
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from dga_jax.checkpoint import Checkpoints, load_model, load_tokenizer
from dga_jax.checkpoint_files import CheckpointError, list_steps
from dga_jax.model import Decoder
from dga_jax.tokenizer import Tokenizer
from tests.dga_jax.tiny_checkpoint import (
  CONFIG,
  flip_a_bit,
  largest_file,
  make_params,
  save,
  save_two,
)

# Orbax abandons the other reads of a checkpoint when one fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TOKENS = jnp.arange(6)[None]


@pytest.fixture(scope="module")
def params() -> Any:
  return make_params()


@pytest.fixture(scope="module")
def saved(params: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
  return save_two(tmp_path_factory.mktemp("saved"), params)


@pytest.fixture
def workdir(saved: Path, tmp_path: Path) -> Iterator[Path]:
  """A workdir with checkpoints of the steps 2 and 4."""
  yield shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  gc.collect()  # Orbax's abandoned tasks log when they are collected, which must happen here.


def test_the_loaded_model_equals_the_saved_model(workdir: Path, params: Any) -> None:
  model, config, tokenizer = load_model(workdir)
  assert config == CONFIG
  expected = nnx.merge(nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))[0], params)
  np.testing.assert_array_equal(model(TOKENS), expected(TOKENS))
  assert tokenizer.to_json() == Tokenizer.byte_level().to_json()


_SAVE_ON_ANOTHER_DEVICE = """
import sys, jax
jax.config.update("jax_default_device", jax.devices()[1])
from pathlib import Path
from flax import nnx
from dga_jax.checkpoint import Checkpoints
from dga_jax.model import Decoder
from tests.dga_jax.tiny_checkpoint import CONFIG, save
params = nnx.to_pure_dict(nnx.state(Decoder(CONFIG, rngs=nnx.Rngs(1)), nnx.Param))
with Checkpoints(Path(sys.argv[1]), keep=2) as checkpoints:
  save(checkpoints, 1, params)
  save(checkpoints, 3, params)
"""


def test_a_checkpoint_loads_without_the_devices_that_saved_it(params: Any, tmp_path: Path) -> None:
  subprocess.run(
    [sys.executable, "-c", _SAVE_ON_ANOTHER_DEVICE, str(tmp_path)],
    env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    check=True,
    timeout=120,
  )
  model, _, _ = load_model(tmp_path)
  for name, value in nnx.to_pure_dict(nnx.state(model, nnx.Param)).items():
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), value, params[name])
  # The error about a damaged checkpoint names an undamaged one from the same devices.
  flip_a_bit(largest_file(tmp_path / "checkpoints" / "3" / "params"))
  with pytest.raises(CheckpointError, match="good one is of step 1"):
    load_model(tmp_path)
  gc.collect()


def test_training_state_is_restored(workdir: Path, params: Any) -> None:
  with Checkpoints(workdir, keep=2) as checkpoints:
    target = jax.eval_shape(lambda: params)
    restored, training = checkpoints.restore(
      2,
      params=target,
      training={"step": jax.ShapeDtypeStruct((), jnp.int32), "moment": target},
    )
    assert checkpoints.read_data(2) == {"next_index": 2}
  assert int(training["step"]) == 2
  jax.tree.map(np.testing.assert_array_equal, restored, params)
  jax.tree.map(
    np.testing.assert_array_equal, training["moment"], jax.tree.map(lambda x: x * 2, params)
  )


def test_the_newest_and_the_best_checkpoints_are_kept(params: Any, tmp_path: Path) -> None:
  losses = {1: None, 2: 1.0, 3: 3.0, 4: None, 5: 2.0, 6: None}
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 2, 3, 4):
      save(checkpoints, step, params, losses[step])
  # A later process knows the best checkpoint of an earlier one.
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (5, 6):
      save(checkpoints, step, params, losses[step])
  assert list_steps(tmp_path) == [2, 5, 6]


def test_arrays_may_be_donated_while_they_are_saved(params: Any, tmp_path: Path) -> None:
  ours = jax.tree.map(jnp.copy, params)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    save(checkpoints, 1, ours)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    jax.block_until_ready(overwrite(ours))
  model, _, _ = load_model(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model, nnx.Param)), params)


def test_a_missing_checkpoint_is_an_error(tmp_path: Path) -> None:
  with pytest.raises(CheckpointError, match=r"no checkpoint in .*checkpoints.*train\.main"):
    load_model(tmp_path)


def test_a_missing_step_is_an_error(workdir: Path) -> None:
  with pytest.raises(CheckpointError, match=r"no checkpoint of step 3 .*\[2, 4\]"):
    load_model(workdir, step=3)


def test_a_foreign_checkpoint_is_an_error(tmp_path: Path) -> None:
  with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
    manager.save(1, args=ocp.args.Composite(model=ocp.args.StandardSave({"w": jnp.ones(3)})))
  with pytest.raises(CheckpointError, match=r"not a checkpoint of this project.*'config'"):
    load_model(tmp_path)
  with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
    load_tokenizer(tmp_path)


def test_a_folder_with_the_name_of_a_checkpoint_is_an_error(tmp_path: Path) -> None:
  (tmp_path / "checkpoints" / "7").mkdir(parents=True)
  with pytest.raises(CheckpointError, match=r"checkpoints/7 .*no item 'config'"):
    load_model(tmp_path)


def test_another_attention_kind_reads_the_same_parameters(workdir: Path, params: Any) -> None:
  other = dataclasses.replace(CONFIG, rope_base=500000.0, dtype="bfloat16")
  model, config, _ = load_model(workdir, config=other)
  assert config == other
  jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model, nnx.Param)), params)


def test_a_config_that_disagrees_with_the_arrays_is_an_error(workdir: Path) -> None:
  with pytest.raises(ValueError, match=r"config\.mlp_dim is 24, .* trained with 16"):
    load_model(workdir, config=dataclasses.replace(CONFIG, mlp_dim=24))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
  """Writes beyond `size` bytes of a file fail in this context, as on a full disk."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_and_wait(checkpoints: Checkpoints, params: Any) -> None:
  save(checkpoints, 6, params)
  checkpoints.wait()


def save_and_poll(checkpoints: Checkpoints, params: Any) -> None:
  save(checkpoints, 6, params)
  while True:
    checkpoints.raise_if_failed()


@pytest.mark.parametrize("save_6", [save_and_wait, save_and_poll])
def test_a_save_on_a_full_disk_is_an_error(save_6: Any, workdir: Path, params: Any) -> None:
  match = r"step 6 in .*checkpoints failed: .*checkpoint of step 4 is intact"
  with (
    Checkpoints(workdir, keep=1) as checkpoints,
    files_of_at_most(2000),
    pytest.raises(CheckpointError, match=match),
  ):
    save_6(checkpoints, params)
  # The incomplete checkpoint takes no room.
  assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4"]
  load_model(workdir)
  with Checkpoints(workdir, keep=1) as checkpoints:
    save(checkpoints, 6, params)
  assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["6"]
  load_model(workdir)


def test_files_of_a_killed_save_are_not_a_checkpoint(workdir: Path, params: Any) -> None:
  whole = workdir / "checkpoints" / "4"
  shutil.copytree(whole, workdir / "checkpoints" / "6.orbax-checkpoint-tmp")
  assert list_steps(workdir) == [2, 4]
  with Checkpoints(workdir, keep=3) as checkpoints:
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4"]
    save(checkpoints, 6, params)
  assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4", "6"]


@pytest.mark.parametrize("failed_before", [True, False])
def test_an_error_while_closing_does_not_hide_another_error(
  params: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed_before: bool
) -> None:
  def close(_: Any) -> None:
    raise ValueError("a further write failed")

  def use() -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
      save(checkpoints, 1, params)
      if failed_before:
        raise CheckpointError("the first error")

  monkeypatch.setattr(ocp.CheckpointManager, "close", close)
  if failed_before:
    with pytest.raises(CheckpointError, match="the first error"):
      use()
  else:
    with pytest.raises(ValueError, match="a further write failed"):
      use()
