"""Saving and loading checkpoints: round trips, and the error for each kind of damage."""

import dataclasses
import functools
import gc
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
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
from dga_jax.checkpoint_files import (
  CheckpointError,
  find_damage,
  last_good_step,
  list_steps,
  set_aside,
)
from dga_jax.checkpoint_manifest import Manifest
from dga_jax.file_hashes import FileRecord
from dga_jax.model import Decoder, ModelConfig
from dga_jax.tokenizer import Tokenizer

# Orbax abandons the other reads of a checkpoint when one fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = ModelConfig(
  vocab_size=257,
  num_layers=2,
  embed_dim=8,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=16,
  attention="dense",
  dtype="float32",
)
TOKENS = jnp.arange(6)[None]


@pytest.fixture(scope="module")
def params() -> Any:
  return nnx.to_pure_dict(nnx.state(Decoder(CONFIG, rngs=nnx.Rngs(1)), nnx.Param))


def save(checkpoints: Checkpoints, step: int, params: Any, loss: float | None = None) -> None:
  checkpoints.save(
    step,
    params=params,
    training={"step": jnp.int32(step), "moment": jax.tree.map(lambda x: x * step, params)},
    data={"next_index": step},
    config={"model": CONFIG.to_dict()},
    tokenizer=Tokenizer.byte_level(),
    eval_loss=loss,
  )


