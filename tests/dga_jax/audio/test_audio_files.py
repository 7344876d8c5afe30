"""μ-law samples and audio files: exact round trips, resampling, and errors that name the file."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from dga_jax.audio.files import read_audio, write_wav
from dga_jax.audio.mu_law import decode_mu_law, encode_mu_law, LEVELS
from dga_jax.audio.tokens import audio_tokenizer, samples_to_tokens, tokens_to_samples

RATE = 8000
SECONDS = np.arange(RATE) / RATE
TONE = 0.5 * np.sin(2 * np.pi * 440 * SECONDS)


def test_levels_round_trip_and_are_finer_near_zero() -> None:
  levels = np.arange(LEVELS)
  samples = decode_mu_law(levels)
  np.testing.assert_array_equal(encode_mu_law(samples), levels)
  assert samples[0] == -1
  assert samples[-1] == 1
  steps = np.diff(samples)
  assert (np.diff(steps[LEVELS // 2 :]) > 0).all()


def test_a_sample_is_off_by_at_most_a_step() -> None:
  x = np.linspace(-1, 1, 10_001)
  levels = encode_mu_law(x)
  nearest = np.sort(decode_mu_law(np.arange(LEVELS)))
  step = np.maximum(np.diff(nearest, prepend=-1.0)[levels], np.diff(nearest, append=1.0)[levels])
  assert (np.abs(decode_mu_law(levels) - x) <= step).all()


@pytest.mark.parametrize("wrong", [1.5, np.nan])
def test_samples_outside_of_the_range_are_refused(wrong) -> None:
  with pytest.raises(ValueError, match=r"samples must be from -1 to 1"):
    encode_mu_law(np.array([0.0, wrong]))


def test_tokens_are_words_of_the_tokenizer() -> None:
  tokens = samples_to_tokens(TONE)
  tokenizer = audio_tokenizer()
  assert tokenizer.vocab_size == LEVELS + 1
  assert tokenizer.encode(tokenizer.decode(tokens[:50])) == tokens[:50].tolist()
  assert tokenizer.end_id not in tokens
  np.testing.assert_array_equal(samples_to_tokens(tokens_to_samples(tokens)), tokens)
  with pytest.raises(ValueError, match="levels are 0 to 255"):
    tokens_to_samples(np.array([tokenizer.end_id]))


@pytest.mark.parametrize(
  ("suffix", "subtype", "bits"),
  [("wav", "PCM_U8", 7), ("wav", "PCM_16", 15), ("wav", "PCM_24", 23), ("flac", "PCM_24", 23)],
)
def test_files_of_every_width_are_read(tmp_path: Path, suffix, subtype, bits) -> None:
  path = tmp_path / f"tone.{suffix}"
  soundfile.write(path, TONE, RATE, subtype=subtype)
  got = read_audio(path, RATE)
  assert np.abs(got - TONE).max() <= 2.0**-bits + np.finfo(np.float32).eps


def test_channels_are_averaged(tmp_path: Path) -> None:
  path = tmp_path / "stereo.wav"
  soundfile.write(path, np.stack([TONE, np.zeros(RATE)], axis=1), RATE, subtype="FLOAT")
  np.testing.assert_allclose(read_audio(path, RATE), TONE / 2, rtol=1e-6, atol=1e-7)


def test_resampling_keeps_the_tone_and_removes_what_is_above_the_new_range(tmp_path: Path) -> None:
  path, rate = tmp_path / "two.wav", 44_100
  seconds = np.arange(rate) / rate
  high = 0.3 * np.sin(2 * np.pi * 9000 * seconds)  # Would alias to 1000 Hz at 8000 Hz.
  soundfile.write(path, 0.5 * np.sin(2 * np.pi * 440 * seconds) + high, rate, subtype="FLOAT")
  got = read_audio(path, RATE)
  assert abs(len(got) - RATE) <= 1
  power = np.abs(np.fft.rfft(got * np.hanning(len(got)))) ** 2
  frequency = np.fft.rfftfreq(len(got), 1 / RATE)
  assert abs(frequency[power.argmax()] - 440) <= 1
  assert power[np.abs(frequency - 1000) < 20].max() < 1e-6 * power.max()


def test_written_files_play_what_was_given(tmp_path: Path) -> None:
  path = tmp_path / "out.wav"
  write_wav(path, TONE, RATE)
  assert soundfile.info(path).subtype == "PCM_16"
  np.testing.assert_allclose(read_audio(path, RATE), TONE, atol=2.0**-15)
  assert [file.name for file in tmp_path.iterdir()] == ["out.wav"]


def test_a_file_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
  path = tmp_path / "out.wav"
  path.mkdir()
  with pytest.raises(OSError, match=r"Is a directory: '.*/out\.wav'"):
    write_wav(path, TONE, RATE)
  assert list(tmp_path.iterdir()) == [path]


def _damage(path: Path, kind: str) -> None:
  match kind:
    case "no audio":
      path.write_bytes(b"some text")
    case "no bytes":
      path.write_bytes(b"")
    case "empty":
      soundfile.write(path, np.zeros(0), RATE)
    case "silent":
      soundfile.write(path, np.zeros(RATE), RATE)
    case "loud":
      soundfile.write(path, 3 * TONE, RATE, subtype="FLOAT")
    case "not a number":
      soundfile.write(path, np.where(SECONDS > 0.5, np.nan, TONE), RATE, subtype="FLOAT")
    case "cut":
      soundfile.write(path, TONE, RATE, format="FLAC")
      path.write_bytes(path.read_bytes()[:2000])
    case "cut WAV":
      soundfile.write(path, TONE, RATE, subtype="PCM_24")
      path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize(
  ("kind", "message"),
  [
    ("no audio", "cannot be read as audio"),
    ("no bytes", "cannot be read as audio"),
    ("empty", "is empty"),
    ("silent", "is silent"),
    ("loud", "samples up to 1.5"),
    ("not a number", "samples up to nan"),
    ("cut", "cannot be read as audio|is damaged"),
    ("cut WAV", "is damaged: its header says 24044 bytes, and 23744 are there"),
  ],
)
def test_damaged_files_are_named(tmp_path: Path, kind, message) -> None:
  path = tmp_path / "bad.wav"
  _damage(path, kind)
  with pytest.raises(ValueError, match=message) as error:
    read_audio(path, RATE)
  assert str(path) in str(error.value)


@pytest.mark.parametrize("size", [0, 2**32 - 1])
def test_a_wav_file_from_a_pipe_has_no_size_and_is_read(tmp_path: Path, size: int) -> None:
  path = tmp_path / "pipe.wav"
  soundfile.write(path, TONE, RATE)
  content = bytearray(path.read_bytes())
  content[4:8] = size.to_bytes(4, "little")
  path.write_bytes(content)
  assert len(read_audio(path, RATE)) == RATE


def test_a_missing_file_is_named(tmp_path: Path) -> None:
  with pytest.raises(FileNotFoundError, match=r"none\.wav"):
    read_audio(tmp_path / "none.wav", RATE)
