"""Builders of data sets: cached, complete, rebuilt after a change, safe when a build is killed."""

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from train.data import prepared
from train.data.config import DataConfig
from train.data.files import Corpus, Split
from train.data.local_text import build_local_text
from train.data.text import text_source

SHORT = [f"document {n}\r\n\tüber 東京 \N{GRINNING FACE}" for n in range(40)]


@pytest.fixture
def text_file(tmp_path: pathlib.Path) -> pathlib.Path:
  path = tmp_path / "text.txt"
  path.write_bytes("\0".join(SHORT).encode())
  return path


def config_of(path: pathlib.Path, **changes: Any) -> DataConfig:
  values: dict[str, Any] = {"sequence_length": 64, "tokenizer": "byte", **changes}
  return DataConfig(train_files=(str(path),), **values)


def modified(folder: pathlib.Path) -> dict[pathlib.Path, int]:
  """Modification time of each file, without the lock files of builds."""
  files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
  return {path: path.stat().st_mtime_ns for path in files}


def test_documents_come_back_unchanged_and_in_order(
  text_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  corpus = Corpus.find((str(text_file),), ())
  builder = build_local_text(corpus, tmp_path / "cache" / "text", corpus.fingerprint())
  splits: tuple[Split, ...] = ("train", "validation")
  for split in splits:
    texts = [example["text"].decode() for example in builder.as_data_source(split)]
    assert texts == list(corpus.documents(split))
    assert texts


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_a_second_build_reads_the_first(
  text_file: pathlib.Path, tmp_path: pathlib.Path, tokenizer: str
) -> None:
  config = config_of(text_file, tokenizer=tokenizer, vocab_size=300)
  first = text_source(config, tmp_path / "cache", seed=0)
  files = modified(tmp_path / "cache")
  second = text_source(config, tmp_path / "cache", seed=0)
  assert modified(tmp_path / "cache") == files
  assert first.fingerprint == second.fingerprint
  assert first.tokenizer.to_json() == second.tokenizer.to_json()


def test_a_changed_file_or_tokenizer_is_built_anew(
  text_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  def build(**changes: Any) -> str:
    return text_source(config_of(text_file, **changes), tmp_path / "cache", seed=0).fingerprint

  fingerprints = {build(), build(tokenizer="bpe", vocab_size=300)}
  files = modified(tmp_path / "cache")
  text_file.write_bytes(text_file.read_bytes().replace(b"document 7", b"dokument 7"))
  fingerprints.add(build())
  assert len(fingerprints) == 3
  # The old data set still exists for the run that started with it.
  assert files.items() <= modified(tmp_path / "cache").items()


@pytest.mark.parametrize("content", ["", "\n \0 \n"])
def test_a_corpus_without_text_is_refused(
  tmp_path: pathlib.Path, text_file: pathlib.Path, content: str
) -> None:
  blank = tmp_path / "blank.txt"
  blank.write_text(content)
  with pytest.raises(ValueError, match="train_files hold no text"):
    text_source(config_of(blank), tmp_path / "cache", seed=0)
  with pytest.raises(ValueError, match="no held-out text: validation_files are blank"):
    text_source(config_of(text_file, validation_files=(str(blank),)), tmp_path / "cache", seed=0)


def test_too_few_documents_to_hold_out_are_refused_with_the_remedy(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "one.txt"
  path.write_text("one document")
  with pytest.raises(ValueError, match="Name text in validation_files"):
    text_source(config_of(path), tmp_path / "cache", seed=0)


def test_a_file_that_is_no_text_is_named_and_leaves_nothing(tmp_path: pathlib.Path) -> None:
  (tmp_path / "good.txt").write_text("good")
  (tmp_path / "image.txt").write_bytes(b"\x89PNG\r\n")
  with pytest.raises(ValueError, match=r"image\.txt is not UTF-8 text"):
    text_source(config_of(tmp_path / "*.txt"), tmp_path / "cache", seed=0)
  assert modified(tmp_path / "cache") == {}


def test_files_that_change_while_they_are_read_are_not_kept(
  text_file: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  documents = Corpus.documents

  def appending(corpus: Corpus, split: Split) -> Iterator[str]:
    yield from documents(corpus, split)
    with text_file.open("a") as file:
      file.write("\0one more document")

  with monkeypatch.context() as patch:
    patch.setattr(Corpus, "documents", appending)
    with pytest.raises(ValueError, match=r"config\.data\.train_files .* changed while they were"):
      text_source(config_of(text_file), tmp_path / "cache", seed=0)
  assert modified(tmp_path / "cache") == {}
  assert text_source(config_of(text_file), tmp_path / "cache", seed=0).train_rows[""] > 0


def test_of_two_builds_at_once_one_waits_and_reads(
  text_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  corpus = Corpus.find((str(text_file),), ())
  built: list[Split] = []

  class Slow(Corpus):
    def documents(self, split: Split) -> Iterator[str]:
      built.append(split)
      time.sleep(0.5)
      yield from corpus.documents(split)

  def build() -> list[str]:
    slow = Slow(corpus.train_files, corpus.validation_files)
    builder = build_local_text(slow, tmp_path / "cache" / "text", slow.fingerprint())
    return [example["text"].decode() for example in builder.as_data_source("train")]

  with concurrent.futures.ThreadPoolExecutor() as threads:
    both = [threads.submit(build) for _ in range(2)]
  assert [texts.result() for texts in both] == [list(corpus.documents("train"))] * 2
  assert built == ["train", "validation"]


# Runs in a subprocess: a build with a limit on file sizes (as a full disk), without the limit, or
# with a kill at the last document.
_CHILD = """
import os, pathlib, resource, signal, sys
from train.data import files
from train.data.config import DataConfig
from train.data.pipeline import load_data

how, path, workdir = sys.argv[1:]
if how == "full":
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
if how == "killed":
  read_documents = files.read_documents
  def dying(path):
    yield from read_documents(path)
    os.kill(os.getpid(), signal.SIGKILL)
  files.read_documents = dying
data = load_data(DataConfig(train_files=(path,), tokenizer="byte"), workdir, seed=0, batch_size=2)
next(iter(data.train)), list(data.validation[""])
assert "tensorflow" not in sys.modules
print(data.fingerprint)
"""


def test_a_killed_or_failed_build_leaves_nothing_that_passes_as_whole(
  tmp_path: pathlib.Path,
) -> None:
  path = tmp_path / "text.txt"
  # Random text compresses badly, so the data set exceeds the limit on file sizes.
  path.write_text("\0".join(str(hash((n, "text"))) * 20 for n in range(200)))

  def child(how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(_CHILD)]
    temporary = tmp_path / "tmp"
    temporary.mkdir(exist_ok=True)
    return subprocess.run(
      [*command, how, str(path), str(tmp_path / "workdir")],
      env=os.environ | {"TMPDIR": str(temporary)},
      capture_output=True,
      text=True,
      check=False,
      cwd=pathlib.Path(__file__).parents[3],
    )

  full = child("full")
  assert full.returncode == 1
  last = full.stderr.splitlines()[-1]
  assert re.search(r"PreparationError: Could not write the data set to .*/text: .*Free some", last)
  assert last.count("Could not write") == 1
  assert modified(tmp_path / "workdir") == {}
  assert child("killed").returncode == -9
  # The next build deletes the leftovers of the killed build.
  assert list((tmp_path / "workdir").rglob("incomplete.*")) != []
  whole = child("whole")
  assert whole.returncode == 0, whole.stderr
  config = DataConfig(train_files=(str(path),), tokenizer="byte")
  assert list((tmp_path / "workdir").rglob("incomplete.*")) == []
  assert list((tmp_path / "workdir").rglob("*.partial")) == []
  assert list((tmp_path / "workdir").rglob("downloads")) == []
  assert list((tmp_path / "tmp").iterdir()) == []
  undisturbed = text_source(config, tmp_path / "elsewhere", seed=0)
  assert whole.stdout.strip() == undisturbed.fingerprint
  assert whole.stdout.strip().split("-")[0] in {
    folder.name for folder in (tmp_path / "workdir/data").iterdir()
  }


def damaged_file(cache: pathlib.Path, pattern: str) -> pathlib.Path:
  """Flips a bit of the first file that matches; returns it."""
  path = min(cache.rglob(pattern))
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  return path


@pytest.mark.parametrize(
  ("pattern", "folder"),
  [
    ("tokenizer.json", "bpe_300"),
    ("tokens_*/**/*-train.array_record*", "tokens_"),
    ("tokens_*/**/dataset_info.json", "tokens_"),
    ("tokens_*/**/features.json", "tokens_"),
    ("tokens_*/files.json", "tokens_"),
  ],
)
def test_damaged_data_name_their_folder_and_are_repaired(
  pattern: str, folder: str, text_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  config, cache = config_of(text_file, tokenizer="bpe", vocab_size=300), tmp_path / "cache"
  whole = text_source(config, cache, seed=0)
  path = damaged_file(cache, pattern)
  content = path.read_bytes()
  match = rf"prepared data in {re.escape(str(cache))}/\w+/{folder}.* are damaged: .*--repair_data"
  with pytest.raises(OSError, match=match):
    text_source(config, cache, seed=0)
  assert path.read_bytes() == content
  repaired = text_source(config, cache, seed=0, repair=True)
  assert path.read_bytes() != content
  assert repaired.fingerprint == whole.fingerprint
  for index in range(len(whole.validation[""])):
    for name, row in whole.validation[""][index].items():
      np.testing.assert_array_equal(repaired.validation[""][index][name], row)
  text_source(config, cache, seed=0)


def test_a_missing_file_of_prepared_data(text_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
  config, cache = config_of(text_file), tmp_path / "cache"
  text_source(config, cache, seed=0)
  next(cache.rglob("tokens_*/**/*-validation.array_record*")).unlink()
  with pytest.raises(OSError, match=r"validation\.array_record\S* cannot be read: No such file"):
    text_source(config, cache, seed=0)
  text_source(config, cache, seed=0, repair=True)


def test_prepared_data_are_read_without_a_lock(
  text_file: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Data sets may be on a read-only file system."""
  config, cache = config_of(text_file), tmp_path / "cache"
  first = text_source(config, cache, seed=0)

  def hold_lock(*_: object, **__: object) -> None:
    raise PermissionError("read only")

  monkeypatch.setattr(prepared, "hold_lock", hold_lock)
  assert text_source(config, cache, seed=0).fingerprint == first.fingerprint
