"""The fuzz test of the readers with few mutants and pinned seeds; see `fuzz.py`."""

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.dga_jax import mutations
from tests.dga_jax.conversion import fuzz

MUTANTS = 300
NAMES = [
  "checkpoint_tokenizer",
  "config",
  "generation_config",
  "gguf",
  "gguf_sentencepiece",
  "index",
  "safetensors",
  "tokenizer",
  "tokenizer_config",
]


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz.Reader]:
  return fuzz.readers(tmp_path_factory.mktemp("fuzz"))


def test_every_reader_has_a_fuzz_case(readers: dict[str, fuzz.Reader]) -> None:
  assert sorted(readers) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_mutants_are_accepted_or_refused_in_time(
  name: str, readers: dict[str, fuzz.Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv("RUST_BACKTRACE", "0")
  reader = readers[name]
  whole = reader.file.read_bytes()
  assert reader.outcome(whole) == "accepted"
  before = fuzz.peak_memory()
  counts: Counter[str] = Counter()
  for number, content in fuzz.mutants(reader, MUTANTS, seed=7):
    try:
      counts[reader.outcome(content)] += 1
    except BaseException as error:
      error.add_note(f"mutant {number} of {name}")
      raise
  assert counts.total() == MUTANTS
  assert counts["refused"] > MUTANTS // 4
  assert counts["accepted"] > 0
  assert fuzz.peak_memory() - before < fuzz.MEMORY_BYTES


def test_faults_of_a_reader_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Covers another exception, an error without the path, and an endless loop."""
  path = tmp_path / "file"

  def reader(error: BaseException) -> fuzz.Reader:
    def read(_: Path) -> None:
      raise error

    return fuzz.Reader(path, path, read)

  with pytest.raises(IndexError):
    reader(IndexError("x")).outcome(b"")
  with pytest.raises(AssertionError, match="does not name"):
    reader(fuzz.ConversionError("it is damaged")).outcome(b"")
  assert reader(fuzz.ConversionError(f"{path} is damaged")).outcome(b"") == "refused"

  def never_ends(_: Path) -> None:
    while True:
      pass

  monkeypatch.setattr(fuzz, "HANG_SECONDS", 0.1)
  with pytest.raises(fuzz.TooSlow):
    fuzz.Reader(path, path, never_ends).outcome(b"")


def test_mutants_depend_only_on_their_seed() -> None:
  content = bytes(range(256)) * 4
  text = '{"a": [1, {"b": 2}], "c": "d"}'
  for mutate, whole in ((mutations.mutate_bytes, content), (mutations.mutate_json, text)):
    drawn = [mutate(whole, random.Random(seed)) for seed in range(50)]
    again = [mutate(whole, random.Random(seed)) for seed in range(50)]
    assert drawn == again
    assert len(set(drawn)) > 35
