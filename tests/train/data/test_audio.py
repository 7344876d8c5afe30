"""Audio files as training data: tokens of whole files, held-out files, the sample rate."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from dga_jax.audio.tokens import samples_to_tokens
from train.data.config import AudioConfig, DataConfig
from train.data.pipeline import load_data
from train.evaluate import token_lengths

RATE, LENGTH = 8000, 64


def chirp(seed: int, samples: int) -> np.ndarray:
  """A tone whose frequency rises."""
  seconds = np.arange(samples) / RATE
  return 0.8 * np.sin(2 * np.pi * (200 + 50 * seed) * seconds * (1 + 3 * seconds))


def write_files(folder: Path, count: int) -> list[np.ndarray]:
  """Files of 100, 130, ... samples; returns the tokens of each."""
  folder.mkdir(exist_ok=True)
  tokens = []
  for index in range(count):
    path = folder / f"{index:02}.wav"
    soundfile.write(path, chirp(index, 100 + 30 * index), RATE, subtype="FLOAT")
    tokens.append(samples_to_tokens(chirp(index, 100 + 30 * index).astype(np.float32)))
  return tokens


def load(folder: Path, **changes):
  values = {"kind": "audio", "sequence_length": LENGTH, "train_files": (f"{folder}/*.wav",)}
  config = DataConfig(**(values | changes))
  return load_data(config, folder / "run", seed=0, batch_size=1)


def rows_of(batches, count: int) -> list[dict[str, np.ndarray]]:
  iterator = iter(batches)
  return [{name: array[0] for name, array in next(iterator).items()} for _ in range(count)]


def documents(rows) -> set[bytes]:
  """The targets of each document's piece in the rows."""
  return {
    row["targets"][row["segment_ids"] == segment].tobytes()
    for row in rows
    for segment in range(1, row["segment_ids"].max() + 1)
  }


def pieces(tokens: np.ndarray, end: int) -> set[bytes]:
  """The targets of a file cut to rows: its tokens and the end token."""
  targets = np.append(tokens, end).astype(np.int32)
  return {targets[start : start + LENGTH].tobytes() for start in range(0, len(targets), LENGTH)}


def test_rows_are_the_files_and_every_8th_file_is_held_out(tmp_path: Path) -> None:
  tokens = write_files(tmp_path / "sound", 9)
  data = load(tmp_path / "sound")
  end = data.tokenizer.end_id
  held_out = rows_of(data.validation[""], 5)
  assert documents(held_out) == pieces(tokens[7], end)
  train = rows_of(data.train, 60)
  assert documents(train) == set().union(*(pieces(t, end) for t in [*tokens[:7], tokens[8]]))
  for row in train:
    np.testing.assert_array_equal(row["loss_mask"], row["segment_ids"] > 0)
  data.close()


def test_named_files_are_held_out(tmp_path: Path) -> None:
  write_files(tmp_path / "sound", 1)
  tokens = write_files(tmp_path / "other", 2)
  (tmp_path / "other" / "00.wav").unlink()
  data = load(tmp_path / "sound", validation_files=(f"{tmp_path}/other/*.wav",))
  assert documents(rows_of(data.validation[""], 3)) == pieces(tokens[1], data.tokenizer.end_id)
  data.close()


def test_the_fingerprint_depends_on_the_sample_rate(tmp_path: Path) -> None:
  write_files(tmp_path / "sound", 8)
  first, second = load(tmp_path / "sound"), load(tmp_path / "sound", audio=AudioConfig(4000))
  assert first.fingerprint != second.fingerprint
  assert len(rows_of(second.validation[""], 3)[0]["inputs"]) == LENGTH
  first.close()
  second.close()


def test_too_few_files_to_hold_one_out(tmp_path: Path) -> None:
  write_files(tmp_path / "sound", 3)
  with pytest.raises(ValueError, match="Name files in validation_files"):
    load(tmp_path / "sound")


def test_a_silent_file_is_named_and_nothing_is_left(tmp_path: Path) -> None:
  write_files(tmp_path / "sound", 8)
  soundfile.write(tmp_path / "sound" / "03.wav", np.zeros(50), RATE)
  with pytest.raises(ValueError, match=r"03\.wav is silent"):
    load(tmp_path / "sound")
  assert not [
    path
    for path in (tmp_path / "sound" / "run").rglob("*")
    if path.suffix != ".lock" and path.is_file()
  ]


@pytest.mark.parametrize("files", [(), ("python-stdlib",)])
def test_configs_without_audio_files_are_refused(files) -> None:
  with pytest.raises(ValueError, match=r"train_files.*WAV or FLAC"):
    DataConfig(kind="audio", train_files=files)


def test_a_sample_is_one_byte_of_the_held_out_loss(tmp_path: Path) -> None:
  write_files(tmp_path / "sound", 8)
  data = load(tmp_path / "sound")
  lengths = token_lengths(data.tokenizer, 257, "audio")
  assert lengths[data.tokenizer.end_id] == 0
  assert (np.delete(lengths, data.tokenizer.end_id) == 1).all()
  data.close()