@pytest.fixture(scope="module")
def saved(params: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
  workdir = tmp_path_factory.mktemp("saved")
  with Checkpoints(workdir, keep=2) as checkpoints:
    save(checkpoints, 2, params)
    save(checkpoints, 4, params)
  return workdir


@pytest.fixture
def workdir(saved: Path, tmp_path: Path) -> Iterator[Path]:
  """A run with the checkpoints 2 and 4."""
  yield shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  gc.collect()  # Orbax's abandoned tasks complain when they are collected: here, not at the end.


def largest_file(folder: Path) -> Path:
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_the_loaded_model_is_the_saved_one(workdir: Path, params: Any) -> None:
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
from tests.dga_jax.test_checkpoint import CONFIG, save
params = nnx.to_pure_dict(nnx.state(Decoder(CONFIG, rngs=nnx.Rngs(1)), nnx.Param))
with Checkpoints(Path(sys.argv[1]), keep=2) as checkpoints:
  save(checkpoints, 1, params)
  save(checkpoints, 3, params)
"""


def test_what_a_device_saved_is_read_where_it_is_absent(params: Any, tmp_path: Path) -> None:
  subprocess.run(
    [sys.executable, "-c", _SAVE_ON_ANOTHER_DEVICE, str(tmp_path)],
    env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    check=True,
    timeout=120,
  )
  model, _, _ = load_model(tmp_path)
  for name, value in nnx.to_pure_dict(nnx.state(model, nnx.Param)).items():
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), value, params[name])
  # The whole one that is offered in place of a damaged one was saved there too.
  flip_a_bit(largest_file(tmp_path / "checkpoints" / "3" / "params"))
  with pytest.raises(CheckpointError, match="good one is of step 1"):
    load_model(tmp_path)
  gc.collect()


def test_training_state_comes_back(workdir: Path, params: Any) -> None:
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


def test_keeps_the_newest_and_the_best(params: Any, tmp_path: Path) -> None:
  losses = {1: None, 2: 1.0, 3: 3.0, 4: None, 5: 2.0, 6: None}
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 2, 3, 4):
      save(checkpoints, step, params, losses[step])
  # What was best is known to a later process too.
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


def test_no_checkpoint(tmp_path: Path) -> None:
  with pytest.raises(CheckpointError, match=r"no checkpoint in .*checkpoints.*train\.main"):
    load_model(tmp_path)


def test_no_such_step(workdir: Path) -> None:
  with pytest.raises(CheckpointError, match=r"no checkpoint of step 3 .*\[2, 4\]"):
    load_model(workdir, step=3)


def test_a_foreign_checkpoint(tmp_path: Path) -> None:
  with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
    manager.save(1, args=ocp.args.Composite(model=ocp.args.StandardSave({"w": jnp.ones(3)})))
  with pytest.raises(CheckpointError, match=r"not a checkpoint of this project.*'config'"):
    load_model(tmp_path)
  with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
    load_tokenizer(tmp_path)


def test_a_folder_that_only_looks_like_a_checkpoint(tmp_path: Path) -> None:
  (tmp_path / "checkpoints" / "7").mkdir(parents=True)
  with pytest.raises(CheckpointError, match=r"checkpoints/7 .*no item 'config'"):
    load_model(tmp_path)


def truncate(path: Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def append(path: Path) -> None:
  path.write_bytes(path.read_bytes() + b"\0")


def flip_a_bit(path: Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def delete_item(path: Path) -> None:
  shutil.rmtree(path.parent)


ITEMS = ("params", "training", "config", "tokenizer", "data", "verification")
DAMAGES = (truncate, flip_a_bit, append, Path.unlink, delete_item)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("item", ITEMS)
def test_damage_of_each_kind_to_each_item(damage: Any, item: str, workdir: Path) -> None:
  damage(largest_file(workdir / "checkpoints" / "4" / item))
  assert find_damage(workdir, 4) is not None
  assert find_damage(workdir, 2) is None
  assert last_good_step(workdir, other_than=4) == 2
  if item not in ("training", "data"):  # A model needs neither.
    match = r"checkpoints/4 is damaged: .*last good one is of step 2.*--step=2, or move .*/4 "
    with pytest.raises(CheckpointError, match=match):
      load_model(workdir)
  load_model(workdir, step=2)


def test_the_manifest_covers_every_file(workdir: Path) -> None:
  folder = workdir / "checkpoints" / "4"
  items = {path for path in folder.glob("*/**/*") if path.is_file()}
  items = {path.relative_to(folder).as_posix() for path in items}
  covered = Manifest.read(folder).files.keys()
  # Orbax writes a mark of its own after each item, and so after the manifest too.
  own = {name for name in items if name.startswith("verification/")}
  assert own == {"verification/manifest.json", "verification/commit_success.txt"}
  assert covered == items - own
  assert {name.partition("/")[0] for name in covered} == {*ITEMS} - {"verification"}


def test_a_renamed_step_folder(workdir: Path) -> None:
  (workdir / "checkpoints" / "4").rename(workdir / "checkpoints" / "6")
  with pytest.raises(CheckpointError, match=r"/6 is damaged: its manifest is of step 4\..*step 2"):
    load_model(workdir)


@pytest.mark.parametrize("item", ITEMS)
def test_items_exchanged_between_checkpoints(item: str, workdir: Path, params: Any) -> None:
  # Parameters that differ, so that no item of the two checkpoints is the same.
  other = jax.tree.map(lambda x: x + 1, params)
  with Checkpoints(workdir, keep=9) as checkpoints:
    checkpoints.save(
      6,
      params=other,
      training={"step": jnp.int32(6), "moment": other},
      data={"next_index": 6},
      config={"model": CONFIG.to_dict(), "seed": 6},
      tokenizer=Tokenizer.words(["six"]),
    )
  steps = workdir / "checkpoints"
  (steps / "4" / item).rename(steps / "kept")
  (steps / "6" / item).rename(steps / "4" / item)
  (steps / "kept").rename(steps / "6" / item)
  assert [find_damage(workdir, step) is None for step in (2, 4, 6)] == [True, False, False]


def test_an_edited_position(workdir: Path) -> None:
  (path,) = (workdir / "checkpoints" / "4" / "data").glob("metadata")
  path.write_text(json.dumps({"next_index": 5}))
  with (
    Checkpoints(workdir, keep=2) as checkpoints,
    pytest.raises(CheckpointError, match="data/metadata does not have the hash"),
  ):
    checkpoints.read_data(4)


@pytest.mark.parametrize("item", ["config", "tokenizer", "data", "verification"])
def test_every_flipped_bit_of_a_text_is_found(item: str, workdir: Path) -> None:
  """64 bits, spread over the file."""
  (path,) = (workdir / "checkpoints" / "4" / item).glob("m*")
  content = path.read_bytes()
  for bit in np.linspace(0, 8 * len(content) - 1, 64).astype(int):
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
    assert find_damage(workdir, 4) is not None, bit
  path.write_bytes(content)
  assert find_damage(workdir, 4) is None


def test_two_flipped_signs_are_found(workdir: Path, params: Any) -> None:
  """Arrays that orbax itself has written in place of the saved ones."""
  flipped = params | {"embedding": params["embedding"].at[3:5, 2].multiply(-1)}
  folder = workdir / "checkpoints" / "4" / "params"
  with ocp.StandardCheckpointer() as writer:
    writer.save(folder, flipped, force=True)
  with pytest.raises(CheckpointError, match="checkpoints/4 is damaged: params/"):
    load_model(workdir)


def test_processes_divide_the_files(workdir: Path) -> None:
  folder = workdir / "checkpoints" / "4"
  for path in sorted(folder.glob("params/**/*")):
    if path.is_file() and path.name != "commit_success.txt":
      content = path.read_bytes()
      path.write_bytes(content + b"x")
      found = [find_damage(workdir, 4, share=(index, 3)) for index in range(3)]
      assert sum(damage is not None for damage in found) == 1
      path.write_bytes(content)


def test_a_checkpoint_from_before_the_manifest(
  workdir: Path, caplog: pytest.LogCaptureFixture
) -> None:
  (workdir / "checkpoints" / "4" / "verification").rename(workdir / "checkpoints/4/checksums")
  load_model(workdir)
  assert "checkpoints/4 was saved by a version without hashes of files" in caplog.text


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "commit_success.txt"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b'{"item_handlers": 3}', b"\xff\0"])
def test_notes_of_orbax_are_not_needed(
  name: str, content: bytes | None, workdir: Path, params: Any
) -> None:
  """They lie beside the items, and no hash covers them."""
  path = workdir / "checkpoints" / "4" / name
  if content is None:
    path.unlink(missing_ok=True)
  else:
    path.write_bytes(content)
  load_model(workdir)
  with Checkpoints(workdir, keep=2) as checkpoints:
    save(checkpoints, 6, params)
  assert list_steps(workdir) == [4, 6]


def test_a_checkpoint_set_aside_is_none(workdir: Path) -> None:
  assert set_aside(workdir, 4) == workdir / "checkpoints" / "4.set_aside_1"
  assert list_steps(workdir) == [2]
  load_model(workdir)


def test_every_checkpoint_damaged(workdir: Path) -> None:
  for step in (2, 4):
    truncate(largest_file(workdir / "checkpoints" / str(step) / "params"))
  with pytest.raises(CheckpointError, match="No other checkpoint there is whole"):
    load_model(workdir)


HOSTILE: tuple[Any, ...] = (
  *(None, True, -1, 0, 10**9, 2**31, 2**63, 1e300, float("nan")),
  *("", "x", "\ud800", [], [1], {}, {"a": 1}),
)


def mutate(values: Any, rng: random.Random) -> Any:
  """The JSON value with one of its parts replaced, deleted or nested."""
  if isinstance(values, dict | list) and values and rng.random() < 0.9:
    copy = values.copy()
    key = rng.choice(sorted(copy) if isinstance(copy, dict) else range(len(copy)))
    if rng.random() < 0.1:
      del copy[key]
    else:
      copy[key] = mutate(copy[key], rng)
    return copy
  if rng.random() < 0.1:
    return functools.reduce(lambda nested, _: [nested], range(500), values)
  return rng.choice(HOSTILE)


@pytest.mark.parametrize("item", ["config", "tokenizer"])
def test_hostile_texts_with_a_fitting_manifest(item: str, workdir: Path) -> None:
  """No hash finds them. Each loads, or is one error that names the checkpoint."""
  rng = random.Random(0)
  folder = workdir / "checkpoints" / "4"
  path = folder / item / "metadata"
  content, manifest = json.loads(path.read_text()), Manifest.read(folder)
  refused = 0
  for _ in range(80):
    path.write_text(json.dumps(mutate(content, rng)))
    files = {**manifest.files, f"{item}/metadata": FileRecord.from_file(path)}
    forged = dataclasses.replace(manifest, files=files)
    (folder / "verification" / "manifest.json").write_text(forged.to_json())
    start = time.monotonic()
    try:
      load_model(workdir)
    except CheckpointError as error:
      assert str(folder) in str(error)  # noqa: PT017
      refused += 1
    assert time.monotonic() - start < 30
  assert refused > 20


@pytest.mark.parametrize(
  "manifest",
  [
    b"",
    b"[" * 100_000,
    b"[]",
    b'{"format": 2, "blake2b": "", "manifest": {}}',
    b'{"format": "1"}',
    b'{"format": 1, "manifest": {"step": 4}}',
    b"\xff\xfe",
    b"9" * 5000,
  ],
)
def test_hostile_manifests(manifest: bytes, workdir: Path) -> None:
  (workdir / "checkpoints" / "4" / "verification" / "manifest.json").write_bytes(manifest)
  match = r"checkpoints/4 is damaged: verification/manifest.json is unreadable: .*step 2"
  with pytest.raises(CheckpointError, match=match):
    load_model(workdir)


def test_a_manifest_names_no_file_outside_of_its_checkpoint(workdir: Path) -> None:
  folder = workdir / "checkpoints" / "4"
  manifest = Manifest.read(folder)
  for name in ("../2/config/metadata", "/etc/hostname", "config/../../2/config/metadata", "name"):
    files = {**manifest.files, name: FileRecord(1, "00")}
    forged = dataclasses.replace(manifest, files=files)
    (folder / "verification" / "manifest.json").write_text(forged.to_json())
    with pytest.raises(CheckpointError, match="is not the path of a file in a checkpoint"):
      load_model(workdir)


def test_another_attention_kind_reads_the_same_parameters(workdir: Path, params: Any) -> None:
  other = dataclasses.replace(CONFIG, rope_base=500000.0, dtype="bfloat16")
  model, config, _ = load_model(workdir, config=other)
  assert config == other
  jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model, nnx.Param)), params)


def test_a_config_that_disagrees(workdir: Path) -> None:
  with pytest.raises(ValueError, match=r"config\.mlp_dim is 24, .* trained with 16"):
    load_model(workdir, config=dataclasses.replace(CONFIG, mlp_dim=24))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
  """Writes beyond `size` bytes of a file fail, as on a full disk."""
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
def test_a_save_without_room(save_6: Any, workdir: Path, params: Any) -> None:
  match = r"step 6 in .*checkpoints failed: .*checkpoint of step 4 is intact"
  with (
    Checkpoints(workdir, keep=1) as checkpoints,
    files_of_at_most(2000),
    pytest.raises(CheckpointError, match=match),
  ):
    save_6(checkpoints, params)
  assert list_steps(workdir) == [2, 4]
  load_model(workdir)
  # Once there is room, a new process goes on and clears up.
  with Checkpoints(workdir, keep=1) as checkpoints:
    save(checkpoints, 6, params)
  assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["6"]
  load_model(workdir)


def test_what_a_killed_save_leaves_is_no_checkpoint(workdir: Path, params: Any) -> None:
  whole = workdir / "checkpoints" / "4"
  shutil.copytree(whole, workdir / "checkpoints" / "6.orbax-checkpoint-tmp")
  assert list_steps(workdir) == [2, 4]
  with Checkpoints(workdir, keep=3) as checkpoints:
    save(checkpoints, 6, params)
  assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4", "6"]


@pytest.mark.parametrize("failed_before", [True, False])
def test_an_error_while_closing_hides_no_other(
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
