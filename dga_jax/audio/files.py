"""Reads and writes audio files: WAV, FLAC and whatever else libsndfile reads."""

import os
from pathlib import Path

import numpy as np
from jaxtyping import Float

from dga_jax.files.whole_file import whole_file

# A file of a few bytes can declare hours of sound.
_LONGEST_SECONDS = 12 * 3600

# Sizes in the header of a WAV file that was written to a pipe.
_UNKNOWN_SIZES = (0, 2**32 - 1)


def read_audio(path: str | os.PathLike[str], sample_rate: int) -> Float[np.ndarray, "T"]:
  """The samples of a file as float32, with the mean of its channels, at `sample_rate`.

  Any sample format is read (8 to 32 bit integers, floats). soxr resamples, with a low-pass filter.

  Args:
    path: the file.
    sample_rate: samples a second of the result.

  Returns:
    Samples from −1 to 1. The filter of resampling can exceed that range, and the excess is clipped.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is damaged, empty or silent, is longer than 12 hours, or has samples that
      are NaN or outside of −1 to 1; the message names the file.
  """
  import soundfile
  import soxr

  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"There is no audio file {path}.")
  _check_wav_size(path)
  try:
    with soundfile.SoundFile(path) as file:
      rate, seconds = file.samplerate, file.frames / file.samplerate
      if seconds > _LONGEST_SECONDS:
        raise ValueError(f"{path} has {seconds / 3600:.0f} hours of sound; cut it into parts.")
      samples_TxC = file.read(dtype="float32", always_2d=True)
      expected = file.frames
  except (soundfile.SoundFileError, MemoryError) as error:
    raise ValueError(
      f"{path} cannot be read as audio: {error} Convert it to WAV or FLAC."
    ) from error
  if len(samples_TxC) < expected:
    raise ValueError(
      f"{path} is damaged: its header says {expected} samples, and {len(samples_TxC)} are there."
    )
  if not len(samples_TxC):
    raise ValueError(f"{path} is empty: it has no sample. Leave it out.")
  peak = np.abs(samples_TxC).max()
  if not peak <= 1:
    raise ValueError(f"{path} has samples up to {peak}; they must be from -1 to 1. Scale the file.")
  samples_T = samples_TxC.mean(axis=1)
  if not samples_T.any():
    raise ValueError(f"{path} is silent: every sample is 0. Leave it out.")
  if rate != sample_rate:
    samples_T = soxr.resample(samples_T, rate, sample_rate)
    if not len(samples_T):
      raise ValueError(f"{path} is shorter than one sample at {sample_rate} Hz. Leave it out.")
  return np.clip(samples_T, -1, 1)


def _check_wav_size(path: Path) -> None:
  """Raises ValueError for a WAV file with fewer bytes than its header says.

  libsndfile reads the samples that are there and reports no error.
  """
  with path.open("rb") as file:
    header = file.read(12)
  if header[:4] != b"RIFF" or header[8:] != b"WAVE":
    return
  size = int.from_bytes(header[4:8], "little")
  found = path.stat().st_size
  # Some programs count a byte of padding that they do not write.
  if size not in _UNKNOWN_SIZES and found < size + 8 - 1:
    raise ValueError(
      f"{path} is damaged: its header says {size + 8} bytes, and {found} are there. Copy it again."
    )


def write_wav(
  path: str | os.PathLike[str], samples_T: Float[np.ndarray, "T"], sample_rate: int
) -> None:
  """Writes samples from −1 to 1 as a WAV file of 16 bits, whole or not at all; makes its folder.

  Raises:
    OSError: the file could not be written.
  """
  import soundfile

  with whole_file(path) as partial:
    try:
      soundfile.write(partial, samples_T, sample_rate, subtype="PCM_16", format="WAV")
    except soundfile.SoundFileError as error:
      raise OSError(f"Could not write {path}: {error}") from error
