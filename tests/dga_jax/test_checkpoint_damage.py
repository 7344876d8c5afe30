"""Damaged and hostile checkpoints: every change is detected and is one error."""

import dataclasses
import functools
import gc
import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dga_jax.checkpoint import Checkpoints, load_model
from dga_jax.checkpoint_files import (
  CheckpointError,
  find_damage,
  last_good_step,
  list_steps,
  set_aside,
)
from dga_jax.checkpoint_manifest import Manifest
from dga_jax.files.hashes import FileRecord
from dga_jax.tokenizer import Tokenizer
from tests.dga_jax.tiny_checkpoint import (
  append,
  CONFIG,
  delete_item,
  flip_a_bit,
  largest_file,
  make_params,
  save,
  save_two,
  truncate,
)

# Orbax abandons the other reads of a checkpoint when one fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


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


ITEMS = ("params", "training", "config", "tokenizer", "data", "verification")
DAMAGES = (truncate, flip_a_bit, append, Path.unlink, delete_item)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("item", ITEMS)
def test_damage_of_each_kind_to_each_item(damage: Any, item: str, workdir: Path) -> None:
  damage(largest_file(workdir / "checkpoints" / "4" / item))
  assert find_damage(workdir, 4) is not None
  assert find_damage(workdir, 2) is None
  assert last_good_step(workdir, other_than=4) == 2
  if item not in ("training", "data"):  # Loading a model reads neither.
    match = r"checkpoints/4 is damaged: .*last good one is of step 2.*--step=2, or move .*/4 "
    with pytest.raises(CheckpointError, match=match):
      load_model(workdir)
  load_model(workdir, step=2)


def test_the_manifest_covers_every_file(workdir: Path) -> None:
  folder = workdir / "checkpoints" / "4"
  items = {path for path in folder.glob("*/**/*") if path.is_file()}
  items = {path.relative_to(folder).as_posix() for path in items}
  covered = Manifest.read(folder).files.keys()
  # Orbax writes a marker file after each item, and therefore after the manifest too.
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
  # The parameters differ, so that no item of the two checkpoints is equal.
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
def test_flipped_bits_of_a_text_file_are_detected(item: str, workdir: Path) -> None:
  """Flips 64 bits, spread over the file, one at a time."""
  (path,) = (workdir / "checkpoints" / "4" / item).glob("m*")
  content = path.read_bytes()
  for bit in np.linspace(0, 8 * len(content) - 1, 64).astype(int):
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
    assert find_damage(workdir, 4) is not None, bit
  path.write_bytes(content)
  assert find_damage(workdir, 4) is None


def test_two_flipped_signs_are_detected(workdir: Path, params: Any) -> None:
  """The changed arrays are written by orbax itself, so that only the manifest reveals them."""
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
def test_metadata_files_of_orbax_are_not_needed(
  name: str, content: bytes | None, workdir: Path, params: Any
) -> None:
  """The files are beside the items, and no hash covers them."""
  path = workdir / "checkpoints" / "4" / name
  if content is None:
    path.unlink(missing_ok=True)
  else:
    path.write_bytes(content)
  load_model(workdir)
  with Checkpoints(workdir, keep=2) as checkpoints:
    save(checkpoints, 6, params)
  assert list_steps(workdir) == [4, 6]


def test_a_checkpoint_set_aside_does_not_count(workdir: Path) -> None:
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
  """A copy of a JSON value with one part replaced, deleted or nested."""
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
def test_hostile_json_with_matching_hashes_loads_or_is_one_error(item: str, workdir: Path) -> None:
  """The error names the checkpoint."""
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


def test_a_manifest_may_name_only_files_of_its_checkpoint(workdir: Path) -> None:
  folder = workdir / "checkpoints" / "4"
  manifest = Manifest.read(folder)
  for name in ("../2/config/metadata", "/etc/hostname", "config/../../2/config/metadata", "name"):
    files = {**manifest.files, name: FileRecord(1, "00")}
    forged = dataclasses.replace(manifest, files=files)
    (folder / "verification" / "manifest.json").write_text(forged.to_json())
    with pytest.raises(CheckpointError, match="is not the path of a file in a checkpoint"):
      load_model(workdir)
